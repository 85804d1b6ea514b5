"""A conversation typed line by line: questions, files attached by path, answers shown as they are generated."""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from modalloy.errors import MediaError, ModalloyError, nearest, plain
from modalloy.model.chat import ChatModel
from modalloy.model.rendering import Message
from modalloy.report.text import is_unicode, one_line, printable
from modalloy.senses.media import ENDINGS

# a word, or a path in quotes or with escapes, as terminals write a file that is dropped on them
WORD = re.compile(r"""(?:'[^']+'|"[^"]+")(?=[\s.,;:!?]|$)|(?:\\.|[^\s\\])+""")


def to_stdout(text: str) -> None:
    print(text, end="", flush=True)


def to_stderr(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)


@dataclass
class Session:
    """A conversation that keeps its turns, media in the turn that they were attached to.

    `write` gets the answers piece by piece, `say` every other line. A turn that fails leaves everything as it was.
    """

    model: ChatModel
    max_new_tokens: int = 64
    write: Callable[[str], None] = to_stdout
    say: Callable[[str], None] = to_stderr
    turns: list[Message] = field(default_factory=list)
    attached: list[dict[str, Any]] = field(default_factory=list)  # content parts of the next turn

    def run(self, lines: Iterable[str]) -> None:
        """Answer line after line, until /exit or the last one. A user's mistake is one line, and the session goes on."""
        self.say(f"takes {', '.join(['text', *self.model.modalities])}; /help lists the commands")
        for line in lines:
            if line.strip() == "/exit":
                break
            try:
                self.take(line.strip())
            except ModalloyError as error:
                self.say(f"error: {one_line(str(error))}")
            except KeyboardInterrupt:
                self.write("\n")
                self.say("stopped; this turn is forgotten")

    def take(self, line: str) -> None:
        """Obey a command; or attach the files that the line names, and ask what is left of it."""
        command, _, rest = line.partition(" ")
        commands = self._commands()
        first = WORD.match(line)
        if command in commands:
            commands[command](rest.strip())
        elif first and command.startswith("/") and not _ends_like_a_medium(first[0]):
            raise ModalloyError(f"no command {command}; {nearest(command, [*commands, '/exit'])}")
        elif question := self._take_files(line):
            self.ask(question)

    def attach(self, files: Iterable[tuple[str | None, Path]]) -> None:
        """Show (modality, file) with the next question, all or none. None: the modality that the file's ending tells."""
        parts = [self._part(modality, path) for modality, path in files]
        for part in parts:
            self.say(f"attached {part['path']} ({part['type']})")
        self.attached += parts

    def ask(self, question: str) -> None:
        """Write the answer to a question about what is attached, and remember both."""
        if not is_unicode(question):
            raise ModalloyError("the question holds bytes that are no UTF-8; set the terminal's encoding to UTF-8")
        content = [*self.attached, {"type": "text", "text": question}]
        turns = [*self.turns, {"role": "user", "content": content}]
        reply = self.model.reply(turns, max_new_tokens=self.max_new_tokens, on_text=self.write)
        self.write("\n")
        self.turns = [*turns, {"role": "assistant", "content": reply.answer}]
        self.attached = []

    def _commands(self) -> dict[str, Callable[[str], None]]:
        """What each command does with the rest of its line."""
        named = {f"/{modality}": partial(self._add, modality) for modality in self.model.modalities}
        return {"/add": partial(self._add, None), **named, "/clear": self._clear, "/help": self._help}

    def _add(self, modality: str | None, rest: str) -> None:
        if not rest:
            raise MediaError("no file is named; write its path after the command")
        words = [rest] if _file(rest) else WORD.findall(rest)  # a single name with spaces needs no quotes
        self.attach([(modality, _existing(word)) for word in words])

    def _take_files(self, line: str) -> str:
        """Attach the files named in a line, told by their endings; what is left of it."""
        paths: list[Path] = []

        def take(found: re.Match[str]) -> str:
            word = found[0].rstrip(".,;:!?")
            if not _ends_like_a_medium(word):
                return found[0]
            paths.append(_existing(word))
            return found[0].removeprefix(word)

        question = WORD.sub(take, line)
        self.attach([(None, path) for path in paths])
        return " ".join(question.split()) if paths else line

    def _part(self, modality: str | None, path: Path) -> dict[str, Any]:
        able = self.model.modalities
        modality = modality or ENDINGS.get(path.suffix.lower())
        if modality is None:
            commands = ", ".join(f"/{name}" for name in able)
            raise MediaError(f"{path}: its ending tells no modality; put one of {commands} before it")
        if modality not in able:
            raise MediaError(
                f"{path}: this model takes no {modality} input; it takes: {', '.join(able) or 'text only'}"
            )
        self.model.processor.preprocess(modality, path)  # refuse it now rather than with the question
        return {"type": modality, "path": path}

    def _clear(self, _: str) -> None:
        self.turns, self.attached = [], []
        self.say("forgot all turns and attached files")

    def _help(self, _: str) -> None:
        self.say(
            "A line is a question. Files whose paths it holds are shown with it; a line of files waits for the next."
        )
        self.say("/add FILE …    attach files, of the modality that their endings tell")
        for modality in self.model.modalities:
            self.say(f"{f'/{modality} FILE …':14} attach files as {modality}")
        self.say("/clear         forget all turns and attached files")
        self.say("/exit          leave; Ctrl-D does so too")


def typed_lines() -> Iterator[str]:
    """Lines of stdin, each asked for on stderr, or by the line editor where both ends are a terminal."""
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        with suppress(ImportError):  # Windows has none
            import readline  # noqa: F401
    while True:
        if not terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = input("> " if terminal else "")
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        yield line


def _plain(word: str) -> str:
    """A word without its quotes or escapes."""
    return word[1:-1] if len(word) > 1 and word[0] == word[-1] in "'\"" else re.sub(r"\\(.)", r"\1", word)


def _ends_like_a_medium(word: str) -> bool:
    return Path(_plain(word)).suffix.lower() in ENDINGS


def _file(word: str) -> Path | None:
    """The file that a word names, taken literally, or without quotes and escapes."""
    names = [os.path.expanduser(name) for name in (word, _plain(word))]
    return next((Path(name) for name in names if os.path.isfile(name)), None)


def _existing(word: str) -> Path:
    found = _file(word)
    if found is None:
        raise MediaError(f"{plain(_plain(word))}: no such file; check the path")
    return found

"""A stranger's chat template or tokenizer at work: in a child process, within seconds of CPU, memory and output.

A chat template is a program, and a tokenizer's patterns and replacements can take time and memory without end.
"""

import atexit
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from modalloy.errors import CheckpointError
from modalloy.machine.asking import answer_of

SECONDS = 5  # of CPU, for one template or one text
WAIT = 120.0  # seconds of wall clock, on a machine that is busy
MAX_BYTES = 1_200_000_000  # that the child may hold
MAX_CHARACTERS = 16_000_000  # of a rendered prompt
MAX_REASON = 300  # characters of a stranger's message that are repeated
HALVES = re.compile("[\ud800-\udfff]")
CHILD = Path(__file__).with_name("bounded_child.py")


class Child:
    """The child process, started at the first request and again after it had to be ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # the process that started it
        self._known: set[str] = set()  # tokenizers that it has been given

    def render(self, template: str, variables: dict[str, Any]) -> dict[str, Any]:
        """{"text": …}, or {"error": kind, "reason": text}."""
        with self._lock:
            return self._ask({"do": "render", "template": template, "variables": variables})

    def encode(self, tokenizer: "Opened", text: str) -> dict[str, Any]:
        """{"tokens": count} of a text, or {"error": kind, "reason": text}."""
        key = tokenizer.key
        request = {"do": "encode", "key": key, "text": text}
        with self._lock:
            if self._is_running() and key in self._known:
                found = self._ask(request)
                if found.get("tokens") != -1:
                    return found
            found = self._ask(request | {"tokenizer": tokenizer.content})
            self._known.add(key)
            return found

    def _is_running(self) -> bool:
        return self._process is not None and self._owner == os.getpid() and self._process.poll() is None

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        process = self._started()
        try:
            line = answer_of(process, request, WAIT)
        except BaseException:
            self._end(process)
            raise
        if line is not None and line.endswith(b"\n"):
            found: dict[str, Any] = json.loads(line)
            return found
        late = line is None
        status = self._end(process, kill=late)
        if late or status == -signal.SIGXCPU:
            return {"error": "time", "reason": ""}
        return {"error": "death", "reason": f"signal {-status}" if status < 0 else f"exit code {status}"}

    def close(self) -> None:
        """End the child process, if one runs."""
        if self._process is not None and self._owner == os.getpid():
            self._end(self._process)

    def _started(self) -> "subprocess.Popen[bytes]":
        if not self._is_running():
            specs = [find_spec(name) for name in ("jinja2", "markupsafe", "tokenizers")]
            places = {str(Path(spec.origin).parents[1]) for spec in specs if spec is not None and spec.origin}
            limits = {"bytes": MAX_BYTES, "seconds": SECONDS, "characters": MAX_CHARACTERS}
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(CHILD), json.dumps(sorted(places)), json.dumps(limits)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
            )
            self._owner, self._known = os.getpid(), set()
        assert self._process is not None
        return self._process

    def _end(self, process: "subprocess.Popen[bytes]", *, kill: bool = True) -> int:
        self._process = None
        if kill:
            process.kill()
        status = process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()
        return status


_child = Child()
atexit.register(_child.close)


def render(template: str, variables: dict[str, Any], where: str) -> str:
    """The text of a chat template; `where` names its folder in messages.

    Raises:
        CheckpointError: the template refuses the conversation, is damaged, renders nothing, or goes past a limit.
    """
    found = _child.render(template, variables)
    if "error" in found:
        raise CheckpointError(f"{where}: its chat template {_said(found, 'refuses this conversation')}; {REMEDY}")
    text = str(found["text"])
    if not text.strip():
        raise CheckpointError(f"{where}: its chat template renders nothing for this conversation; {REMEDY}")
    if not is_text(text):
        raise CheckpointError(f"{where}: its chat template renders half a surrogate pair, which is no text; {REMEDY}")
    return text


REMEDY = "ask otherwise, or correct the template (chat_template.jinja, or chat_template in tokenizer_config.json)"


class Opened:
    """A tokenizer of the library `tokenizers` as the child gets it: in JSON."""

    def __init__(self, content: str) -> None:
        self.content = content
        self.key = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def try_encoding(tokenizer: Opened, text: str, where: str) -> None:
    """Encode a text in the child, where it can do no harm, before it is encoded here.

    Raises:
        CheckpointError: the tokenizer fails at the text, or goes past a limit.
    """
    found = _child.encode(tokenizer, text)
    if "error" in found:
        raise CheckpointError(
            f"{where}: its tokenizer {_said(found, 'refuses this text')}; use the published tokenizer"
        )


def is_text(text: str) -> bool:
    """Whether a string holds no half of a surrogate pair, which no tokenizer takes."""
    return HALVES.search(text) is None


def _said(found: dict[str, Any], refusal: str) -> str:
    """What the child found, as the rest of a sentence."""
    reason = " ".join(str(found["reason"]).split())
    reason = reason if len(reason) <= MAX_REASON else f"{reason[:MAX_REASON]} …"
    return {
        "refusal": f"{refusal} ({reason})",
        "memory": f"takes more than {MAX_BYTES / 1e9:.1f} GB of memory",
        "size": f"writes more than {MAX_CHARACTERS:,} characters",
        "time": f"takes more than {SECONDS} seconds",
        "death": f"ended its process ({reason})",
        "failure": f"fails ({reason})",
    }[str(found["error"])]

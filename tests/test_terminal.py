"""Text from a stranger's files on a terminal: nothing in it can act there, on stdout or stderr; JSON stays exact."""

import io
import json
import os
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import edit_tensors
from safetensors.torch import load_file, save_file

from modalloy import cli
from modalloy.cli.boundary import guarded
from modalloy.cli.terminal import SafeStream, safe_streams, say
from modalloy.model.chat import Reply
from modalloy.model.session import Session
from modalloy.report.text import is_unicode, one_line, printable, printable_lines

HOSTILE = "\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202egnp.\u2066\x7f\u2028\n"
WriteRecipe = Callable[..., Path]


def acting(text: str) -> list[str]:
    """The characters that could act on a terminal, newlines apart."""
    return [c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[object, str, str]]:
    """Runs `modalloy …` in this process; gives its exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["modalloy", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("λ = 1/2, naïve 日本語 \u00a0→ 👩\u200d🔬", "λ = 1/2, naïve 日本語 \u00a0→ 👩\u200d🔬"),
        ("\x1b[31m", r"\u001b[31m"),
        ("a\nb\tc\rd", r"a\u000ab\u0009c\u000dd"),
        ("\x85\x9b\x7f", r"\u0085\u009b\u007f"),
        ("\u202eabc\u2066", r"\u202eabc\u2066"),
        ("\ud800\udcff", r"\ud800\udcff"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_what_acts_is_spelled_out_and_the_rest_is_not(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown


def test_no_character_that_acts_is_left_of_all_that_there_are() -> None:
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    assert set(acting(printable(everything))) == {"\u200c", "\u200d"}
    assert set(acting(printable(everything, keep="\t"))) == {"\u200c", "\u200d", "\t"}


def test_one_line_is_short_and_whole_where_it_can_be() -> None:
    assert one_line("a\n  b\x1b") == r"a b\u001b"
    assert one_line("x" * 1500) == "x" * 1500
    for length in (1501, 1502, 99_999):
        assert len(one_line("x" * length)) <= 1500
    assert is_unicode("λ 👩") and not is_unicode("\udcff")


def test_a_tensor_of_such_a_name_is_refused_in_a_line_that_cannot_act(
    run: Callable[..., tuple[object, str, str]], write_recipe: WriteRecipe, tmp_path: Path, base: Path
) -> None:
    copy = tmp_path / "own"
    copy.mkdir()
    for file in base.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    save_file(load_file(base / "model.safetensors") | {HOSTILE: torch.ones(1)}, copy / "model.safetensors")
    code, out, err = run("plan", write_recipe(base_model=str(copy)))
    assert code == 2 and not out and err.count("\n") == 1 and not acting(err) and "owned" in err


def test_what_a_command_prints_cannot_act_and_json_is_exact(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        say(f"kept {HOSTILE}")
        print(printable_lines(["a row", HOSTILE]))
        print(HOSTILE, file=sys.stderr, end="")
        print(json.dumps({HOSTILE: HOSTILE}))

    assert guarded(command) == 0
    out, err = capsys.readouterr()
    assert not acting(out + err)
    spelled = r"\u001b]0;owned\u0007\u001b[2J\u000d\u009b31m\u202egnp.\u2066\u007f\u2028"
    assert err == f"{spelled}\n"
    kept, row, hostile, exact = out.splitlines()
    assert (kept, row, hostile) == (f"kept {spelled}\\u000a", "a row", f"{spelled}\\u000a")
    assert json.loads(exact) == {HOSTILE: HOSTILE}


@pytest.mark.parametrize("command", ["plan", "verify", "chat", "eval-score", "eval-doctor"])
def test_an_error_that_quotes_a_name_is_one_line_that_cannot_act(
    command: str,
    run: Callable[..., tuple[object, str, str]],
    write_recipe: WriteRecipe,
    specialists: dict[str, Path],
    tmp_path: Path,
) -> None:
    edit_tensors(specialists["audio"], lambda tensors: tensors.update({HOSTILE: torch.ones(1)}))
    words: dict[str, tuple[object, ...]] = {
        "plan": ("plan", write_recipe()),
        "verify": ("verify", tmp_path / HOSTILE),
        "chat": ("chat", tmp_path / HOSTILE, "-p", "what"),
        "eval-score": ("eval-score", tmp_path / HOSTILE),
        "eval-doctor": ("eval-doctor", "--task", HOSTILE),
    }
    code, out, err = run(*words[command])
    assert code == 2 and not out and err.startswith("error: ") and err.count("\n") == 1
    assert not acting(err) and "owned" in err


class Model:
    """Answers whatever it is told to."""

    modalities = ()
    answer = f"first\n\tsecond{HOSTILE}"

    def reply(self, *_: object, on_text: Callable[[str], None] | None = None, **__: object) -> Reply:
        if on_text is not None:
            for piece in self.answer:
                on_text(piece)
        return Reply(self.answer, *([None] * (len(Reply.__dataclass_fields__) - 1)))


def test_answers_keep_newlines_and_tabs_and_nothing_else_that_acts(
    run: Callable[..., tuple[object, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("modalloy.model.llama_cpp.load_model", lambda *_, **__: Model())
    code, out, err = run("chat", tmp_path, "-p", "what")
    assert code == 0 and not err
    assert out.startswith("first\n\tsecond\\u001b]0;owned") and set(acting(out)) == {"\t"}
    code, out, _ = run("chat", tmp_path, "-p", "what", "--json")
    assert json.loads(out)["answer"] == Model.answer
    (tmp_path / "a\nb.png").write_bytes(b"")
    lines = ["what \x1b", f"/{HOSTILE.strip()}", "/add c\x1b.png"]
    assert guarded(lambda: Session(Model()).run(lines)) == 0
    printed = capsys.readouterr()
    assert "first\n\tsecond\\u001b]0;owned" in printed.out and set(acting(printed.out)) == {"\t"}
    assert not acting(printed.err) and printed.err.count("error: ") == 2


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_the_terminal_has_no_character_for_is_spelled_out(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding=encoding, errors="strict"))
    with safe_streams():
        say("λ · ä \udcff")
        sys.stdout.flush()
    shown = {"ascii": r"\u03bb \xb7 \xe4 \udcff", "latin-1": r"\u03bb · ä \udcff", "utf-8": r"λ · ä \udcff"}
    assert buffer.getvalue().decode(encoding).rstrip("\n") == shown[encoding]


def test_a_bar_is_drawn_on_a_terminal_and_lines_beside_it_stay_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    from modalloy.cli.progress import progress

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with safe_streams(), progress("merge") as report:
        report(1, 2)
        print("\x1b]0;owned\x07", file=sys.stderr)
    drawn = terminal.getvalue()
    assert "\x1b[" in drawn and "\x1b]0;" not in drawn and r"\u001b]0;owned\u0007" in drawn


def test_the_streams_are_put_back_and_a_closed_one_is_no_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stdin", None)
    before = sys.stdin, sys.stdout, sys.stderr
    with safe_streams() as (out, _):
        print("lost")
        assert out.lost is not None and sys.stdin.read() == ""
        assert isinstance(sys.stderr, SafeStream)
    assert (sys.stdin, sys.stdout, sys.stderr) == before


def test_a_question_of_other_bytes_is_refused(
    run: Callable[..., tuple[object, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("modalloy.model.llama_cpp.load_model", lambda *_, **__: Model())
    code, _, err = run("chat", tmp_path, "-p", os.fsdecode(b"what \xff"))
    assert code == 2 and "bytes that are no UTF-8" in err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"what \xff\nis it\n"), encoding="utf-8"))
    code, out, err = run("chat", tmp_path)
    assert code == 0 and "error: the question holds bytes that are no UTF-8" in err and out.count("first\n") == 1

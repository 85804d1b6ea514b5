"""The command's outermost boundary: one line and an exit code for whatever goes wrong, and nothing hidden from tests."""

import errno
import json
import logging
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import typer

from modalloy import cli
from modalloy.cli.boundary import guarded, mistake
from modalloy.cli.options import kept
from modalloy.errors import OutputError

FULL = Path("/dev/full")  # every write to it fails as on a full disk
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")


@pytest.fixture
def as_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The boundary as users have it, with its net; returns the folder for temporary files."""
    monkeypatch.delenv("MODALLOY_TRACEBACK")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def code_of(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> object:
    monkeypatch.setattr(sys, "argv", ["modalloy", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code


def broken(*_: object, **__: object) -> None:
    raise KeyError("a bug")


def test_a_bug_is_one_line_that_names_the_file_of_its_traceback(
    as_users: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    write_recipe: Callable[..., Path],
) -> None:
    monkeypatch.setattr("modalloy.cli.merging.say", broken)
    assert code_of(monkeypatch, "plan", write_recipe()) == 70
    printed = capsys.readouterr()
    assert not printed.out and printed.err.count("\n") == 1
    found = re.fullmatch(
        r"error: a bug of modalloy in \S+: KeyError: 'a bug'; the traceback is in (\S+); .*\n", printed.err
    )
    assert found is not None, printed.err
    file = Path(found[1])
    assert file.parent == as_users and stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "Traceback (most recent call last)" in file.read_text() and "KeyError: 'a bug'" in file.read_text()


def test_tests_see_bugs_as_they_are(monkeypatch: pytest.MonkeyPatch, write_recipe: Callable[..., Path]) -> None:
    monkeypatch.setattr("modalloy.cli.merging.say", broken)
    monkeypatch.setattr(sys, "argv", ["modalloy", "plan", str(write_recipe())])
    with pytest.raises(KeyError, match="a bug"):
        cli.main()


def test_a_traceback_that_cannot_be_written_is_said_to_be_so(
    as_users: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(as_users / "gone"))
    assert guarded(broken) == 70
    assert re.fullmatch(
        r"error: .*could not be written \(.*gone.*\); MODALLOY_TRACEBACK=1 .*\n", capsys.readouterr().err
    )


def test_neither_line_nor_traceback_hold_secrets(
    as_users: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_API_KEY", "0123456789abcdef")
    secrets = ["0123456789abcdef", "hf_abcdefghijkl", "sesame", "opaque.token"]

    def leak() -> None:
        raise RuntimeError(
            f"{secrets[0]} {secrets[1]} https://me:{secrets[2]}@hub/x Authorization: Bearer {secrets[3]}"
        )

    assert guarded(leak) == 70
    (file,) = as_users.glob("modalloy-*")
    assert not [secret for secret in secrets if secret in capsys.readouterr().err + file.read_text()]


def test_a_panic_which_is_no_exception_is_a_bug_too(as_users: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class PanicException(BaseException):
        """As libraries in Rust raise it."""

    def panic() -> None:
        raise PanicException("index out of bounds")

    assert guarded(panic) == 70
    assert "PanicException: index out of bounds" in capsys.readouterr().err


MISTAKES: dict[str, tuple[BaseException, str]] = {
    "ours": (OutputError("out: exists"), "out: exists"),
    "missing file": (FileNotFoundError(errno.ENOENT, "No such file", "a.bin"), "a.bin: No such file; correct the path"),
    "two files": (OSError(errno.EXDEV, "Invalid link", "a", None, "b"), "a → b: Invalid link"),
    "bytes as a name": (OSError(errno.EIO, "I/O error", b"a"), "a: I/O error; check the disk"),
    "a library's own OSError": (OSError("Can't load\nthe tokenizer"), "Can't load\nthe tokenizer"),
    "an OSError without words": (ConnectionError(), "ConnectionError"),
    "no memory": (MemoryError(), "memory ran out; "),
    "no memory in torch": (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "memory ran out (Default"),
    "no memory on a GPU": (torch.OutOfMemoryError("CUDA out of memory."), "memory ran out (CUDA out"),
    "no memory for a library": (ImportError("x.so: failed to map segment from shared object"), "memory ran out (x.so"),
    "no memory for a thread": (RuntimeError("can't start new thread"), "memory ran out"),
    "no memory from the system": (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory ran out"),
    "a missing extra": (ModuleNotFoundError("No", name="PIL.Image"), "PIL is not installed, and this needs it; run pip "),
    "an extra that a library misses": (ImportError("needs it: pip install accelerate"), "accelerate is not installed, and"),
    "half a pair": (UnicodeEncodeError("utf-8", "a\ud800\n", 1, 2, "surrogates not allowed"), r"'a\ud800': holds bytes"),
    "an option": (typer.BadParameter("not a number."), "Invalid value: not a number; see"),
}  # fmt: skip


def test_the_cause_of_a_failed_import_is_found_below_the_words_of_transformers() -> None:
    wrapped = ModuleNotFoundError("Could not import module 'AutoProcessor'. Are this object's requirements defined?")
    wrapped.__cause__ = ModuleNotFoundError("No module named 'PIL'", name="PIL")
    assert (mistake(wrapped) or "").startswith("PIL is not installed")


@pytest.mark.parametrize("kind", MISTAKES)
def test_the_cause_is_named_with_what_to_do(kind: str) -> None:
    error, expected = MISTAKES[kind]
    assert (mistake(error) or "").startswith(expected)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes differ"),
        ModuleNotFoundError("No module", name="modalloy.nothing"),
        ImportError("cannot import name 'x' from 'transformers'"),
        UnicodeEncodeError("ascii", "ä", 0, 1, "ordinal not in range(128)"),
        ValueError("x"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_no_user_can_mend_is_a_bug(error: BaseException) -> None:
    assert mistake(error) is None


def test_a_long_message_is_one_line_whose_beginning_and_end_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise OutputError("begin\n" + "x\n" * 5000 + "remedy")

    assert guarded(fail) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and len(said) < 2000
    assert said.startswith("error: begin x x ") and " … " in said and said.endswith("x remedy\n")


@pytest.mark.parametrize(
    ("package", "extra", "command"),
    [
        ("transformers", "model", "chat {folder} -p what"),
        ("plotly", "report", "inspect {recipe} -o {folder}/page.html"),
    ],
)
def test_a_missing_extra_is_named(
    package: str,
    extra: str,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    write_recipe: Callable[..., Path],
    tmp_path: Path,
) -> None:
    for module in [
        name for name in sys.modules if name.startswith(("modalloy.model", "modalloy.inspection.page", package))
    ]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    words = command.format(folder=tmp_path, recipe=write_recipe()).split()
    assert code_of(monkeypatch, *words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.match(rf"error: .*{package}.*pip install .?modalloy\[{extra}\]", said), said


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch, stream: str = "stdout") -> Iterator[None]:
    """A full disk below a stream."""
    with FULL.open("w") as file, monkeypatch.context() as patch:
        patch.setattr(sys, stream, file)
        yield


@needs_full
def test_a_result_that_cannot_be_printed_stands(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    write_recipe: Callable[..., Path],
    tmp_path: Path,
) -> None:
    for more in ([], ["--json", "--overwrite"]):
        with full_disk(monkeypatch):
            assert code_of(monkeypatch, "merge", write_recipe(), "-o", tmp_path / "out", *more) == 0
        said = capsys.readouterr().err
        assert re.fullmatch(r"warning: stdout: No space left on device; .*; the result is whole: \S+/out\n", said)
        assert (tmp_path / "out" / "manifest.json").is_file()


@needs_full
@pytest.mark.parametrize("command", ["plan", "plan --json", "methods", "--help"])
def test_a_full_disk_below_stdout_is_an_error_where_print_was_all(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], write_recipe: Callable[..., Path]
) -> None:
    words = [*command.split(), *([write_recipe()] if command.startswith("plan") else [])]
    with full_disk(monkeypatch):
        assert code_of(monkeypatch, *words) == 2
    assert re.fullmatch(r"error: stdout: No space left on device; .*\n", capsys.readouterr().err)


@needs_full
def test_a_full_disk_below_stderr_changes_no_exit_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with full_disk(monkeypatch, "stderr"):
        assert code_of(monkeypatch, "plan", tmp_path / "none.yaml") == 2


def test_a_closed_pipe_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], write_recipe: Callable[..., Path]
) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        assert code_of(monkeypatch, "plan", write_recipe()) == 0
    assert capsys.readouterr().err == ""


def test_closed_streams_of_the_command_itself(tmp_path: Path) -> None:
    """As a daemon starts it: no file that it opens gets the number of stdout or stderr, where libraries write."""
    code = (
        "import os, sys; from modalloy.cli.boundary import guarded\n"
        f"def work():\n print('lost'); f = open({str(tmp_path / 'file')!r}, 'w'); f.write(str(f.fileno())); f.close()\n"
        "    \n sys.stdin.read(); os.write(1, b'x'); os.write(2, b'x')\n"
        "sys.exit(guarded(work))"
    ).replace("    \n", "")
    done = subprocess.run(["/bin/sh", "-c", '"$0" -c "$1" <&- >&- 2>&-', sys.executable, code], check=False)
    assert done.returncode == 2 and int((tmp_path / "file").read_text()) > 2


def test_ctrl_c_is_one_line_and_130(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def interrupted() -> None:
        with kept(tmp_path):
            raise KeyboardInterrupt

    assert guarded(interrupted) == 130
    assert capsys.readouterr().err == f"stopped: {tmp_path} keeps the answers that are there; go on with --resume\n"


def test_sigterm_is_one_line_and_the_signal() -> None:
    code = "import os, signal; from modalloy.cli.boundary import guarded; guarded(lambda: os.kill(os.getpid(), 15))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGTERM
    assert done.stderr.startswith("stopped by SIGTERM") and done.stderr.count("\n") == 1


def test_memory_that_does_not_suffice_for_torch_is_one_line(write_recipe: Callable[..., Path]) -> None:
    limited = (
        "import resource, sys; from modalloy import cli\n"
        "resource.setrlimit(resource.RLIMIT_AS, (200 << 20,) * 2)\n"
        "cli.main()"
    )
    words = [sys.executable, "-c", limited, "plan", str(write_recipe())]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and re.fullmatch(r"error: memory ran out .*\n", done.stderr), done.stderr


def test_warnings_and_logs_of_libraries_stay_off_stderr(as_users: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def chatter() -> None:
        warnings.warn("deprecated", stacklevel=1)
        logging.getLogger("some.library").error("many lines")

    assert guarded(chatter) == 0 and capsys.readouterr().err == ""


def test_the_version_of_help_needs_no_torch() -> None:
    """Nothing slow is imported before the boundary stands, which may itself be interrupted or lack memory."""
    code = "import modalloy.cli, sys; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_no_module_has_the_name_of_a_public_function() -> None:
    code = (
        "import pkgutil, json, modalloy; from modalloy import merge, plan, load_recipe\n"
        "import modalloy.planning.planner, modalloy.merging, modalloy.recipe, modalloy.model, modalloy.methods\n"
        "assert not {name for _, name, _ in pkgutil.iter_modules(modalloy.__path__)} & set(modalloy.__all__)\n"
        "print(json.dumps([callable(f) for f in (modalloy.plan, modalloy.merge, merge, plan, load_recipe)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [True] * 5


def test_modules_are_still_imported_by_the_names_they_had() -> None:
    code = (
        "import modalloy.merge, modalloy.plan, modalloy; from modalloy.media import load_image\n"
        "from modalloy.merge import merge, resolve_device; from modalloy.plan import plan\n"
        "print(modalloy.merge is merge, modalloy.plan is plan, callable(resolve_device), callable(load_image))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * 4


USAGE = {
    "": r"Missing command; see `modalloy --help`",
    "frobnicate": r"No such command 'frobnicate'.*; see `modalloy --help`",
    "merge": r"Missing argument 'recipe'; see `modalloy merge --help`",
    "merge r.yaml": r"Missing option '-o' / '--out'; see `modalloy merge --help`",
    "merge r.yaml -o out --job 2": r"No such option: --job.*; see `modalloy merge --help`",
    "merge r.yaml -o out --jobs two": r"Invalid value for '--jobs': .*; see `modalloy merge --help`",
    "merge r.yaml -o out --jobs 0": r"Invalid value for '--jobs': .*; see `modalloy merge --help`",
    "merge r.yaml -o": r".*'-o' requires an argument; see `modalloy --help`",
    "chat out -p": r".*'-p' requires an argument; see `modalloy --help`",
    "verify a b": r".*unexpected extra argument.*b.*; see `modalloy verify --help`",
    "plan --json=yes r.yaml": r".*'--json' does not take a value; see `modalloy --help`",
    "eval-doctor": r"Missing option '--task'; see `modalloy eval-doctor --help`",
}


@pytest.mark.parametrize("words", USAGE)
def test_a_wrong_command_line_is_one_line(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(monkeypatch, *words.split()) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(f"error: {USAGE[words]}\n", said), said

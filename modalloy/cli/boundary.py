"""The command's outermost boundary: whatever goes wrong is one line on stderr, and an exit code.

0    done; a result that is whole in its folder but could not be printed is done too
1    audit found a fault, check something clearly worse, verify a signature that does not hold, eval-doctor broken media
2    a mistake that the user can fix, or something that the system refused: a full disk, missing memory
70   a bug of modalloy: the line says where the traceback was written; MODALLOY_TRACEBACK=1 shows it instead
130  stopped by Ctrl-C
"""

import errno
import logging
import os
import re
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import typer

from modalloy._version import __version__
from modalloy.cli.terminal import SafeStream, safe_streams
from modalloy.errors import ModalloyError, missing_package, ran_out_of_memory
from modalloy.report.text import one_line

BUG, STOPPED = 70, 130
SHOW_BUGS = "MODALLOY_TRACEBACK"  # an environment variable: bugs and libraries' warnings are shown as they are
USAGE, CLICK = typer.BadParameter.__mro__[1:3]  # UsageError and ClickException, which typer has no names for
REMEDIES = {
    errno.ENOSPC: "free space, or choose another place",
    errno.EDQUOT: "free space, or choose another place",
    errno.EACCES: "change its permissions, or choose another path",
    errno.EPERM: "change its permissions, or choose another path",
    errno.EROFS: "choose another place",
    errno.ENOENT: "correct the path",
    errno.ENOTDIR: "correct the path: a part of it is a file",
    errno.EISDIR: "give a file",
    errno.EEXIST: "choose another path",
    errno.ELOOP: "correct the links in the path",
    errno.ENAMETOOLONG: "shorten the name",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.EIO: "check the disk",
}
SECRET = re.compile(r"\bhf_\w{8,}|(?<=Bearer )\S+|(?<=://)[^/\s@]+(?=@)", re.I)


def guarded(command: Callable[[], object]) -> int:
    """Run a command; returns its exit code. It returns the code, or the path of a result that stands without words."""
    with safe_streams() as (out, err), _quiet_libraries(), _terminated():
        code, made = 0, None
        try:
            done = command()
            code, made = (done, None) if isinstance(done, int) else (0, done)
        except typer.Exit as stop:
            code = stop.exit_code
        except typer.Abort:
            code = STOPPED
        except KeyboardInterrupt as stop:
            _say(err, f"stopped{f': {stop}' if str(stop) else ''}")
            code = STOPPED
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException as error:  # a panic of a library in Rust is no Exception
            words = mistake(error)
            if words is None and os.environ.get(SHOW_BUGS):
                raise
            _say(err, f"error: {_bug(error) if words is None else words}")
            code = BUG if words is None else 2
        out.flush()
        if out.lost is not None and out.lost.errno != errno.EPIPE and code == 0:
            reason = f"stdout: {_system_words(out.lost)}"
            _say(err, f"error: {reason}" if made is None else f"warning: {reason}; the result is whole: {made}")
            code = 2 if made is None else 0
        err.flush()
        return code


def mistake(error: BaseException) -> str | None:
    """What to tell a user who, or whose system, is the cause of an exception; None if it is a bug of ours."""
    if isinstance(error, ModalloyError):
        return str(error)
    if isinstance(error, CLICK):
        message = str(error.format_message()).rstrip(".") or "Missing command"  # type: ignore[attr-defined]
        context = getattr(error, "ctx", None)
        return f"{message}; see `{'modalloy' if context is None else context.command_path} --help`"
    if isinstance(error, ImportError) and isinstance(error.__cause__, ImportError):
        return mistake(error.__cause__)  # as transformers wraps it
    if isinstance(error, ImportError) and (missing := missing_package(error)) is not None:
        return str(missing)
    if ran_out_of_memory(error):
        detail = f" ({one_line(str(error), 200)})" if str(error) else ""
        return f"memory ran out{detail}; stop other programs, or use fewer --jobs, a smaller model or another machine"
    if isinstance(error, OSError):
        return _system_words(error)
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        text = one_line(error.object, 200)
        return f"'{text}': holds bytes that are no UTF-8, or half a surrogate pair; write or name it otherwise"
    return None


def _system_words(error: OSError) -> str:
    """What the system refused, where, and what to do."""
    if error.strerror is None:  # raised by a library, with words of its own
        return str(error) or type(error).__name__
    files = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
    where = f"{' → '.join(files)}: " if files else ""
    remedy = REMEDIES.get(error.errno or 0)
    return f"{where}{error.strerror}{f'; {remedy}' if remedy else ''}"


def _bug(error: BaseException) -> str:
    """A line that says where the traceback of a bug was written: in a new file of the user's own temporary folder."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" in {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    what = _without_secrets(one_line(f"{type(error).__name__}: {error}", 300))
    text = _without_secrets(f"modalloy {__version__}\n{''.join(traceback.format_exception(error))}")
    try:
        descriptor, path = tempfile.mkstemp(prefix="modalloy-", suffix=".txt")  # new, mode 0600, through no link
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError as refused:
        where = f"the traceback could not be written ({_system_words(refused)}); {SHOW_BUGS}=1 shows it"
    else:
        where = f"the traceback is in {path}; please report it"
    return f"a bug of modalloy{place}: {what}; {where}"


def _without_secrets(text: str) -> str:
    """The text without tokens of the hub, passwords in URLs, and values of variables that hold keys."""
    for name, value in os.environ.items():
        if len(value) >= 8 and re.search("TOKEN|KEY|SECRET|PASSW", name.upper()):
            text = text.replace(value, "…")
    return SECRET.sub("…", text)


def _say(err: SafeStream, line: str) -> None:
    err.write(one_line(line) + "\n")


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keeps libraries' warnings and logs off stderr, where lines are ours; errors come as exceptions."""
    if os.environ.get(SHOW_BUGS):
        yield
        return
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY", "DATASETS_VERBOSITY"):
        os.environ.setdefault(name, "critical")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    before, logging.lastResort = logging.lastResort, logging.NullHandler()
    of_torch = logging.getLogger("torch.utils._pytree")  # torch brings a handler of its own; torchao makes it speak
    level = of_torch.level
    of_torch.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.lastResort = before
            of_torch.setLevel(level)


@contextmanager
def _terminated() -> Iterator[None]:
    """Says, on SIGTERM, that it stops; and ends as the signal ends a process, so that --resume can go on."""

    def end(number: int, frame: FrameType | None) -> None:
        os.write(2, b"stopped by SIGTERM; merge, eval and search go on with --resume\n")
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    try:
        before = signal.signal(signal.SIGTERM, end) if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL else None
    except ValueError:  # not the main thread
        before = None
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)

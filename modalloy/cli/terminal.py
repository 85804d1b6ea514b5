"""What the command writes to stdout and stderr: only text that cannot act on a terminal, and never an exception."""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from modalloy.report.text import printable


class SafeStream(io.TextIOBase):
    """A stream that spells out control characters but newlines and tabs, and outlives a full disk or a closed pipe.

    What cannot be written is dropped: the first error is `lost`, and the command goes on to its own exit code. rich
    draws bars and help on terminals with control characters of its own; it finds the raw stream by `rich_proxied_file`.
    """

    def __init__(self, raw: TextIO | None) -> None:
        self.raw = raw
        self.lost: OSError | None = None
        if isinstance(raw, io.TextIOWrapper):
            raw.reconfigure(errors="backslashreplace")  # what the terminal's encoding has no character for

    @property
    def rich_proxied_file(self) -> Any:
        return self.raw if self.isatty() else self

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self.raw, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return self.raw is not None and self.raw.isatty()

    def fileno(self) -> int:
        if self.raw is None:
            raise io.UnsupportedOperation("fileno")
        return self.raw.fileno()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self._kept_going():
            if self.raw is None:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            self.raw.write(printable(text, keep="\n\t"))
        return len(text)

    def flush(self) -> None:
        with self._kept_going():
            if self.raw is not None:
                self.raw.flush()

    @contextmanager
    def _kept_going(self) -> Iterator[None]:
        if self.lost is not None:
            self.raw = None
        try:
            yield
        except OSError as error:
            if self.lost is None:
                self.lost = error
                with suppress(OSError):  # what is buffered would fail once more when the interpreter ends
                    os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())


@contextmanager
def safe_streams() -> Iterator[tuple[SafeStream, SafeStream]]:
    """Runs the block with safe stdout and stderr; and with stdin that tells an end where it is closed, not an error."""
    before = sys.stdin, sys.stdout, sys.stderr
    _occupy()
    out, err = SafeStream(sys.stdout), SafeStream(sys.stderr)
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    if sys.stdin is None:
        sys.stdin = io.StringIO()
    elif isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a file may have such a name; questions are checked
    try:
        yield out, err
    finally:
        sys.stdin, sys.stdout, sys.stderr = before


def _occupy() -> None:
    """Open the null device where stdin, stdout or stderr is closed, lest a file of the result gets its number."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)


def say(line: str = "") -> None:
    """Print one line; newlines in it, which a stranger's name may hold, are spelled out."""
    print(printable(line))

"""Append-only logs of JSON lines that outlive a crash: locked by one process, synced line by line, their tail cut."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

from modalloy.errors import ModalloyError, OutputError, plain
from modalloy.files import open_log
from modalloy.storage.folder import parse_json, read_bytes

DAMAGES = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
Entry = TypeVar("Entry")


def read_lines(path: Path, parse: Callable[[Any], Entry], limit: int) -> tuple[list[Entry], int]:
    """What `parse` makes of every whole line, and where these end: what a kill left of a last line is not one.

    Raises:
        ModalloyError: a line is damaged (`parse` raised one of DAMAGES), or the file is larger than `limit` bytes.
    """
    raw = read_bytes(path, limit)
    end = raw.rfind(b"\n") + 1
    entries = []
    for number, text in enumerate(raw[:end].splitlines(), 1):
        try:
            entries.append(parse(parse_json(text)))
        except DAMAGES as error:
            raise ModalloyError(f"{path}: line {number} is damaged ({plain(error)}); remove it and resume") from error
    return entries, end


class Journal:
    """The log at `path`, made if it is not there; this process alone writes it until it is closed."""

    def __init__(self, path: Path) -> None:
        """Open and lock it.

        Raises:
            BlockingIOError: another process has locked it.
            OutputError: something else than a file is there.
        """
        self.path = path
        self.file: IO[bytes] = os.fdopen(open_log(path), "ab", buffering=0)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was ever written."""
        return not os.fstat(self.file.fileno()).st_size

    def read(self, parse: Callable[[Any], Entry], limit: int) -> list[Entry]:
        """What `parse` makes of every whole line; only once all are known to be right is the tail cut off."""
        entries, end = read_lines(self.path, parse, limit)
        self.cut(end)
        return entries

    def cut(self, end: int) -> None:
        """Drop what is behind the last whole line."""
        if end < os.fstat(self.file.fileno()).st_size:
            os.ftruncate(self.file.fileno(), end)

    def add(self, *lines: dict[str, Any]) -> None:
        """Append lines; they are on the disk when this returns."""
        try:
            left = b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines)
            while left:  # unbuffered: closing has nothing left to write, and cannot fail again
                left = left[self.file.write(left) :]
            os.fsync(self.file.fileno())
        except OSError as error:
            raise OutputError(
                f"{self.path}: cannot be written ({error.strerror}); see to it, then go on with --resume"
            ) from error

    def close(self) -> None:
        """Let others write it."""
        self.file.close()

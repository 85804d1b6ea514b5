"""The log of a search: one line for every merge that was served and every answer, so that nothing is asked twice."""

import json
import os
from pathlib import Path
from typing import IO, Any

from modalloy.errors import ModalloyError, OutputError

TRIALS = "trials.jsonl"
SCHEMA = 1


class Trials:
    """Lines by key, appended so that they outlive a crash; what a killed search left of a line is cut off.

    The first line says what was searched: another recipe, other inputs or another length of answers start another log,
    other axes, objectives or probes go on with it.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], *, resume: bool) -> None:
        """Open the log of a search.

        Raises:
            OutputError: the folder holds a search already and `resume` is not given, or one of something else.
        """
        self.path = folder / TRIALS
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{folder}: cannot be made ({error.strerror}); choose another folder") from error
        self.lines: dict[str, dict[str, Any]] = {}
        found = self._read() if self.path.is_file() else []
        if found and not resume:
            raise OutputError(f"{folder}: holds a search already; go on with --resume, or choose another folder")
        if not self.path.is_file() and any(folder.iterdir()):
            raise OutputError(f"{folder}: holds other files, and no search; choose another folder")
        header = {"schema": SCHEMA, **identity}
        if found and found[0] != header:
            changed = next(key for key in header if found[0].get(key) != header[key])
            raise OutputError(f"{self.path}: is a search with another {changed}; choose another folder")
        self.file: IO[bytes] = self.path.open("ab")
        if not found:
            self._append(header)
        for line in found[1:]:
            self.lines[line["key"]] = line

    def add(self, key: str, line: dict[str, Any]) -> None:
        """Append a line; it is on the disk when this returns."""
        self.lines[key] = {"key": key, **line}
        self._append(self.lines[key])

    def _append(self, line: dict[str, Any]) -> None:
        self.file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def _read(self) -> list[dict[str, Any]]:
        raw = self.path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            os.truncate(self.path, len(whole))
        lines = []
        for number, text in enumerate(whole.splitlines(), 1):
            try:
                line = json.loads(text)
                if number > 1 and not isinstance(line["key"], str):
                    raise TypeError("its key is no text")
            except (ValueError, KeyError, TypeError) as error:
                raise ModalloyError(f"{self.path}: line {number} is damaged ({error}); remove it and resume") from error
            lines.append(line)
        return lines

    def __enter__(self) -> "Trials":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

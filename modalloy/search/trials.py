"""The log of a search: one line for every merge that was served and every answer, so that nothing is asked twice."""

import os
from pathlib import Path
from typing import Any

from modalloy.errors import OutputError
from modalloy.evals.files import MAX_FILE_BYTES
from modalloy.storage.journal import Journal, read_lines

TRIALS = "trials.jsonl"
SCHEMA = 1
BEGIN = b'{"schema": '  # of every log of a search


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
        self.lines: dict[str, dict[str, Any]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.path.lexists(self.path) and any(folder.iterdir()):
                raise OutputError(f"{folder}: holds other files, and no search; choose another folder")
            self.journal = Journal(self.path)
        except BlockingIOError as error:
            raise OutputError(
                f"{folder}: another process writes this search; wait for it, or choose another folder"
            ) from error
        except OSError as error:
            raise OutputError(f"{folder}: cannot be made ({error.strerror}); choose another folder") from error
        try:
            self._begin(folder, {"schema": SCHEMA, **identity}, resume)
        except BaseException:
            self.journal.close()
            raise

    def _begin(self, folder: Path, header: dict[str, Any], resume: bool) -> None:
        with self.path.open("rb") as file:
            begin = file.read(len(BEGIN))
        if not (begin.startswith(BEGIN) or BEGIN.startswith(begin)):
            raise OutputError(f"{folder}: holds other files, and no search; choose another folder")
        found, end = read_lines(self.path, _Lines(), MAX_FILE_BYTES)
        if found and not resume:
            raise OutputError(f"{folder}: holds a search already; go on with --resume, or choose another folder")
        if found and found[0] != header:
            changed = next((key for key in header if found[0].get(key) != header[key]), "version")
            raise OutputError(f"{self.path}: is a search with another {changed}; choose another folder")
        self.journal.cut(end)  # once it is known to be a log of ours
        if not found:
            self.journal.add(header)
        for line in found[1:]:
            self.lines[line["key"]] = line

    def add(self, key: str, line: dict[str, Any]) -> None:
        """Append a line; it is on the disk when this returns."""
        self.lines[key] = {"key": key, **line}
        self.journal.add(self.lines[key])

    def __enter__(self) -> "Trials":
        return self

    def __exit__(self, *_: object) -> None:
        self.journal.close()


class _Lines:
    """Checks lines; the first says what was searched."""

    def __init__(self) -> None:
        self.is_first = True

    def __call__(self, line: Any) -> dict[str, Any]:
        """The line; an error where it does not say what a search reads of it."""
        _check_line(line, first=self.is_first)
        self.is_first = False
        return dict(line)


def _check_line(line: Any, *, first: bool) -> None:
    """TypeError, KeyError where a line does not say what a search reads of it."""
    if not isinstance(line, dict):
        raise TypeError("it is no object")
    if first:
        line["schema"]
        return
    key = line["key"]
    if not isinstance(key, str):
        raise TypeError("its key is no text")
    texts: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    if key == "loaded":
        numbers: tuple[str, ...] = ("load_s", "features_s", "checkpoint_bytes")
    elif key.startswith("served "):
        numbers, lists = ("seconds",), ("sketch",)
    else:
        texts, numbers, lists = ("model", "probe", "text"), ("n_out", "seconds"), ("likelihoods",)
    for name in texts:
        if not isinstance(line[name], str):
            raise TypeError(f"its {name} is no text")
    for name in numbers:
        if isinstance(line[name], bool) or not isinstance(line[name], int | float):
            raise TypeError(f"its {name} is no number")
    for name in (*lists, *({"predicted"} & line.keys())):
        if not isinstance(line[name], list) or not all(isinstance(value, int | float) for value in line[name]):
            raise TypeError(f"its {name} is no list of numbers")

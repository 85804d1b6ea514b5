"""Whether what is written and what is read are apart, by whatever path, link or mount."""

import os
from collections.abc import Iterable
from pathlib import Path

from modalloy.errors import OutputError
from modalloy.storage.folder import reading
from modalloy.storage.staging import all_below


def check_apart(out: Path, inputs: Iterable[tuple[str, Path]]) -> None:
    """Refuse an `out` that is, holds or lies in one of the named inputs, by whatever path, link or mount.

    Raises:
        OutputError: it does.
    """
    place = Path(os.path.realpath(out))
    around = {found for path in (place, *place.parents) if (found := _identity(path))}
    own = _identity(place)
    inside = {found for path in all_below(place) if (found := _identity(path))} if own and place.is_dir() else set()
    for label, given in inputs:
        real = Path(os.path.realpath(given))
        if real.is_dir() and _identity(real) in around:
            what = "is" if _identity(real) == own else "lies in"
            raise OutputError(f"{out}: {what} {label} ({given}), which is only read; choose another folder")
        with reading(real):
            parts = [real, *map(Path, map(os.path.realpath, real.iterdir()))] if real.is_dir() else [real]
        for part in parts:
            above = {_identity(path) for path in (part, *part.parents)}
            if own and (own in above or _identity(part) in inside):
                raise OutputError(f"{out}: holds {label} ({given}), which would be lost; choose another folder")


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino

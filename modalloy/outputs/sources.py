"""Where the inputs of a result were on this machine (`sources.json`), and what a later merge takes its tensors over by.

It lies beside the manifest, is no part of what is hashed, and is read as a stranger wrote it.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from modalloy.errors import CheckpointError
from modalloy.recipe import Recipe
from modalloy.storage.folder import read_json, reading
from modalloy.storage.staging import SOURCES as SOURCES

REMEDY = "merge again, or remove the file to check hashes only"
MAX_PATH = 4096  # bytes of a path that a system takes

Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class KnownFile(BaseModel):
    """What a file was when it was read or written: its stamp (see `stamp_of`), and its hash if all of it was."""

    model_config = ConfigDict(extra="forbid", strict=True)

    stamp: Annotated[list[int], Field(min_length=4, max_length=4)]
    sha256: Sha256 | None


class Places(BaseModel):
    """The types of `sources.json`: folders of base and target, specialists and their Fisher files, encoders as NAME:PATH.

    And what a later merge takes tensors over by (`outputs/earlier.py`): files read and written, and the keys of jobs.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    base: str | None = None
    target: str | None = None
    specialists: list[str]
    encoders: list[str | None]
    fishers: list[str | None]
    fingerprint: Sha256
    made_by: list[str] | None = None
    files: dict[str, KnownFile] | None = None
    outputs: dict[str, KnownFile] | None = None
    jobs: dict[str, Sha256] | None = None
    compression: Sha256 | None = None


@dataclass(frozen=True)
class Sources:
    """Where the inputs of a recipe were: base and target by the recipe's key, the rest one for each of its models."""

    starts: dict[str, Path]
    models: list[Path]
    fishers: list[Path | None]
    encoders: list[str | None]

    def gone(self) -> Path | None:
        """The first that is no longer there.

        Raises:
            CheckpointError: one is there but is no folder, or no file, of the user's.
        """
        encoders = [Path(place.partition(":")[2]) for place in self.encoders if place]
        fishers = [place for place in self.fishers if place]
        for path in (*self.starts.values(), *self.models, *fishers, *encoders):
            with reading(path):
                if not path.exists():
                    return path
                is_right = path.is_file() if path in fishers else path.is_dir() or (path in encoders and path.is_file())
            if not is_right:
                kind = "file" if path in fishers else "folder"
                raise CheckpointError(
                    f"{path}: {SOURCES} names it as an input, but it is no {kind}; correct its place there"
                )
        return None


def read_sources(folder: Path, recipe: Recipe) -> Sources:
    """Where the inputs of the recipe were when the result was merged.

    Raises:
        CheckpointError: the file names other inputs than the recipe's, or no absolute paths.
    """
    path, remedy = folder / SOURCES, REMEDY
    found = read_places(path)
    keys = {"base_model": "base", "target": "target"}
    wanted = {key: label for key, label in keys.items() if getattr(recipe, key)}
    starts = {key: getattr(found, label) for key, label in keys.items()}
    n = len(recipe.models)
    if {key for key, place in starts.items() if place is not None} != wanted.keys() or not all(
        len(each) == n for each in (found.specialists, found.fishers, found.encoders)
    ):
        raise CheckpointError(
            f"{path}: does not name a {' and a '.join(wanted.values())} and {n} specialists; {remedy}"
        )
    for place in (*starts.values(), *found.specialists, *found.fishers, *found.encoders):
        if place is not None:
            plain = place.partition(":")[2] if place in found.encoders else place
            if not os.path.isabs(plain) or not _is_path(plain):
                raise CheckpointError(f"{path}: {place[:60]!a} is no absolute path; {remedy}")
    return Sources(
        {key: Path(place) for key, place in starts.items() if place is not None},
        [Path(place) for place in found.specialists],
        [None if place is None else Path(place) for place in found.fishers],
        found.encoders,
    )


def read_places(path: Path) -> Places:
    """What `sources.json` says, of which the types are checked."""
    try:
        return Places.model_validate(read_json(path))
    except ValidationError as error:
        raise CheckpointError(f"{path}: {problem(error)}; {REMEDY}") from None


def _is_path(text: str) -> bool:
    """Whether a system can take it for one."""
    try:
        return "\0" not in text and len(text.encode()) <= MAX_PATH
    except UnicodeEncodeError:  # half a surrogate pair
        return False


def problem(error: ValidationError) -> str:
    """The first problem of a validation, as one line."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"has no {place}"
    return f"{ascii(place[:200])[1:-1] or 'the whole'}: {first['msg']} (found {ascii(first['input'])[:60]})"

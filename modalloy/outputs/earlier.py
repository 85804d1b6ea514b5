"""An earlier result whose tensors a merge takes over: those whose jobs have the key that the new merge's have.

A job's key is the hash of all that decides its bytes: what it does, with which numbers, on which stored tensors (by the
hashes of their files), with which survey, program and kind of processor. `sources.json` holds the keys of a result's jobs.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from modalloy.errors import CheckpointError, RecipeError
from modalloy.outputs.manifest import read_manifest
from modalloy.outputs.sources import SOURCES, KnownFile, read_places
from modalloy.planning.job import Job, Run, Survey
from modalloy.planning.plan import Plan
from modalloy.planning.program import program
from modalloy.storage.source import stamp_of
from modalloy.storage.tensors import Checkpoint

INSTEAD = "merge without --from"


def records(planned: Plan, run: Run, folder: Path, device: str) -> dict[str, Any]:
    """What `sources.json` says of a merge that was done into a folder, so that a later one can take its tensors over."""
    hashed = _hashed(planned)
    of = {path: file for path, (file, _) in planned.inputs.files.items()}
    files = {path: KnownFile(stamp=of[path].stamp, sha256=of[path].sha256 if path in hashed else None) for path in of}
    identities = {path: _identity(record.stamp, record.sha256) for path, record in files.items()}
    keys = {job.outputs[0].name: _key(job, identities, run.surveys) for job in planned.jobs}
    told = {str(path.resolve()): record.model_dump() for path, record in files.items()}
    written = {name: {"stamp": stamp_of(folder / name), "sha256": sha256} for name, sha256 in run.sha256.items()}
    made = {"made_by": program(device), "files": told, "outputs": written, "jobs": keys}
    return made | ({"compression": _hash(run.compression)} if run.compression else {})


class Earlier:
    """A result of `modalloy merge`, and what its files say of the jobs that made it."""

    def __init__(self, folder: Path, device: str) -> None:
        """Open it.

        Raises:
            CheckpointError: it is no result, is damaged, or was made by another program or on another kind of processor.
        """
        self.folder, self.manifest = folder, read_manifest(folder)
        places = read_places(folder / SOURCES)
        if places.jobs is None or places.files is None:
            raise CheckpointError(f"{folder}: its {SOURCES} records no jobs, so nothing can be taken over; {INSTEAD}")
        if places.made_by != program(device):
            theirs, ours = (", ".join(made or ["something unknown"]) for made in (places.made_by, program(device)))
            raise CheckpointError(
                f"{folder}: was made by {theirs}, and this is {ours}: their bytes may differ; {INSTEAD}"
            )
        measured = self.manifest.get("compression")
        if places.compression != (_hash(measured) if measured else None):
            raise CheckpointError(f"{folder}: its manifest.json was changed: `compression` is another; {INSTEAD}")
        self.files, self.outputs, self.keys = places.files, places.outputs or {}, places.jobs
        self.weights = Checkpoint(folder, ("adapter_model", "model"))
        for file in self.weights.files:
            if file.path.name not in self.manifest["outputs"]:
                raise CheckpointError(f"{file.path}: is not listed in manifest.json; {INSTEAD}")
        stamps = {str(file.path.resolve()): file.stamp for file in self.weights.files}
        self.sha256 = _hash([stamps, self.manifest["outputs"], measured])  # by which a merge that goes on knows it

    def reused(self, planned: Plan, surveys: Mapping[str, Survey]) -> dict[str, Job]:
        """The jobs that are done already, by the name of their first output, as jobs that copy their tensors.

        Files that are as they were when the result was made, its own among them, are not hashed again.

        Raises:
            RecipeError: there is none.
        """
        identities = self._identities(planned)
        found = {}
        for job in planned.jobs:
            name = job.outputs[0].name
            if self.keys.get(name) == _key(job, identities, surveys):
                found[name] = self._copying(job)
        if not found:
            raise RecipeError(
                f"{self.folder}: no tensor of it is one of this merge's: it is of another recipe, or what changed since "
                f"changes them all; {INSTEAD}"
            )
        names = {ref.file for job in found.values() for ref in job.reads}
        self.taken = [file for file in self.weights.files if file.path in names]
        for file in self.taken:
            sha256 = self.manifest["outputs"][file.path.name]
            if self.outputs.get(file.path.name) == KnownFile(stamp=file.stamp, sha256=sha256):
                file.trust(sha256)
            file.hash_reads()
        return found

    def check(self) -> None:
        """Refuse what was taken over if the files that hold it are not those that the manifest lists."""
        for file in self.taken:
            if file.sha256 != self.manifest["outputs"][file.path.name]:
                raise CheckpointError(
                    f"{file.path}: its sha256 is not the one in manifest.json; the file was changed: {INSTEAD}"
                )

    def _identities(self, planned: Plan) -> dict[Path, str]:
        """What each input file is; a file that no recorded one can be equal to is not hashed for that."""
        hashed, found = _hashed(planned), {}
        sizes = {record.stamp[0] for record in self.files.values() if record.sha256 is not None}
        for path, (file, _) in planned.inputs.files.items():
            record = self.files.get(str(path.resolve()))
            if path not in hashed:
                found[path] = _identity(file.stamp, None)
                continue
            if record is not None and record.sha256 is not None and record.stamp == file.stamp:
                file.trust(record.sha256)
            found[path] = file.sha256 if file.n_bytes in sizes else f"new: {path}"
        return found

    def _copying(self, job: Job) -> Job:
        """The job that copies what the result holds of a job, and what was measured of it."""
        stored = self.weights.codes or self.weights.refs
        refs = [stored.get(spec.name) for spec in job.outputs]
        for spec, ref in zip(job.outputs, refs, strict=True):
            if ref is None or (ref.dtype, ref.shape) != (spec.dtype, spec.shape):
                raise CheckpointError(f"{self.folder}: {spec.name} is not what {SOURCES} says that it is; {INSTEAD}")
        own = {job.name, *(one.name for one in job.merges)}
        measured = {
            name: share
            for name, share in self.manifest.get("compression", {}).items()
            if name in own or name.startswith(f"{job.name}[")
        }
        return Job("reuse", job.name, job.outputs, models=tuple(refs), parameters=measured)


def _hashed(planned: Plan) -> set[Path]:
    """The input files whose hash a merge takes; the others are known by their stamps."""
    return {file.path for file in (*planned.hashed_files(), *planned.fishers) if file is not None}


def _identity(stamp: list[int], sha256: str | None) -> str:
    return sha256 or f"stamp: {stamp}"


def _key(job: Job, identities: Mapping[Path, str], surveys: Mapping[str, Survey]) -> str:
    told = [surveys.get(one.survey_key) for one in job.merges] if surveys else []
    return _hash([_described(job, identities), told])


def _hash(value: Any) -> str:
    """Of what JSON says, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _described(value: Any, identities: Mapping[Path, str]) -> Any:
    """A part of a job as JSON, with what files are in place of where they are."""
    if isinstance(value, Path):
        return identities[value]
    if is_dataclass(value):
        parts = (getattr(value, field.name) for field in fields(value) if field.name != "labels")
        return [type(value).__name__, *(_described(part, identities) for part in parts)]
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, dict):
        return {name: _described(part, identities) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        return [_described(part, identities) for part in value]
    if isinstance(value, float) and value and value.is_integer():  # 1.0 is 1, but -0.0 is not 0
        return int(value)
    return value

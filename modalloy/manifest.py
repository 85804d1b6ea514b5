"""The manifest of a result: what made it, from what, and the hash of every file. No times, hosts or absolute paths."""

import dataclasses
from pathlib import Path
from typing import Any

from modalloy.checkpoints import Checkpoint, Specialist, WeightFile, file_sha256, hub_commit, present
from modalloy.checkpoints.folder import reading
from modalloy.checkpoints.staging import MANIFEST
from modalloy.checkpoints.staging import SOURCES as SOURCES
from modalloy.families.vocabulary import VOCABULARY_FILES
from modalloy.plan import Plan

NOT_HASHED = (MANIFEST, SOURCES)  # the latter says where the inputs were on this machine


def build_manifest(planned: Plan, folder: Path, known: dict[str, str]) -> dict[str, Any]:
    """The manifest of the files in `folder`; `known` holds the hashes that were taken while writing."""
    from modalloy._version import __version__

    inputs = {
        s.label: {
            "layout": s.layout,
            "modality": s.modality,
            "sha256": input_sha256(s, fisher),
            **_revision(s.checkpoint.folder),
        }
        for s, fisher in zip(planned.specialists, planned.fishers, strict=True)
    }
    whole: dict[str, Any] = {"surveys": planned.surveys} if planned.surveys else {}
    if planned.compression:
        whole["compression"] = dict(sorted(planned.compression.items()))
    return {
        "modalloy": __version__,
        "method": planned.recipe.merge_method,
        "parameters": planned.parameters,
        "form": planned.recipe.output.form,
        "inputs": recorded_starts(planned) | inputs,
        "outputs": {name: known.get(name) or file_sha256(folder / name) for name in hashed_files(folder)},
        **whole,
        "tensors": [dataclasses.astuple(fate) for fate in planned.fates],
    }


def recorded_starts(planned: Plan) -> dict[str, dict[str, Any]]:
    """What the manifest says of base and target, by label."""
    found = {planned.base_label: _start(planned.base, planned.base_name, read=planned.reads_base)}
    if planned.across is not None and planned.across.base is not None:
        found["base"] = _start(planned.across.base, planned.across.base_name, read=True)
    return found


def _start(model: Checkpoint, name: str, *, read: bool) -> dict[str, Any]:
    """A base or a target: its name, its headers' hash, its commit, and the hashes of its files if they were read."""
    found = {"name": name, "header_sha256": model.header_sha256(), **_revision(model.folder)}
    return found | ({"sha256": {file.path.name: file.sha256 for file in model.files}} if read else {})


def input_sha256(specialist: Specialist, fisher: WeightFile | None) -> dict[str, str]:
    """Hashes of the files that a specialist's part depends on: weights, the config that sets their scaling, Fisher file."""
    folder = specialist.checkpoint.folder
    tokens = VOCABULARY_FILES if specialist.layout == "donor" else ()  # by which its rows were chosen
    configs = present(folder, ("config.json", "adapter_config.json", *tokens))
    weights = {file.path.name: file.sha256 for file in specialist.checkpoint.files}
    weights |= {} if fisher is None else {"fisher": fisher.sha256}
    with reading(folder):
        return weights | {name: file_sha256(folder / name) for name in configs}


def _revision(folder: Path) -> dict[str, str]:
    """The commit of an input that came from the hub."""
    commit = hub_commit(folder)
    return {"revision": commit} if commit else {}


def hashed_files(folder: Path) -> list[str]:
    """Every file of a result that its manifest must list, as relative names in order."""
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in files if name not in NOT_HASHED)

"""The manifest of a result: what made it, from what, and the hash of every file. No times, hosts or absolute paths."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from modalloy.plan import Plan

SOURCES = "sources.json"  # where the inputs were on this machine; not hashed
NOT_HASHED = ("manifest.json", SOURCES)


def build_manifest(planned: Plan, folder: Path, known: dict[str, str]) -> dict[str, Any]:
    """The manifest of the files in `folder`; `known` holds the hashes that were taken while writing."""
    from modalloy._version import __version__

    inputs: dict[str, Any] = {"base": {"name": planned.base_name, "header_sha256": planned.base.header_sha256()}}
    if planned.recipe.output.form == "full" or not planned.base_is_portable:
        inputs["base"]["sha256"] = {file.path.name: file.sha256 for file in planned.base.files}
    for specialist in planned.specialists:
        files = {file.path.name: file.sha256 for file in specialist.checkpoint.files}
        inputs[specialist.label] = {"layout": specialist.layout, "modality": specialist.modality, "sha256": files}
    return {
        "modalloy": __version__,
        "method": planned.recipe.merge_method,
        "parameters": planned.parameters,
        "form": planned.recipe.output.form,
        "inputs": inputs,
        "outputs": {name: known.get(name) or file_sha256(folder / name) for name in hashed_files(folder)},
        "tensors": [dataclasses.astuple(fate) for fate in planned.fates],
    }


def hashed_files(folder: Path) -> list[str]:
    """Every file of a result that its manifest must list, as relative names in order."""
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in files if name not in NOT_HASHED)


def file_sha256(path: Path) -> str:
    """Hash of a whole file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

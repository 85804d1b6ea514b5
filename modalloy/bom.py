"""A CycloneDX bill of materials (ECMA-424) of a result: the model, its files, and the models that it was merged from."""

from __future__ import annotations

import json
import uuid
from datetime import datetime, timezone
from pathlib import Path

from modalloy.errors import OutputError, missing_package
from modalloy.outputs.manifest import read_manifest
from modalloy.outputs.rewrite import rewrite

BOM = "bom.cdx.json"  # the name that CycloneDX asks for


def write_bom(folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write the bill of materials, and list it in the manifest. Its bytes depend on the manifest and its time of writing.

    Raises:
        OutputError: there is one already.
        CheckpointError: the folder is no result.
        MissingPackageError: without the extra `sign`.
    """
    folder = Path(folder)
    manifest, target = read_manifest(folder), folder / BOM
    if target.exists() and not overwrite:
        raise OutputError(f"{target}: is there already; write it again with --overwrite")
    try:
        from cyclonedx.model import HashAlgorithm, HashType, Property
        from cyclonedx.model.bom import Bom, BomMetaData
        from cyclonedx.model.component import Component, ComponentType
        from cyclonedx.output.json import JsonV1Dot6
    except ModuleNotFoundError as error:
        raise missing_package(error) or error from None

    def file(owner: str, name: str, sha256: str) -> Component:
        hashes = [HashType(alg=HashAlgorithm.SHA_256, content=sha256)]
        return Component(type=ComponentType.FILE, name=name, bom_ref=f"{owner}/{name}", hashes=hashes)

    outputs = {name: sha256 for name, sha256 in manifest["outputs"].items() if name != BOM}
    merged = Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=folder.resolve().name,
        bom_ref="merged",
        components=[file("merged", name, sha256) for name, sha256 in outputs.items()],
        properties=[
            Property(name=f"modalloy:{name}", value=str(manifest[name])) for name in ("method", "form", "modalloy")
        ],
    )
    parents = []
    for label, told in manifest["inputs"].items():
        about = {name: told[name] for name in ("layout", "modality", "header_sha256") if told.get(name)}
        parents.append(
            Component(
                type=ComponentType.MACHINE_LEARNING_MODEL,
                name=str(told.get("name", label)),
                bom_ref=f"input:{label}",
                components=[file(f"input:{label}", name, known) for name, known in told.get("sha256", {}).items()],
                properties=[Property(name=f"modalloy:{name}", value=str(value)) for name, value in about.items()],
            )
        )
    written = datetime.fromtimestamp((folder / "manifest.json").stat().st_mtime, timezone.utc)
    number = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(outputs, sort_keys=True))
    found = Bom(components=parents, metadata=BomMetaData(component=merged, timestamp=written), serial_number=number)
    found.register_dependency(merged, parents)
    rewrite(folder, BOM, JsonV1Dot6(found).output_as_string(indent=1) + "\n")
    return target

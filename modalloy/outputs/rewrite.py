"""A result whose files change after the merge: a card that a check adds to, a bill of materials."""

import json
from pathlib import Path
from typing import Any

from modalloy.files import disk_errors, replace_text
from modalloy.outputs.manifest import MANIFEST, read_manifest
from modalloy.storage.folder import file_sha256


def rewrite(folder: Path, name: str, text: str, **told: Any) -> None:
    """Write a text file of a result, and put its hash, and other entries, into the manifest.

    Raises:
        CheckpointError: the folder is no result; nothing is written then.
        OutputError: the disk is full, or the like.
    """
    manifest = read_manifest(folder)
    with disk_errors(folder):
        replace_text(folder / name, text)
        manifest["outputs"] = dict(sorted((manifest["outputs"] | {name: file_sha256(folder / name)}).items()))
        replace_text(folder / MANIFEST, json.dumps(manifest | told, indent=1) + "\n")

"""A result whose files change after the merge: a card that a check adds to, a bill of materials."""

import json
from pathlib import Path
from typing import Any

from modalloy.files import replace_text
from modalloy.outputs.manifest import MANIFEST, read_manifest
from modalloy.storage.folder import file_sha256


def relist(folder: Path, name: str, **told: Any) -> None:
    """Put the hash of a file that was written since, and other entries, into the manifest."""
    manifest = read_manifest(folder)
    manifest["outputs"] = dict(sorted((manifest["outputs"] | {name: file_sha256(folder / name)}).items()))
    replace_text(folder / MANIFEST, json.dumps(manifest | told, indent=1) + "\n")

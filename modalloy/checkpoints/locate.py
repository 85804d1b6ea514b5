"""From what a recipe writes (folder, hub id, id@revision, builtin:name) to a local folder."""

import os
import re
from pathlib import Path

from modalloy import builtin
from modalloy.checkpoints.tensors import Checkpoint, reading
from modalloy.errors import CheckpointError

BASE_STEMS = ("model", "pytorch_model")
# what is fetched from a repository: its top level's configs and tokenizer, and the weights in one format
CONFIGS = ("*.json", "*.jinja", "*.txt", "*.model", "non_lora_trainables.bin", "mm_projector.bin")
WEIGHTS = (*BASE_STEMS, "adapter_model")


def locate(location: str, relative_to: Path = Path()) -> Path:
    """Local folder of `location`; a hub id is downloaded (or found in the hub's cache). Relative paths start at `relative_to`."""
    if location.startswith(builtin.PREFIX):
        return builtin.resolve(location)
    path = _local_path(location, relative_to)
    with reading(path):
        if path.exists():
            return path
    if is_hub_id(location):
        return _download(location)
    raise CheckpointError(f"{path}: no such folder; correct the path in the recipe")


def is_hub_id(location: str) -> bool:
    """Whether `location` has the form owner/name or owner/name@revision."""
    parts = location.split("@")[0].split("/")
    return len(parts) == 2 and all(parts) and not parts[0].startswith((".", "~"))


def is_portable(location: str, relative_to: Path = Path()) -> bool:
    """Whether the name means the same on another machine: built in, or a hub id; not a local path."""
    if location.startswith(builtin.PREFIX):
        return True
    return is_hub_id(location) and not _local_path(location, relative_to).exists()


def hub_commit(folder: Path) -> str | None:
    """The commit that `locate` resolved a hub id to, from its folder in the hub's cache; None for any other folder."""
    is_snapshot = folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", folder.name)
    return folder.name if is_snapshot else None


def open_base(folder: Path) -> Checkpoint:
    """The base model's tensors."""
    return Checkpoint(folder, BASE_STEMS)


def _local_path(location: str, relative_to: Path) -> Path:
    path = Path(os.path.expanduser(location))
    return path if path.is_absolute() else relative_to / path


def _download(location: str) -> Path:
    """The snapshot in the hub's cache, fetched as far as it is not there: `.bin` weights only where there are no others."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RevisionNotFoundError

    http_error: type[Exception] = HfHubHTTPError.__bases__[
        0
    ]  # of the HTTP client that this version of the hub's library uses
    name, _, revision = location.partition("@")
    try:
        for suffix in ("safetensors", "bin"):
            weights = [f"{stem}*.{suffix}" for stem in WEIGHTS]
            folder = Path(
                snapshot_download(
                    name, revision=revision or None, allow_patterns=[*CONFIGS, *weights], ignore_patterns=["*/*"]
                )
            )
            if any(path for pattern in weights for path in folder.glob(pattern)):
                break
        return folder
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"'{location}': the hub's '{name}' has no revision '{revision}'; correct what follows the @"
        ) from error
    except GatedRepoError as error:
        raise CheckpointError(
            f"'{location}': its authors grant access on the hub; accept their terms there and log in (hf auth login)"
        ) from error
    except (http_error, HFValidationError, OSError) as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(
            f"'{location}' is neither a folder here nor to be had from the hub ({reason}); "
            "correct the path, or download the model and give its folder"
        ) from error

"""From what a recipe writes (folder, file, hub id, id@revision, id/path/in/it, builtin:name) to a local folder or file."""

import os
import re
from pathlib import Path

from modalloy import builtin
from modalloy.errors import CheckpointError, cut
from modalloy.storage.folder import reading
from modalloy.storage.remote import is_remote, mirror
from modalloy.storage.tensors import Checkpoint

HUB = "hf://"
BASE_STEMS = ("model", "pytorch_model")
# what is fetched from a repository: its top level's configs, tokenizer and code (never run), and the weights in one format
CONFIGS = (
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.py",
    "README.md",
    "mm_projector.bin",
    "non_lora_trainables.bin",
)
WEIGHTS = (*BASE_STEMS, "adapter_model")
FILES = (".pt", ".pth", ".bin", ".safetensors")  # of encoders that are published as one file


def locate(location: str, relative_to: Path = Path(), *, whole: bool = False) -> Path:
    """Local folder or file of `location`; relative paths start at `relative_to`.

    From a hub id, what a merge reads is downloaded (or found in the hub's cache); with `whole`, all that is there. Of an
    address (`hf://`, `s3://`, `gs://`, `https://`) it is a folder of headers, whose data is read by ranges.
    """
    if location.startswith(builtin.PREFIX):
        return builtin.resolve(location)
    if is_remote(location):
        if whole:
            return _whole(location)
        return mirror(location, CONFIGS, WEIGHTS)
    path = _local_path(location, relative_to)
    with reading(path):
        if path.exists():
            return path
    if is_hub_id(location):
        return _download(location, whole)
    raise CheckpointError(f"{cut(str(path))}: no such folder; correct the path in the recipe")


def _whole(location: str) -> Path:
    """All of a model that is loaded, not merged."""
    if location.startswith(HUB):
        return _download(location.removeprefix(HUB), whole=True)
    raise CheckpointError(f"{cut(location)}: a model is loaded from a folder; download it and give its folder")


def hub_id(location: str) -> str:
    """What a hub's address names."""
    return location.removeprefix(HUB)


def is_hub_id(location: str) -> bool:
    """Whether `location` has the form owner/name[@revision][/path of a folder or file in it]."""
    owner, name, _, _ = _hub_parts(location)
    return (
        bool(owner and name)
        and not owner.startswith((".", "~"))
        and not {"", ".", ".."}.intersection(location.split("/"))
    )


def _hub_parts(location: str) -> tuple[str, str, str, str]:
    """Owner, name, revision (which holds no slash) and the path inside the repository, each "" if it is not there."""
    owner, _, rest = location.partition("/")
    repository, _, inside = rest.partition("/")
    name, _, revision = repository.partition("@")
    return owner, name, revision, inside


def is_portable_name(name: str) -> bool:
    """Whether a recorded name is that of a hub's repository or of something built in; that of a folder has no slash."""
    return name.startswith(builtin.PREFIX) or is_hub_id(hub_id(name))


def is_portable(location: str, relative_to: Path = Path()) -> bool:
    """Whether the name means the same on another machine: built in, or a hub id; not a local path."""
    if location.startswith((builtin.PREFIX, HUB)):
        return True
    return is_hub_id(location) and not _local_path(location, relative_to).exists()


def hub_commit(folder: Path) -> str | None:
    """The commit that `locate` resolved a hub id to, from its folder in the hub's cache; None for any other folder."""
    places = (folder, *folder.parents)
    return next((p.name for p in places if p.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", p.name)), None)


def open_base(folder: Path) -> Checkpoint:
    """The base model's tensors."""
    return Checkpoint(folder, BASE_STEMS)


def _local_path(location: str, relative_to: Path) -> Path:
    path = Path(os.path.expanduser(location))
    return path if path.is_absolute() else relative_to / path


def _download(location: str, whole: bool) -> Path:
    """The place in the hub's cache, fetched as far as it is not there: `.bin` weights only where there are no others."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RevisionNotFoundError

    http_error: type[Exception] = HfHubHTTPError.__bases__[
        0
    ]  # of the HTTP client that this version of the hub's library uses
    owner, repository, revision, inside = _hub_parts(location)
    name, below = f"{owner}/{repository}", f"{inside}/" if inside else ""
    try:
        if inside.endswith(FILES):
            return Path(hf_hub_download(name, inside, revision=revision or None))
        if whole:
            everything = [f"{below}*"] if below else None
            return Path(snapshot_download(name, revision=revision or None, allow_patterns=everything)) / inside
        for suffix in ("safetensors", "bin"):
            weights = [f"{stem}*.{suffix}" for stem in WEIGHTS]
            wanted = [below + pattern for pattern in (*CONFIGS, *weights)]
            snapshot = snapshot_download(
                name, revision=revision or None, allow_patterns=wanted, ignore_patterns=[f"{below}*/*"]
            )
            folder = Path(snapshot) / inside
            if any(path for pattern in weights for path in folder.glob(pattern)):
                break
        if inside and not folder.exists():
            raise CheckpointError(f"'{location}': the hub's '{name}' has no folder '{inside}'; correct the path in it")
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

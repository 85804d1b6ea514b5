"""Putting a result on the hub, or into an object store. (Fetching is `storage.locate`.)"""

import hashlib
import shutil
from pathlib import Path

from modalloy.errors import CheckpointError, OutputError
from modalloy.files import cache_folder
from modalloy.outputs.manifest import MANIFEST, result_files
from modalloy.outputs.sources import SOURCES
from modalloy.storage.remote import Store


def check_target(repo: str) -> None:
    """Refuse what could not be uploaded to, before any work is done: a malformed name, or no token."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise OutputError(f"--push-to-hub {repo}: not a repository's name ({error}); write OWNER/NAME") from error
    if get_token() is None:
        raise OutputError(f"--push-to-hub {repo}: there is no token of the hub; log in (hf auth login) or set HF_TOKEN")


def push(folder: Path, repo: str, *, private: bool = False) -> str:
    """Upload a result, all but the file that tells where its inputs were on this machine; returns the commit's URL."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    http_error: type[Exception] = HfHubHTTPError.__bases__[0]
    api = HfApi()
    try:
        created = api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=created.repo_id, folder_path=folder, ignore_patterns=[SOURCES], commit_message="Merged by modalloy"
        )
    except (http_error, OSError, ValueError, RuntimeError) as error:  # the last two: of large files
        reason = str(error).split("\n")[0]
        raise OutputError(
            f"{repo}: the upload failed ({reason}); the result is whole in {folder}: "
            f"try again with `hf upload {repo} {folder} --exclude {SOURCES}`"
        ) from error
    return str(commit.commit_url)


def uploaded_from(url: str) -> Path:
    """Where a result for an object store is made, so that a killed merge finds it again; what is there already is refused."""
    Store(url).check_empty()
    return (
        cache_folder() / "results" / hashlib.sha256(url.encode()).hexdigest()[:20] / url.rstrip("/").rpartition("/")[2]
    )


def upload(folder: Path, url: str) -> None:
    """Upload a result to an object store, its manifest last: without one it is no result. After a failure nothing is left
    there, and the result is where it was made.

    Raises:
        OutputError: the upload failed, even when tried again.
    """
    store, sent = Store(url), []
    try:
        for name in [*result_files(folder), MANIFEST]:
            sent.append(name)
            store.put(folder / name, name)
    except CheckpointError as error:
        try:
            store.remove(sent)
            left = "nothing is left there"
        except OSError:
            left = "what was uploaded is left there, without a manifest"
        raise OutputError(f"{error}; {left}, and the result is whole in {folder}: go on with --resume") from error
    shutil.rmtree(folder)

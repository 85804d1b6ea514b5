"""Putting a result on the hub. (Fetching from it is `checkpoints.locate`.)"""

from pathlib import Path

from modalloy.errors import OutputError
from modalloy.outputs.manifest import SOURCES


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

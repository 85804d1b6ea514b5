"""Putting a result on the hub, or into an object store. (Fetching is `storage.locate`.)"""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

from modalloy.errors import CheckpointError, OutputError, cut, plain
from modalloy.files import cache_folder
from modalloy.outputs.manifest import MANIFEST, result_files
from modalloy.outputs.sources import SOURCES
from modalloy.storage.remote import NetworkError, Store


class Target(Store):
    """A folder of an object store that a result is uploaded to."""

    tries_itself = True  # each part of a file: we would send the whole again

    def put(self, path: Path, name: str) -> None:
        """Upload a file, in parts where it is large; what arrived must be as long."""
        url, size = f"{self.location}/{name}", path.stat().st_size

        def send() -> None:
            self.fs.put_file(str(path), url)
            if (there := self.fs.info(url)["size"]) != size:
                raise OSError(f"{there} bytes arrived of {size}")

        self.tried(url, send)

    def remove(self, names: Sequence[str]) -> None:
        """Remove files that were uploaded, and what of them arrived; tried once.

        Raises:
            NetworkError: the store does not answer.
        """
        try:
            self._abort(names)
            for name in names:
                with suppress(FileNotFoundError):  # of which nothing arrived
                    self.fs.rm_file(f"{self.location}/{name}")
        except Exception as error:  # of as many kinds as there are stores and their clients
            raise NetworkError(f"{cut(self.location)}: cannot be cleaned ({plain(error)})") from error

    def abort(self, names: Sequence[str]) -> None:
        """End uploads in parts that were killed, where the store can: S3 keeps the parts, and shows them to nobody."""
        with suppress(CheckpointError):
            self.tried(self.location, lambda: self._abort(names))

    def holds(self, path: Path) -> bool:
        """Whether there is a file of this name and with these bytes."""
        url = f"{self.location}/{path.name}"
        try:
            return bool(self.tried(url, lambda: self.fs.cat_file(url)) == path.read_bytes())
        except CheckpointError:
            return False

    def _abort(self, names: Sequence[str]) -> None:
        if self.scheme != "s3":  # others forget them
            return
        bucket, folder, _ = self.fs.split_path(self.location)
        with suppress(PermissionError):  # who may not list uploads cannot end them
            found = self.fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{folder}/")
            for one in found.get("Uploads", []):
                if one["Key"].removeprefix(f"{folder}/") in names:
                    self.fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=one["Key"], UploadId=one["UploadId"])

    def check_empty(self, but: Mapping[str, int] = MappingProxyType({})) -> None:
        """Refuse a folder in which there is something, but files of these names and sizes."""

        def others() -> list[str]:
            try:
                there = self.fs.find(self.location, detail=True) if but else self.fs.ls(self.location, detail=True)
            except FileNotFoundError:
                if self.scheme in ("s3", "gs"):
                    self.fs.ls(self.root, detail=False)  # there must be the bucket
                return []
            place = self.location.partition("://")[2]
            infos = there.values() if isinstance(there, dict) else there
            return [one["name"] for one in infos if but.get(one["name"].removeprefix(f"{place}/"), -1) != one["size"]]

        if there := self.tried(self.location, others):
            raise OutputError(f"{cut(self.location)}: holds {cut(str(there[0]))}; choose another place, or remove it")


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


def uploaded_from(url: str, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Where a result for an object store is made, so that a killed merge finds it again; what is there already is refused.

    Raises:
        OutputError: there is something, other than what an upload that did not end left of a result to resume; or that
            result waits, and neither `resume` nor `overwrite` says what to do with it.
    """
    store, name = Target(url), hashlib.sha256(url.encode()).hexdigest()[:20]
    folder = cache_folder() / "results" / name / url.rstrip("/").rpartition("/")[2]
    if not (folder / MANIFEST).is_file():
        store.check_empty()
        return folder
    if not (resume or overwrite):
        raise OutputError(
            f"{url}: a result for it is whole in {folder}, but was not uploaded to the end: go on with --resume, or "
            "remove that folder"
        )
    left = [*result_files(folder), *([MANIFEST] if store.holds(folder / MANIFEST) else [])] if resume else []
    store.check_empty({name: (folder / name).stat().st_size for name in left})
    return folder


def upload(folder: Path, url: str) -> None:
    """Upload a result to an object store, its manifest last: without one it is no result. After a failure nothing is left
    there, if the store can still be reached, and the result is where it was made.

    Raises:
        OutputError: the upload failed, even when tried again.
        KeyboardInterrupt: by Ctrl-C, with what is left.
    """
    store, sent = Target(url), []
    try:
        for name in [*result_files(folder), MANIFEST]:
            sent.append(name)
            store.put(folder / name, name)
        store.abort(sent)
    except (CheckpointError, KeyboardInterrupt) as error:
        try:
            store.remove(sent)
            left = "nothing is left there"
        except CheckpointError:
            left = "what was uploaded is left there, without a manifest"
        left += f", and the result is whole in {folder}"
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"{url}: {left}: go on with --resume") from error
        hint = "" if isinstance(error, NetworkError) else ": go on with --resume"  # which says so itself
        raise OutputError(f"{error}; {left}{hint}") from error
    shutil.rmtree(folder)
    with suppress(OSError):  # there may be another
        folder.parent.rmdir()

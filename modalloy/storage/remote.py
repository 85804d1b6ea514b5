"""Models elsewhere (`hf://`, `s3://`, `gs://`, `https://`), by fsspec: small files are fetched, of weights only the headers.

`mirror` gives a local folder that stands for a remote one, pinned to the versions of its files. A weight file there is its
header alone, so that nothing takes it for the whole; the record beside it says where the rest is (`ranges.py` reads it).
"""

import hashlib
import importlib
import json
import os
import re
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from modalloy.errors import CheckpointError, OutputError, PassingError, cut, plain
from modalloy.files import cache_folder, create
from modalloy.storage.folder import MAX_TEXT_BYTES, parse_json

PACKAGES = {"hf": "huggingface_hub", "s3": "s3fs", "gs": "gcsfs", "https": "aiohttp", "http": "aiohttp"}
RECORD = ".remote.json"
HEAD_BYTES = 64 << 10  # of a weight file, asked for first of all: most headers end there
BLOCK_BYTES = 4 << 20  # what is asked for at once
MAX_FILES = 10_000
TRIES, FIRST_WAIT_S = 6, 0.1
gone: set[str] = set()  # hosts and buckets that answered none of so many tries the last time
TIMEOUT_S = 60  # without a byte
ABSENT = (403, 404, 410)  # what web servers answer for a file that there is not
# what a web server is asked for, which lists nothing
WELL_KNOWN = (
    *("config.json", "generation_config.json", "adapter_config.json", "README.md"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
    *("preprocessor_config.json", "processor_config.json"),
    *("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors", "adapter_model.bin"),
    *("mm_projector.bin", "non_lora_trainables.bin"),
)
Value = TypeVar("Value")


@dataclass(frozen=True)
class RemoteFile:
    """One file of a store, as it was when it was listed."""

    url: str
    size: int
    tag: str  # its etag, generation or hash: another version has another
    sha256: str | None = None  # where the store tells it
    is_pinned: bool = False  # its address names one version, for good


class ObjectChangedError(CheckpointError):
    """An object is not the one that was listed."""


class NetworkError(CheckpointError, PassingError):
    """A store cannot be reached, even when tried again."""


class CacheError(OutputError, PassingError):
    """The cache cannot keep what was read."""


@contextmanager
def cache_errors() -> Iterator[None]:
    """A full or forbidden cache as one line that names it: it need not be on the disk of what is merged."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # of no system call
            raise
        raise CacheError(
            f"{cache_folder()}: what is read of stores cannot be kept there ({error.strerror}); set MODALLOY_CACHE to a "
            "folder with room"
        ) from error


def is_remote(location: str) -> bool:
    """Whether it is an address of a store that is read by ranges."""
    scheme, sign, _ = location.partition("://")
    return bool(sign) and scheme in PACKAGES


def mirror(location: str, configs: Iterable[str], weights: Iterable[str]) -> Path:
    """The local folder that stands for a remote one; patterns say which of its files matter.

    Raises:
        CheckpointError: it cannot be listed or read, or holds no files of a model.
        ModuleNotFoundError: the package for its kind of address is not installed.
    """
    store = Store(location)
    found = store.files()
    small = [name for name in found if any(fnmatch(name, pattern) for pattern in configs)]
    stored = [name for name in found if any(fnmatch(name, f"{stem}*.safetensors") for stem in weights)]
    stored = stored or [name for name in found if any(fnmatch(name, f"{stem}*.bin") for stem in weights)]
    if not small and not stored:
        raise CheckpointError(f"{cut(location)}: holds no files of a model; correct the address")
    names = sorted({*small, *stored})
    pins = json.dumps([[name, asdict(found[name])] for name in names])
    folder = cache_folder() / "remote" / hashlib.sha256(pins.encode()).hexdigest()[:20] / store.place
    if (folder / RECORD).is_file():
        return folder
    with cache_errors():
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        by_ranges = [name for name in names if name.endswith(".safetensors")]
        for name in names:
            _write(partial / name, store.head(found[name]) if name in by_ranges else store.whole(found[name]))
        _write(partial / RECORD, [json.dumps({name: asdict(found[name]) for name in by_ranges}).encode()])
        if not (folder / RECORD).is_file():  # else another process was faster
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def record_of(path: Path) -> RemoteFile | None:
    """What a file of a mirror stands for; None of any other file: only our own cache may name addresses."""
    record = path.parent / RECORD
    if not path.is_absolute() or not path.is_relative_to(cache_folder() / "remote") or not record.is_file():
        return None
    entry = json.loads(record.read_text()).get(path.name)
    return None if entry is None else RemoteFile(**entry)


class Store:
    """The file system of an address."""

    tries_itself = False  # whether S3's client tries again for each of our tries: it does 25 times, which is minutes

    def __init__(self, location: str) -> None:
        self.location = location.rstrip("/")
        self.scheme, _, place = self.location.partition("://")
        self.root, *inside = place.split("/")  # host, bucket or owner
        if not self.root or {".", ".."} & {self.root, *inside}:
            raise CheckpointError(f"{cut(location)}: is no address of a folder; write {self.scheme}://PLACE/FOLDER")
        importlib.import_module(PACKAGES[self.scheme])  # or the extra is named
        import fsspec

        options: dict[str, Any] = {"use_listings_cache": False}
        if self.scheme in ("http", "https"):
            from aiohttp import ClientTimeout

            options["client_kwargs"] = {"timeout": ClientTimeout(sock_connect=TIMEOUT_S, sock_read=TIMEOUT_S)}
        if self.scheme == "s3" and not self.tries_itself:
            options["config_kwargs"] = {"retries": {"total_max_attempts": 1, "mode": "standard"}}
        self.fs = fsspec.filesystem(self.scheme, **options)
        if self.scheme == "s3" and not self.tries_itself:
            self.fs.retries = 1
        self.place = PurePosixPath(self.location.rpartition("/")[2])

    def files(self) -> dict[str, RemoteFile]:
        """The files of the folder, by name."""
        if self.scheme == "hf":
            return self._hub_files()
        if self.scheme in ("http", "https"):
            return self._web_files()
        found = self.tried(self.location, lambda: self.fs.ls(self.location, detail=True))
        return self._named((f"{self.scheme}://{one['name']}", one) for one in found if one["type"] == "file")

    def whole(self, file: RemoteFile) -> Iterator[bytes]:
        """All of a small file, or of one that cannot be read by ranges."""
        if not file.url.endswith(".bin") and file.size > MAX_TEXT_BYTES:
            raise CheckpointError(f"{file.url}: is larger than {MAX_TEXT_BYTES:,} bytes, which no config is")
        for begin in range(0, file.size, BLOCK_BYTES):
            yield self.fetch(file, begin, min(file.size, begin + BLOCK_BYTES))
        self.check(file)

    def head(self, file: RemoteFile) -> Iterator[bytes]:
        """The header of a safetensors file."""
        first = self.fetch(file, 0, min(file.size, HEAD_BYTES))
        end = 8 + (struct.unpack("<Q", first[:8])[0] if len(first) >= 8 else MAX_TEXT_BYTES)
        if end > min(file.size, MAX_TEXT_BYTES):
            raise CheckpointError(f"{file.url}: not a complete safetensors file ({file.size} bytes); upload it again")
        yield first[:end]
        if end > len(first):
            yield self.fetch(file, len(first), end)

    def fetch(self, file: RemoteFile, begin: int, end: int) -> bytes:
        """The bytes of a range, which comes whole or is asked for again."""

        def get() -> bytes:
            if self.scheme in ("http", "https", "s3"):
                from fsspec.asyn import sync

                part = self._s3_part if self.scheme == "s3" else self._web_part
                data: bytes = sync(self.fs.loop, part, file, begin, end)
            elif self.scheme == "gs":
                data = self.fs.cat_file(file.url, start=begin, end=end)
            else:  # whose `cat_file` reads ahead
                with self.fs.open(file.url, "rb", 1, cache_type="none", size=file.size) as opened:
                    opened.seek(begin)
                    data = opened.read(end - begin)
            if len(data) != end - begin:
                raise OSError(f"{len(data)} bytes came where {end - begin} were asked for")
            return data

        return self.tried(file.url, get, file)

    async def _s3_part(self, file: RemoteFile, begin: int, end: int) -> bytes:
        """A range of the version that was listed."""
        bucket, key, _ = self.fs.split_path(file.url)
        wanted = {"Bucket": bucket, "Key": key, "Range": f"bytes={begin}-{end - 1}", "IfMatch": file.tag}
        answer = await self.fs._call_s3("get_object", **wanted)
        async with answer["Body"] as body:
            return bytes(await body.read())

    async def _web_part(self, file: RemoteFile, begin: int, end: int) -> bytes:
        """A range of the version that was listed, and no other range."""
        headers = {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        if file.tag.startswith('"'):
            headers["If-Match"] = file.tag
        session = await self.fs.set_session()
        async with session.get(self.fs.encode_url(file.url), headers=headers) as answer:
            answer.raise_for_status()
            etag, modified = answer.headers.get("ETag"), answer.headers.get("Last-Modified")
            told = etag or (None if '"' in file.tag else modified)  # a date says nothing of an etag
            if told and file.tag not in (etag, modified):
                raise ObjectChangedError(f"{file.url}: was changed while being read; start again")
            if answer.status != 206 and (begin or end < file.size):
                raise ValueError(f"its server answers {answer.status} to a request for a range")
            given = answer.headers.get("Content-Range", "").partition("/")[0]
            if answer.status == 206 and given != f"bytes {begin}-{end - 1}":
                raise OSError(f"{cut(given)} came where bytes {begin}-{end - 1} were asked for")
            return bytes(await answer.content.readexactly(end - begin))

    def check(self, file: RemoteFile, tries: int = TRIES) -> None:
        """Refuse a file that was changed since it was listed."""
        if file.is_pinned:
            return
        if _told(self.tried(file.url, lambda: self.fs.info(file.url), tries=tries)) != (file.size, file.tag):
            raise ObjectChangedError(f"{file.url}: was changed while being read; start again")

    def tried(self, url: str, action: Callable[[], Value], file: RemoteFile | None = None, tries: int = TRIES) -> Value:
        """What `action` gives, at once or after a few more tries: one, if these were in vain the last time."""
        place = f"{self.scheme}://{self.root}"
        tries = 1 if place in gone else tries
        for attempt in range(tries):
            try:
                found = action()
                gone.discard(place)
                return found
            except CheckpointError:
                raise
            except (FileNotFoundError, PermissionError) as error:
                reason = (
                    "no such file" if isinstance(error, FileNotFoundError) else f"access is denied: {_reason(error)}"
                )
                raise _denied(url, reason, file if isinstance(error, PermissionError) else None) from error
            except ValueError as error:
                raise CheckpointError(
                    f"{cut(url)}: cannot be read by ranges ({_reason(error)}); download the model and give its folder"
                ) from error
            except Exception as error:  # of as many kinds as there are stores and their clients
                last = error
                status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", 0)
                if status in (401, 403, 404):
                    raise _denied(url, _reason(error), None if status == 404 else file) from error
                if status == 412 or "PreconditionFailed" in f"{type(error).__name__} {error.__cause__!r}":
                    raise ObjectChangedError(f"{cut(url)}: was changed while being read; start again") from error
                if "ParamValidation" in type(error).__name__:
                    raise CheckpointError(f"{cut(url)}: {_reason(error)}; correct the address") from error
                if "Credentials" in type(error).__name__:
                    raise CheckpointError(f"{cut(url)}: {_reason(error)}; give your credentials") from error
            if attempt < tries - 1:
                time.sleep(FIRST_WAIT_S * 2**attempt)
                if file is not None and self.scheme != "s3":  # which is asked for its version itself
                    with suppress(NetworkError):
                        self.check(file, tries=1)
        if tries > 1:
            gone.add(place)
        raise NetworkError(
            f"{cut(url)}: failed {tries} times ({_reason(last)}); check the network, then go on with --resume"
        ) from last

    def _hub_files(self) -> dict[str, RemoteFile]:
        """Those of a repository's commit."""
        from huggingface_hub import HfApi

        match = re.fullmatch(r"hf://([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?", self.location)
        if match is None:
            raise CheckpointError(f"{cut(self.location)}: write hf://OWNER/NAME, with @REVISION where another is meant")
        name, revision, inside = match.groups()
        commit = self.tried(self.location, lambda: HfApi().model_info(name, revision=revision).sha)
        self.place = PurePosixPath(name.replace("/", "--"), "snapshots", str(commit), inside or "")
        root = f"{name}@{commit}" + (f"/{inside}" if inside else "")
        found = self.tried(self.location, lambda: self.fs.ls(root, detail=True))
        return self._named(((f"hf://{one['name']}", one) for one in found if one["type"] == "file"), is_pinned=True)

    def _web_files(self) -> dict[str, RemoteFile]:
        """Those of the usual names that a web server has, and the shards that an index names."""
        found = {}
        for name in WELL_KNOWN:
            if file := self._web_file(name):
                found[name] = file
        if index := found.get("model.safetensors.index.json"):
            try:
                content = parse_json(b"".join(self.whole(index)))
            except ValueError as error:
                raise CheckpointError(f"{index.url}: is not JSON ({_reason(error)}); upload it again") from error
            names = content.get("weight_map") if isinstance(content, dict) else None
            if not isinstance(names, dict):
                raise CheckpointError(f"{index.url}: has no weight_map that names files; upload it again")
            for name in {str(one) for one in names.values()}:
                if _is_plain(name) and (file := self._web_file(name)):
                    found[name] = file
        return found

    def _web_file(self, name: str) -> RemoteFile | None:
        url = f"{self.location}/{name}"

        def info() -> Mapping[str, Any] | None:
            try:
                return self.fs.info(url)
            except FileNotFoundError as error:  # fsspec's word for whatever went wrong
                if error.__cause__ is None or getattr(error.__cause__, "status", None) in ABSENT:
                    return None
                raise error.__cause__ from None

        told = self.tried(url, info)
        if told is None:
            return None
        return RemoteFile(url, *_told(told))

    def _named(self, found: Iterable[tuple[str, Mapping[str, Any]]], is_pinned: bool = False) -> dict[str, RemoteFile]:
        files = {}
        for url, told in found:
            name = url.rpartition("/")[2]
            if not _is_plain(name):
                continue
            lfs = told.get("lfs")
            sha256 = lfs.get("sha256") if isinstance(lfs, Mapping) else None
            files[name] = RemoteFile(url, *_told(told), sha256, is_pinned)
        if len(files) > MAX_FILES:
            raise CheckpointError(f"{cut(self.location)}: holds {len(files):,} files, which no model does")
        if list(files) == [self.place.name]:  # a file lists itself
            raise CheckpointError(f"{cut(self.location)}: is a file; give the folder that it is in")
        return files


def _told(info: Mapping[str, Any]) -> tuple[int, str]:
    """Size of an object, and what tells its version."""
    names = ("ETag", "etag", "generation", "md5Hash", "blob_id", "LastModified", "Last-Modified", "mtime")
    if not isinstance(info.get("size"), int):
        raise CheckpointError(f"{info.get('name')}: its server does not tell its size; download it and give its folder")
    tag = next((str(info[name]) for name in names if info.get(name)), None)
    if tag is None:
        raise CheckpointError(
            f"{info.get('name')}: its server tells no version of it (ETag, Last-Modified); download it and give its folder"
        )
    return info["size"], tag


def _is_plain(name: str) -> bool:
    return PurePosixPath(name).name == name and name not in ("", "..") and name.isprintable() and name != RECORD


def _reason(error: BaseException) -> str:
    return plain(str(error) or type(error).__name__)


def _denied(url: str, reason: str, listed: RemoteFile | None) -> CheckpointError:
    """A refusal; of a file that was `listed` before, one after which what is finished waits for other credentials."""
    kind = CheckpointError if listed is None else NetworkError
    return kind(f"{cut(url)}: {reason}; correct the address, or give your credentials")


def _write(path: Path, blocks: Iterable[bytes]) -> None:
    with cache_errors(), os.fdopen(create(path), "wb") as file:
        for block in blocks:
            file.write(block)

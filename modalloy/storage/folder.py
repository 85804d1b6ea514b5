"""A stranger's files: regular ones inside their folder, read up to a limit; JSON whose cost is known before it is parsed."""

import errno
import hashlib
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from modalloy.errors import CheckpointError, shown

MAX_TEXT_BYTES = 100_000_000  # of a config, tokenizer, index or header: the limit of the safetensors format
MAX_PARSED_BYTES = 600_000_000  # memory of what a text holds; the largest tokenizer known takes two thirds of it
SAFETENSORS_ONLY = "MODALLOY_SAFETENSORS_ONLY"  # an environment variable, which child processes inherit
MAX_DEPTH = 64  # lists in lists of JSON
# bytes that a text can take once it is parsed, for each of these characters
PARSED_BYTES = {b"{": 280, b"[": 100, b",": 200}
HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # perhaps of a surrogate pair
KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def is_there(path: Path) -> bool:
    """Whether a model's folder has this file.

    Raises:
        CheckpointError: in its place is a pipe, device or folder, or a link that leads out of the folder or nowhere.
    """
    try:
        with reading(path):
            mode = path.stat().st_mode
    except CheckpointError as error:
        if not isinstance(error.__cause__, (FileNotFoundError, NotADirectoryError)):
            raise
        if path.is_symlink():
            raise CheckpointError(f"{path}: is a link to a file that is missing; download the folder again") from None
        return False
    _check_regular(path, mode)
    if path.is_symlink():
        _check_link(path)
    return True


def present(folder: Path, names: Iterable[str]) -> list[str]:
    """Those of the named files that the folder has."""
    return [name for name in names if is_there(folder / name)]


def open_file(path: Path) -> BinaryIO:
    """A file to read from; a pipe is not waited for, and no device is read.

    Raises:
        CheckpointError: it is no regular file, or cannot be read.
    """
    with reading(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            _check_regular(path, os.fstat(descriptor).st_mode)
            return os.fdopen(descriptor, "rb")
        except BaseException:
            os.close(descriptor)
            raise


def read_bytes(path: Path, limit: int = MAX_TEXT_BYTES) -> bytes:
    """A whole file of at most `limit` bytes."""
    with reading(path), open_file(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise CheckpointError(f"{path}: is larger than {limit:,} bytes, which no file of its kind is; correct the path")
    return content


def read_text(path: Path, limit: int = MAX_TEXT_BYTES) -> str:
    """A whole text file (UTF-8) of at most `limit` bytes."""
    try:
        return read_bytes(path, limit).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: is no text ({error.reason} at byte {error.start}); save it as UTF-8") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model's folder, or a CheckpointError that names the file."""
    if not is_there(path):
        raise CheckpointError(f"{path}: no such file; download the folder again")
    try:
        content = parse_json(read_bytes(path))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); download the file again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object; download the file again")
    return content


def parse_json(text: bytes) -> Any:
    """The content of a JSON text whose memory and depth are bounded, and in which no key is given twice.

    Raises:
        ValueError: it is no such text.
    """
    cost = len(text) * (2 if text.isascii() else 8)
    cost += sum(text.count(mark) * size for mark, size in PARSED_BYTES.items())
    if cost > MAX_PARSED_BYTES:
        raise ValueError(
            f"its content would take {cost / 1e9:.1f} GB of memory, more than {MAX_PARSED_BYTES / 1e9:g} GB"
        )
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    halves = HALF.search(text) is not None
    level = [content]
    for _ in range(MAX_DEPTH + 1):
        if halves:
            _check_text(level)
        if not (level := [part for one in level for part in _parts(one) if halves or isinstance(part, (dict, list))]):
            return content
    raise ValueError(f"is nested more than {MAX_DEPTH} deep")


def _parts(content: Any) -> Iterable[Any]:
    return content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()


def _check_text(level: list[Any]) -> None:
    """Half a surrogate pair is no text: no file, terminal or tokenizer takes it."""
    for one in level:
        for word in one if isinstance(one, dict) else (one,):
            if isinstance(word, str) and any("\ud800" <= char <= "\udfff" for char in word):
                raise ValueError(f"{shown(word)} is half a surrogate pair")


def unique(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key that is there twice, the last would win."""
    content = dict(entries)
    if len(content) < len(entries):
        name, _ = Counter(name for name, _ in entries).most_common(1)[0]
        raise ValueError(f"{shown(name)} is there twice")
    return content


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an input that is missing or cannot be read into one CheckpointError line that names `path`."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; download the folder again") from error
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            reason = "its name is too long" if error.errno == errno.ENAMETOOLONG else "it is a link in a circle"
            raise CheckpointError(f"{shown(str(path))}: no such file ({reason}); correct the path") from error
        reason = error.strerror or str(error)
        raise CheckpointError(f"{path}: cannot be read ({reason}); check its permissions and the disk") from error
    except ValueError as error:
        if "null" not in str(error) and not isinstance(error, UnicodeEncodeError):
            raise
        raise CheckpointError(f"{shown(str(path))}: no such file (no file has this name); correct the path") from error


def file_sha256(path: Path) -> str:
    """Hash of a whole file."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = KINDS.get(stat.S_IFMT(mode), "no file")
        raise CheckpointError(f"{path}: is {kind}, where a file is expected; replace it by the file")


def _check_link(path: Path) -> None:
    """A link must stay in its folder, or lead to a blob of the hub's cache, as `snapshots/COMMIT/NAME` does."""
    place = path.resolve()
    in_cache = place.parent.name == "blobs" and place.parent.parent.name.startswith(("models--", "datasets--"))
    if not in_cache and not place.is_relative_to(path.parent.resolve()):
        raise CheckpointError(f"{path}: is a link out of the model's folder, to {place}; put the file itself there")


def refuse_pickle(path: Path) -> None:
    """Refuse a pickle where none may be read: `modalloy --safetensors-only`, or its environment variable.

    Raises:
        CheckpointError: none may.
    """
    if os.environ.get(SAFETENSORS_ONLY, "") not in ("", "0"):
        raise CheckpointError(f"{path}: is a pickle, which --safetensors-only refuses; ask its author for safetensors")


def refuse_pickles(folder: Path) -> None:
    """The same for a folder that a library opens: pickled weights, where there are no safetensors that it takes first."""
    if not any(folder.glob("*.safetensors")):
        for path in sorted(folder.glob("*.bin")):
            refuse_pickle(path)

"""Writing a result: sharded safetensors streamed in order, in a folder beside the target that is renamed at the end."""

import errno
import hashlib
import json
import os
import secrets
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from modalloy.checkpoints.tensors import CODES
from modalloy.errors import OutputError


@dataclass(frozen=True)
class TensorSpec:
    """Name, type and shape of a tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Size of the data."""
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


class WeightWriter:
    """Writes tensors, in the order announced, into `STEM.safetensors` or into shards of at most `max_shard_bytes`.

    The headers are known before the first tensor is, so nothing is held back in memory. Every file is hashed as it is
    written; `sha256` maps file names to hashes once closed.
    """

    def __init__(self, folder: Path, stem: str, specs: list[TensorSpec], max_shard_bytes: int | None = None) -> None:
        self.folder, self.stem = folder, stem
        self.shards: list[list[TensorSpec]] = [[]]
        size = 0
        for spec in specs:
            if max_shard_bytes is not None and self.shards[-1] and size + spec.n_bytes > max_shard_bytes:
                self.shards.append([])
                size = 0
            self.shards[-1].append(spec)
            size += spec.n_bytes
        self.sha256: dict[str, str] = {}
        self._expected = [(index, spec) for index, shard in enumerate(self.shards) for spec in shard]
        self._file: BinaryIO | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor; its name, type and shape must be the ones announced."""
        index, spec = self._expected.pop(0)
        found = TensorSpec(name, tensor.dtype, tuple(tensor.shape))
        assert found == spec, f"expected {spec}, got {found}"
        if self._file is None:
            self._file = open(self.folder / self._name(index), "wb", buffering=0)  # noqa: SIM115 - closed in _finish or abort
            self._digest = hashlib.sha256()
            self._put(memoryview(_header(self.shards[index])))
        self._put(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        if not self._expected or self._expected[0][0] != index:
            self._finish(index)

    def close(self) -> None:
        """Write the index, if there are several shards."""
        assert not self._expected, f"{len(self._expected)} tensors were announced but not written"
        if len(self.shards) > 1:
            total = sum(spec.n_bytes for shard in self.shards for spec in shard)
            weight_map = {spec.name: self._name(i) for i, shard in enumerate(self.shards) for spec in shard}
            index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"
            (self.folder / f"{self.stem}.safetensors.index.json").write_text(index)

    def abort(self) -> None:
        """Close the open file after a failure."""
        if self._file is not None:
            self._file.close()

    def _put(self, data: memoryview) -> None:
        assert self._file is not None
        self._digest.update(data)
        while len(data):
            data = data[self._file.write(data) :]

    def _finish(self, index: int) -> None:
        assert self._file is not None
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        self.sha256[self._name(index)] = self._digest.hexdigest()

    def _name(self, index: int) -> str:
        if len(self.shards) == 1:
            return f"{self.stem}.safetensors"
        return f"{self.stem}-{index + 1:05d}-of-{len(self.shards):05d}.safetensors"


def _header(specs: list[TensorSpec]) -> bytes:
    """The safetensors header, padded with spaces to a multiple of eight bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        entries[spec.name] = {
            "dtype": CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.n_bytes],
        }
        offset += spec.n_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class Staging:
    """A folder beside `out` that takes its place only if everything went well.

    Usage: `with Staging(out, overwrite=False) as folder: …`. After any exception the folder is removed and `out` is as it
    was. An existing `out` is refused unless `overwrite`, and then replaced by two renames.
    """

    def __init__(self, out: Path, *, overwrite: bool = False) -> None:
        self.out, self.overwrite = out, overwrite
        if out.name in ("", ".."):
            raise OutputError(f"{out}: cannot be replaced as a whole; name a folder in it")
        with disk_errors(out):
            if out.exists() and not overwrite:
                raise OutputError(f"{out}: already exists; choose another folder, or replace it with --overwrite")
            if out.exists() and not (out.is_dir() and ((out / "manifest.json").is_file() or not any(out.iterdir()))):
                raise OutputError(
                    f"{out}: is not a folder that modalloy wrote, so --overwrite will not replace it; remove it yourself"
                )
            self.new_parents = [parent for parent in out.parents if not parent.exists()]  # innermost first
        suffix = secrets.token_hex(4)  # not the process id: in containers it is often the same
        self.folder = out.parent / f".{out.name}.partial-{suffix}"
        self.replaced = out.parent / f".{out.name}.replaced-{suffix}"

    def __enter__(self) -> Path:
        with disk_errors(self.out):
            try:
                self.folder.mkdir(parents=True)
            except OSError:
                self._remove()
                raise
        return self.folder

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._remove()
            return
        with disk_errors(self.out):
            try:
                if self.overwrite and self.out.exists():
                    self.out.rename(self.replaced)
                self.folder.rename(self.out)
            finally:  # both renames, or neither
                if self.replaced.exists() and not self.out.exists():
                    self.replaced.rename(self.out)
                if self.folder.exists():
                    self._remove()
        shutil.rmtree(self.replaced, ignore_errors=True)

    def _remove(self) -> None:
        """Remove the unfinished folder, and the parents that were made for it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for parent in self.new_parents:
            with suppress(OSError):
                parent.rmdir()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a forbidden folder and the like into one OutputError line that names `path`."""
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: "the disk is full; free space or choose another folder",
            errno.EDQUOT: "your disk quota is used up; free space or choose another folder",
            errno.EACCES: "permission denied; choose another folder",
            errno.EROFS: "the file system is read-only; choose another folder",
            errno.ENAMETOOLONG: "the name is too long; choose another folder",
            errno.ENOTEMPTY: "was made by something else during the merge; choose another folder, or say --overwrite",
            errno.ENOTDIR: "a part of the path is a file, not a folder; choose another folder",
        }
        if error.errno in reasons:
            raise OutputError(f"{path}: {reasons[error.errno]}; nothing was written") from error
        raise

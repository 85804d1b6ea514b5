"""Writing weights: sharded safetensors streamed in order and hashed on the way; and copying files."""

import errno
import fcntl
import hashlib
import json
import mmap
import os
import queue
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from modalloy.files import create, is_file, write_text
from modalloy.storage.folder import file_sha256, reading
from modalloy.storage.remote import record_of
from modalloy.storage.source import BLOCK_BYTES, PAGE_BYTES, aligned_block
from modalloy.storage.tensors import CODES, WeightFile

DIRECT_BYTES = 64 << 20  # files from this size on are written past the page cache


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
    written, by a thread of its own; `sha256` maps file names to hashes, of finished shards at once and of all once closed.
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
        self._file: _HashedFile | None = None

    def names(self) -> list[str]:
        """Names of the files, in order."""
        return [self._name(index) for index in range(len(self.shards))]

    def keep(self, finished: dict[str, str]) -> set[str]:
        """Take shards of an earlier, interrupted run as written, if their bytes still have these hashes.

        Returns the names of the tensors that they hold, which must not be added again.
        """
        kept: set[str] = set()
        for index, shard in enumerate(self.shards):
            name = self._name(index)
            path = self.folder / name
            if name in finished and is_file(path) and file_sha256(path) == finished[name]:
                self.sha256[name] = finished[name]
                kept |= {spec.name for spec in shard}
        self._expected = [(index, spec) for index, spec in self._expected if spec.name not in kept]
        return kept

    def adopt(self, index: int, path: Path, sha256: str) -> str:
        """Take a file that another process wrote as one of the shards; returns its name."""
        name = self._name(index)
        path.replace(self.folder / name)
        self.sha256[name] = sha256
        self._expected = [(shard, spec) for shard, spec in self._expected if shard != index]
        return name

    def add(self, name: str, tensor: Tensor) -> str | None:
        """Write the next tensor; its name, type and shape must be those announced. Returns the file's name once it is whole."""
        index, spec = self._expected.pop(0)
        found = TensorSpec(name, tensor.dtype, tuple(tensor.shape))
        assert found == spec, f"expected {spec}, got {found}"
        if self._file is None:
            header = _header(self.shards[index])
            size = len(header) + sum(each.n_bytes for each in self.shards[index])
            self._file = _HashedFile(self.folder / self._name(index), size)
            self._file.write(memoryview(header))
        self._file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        if self._expected and self._expected[0][0] == index:
            return None
        self.sha256[self._name(index)] = self._file.close()
        self._file = None
        return self._name(index)

    def close(self) -> None:
        """Write the index, if there are several shards."""
        assert not self._expected, f"{len(self._expected)} tensors were announced but not written"
        if len(self.shards) > 1:
            total = sum(spec.n_bytes for shard in self.shards for spec in shard)
            weight_map = {spec.name: self._name(i) for i, shard in enumerate(self.shards) for spec in shard}
            index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"
            write_text(self.folder / f"{self.stem}.safetensors.index.json", index)

    def abort(self) -> None:
        """Close the open file after a failure."""
        if self._file is not None:
            self._file.abort()

    def _name(self, index: int) -> str:
        if len(self.shards) == 1:
            return f"{self.stem}.safetensors"
        return f"{self.stem}-{index + 1:05d}-of-{len(self.shards):05d}.safetensors"


class _HashedFile:
    """A file that one thread writes and one hashes in blocks, while the caller goes on; large files go past the page cache."""

    def __init__(self, path: Path, size: int) -> None:
        direct = getattr(os, "O_DIRECT", 0) if size >= DIRECT_BYTES else 0
        path.unlink(missing_ok=True)  # of an interrupted run, and no longer what it recorded
        try:
            self.descriptor = create(path, direct)
        except OSError as error:
            if error.errno != errno.EINVAL or not direct:
                raise
            path.unlink(missing_ok=True)  # a file system without O_DIRECT, which says so after making the file
            self.descriptor, direct = create(path), 0
        self.direct = bool(direct)
        self.digest, self.hasher = hashlib.sha256(), ThreadPoolExecutor(1, "hash")
        self.empty: queue.SimpleQueue[mmap.mmap] = queue.SimpleQueue()
        for _ in range(min(3, size // BLOCK_BYTES + 1)):
            self.empty.put(aligned_block(BLOCK_BYTES))
        self.full: queue.SimpleQueue[tuple[mmap.mmap, int] | None] = queue.SimpleQueue()
        self.block, self.filled = self.empty.get(), 0
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._drain, name=f"write {path.name}", daemon=True)
        self.thread.start()

    def write(self, data: memoryview) -> None:
        """Append; waits while three blocks are on their way."""
        while len(data):
            count = min(len(data), BLOCK_BYTES - self.filled)
            target = np.frombuffer(self.block, np.uint8, count, self.filled)
            np.copyto(target, np.frombuffer(data, np.uint8, count))  # other threads go on meanwhile
            self.filled += count
            data = data[count:]
            if self.filled == BLOCK_BYTES:
                self._send()

    def close(self) -> str:
        """The file's hash, once every byte is on the disk. After an error, `abort` is still to be called."""
        self.full.put((self.block, self.filled))
        self._stop()
        os.fsync(self.descriptor)
        os.close(self.descriptor)
        return self.digest.hexdigest()

    def abort(self) -> None:
        """Give up, after a failure."""
        with suppress(Exception):  # the writer's own, which is known or follows from the first
            self._stop()
        with suppress(OSError):  # that of a failed close
            os.close(self.descriptor)

    def _send(self) -> None:
        self.full.put((self.block, self.filled))
        self.block, self.filled = self.empty.get(), 0
        if self.error is not None:
            raise self.error

    def _stop(self) -> None:
        self.full.put(None)
        self.thread.join()
        self.hasher.shutdown()
        if self.error is not None:
            raise self.error

    def _drain(self) -> None:
        while (item := self.full.get()) is not None:
            block, filled = item
            if self.error is None:
                try:
                    with memoryview(block) as data:
                        self._put_hashed(data[:filled])
                except Exception as error:  # of any kind: the caller waits for the block and raises it
                    self.error = error
            self.empty.put(block)

    def _put_hashed(self, data: memoryview) -> None:
        hashed = self.hasher.submit(self.digest.update, data)
        try:
            self._put(data)
        finally:
            hashed.result()

    def _put(self, data: memoryview) -> None:
        if len(data) % PAGE_BYTES:  # the end of the file
            self._go_buffered()
        while len(data):
            try:
                data = data[os.write(self.descriptor, data) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self.direct:
                    raise
                self._go_buffered()  # a disk with larger sectors, or the rest of a short write

    def _go_buffered(self) -> None:
        if self.direct:
            flags = fcntl.fcntl(self.descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self.descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            self.direct = False


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


def copy_file(source: Path, path: Path) -> None:
    """Copy a file to a new one at `path`; a CheckpointError names the source where it cannot be read."""
    if record_of(source) is not None:  # the header of a file that is elsewhere
        with os.fdopen(create(path), "wb") as out:
            WeightFile(source).copy_to(out.write)
        return
    with reading(source):
        file = source.open("rb")
    with file, os.fdopen(create(path), "wb") as out:
        while True:
            with reading(source):
                block = file.read(BLOCK_BYTES)
            if not block:
                return
            out.write(block)

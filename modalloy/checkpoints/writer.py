"""Writing a result: sharded safetensors streamed in order, in a folder beside the target that is renamed at the end."""

import errno
import fcntl
import hashlib
import json
import mmap
import os
import queue
import shutil
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from modalloy.checkpoints.tensors import BLOCK_BYTES, CODES, PAGE_BYTES, aligned_block, file_sha256
from modalloy.errors import OutputError

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
            if name in finished and path.is_file() and file_sha256(path) == finished[name]:
                self.sha256[name] = finished[name]
                kept |= {spec.name for spec in shard}
        self._expected = [(index, spec) for index, spec in self._expected if spec.name not in kept]
        return kept

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
            (self.folder / f"{self.stem}.safetensors.index.json").write_text(index)

    def abort(self) -> None:
        """Close the open file after a failure."""
        if self._file is not None:
            self._file.abort()

    def _name(self, index: int) -> str:
        if len(self.shards) == 1:
            return f"{self.stem}.safetensors"
        return f"{self.stem}-{index + 1:05d}-of-{len(self.shards):05d}.safetensors"


class _HashedFile:
    """A file that a thread writes and hashes in blocks, while the caller goes on; large files go past the page cache."""

    def __init__(self, path: Path, size: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        direct = getattr(os, "O_DIRECT", 0) if size >= DIRECT_BYTES else 0
        try:
            self.descriptor = os.open(path, flags | direct, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL or not direct:
                raise
            self.descriptor, direct = os.open(path, flags, 0o666), 0  # a file system without O_DIRECT
        self.direct = bool(direct)
        self.digest = hashlib.sha256()
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
            self.block[self.filled : self.filled + count] = data[:count]
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
        if self.error is not None:
            raise self.error

    def _drain(self) -> None:
        while (item := self.full.get()) is not None:
            block, filled = item
            if self.error is None:
                try:
                    with memoryview(block) as data:
                        self._put(data[:filled])
                except Exception as error:  # of any kind: the caller waits for the block and raises it
                    self.error = error
            self.empty.put(block)

    def _put(self, data: memoryview) -> None:
        self.digest.update(data)
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


class Staging:
    """A folder beside `out` that takes its place only if everything went well.

    Usage: `with Staging(out, overwrite=False) as folder: …`. After any exception the folder is removed and `out` is as it
    was. An existing `out` is refused unless `overwrite`, and then replaced by two renames.

    A process that is killed leaves `.OUT.partial` and its log `.OUT.partial.log` (JSON lines: what was being made, then
    every finished file with its hash). With `resume` the next run goes on from there, if it makes the same
    (`fingerprint`); without, it starts again. `finished` then holds the hashes of the finished files, and `facts` what
    was noted with them. The log is locked while a process works on it.
    """

    def __init__(self, out: Path, *, overwrite: bool = False, resume: bool = False) -> None:
        self.out, self.overwrite, self.resume = out, overwrite, resume
        self.finished: dict[str, str] = {}
        self.facts: dict[str, float] = {}
        if out.name in ("", ".."):
            raise OutputError(f"{out}: cannot be replaced as a whole; name a folder in it")
        if overwrite and resume:
            raise OutputError("--overwrite starts again and --resume goes on; give one of them")
        self.folder = out.parent / f".{out.name}.partial"
        self.log = out.parent / f".{out.name}.partial.log"
        self.replaced = out.parent / f".{out.name}.replaced"
        with disk_errors(out):
            self.interrupted = self.folder.exists()
            if not resume:
                self._check_target()
            self.new_parents = [parent for parent in out.parents if not parent.exists()]  # innermost first

    def begin(self, fingerprint: str) -> "Staging":
        """Say what is being made; to be called before entering."""
        self.fingerprint = fingerprint
        return self

    def note(self, name: str, sha256: str, facts: dict[str, float]) -> None:
        """Record a finished file, and what is known of its making, so that a resumed run keeps both."""
        os.write(self.lock, (json.dumps({"file": name, "sha256": sha256, "facts": facts}) + "\n").encode())
        os.fsync(self.lock)

    def clean(self) -> None:
        """Remove what a process left that was killed after the result was in place."""
        shutil.rmtree(self.replaced, ignore_errors=True)
        self.log.unlink(missing_ok=True)

    def __enter__(self) -> Path:
        with disk_errors(self.out):
            try:
                self.out.parent.mkdir(parents=True, exist_ok=True)
                while not self._locked():
                    pass
            except OSError:
                self._remove_parents()
                raise
            try:
                if not (self.resume and self._continues()):
                    self._start_again()
            except OutputError:
                if not os.fstat(self.lock).st_size:  # nobody's log, opened just now
                    self.log.unlink()
                os.close(self.lock)
                raise
            except BaseException:
                self._remove()
                os.close(self.lock)
                raise
        return self.folder

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is not None:
                self._remove()
                return
            with disk_errors(self.out):
                try:
                    if self.overwrite and self.out.exists():
                        self.out.rename(self.replaced)
                    self.folder.rename(self.out)
                finally:  # both renames, or neither
                    if self.folder.exists():
                        self._remove()
            self.clean()
        finally:
            os.close(self.lock)

    def _locked(self) -> bool:
        """Lock the log; not if another process removed it meanwhile, whose successor would lock a new one."""
        self.lock = os.open(self.log, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self.lock)
            if isinstance(error, BlockingIOError):
                raise OutputError(f"{self.out}: another merge is writing it now; wait for it or stop it") from error
            raise
        if self.log.exists() and os.path.samestat(os.fstat(self.lock), self.log.stat()):
            return True
        os.close(self.lock)
        return False

    def _check_target(self) -> None:
        out = self.out
        if out.exists() and not self.overwrite:
            raise OutputError(f"{out}: already exists; choose another folder, or replace it with --overwrite")
        if out.exists() and not (out.is_dir() and ((out / "manifest.json").is_file() or not any(out.iterdir()))):
            raise OutputError(
                f"{out}: is not a folder that modalloy wrote, so --overwrite will not replace it; remove it yourself"
            )

    def _continues(self) -> bool:
        """Whether an interrupted run was found to go on from; one of something else is refused."""
        records: list[dict[str, Any]] = []
        whole = 0
        for line in self.log.read_bytes().splitlines(keepends=True):
            try:
                record = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or not isinstance(record, dict):
                break
            records.append(record)
            whole += len(line)
        if not records or not self.folder.is_dir():
            return False
        if records[0].get("fingerprint") != self.fingerprint:
            raise OutputError(
                f"{self.out}: the interrupted merge was of another recipe or of inputs that changed since; "
                "start again without --resume"
            )
        os.ftruncate(self.lock, whole)  # what the kill cut would spoil the next record
        self.overwrite = records[0]["overwrite"]
        for record in records[1:]:
            self.finished[record["file"]] = record["sha256"]
            self.facts |= record["facts"]
        return True

    def _start_again(self) -> None:
        self._put_back()
        shutil.rmtree(self.replaced, ignore_errors=True)
        self._check_target()
        if self.folder.exists():
            shutil.rmtree(self.folder)
        os.ftruncate(self.lock, 0)
        head = {"fingerprint": self.fingerprint, "overwrite": self.overwrite}
        os.write(self.lock, (json.dumps(head) + "\n").encode())
        self.folder.mkdir()

    def _remove(self) -> None:
        """Leave everything as it was: without the unfinished folder, its log, and the parents that were made for it."""
        self._put_back()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.log.unlink(missing_ok=True)
        self._remove_parents()

    def _put_back(self) -> None:
        """Undo the first of the two renames, if this process or one that was killed came no further."""
        if self.replaced.exists() and not self.out.exists():
            self.replaced.rename(self.out)

    def _remove_parents(self) -> None:
        for parent in self.new_parents:
            with suppress(OSError):
                parent.rmdir()


def replace_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a forbidden folder and the like into one OutputError line that names `path`."""
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: "the disk is full; free space or choose another folder",
            errno.EDQUOT: "your disk quota is used up; free space or choose another folder",
            errno.ENOLCK: "the file system cannot lock files; choose another folder",
            errno.EFBIG: "the file system takes no file this large; set output.max_shard_size or choose another folder",
            errno.EACCES: "permission denied; choose another folder",
            errno.EROFS: "the file system is read-only; choose another folder",
            errno.ENAMETOOLONG: "the name is too long; choose another folder",
            errno.ENOTEMPTY: "was made by something else during the merge; choose another folder, or say --overwrite",
            errno.ENOTDIR: "a part of the path is a file, not a folder; choose another folder",
            errno.EEXIST: "a part of the path is a file, not a folder; choose another folder",
        }
        if error.errno in reasons:
            raise OutputError(f"{path}: {reasons[error.errno]}; nothing was written") from error
        raise

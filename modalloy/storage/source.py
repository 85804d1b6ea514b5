"""The bytes of a file, read where they are: from the page cache, or past it; and hashed on the way."""

import errno
import hashlib
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from modalloy.errors import CheckpointError

BLOCK_BYTES = 8 << 20  # what is read or written at once
MAX_SKIPPED_BYTES = 64 << 20  # a gap between two reads that is read too, for the hash
PAGE_BYTES = 4096  # alignment of reads and writes past the page cache
DIRECT_READS = hasattr(os, "O_DIRECT") and hasattr(os, "RWF_NOWAIT")  # of Linux


class Reader(Protocol):
    """What gives bytes of an opened file."""

    def read_some(self, target: memoryview, begin: int, *, again: bool = False) -> int:
        """Some of the bytes from `begin` on, which are read `again` soon; 0 at the end."""
        ...


def stamp_of(path: Path) -> list[int]:
    """What every change of a file changes: size, times of change of data and of inode in ns, inode."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


class Source:
    """The bytes of one file, for several threads, and their hash taken on the way.

    With `hashes_reads`, what is read in the file's order is hashed as it passes, with what little lies between; the rest
    is read again when the hash is asked for. The file is opened for each read: a model of hundreds of shards would run
    out of descriptors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stamp = stamp_of(path)
        self.size, self.changed_ns = self.stamp[:2]
        self.lock = threading.Lock()
        self.digest = hashlib.sha256()
        self.hashed = 0
        self.hashes_reads = False
        self.kept: set[int] = set()  # where tensors begin that are read again
        self.known: str | None = None  # its hash, where an earlier merge took it

    def read_into(self, target: memoryview, begin: int, what: str) -> None:
        """Fill `target` with the bytes from `begin` on."""
        with self._opened() as file:
            done, again = 0, begin in self.kept
            while done < len(target):
                count = file.read_some(target[done : done + BLOCK_BYTES], begin + done, again=again)
                if not count:
                    raise CheckpointError(f"{self.path}: ends inside {what}; the file was cut while being read")
                done += count
            if not self.hashes_reads or self.known is not None:
                return
            with self.lock:
                if begin <= self.hashed < begin + len(target):
                    self._hash(target[self.hashed - begin :])
                elif self.hashed < begin <= self.hashed + MAX_SKIPPED_BYTES:
                    self._catch_up(file, begin)
                    self._hash(target)

    def sha256(self) -> str:
        """Hash of the whole file."""
        if self.known is not None:
            return self.known
        with self._opened() as file, self.lock:
            self._catch_up(file, self.size)
            return self.digest.hexdigest()

    @contextmanager
    def _opened(self) -> Iterator[Reader]:
        with _Opened(self.path) as file:
            found = os.fstat(file.cached)
            if (found.st_size, found.st_mtime_ns) != (self.size, self.changed_ns):
                raise CheckpointError(f"{self.path}: was changed while being read; start again")
            yield file

    def _catch_up(self, file: Reader, end: int) -> None:
        block = memoryview(bytearray(min(BLOCK_BYTES, max(end - self.hashed, 0))))
        while self.hashed < end:
            count = file.read_some(block[: end - self.hashed], self.hashed)
            if not count:
                raise CheckpointError(f"{self.path}: was cut while being read; download or copy it again")
            self._hash(block[:count])

    def keep(self, begin: int, end: int) -> None:
        """These bytes will be read again: the page cache shall hold them."""
        self.kept.add(begin)

    def forget(self) -> None:
        """They will not be any more."""

    def _hash(self, data: memoryview) -> None:
        self.digest.update(data)
        self.hashed += len(data)


class _Opened:
    """A file opened to read through the page cache, and past it where that is possible and needed."""

    bounce = threading.local()  # a block of memory as the disk wants it, one for each thread

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cached = os.open(path, os.O_RDONLY)
        self.direct: int | None = None

    def __enter__(self) -> "_Opened":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.cached)
        if self.direct is not None:
            os.close(self.direct)

    def read_some(self, target: memoryview, begin: int, *, again: bool = False) -> int:
        """Some of the bytes from `begin` on: from the page cache if they are there, else past it; 0 at the end.

        What is read again is read into the page cache.
        """
        if again and DIRECT_READS:
            os.posix_fadvise(self.cached, begin, len(target), os.POSIX_FADV_WILLNEED)
        if again or len(target) < 16 * PAGE_BYTES or not DIRECT_READS:
            return os.preadv(self.cached, [target], begin)
        try:
            if count := os.preadv(self.cached, [target], begin, os.RWF_NOWAIT):
                return count
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
                raise
        skip = begin % PAGE_BYTES
        wanted = -(-(skip + len(target)) // PAGE_BYTES) * PAGE_BYTES
        with memoryview(self._block()) as block:
            try:
                count = os.preadv(self._past_cache(), [block[:wanted]], begin - skip) - skip
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                return os.preadv(self.cached, [target], begin)  # no O_DIRECT here, or a disk with larger sectors
            count = max(0, min(count, len(target)))
            target[:count] = block[skip : skip + count]
            return count

    def _past_cache(self) -> int:
        if self.direct is None:
            self.direct = os.open(self.path, os.O_RDONLY | os.O_DIRECT)
        return self.direct

    def _block(self) -> mmap.mmap:
        if not hasattr(self.bounce, "block"):
            self.bounce.block = aligned_block(BLOCK_BYTES + 2 * PAGE_BYTES)
        block: mmap.mmap = self.bounce.block
        return block


def aligned_block(n_bytes: int) -> mmap.mmap:
    """Memory aligned to a page, as a disk wants it; private, so that a forked process does not share it."""
    return mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

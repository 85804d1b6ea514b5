"""The bytes of a file, read where they are: from the page cache, or past it; and hashed on the way."""

import ctypes
import errno
import hashlib
import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

from modalloy.errors import CheckpointError

BLOCK_BYTES = 8 << 20  # what is read or written at once
MAX_SKIPPED_BYTES = 64 << 20  # a gap between two reads that is read too, for the hash
PAGE_BYTES = 4096  # alignment of reads and writes past the page cache
DIRECT_READS = sys.platform == "linux" and hasattr(os, "RWF_NOWAIT")
CACHESTAT = 451  # the number of its call that counts cached pages, from Linux 6.5 on


Later = Callable[[Callable[[], object]], object]  # has a call made later: one after another, in the order given


class Reader(Protocol):
    """What gives bytes of an opened file."""

    def read_some(self, target: memoryview, begin: int) -> int:
        """Some of the bytes from `begin` on; 0 at the end."""
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

    align = PAGE_BYTES  # of places in the file, and of memory, between which data goes without a copy

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stamp = stamp_of(path)
        self.size, self.changed_ns = self.stamp[:2]
        self.lock = threading.Lock()
        self.digest = hashlib.sha256()
        self.hashed = 0
        self.hashes_reads = False
        self.known: str | None = None  # its hash, where an earlier merge took it

    def read_into(self, target: memoryview, begin: int, what: str, later: Later | None = None) -> None:
        """Fill `target` with the bytes from `begin` on. With `later`, they are hashed by what is given to it."""
        with self._opened() as file:
            done = 0
            while done < len(target):
                count = file.read_some(target[done : done + BLOCK_BYTES], begin + done)
                if not count:
                    raise CheckpointError(f"{self.path}: ends inside {what}; the file was cut while being read")
                done += count
        if self.hashes_reads and self.known is None:
            if later is None:
                self._hash_read(target, begin)
            else:
                later(partial(self._hash_read, target, begin))

    def _hash_read(self, data: memoryview, begin: int) -> None:
        """Hash what was read, if it comes next or little lies between."""
        with self.lock:
            if begin <= self.hashed < begin + len(data):
                self._hash(data[self.hashed - begin :])
            elif self.hashed < begin <= self.hashed + MAX_SKIPPED_BYTES:
                with self._opened() as file:
                    self._catch_up(file, begin)
                self._hash(data)

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
        begin = self.hashed - self.hashed % self.align
        block = memoryview(aligned_block(min(BLOCK_BYTES, max(end - begin, 1))))
        while self.hashed < end:
            count = file.read_some(block[: end - begin], begin)
            if begin + count <= self.hashed:
                raise CheckpointError(f"{self.path}: was cut while being read; download or copy it again")
            self._hash(block[self.hashed - begin : count])
            begin += count - count % self.align

    def keep(self, begin: int, end: int) -> None:
        """These bytes will be read again."""

    def forget(self) -> None:
        """They will not be any more."""

    def _hash(self, data: memoryview) -> None:
        self.digest.update(data)
        self.hashed += len(data)


class _Opened:
    """A file opened to read through the page cache, and past it where that is possible and needed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cached = os.open(path, os.O_RDONLY)
        self.direct: int | None = None
        if DIRECT_READS:  # or a small read would bring megabytes of what follows into the page cache
            os.posix_fadvise(self.cached, 0, 0, os.POSIX_FADV_RANDOM)

    def __enter__(self) -> "_Opened":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.cached)
        if self.direct is not None:
            os.close(self.direct)

    def read_some(self, target: memoryview, begin: int) -> int:
        """Some of the bytes from `begin` on: from the page cache if they are there, else past it; 0 at the end.

        Past it go whole pages of the file, into memory that begins with a page.
        """
        whole = len(target) - len(target) % PAGE_BYTES
        if (
            not DIRECT_READS
            or begin % PAGE_BYTES
            or whole < 16 * PAGE_BYTES
            or cached_share(self.cached, begin, whole) > 0.5
        ):
            return os.preadv(self.cached, [target], begin)
        try:
            return os.preadv(self._past_cache(), [target[:whole]], begin)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return os.preadv(self.cached, [target], begin)  # no O_DIRECT here, or a disk with larger sectors

    def _past_cache(self) -> int:
        if self.direct is None:
            self.direct = os.open(self.path, os.O_RDONLY | os.O_DIRECT)
        return self.direct


def cached_share(descriptor: int, begin: int, count: int) -> float:
    """How much of these bytes of a file the page cache holds; where the system does not tell, all if it has the first of them."""
    span, counts = (ctypes.c_uint64 * 2)(begin, count), (ctypes.c_uint64 * 5)()
    if not ctypes.CDLL(None).syscall(CACHESTAT, descriptor, span, counts, 0):
        return float(counts[0] * mmap.PAGESIZE / count)
    try:  # an older system, or a file of another user
        return float(os.preadv(descriptor, [bytearray(1)], begin, os.RWF_NOWAIT))
    except OSError:  # it is not there, or this cannot be asked
        return 0.0


def aligned_block(n_bytes: int) -> mmap.mmap:
    """Memory aligned to a page, as a disk wants it; private, so that a forked process does not share it."""
    return mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

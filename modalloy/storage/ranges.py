"""The bytes of a file of a store, a block at a time, each asked for once: what is read again soon waits on the disk.

Until a merge's main pass (`hashes_reads`) every block is kept, for what is compared or surveyed is read again; then only
those that verifying reads (`keep`). `forget` removes them, unless `MODALLOY_REMOTE_CACHE=all` keeps all for later merges.
"""

import hashlib
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modalloy.errors import CheckpointError, PassingError
from modalloy.files import cache_folder
from modalloy.storage.remote import BLOCK_BYTES, RemoteFile, Store, cache_errors
from modalloy.storage.source import Source


class RemoteSource(Source):
    """As `Source`, of a file of a store, whose header alone is here."""

    align = 1  # no more is asked for than what is needed

    def __init__(self, path: Path, file: RemoteFile) -> None:
        super().__init__(path)
        self.file = file
        self.size = file.size
        name = hashlib.sha256(f"{file.url} {file.tag}".encode()).hexdigest()
        self.stamp = [file.size, int(name[:15], 16), 0, 0]
        self.blocks = cache_folder() / "blocks" / name[:20]
        self.keeps_all = os.environ.get("MODALLOY_REMOTE_CACHE") == "all"
        self.wanted: set[int] = set()
        self.held: tuple[int, bytes] = (-1, b"")  # the block that was read last
        self.busy = threading.Lock()

    def keep(self, begin: int, end: int) -> None:
        """These bytes will be read again."""
        self.wanted.update(range(begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)))

    def forget(self) -> None:
        """Remove what was kept."""
        if not self.keeps_all:
            shutil.rmtree(self.blocks, ignore_errors=True)

    def sha256(self) -> str:
        """Hash of the whole file, which must be the one that was listed."""
        if self.known is None:
            try:
                found = super().sha256()
                Store(self.file.url).check(self.file)
                if self.file.sha256 not in (None, found):
                    raise CheckpointError(
                        f"{self.file.url}: what came has not the sha256 that the store tells; start again"
                    )
            except CheckpointError as error:
                if not isinstance(error, PassingError):
                    shutil.rmtree(self.blocks, ignore_errors=True)
                raise
            self.known = found
        return self.known

    @contextmanager
    def _opened(self) -> Iterator["RemoteSource"]:
        yield self

    def read_some(self, target: memoryview, begin: int) -> int:
        """Some of the bytes from `begin` on; 0 at the end."""
        if begin >= self.size:
            return 0
        index, skip = divmod(begin, BLOCK_BYTES)
        part = self._block(index)[skip : skip + len(target)]
        target[: len(part)] = part
        return len(part)

    def _block(self, index: int) -> bytes:
        with self.busy:
            if self.held[0] == index:
                return self.held[1]
            path, begin = self.blocks / str(index), index * BLOCK_BYTES
            end = min(self.size, begin + BLOCK_BYTES)
            data = path.read_bytes() if path.is_file() else b""
            if len(data) != end - begin:
                store = Store(self.file.url)
                data = store.fetch(self.file, begin, end)
                if self.keeps_all or not self.hashes_reads or index in self.wanted:
                    if store.scheme == "gs":  # which is asked for no version
                        store.check(self.file)
                    _store(path, data)
            self.held = index, data
            return data


def _store(path: Path, data: bytes) -> None:
    """A block as a file, which is there whole or not at all."""
    partial = path.with_name(f".{path.name}-{os.getpid()}-{threading.get_ident()}")
    with cache_errors():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(data)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

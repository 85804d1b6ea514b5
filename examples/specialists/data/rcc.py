"""Reads Qt binary resource files (.rcc), the archives in which GCompris ships its activities.

Layout, all numbers big-endian: the magic `qres`, version, and the offsets of three parts. *Tree*: fixed-size nodes,
the root first; a folder names its children as a run of nodes, a file the offset of its data. *Names*: length, hash,
UTF-16 text. *Data*: length, then bytes, which may be compressed with zlib (a 4-byte size first) or Zstandard.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import zstandard

_COMPRESSED_ZLIB, _FOLDER, _COMPRESSED_ZSTD = 1, 2, 4


class RccError(ValueError):
    """The content is not a Qt resource file, or is damaged."""


class RccFile:
    """The files of one archive, by their path inside it."""

    def __init__(self, content: bytes) -> None:
        if content[:4] != b"qres":
            raise RccError("no 'qres' header: not a Qt resource file")
        self._content = content
        version, self._tree, self._data, self._names = self._unpack(">4I", 4)
        self._node_bytes = 22 if version >= 2 else 14  # version 2 added a modification time
        self._files = dict(self._walk(0, ""))

    def names(self) -> list[str]:
        """Paths of all files, in tree order."""
        return list(self._files)

    def read(self, name: str) -> bytes:
        """A file's content, decompressed. KeyError if there is no such file."""
        node = self._files[name]
        (flags,) = self._unpack(">H", node + 4)
        (offset,) = self._unpack(">I", node + 10)  # after territory and language, 2 bytes each
        start = self._data + offset
        (size_bytes,) = self._unpack(">I", start)
        stored = self._content[start + 4 : start + 4 + size_bytes]
        if len(stored) != size_bytes:
            raise RccError(f"{name}: {size_bytes} bytes expected, {len(stored)} left in the file")
        try:
            if flags & _COMPRESSED_ZLIB:
                return zlib.decompress(stored[4:])
            if flags & _COMPRESSED_ZSTD:
                return zstandard.ZstdDecompressor().decompressobj().decompress(stored)
        except (zlib.error, zstandard.ZstdError) as error:
            raise RccError(f"{name}: {error}") from error
        return stored

    def _walk(self, index: int, path: str) -> Iterator[tuple[str, int]]:
        """(path, offset of the node) of every file below node number `index`."""
        node = self._tree + index * self._node_bytes
        name_offset, flags = self._unpack(">IH", node)
        if index > 0:
            name = self._name(name_offset)
            path = f"{path}/{name}" if path else name
        if not flags & _FOLDER:
            yield path, node
            return
        count, first = self._unpack(">II", node + 6)
        if first <= index and count:
            raise RccError("a folder contains itself")
        for child in range(first, first + count):
            yield from self._walk(child, path)

    def _name(self, offset: int) -> str:
        start = self._names + offset
        (length,) = self._unpack(">H", start)
        return self._content[start + 6 : start + 6 + 2 * length].decode("utf-16-be")

    def _unpack(self, layout: str, offset: int) -> tuple[int, ...]:
        try:
            return struct.unpack_from(layout, self._content, offset)
        except struct.error as error:
            raise RccError(f"the file ends too early: {error}") from error

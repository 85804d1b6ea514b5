"""Whether a PNG holds all the rows that it says: Pillow takes a zlib stream that ends early, and leaves the other rows black.

Format: PNG, third edition (W3C, 2025), sections 5, 7, 8 and 11.
"""

import zlib
from collections.abc import Iterator
from typing import BinaryIO

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
WHOLE = ((0, 0, 1, 1),)
ADAM7 = (  # passes of an interlaced picture: first column and row, steps
    *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)),
    *((0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)),
)
PIECE = 1 << 20  # bytes that are unpacked at once


class Rows:
    """The rows of one picture, counted as its data comes."""

    def __init__(self, width: int, height: int, bits: int, passes: tuple[tuple[int, int, int, int], ...]) -> None:
        sizes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in passes]
        # each row begins with a byte that names its filter; a pass without columns has no rows
        self.missing = sum(rows * (1 + (columns * bits + 7) // 8) for columns, rows in sizes if columns > 0 < rows)
        self._stream = zlib.decompressobj()

    def take(self, data: bytes) -> None:
        """Count what a chunk holds, no more than is missing."""
        while data and self.missing > 0 and not self._stream.eof:
            self.missing -= len(self._stream.decompress(data, min(self.missing, PIECE)))
            data = self._stream.unconsumed_tail


def check_rows(file: BinaryIO) -> None:
    """Refuse a PNG, or a frame of one, whose data ends before its last row.

    Raises:
        ValueError: says which. Any other damage is left to the decoder, which tells it.
    """
    file.seek(8)
    canvas: list[int] = []  # depth in bits, passes
    rows, begun, frame = Rows(0, 0, 0, WHOLE), False, 0
    try:
        for kind, data in _chunks(file):
            if kind == b"IHDR" and len(data) == 13:
                canvas = [data[8] * CHANNELS.get(data[9], 0), data[12]]
                rows = _rows(data, *canvas)
            elif kind == b"fcTL" and len(data) == 26 and begun:  # of a further frame
                _refuse_missing(rows, frame)
                rows, begun, frame = _rows(data[4:], *canvas), False, frame + 1
            elif kind in (b"IDAT", b"fdAT") and canvas:
                rows.take(data if kind == b"IDAT" else data[4:])
                begun = True
    except zlib.error:
        return
    if begun:
        _refuse_missing(rows, frame)


def _rows(size: bytes, bits: int, interlaced: int) -> Rows:
    """Rows of a picture whose width and height begin `size`."""
    width, height = int.from_bytes(size[:4], "big"), int.from_bytes(size[4:8], "big")
    return Rows(width, height, bits, ADAM7 if interlaced else WHOLE)


def _refuse_missing(rows: Rows, frame: int) -> None:
    if rows.missing > 0:
        what = f"the data of its frame {frame + 1}" if frame else "its data"
        raise ValueError(f"{what} ends before the last row")


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Name and data of every chunk that is whole."""
    while len(head := file.read(8)) == 8:
        length = int.from_bytes(head[:4], "big")
        data = file.read(length)
        if len(data) < length or len(file.read(4)) < 4:
            return
        yield head[4:], data

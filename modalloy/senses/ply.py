"""Reading the vertices of .ply files (ASCII, binary in either byte order) into arrays.

Format: Greg Turk, "The PLY Polygon File Format", 1994. An own reader, since the size is known and checked before any data is read.
"""

import os
import warnings
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

BYTE_ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
TYPES = {
    **{"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"},
    **{"int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4"},
    **{"float": "f4", "double": "f8", "float32": "f4", "float64": "f8"},
}
LIST = "list"  # the type of a property that holds several values
MAX_LINE_BYTES = 1 << 16
MAX_HEADER_BYTES = 1 << 20


class Element(NamedTuple):
    """One kind of record: its name, how many there are, and the type of each property."""

    name: str
    length: int
    properties: dict[str, str]

    @property
    def has_lists(self) -> bool:
        """Whether its records differ in size."""
        return LIST in self.properties.values()


class PlyFile:
    """One .ply file, open for reading; what is read at first is the header only. Whatever is wrong with it is a ValueError."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.byte_order, elements = _read_header(file)
        self.data_begin = file.tell()
        names = [element.name for element in elements]
        if names.count("vertex") != 1:
            listed = ", ".join(names)[:100] or "none"
            raise ValueError(f"its elements are {listed}; write the points as one element 'vertex'")
        index = names.index("vertex")
        self.before, self.vertices = elements[:index], elements[index]
        if self.vertices.has_lists:
            raise ValueError("its vertices have properties that are lists; leave those out")

    def read(self, *names: str) -> dict[str, np.ndarray]:
        """These properties of the vertices: name → (vertices,), in the type that the header declares."""
        self.file.seek(self.data_begin)
        return self._read_binary(names) if self.byte_order else self._read_ascii(names)

    def _read_binary(self, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        begin = self.data_begin
        for element in self.before:
            if element.has_lists:
                raise ValueError(
                    f"its element '{element.name}', of varying size, comes first; write the vertices first"
                )
            begin += element.length * sum(np.dtype(kind).itemsize for kind in element.properties.values())
        record = np.dtype([(name, self.byte_order + kind) for name, kind in self.vertices.properties.items()])
        if os.fstat(self.file.fileno()).st_size < begin + self.vertices.length * record.itemsize:
            raise ValueError(f"it ends before the last of its {self.vertices.length:,} points; copy or export it again")
        records = np.memmap(self.file, record, "r", begin, (self.vertices.length,))
        return {name: np.array(records[name]) for name in names}

    def _read_ascii(self, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        for _ in range(sum(element.length for element in self.before)):  # a line each
            if not self.file.readline(MAX_LINE_BYTES):
                raise ValueError("it ends before its vertices; copy or export it again")
        kinds = self.vertices.properties
        columns = [list(kinds).index(name) for name in names]
        with warnings.catch_warnings():  # of blank lines, and of too few, which are found below
            warnings.simplefilter("ignore")
            rows = np.loadtxt(
                self._lines(len(kinds)), comments=None, max_rows=self.vertices.length, ndmin=2, usecols=columns
            )
        expected = (self.vertices.length, len(names))
        if rows.shape != expected:
            raise ValueError(f"its vertices are {rows.shape} numbers, not {expected}; copy or export it again")
        return {name: _cast(rows[:, index], name, kinds[name]) for index, name in enumerate(names)}

    def _lines(self, n_values: int) -> Iterator[str]:
        """The lines of the vertices, each of as many values as the header says."""
        while line := self.file.readline(MAX_LINE_BYTES):
            values = len(line.split())
            if values not in (0, n_values):
                raise ValueError(f"a vertex has {values} values, not {n_values}; copy or export it again")
            yield line.decode("latin-1")


def _cast(values: np.ndarray, name: str, kind: str) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        cast = values.astype(kind)
    if cast.dtype.kind in "iu" and not (cast == values).all():
        raise ValueError(f"its property {name} holds other values than {cast.dtype}; export it again")
    return cast


def _read_header(file: BinaryIO) -> tuple[str, list[Element]]:
    """The byte order ("" if ASCII), and the elements in the order of the data, where the file then stands."""
    if file.readline(MAX_LINE_BYTES).strip() != b"ply":
        raise ValueError("it does not begin with 'ply'; export it again")
    order, elements = None, list[Element]()
    while file.tell() < MAX_HEADER_BYTES:
        line = file.readline(MAX_LINE_BYTES)
        match line.decode("ascii", "replace").split():
            case ["end_header"] if order is not None:
                return order, elements
            case ["comment" | "obj_info", *_]:
                pass
            case ["format", name, "1.0"] if name in BYTE_ORDERS:
                order = BYTE_ORDERS[name]
            case ["element", name, length] if length.isdecimal():
                elements.append(Element(name, int(length), {}))
            case ["property", "list", _, _, name] if elements and name not in elements[-1].properties:
                elements[-1].properties[name] = LIST
            case ["property", kind, name] if elements and kind in TYPES and name not in elements[-1].properties:
                elements[-1].properties[name] = TYPES[kind]
            case _:
                raise ValueError(f"its header is damaged at {line[:60]!r}; export it again")
    raise ValueError(f"its header is longer than {MAX_HEADER_BYTES:,} bytes; export it again")

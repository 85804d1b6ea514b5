"""Point clouds from .npy, .npz and .ply files, told apart by content; nothing is unpickled.

What is wrong with a file is a ValueError inside this module, and one MediaError outside.
"""

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from modalloy.errors import MediaError, plain
from modalloy.senses.media import limits
from modalloy.senses.media.limits import DAMAGE, opened, reason
from modalloy.senses.ply import PlyFile

NPZ_POINTS, NPZ_COLOURS = ("points", "xyz"), ("colors", "rgb")
PLY_COLOURS = (("red", "green", "blue"), ("diffuse_red", "diffuse_green", "diffuse_blue"), ("r", "g", "b"))
# a zip file's directory: how it ends (its size stands there), where that of a very large file is named, its largest size
ZIP_END, ZIP_END_BYTES, ZIP_LARGE, MAX_DIRECTORY_BYTES = b"PK\5\6", 22, b"PK\6\7", 1 << 16
Cloud = tuple[np.ndarray, np.ndarray | None]  # x, y, z; and red, green, blue


def read_points(path: str | Path) -> np.ndarray:
    """Point cloud as float32 (points, 3) or (points, 6): see `modalloy.senses.media.load_points`."""
    with opened(path) as file:
        begin = file.read(6)
        read = next((reader for magic, reader in READERS.items() if begin.startswith(magic)), None)
        if read is None:
            raise MediaError(
                f"{plain(path)}: not a kind of point cloud that is read; give a .npy, .npz or .ply file, not {begin!r} …"
            )
        size = file.seek(0, 2)
        file.seek(0)
        try:
            _check_size(size)
            return _joined(*read(file))
        except (ValueError, OSError, MemoryError) as error:
            raise MediaError(f"{plain(path)}: not a usable point cloud: {reason(error)}") from error


def check_points(points: np.ndarray) -> np.ndarray:
    """A point cloud in memory, (points, 3) or (points, 6), as `load_points` would read it from a .npy file."""
    try:
        return _joined(*_columns(points))
    except ValueError as error:
        raise MediaError(f"not a usable point cloud: {error}") from error


@contextmanager
def _decoder() -> Iterator[None]:
    """Around the calls of NumPy's and Python's own readers."""
    try:
        yield
    except DAMAGE as error:
        raise ValueError(f"{reason(error)}; export it again") from error


@np.errstate(over="ignore", invalid="ignore")  # what float32 cannot hold becomes infinite, and is refused
def _joined(xyz: np.ndarray, colours: np.ndarray | None) -> np.ndarray:
    if xyz.ndim != 2 or xyz.shape[1] != 3:
        raise ValueError(f"its points have the shape {xyz.shape}; give (points, 3)")
    _check_count(len(xyz))
    if colours is not None and colours.shape != xyz.shape:
        raise ValueError(f"its points are {xyz.shape}, its colours {colours.shape}; give one red, green, blue a point")
    parts = [xyz] if colours is None else [xyz, colours]
    if odd := [part.dtype for part in parts if part.dtype.kind not in "iuf"]:
        raise ValueError(f"it holds values of type {odd[0]}; store them as floating point or whole numbers")
    cloud = np.empty((len(xyz), 3 * len(parts)), np.float32)
    for index, part in enumerate(parts):
        cloud[:, 3 * index : 3 * index + 3] = part
    if not np.isfinite(cloud).all():
        raise ValueError("it holds NaN or infinite values; remove these points")
    if colours is not None:
        _scale(cloud[:, 3:], whole=colours.dtype.kind in "iu")
    return cloud


def _scale(colours: np.ndarray, whole: bool) -> None:
    """Bring colours to 0..1, past it only by rounding. A largest value between 1 and 2 fits neither scale."""
    low, high = colours.min(), colours.max()
    if whole or high >= 2:
        colours /= 255
    if colours.min() < -1e-3 or colours.max() > 1 + 1e-3:
        raise ValueError(f"its colours run from {low:.4g} to {high:.4g}; scale them to 0..1 or to 0..255")


def _check_count(count: int) -> None:
    if count == 0:
        raise ValueError("it has no points; give a cloud that is not empty")
    if count > limits.MAX_POINTS:
        raise ValueError(f"it has {count:,} points, at most {limits.MAX_POINTS:,} are read; give a thinner cloud")


def _check_size(size: int) -> None:
    if size > limits.MAX_POINT_FILE_BYTES:
        raise ValueError(
            f"it has {size:,} bytes, at most {limits.MAX_POINT_FILE_BYTES:,} are read; give a thinner cloud"
        )


def _columns(points: np.ndarray) -> Cloud:
    if points.ndim != 2 or points.shape[1] not in (3, 6):
        raise ValueError(f"its shape is {points.shape}; give (points, 3) or (points, 6): x, y, z, red, green, blue")
    return points[:, :3], points[:, 3:] if points.shape[1] == 6 else None


def _array_header(file: IO[bytes], size: int) -> dict[str, Any]:
    """Shape, order and type of the array whose .npy file begins here, held against the `size` of what is there."""
    with _decoder():
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        shape, fortran, dtype = read(file) if read else ((), False, np.dtype("V"))
    if read is None:
        raise ValueError(f"its format is {version}; save it with a field-less type")
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not unpickled; store numbers")
    if math.prod(shape) * dtype.itemsize > size:
        raise ValueError(f"its {shape} values of type {dtype} are more than its {size:,} bytes; export it again")
    return {"shape": shape, "order": "F" if fortran else "C", "dtype": dtype}


def _npy(file: BinaryIO) -> Cloud:
    size = file.seek(0, 2)
    file.seek(0)
    header = _array_header(file, size)
    if not math.prod(header["shape"]):  # which cannot be mapped
        return _columns(np.empty(header["shape"]))
    with _decoder():
        mapped = np.memmap(file, mode="r", offset=file.tell(), **header)
    return _columns(mapped)


def _npz(file: BinaryIO) -> Cloud:
    _check_directory(file)
    arrays = {}
    with _decoder():
        archive = zipfile.ZipFile(file)
    with archive:
        entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
        _check_size(sum(entry.file_size for entry in entries.values()))
        names = sorted(entries)
        for name in names if len(names) < 3 else ():
            if entries[name].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError("it is packed in another way than NumPy's; save it with np.savez_compressed")
            with _decoder(), archive.open(entries[name]) as member:
                _array_header(member, entries[name].file_size)
            with _decoder(), archive.open(entries[name]) as member:
                arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
    if len(arrays) == 1:
        return _columns(arrays.popitem()[1])
    xyz = [name for name in names if name in NPZ_POINTS]
    colours = [name for name in names if name in NPZ_COLOURS]
    if len(names) != 2 or not len(xyz) == len(colours) == 1:
        listed = ", ".join(names) or "none"
        raise ValueError(f"its arrays are: {plain(listed)}; keep one, or points (or xyz) with colors (or rgb)")
    return arrays[xyz[0]], arrays[colours[0]]


def _check_directory(file: BinaryIO) -> None:
    """Refuse a directory that lists very many files, before it is read."""
    file.seek(max(0, file.seek(0, 2) - ZIP_END_BYTES - (1 << 16)))
    tail = file.read()
    file.seek(0)
    end = tail.rfind(ZIP_END)
    size = int.from_bytes(tail[end + 12 : end + 16], "little")
    if end < 0 or size > MAX_DIRECTORY_BYTES or tail[max(0, end - 20) : end].startswith(ZIP_LARGE):
        raise ValueError("its directory is damaged, or lists too many files; keep one or two arrays")


@np.errstate(invalid="ignore")
def _ply(file: BinaryIO) -> Cloud:
    ply = PlyFile(file)
    _check_count(ply.vertices.length)
    names = ply.vertices.properties
    colours = next((triple for triple in PLY_COLOURS if names.keys() & set(triple)), ())
    if missing := [name for name in (*"xyz", *colours) if name not in names]:
        raise ValueError(
            f"its vertices have {plain(', '.join(names)) or 'nothing'}, but no {missing[0]}; export it again"
        )
    values = ply.read(*"xyz", *colours)
    return np.stack([values[name] for name in "xyz"], 1), np.stack([values[c] for c in colours], 1) if colours else None


READERS = {b"\x93NUMPY": _npy, b"PK\3\4": _npz, ZIP_END: _npz, b"ply\n": _ply, b"ply\r": _ply, b"ply ": _ply}

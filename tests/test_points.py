"""Reading point clouds: the same numbers from every format, and what is refused."""

import itertools
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from modalloy.errors import MediaError
from modalloy.senses.media import limits, load_points

XYZ = np.array([[0.5, -1.25, 3.0], [1e-3, 0.0, -7.5], [2.0, 4.0, 8.0]], np.float32)
RGB = np.array([[0, 128, 255], [1, 2, 3], [255, 255, 0]], np.uint8)
CLOUD = np.concatenate([XYZ, RGB / np.float32(255)], 1)
HEADER = """ply
format {form} 1.0
comment made by hand
obj_info nothing
{before}element vertex 3
property float x
property float y
property double z
property float nx
property uchar red
property uchar green
property uchar blue
property uchar alpha
element face 1
property list uchar int vertex_indices
end_header
"""


def ply(form: str, *, before: str = "", data_before: bytes = b"") -> bytes:
    rows = [(*xyz, 9.0, *rgb, 7) for xyz, rgb in zip(XYZ.tolist(), RGB.tolist(), strict=True)]
    header = HEADER.format(form=form, before=before).encode()
    if form == "ascii":
        return header + data_before + "".join(" ".join(map(str, row)) + "\n" for row in rows).encode() + b"3 0 1 2\n"
    order = "<" if "little" in form else ">"
    faces = struct.pack(order + "Biii", 3, 0, 1, 2)
    return header + data_before + b"".join(struct.pack(order + "ffdfBBBB", *row) for row in rows) + faces


WRITERS: dict[str, Callable[[Path], object]] = {
    "float32.npy": lambda path: np.save(path, CLOUD),
    "fortran.npy": lambda path: np.save(path, np.asfortranarray(CLOUD.astype(">f8"))),
    "whole.npz": lambda path: np.savez(path, cloud=CLOUD),
    "bytes.npz": lambda path: np.savez(path, points=XYZ, colors=RGB),
    "packed.npz": lambda path: np.savez_compressed(path, xyz=XYZ.astype(float), rgb=RGB.astype(float)),
    "ascii.ply": lambda path: path.write_bytes(ply("ascii")),
    "windows.PLY": lambda path: path.write_bytes(ply("ascii").replace(b"\n", b"\r\n")),
    "little.ply": lambda path: path.write_bytes(ply("binary_little_endian")),
    "big.ply": lambda path: path.write_bytes(ply("binary_big_endian")),
    "later.ply": lambda path: path.write_bytes(
        ply("binary_big_endian", before="element camera 2\nproperty short id\n", data_before=b"\0" * 4)
    ),
    "lists.ply": lambda path: path.write_bytes(
        ply("ascii", before="element edge 2\nproperty list uchar int ends\n", data_before=b"2 0 1\n2 1 2\n")
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_cloud(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    cloud = load_points(tmp_path / name)
    assert cloud.dtype == np.float32 and cloud.flags.c_contiguous
    np.testing.assert_allclose(cloud, CLOUD, rtol=1e-6)


def test_clouds_without_colours_have_three_columns(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", XYZ.astype(int))
    np.savez(tmp_path / "b.npz", positions=XYZ)
    text = (
        "ply\nformat ascii 1.0\nelement vertex 1\nproperty int x\nproperty int z\nproperty int y\nend_header\n1 3 2\n"
    )
    (tmp_path / "c.ply").write_text(text)
    assert np.array_equal(load_points(tmp_path / "a.npy"), np.trunc(XYZ))
    assert np.array_equal(load_points(tmp_path / "b.npz"), XYZ)
    assert np.array_equal(load_points(tmp_path / "c.ply"), [[1, 2, 3]])


@pytest.mark.parametrize(
    ("colours", "expected"),
    [
        (np.float64([0, 0.5, 1]), [0, 0.5, 1]),
        (np.float32([0, 51, 255]), [0, 0.2, 1]),
        (np.int16([0, 0, 1]), [0, 0, 1 / 255]),  # whole numbers are never 0..1
        (np.float32([0, 0, 1.0000001]), [0, 0, 1.0000001]),  # rounding
    ],
)
def test_the_scale_of_colours(colours: np.ndarray, expected: list[float], tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", points=XYZ[:1], colors=colours[None])
    np.testing.assert_allclose(load_points(tmp_path / "a.npz")[0, 3:], np.float32(expected))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((0, 3)), "it has no points"),
        (np.zeros((4, 7)), r"its shape is \(4, 7\); give \(points, 3\)"),
        (np.zeros((2, 4, 3)), r"its shape is \(2, 4, 3\)"),
        (np.float32([[0, 0, np.nan]]), "NaN or infinite"),
        (np.float64([[0, 0, 1e300]]), "NaN or infinite"),
        (np.float32([[0, 0, 0, 0, 0, np.inf]]), "NaN or infinite"),
        (np.float32([[0, 0, 0, 0, 0, 1.5]]), r"colours run from 0 to 1\.5; scale them"),
        (np.float32([[0, 0, 0, 0, -1, 1]]), "colours run from -1 to 1"),
        (np.float32([[0, 0, 0, 0, 0, 65535]]), r"colours run from 0 to 6\.55"),
        (np.array([["a", "b", "c"]]), "values of type <U1"),
        (np.zeros((1, 3), complex), "values of type complex128"),
        (np.array([[print, 1, 2]], object), "not a usable point cloud"),
    ],
)
def test_unusable_arrays_are_refused(array: np.ndarray, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(
        MediaError, match=rf"a\.npy: not a usable point cloud: .*{message}" if message[0] != "n" else message
    ):
        load_points(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"points": XYZ, "label": XYZ}, r"its arrays are: label, points; keep one, or points \(or xyz\) with colors"),
        ({"points": XYZ, "xyz": XYZ}, "its arrays are: points, xyz"),
        ({"points": XYZ, "rgb": RGB, "normals": XYZ}, "its arrays are: normals, points, rgb"),
        ({"points": CLOUD, "rgb": RGB}, r"its points have the shape \(3, 6\)"),
        ({"points": XYZ, "rgb": RGB[:2]}, r"its points are \(3, 3\), its colours \(2, 3\)"),
        ({}, "its arrays are: none"),
    ],
)
def test_unclear_archives_are_refused(arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(MediaError, match=rf"a\.npz: not a usable point cloud: {message}"):
        load_points(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"ply\n", b"ply x\n", "does not begin with 'ply'"),
        (b"1.0\n", b"2.0\n", r"header is damaged at b'format binary_little_endian 2\.0"),
        (b"end_header\n", b"", "header is damaged at"),
        (b"float x", b"half x", "header is damaged at b'property half x"),
        (b"float x", b"float y", "header is damaged at b'property float y"),  # twice
        (b"double z", b"double w", "vertices have x, y, w, .*, but no z"),
        (b"uchar green", b"uchar verde", "but no green"),
        (b"element vertex 3", b"element point 3", "its elements are point, face"),
        (b"element vertex 3", b"element vertex 0", "it has no points"),
        (b"element vertex 3", b"element vertex 4", "ends before the last of its 4 points"),
        (b"element vertex 3", b"element vertex 99999999999", "at most 10,000,000 are read"),
        (
            b"element vertex",
            b"element e 1\nproperty list char int i\nelement vertex",
            "'e', of varying size, comes first",
        ),
        (b"float nx", b"list char int nx", "properties that are lists"),
    ],
)
def test_damaged_plys_are_refused(old: bytes, new: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.ply").write_bytes(ply("binary_little_endian").replace(old, new, 1))
    with pytest.raises(MediaError, match=rf"a\.ply: not a usable point cloud: .*{message}"):
        load_points(tmp_path / "a.ply")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"0.5 ", b"half ", "not a usable point cloud: .*half"),
        (b"0.5 ", b"0.5 1 ", "not a usable point cloud"),
        (b"0.5 ", b"nan ", "NaN or infinite"),
        (b" 128 ", b" 300 ", "green holds other values than uint8"),
        (b" 128 ", b" 0.5 ", "green holds other values than uint8"),
        (b"element vertex 3", b"element vertex 9", r"its vertices are .* numbers, not \(9, 8\)|usable"),
    ],
)
def test_damaged_ascii_plys_are_refused(old: bytes, new: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.ply").write_bytes(ply("ascii").replace(old, new, 1))
    with pytest.raises(MediaError, match=message):
        load_points(tmp_path / "a.ply")


@pytest.mark.parametrize("name", ["fortran.npy", "packed.npz", "ascii.ply", "little.ply"])
def test_damage_anywhere_is_an_error_or_another_cloud(name: str, tmp_path: Path) -> None:
    """Nothing but a MediaError comes out of a file that was cut or has a changed byte."""
    path = tmp_path / name
    WRITERS[name](path)
    whole = path.read_bytes()
    cuts = [whole[:end] for end in range(0, len(whole), 13)]
    changes = [
        whole[:i] + bytes([whole[i] ^ flip]) + whole[i + 1 :]
        for i, flip in itertools.product(range(0, len(whole), 7), (1, 64, 255))
    ]
    refused = 0
    for content in cuts + changes:
        path.write_bytes(content)
        try:
            assert np.isfinite(load_points(path)).all()
        except MediaError as error:
            refused += 1
            assert name in str(error) and "\n" not in str(error)
    assert refused > len(cuts) * 0.8


def test_files_of_other_kinds_and_sizes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.obj").write_text("v 0 0 0")
    (tmp_path / "a.ply").write_text("plx\nformat ascii 1.0\n")
    for name in ("a.obj", "a.ply"):
        with pytest.raises(
            MediaError, match=rf"{name}: not a kind of point cloud that is read; give a \.npy, \.npz or \.ply"
        ):
            load_points(tmp_path / name)
    with pytest.raises(MediaError, match=r"b\.ply: no such file"):
        load_points(tmp_path / "b.ply")
    np.savez_compressed(tmp_path / "a.npz", points=np.zeros((1000, 3)))
    np.save(tmp_path / "a.npy", np.zeros((1000, 3)))
    monkeypatch.setattr(limits, "MAX_POINTS", 999)
    with pytest.raises(MediaError, match=r"1,000 points, at most 999"):
        load_points(tmp_path / "a.npy")
    monkeypatch.setattr(limits, "MAX_POINT_FILE_BYTES", 20_000)
    for name in ("a.npy", "a.npz"):
        with pytest.raises(MediaError, match=r"it has 24,\d+ bytes, at most 20,000"):
            load_points(tmp_path / name)

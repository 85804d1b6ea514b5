"""The data builder of the example specialists: mesh readers, Qt resources, the tables, downloads. No network."""

import hashlib
import importlib
import io
import json
import re
import struct
import sys
import zipfile
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

DATA = Path(__file__).resolve().parents[1] / "examples" / "specialists" / "data"
NEEDS = {
    "meshes": (),
    "rcc": ("zstandard",),
    "tables": ("yaml",),
    "fetch": ("zstandard", "yaml"),
    "footage": ("PIL", "resvg_py", "scipy", "soundfile", "tinysoundfont"),
    "build": ("zstandard", "yaml", "scipy", "soundfile", "PIL", "resvg_py", "tinysoundfont"),
}


def load(name: str) -> ModuleType:
    """A module of the builder, which is a script and not an installed package."""
    for dependency in NEEDS[name]:
        pytest.importorskip(dependency)
    sys.path.insert(0, str(DATA))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(DATA))


# A unit square in the plane z = 0, as two triangles, in every format.
SQUARE = [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]]
FAN = [[0, 1, 2], [0, 2, 3]]

OBJ = "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nf 1/1/1 2//2 -2 4\n"

MS3D = """// MilkShape 3D ASCII
Meshes: 1
"square" 0 -1
4
0 0 0 0 0 0 -1
0 1 0 0 0 0 -1
0 1 1 0 0 0 -1
0 0 1 0 0 0 -1
1
0 0 1
2
0 0 1 2 0 0 0 1
0 0 2 3 0 0 0 1
"""

AC3D = """AC3Db
MATERIAL "white" rgb 1 1 1
OBJECT world
loc 10 0 0
kids 1
OBJECT poly
name "square"
data 5
a
b c
loc -10 0 0
numvert 4
0 0 0
1 0 0
1 1 0
0 1 0
numsurf 1
SURF 0x0
mat 0
refs 4
0 0 0
1 0 0
2 0 0
3 0 0
kids 0
"""

V3D = """begin_header
 creator someone 1 2 3
end_header
begin_model standard square
translate 1 2 3
untranslate
translate 0.5 0 0
begin_quads
 normal 0 0 1
 -0.5 0 0
 0.5 0 0
 0.5 1 0
 -0.5 1 0
end_quads
end_model standard
"""

COLLADA = """<?xml version="1.0"?>
<COLLADA xmlns="http://www.collada.org/2005/11/COLLADASchema" version="1.4.1">
 <asset><up_axis>Y_UP</up_axis></asset>
 <library_geometries><geometry id="g"><mesh>
  <source id="s"><float_array count="12">0 0 0  2 0 0  2 2 0  0 2 0</float_array>
   <technique_common><accessor source="#a" count="4" stride="3"/></technique_common></source>
  <vertices id="v"><input semantic="POSITION" source="#s"/></vertices>
  <polylist count="1"><input semantic="NORMAL" source="#n" offset="0"/><input semantic="VERTEX" source="#v" offset="1"/>
   <vcount>4</vcount><p>0 0 0 1 0 2 0 3</p></polylist>
 </mesh></geometry></library_geometries>
 <library_visual_scenes><visual_scene id="scene"><node><translate>1 0 0</translate>
  <node><matrix>1 0 0 -1 0 1 0 0 0 0 1 0 0 0 0 1</matrix><scale>0.5 0.5 0.5</scale><instance_geometry url="#g"/></node>
 </node></visual_scene></library_visual_scenes>
 <scene><instance_visual_scene url="#scene"/></scene>
</COLLADA>"""


def pmd(version: int) -> bytes:
    texture_sets = 2 if version >= 4 else 1
    rows = b"".join(struct.pack("<3f", *corner) + bytes(12 + 8 * texture_sets + 20) for corner in SQUARE)
    head = struct.pack("<4sIII", b"PSMD", version, 0, 4) + (struct.pack("<I", 2) if version >= 4 else b"")
    return head + rows + struct.pack("<I6H", 2, *np.ravel(FAN))


@pytest.mark.parametrize(
    ("reader", "content"),
    [
        ("read_obj", OBJ),
        ("read_ms3d_ascii", MS3D),
        ("read_ac3d", AC3D),
        ("read_v3d", V3D),
        ("read_collada", COLLADA),
        ("read_pmd", pmd(3)),
        ("read_pmd", pmd(4)),
    ],
)
def test_every_reader_finds_the_same_square(reader: str, content: str | bytes) -> None:
    mesh = getattr(load("meshes"), reader)(content)
    np.testing.assert_allclose(mesh.vertices, SQUARE)
    np.testing.assert_array_equal(mesh.faces, FAN)


def test_a_z_up_collada_file_is_turned() -> None:
    mesh = load("meshes").read_collada(COLLADA.replace("Y_UP", "Z_UP"))
    np.testing.assert_allclose(mesh.vertices, [[x, 0, -y] for x, y, _ in SQUARE])


@pytest.mark.parametrize(
    ("reader", "content", "message"),
    [
        ("read_obj", "v 0 0 0\n", "no triangles"),
        ("read_obj", "v 0 0 0\nf 1 2 3\n", "do not fit"),
        ("read_obj", "v 0 zero 0\n", "expected numbers"),
        ("read_ms3d_ascii", MS3D[:80], "ends too early"),
        ("read_ac3d", "OBJECT world\n", "AC3D"),
        ("read_ac3d", AC3D.removesuffix("kids 0\n"), "ends too early"),
        ("read_pmd", pmd(3)[:60], "ends too early"),
        ("read_collada", "<COLLADA/>", "no visual scene"),
        ("read_collada", COLLADA.replace('url="#g"', 'url="#h"'), "refers to 'h'"),
    ],
)
def test_a_damaged_mesh_is_refused(reader: str, content: str | bytes, message: str) -> None:
    meshes = load("meshes")
    with pytest.raises(meshes.MeshError, match=message):
        getattr(meshes, reader)(content)


def test_sampled_points_are_centred_in_the_unit_sphere_and_repeatable() -> None:
    meshes = load("meshes")
    mesh = meshes.make_mesh(SQUARE, FAN)
    points = meshes.sample_points(mesh, 2000)
    assert points.shape == (2000, 3)
    np.testing.assert_allclose(points.mean(axis=0), 0, atol=1e-6)
    assert np.linalg.norm(points, axis=1).max() == pytest.approx(1)
    upper = (points[:, 0] > points[:, 1]).mean()  # the two triangles have the same area
    assert upper == pytest.approx(0.5, abs=0.05)
    np.testing.assert_array_equal(points, meshes.sample_points(mesh, 2000))
    assert not np.array_equal(points, meshes.sample_points(mesh, 2000, seed=1))


def qt_resources(files: list[tuple[str, int, bytes]]) -> bytes:
    """A version 2 resource file with one folder `a` that holds (name, flags, stored bytes)."""
    names, offsets = b"", []
    for name in ["a", *(name for name, _, _ in files)]:
        offsets.append(len(names))
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
    data, nodes = b"", struct.pack(">IHIIQ", 0, 2, 1, 1, 0) + struct.pack(">IHIIQ", 0, 2, len(files), 2, 0)
    for offset, (_, flags, stored) in zip(offsets[1:], files, strict=True):
        nodes += struct.pack(">IHHHIQ", offset, flags, 0, 0, len(data), 0)
        data += struct.pack(">I", len(stored)) + stored
    return b"qres" + struct.pack(">4I", 2, 20, 20 + len(nodes), 20 + len(nodes) + len(data)) + nodes + data + names


def test_qt_resources_plain_and_compressed() -> None:
    rcc = load("rcc")
    text = b"moo " * 50
    packed = __import__("zstandard").ZstdCompressor().compress(text)
    content = qt_resources(
        [
            ("plain.txt", 0, text),
            ("zlib.txt", 1, struct.pack(">I", len(text)) + zlib.compress(text)),
            ("z.txt", 4, packed),
        ]
    )
    archive = rcc.RccFile(content)
    assert archive.names() == ["a/plain.txt", "a/zlib.txt", "a/z.txt"]
    assert all(archive.read(name) == text for name in archive.names())
    with pytest.raises(rcc.RccError, match="qres"):
        rcc.RccFile(b"PK" + content)
    with pytest.raises(rcc.RccError, match="too early"):
        rcc.RccFile(content[:30])


def test_every_source_is_pinned_and_licensed() -> None:
    tables = load("tables")
    sources = tables.load_sources(DATA / "packages.yaml")
    entries, gaps = tables.load_entries(DATA / "concepts.yaml", sources)
    licences = (DATA / "LICENSES.md").read_text(encoding="utf-8")
    assert len({entry.file for entry in entries}) == len(entries) > 800
    assert len({entry.concept for entry in entries}) == 114
    assert {entry.modality for entry in entries} == set(tables.MODALITIES)
    assert set(gaps) <= {entry.spec for entry in entries}
    assert {entry.source.prefix for entry in entries} == set(sources)
    for entry in entries:
        assert entry.source.licence(entry.path) in licences
        assert entry.location.member
    for source in sources.values():
        for package in source.packages:
            assert re.fullmatch(r"[0-9a-f]{64}", package.sha256)
            assert package.version and package.licence and package.takes and package.bytes > 0
            assert package.version in licences
    written = "".join((DATA / name).read_text(encoding="utf-8") for name in ("packages.yaml", "concepts.yaml"))
    assert "://" not in written  # packages are named, never addressed


def test_a_source_of_an_unknown_prefix_is_refused(tmp_path: Path) -> None:
    tables = load("tables")
    table = tmp_path / "concepts.yaml"
    table.write_text("concepts: {dog: {category: animal, image: {0: 'zoo:dog.png'}}}")
    with pytest.raises(tables.DataError, match=r"'zoo:dog\.png' is none of tux"):
        tables.load_entries(table, tables.load_sources(DATA / "packages.yaml"))


def toy_package(tables: ModuleType, folder: Path, files: dict[str, bytes]) -> tuple[Any, Path]:
    """A pinned PyPI package whose wheel holds the files, and the wheel."""
    wheel = folder / "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return tables.Package("toy", "pypi", "1.0", wheel.stat().st_size, sha256, "CC0-1.0", "toys"), wheel


def use_client(fetch: ModuleType, monkeypatch: pytest.MonkeyPatch, wheel: Path) -> None:
    """Lets the downloads be done by a command that copies the wheel."""
    copy = "import shutil, sys; shutil.copy(sys.argv[1], '.')"
    monkeypatch.setattr(fetch, "client_command", lambda package: [sys.executable, "-c", copy, str(wheel)])


def test_a_download_with_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch, tables = load("fetch"), load("tables")
    package, wheel = toy_package(tables, tmp_path, {"a.txt": b"a"})
    use_client(fetch, monkeypatch, wheel)
    wheel.write_bytes(wheel.read_bytes() + b"!")
    with pytest.raises(tables.DataError, match=f"packages.yaml pins {package.sha256}") as refused:
        fetch.provide(package, {tables.Location("a.txt", None)}, tmp_path / "cache", False, print)
    assert "\n" not in str(refused.value)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_files_are_taken_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch, tables = load("fetch"), load("tables")
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("b/c.txt", b"c")
    package, wheel = toy_package(tables, tmp_path, {"a.txt": b"a", "b.zip": inner.getvalue(), "big.txt": b"unused"})
    use_client(fetch, monkeypatch, wheel)
    wanted = {tables.Location(*place) for place in [("a.txt", None), ("b.zip", "b/c.txt"), ("absent", None)]}
    reports: list[str] = []
    for _ in range(2):
        paths = fetch.provide(package, wanted, tmp_path / "cache", False, reports.append)
        assert {key: path.read_bytes() for key, path in paths.items()} == {"a.txt": b"a", "b.zip!b/c.txt": b"c"}
    assert [line.split()[0] for line in reports] == ["download", "unpack"]
    paths["a.txt"].write_bytes(b"changed")  # a damaged cache is noticed and filled again
    assert fetch.provide(package, wanted, tmp_path / "cache", False, print)["a.txt"].read_bytes() == b"a"


def test_a_file_that_cannot_be_built_fails_unless_it_is_a_known_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build, tables, fetch = load("build"), load("tables"), load("fetch")
    package, wheel = toy_package(tables, tmp_path, {"good.obj": OBJ.encode(), "bad.obj": b"v 0 0 0"})
    use_client(fetch, monkeypatch, wheel)
    source = tables.Source("t", (package,), "{path}", None, package.label, (), ())
    names = ["good.obj", "bad.obj", "absent.obj"]
    entries = [tables.Entry(f"pointcloud/x/{n}.npy", "x", "toy", "pointcloud", source, n) for n in names]
    monkeypatch.setattr(build, "load_sources", lambda path: {"t": source})
    gaps: dict[str, str] = {}
    monkeypatch.setattr(build, "load_entries", lambda path, sources: (entries, gaps))
    arguments = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]

    assert build.main(arguments) == 2
    said = capsys.readouterr().err
    assert "t:bad.obj: no triangles" in said and "t:absent.obj: no such file in toy 1.0 (PyPI)" in said
    assert "error: 2 files could not be built" in said
    assert not (tmp_path / "out").exists()

    gaps.update({"t:bad.obj": "empty mesh", "t:absent.obj": "never made"})
    assert build.main(arguments) == 0
    (record,) = json.loads((tmp_path / "out" / "manifest.json").read_text())
    points = tmp_path / "out" / record["file"]
    assert record["sha256"] == hashlib.sha256(points.read_bytes()).hexdigest()
    assert np.load(points).shape == (2048, 3) and np.load(points).dtype == np.float16
    assert (record["source"], record["package"], record["licence"]) == ("t:good.obj", "toy 1.0 (PyPI)", "CC0-1.0")

    assert build.main(arguments) == 0
    assert "1 taken over" in capsys.readouterr().err
    assert build.main([*arguments, "--only", "image"]) == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == [record]
    assert build.main([*arguments, "--only", "smell"]) == 2
    assert "'smell' is none of image, audio, video, pointcloud" in capsys.readouterr().err


@pytest.mark.parametrize("manifest", [None, "[]", '[{"file": "image/0.webp"}]'])
def test_a_folder_with_other_files_is_left_alone(
    manifest: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    assert load("build").main(["--out", str(tmp_path), "--cache", str(tmp_path / "cache")]) == 2
    assert "holds other files" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_videos_are_made_of_training_and_new_source_media_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    footage = load("footage")
    from PIL import Image

    rows = []
    for name, source in (("om_0", "om:1.svg"), ("f3_1", "f3:1.webp"), ("a4a_2", "a4a:1.jpg"), ("tux_3", "tux:1.png")):
        rows.append({"file": f"image/owl/{name}.webp", "source": source, "modality": "image", "licence": name})
    rows.append({"file": "pointcloud/owl/0ad_0.npy", "source": "0ad:1.pmd", "modality": "pointcloud", "licence": "0ad"})
    for row in rows:
        row |= {"concept": "owl", "category": "animal", "package": row["source"]}
        file = tmp_path / row["file"]
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").save(file.with_suffix(".webp"))
    np.save(tmp_path / "pointcloud/owl/0ad_0.npy", np.random.default_rng(0).normal(size=(50, 3)))
    (tmp_path / "manifest.json").write_text(json.dumps(rows))
    monkeypatch.setattr(sys, "argv", ["footage.py", "--data", str(tmp_path)])
    footage.main()
    made = json.loads((tmp_path / "manifest.json").read_text())[len(rows) :]
    names = [Path(row["file"]).name for row in made]  # the animations of f3's artwork are there already
    assert names == ["moving-a4a_2.webp", "moving-om_0.webp", "moving-tux_3.webp", "turning-0ad_0.webp"]
    assert [row["source"] for row in made] == [
        "moving:a4a:1.jpg",
        "moving:om:1.svg",
        "moving:tux:1.png",
        "turning:0ad:1.pmd",
    ]
    assert [row["licence"] for row in made] == ["a4a_2", "om_0", "tux_3", "0ad"]
    for row in made:
        content = (tmp_path / row["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == row["sha256"]
        with Image.open(tmp_path / row["file"]) as video:
            assert video.size == (128, 128) and 12 <= video.n_frames <= 16  # WebP joins equal frames
    footage.main()
    assert len(json.loads((tmp_path / "manifest.json").read_text())) == len(rows) + len(made)

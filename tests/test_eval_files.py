"""Evaluation reads the files of the data's folder and media roots only, and what is made of a run shows no others."""

import base64
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_run import benchmark, question, write_run
from PIL import Image

from modalloy.errors import MediaError, ModalloyError
from modalloy.evals import BENCHMARKS, markdown, ocrbench, senses
from modalloy.evals import page as evals
from modalloy.evals.benchmark import Source
from modalloy.evals.doctor import doctor
from modalloy.evals.files import leads_out
from modalloy.evals.log import load_run
from modalloy.evals.scores import result
from modalloy.report.escape import csv_cell, fence, markdown_code, markdown_text
from modalloy.search.probes import read_probes


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BENCHMARKS, "fake", benchmark())
    monkeypatch.setattr("os.fsync", lambda file: None)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder beside a private one, with ways that lead there."""
    folder, private = tmp_path / "data", tmp_path / "private"
    for one in (folder, private):
        one.mkdir()
        Image.new("RGB", (4, 4)).save(one / "own.png")
    (private / "key.png").write_text("-----BEGIN PRIVATE KEY-----")
    (folder / "link.png").symlink_to(private / "own.png")
    (folder / "away").symlink_to(private)
    (folder / "inner.png").symlink_to("own.png")
    return folder


def ways_out(data: Path) -> list[str]:
    private = data.parent / "private"
    inside = (str(data / "link.png"), str(data / "away" / "own.png"), str(data / ".." / "private" / "own.png"))
    return [*inside, str(private / "own.png"), str(private / "key.png"), f"{data}-other/own.png"]


def test_ways_out_are_told_from_ways_inside(data: Path) -> None:
    source = Source(data)
    assert all(leads_out(path, source.folders) for path in ways_out(data))
    for name in ("own.png", "inner.png", "none.png", "away/../own.png"):
        assert not leads_out(source.medium(name), source.folders) or name == "away/../own.png"
    assert leads_out("a\0b", source.folders)
    rooted = Source(data, {"private": data.parent / "private"})
    assert not any(leads_out(path, rooted.folders) for path in ways_out(data)[:5])


def test_a_data_folder_of_the_hub_s_cache_reaches_its_blobs(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "datasets--a--b" / "snapshots" / "c0ffee", tmp_path / "datasets--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1").write_text("[]")
    (snapshot / "a.json").symlink_to("../../blobs/1")
    source = Source(snapshot)
    assert source.rows(snapshot / "a.json") == []
    assert leads_out(tmp_path / "datasets--a--b" / "refs", source.folders)


def test_media_that_lead_out_are_broken_and_not_decoded(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        assert Path(path).name == "own.png" and Path(path).parent == data

    monkeypatch.setattr("modalloy.evals.doctor.LOADERS", {"image": refuse})
    shown = [*ways_out(data), str(data / "own.png")]
    made = benchmark([question(index, media=(("image", path),)) for index, path in enumerate(shown)])
    found = doctor(made, Source(data))
    assert found.n_askable == 1 and len(found.problems) == 6
    assert {(one.kind, one.reason.partition(",")[0]) for one in found.problems} == {
        ("broken", "leads out of the data's folder")
    }


def test_a_page_shows_no_file_that_leads_out_or_is_no_medium(data: Path, tmp_path: Path) -> None:
    secret = (data.parent / "private" / "key.png").read_bytes()
    for name in ("key.png", "key.wav", "key.mp4", "key.npy"):
        (data / name).write_bytes(secret)
    Image.new("RGB", (4, 4)).save(data / "picture.mp3", "PNG")
    shown = [*ways_out(data), *(str(data / f"key.{end}") for end in ("png", "wav", "mp4", "npy"))]
    shown += [str(data / "picture.mp3"), str(data / "own.png")]
    samples = [question(index, media=(("image", path),)) for index, path in enumerate(shown)]
    run = write_run(tmp_path / "run", samples, ["yes"] * len(samples), folders=list(Source(data).folders))
    page = evals.page(run)
    found = re.search(r'id="media">(.*?)</script>', page, re.DOTALL)
    assert found
    own = (data / "own.png").read_bytes()
    assert [base64.b64decode(item["data"]) for item in json.loads(found[1])] == [own]
    assert base64.b64encode(secret).decode() not in page and page.count("leads out of the data") == 6


def test_a_benchmark_s_own_file_that_leads_out_is_refused(data: Path) -> None:
    (data.parent / "private" / "rows.json").write_text("[]")
    (data / "rows.json").symlink_to(data.parent / "private" / "rows.json")
    with pytest.raises(MediaError, match=r"rows\.json: leads out of the data's folder; copy the file there"):
        Source(data).rows(data / "rows.json")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.json", b"[" + b"1" * 5000 + b"]", "cannot be read"),
        ("a.json", b"\xff\xfe", "cannot be read"),
        ("a.jsonl", b"{}\n" + b'{"a":' * 100_000, "nested too deeply"),
        ("a.csv", b'"' + b"x" * 200_000, "cannot be read"),
        ("a.json", b'{"a": 1}', "holds a dict, not a list of rows"),
    ],
)
def test_files_that_cannot_be_rows_are_one_line(name: str, content: bytes, message: str, data: Path) -> None:
    (data / name).write_bytes(content)
    with pytest.raises(MediaError, match=message) as caught:
        Source(data).rows(data / name)
    assert len(str(caught.value)) < 1000


def test_pipes_are_not_waited_for(data: Path) -> None:
    for name in ("a.json", "probes.jsonl"):
        os.mkfifo(data / name)
    with pytest.raises(MediaError, match=r"a\.json: is a pipe or a device"):
        Source(data).rows(data / "a.json")
    with pytest.raises(MediaError, match=r"probes\.jsonl: is a pipe or a device"):
        read_probes(data / "probes.jsonl")
    probe = data / "probe.jsonl"
    for medium, message in (
        ("a.json", "line 1: .*is a pipe"),
        ("n" * 5000, "File name too long"),
        ("a\0b", "null byte"),
    ):
        probe.write_text(json.dumps({"text": "What is this?", "media": {"image": medium}}))
        with pytest.raises(MediaError, match=message) as caught:
            read_probes(probe)
        assert len(str(caught.value)) < 1000
    with pytest.raises(ModalloyError):
        read_probes(Path("p" * 5000))


@pytest.mark.parametrize(
    "line",
    [b"[" * 100_000, b'{"question": 5, "prompt_sha": 1}', b'{"question": "q", "prompt_sha": 1, "media": 7}', b'{"x": 1}',
     b'{"' + b"k" * 9000 + b'": 1}', b'{"text": "a", "media": {"image": ["b"]}}', b"\xff"],
)  # fmt: skip
def test_probes_of_other_forms_are_one_line(line: bytes, tmp_path: Path) -> None:
    (tmp_path / "probes.jsonl").write_bytes(line)
    with pytest.raises(ModalloyError) as caught:
        read_probes(tmp_path / "probes.jsonl")
    assert len(str(caught.value)) < 1000


def test_pictures_of_a_table_are_unpacked_in_the_folder_only(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (data / "data").mkdir()
    (data / "data" / "test-0.parquet").write_bytes(b"table")
    picture = {"bytes": (data / "own.png").read_bytes(), "path": "../../x.desktop"}
    row = {"dataset": "d", "image": picture, "question": "q", "answer": ["a"], "question_type": "Doc-oriented VQA"}
    monkeypatch.setattr("modalloy.evals.benchmark.parquet_rows", lambda raw: [row])
    (media,) = [sample.media for sample in ocrbench.samples(Source(data))]
    assert Path(media[0][1]).parent == data / "images" and Path(media[0][1]).suffix == ".jpg"
    for file in (data / "images").iterdir():
        file.unlink()
    (data / "images").rmdir()
    (data / "images").symlink_to(data.parent / "private")
    before = sorted((data.parent / "private").iterdir())
    with pytest.raises(MediaError, match="leads out of the data's folder"):
        ocrbench.samples(Source(data))
    assert sorted((data.parent / "private").iterdir()) == before


ROW = {
    "file": "a_x.png",
    "concept": "dog",
    "category": "animal",
    "modality": "image",
    "source": "a4a:x",
    "package": "p",
}


@pytest.mark.parametrize(
    "rows",
    [
        "{",
        "7",
        "null",
        '{"a": 1}',
        [7],
        [[]],
        [ROW],  # no licence
        *([ROW | {"licence": "MIT", name: value}] for name in ROW for value in (None, 5, [], {})),
        [ROW | {"licence": "MIT", "concept": ""}],
        [ROW | {"licence": "MIT", "modality": "smell"}],
        [
            ROW | {"licence": "MIT", "file": file, "source": file} for file in ("a4a_x.png", "b_y.png")
        ],  # one concept only
    ],
    ids=str,
)
def test_a_damaged_manifest_of_the_senses_is_one_line(rows: Any, data: Path) -> None:
    (data / "manifest.json").write_text(rows if isinstance(rows, str) else json.dumps(rows))
    with pytest.raises(MediaError) as caught:
        senses.samples(Source(data))
    assert "data" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["task", "variant", "modalities", "n_samples", "model", "data", "generation", "folders"]
)
def test_a_run_of_other_types_is_one_line(name: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [question(0)], ["yes"], folders=["/"])
    whole = json.loads((run.folder / "run.json").read_text())
    for value in (5, [5], {"a": []}, "unheard of", [None], None, True, -1, 1e999):
        (run.folder / "run.json").write_text(json.dumps(whole | {name: value}))
        try:
            evals.page(load_run(run.folder))
            markdown.markdown(result(load_run(run.folder)))
        except ModalloyError as error:
            assert "\n" not in str(error)
    (run.folder / "run.json").write_text("[" * 100_000)
    with pytest.raises(ModalloyError, match="nested too deeply"):
        load_run(run.folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda line: line | {"gold": [], "choices": [], "options": []},
        lambda line: line | {"sec": float("inf")},
        lambda line: line | {"sec": 10**400},
        lambda line: line | {"likelihoods": [float("nan"), 1]},
        lambda line: line | {"n_out": "1"},
        lambda line: line | {"err": ["x"]},
        lambda line: line | {"status": ["ok"]},
        lambda line: line | {"group": 5},
        lambda line: line | {"media": [["image"]]},
        lambda line: line | {"media": [["image", "/" * 9000]]},
        lambda line: line | {"prompt_sha": None},
    ],
)
def test_a_line_of_other_types_is_one_line(change: Callable[[dict[str, Any]], dict[str, Any]], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [question(0)], ["yes"])
    line = json.loads((run.folder / "preds.jsonl").read_text())
    (run.folder / "preds.jsonl").write_text(json.dumps(change(line)) + "\n")
    try:
        evals.page(load_run(run.folder))
    except ModalloyError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000


def test_texts_of_strangers_stay_text_in_tables(tmp_path: Path) -> None:
    evil = "=HYPERLINK(1)|<img src=x> [a](b) `c` *d*\n# e"
    sample = replace(question(0), group={evil: evil, "type": "+1"})
    scores = result(write_run(tmp_path / "run", [sample, sample], ["yes", "no"], variant=evil))
    text = markdown.markdown(scores)
    assert "<img" not in re.sub(r"\\.", "", text) and "[a]" not in text and "\n# e" not in text
    for cell in re.split(r',|"', markdown.csv(scores)):
        assert not cell.startswith(("=", "+", "@", "-"))
    assert csv_cell("-2+3") == "'-2+3" and csv_cell("a=b") == "a=b"
    assert (markdown_code("org/base"), markdown_code("a`` b\n")) == ("`org/base`", "``` a`` b  ```")
    assert fence("a ``` b") == "````" and fence("a") == "```"
    assert markdown_text("question_type _a_ \x1b[1m") == r"question_type \_a\_  \[1m"


def test_np_arrays_of_objects_are_not_unpickled_for_a_page(data: Path, tmp_path: Path) -> None:
    np.save(data / "a.npy", np.array([[print, 1, 2]], object))
    run = write_run(tmp_path / "run", [question(0, media=(("point", str(data / "a.npy")),))], ["yes"])
    assert "Python objects" in evals.page(run)

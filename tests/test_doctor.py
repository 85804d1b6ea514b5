"""The preflight of a benchmark's media: what is missing, cut short or unreadable, before any model is loaded."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_run import benchmark, question

from modalloy import builtin, cli
from modalloy.cli.options import source_of
from modalloy.errors import ModalloyError
from modalloy.evals import BENCHMARKS
from modalloy.evals.benchmark import Benchmark, Source
from modalloy.evals.doctor import doctor


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Benchmark:
    """Ten questions: five about sound files, five about what is missing, cut short, empty, wrong or unknown."""
    image, sound = (Path(shutil.copy(builtin.SAMPLES / name, tmp_path)) for name in ("dog.webp", "dog.flac"))
    (tmp_path / "cut.flac").write_bytes(sound.read_bytes()[:3000])
    (tmp_path / "empty.webp").touch()
    (tmp_path / "text.webp").write_text("no picture")
    np.save(tmp_path / "nan.npy", np.full((4, 3), np.nan))
    np.save(tmp_path / "fine.npy", np.ones((4, 3), np.float32))
    media = [
        (("image", str(image)),),
        (("image", str(image)), ("audio", str(sound))),
        (("point", str(tmp_path / "fine.npy")),),
        (("video", str(image)),),
        (("depth", str(image)),),
        (("image", str(image)), ("audio", str(tmp_path / "none.flac"))),
        (("audio", str(tmp_path / "none.flac")), ("audio", str(tmp_path / "none.flac"))),
        (("audio", str(tmp_path / "cut.flac")),),
        (("image", str(tmp_path / "empty.webp")), ("image", str(tmp_path / "text.webp"))),
        (("point", str(tmp_path / "nan.npy")),),
    ]
    made = benchmark([question(index, media=shown) for index, shown in enumerate(media)])
    monkeypatch.setitem(BENCHMARKS, "fake", made)
    return made


def test_what_is_missing_or_broken_is_named(fake: Benchmark, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    found = doctor(fake, Source(tmp_path), on_medium=lambda done, total: calls.append((done, total)))
    assert calls == [(index, 10) for index in range(1, 11)]
    assert (found.n, found.n_askable, found.unchecked) == (10, 5, ("depth",))
    assert found.media == {"image": 3, "audio": 3, "point": 2, "video": 1, "depth": 1}
    told = {Path(one.path).name: (one.modality, one.kind, one.samples) for one in found.problems}
    assert told == {
        "none.flac": ("audio", "missing", ("q5", "q6")),
        "cut.flac": ("audio", "broken", ("q7",)),
        "empty.webp": ("image", "broken", ("q8",)),
        "text.webp": ("image", "broken", ("q8",)),
        "nan.npy": ("point", "broken", ("q9",)),
    }
    text = found.text(shown=1)
    assert "missing  audio  " in text and "none.flac (2 questions)" in text
    assert "nan.npy: not a usable point cloud: it holds NaN" in text and "depth" in text and "not decoded" in text
    assert "broken   image  … and 1 more; --json lists all" in text
    assert text.endswith("fake: 5 of 10 questions (50.0 %) can be asked")


def test_quick_decodes_nothing(fake: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modalloy.evals.doctor.LOADERS", {})
    found = doctor(fake, Source(tmp_path), quick=True)
    assert [Path(one.path).name for one in found.problems] == ["none.flac", "empty.webp"] and found.n_askable == 7
    fine = doctor(fake, Source(tmp_path, modalities=("point",)), quick=True)
    assert fine.ok and fine.n == 2 and "they were not decoded (--quick)" in fine.text()
    with pytest.raises(ModalloyError, match="holds no question of fake"):
        doctor(benchmark(), Source(tmp_path))


def test_the_command(
    fake: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*more: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["modalloy", "eval-doctor", "--task", "fake", "--data", str(tmp_path), *more])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        output = capsys.readouterr()
        return stop.value.code, output.out, output.err

    code, out, _ = call("--json")
    report = json.loads(out)
    assert code == 1 and not report["ok"] and report["share_askable"] == 0.5 and len(report["problems"]) == 5
    assert report["media"]["audio"] == {"distinct": 3, "missing": 1, "broken": 1, "decoded": True}
    code, out, _ = call("--modalities", "video + depth".replace("depth", "Video"), "--media-root", str(tmp_path))
    assert code == 0 and out.endswith("fake: 1 of 1 questions (100.0 %) can be asked; every medium can be read\n")
    code, _, err = call("--modalities", "video+sound")
    assert code == 2 and err.startswith("error: --modalities video+sound: no modality 'sound'; ")
    code, _, err = call("--media-root", "COCO=nowhere")
    assert code == 2 and "--media-root COCO=nowhere: nowhere is not a folder; write DIR or NAME=DIR" in err


def test_options_of_a_source(tmp_path: Path) -> None:
    odd = tmp_path / "a=b"
    odd.mkdir()
    source = source_of(tmp_path, [f"COCO={tmp_path}", str(odd)], "official", "vision+point_cloud+image")
    assert source == Source(tmp_path, {"coco": tmp_path, "": odd}, "official", ("image", "point"))
    assert source_of(tmp_path, modalities="all").modalities is None
    with pytest.raises(ModalloyError, match="the general root is given twice"):
        source_of(tmp_path, [str(odd), str(tmp_path)])

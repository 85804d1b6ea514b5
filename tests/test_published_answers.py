"""`eval-score FILE --task T`: files of answers that ModelCompose's own scripts wrote."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from fixtures_evals import MUSIC, write_mcub, write_music_avqa

from modalloy import cli
from modalloy.evals.log import load_run


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("published")
    return {"music_avqa": write_music_avqa(folder / "music"), "mcub3": write_mcub(folder / "mcub")}


def line(id: int | str, text: str) -> dict[str, Any]:
    return {"question_id": id, "prompt": "?", "text": text, "answer_id": "x", "model_id": "m", "metadata": {}}


def score(
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lines: list[dict[str, Any]],
    run: Path,
    task: str = "music_avqa",
) -> tuple[int, str, str]:
    file = run.with_suffix(".jsonl")
    file.write_text("".join(json.dumps(one) + "\n" for one in lines))
    asked = ["eval-score", str(file), "--task", task, "--data", str(folders[task]), "-o", str(run), "--json"]
    monkeypatch.setattr(sys, "argv", ["modalloy", *asked])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0), *capsys.readouterr()


def test_answers_are_joined_by_id_and_missing_ones_count_as_wrong(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = [line(id, answer) for _, id, _, _, _, answer in MUSIC]
    shuffled = [*right[6:], *right[1:6]]  # the two rows of id 7 keep their order; the first question has no line
    code, out, _ = score(folders, monkeypatch, capsys, shuffled, tmp_path / "run")
    scores = json.loads(out)
    assert code == 0 and (scores["n"], scores["n_scored"], scores["n_missing"]) == (10, 9, 1)
    assert (scores["acc"], scores["protocol"]["compose"]["acc_scored"]) == (0.9, 1.0)
    assert scores["variant"] == "modelcompose" and "1 without a line" in (tmp_path / "run/result.md").read_text()
    assert [entry.status for entry in load_run(tmp_path / "run").entries] == ["missing", *["ok"] * 9]


@pytest.mark.parametrize(
    ("task", "lines", "message"),
    [
        ("music_avqa", [line(99, "yes")], r"line 1 \('99'\) is of no question of music_avqa"),
        ("music_avqa", [line(3, "two"), line(3, "one")], r"line 2 \('3#2'\) is of no question"),
        ("music_avqa", [], r"run\.jsonl: holds no answer"),
        ("music_avqa", [line(3, "two"), {"question_id": 4}], "row 1 lacks 'prompt'"),
        (
            "mcub3",
            [line("I+A+V/image-audio-video-0", "A"), line("image-audio-video-0", "A")],
            "line 2 answers .* again",
        ),
    ],
)
def test_lines_that_do_not_fit_are_refused(
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    task: str,
    lines: list[dict[str, Any]],
    message: str,
) -> None:
    code, out, error = score(folders, monkeypatch, capsys, lines, tmp_path / "run", task)
    assert (code, out) == (2, "") and error.startswith("error: ") and error.count("\n") == 1
    assert re.search(message, error) and not (tmp_path / "run").exists()

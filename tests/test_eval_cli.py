"""`modalloy eval` on every benchmark's own files, with a tiny model: from the command to tables, CSV and page."""

import csv
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import write_omni
from fixtures_evals import write_avqa, write_mcub, write_music_avqa
from fixtures_text_evals import write_mmau, write_mmlu, write_ocrbench

import modalloy
from modalloy import cli
from modalloy.evals import BENCHMARKS
from modalloy.model.chat import ChatModel

WRITERS: dict[str, Callable[[Path], object]] = {
    "music_avqa": write_music_avqa,
    "avqa": write_avqa,
    "mcub3": write_mcub,
    "mcub4": write_mcub,
    "mmlu": write_mmlu,
    "mmlu_generative": write_mmlu,
    "ocrbench": write_ocrbench,
    "ocrbench_llava": write_ocrbench,
    "mmau_mini": write_mmau,
}
SEES = "image+audio"


@pytest.fixture(scope="module")
def omni(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A merged image and audio model."""
    return write_omni(tmp_path_factory.mktemp("eval"), base)


@pytest.fixture(scope="module")
def model(omni: Path) -> ChatModel:
    """The merged model, with a quick encoder in the place of Whisper's, and room for long prompts."""
    model = modalloy.load_model(omni)
    model.model.encoders["audio"].forward = lambda mel: mel.reshape(len(mel), 4, -1)[..., :3840]
    model.model.config.text_config.max_position_embeddings = 8192
    return model


@pytest.fixture
def command(
    model: ChatModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, str]]:
    """Runs `modalloy` with the given words; gives what it prints on stdout and stderr."""
    monkeypatch.setattr("modalloy.model.load_model", lambda path, **options: model)

    def run(*words: object) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["modalloy", *map(str, words)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        assert exit.value.code == 0
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run


@pytest.mark.parametrize("task", sorted(set(BENCHMARKS) - {"senses", "senses_generated"}))
def test_every_benchmark_runs_on_its_own_files(
    task: str, omni: Path, tmp_path: Path, command: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BENCHMARKS, task, replace(BENCHMARKS[task], max_new_tokens=4))
    data, run = tmp_path / "data", tmp_path / "run"
    WRITERS[task](data)
    options = ("--modalities", SEES) if set(BENCHMARKS[task].modalities) - {"image", "audio"} else ()
    out, _ = command("eval", omni, "--task", task, "--data", data, "-o", run, "--json", *options)
    found = json.loads(out)
    assert found == json.loads((run / "result.json").read_text())
    lines = [json.loads(line) for line in (run / "preds.jsonl").read_text().splitlines()]
    assert found["n"] == found["n_all"] == len(lines) > 0 and found["n_media_error"] == 0
    assert list(found["protocol"]) == list(BENCHMARKS[task].rules)
    for rule, scores in found["protocol"].items():
        assert scores["correct"] == sum(line["scores"][rule] for line in lines)
        for values in scores["groups"].values():
            assert sum(group["n"] for group in values.values()) == len(lines)
    rows = list(csv.DictReader((run / "result.csv").read_text().splitlines()))
    assert {row["rule"] for row in rows} == set(BENCHMARKS[task].rules)
    assert (run / "result.md").read_text().startswith(f"# {task}")
    command("eval-score", run, "-o", tmp_path / "page.html")
    assert "</html>" in (tmp_path / "page.html").read_text()
    same, _ = command("eval-compare", run, run)
    assert "cannot be told apart" in same


def test_tasks_are_listed(command: Callable[..., tuple[str, str]]) -> None:
    found = json.loads(command("eval", "--list", "--json")[0])
    assert list(found) == list(BENCHMARKS) and found["mcub4"]["modalities"] == ["image", "audio", "video", "point"]
    shown, _ = command("eval", "--list")
    assert all(name in shown for name in BENCHMARKS)

"""The paper's recipes and published numbers: whole, consistent with each other, and shown beside our runs."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_run import write_run

from modalloy import load_recipe
from modalloy.errors import ModalloyError
from modalloy.evals import BENCHMARKS
from modalloy.evals.benchmark import Sample
from modalloy.storage.locate import is_hub_id

ROOT = Path(__file__).parents[1]
PAPER = ROOT / "recipes" / "paper"
TABLES: dict[str, dict[str, dict[str, float]]] = json.loads((PAPER / "published.json").read_text("utf-8"))["tables"]
TRAINED = {"ChatBridge-13B", "OneLLM-7B", "ImageBind-LLM", "X-InstructBLIP", "Proj-Only"}  # jointly: no merges


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import paper

    return paper


def test_every_row_has_its_recipes() -> None:
    merged = {
        row.lower().replace(" ", "-") for task in ("music_avqa", "avqa", "mcub") for row in set(TABLES[task]) - TRAINED
    }
    for folder in ("three", "four"):
        names = {path.stem for path in (PAPER / folder).glob("*.yaml")}
        assert {name.removesuffix("-factors") for name in names} == merged
    assert {path.stem for path in (PAPER / "alone").glob("*.yaml")} == set(TABLES["alone"]) - {"SSAM"}
    assert {path.stem for path in (PAPER / "rank").glob("*.yaml")} == set(TABLES["rank"]) - {"128"}


@pytest.mark.parametrize("path", sorted((PAPER / "four").glob("*.yaml")), ids=lambda path: path.stem)
def test_three_is_four_without_points(path: Path) -> None:
    four, three = load_recipe(path), load_recipe(PAPER / "three" / path.name)
    assert [entry.modality for entry in four.models] == ["image", "audio", "video", "point"]
    changes = {"models": four.models[:3], "folder": three.folder, "text": three.text}
    assert three == four.model_copy(update=changes)
    layout = "naivemc" if path.stem.endswith("-factors") or path.stem == "naivemc" else "damc"
    for entry in four.models:
        assert entry.model.endswith(f"-{layout}") and is_hub_id(entry.model) and is_hub_id(str(entry.encoder))


@pytest.mark.parametrize("path", sorted((PAPER / "rank").glob("*.yaml")), ids=lambda path: path.stem)
def test_ranks_are_of_the_same_merge(path: Path) -> None:
    four, recipe = load_recipe(PAPER / "four" / "ssam.yaml"), load_recipe(path)
    parameters = {"rank": int(path.stem), "scale": "auto"}
    assert recipe == four.model_copy(update={"parameters": parameters, "folder": recipe.folder, "text": recipe.text})


@pytest.mark.parametrize("task", ["music_avqa", "avqa", "mcub"])
def test_published_averages_follow_from_the_cells(task: str) -> None:
    for row, cells in TABLES[task].items():
        averaged = [value for name, value in cells.items() if name not in ("average", "mcub4")]
        assert len(averaged) == (1 if row in ("ChatBridge-13B", "OneLLM-7B") else 4)
        assert sum(averaged) / len(averaged) == pytest.approx(cells["average"], abs=0.00501)


def test_numbers_that_stand_in_two_tables_agree() -> None:
    assert TABLES["rank"]["128"] == {
        "mcub3": TABLES["mcub"]["SSAM"]["average"],
        "mcub4": TABLES["mcub"]["SSAM"]["mcub4"],
    }
    for task in ("music_avqa", "avqa"):
        assert TABLES["alone"]["SSAM"][f"{task} video"] == TABLES[task]["SSAM"][f"{task} video"]


def test_tasks_of_cells_are_known() -> None:
    names = {name.split()[0] for rows in TABLES.values() for row in rows.values() for name in row} - {"average"}
    assert names <= set(BENCHMARKS)


def fill(folder: Path, task: str, right: str, **meta: Any) -> None:
    """A run that answers "A" to each question, rightly where `right` has a 1."""
    subsets = ("I+A+V", "A+V+P", "I+A+P", "I+V+P")
    samples = [
        Sample(
            id=str(index),
            text="?",
            golds=("A" if one == "1" else "B",),
            choices=("a", "b"),
            options=("a", "b"),
            group={"subset": subsets[index % 4]} if task == "mcub3" else {},
        )
        for index, one in enumerate(right)
    ]
    write_run(folder, samples, ["A"] * len(samples), **({"task": task, "modalities": None} | meta))


def test_ours_beside_published(
    paper: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.fsync", lambda file: None)
    ssam, factors = tmp_path / "three" / "ssam", tmp_path / "four" / "wudi-factors"
    for shown, right in (("video", "1000"), ("image video", "1100"), ("audio video", "1110")):
        fill(ssam / shown, "avqa", right, modalities=shown.split())
    fill(ssam / "all", "avqa", "1111", n_samples=5)
    fill(ssam / "image", "avqa", "0000", modalities=["image"])
    fill(factors / "three", "mcub3", "11011000")
    fill(factors / "some", "mcub4", "10", modalities=["audio", "image"])
    monkeypatch.setattr(sys, "argv", ["paper.py", str(tmp_path)])
    paper.main()
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    cells = {
        (title, line.split()[2]): " ".join(cell.split()[0] for cell in line.strip("| ").split(" | ")[1:])
        for title, part in ((part.split()[0], part.splitlines()) for part in printed.split("## ")[1:])
        for line in part
        if line.startswith("| ·")
    }
    assert cells == {
        ("avqa", "three/ssam"): "25.00 50.00 75.00 100.00 62.50",
        ("mcub", "four/wudi-factors"): "50.00 50.00 0.00 100.00 – 50.00",
        ("alone", "three/ssam"): "– 0.00 – – – – – – 25.00",
    }
    assert printed.count("*") == 1 and "100.00 (100.0 to 100.0)* | 62.50" in printed  # not all questions were asked
    above = lines[next(index for index, line in enumerate(lines) if "100.0)* | 62.50" in line) - 1]
    assert above == "| SSAM | 80.45 | 80.7 | 82.12 | 81.87 | 81.29 |"
    assert lines[-1].startswith("not in the paper: four/wudi-factors mcub4 audio+image: 50.00")
    fill(ssam / "again", "avqa", "1000", modalities=["video"])
    with pytest.raises(ModalloyError, match="another run of 'avqa video' beside three/ssam's; keep one"):
        paper.read(tmp_path)
    with pytest.raises(ModalloyError, match=r"holds no runs; fill it as recipes/paper/README\.md says"):
        paper.read(tmp_path / "three")

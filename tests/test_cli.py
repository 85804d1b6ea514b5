"""The command line: what each subcommand prints, as people and as programs read it."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from modalloy import builtin, cli, load_recipe
from modalloy.cli.progress import progress
from modalloy.errors import CheckpointError
from modalloy.methods import METHODS

Run = Callable[..., str]
RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `modalloy …` in this process and returns its stdout; it must succeed."""

    def call(*arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["modalloy", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        output = capsys.readouterr()
        assert stop.value.code in (0, None), output.err
        return output.out

    return call


def test_the_whole_road(run: Run, write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe, out = write_recipe(output={"form": "omni"}), tmp_path / "omni"
    planned = json.loads(run("plan", recipe, "--json"))
    assert planned["merged_weights"] == 14 and planned["counts"]["carried"] == 2 * (28 + 4 + 2)
    assert "14 linear weights merged (ssam, k=4, λ=1/2)" in run("merge", recipe, "-o", out, "--dry-run")
    assert not out.exists()
    report = json.loads(run("merge", recipe, "-o", out, "--json"))
    assert report["verify"]["ok"] and report["verify"]["share"] == 1 and report["merge_seconds"] > 0
    assert report["write_bytes"] < (out / "adapter_model.safetensors").stat().st_size < report["write_bytes"] + 20_000
    assert run("verify", out).startswith("ok: ")
    assert json.loads(run("verify", out, "--json"))["worst_error"] < 1e-5
    image, audio = builtin.SAMPLES / "dog.webp", builtin.SAMPLES / "dog.flac"
    asked = ("chat", out, "--image", image, "--audio", audio, "-p", "are these the same ?", "--max-new-tokens", "4")
    answer = json.loads(run(*asked, "--json"))
    assert answer["question"] == "are these the same ?" and answer["media"] == {
        "image": [str(image)],
        "audio": [str(audio)],
    }
    assert run(*asked).strip() == answer["answer"]  # greedy: the same answer twice


def test_overwrite_replaces_a_result(run: Run, write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("merge", write_recipe(), "-o", out)
    before = (out / "adapter_model.safetensors").read_bytes()
    run("merge", write_recipe(merge_method="average"), "-o", out, "--overwrite")
    assert (out / "adapter_model.safetensors").read_bytes() != before
    assert json.loads((out / "manifest.json").read_text())["method"] == "average"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_methods_lists_every_method(run: Run) -> None:
    listed = json.loads(run("methods", "--json"))
    assert listed.keys() == METHODS.keys()
    off = {"balance": "none", "match": "none"}
    assert listed["ssam"]["parameters"] == {"rank": "auto", "scale": "auto", **off}
    assert listed["ssam"]["auto_scale"] == "1/n; 1 with match: norm"
    assert listed["task_arithmetic"]["auto_scale"] == "1" and listed["linear"]["auto_scale"] == ""
    assert listed["optmerge"]["auto_scale"] == "1; 0.1 with variant: full"
    for method in listed.values():
        assert method["documentation"].keys() == method["parameters"].keys() and all(method["documentation"].values())
    text = run("methods")
    assert all(name in text and METHODS[name].paper in text for name in METHODS)


def test_plan_lists_every_tensor(run: Run, write_recipe: Callable[..., Path]) -> None:
    recipe = write_recipe()
    lines = run("plan", recipe).splitlines()
    assert len([line for line in lines if line.startswith(("base ", "image ", "audio "))]) == len(
        json.loads(run("plan", recipe, "--json"))["tensors"]
    )


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid(path: Path) -> None:
    assert load_recipe(path).models


def test_progress_without_a_terminal_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("modalloy.cli.progress.EVERY", 0.0)
    with progress("mmlu") as report:
        report(4, 10)
    printed = capsys.readouterr()
    assert re.fullmatch(r"mmlu: 4/10, [\d.]+/s, \d+:\d\d:\d\d left\n", printed.err) and not printed.out


@pytest.mark.parametrize("command", ["verify", "check", "bom", "chat", "serve", "inspect", "merge -o out"])
def test_an_address_is_told_where_a_path_is_wanted(command: str) -> None:
    """`merge -o s3://…` writes to one, so that it is natural to go on with it; as a path it would lose a slash."""
    error = CliRunner().invoke(cli.app, [*command.split(), "s3://bucket/out"]).exception
    assert isinstance(error, CheckpointError)
    assert str(error) == "s3://bucket/out: is an address; download it, and give its path here"

"""Many merges from one pass: each result has the bytes of a merge alone, and every input is read once."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import modalloy
from modalloy.cli import app
from modalloy.errors import ModalloyError, OutputError, RecipeError
from modalloy.planning.planner import plan
from modalloy.recipe import load_recipe
from modalloy.search.space import applied
from modalloy.search.sweep import sweep, together
from modalloy.storage.inputs import Inputs
from modalloy.storage.staging import Staging
from modalloy.storage.tensors import TensorRef
from modalloy.verify import verify

WriteRecipe = Callable[..., Path]
FULL = {"form": "full", "max_shard_size": "6KB"}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a result but where its inputs are on this machine."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "sources.json"}


@pytest.mark.parametrize(
    ("changes", "given"),
    [
        ({}, ["scale=0.1,0.5", "rank=2,4"]),
        ({"output": FULL}, ["weight.image=0.5,2"]),
        ({"output": FULL | {"dtype": "bfloat16"}, "merge_method": "ties"}, ["density=0.3,0.7"]),
        ({"output": FULL, "merge_method": "knots"}, ["scale=0.5,1"]),
        ({"output": FULL, "merge_method": "tsv"}, ["scale=0.5,1"]),
        ({"output": FULL, "merge_method": "metagpt"}, ["weight.image=0.5,1"]),
        ({"merge_method": "ties", "output": {"form": "adapter", "compress_rank": 2}}, ["density=0.3,0.7"]),
    ],
    ids=["ssam", "ssam full", "ties", "knots", "tsv", "metagpt", "cut"],
)
def test_results_are_those_of_merges_alone(
    changes: dict[str, Any], given: list[str], write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe = write_recipe(**changes)
    report = sweep(recipe, tmp_path / "out", given)
    assert len(report.results) == 2 ** len(given)
    for one in report.results:
        alone = applied(load_recipe(recipe), one.changes)
        modalloy.merge(alone, tmp_path / "alone" / one.out.name)
        assert contents(one.out) == contents(tmp_path / "alone" / one.out.name)
        verify(one.out)
    assert len({(one.out / "manifest.json").read_bytes() for one in report.results}) == len(report.results)


def test_inputs_are_read_and_decomposed_once(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import modalloy.search.sweep as module
    from modalloy.linalg import Spectrum

    reads: Counter[str] = Counter()
    read, spectrum = Inputs.read, Spectrum.__init__
    decomposed = []
    monkeypatch.setattr(module, "write_beside", lambda *arguments: None)  # it verifies, which reads again
    monkeypatch.setattr(module, "settle", lambda planned, **options: planned)

    def counted(self: Inputs, ref: TensorRef, *given: Any) -> torch.Tensor:
        reads[f"{ref.file.parent.name} {ref.name}"] += 1
        return read(self, ref, *given)

    def noted(self: Spectrum, matrix: torch.Tensor) -> None:
        decomposed.append(len(matrix))
        spectrum(self, matrix)

    monkeypatch.setattr(Inputs, "read", counted)
    monkeypatch.setattr(Spectrum, "__init__", noted)
    recipe = write_recipe(output=FULL)
    with pytest.raises(AttributeError):  # there is no check to report
        sweep(recipe, tmp_path / "out", ["scale=0.1,0.2,0.3", "rank=2,4"]).to_dict()
    assert reads and set(reads.values()) == {1}
    merged = len(modalloy.plan(modalloy.load_recipe(recipe)).merges())
    assert len(decomposed) == 2 * merged


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "--set: nothing is varied"),
        (["scale"], "--set scale: not of the form NAME=VALUES"),
        (["scael=1,2"], "--set scael: 'ssam' has no such parameter; did you mean"),
        (["scale=1,big"], "scale"),
        (["scale=0.1:1000:0.1"], "at most 1,000 are tried"),
        (["scale=0.1:10:0.1", "rank=1:10:1"], "--set: 1,000 results; at most 256"),
        (["rank=2,2"], "--set rank: 2 is given twice"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(
    given: list[str], message: str, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message) as raised:
        sweep(write_recipe(), tmp_path / "out", given)
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()


def test_a_result_that_is_there_is_not_replaced(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    (tmp_path / "out/scale=0.2").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"scale=0\.2: already exists"):
        sweep(write_recipe(), tmp_path / "out", ["scale=0.1,0.2"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["scale=0.2"]


def test_all_results_or_none(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """A value that does not fit the written type fails the whole sweep, in the middle of it."""
    recipe = write_recipe(output=FULL | {"dtype": "float16"})
    with pytest.raises(ModalloyError, match="do not fit"):
        sweep(recipe, tmp_path / "out", ["scale=0.1,1.0e+20"])
    assert not (tmp_path / "out").exists()


def test_the_command(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    arguments = ["sweep", str(write_recipe()), "-o", str(tmp_path / "out"), "--set", "rank=2,4", "--json"]
    done = CliRunner().invoke(app, arguments)
    assert not done.exit_code, done.output
    told = json.loads(done.stdout)
    assert [one["set"] for one in told["results"]] == [{"rank": 2}, {"rank": 4}]


def test_the_remaining_pieces_are_those_of_their_merges(write_recipe: WriteRecipe) -> None:
    """A job that only some results still need has only their pieces, and says whose they are."""
    recipe = load_recipe(write_recipe(output=FULL))
    plans = [plan(applied(recipe, {"scale": scale})) for scale in (0.1, 0.2, 0.3)]
    jobs = plans[0].jobs
    work = together(plans, [jobs[:2], [], jobs[1:3]])
    assert [(job.name, job.parameters["of"]) for job in work] == [
        (jobs[0].name, (0,)),
        (jobs[1].name, (0, 2)),
        (jobs[2].name, (2,)),
    ]
    assert [piece.parameters["scale"] for job in work for piece in job.merges] == [
        {0: 0.1, 2: 0.3}[number] for job in work if job.merges for number in job.parameters["of"]
    ]


KILLED = """
import os, signal, sys
from modalloy.search.sweep import sweep, together
def stop(done, of):
    if done == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
sweep(sys.argv[1], sys.argv[2], ["scale=0.1,0.2,0.3"], on_job=stop)
"""


def test_a_killed_sweep_is_resumed(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """What was finished is not made again, whichever results it was of; the bytes are those of an undisturbed sweep."""
    recipe, out, values = write_recipe(output=FULL), tmp_path / "out", ["scale=0.1,0.2,0.3"]
    sweep(recipe, tmp_path / "whole", values)
    n_jobs = len(plan(load_recipe(recipe)).jobs)
    done = subprocess.run([sys.executable, "-c", KILLED, str(recipe), str(out), str(n_jobs // 2)], check=False)
    assert done.returncode == -signal.SIGKILL
    logs = sorted(out.glob(".scale=*.partial.log"))
    assert len(logs) == 3 and all('"file"' in log.read_text() for log in logs)
    log = logs[1].read_text().splitlines(keepends=True)  # the second result lost its shards but one
    logs[1].write_text("".join(log[:2]))
    counts: list[int] = []
    sweep(recipe, out, values, resume=True, on_job=lambda n, of: counts.append(n))
    assert 1 < counts[0] < n_jobs // 2 and counts[-1] == n_jobs
    for folder in (tmp_path / "whole").iterdir():
        assert contents(out / folder.name) == contents(folder)
    assert sorted(path.name for path in out.iterdir()) == ["scale=0.1", "scale=0.2", "scale=0.3"]


def test_a_result_that_is_in_place_is_checked_and_kept(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """As after a kill between two results' taking their places."""
    recipe, out = write_recipe(output=FULL), tmp_path / "out"
    modalloy.merge(applied(load_recipe(recipe), {"scale": 0.1}), out / "scale=0.1")
    before = (out / "scale=0.1/manifest.json").stat().st_mtime_ns
    report = sweep(recipe, out, ["scale=0.1,0.2"], resume=True)
    assert [one.changes["scale"] for one in report.results] == [0.1, 0.2]
    assert (out / "scale=0.1/manifest.json").stat().st_mtime_ns == before
    again = sweep(recipe, out, ["scale=0.1,0.2"], resume=True)
    assert len(again.results) == 2 and again.merge_s == 0
    with pytest.raises(OutputError, match=r"scale=0\.2: already exists and is not this recipe's result"):
        sweep(write_recipe(output=FULL, merge_method="tsv"), out, ["scale=0.2,0.3"], resume=True)


def killed(recipe: Path, out: Path, values: str) -> dict[str, bytes]:
    """A sweep of these values of λ that was killed half way; what it left, by name."""
    n_jobs = len(plan(load_recipe(recipe)).jobs)
    program = KILLED.replace("0.1,0.2,0.3", values)
    done = subprocess.run([sys.executable, "-c", program, str(recipe), str(out), str(n_jobs // 2)], check=False)
    assert done.returncode == -signal.SIGKILL
    return left_in(out)


def left_in(out: Path) -> dict[str, bytes]:
    """The shards of unfinished results that were whole."""
    whole = {}
    for log in out.glob(".scale=*.partial.log"):
        head, *rows = map(json.loads, log.read_text().splitlines())
        folder = log.with_name(f"{log.name.removesuffix('.log')}-{head['token']}")
        whole |= {f"{folder.name}/{row['file']}": (folder / row["file"]).read_bytes() for row in rows}
    return whole


@pytest.mark.parametrize("reason", ["place taken", "no room", "another recipe"])
def test_a_refused_resume_leaves_what_was_kept(reason: str, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    import modalloy.search.sweep as module

    out, values, message = tmp_path / "out", "scale=0.1,0.2", "the disk is full"
    if reason == "another recipe":
        killed(write_recipe(output=FULL, merge_method="tsv"), out, "0.3,0.4")
        values, message = "scale=0.1,0.2,0.3", r"scale=0\.3: the interrupted merge was of another recipe"
    recipe = write_recipe(output=FULL)
    kept = killed(recipe, out, "0.1,0.2")
    assert len(kept) > 2
    with pytest.MonkeyPatch.context() as patched:
        if reason == "place taken":
            (out / "scale=0.2").mkdir()
            message = r"scale=0\.2: already exists"
        if reason == "no room":
            patched.setattr(module, "check_disk", refuse)
        with pytest.raises(OutputError, match=message):
            sweep(recipe, out, [values], resume=True)
    left = left_in(out)
    assert {name: left.get(name) for name in kept} == kept
    if reason == "place taken":
        (out / "scale=0.2").rmdir()
    assert len(sweep(recipe, out, ["scale=0.1,0.2"], resume=True).results) == 2


def refuse(*arguments: object) -> None:
    raise OutputError("the disk is full")


def test_a_place_that_is_taken_meanwhile_is_told_before_any_result_is_placed(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe, out, values = write_recipe(output=FULL), tmp_path / "out", ["scale=0.1,0.2,0.3"]

    def take(done: int, of: int) -> None:
        (out / "scale=0.1").mkdir(exist_ok=True)

    message = r"scale=0\.1: was made by something else during the merge; .*; 0 of 3 results are in place, the others are whole"
    with pytest.raises(OutputError, match=message):
        sweep(recipe, out, values, on_job=take)
    assert [path.name for path in out.glob("scale=*")] == ["scale=0.1"]
    (out / "scale=0.1").rmdir()
    counts: list[int] = []
    assert len(sweep(recipe, out, values, resume=True, on_job=lambda n, of: counts.append(n)).results) == 3
    assert not counts  # nothing was merged again


def test_a_failure_between_two_placings_keeps_the_rest(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fails at the second of three renames: what is in place stays, the others wait for --resume."""
    recipe, out, placed = write_recipe(output=FULL), tmp_path / "out", []
    take_place = Staging._take_place

    def failing(self: Staging) -> Path | None:
        placed.append(self.out.name)
        if len(placed) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return take_place(self)

    monkeypatch.setattr(Staging, "_take_place", failing)
    message = "the disk is full.*; 1 of 3 results are in place, the others are whole and kept: then go on with --resume"
    with pytest.raises(OutputError, match=message) as raised:
        sweep(recipe, out, ["scale=0.1,0.2,0.3"])
    assert "nothing was written" not in str(raised.value)
    counts: list[int] = []
    report = sweep(recipe, out, ["scale=0.1,0.2,0.3"], resume=True, on_job=lambda n, of: counts.append(n))
    assert len(report.results) == 3 and not counts  # nothing was merged again
    for one in report.results:
        modalloy.merge(applied(load_recipe(recipe), one.changes), tmp_path / "alone" / one.out.name)
        assert contents(one.out) == contents(tmp_path / "alone" / one.out.name)
    assert sorted(path.name for path in out.iterdir()) == ["scale=0.1", "scale=0.2", "scale=0.3"]


def test_a_value_that_fails_late_is_named(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe(output=FULL | {"dtype": "float16"})
    with pytest.raises(ModalloyError, match=r"^scale=1e\+20: .* do not fit"):
        sweep(recipe, tmp_path / "out", ["scale=0.1,1.0e+20"])


def test_a_recipe_may_lie_beside_its_results(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe()
    assert len(sweep(recipe, recipe.parent, ["scale=0.1,0.2"]).results) == 2 and recipe.is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "s3://bucket/x"], "s3://bucket/x: a sweep's results are made on this machine; give a folder"),
        (["-o", "{out}", "--engine", "spark"], "--engine spark: not an engine; known: local, ray"),
        (["-o", "{out}", "--ray-address", "auto"], "--ray-address is of --engine ray"),
        (["-o", "{out}", "--engine", "ray", "--device", "cuda"], "--engine ray: its tasks run on processors"),
    ],
)
def test_options_that_do_not_fit(
    options: list[str], message: str, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe, given = write_recipe(), [one.format(out=tmp_path / "out") for one in options]
    before = sorted(tmp_path.iterdir())
    done = CliRunner().invoke(app, ["sweep", str(recipe), "--set", "scale=0.1,0.2", *given])
    assert isinstance(done.exception, ModalloyError) and str(done.exception).startswith(message)
    assert sorted(tmp_path.iterdir()) == before

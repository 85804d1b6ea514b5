"""`--from` an earlier result: what did not change is taken over, and the bytes are those of a merge from scratch."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import edit_tensors
from safetensors.torch import load_file, save_file

import modalloy
from modalloy.errors import CheckpointError, OutputError, PassingError, RecipeError
from modalloy.merging import MergeReport
from modalloy.outputs.earlier import Earlier

WriteRecipe = Callable[..., Path]
FULL = {"form": "full", "max_shard_size": "6KB"}
LAYER_0 = "model.layers.0.self_attn.q_proj.weight"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a result but where its inputs are on this machine."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "sources.json"}


def merged_both_ways(recipe: Path, earlier: Path, place: Path) -> MergeReport:
    """Merge from an earlier result and from scratch; the bytes must be the same."""
    report = modalloy.merge(recipe, place / "from", earlier=earlier)
    modalloy.merge(recipe, place / "scratch")
    assert contents(place / "from") == contents(place / "scratch")
    told = [json.loads((place / name / "sources.json").read_text()) for name in ("from", "scratch")]
    for one in told:
        one["outputs"] = {name: record["sha256"] for name, record in one["outputs"].items()}  # times and places differ
    assert told[0] == told[1]
    return report


@pytest.mark.parametrize("output", [{"form": "adapter"}, FULL], ids=["adapter", "full"])
def test_the_same_recipe_takes_everything_over(
    output: dict[str, Any], write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe = write_recipe(output=output)
    first = modalloy.merge(recipe, tmp_path / "first")
    report = merged_both_ways(recipe, tmp_path / "first", tmp_path)
    assert report.n_reused == len(first.plan.jobs) and first.n_reused == 0


@pytest.mark.parametrize("method", ["ssam", "ties"])
def test_a_number_that_is_written_otherwise_is_the_same(method: str, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    first = write_recipe(merge_method=method, parameters={"scale": 1}, output=FULL)
    modalloy.merge(first, tmp_path / "first")
    second = write_recipe(merge_method=method, parameters={"scale": 1.0}, output=FULL)
    report = merged_both_ways(second, tmp_path / "first", tmp_path)
    assert report.n_reused == len(report.plan.jobs)


@pytest.mark.parametrize("method", ["ssam", "task_arithmetic", "ties", "metagpt"])
def test_a_rule_for_some_weights_recomputes_these(method: str, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    modalloy.merge(write_recipe(merge_method=method, output=FULL), tmp_path / "first")
    rule = {LAYER_0: {"parameters": {"scale": 0.25}}}
    report = merged_both_ways(
        write_recipe(merge_method=method, output=FULL, modules=rule), tmp_path / "first", tmp_path
    )
    assert report.n_reused == len(report.plan.jobs) - 1


def test_cuts_are_taken_over_with_what_they_lost(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    output = {"form": "adapter", "compress_rank": 2}
    modalloy.merge(write_recipe(merge_method="ties", output=output), tmp_path / "first")
    rule = {LAYER_0: {"parameters": {"scale": 0.25}}}
    report = merged_both_ways(
        write_recipe(merge_method="ties", output=output, modules=rule), tmp_path / "first", tmp_path
    )
    assert report.n_reused and len(report.compression) == len(report.plan.jobs)


def test_a_sum_recomputes_what_another_specialist_touches(
    write_recipe: WriteRecipe, specialists: dict[str, Path], tmp_path: Path
) -> None:
    """Adding to a sum, re-weighting and removing cost the specialist's share of the weights."""
    shutil.copytree(specialists["audio"], tmp_path / "small")
    edit_tensors(tmp_path / "small", _keep_layer_0)
    models = [{"model": str(specialists[name])} for name in ("image", "audio")]
    sums = {"merge_method": "task_arithmetic", "parameters": {"scale": 0.3}, "output": FULL, "missing": "zero"}
    modalloy.merge(write_recipe(models=models, **sums), tmp_path / "two")
    added = [*models, {"model": str(tmp_path / "small")}]
    report = merged_both_ways(write_recipe(models=added, **sums), tmp_path / "two", tmp_path)
    n_touched = sum(len(job.models) == 3 for job in report.plan.merges())
    assert report.n_reused == len(report.plan.jobs) - n_touched and 0 < n_touched < len(report.plan.merges())
    heavier = [*models, {"model": str(tmp_path / "small"), "parameters": {"weight": 0.5}}]
    recipe = write_recipe(models=heavier, **sums)
    assert modalloy.merge(recipe, tmp_path / "heavier", earlier=tmp_path / "from").n_reused == report.n_reused
    back = modalloy.merge(write_recipe(models=models, **sums), tmp_path / "back", earlier=tmp_path / "heavier")
    assert back.n_reused == report.n_reused and contents(tmp_path / "back") == contents(tmp_path / "two")


def _keep_layer_0(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".layers." in name and ".layers.0." not in name]:
        del tensors[name]


def test_a_specialist_that_was_trained_again_is_read_again(
    write_recipe: WriteRecipe, specialists: dict[str, Path], tmp_path: Path
) -> None:
    """Of the same size, and with the same time of change."""
    recipe = write_recipe(output=FULL)
    modalloy.merge(recipe, tmp_path / "first")
    path = next(specialists["image"].glob("*.safetensors"))
    before = path.stat()
    tensors = load_file(path)
    name = next(name for name in tensors if ".layers.0." in name and "lora_B" in name)
    save_file(tensors | {name: tensors[name] * 2}, path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    report = merged_both_ways(recipe, tmp_path / "first", tmp_path)
    assert 0 < report.n_reused < len(report.plan.jobs)


def test_inputs_that_moved_are_the_same(
    write_recipe: WriteRecipe, specialists: dict[str, Path], tmp_path: Path
) -> None:
    modalloy.merge(write_recipe(output=FULL), tmp_path / "first")
    shutil.copytree(specialists["image"], tmp_path / "moved/image")
    models = [{"model": str(tmp_path / "moved/image")}, {"model": str(specialists["audio"])}]
    report = merged_both_ways(write_recipe(models=models, output=FULL), tmp_path / "first", tmp_path)
    assert report.n_reused == len(report.plan.jobs)


def test_unchanged_inputs_are_not_hashed_again(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modalloy.storage.source import Source

    recipe = write_recipe(output=FULL)
    modalloy.merge(recipe, tmp_path / "first")
    hashed: list[str] = []
    hash_more = Source._hash

    def noted(self: Source, data: memoryview) -> None:
        hashed.append(str(self.path))
        hash_more(self, data)

    monkeypatch.setattr(Source, "_hash", noted)
    modalloy.merge(recipe, tmp_path / "second", earlier=tmp_path / "first")
    assert not hashed
    for path in (tmp_path / "second").glob("*.safetensors"):
        os.utime(path)  # who touched it may have changed it
    modalloy.merge(recipe, tmp_path / "third", earlier=tmp_path / "second")
    assert hashed and all(path.startswith(str(tmp_path / "second")) for path in hashed)


def test_an_earlier_result_may_be_replaced(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe(output=FULL)
    modalloy.merge(recipe, tmp_path / "out")
    before = contents(tmp_path / "out")
    modalloy.merge(recipe, tmp_path / "out", earlier=tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == before


def _flip(folder: Path) -> None:
    path = next(folder.glob("model-*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _flip_in_secret(folder: Path) -> None:
    path = next(folder.glob("model-*.safetensors"))
    found = path.stat()
    _flip(folder)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def _edit(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "sources.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip, "its sha256 is not the one in manifest.json"),
        (_flip_in_secret, "its sha256 is not the one in manifest.json"),
        (lambda folder: next(folder.glob("model-*.safetensors")).unlink(), "listed in .* but missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "sources.json").unlink(), "sources.json: no such file"),
        (_edit(jobs=None), "records no jobs"),
        (_edit(made_by=["modalloy 0.1"]), "was made by modalloy 0.1, and this is modalloy"),
        (_edit(jobs={"x": "y"}), "jobs.x: String should match"),
    ],
    ids=["bit", "bit, same time", "shard", "no manifest", "manifest", "no sources", "old", "program", "keys"],
)
def test_damaged_results_are_refused(
    damage: Callable[[Path], None], message: str, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe = write_recipe(output=FULL)
    modalloy.merge(recipe, tmp_path / "first")
    damage(tmp_path / "first")
    with pytest.raises(CheckpointError, match=message):
        modalloy.merge(recipe, tmp_path / "out", earlier=tmp_path / "first")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_a_result_of_another_recipe_is_refused(
    write_recipe: WriteRecipe, specialists: dict[str, Path], tmp_path: Path
) -> None:
    modalloy.merge(write_recipe(output={"form": "adapter"}), tmp_path / "first")
    with pytest.raises(RecipeError, match="no tensor of it is one of this merge's: it is of another recipe"):
        modalloy.merge(write_recipe(output=FULL), tmp_path / "out", earlier=tmp_path / "first")
    assert not (tmp_path / "out").exists()


def test_keys_tell_numbers_apart(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """A recorded key for another tensor of the result is no way to have that tensor written."""
    recipe = write_recipe(output=FULL)
    modalloy.merge(recipe, tmp_path / "first")
    keys = Earlier(tmp_path / "first", "cpu").keys
    assert len(set(keys.values())) == len(keys) > 14


def switched_off(left: int) -> Callable[[int, int], None]:
    """Ends a merge, as a kill does, when so many jobs are left."""

    def stopped(done: int, total: int) -> None:
        if done >= total - left:
            raise PassingError("the machine was switched off")

    return stopped


def _flipped(folder: Path) -> Path:
    """A copy of a result with one bit of a shard changed."""
    damaged = folder.with_name("damaged")
    shutil.copytree(folder, damaged)
    shard = sorted(damaged.glob("model-*.safetensors"))[1]
    raw = bytearray(shard.read_bytes())
    raw[-4] ^= 1
    shard.write_bytes(raw)
    return damaged


@pytest.mark.parametrize("begun_without", [False, True])
def test_an_interrupted_merge_goes_on_from_the_same_result_alone(
    begun_without: bool, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    """Its finished shards may hold what is damaged there, which is known only at the end."""
    recipe, out = write_recipe(output=FULL), tmp_path / "out"
    modalloy.merge(recipe, tmp_path / "first")
    damaged = _flipped(tmp_path / "first")

    if begun_without:
        with pytest.raises(PassingError):
            modalloy.merge(recipe, out, jobs=1, on_job=switched_off(15))
    with pytest.raises(PassingError):
        modalloy.merge(recipe, out, jobs=1, resume=begun_without, earlier=damaged, on_job=switched_off(2))
    for other in (None, tmp_path / "first"):
        with pytest.raises(OutputError, match=r"took over tensors of an earlier result; give the same --from"):
            modalloy.merge(recipe, out, resume=True, earlier=other)
    with pytest.raises(CheckpointError, match=r"its sha256 is not the one in manifest\.json"):
        modalloy.merge(recipe, out, resume=True, earlier=damaged)
    assert not out.exists()


def test_an_interrupted_merge_from_a_result_is_resumed(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe, out = write_recipe(output=FULL), tmp_path / "out"
    modalloy.merge(recipe, tmp_path / "first")

    with pytest.raises(PassingError):
        modalloy.merge(recipe, out, jobs=1, earlier=tmp_path / "first", on_job=switched_off(2))
    modalloy.merge(recipe, out, resume=True, earlier=tmp_path / "first")
    assert contents(out) == contents(tmp_path / "first")


def test_changed_shares_of_what_a_cut_lost_are_refused(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe(merge_method="ties", output={"form": "adapter", "compress_rank": 2})
    modalloy.merge(recipe, tmp_path / "first")
    manifest = tmp_path / "first" / "manifest.json"
    told = json.loads(manifest.read_text())
    name = next(iter(told["compression"]))
    for changed in (told["compression"] | {name: told["compression"][name] * (1 + 1e-9)}, {}):
        manifest.write_text(json.dumps(told | {"compression": changed}))
        with pytest.raises(CheckpointError, match=r"manifest\.json was changed: `compression` is another"):
            modalloy.merge(recipe, tmp_path / "second", earlier=tmp_path / "first")


def test_nothing_is_written_into_an_earlier_result(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe, first = write_recipe(output=FULL), tmp_path / "first"
    modalloy.merge(recipe, first)
    with pytest.raises(OutputError, match="lies in the earlier result"):
        modalloy.merge(recipe, first / "sub", earlier=first)
    before = contents(first)
    assert modalloy.merge(recipe, first, earlier=first, overwrite=True).n_reused
    assert contents(first) == before

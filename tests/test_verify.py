"""What `verify` finds: every change of a manifest, and merges that are broken on purpose."""

import copy
import importlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import WIDTH, edit_tensors, write_compose
from safetensors.torch import load_file, save_file
from synthetic import write_base, write_lora, write_tuned
from torch import Tensor

import modalloy
from modalloy import linalg, recompute
from modalloy.compute import weighted_updates
from modalloy.delta import LowRank
from modalloy.errors import CheckpointError
from modalloy.outputs import manifest, sources
from modalloy.planning import differences
from modalloy.planning import jobs as planner
from modalloy.planning.plan import Plan
from modalloy.specialists.specialist import StoredLora
from modalloy.storage.folder import file_sha256
from modalloy.verify import Verification, verify

merge = importlib.import_module("modalloy.merging")  # which `modalloy.merging` itself, a function, hides
Json = Any
Path_ = tuple[str | int, ...]
NORM, EMBEDDINGS = "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"
DOWN, UP = "model.layers.1.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"
# single changes of a manifest that are no fault, and why
HARMLESS: dict[Path_, str] = {
    ("modalloy",): "another version of modalloy may have merged it: verify says so",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base of two layers, two adapters and two full fine-tunes."""
    folder = tmp_path_factory.mktemp("models")
    base = write_base(folder / "base", layers=2, width=8, ffn=12, vocabulary=21)
    for seed, rank in enumerate((3, 2), 1):
        write_lora(folder / f"lora{seed}", base, rank=rank, seed=seed)
        write_tuned(folder / f"tuned{seed}", base, seed=seed)
    return folder


def recipe(folder: Path, place: Path, kind: str = "lora", **changes: Any) -> Path:
    """A recipe that merges both models of a kind; keyword arguments replace its keys."""
    entries = [{"model": str(place / f"{kind}{index}")} for index in (1, 2)]
    content = {"base_model": str(place / "base"), "models": entries, "output": {"form": "full"}}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content | {"merge_method": "task_arithmetic"} | changes, sort_keys=False))
    return path


def omni_recipe(folder: Path, base: Path) -> Path:
    """One of a small omni result: a weight of each layer, projectors, tokens."""
    entries = []
    for seed, (disk, modality) in enumerate({"vision": "image", "audio": "audio"}.items()):
        place = write_compose(folder / disk, disk, seed=seed)
        edit_tensors(
            place,
            lambda tensors: [
                tensors.pop(name)
                for name in list(tensors)
                if "lora" in name and "layers.0.self_attn.q_proj" not in name
            ],
        )
        entries.append({"model": str(place), "modality": modality})
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"base_model": str(base), "models": entries, "output": {"form": "omni"}}))
    return path


# --------------------------------------------------------------------------------------------------------- manifests


def places(value: Json, path: Path_ = ()) -> Iterator[Path_]:
    """Every place in a JSON value, its own first."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def other(value: Json) -> list[Json]:
    """Another value of the same type, and one of another."""
    if isinstance(value, bool) or value is None:
        return ["x", 0]
    if isinstance(value, str):
        same = value.replace(value[0], "0" if value[0] != "0" else "1", 1) if value else "x"
        return [same if same != value else f"{value}x", None]
    if isinstance(value, (int, float)):
        return [value * 0.5 + 0.26 if isinstance(value, float) else value + 1, str(value)]
    return [[] if isinstance(value, dict) else {}, 7]


def changes(value: Json) -> Iterator[tuple[Path_, str, Json]]:
    """The value with every single change: replaced, deleted, added."""
    for path in places(value):
        for what in ("replace", "retype", "delete", "add"):
            new = copy.deepcopy(value)
            parent = new
            for key in path[:-1]:
                parent = parent[key]
            here = parent[path[-1]] if path else new
            if what == "add":
                if isinstance(here, dict):
                    here["added"] = next(iter(here.values()), 1)
                elif isinstance(here, list):
                    here.append(copy.deepcopy(here[-1]) if here else 1)
                else:
                    continue
            elif not path:
                new = other(new)[what == "retype"]
            elif what == "delete":
                del parent[path[-1]]
            else:
                parent[path[-1]] = other(here)[what == "retype"]
            yield path, what, new


@pytest.mark.parametrize("form", ["adapter", "full", "omni"])
def test_every_single_change_of_a_manifest_is_noticed(
    form: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--full`, so that what was counted over the whole model, or lost by a cut, is worked out again too."""
    if form == "omni":
        written = omni_recipe(tmp_path, base)
    else:  # with a survey, or with cuts to a rank
        tiny = write_base(tmp_path / "base", layers=1, width=8, ffn=12)
        for seed in (1, 2):
            write_lora(tmp_path / f"lora{seed}", tiny, rank=3, seed=seed, targets="*[qv]_proj.weight")
        asked = {"output": {"form": "adapter", "compress_rank": 2}, "merge_method": "average"}
        asked = asked if form == "adapter" else {"merge_method": "metagpt"}
        written = recipe(tmp_path, tmp_path, modules={"*v_proj*": {"policy": "keep"}}, **asked)
    out = tmp_path / "out"
    modalloy.merge(written, out)
    assert verify(out, full=True).share == 1
    right = json.loads((out / "manifest.json").read_text())
    planned = differences.settled_plan(at_sources(out), allow_base_mismatch=True)  # the inputs do not change here
    monkeypatch.setattr(differences, "settled_plan", lambda recipe, **_: copy.copy(planned))
    monkeypatch.setattr(manifest, "file_sha256", cache(file_sha256))
    monkeypatch.setattr("modalloy.verify.file_sha256", cache(file_sha256))
    checks, seen = importlib.import_module("modalloy.verify").verify_folder, {}

    def once(folder: Path, planned: Plan | None, told: Json, **options: Any) -> Verification:
        key = json.dumps([planned is None, *(told.get(name) for name in ("outputs", "surveys", "compression"))])
        if key not in seen:
            seen[key] = checks(folder, planned, told, **options)
        return seen[key]

    monkeypatch.setattr("modalloy.verify.verify_folder", once)
    missed, tried = [], 0
    for path, what, wrong in changes(right):
        tried += 1
        (out / "manifest.json").write_text(json.dumps(wrong))
        try:
            checked = verify(out, full=True)
        except CheckpointError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
            continue
        if path in HARMLESS and "merged by modalloy" in checked.summary():
            continue
        missed.append((path, what))
    assert not missed and tried > 200


def at_sources(out: Path) -> Any:
    from modalloy.verify import recipe_at

    written = modalloy.load_recipe(out / "recipe.yaml")
    return recipe_at(written, sources.read_sources(out, written))


def test_sources_of_other_types_and_places_are_refused_in_one_line(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    modalloy.merge(recipe(tmp_path, models), out)
    right = json.loads((out / "sources.json").read_text())
    read_by_from = ("made_by", "files", "outputs", "jobs")
    right = {key: value for key, value in right.items() if key not in read_by_from}
    os.mkfifo(tmp_path / "pipe")
    for path, what, wrong in changes(right):
        (out / "sources.json").write_text(json.dumps(wrong))
        if path == ("fingerprint",) and what == "replace":
            continue  # only `--resume` reads it
        with pytest.raises(CheckpointError) as error:
            if verify(out).note:  # a place that is gone is said
                raise CheckpointError("said")
        assert "\n" not in str(error.value), (path, what)
    for place in (
        "/" + "x" * 5000,
        "/\ud800",
        "/a\0b",
        "base",
        str(tmp_path / "pipe"),
        "/dev/zero",
        str(out / "README.md"),
    ):
        (out / "sources.json").write_text(json.dumps(right | {"base": place}))
        with pytest.raises(CheckpointError, match=r"sources\.json|cannot be read"):
            verify(out)
    (out / "sources.json").write_text(json.dumps(right | {"specialists": right["specialists"][::-1]}))
    with pytest.raises(CheckpointError, match="lora2: the lora1 specialist has changed since the merge"):
        verify(out)


@pytest.mark.parametrize("kind", ["link", "link to a folder", "pipe", "link in place of a file"])
def test_what_is_no_plain_file_is_refused(kind: str, models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    modalloy.merge(recipe(tmp_path, models), out)
    if kind == "link":
        (out / "more").symlink_to(out / "README.md")
    elif kind == "link to a folder":
        (out / "more").symlink_to("/etc")
    elif kind == "pipe":
        os.mkfifo(out / "more")
    else:
        (out / "README.md").rename(tmp_path / "elsewhere.md")
        (out / "README.md").symlink_to(tmp_path / "elsewhere.md")
    with pytest.raises(CheckpointError, match=r"(more|README\.md): is a (link|pipe).*; remove it"):
        verify(out)


# -------------------------------------------------------------------------------------------------- broken on purpose


def changed_plan(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[Any, Any], Any]) -> None:
    """Let a method of the planner give something else: change(its result, its arguments)."""
    owner = next(one for one in (planner.Planner, planner.Choices) if name in vars(one))
    right = vars(owner)[name]
    monkeypatch.setattr(owner, name, lambda *arguments: change(right(*arguments), arguments))


def changed_tensors(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any, list[Tensor]], list[Tensor]]) -> None:
    """Let the merge write something else: change(job, its tensors)."""
    right = merge.compute
    monkeypatch.setattr(
        merge,
        "compute",
        lambda job, *rest, **more: (lambda done: replace(done, tensors=change(job, done.tensors)))(
            right(job, *rest, **more)
        ),
    )


def only(slot: str, change: Callable[[Tensor], Tensor]) -> Callable[[Any, list[Tensor]], list[Tensor]]:
    return lambda job, tensors: [*tensors[:-1], change(tensors[-1])] if job.name == slot else tensors


def strong(right: Any, scale: float) -> Any:
    return lambda self, read: replace(right(self, read), scale=scale * self.scale)


Break = Callable[[pytest.MonkeyPatch], None]
BROKEN: dict[str, tuple[str, dict[str, Any], Break, str]] = {
    "a tensor is dropped": (
        "lora",
        {},
        lambda m: changed_plan(m, "full_jobs", lambda jobs, _: [job for job in jobs if job.name != DOWN]),
        DOWN,
    ),
    "scaled by √r": (
        "lora",
        {},
        lambda m: m.setattr(StoredLora, "delta", strong(StoredLora.delta, 3**0.5)),
        r"model\.layers\.0\.mlp\.down_proj\.weight",
    ),
    "one specialist is dropped": (
        "lora",
        {},
        lambda m: changed_plan(
            m, "_merge_job", lambda job, _: replace(job, models=job.models[:1], weights=(1.0,), labels=job.labels[:1])
        ),
        r"model\.layers\.0\.mlp\.down_proj\.weight",
    ),
    "weights do not reach norms": (
        "tuned",
        {"weights": [0.5, 2.0]},
        lambda m: changed_plan(m, "_average_job", lambda job, _: replace(job, weights=(1.0,) * len(job.weights))),
        NORM,
    ),
    "λ does not reach norms": (
        "tuned",
        {"parameters": {"scale": 0.5}},
        lambda m: changed_plan(m, "_mean_factor", lambda *_: 1.0),
        NORM,
    ),
    "the base's is kept where it must be merged": (
        "tuned",
        {},
        lambda m: changed_plan(
            m,
            "full_jobs",
            lambda jobs, _: [
                planner.Job("keep", DOWN, job.outputs, job.start) if job.name == DOWN else job for job in jobs
            ],
        ),
        DOWN,
    ),
    "a matrix is averaged": (
        "tuned",
        {},
        lambda m: changed_plan(m, "_treatment", lambda found, given: "average" if given[1] == DOWN else found),
        DOWN,
    ),
    "embeddings are merged": (
        "tuned",
        {},
        lambda m: changed_plan(m, "_treatment", lambda found, given: "merge" if given[1] == EMBEDDINGS else found),
        EMBEDDINGS,
    ),
    "another λ at one depth": (
        "lora",
        {"parameters": {"scale": [0.5, 1.0]}},
        lambda m: changed_plan(
            m,
            "_resolved",
            lambda found, given: found | {"scale": 0.9} if "layers.1." in str(given[3]) else found,
        ),
        "model.layers.1",
    ),
    "rows are off by one": ("lora", {}, lambda m: changed_tensors(m, only(UP, lambda t: t.roll(1, 0))), UP),
    "cast through bfloat16": (
        "lora",
        {},
        lambda m: changed_tensors(m, only(UP, lambda t: t.to(torch.bfloat16).to(t.dtype))),
        UP,
    ),
    "λ = 0 changes the sign of a zero": (
        "tuned",
        {"parameters": {"scale": 0.0}, "modules": {EMBEDDINGS: {"policy": "average"}}},
        lambda m: changed_tensors(m, only(DOWN, lambda t: t * (1 + 1e-7) + 0.0)),
        DOWN,
    ),
    "an average by a rule is of one model": (
        "tuned",
        {"modules": {EMBEDDINGS: {"policy": "average"}}},
        lambda m: changed_plan(
            m,
            "_average_job",
            lambda job, _: (
                replace(job, models=job.models[:1], weights=job.weights[:1]) if job.name == EMBEDDINGS else job
            ),
        ),
        EMBEDDINGS,
    ),
    "what a rule keeps is changed": (
        "tuned",
        {"modules": {DOWN: {"policy": "keep"}}},
        lambda m: changed_tensors(m, only(DOWN, lambda t: t + 1e-6)),
        DOWN,
    ),
    "factors of an adapter": (
        "lora",
        {"output": {"form": "adapter"}},
        lambda m: changed_tensors(m, only(UP, lambda t: 1.001 * t)),
        UP,
    ),
    "an adapter that is cut to less than it was to be": (
        "lora",
        {"output": {"form": "adapter", "compress_rank": 3}},
        lambda m: changed_tensors(m, only(UP, lambda t: torch.cat([t[:, :2], 0 * t[:, 2:]], 1))),
        UP,
    ),
}


def write_unchecked(monkeypatch: pytest.MonkeyPatch, written: Path, out: Path) -> None:
    """Merge without the check at its end."""
    with monkeypatch.context() as patch:
        patch.setattr(merge, "verify_folder", lambda *_, **__: Verification(0, 0, 0, None))
        modalloy.merge(written, out)


@pytest.mark.parametrize(("kind", "asked", "wrong", "named"), BROKEN.values(), ids=BROKEN)
def test_a_merge_that_is_broken_on_purpose_is_found(
    kind: str,
    asked: dict[str, Any],
    wrong: Break,
    named: str,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By `verify` of the result, whose hashes and fates fit; the planner is as wrong as it was."""
    asked = dict(asked)
    if weights := asked.pop("weights", None):
        entries = [{"model": str(models / f"{kind}{i}"), "parameters": {"weight": w}} for i, w in enumerate(weights, 1)]
        asked["models"] = entries
    written = recipe(tmp_path, models, kind, **asked)
    modalloy.merge(written, tmp_path / "right")
    wrong(monkeypatch)
    write_unchecked(monkeypatch, written, tmp_path / "out")
    with pytest.raises(CheckpointError, match=f"{named}.*(differs from|is missing)") as error:
        verify(tmp_path / "out")
    assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match=named):  # and the merge's own check
        modalloy.merge(written, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_experts_that_are_averaged_whatever_the_method_are_found(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    for index, folder in enumerate(("base", "tuned1", "tuned2")):
        shutil.copytree(models / folder, tmp_path / folder)
        path = tmp_path / folder / "model.safetensors"
        save_file(load_file(path) | {name: torch.full((2, 8, 4), 0.5 + index)}, path, metadata={"format": "pt"})
    written = recipe(tmp_path, tmp_path, "tuned")
    modalloy.merge(written, tmp_path / "right")
    assert load_file(tmp_path / "right" / "model.safetensors")[name].unique() == 3.5
    changed_plan(monkeypatch, "_treatment", lambda found, given: "average" if given[1] == name else found)
    write_unchecked(monkeypatch, written, tmp_path / "out")
    with pytest.raises(CheckpointError, match=rf"{name}\[0\] differs from what the recipe gives"):
        verify(tmp_path / "out")


def forged(out: Path, name: str, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change a result's weights, or a file of JSON, and its hash in the manifest."""
    path = out / name
    if name.endswith(".json"):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    else:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
    told = json.loads((out / "manifest.json").read_text())
    told["outputs"][name] = file_sha256(path)
    (out / "manifest.json").write_text(json.dumps(told))


def test_layers_that_are_swapped_are_found(models: Path, tmp_path: Path) -> None:
    modalloy.merge(recipe(tmp_path, models), tmp_path / "out")

    def swap(tensors: dict[str, Tensor]) -> None:
        first = DOWN.replace(".1.", ".0.")
        tensors[first], tensors[DOWN] = tensors[DOWN], tensors[first]

    forged(tmp_path / "out", "model.safetensors", swap)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.down_proj\.weight differs"):
        verify(tmp_path / "out")


@pytest.mark.parametrize("name", ["model.modal_projectors.audio.2.bias", "prefix_tokens.vision"])
def test_a_carried_tensor_that_changed_by_one_bit_is_found(name: str, base: Path, tmp_path: Path) -> None:
    modalloy.merge(omni_recipe(tmp_path, base), tmp_path / "out")
    assert verify(tmp_path / "out").recomputed["carried"] == 16
    forged(
        tmp_path / "out",
        "adapter_model.safetensors",
        lambda tensors: tensors[name].view(torch.int32).view(-1)[:1].add_(1),
    )
    with pytest.raises(
        CheckpointError, match=f"{name} differs from what the recipe gives: it must be its specialist's"
    ):
        verify(tmp_path / "out")


def test_a_tensor_that_nobody_asked_for_is_found(models: Path, tmp_path: Path) -> None:
    modalloy.merge(recipe(tmp_path, models), tmp_path / "out")
    forged(tmp_path / "out", "model.safetensors", lambda tensors: tensors.update(more=torch.zeros(WIDTH)))
    with pytest.raises(CheckpointError, match="holds more, which the recipe does not give"):
        verify(tmp_path / "out")


def test_a_config_that_scales_the_result_otherwise_is_found(models: Path, tmp_path: Path) -> None:
    modalloy.merge(recipe(tmp_path, models, output={"form": "adapter"}), tmp_path / "out")
    forged(tmp_path / "out", "adapter_config.json", lambda config: config.update(lora_alpha=99))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: lora_alpha is 99, but recipe and inputs give 5"):
        verify(tmp_path / "out")


def test_a_survey_that_was_wrong_at_the_merge_is_found_with_full(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = merge.survey

    def wrong(*of: Any) -> dict[str, dict[str, Any]]:
        return {group: {"weights": [0.75, 0.25]} for group in right(*of)}

    monkeypatch.setattr(merge, "survey", wrong)
    modalloy.merge(recipe(tmp_path, models, merge_method="metagpt"), tmp_path / "out")
    assert verify(tmp_path / "out").share == 1
    with pytest.raises(CheckpointError, match=r"surveys: .*metagpt.* is .*0\.75.* but the inputs give"):
        verify(tmp_path / "out", full=True)


def test_a_sample_says_how_much_it_is_and_full_finds_every_layer(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    modalloy.merge(recipe(tmp_path, models, output={"form": "full", "max_shard_size": "1KB"}), out)
    monkeypatch.setattr("modalloy.verify.SMALL_BYTES", 0)
    sampled = verify(out)
    assert sampled.recomputed["merged"] == 12 and sampled.of == {"merged": 14, "kept": 4} and 0 < sampled.share < 1
    assert "12 of 14 merged, 4 of 4 kept tensors" in sampled.summary() and "--full recomputes all" in sampled.summary()
    whole = verify(out, full=True)
    assert whole.recomputed == whole.of and whole.share == 1 and "100 % of the parameters" in whole.summary()
    for path in sorted(out.glob("*.safetensors")):
        before, told = path.read_bytes(), (out / "manifest.json").read_bytes()
        forged(out, path.name, lambda tensors: [tensor.neg_() for tensor in tensors.values()])
        with pytest.raises(CheckpointError, match="differs from what the recipe gives"):
            verify(out, full=True)
        path.write_bytes(before)
        (out / "manifest.json").write_bytes(told)


def test_a_sample_is_not_the_same_one_every_time(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modalloy.merge(recipe(tmp_path, models, output={"form": "full"}), tmp_path / "out")  # one file, which adds no other
    monkeypatch.setattr("modalloy.verify.SMALL_BYTES", 0)
    monkeypatch.setattr("modalloy.verify.SAMPLED", 1)
    drawn = {verify(tmp_path / "out").worst_error for _ in range(6)}
    assert len(drawn) > 1


def test_a_changed_config_of_the_base_is_found(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "base", tmp_path / "base")
    modalloy.merge(recipe(tmp_path, models, base_model=str(tmp_path / "base")), tmp_path / "out")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"vocab_size": 8}))
    with pytest.raises(CheckpointError, match="base: the base has changed since the merge"):
        verify(tmp_path / "out")


def test_pieces_are_the_whole_tensor() -> None:
    from modalloy.storage.tensors import TensorRef

    ref = TensorRef("x", torch.float16, (5, 3), Path("x"), 100)
    assert [(one.shape, one.begin) for one in recompute.parts_of(ref, 4)] == [
        ((4,), 100),
        ((4,), 108),
        ((4,), 116),
        ((3,), 124),
    ]


def test_means_between_two_neighbours_may_be_rounded_to_either(models: Path, tmp_path: Path) -> None:
    folder, draw = tmp_path / "models", torch.Generator().manual_seed(0)
    base = {name: tensor.bfloat16() for name, tensor in load_file(models / "base" / "model.safetensors").items()}
    for name, steps in (("base", 0), ("tuned1", 3), ("tuned2", 3)):
        shutil.copytree(models / "base", folder / name)
        moved = dict(base)
        for key in (key for key in base if key.endswith("proj.weight")):
            bits = base[key].view(torch.int16) + torch.randint(steps + 1, base[key].shape, generator=draw)
            moved[key] = bits.to(torch.int16).view(
                torch.bfloat16
            )  # half of their means are in the middle of two values
        save_file(moved, folder / name / "model.safetensors", metadata={"format": "pt"})
    modalloy.merge(recipe(tmp_path, folder, "tuned", merge_method="ssam"), tmp_path / "out")
    found = verify(tmp_path / "out", full=True)
    assert found.recomputed == found.of and found.worst_error is not None and found.worst_error < 1e-6

    def one_step_further(tensors: dict[str, Tensor]) -> None:
        tensors[DOWN].view(torch.int16)[0, 0] += 1

    forged(tmp_path / "out", "model.safetensors", one_step_further)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.down_proj\.weight differs"):
        verify(tmp_path / "out", full=True)


def test_what_a_merge_recomputes_holds_every_place_of_a_layer_over_all_depths() -> None:
    places = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
    names = [f"model.layers.{layer}.{place}.weight" for layer in range(32) for place in places]
    some = recompute.spread_over_places(names, str)
    assert len(some) == recompute.CHECKED and some == sorted(some, key=names.index)
    assert {name.split(".", 3)[3] for name in some} == {f"{place}.weight" for place in places}
    depths = [int(name.split(".")[2]) for name in some]
    assert min(depths) == 0 and max(depths) == 31 and max(b - a for a, b in pairwise(depths)) < 8
    unequal = [f"model.layers.{layer}.norm.weight" for layer in range(32)] + ["model.norm.weight"]
    assert len(recompute.spread_over_places(unequal, str)) == recompute.CHECKED
    many = [f"model.layers.{layer}.part{kind}.weight" for layer in range(4) for kind in range(40)]
    assert len(recompute.spread_over_places(many, str)) == 40  # one of each
    assert recompute.spread_over_places(names[:1], str) == names[:1] and not recompute.spread_over_places([], str)


@pytest.mark.parametrize("method", ["task_arithmetic", "ssam"])
@pytest.mark.parametrize("kind", ["lora", "tuned"])
def test_a_result_in_float64_is_right(method: str, kind: str, models: Path, tmp_path: Path) -> None:
    """What is compared in float64 is not what was written or read, which stay as they are."""
    for folder in models.iterdir():
        shutil.copytree(folder, tmp_path / "models" / folder.name)
        if (file := tmp_path / "models" / folder.name / "model.safetensors").is_file():
            save_file({name: tensor.double() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    out = tmp_path / "out"
    modalloy.merge(recipe(tmp_path, tmp_path / "models", kind, merge_method=method, output={"form": "full"}), out)
    assert next(iter(load_file(out / "model.safetensors").values())).dtype == torch.float64
    assert verify(out, full=True).worst_error is not None


@pytest.mark.parametrize(("kind", "method"), [("lora", "ssam"), ("tuned", "task_arithmetic"), ("tuned", "ties")])
def test_a_merge_checks_rows_of_large_weights_from_the_first_to_the_last(
    kind: str, method: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modalloy.verify.SMALL_BYTES", 0)
    monkeypatch.setattr(linalg, "BLOCK_ENTRIES", 8)  # one row
    monkeypatch.setattr(recompute, "BLOCKS", 3)
    written = recipe(tmp_path, models, kind, merge_method=method)
    found = modalloy.merge(written, tmp_path / "right").verification
    assert found.recomputed["merged"] >= 7 and 0 < found.share < 0.5 and (found.worst_error or 0) < 1e-5

    def doubled(row: int) -> Callable[[Any, list[Tensor]], list[Tensor]]:
        def change(job: Any, tensors: list[Tensor]) -> list[Tensor]:
            if job.kind == "merge":
                tensors[-1][row] *= 2
            return tensors

        return change

    for row in (0, -1):
        with monkeypatch.context() as patch:
            changed_tensors(patch, doubled(row))
            with pytest.raises(CheckpointError, match="differs from what the recipe gives"):
                modalloy.merge(written, tmp_path / "broken")
    changed_tensors(monkeypatch, doubled(1))  # which is none of the three
    modalloy.merge(written, tmp_path / "out")
    with pytest.raises(CheckpointError, match="differs from what the recipe gives"):
        verify(tmp_path / "out")


@pytest.mark.parametrize("names", [("lora1", "tuned2"), ("lora1", "lora2"), ("tuned1", "tuned2")])
@pytest.mark.parametrize("rule", [{}, {"*.up_proj.*": {"policy": "average"}}])
def test_rows_are_checked_of_factors_and_tuned_copies_alike(
    names: tuple[str, str], rule: dict[str, Any], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modalloy.verify.SMALL_BYTES", 0)
    monkeypatch.setattr(linalg, "BLOCK_ENTRIES", 8)
    monkeypatch.setattr(recompute, "BLOCKS", 3)
    entries = [{"model": str(models / name)} for name in names]
    written = recipe(tmp_path, models, models=entries, missing="zero", **({"modules": rule} if rule else {}))
    assert 0 < modalloy.merge(written, tmp_path / "out").verification.share < 0.5
    assert verify(tmp_path / "out", full=True).share == 1


def test_a_single_number_is_one_row() -> None:
    assert linalg.row_blocks(()) == linalg.row_blocks((1,)) == [slice(0, 1)]


def test_scale_and_weight_are_rounded_in_the_order_that_the_check_has(models: Path, tmp_path: Path) -> None:
    """Methods that pick entries pick others after another rounding: in float32, α/r of the factors and then the weight."""
    shutil.copytree(models, tmp_path / "models")
    for index in (1, 2):
        config = tmp_path / f"models/lora{index}/adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 0.7}))
    entries = [
        {"model": str(tmp_path / f"models/lora{index}"), "parameters": {"weight": weight}}
        for index, weight in ((1, 0.7), (2, 1.3))
    ]
    planned = modalloy.plan(modalloy.load_recipe(recipe(tmp_path, models, models=entries, merge_method="ties")))
    for job in planned.merges():
        for model, weight, update in zip(
            job.models, job.weights, weighted_updates(job, planned.inputs.read), strict=True
        ):
            assert isinstance(model, StoredLora) and isinstance(update, LowRank)
            assert torch.equal(update.up, weight * (planned.inputs.read(model.b) * model.scale))


@pytest.mark.parametrize("method", ["tsv", "wudi", "ssam"])
def test_nearly_dependent_specialists_pass_the_check(method: str, models: Path, tmp_path: Path) -> None:
    """What rounding makes of their difference is large in the merge."""
    for index in (1, 2):
        shutil.copytree(models / "lora1", tmp_path / f"lora{index}")
        config = tmp_path / f"lora{index}/adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 0.9}))
    edit_tensors(tmp_path / "lora2", _moved_a_little)
    entries = [{"model": str(tmp_path / f"lora{index}")} for index in (1, 2)]
    written = modalloy.merge(recipe(tmp_path, models, models=entries, merge_method=method), tmp_path / "out").out
    assert verify(written, full=True).worst_error is not None


def _moved_a_little(tensors: dict[str, Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        tensors[name] = tensor * 1.001 + 1e-5 * torch.randn(tensor.shape, generator=generator)

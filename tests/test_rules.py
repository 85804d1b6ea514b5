"""What recipes can say of single weights, depths, types and files, each held to NumPy in float64."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
import yaml
from safetensors.torch import load_file, save_file
from synthetic import factors_of, linear_shapes, tensors_of, updates_of, write_base, write_lora, write_tuned
from test_methods import ON_FACTORS

import modalloy
from modalloy.errors import CheckpointError, MethodError, RecipeError
from modalloy.merging import MergeReport
from modalloy.methods import METHODS
from modalloy.planning.plan import Plan
from modalloy.verify import verify

LAYERS = 5
SLOTS = linear_shapes(16, 24, LAYERS)
Deltas = list[np.ndarray]
WriteRecipe = Callable[..., Path]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base of five layers, two adapters (of ranks 4 and 3) and two full fine-tunes."""
    folder = tmp_path_factory.mktemp("small")
    base = write_base(folder / "base", layers=LAYERS)
    for seed, rank in enumerate((4, 3), 1):
        write_lora(folder / f"lora{seed}", base, rank=rank, seed=seed)
        write_tuned(folder / f"tuned{seed}", base, seed=seed)
    return folder


@pytest.fixture
def recipe(small: Path, tmp_path: Path) -> WriteRecipe:
    """Writes a recipe that merges `kind`1 and `kind`2 into a full model; keyword arguments replace its keys."""

    def write(kind: str = "lora", **changes: Any) -> Path:
        models = [{"model": str(small / f"{kind}{index}")} for index in (1, 2)]
        content = {"base_model": str(small / "base"), "models": models, "output": {"form": "full"}}
        content |= {"merge_method": "task_arithmetic"} | changes
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))  # the order of rules counts
        return tmp_path / "recipe.yaml"

    return write


@pytest.fixture
def merged(recipe: WriteRecipe, small: Path, tmp_path: Path) -> Callable[..., dict[str, np.ndarray]]:
    """The update of every tensor after the merge of a recipe with these changes, which `verify` must find right."""

    def run(kind: str = "lora", **changes: Any) -> dict[str, np.ndarray]:
        modalloy.merge(recipe(kind, **changes), tmp_path / "out")
        verify(tmp_path / "out")
        return updates_of(tmp_path / "out", small / "base", scale=1)

    return run


def plan(recipe: Path) -> Plan:
    return modalloy.plan(modalloy.load_recipe(recipe))


def inputs(small: Path, kind: str = "lora") -> dict[str, Deltas]:
    """The updates of both specialists, by tensor."""
    first, second = (updates_of(small / f"{kind}{index}", small / "base") for index in (1, 2))
    return {slot: [first[slot], second[slot]] for slot in first}


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def layer(slot: str) -> int:
    return int(slot.split(".")[2])


# ---------------------------------------------------------------------------------------------------------- modules

average = {"policy": "average"}
keep = {"policy": "keep"}
RULES: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[str, Deltas], np.ndarray]]] = {
    "keep": (
        {},
        {"*.mlp.*": keep},
        lambda slot, d: 0 * d[0] if ".mlp." in slot else sum(d),
    ),
    "average": (
        {"parameters": {"scale": 3.0}},
        {"*q_proj*": average},
        lambda slot, d: 3 * (d[0] + d[1]) / 2 if "q_proj" in slot else 3 * sum(d),  # λ reaches what is averaged
    ),
    "another method": (
        {"merge_method": "ssam", "parameters": {"rank": 2, "scale": 0.7}},
        {"model.layers.[01].*": {"merge_method": "ties", "parameters": {"density": 0.4}}},
        lambda slot, d: reference.ties(d, 0.4, "mean", 1) if layer(slot) < 2 else reference.ssam(d, 2, 0.7),
    ),
    "another method starts from its own defaults": (
        {"parameters": {"scale": 3.0}},
        {"*k_proj*": {"merge_method": "linear"}},
        lambda slot, d: (d[0] + d[1]) / 4 if "k_proj" in slot else 3 * sum(d),
    ),
    "the same method keeps what the rule does not change": (
        {"merge_method": "ties", "parameters": {"density": 0.5, "scale": 2.0}},
        {
            "*gate*": {"parameters": {"density": 0.1}},
            "*up*": {"merge_method": "ties", "parameters": {"combine": "max"}},
        },
        lambda slot, d: reference.ties(d, 0.1 if "gate" in slot else 0.5, "max" if "up_proj" in slot else "mean", 2),
    ),
    "the first that matches counts": (
        {},
        {"*layers.3.mlp*": {"parameters": {"scale": -1.0}}, "*mlp*": keep, "*": average},
        lambda slot, d: (-1 if "3.mlp" in slot else 0 if "mlp" in slot else 0.5) * sum(d),
    ),
}


@pytest.mark.parametrize(("changes", "modules", "wanted"), RULES.values(), ids=RULES)
def test_rules(
    changes: dict[str, Any],
    modules: dict[str, Any],
    wanted: Callable[[str, Deltas], np.ndarray],
    merged: Callable[..., dict[str, np.ndarray]],
    small: Path,
) -> None:
    found = merged(**changes, modules=modules)
    for slot, deltas in inputs(small).items():
        right = wanted(slot, deltas)
        if right.any():
            assert relative(found[slot], right) < 2e-6, slot
        else:
            assert not found[slot].any(), slot
    assert not any(found[name].any() for name in found.keys() - inputs(small).keys())


def test_kept_weights_are_in_no_adapter(recipe: WriteRecipe, small: Path, tmp_path: Path) -> None:
    rules = {"*layers.0.*": keep, "*v_proj*": keep}
    modalloy.merge(recipe(output={"form": "adapter"}, modules=rules), tmp_path / "out")
    kept = {slot for slot in SLOTS if layer(slot) == 0 or "v_proj" in slot}
    found = factors_of(tmp_path / "out")
    assert found.keys() == SLOTS.keys() - kept
    targets = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"]
    reached = {slot for slot in SLOTS if any(slot.removesuffix(".weight").endswith(target) for target in targets)}
    assert reached == found.keys()  # PEFT makes factors for these and no others
    stem, fates = "model.layers.0.mlp.up_proj", plan(recipe(modules=rules)).fates
    said = {(fate.source, fate.tensor): (fate.fate, fate.detail) for fate in fates}
    reason = "modules: *layers.0.* keeps the base's"
    assert said["base", f"{stem}.weight"] == ("kept", reason)
    assert said["lora1", f"base_model.model.{stem}.lora_A.weight"] == ("left out", reason)


def test_rules_for_what_full_models_tune_beside_linear_weights(
    merged: Callable[..., dict[str, np.ndarray]], small: Path
) -> None:
    embeddings = "model.embed_tokens.weight"
    found = merged("tuned", modules={embeddings: average, "*layers.0.input_layernorm*": keep, "*resampler*": average})
    for name, deltas in inputs(small, "tuned").items():
        right = sum(deltas) / (2 if name in (embeddings, "model.resampler.weight") or "norm" in name else 1)
        if name == "model.layers.0.input_layernorm.weight":
            assert not found[name].any()
        else:
            assert relative(found[name], right) < 2e-6, name


# --------------------------------------------------------------------------------------------------------- refusals

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "modules: nothing": ({"modules": {"*mllp*": keep}}, r"modules: no tensor matches '\*mllp\*'; "),
    "ignore: nothing": ({"ignore": ["*lora_C*"]}, r"ignore: no tensor matches '\*lora_C\*'; "),
    "ignore: a tensor of the base only": (
        {"ignore": ["model.embed_tokens.weight"]},
        r"ignore: no tensor matches 'model\.embed_tokens\.weight'",
    ),
    "policy and method": (
        {"modules": {"*mlp*": keep | {"merge_method": "ties"}}},
        r"modules\.\*mlp\*: policy 'keep' takes no merge_method or parameters; write one or the other",
    ),
    "policy and parameters": (
        {"modules": {"*mlp*": average | {"parameters": {"scale": 1}}}},
        r"policy 'average' takes no merge_method or parameters",
    ),
    "no rule": ({"modules": {"*mlp*": {}}}, r"modules\.\*mlp\*: says nothing; write policy: keep, "),
    "policy": ({"modules": {"*mlp*": {"policy": "drop"}}}, r"modules\.\*mlp\*\.policy: .*'keep', 'average', .*'drop'"),
    "key": ({"modules": {"*": {"method": "ties"}}}, r"unknown key 'modules\.\*\.method'; did you mean 'merge_method'"),
    "method": (
        {"modules": {"*mlp*": {"merge_method": "tise"}}},
        r"modules\.\*mlp\*: unknown merge method 'tise'; did you mean 'ties'",
    ),
    "parameter": (
        {"modules": {"*mlp*": {"merge_method": "ties", "parameters": {"densty": 0.1}}}},
        r"modules\.\*mlp\*: method 'ties' has no parameter 'densty'; did you mean 'density'",
    ),
    "parameter of the recipe's method": (
        {"modules": {"*mlp*": {"parameters": {"density": 0.1}}}},
        r"modules\.\*mlp\*: method 'task_arithmetic' has no parameter 'density'; ",
    ),
    "value": (
        {"modules": {"*mlp*": {"merge_method": "ties", "parameters": {"density": 2}}}},
        r"modules\.\*mlp\*: density: 2 is out of range; it must be less than or equal to 1",
    ),
    "rules that are no table": ({"modules": [keep]}, r"modules: .*dictionary"),
    "missing": ({"missing": "drop"}, r"missing: .*'refuse' or 'zero'.*found 'drop'"),
    "list: empty": (
        {"parameters": {"scale": []}},
        r"scale: an empty list; give one value, or one or more over the depth",
    ),
    "list: empty weight": ({"weight": []}, r"models\.0\.parameters\.weight: an empty list; give one value"),
    "list: of text": ({"parameters": {"scale": [1, "x"]}}, r"scale: 'x' is not a finite number"),
    "list: auto": (
        {"parameters": {"scale": ["auto", 1.0]}},
        r"scale: 'auto' cannot be in a list over the depth; it must hold numbers only",
    ),
    "list: energy": (
        {"merge_method": "ssam", "parameters": {"rank": [{"energy": 0.9}, 4]}},
        r"rank: \{'energy': 0\.9\} cannot be in a list",
    ),
    "list: choices": (
        {"merge_method": "ties", "parameters": {"combine": ["mean", "max"]}},
        r"combine: 'mean' cannot be in a list",
    ),
    "list: out of range": (
        {"merge_method": "ties", "parameters": {"density": [0.5, 0]}},
        r"density: 0 is out of range",
    ),
    "list: fraction of a rank": (
        {"merge_method": "ssam", "parameters": {"rank": [2, 3.5]}},
        r"rank: 3\.5 is not a whole",
    ),
    "weight infinite": ({"weight": [1, math.inf]}, r"models\.0\.parameters\.weight: inf is not a finite number"),
    "dtype": ({"dtype": "bf16"}, r"dtype: .*'float32' or 'float64'.*found 'bf16'"),
    "out_dtype": ({"out_dtype": "bf16"}, r"out_dtype: .*'float32', 'bfloat16' or 'float16'.*found 'bf16'"),
    "two types": (
        {"out_dtype": "float16", "output": {"form": "full", "dtype": "bfloat16"}},
        r"out_dtype float16 contradicts output\.dtype bfloat16; write one of them",
    ),
    "compress_rank 0": ({"output": {"compress_rank": 0}}, r"output\.compress_rank: .*greater than or equal to 1"),
    "compress_rank 1.5": ({"output": {"compress_rank": 1.5}}, r"output\.compress_rank: .*integer"),
    "compress_rank of a full model": (
        {"output": {"form": "full", "compress_rank": 4}},
        r"output\.compress_rank is of adapters, but form: full holds full matrices; remove it",
    ),
    "full matrices in an adapter": (
        {"merge_method": "ties", "output": {"form": "adapter"}},
        r"ties gives a full matrix for model\.layers\.0\.mlp\.down_proj\.weight, which an adapter cannot hold; "
        r"write form: full, or output\.compress_rank: k",
    ),
    "full matrices of one rule in an adapter": (
        {"modules": {"*v_proj*": {"merge_method": "fisher"}}, "output": {"form": "adapter"}},
        r"fisher gives a full matrix for model\.layers\.0\.self_attn\.v_proj\.weight",
    ),
    "a method for norms": (
        {"modules": {"*norm*": {"merge_method": "ties"}}},
        r"modules: '\*norm\*' names a method or its parameters, but no weight .* is merged by one; write policy: keep or average",
    ),
    "no Fisher file": (
        {"merge_method": "fisher"},
        r"lora1 specialist: .* Fisher information; give parameters: \{fisher: F",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(changes: dict[str, Any], message: str, recipe: WriteRecipe, small: Path) -> None:
    if "weight" in changes:
        changes = {"models": [{"model": str(small / "lora1"), "parameters": changes}]}
    with pytest.raises(RecipeError) as error:
        plan(recipe(**changes))
    assert re.search(message, str(error.value)), error.value


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            {},
            r"scale: \[0\.0, 1\.0\] goes over the layers, but model\.resampler\.weight is in none; give it a value of its own",
        ),
        (
            {"parameters": {"scale": 3}},
            r"weight: \[1\.0, 2\.0\] goes over .* give one number, or keep the base's by `modules:`",
        ),
    ],
)
def test_a_list_and_a_weight_in_no_layer(rule: Any, message: str, recipe: WriteRecipe, small: Path) -> None:
    models = [{"model": str(small / "tuned1"), "parameters": {"weight": [1, 2] if rule else 1}}]
    changes = {"models": models, "parameters": {"scale": [0.0, 1.0]}}
    with pytest.raises(RecipeError, match=message):
        plan(recipe(**changes, modules={"*resampler*": rule} if rule else {}))
    for remedy in [keep] if rule else [keep, {"parameters": {"scale": 3}}]:
        assert plan(recipe(**changes, modules={"*resampler*": remedy})).merged_weights() >= len(SLOTS)


# -------------------------------------------------------------------------------------------------- missing, ignore


def test_adapters_of_different_target_modules(
    merged: Callable[..., dict[str, np.ndarray]], recipe: WriteRecipe, small: Path, tmp_path: Path
) -> None:
    for index, targets in enumerate(("*self_attn*", "*[qg]*_proj.weight"), 1):
        write_lora(tmp_path / f"part{index}", small / "base", targets=targets, rank=2, seed=index)
    models = [{"model": str(tmp_path / f"part{index}")} for index in (1, 2)]
    with pytest.raises(
        CheckpointError, match=r"part1 specialist: has no update of \S+gate_proj.* the part2 specialist has"
    ):
        plan(recipe(models=models))
    found = merged(models=models, missing="zero", merge_method="average")
    updates = [updates_of(tmp_path / f"part{index}", small / "base") for index in (1, 2)]
    names = updates[0].keys() | updates[1].keys()
    assert len(names) == 5 * LAYERS and updates[0].keys() != names != updates[1].keys()
    for name in found:
        right = sum(update[name] for update in updates if name in update) / 2
        assert relative(found[name], right) < 2e-6 if name in names else not found[name].any()


def test_full_model_without_a_layer(
    merged: Callable[..., dict[str, np.ndarray]], recipe: WriteRecipe, small: Path, tmp_path: Path
) -> None:
    write_tuned(tmp_path / "cut", small / "base", seed=2, without="*layers.4.*")
    models = [{"model": str(small / "tuned1")}, {"model": str(tmp_path / "cut")}]
    with pytest.raises(
        CheckpointError, match=r"cut specialist: has no update of model\.layers\.4.*\(7 weights in all\)"
    ):
        plan(recipe(models=models))
    found = merged(models=models, missing="zero", merge_method="ties", parameters={"density": 0.5})
    for name, (first, second) in inputs(small, "tuned").items():
        cut = "layers.4" in name
        if "norm" in name:  # the mean over those that have it
            right = first if cut else (first + second) / 2
        else:
            right = reference.ties([first, 0 * second if cut else second], 0.5, "mean", 1)
        assert name == "model.embed_tokens.weight" or relative(found[name], right) < 2e-6, name


def test_ignored_tensors_are_left_out(merged: Callable[..., dict[str, np.ndarray]], small: Path) -> None:
    models = [{"model": str(small / "lora1")}]
    found = merged(models=models, ignore=["*.down_proj.lora_?.weight", "*layers.0.*"])
    for slot, (delta, _) in inputs(small).items():
        if "down_proj" in slot or layer(slot) == 0:
            assert not found[slot].any()
        else:
            assert relative(found[slot], delta) < 2e-6


# ------------------------------------------------------------------------------------------------ depth and weights

GRADIENTS: dict[str, tuple[list[float], list[float]]] = {
    "two": ([0.2, 1.0], [0.2, 0.4, 0.6, 0.8, 1.0]),
    "whole numbers of a fraction": ([0, 2], [0, 0.5, 1, 1.5, 2]),
    "three": ([1.0, -1.0, 3.0], [1, 0, -1, 1, 3]),
    "four": ([0.0, 3.0, 0.0, 3.0], [0, 2.25, 1.5, 0.75, 3]),
    "one": ([0.3], [0.3] * 5),
    "many": ([1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 3, 5, 7, 9]),
}


@pytest.mark.parametrize(("values", "wanted"), GRADIENTS.values(), ids=GRADIENTS)
def test_scale_and_weight_over_the_depth(
    values: list[float], wanted: list[float], merged: Callable[..., dict[str, np.ndarray]], small: Path
) -> None:
    models = [
        {"model": str(small / "lora1"), "parameters": {"weight": values}},
        {"model": str(small / "lora2"), "parameters": {"weight": -0.5}},
    ]
    found = merged(models=models, parameters={"scale": values})
    for slot, (first, second) in inputs(small).items():
        at = wanted[layer(slot)]
        if at:
            assert relative(found[slot], at * (at * first - 0.5 * second)) < 2e-6, slot
        else:
            assert not found[slot].any()


def test_rank_over_the_depth(merged: Callable[..., dict[str, np.ndarray]], small: Path) -> None:
    found = merged(merge_method="ssam", parameters={"rank": [1, 7], "scale": 1.0})
    for slot, deltas in inputs(small).items():
        rank = [1, 2, 4, 6, 7][layer(slot)]  # 1, 2.5, 4, 5.5, 7: halves go to the even number
        assert relative(found[slot], reference.ssam(deltas, rank, 1.0)) < 2e-6, slot


@pytest.mark.parametrize("method", ["ties", "ssam", "tsv"])
def test_weights_come_first_and_are_not_normalised(
    method: str, merged: Callable[..., dict[str, np.ndarray]], small: Path
) -> None:
    weights = (3.0, 0.5)
    models = [{"model": str(small / f"lora{i}"), "parameters": {"weight": w}} for i, w in enumerate(weights, 1)]
    found = merged(models=models, merge_method=method)
    for slot, deltas in inputs(small).items():
        weighed = [weight * delta for weight, delta in zip(weights, deltas, strict=True)]
        assert relative(found[slot], expected(method, weighed)) < 5e-6, slot
        assert relative(found[slot], expected(method, deltas)) > 0.1


def expected(method: str, deltas: Deltas, **given: Any) -> np.ndarray:
    """The reference's result with the package's default parameters."""
    parameters = {name: value for name, value in METHODS[method].parameters.items() if value != "auto"}
    if "scale" in METHODS[method].parameters:
        parameters["scale"] = 1 / len(deltas) if method in ("ssam", "average", "damc", "do_merging") else 1.0
    if method == "ssam":
        parameters["rank"] = 4
    parameters |= {
        name: "auto"
        for name in ("rank", "lr", "density")
        if method != "ssam" and METHODS[method].parameters.get(name) == "auto"
    }
    return getattr(reference, method)(deltas, **parameters | given)


# ------------------------------------------------------------------------------------------------------------ types


def test_float64_arithmetic(recipe: WriteRecipe, small: Path, tmp_path: Path) -> None:
    """Written in float32 either way, the sum of 16 updates that nearly cancel keeps more digits."""
    models = [{"model": str(small / "lora1"), "parameters": {"weight": w}} for w in [20 + 1 / 3, -20] * 8]
    errors = {}
    for dtype in ("float32", "float64"):
        modalloy.merge(recipe(models=models, dtype=dtype), tmp_path / dtype)
        found, base = tensors_of(tmp_path / dtype), tensors_of(small / "base")
        factor = 8 / 3
        wanted = {slot: base[slot] + factor * delta for slot, (delta, _) in inputs(small).items()}
        errors[dtype] = max(relative(found[slot], wanted[slot]) for slot in SLOTS)
        assert load_file(tmp_path / dtype / "model.safetensors")[next(iter(SLOTS))].dtype == torch.float32
    assert errors["float64"] < 5e-8 < 1e-6 < errors["float32"]


@pytest.mark.parametrize("form", ["full", "adapter"])
@pytest.mark.parametrize("changes", [{"out_dtype": "float16"}, {"dtype": "float16"}])
def test_output_type(form: str, changes: dict[str, str], recipe: WriteRecipe, small: Path, tmp_path: Path) -> None:
    output = {"form": form} | ({"dtype": "float16"} if "dtype" in changes else {})
    outer = {key: value for key, value in changes.items() if key == "out_dtype"}
    modalloy.merge(recipe(output=output, **outer), tmp_path / "out")
    written = load_file(next((tmp_path / "out").glob("*.safetensors")))
    assert {tensor.dtype for tensor in written.values()} == {torch.float16}
    if form == "full":
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["dtype"] == "float16" and "torch_dtype" not in config
        base = tensors_of(small / "base")
        for slot, deltas in inputs(small).items():  # one rounding, of the sum
            ulp = np.spacing(np.abs(base[slot] + sum(deltas)).astype(np.float16)).astype(np.float64)
            assert (np.abs(written[slot].double().numpy() - base[slot] - sum(deltas)) <= 0.501 * ulp).all()


@pytest.mark.parametrize(
    ("size", "limit"), [("2KB", 2000), ("4KiB", 4096), (6500, 6500), ("0.01MB", 10_000), ("1GB", 10**9)]
)
def test_shard_size(size: Any, limit: int, recipe: WriteRecipe, small: Path, tmp_path: Path) -> None:
    modalloy.merge(recipe(output={"form": "full", "max_shard_size": size}), tmp_path / "out")
    shards = {path.name: load_file(path) for path in (tmp_path / "out").glob("*.safetensors")}
    sizes = {name: [t.nbytes for t in tensors.values()] for name, tensors in shards.items()}
    assert all(sum(each) <= limit or len(each) == 1 for each in sizes.values())
    total = sum(map(sum, sizes.values()))
    assert len(shards) == 1 if total <= limit else len(shards) >= total / limit
    if len(shards) > 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == total
        assert index["weight_map"] == {name: shard for shard, tensors in shards.items() for name in tensors}
    assert verify(tmp_path / "out").tensors == len(tensors_of(small / "base"))


# --------------------------------------------------------------------------------------------- every method, any form


def reported(out: Path, report: MergeReport) -> dict[str, float]:
    """The relative error of every update that was cut, as the manifest lists it; the report has the worst."""
    errors = json.loads((out / "manifest.json").read_text()).get("compression", {})
    assert report.compression_error == max(errors.values(), default=None)
    return dict(errors)


@pytest.mark.parametrize(
    ("kind", "changes", "wanted"),
    [
        ("lora", {"merge_method": "ties", "parameters": {"density": 0.5}}, lambda d: reference.ties(d, 0.5, "mean", 1)),
        ("lora", {}, sum),  # exact factors of rank 7, cut
        ("tuned", {"modules": {"*norm*": keep}}, sum),
        ("tuned", {"merge_method": "ssam", "modules": {"*norm*": keep}}, lambda d: reference.ssam(d, 128, 0.5)),
    ],
    ids=["ties", "task arithmetic", "full fine-tunes", "ssam of full fine-tunes"],
)
def test_compressed_adapter(
    kind: str, changes: dict[str, Any], wanted: Any, recipe: WriteRecipe, small: Path, tmp_path: Path
) -> None:
    rank, out = 5, tmp_path / "out"
    report = modalloy.merge(recipe(kind, **changes, output={"form": "adapter", "compress_rank": rank}), out)
    errors, found = reported(out, report), updates_of(out, small / "base", scale=1)
    assert errors.keys() == found.keys() and verify(out).layers
    assert json.loads((out / "adapter_config.json").read_text())["r"] == rank
    for slot in found:
        right = wanted(inputs(small, kind)[slot])
        values = np.linalg.svd(right, compute_uv=False)
        best = float(np.linalg.norm(values[rank:]) / np.linalg.norm(values))
        assert relative(found[slot], right) == pytest.approx(best, rel=1e-4)  # no approximation of this rank is better
        assert errors[slot] == pytest.approx(best, rel=1e-4)


def test_nothing_is_lost_where_the_rank_suffices(recipe: WriteRecipe, small: Path, tmp_path: Path) -> None:
    report = modalloy.merge(recipe(output={"form": "adapter", "compress_rank": 9}), tmp_path / "out")
    assert report.compression_error is None
    for slot, delta in updates_of(tmp_path / "out", small / "base", scale=1).items():
        assert relative(delta, sum(inputs(small)[slot])) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_a_full_model_and_an_adapter(
    method: str, recipe: WriteRecipe, small: Path, tmp_path: Path
) -> None:
    write_lora(tmp_path / "lora3", small / "base", rank=4, seed=3)  # of lora1's rank, which factorwise needs
    folders = [small / "lora1", tmp_path / "lora3"][: METHODS[method].models[1]]
    models, extra = [{"model": str(folder)} for folder in folders], [{}, {}]
    parameters = {"t": 0.1} if method == "nearswap" else {}  # its default is near what float32 rounds away
    if METHODS[method].takes("fishers"):
        extra = [{"parameters": {"fisher": str(write_fisher(tmp_path / f"f{seed}.bin", seed))}} for seed in (1, 2)]
        models = [model | more for model, more in zip(models, extra, strict=True)]
    dense = METHODS[method].gets({}) == "dense"
    changes = {"models": models, "merge_method": method, "parameters": parameters}
    modalloy.merge(recipe(**changes), tmp_path / "full")
    modalloy.merge(
        recipe(**changes, output={"form": "adapter"} | ({"compress_rank": 16} if dense else {})), tmp_path / "adapter"
    )
    pairs = {slot: [factors_of(folder)[slot] for folder in folders] for slot in SLOTS}
    products = [[up @ down for up, down in pair] for pair in pairs.values()]
    whole = dict(zip(pairs, reference.metagpt_model(products, 1.0), strict=True))
    for out, tolerance in ((tmp_path / "full", 1e-5), (tmp_path / "adapter", 5e-5)):
        assert verify(out).worst_error is not None
        found = updates_of(out, small / "base", scale=1)
        for slot in list(SLOTS)[:9]:
            given: Any = pairs[slot] if method in ON_FACTORS else [up @ down for up, down in pairs[slot]]
            more: dict[str, Any] = {"slot": slot} if METHODS[method].takes("slot") else {}
            more |= parameters
            if METHODS[method].takes("fishers"):
                more = {"fishers": [fisher_of(seed)[slot].double().numpy() for seed in (1, 2)]}
            if METHODS[method].takes("base"):
                more["base"] = tensors_of(small / "base")[slot]
            wanted = whole[slot] if method == "metagpt" else expected(method, given, **more)
            assert relative(found[slot], wanted) < tolerance, slot


def fisher_of(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {slot: torch.randn(*shape, generator=generator).square() for slot, shape in SLOTS.items()}


def write_fisher(path: Path, seed: int, change: Callable[[dict[str, torch.Tensor]], Any] = lambda _: None) -> Path:
    tensors = fisher_of(seed)
    change(tensors)
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    return path


@pytest.mark.parametrize("kind", ["lora", "tuned"])
def test_global_ties_over_the_whole_model(kind: str, merged: Callable[..., dict[str, np.ndarray]], small: Path) -> None:
    scale = [1.0, 3.0]  # over the depth, which leaves it one model
    parameters = {"threshold": "global", "density": 0.15, "scale": scale}
    rules = {"*resampler*": keep} if kind == "tuned" else {}
    found = merged(kind, merge_method="ties", parameters=parameters, modules=rules)
    deltas = inputs(small, kind)
    wanted = reference.ties_model([deltas[slot] for slot in SLOTS], 0.15, "mean", 1)
    for slot, right in zip(SLOTS, wanted, strict=True):
        assert relative(found[slot], (1 + layer(slot) / 2) * right) < 5e-6, slot


# ----------------------------------------------------------------------------------------------------- Fisher files


def fisher_models(small: Path, *files: str) -> list[dict[str, Any]]:
    return [
        {"model": str(small / f"lora{index}"), "parameters": {"fisher": file}} for index, file in enumerate(files, 1)
    ]


FISHERS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], type[Exception], str]] = {
    "tensor missing": (
        lambda t: t.pop("model.layers.3.mlp.up_proj.weight"),
        CheckpointError,
        r"two\.safetensors: has no model\.layers\.3\.mlp\.up_proj\.weight, as the base has it; compute the Fisher file",
    ),
    "wrong shape": (
        lambda t: t.update({"model.layers.3.mlp.up_proj.weight": torch.ones(24, 15)}),
        CheckpointError,
        r"two\.safetensors: has a 24 × 15 model\.layers\.3\.mlp\.up_proj\.weight",
    ),
    "negative": (
        lambda t: t["model.layers.3.mlp.up_proj.weight"].neg_(),
        MethodError,
        r"model\.layers\.3\.mlp\.up_proj\.weight: Fisher matrix 1 holds negative, NaN or infinite values; compute it again",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), FISHERS.values(), ids=FISHERS)
def test_wrong_fisher_file(
    change: Any, error: type[Exception], message: str, recipe: WriteRecipe, small: Path, tmp_path: Path
) -> None:
    write_fisher(tmp_path / "one.safetensors", 1)
    write_fisher(tmp_path / "two.safetensors", 2, change)
    with pytest.raises(error, match=message):
        modalloy.merge(
            recipe(merge_method="fisher", models=fisher_models(small, "one.safetensors", "two.safetensors")),
            tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()


def test_fisher_file_that_is_not_there(recipe: WriteRecipe, small: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.safetensors: no such file"):
        plan(recipe(merge_method="fisher", models=fisher_models(small, "absent.safetensors", "absent.safetensors")))


def test_fisher_file_beside_the_recipe(
    recipe: WriteRecipe, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its path starts at the recipe's folder; `verify` finds it again, and sees that it changed."""
    for seed, name in enumerate(("one", "two"), 1):
        write_fisher(tmp_path / f"{name}.safetensors", seed)
    path = recipe(merge_method="fisher", models=fisher_models(small, "one.safetensors", "two.safetensors"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    modalloy.merge(path, tmp_path / "results" / "out")
    assert verify(tmp_path / "results" / "out").layers
    found = updates_of(tmp_path / "results" / "out", small / "base")
    for slot, deltas in inputs(small).items():
        fishers = [fisher_of(seed)[slot].double().numpy() for seed in (1, 2)]
        assert relative(found[slot], reference.fisher(deltas, fishers, 1e-6, "none", 1)) < 2e-6
    write_fisher(tmp_path / "two.safetensors", 3)
    with pytest.raises(CheckpointError, match="lora2 specialist has changed since the merge"):
        verify(tmp_path / "results" / "out")
    (tmp_path / "two.safetensors").unlink()
    assert re.search(
        r"layers not recomputed: .*two\.safetensors is gone", verify(tmp_path / "results" / "out").summary()
    )


# -------------------------------------------------------------------------------------------------- files and memory


def test_full_models_keep_tokenizer_template_and_ties(
    write_recipe: WriteRecipe, base: Path, specialists: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    modalloy.merge(write_recipe(output={"form": "full", "dtype": "bfloat16"}), out)
    assert not [name for name in load_file(out / "model.safetensors") if "lm_head" in name]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    ours, theirs = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(base)
    messages = [{"role": "user", "content": "what is this ?"}]
    assert ours.chat_template == theirs.chat_template and ours.chat_template
    assert ours.apply_chat_template(messages, add_generation_prompt=True) == theirs.apply_chat_template(
        messages, add_generation_prompt=True
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()


def with_tower(small: Path, tmp_path: Path, **changes: Any) -> Path:
    """A recipe of full models that hold a convolution of a tower and a buffer of whole numbers, both changed by each."""
    models = []
    for seed, folder in enumerate(("base", "tuned1", "tuned2")):
        shutil.copytree(small / folder, tmp_path / folder)
        path = tmp_path / folder / "model.safetensors"
        extra = {"tower.conv.weight": torch.full((2, 3, 4, 4), float(seed)), "tower.positions": torch.arange(5) + seed}
        save_file(load_file(path) | extra, path, metadata={"format": "pt"})
        models.append({"model": folder})
    content = {"base_model": "base", "models": models[1:], "output": {"form": "full"}} | changes
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "recipe.yaml"


@pytest.mark.parametrize(("method", "wanted"), [("average", 1.5), ("task_arithmetic", 3.0), ("linear", 0.75)])
def test_a_sum_of_updates_merges_tensors_of_any_shape(method: str, wanted: float, small: Path, tmp_path: Path) -> None:
    path = with_tower(small, tmp_path, merge_method=method, modules={"tower.positions": {"policy": "keep"}})
    modalloy.merge(path, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["tower.conv.weight"], torch.full((2, 3, 4, 4), wanted))
    assert torch.equal(found["tower.positions"], torch.arange(5))


def test_a_convolution_that_changed_needs_a_rule(small: Path, tmp_path: Path) -> None:
    positions = {"tower.positions": {"policy": "keep"}}
    path = with_tower(small, tmp_path, merge_method="iso_c", modules=positions)
    message = (
        r"tuned1, tuned2 changed tower\.conv\.weight \(one of the convolutions, 2 × 3 × 4 × 4, which iso_c does not"
    )
    with pytest.raises(RecipeError, match=message):
        modalloy.merge(path, tmp_path / "out")
    content = yaml.safe_load(path.read_text())
    content["modules"] = positions | {"tower.conv.weight": {"policy": "average"}}
    path.write_text(yaml.safe_dump(content))
    modalloy.merge(path, tmp_path / "out")
    assert bool((load_file(tmp_path / "out" / "model.safetensors")["tower.conv.weight"] == 1.5).all())


def test_whole_numbers_that_changed_need_a_rule(small: Path, tmp_path: Path) -> None:
    path = with_tower(small, tmp_path, merge_method="average")
    with pytest.raises(
        RecipeError, match=r"tuned1, tuned2 changed tower\.positions \(torch\.int64, no weights\); write "
    ):
        modalloy.merge(path, tmp_path / "out")


def test_a_fisher_file_that_nothing_reads_is_refused(recipe: WriteRecipe, small: Path, tmp_path: Path) -> None:
    file = write_fisher(tmp_path / "fisher.safetensors", 1)
    models = [{"model": str(small / "lora1"), "parameters": {"fisher": str(file)}}]
    with pytest.raises(RecipeError, match=r"parameters\.fisher: ssam does not weigh by Fisher information"):
        plan(recipe(merge_method="ssam", models=models))

"""Whole merges by the methods that act on the weights themselves: each tensor held to NumPy in float64, and `verify`'s word."""

import json
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
from synthetic import linear_shapes, tensors_of, write_base, write_lora, write_tuned

import modalloy
from modalloy.errors import CheckpointError, MethodError, RecipeError
from modalloy.inspection.measure import inspect
from modalloy.methods import METHODS
from modalloy.recipe import Recipe
from modalloy.storage.folder import file_sha256
from modalloy.verify import verify

LAYERS = 3
SLOTS = linear_shapes(16, 24, LAYERS)
NORMS = [f"model.layers.{index}.input_layernorm.weight" for index in range(LAYERS)]
ONES = ("slerp", "nearswap", "arcee_fusion")  # which go between the base and one model
KEEP = {"*resampler*": {"policy": "keep"}}  # in no layer, so that lists over the depth say nothing of it
Merge = Callable[..., dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, three full fine-tunes and two adapters, in float32; and the same base and fine-tunes in bfloat16."""
    folder = tmp_path_factory.mktemp("on-weights")
    for dtype, prefix in (("float32", ""), ("bfloat16", "half-")):
        base = write_base(folder / f"{prefix}base", layers=LAYERS, dtype=dtype)
        for seed in (1, 2, 3):
            write_tuned(folder / f"{prefix}tuned{seed}", base, seed=seed)
    for seed in (1, 2):
        write_lora(folder / f"lora{seed}", folder / "base", seed=seed)
    return folder


@pytest.fixture
def merged(models: Path, tmp_path: Path) -> Merge:
    """The tensors of a merge of `names`, all of which `verify` must find right."""

    def run(method: str, *names: str, weights: tuple[Any, ...] = (), base: str = "base", **changes: Any) -> Any:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        entries: list[dict[str, Any]] = [{"model": str(models / name)} for name in names]
        for entry, weight in zip(entries, weights, strict=False):
            entry["parameters"] = {"weight": weight}
        content = {
            "base_model": str(models / base),
            "models": entries,
            "merge_method": method,
            "modules": KEEP,
        } | changes
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
        report = modalloy.merge(Recipe(**content), tmp_path / "out")
        found = verify(tmp_path / "out", full=True)
        assert found.share == report.verification.share == 1
        return tensors_of(tmp_path / "out")

    return run


def reference_of(method: str, tensors: list[dict[str, np.ndarray]], slot: str, **parameters: Any) -> np.ndarray:
    """What the reference makes of a weight; the first of `tensors` is the base's."""
    base, *tuned = (one[slot] for one in tensors)
    given = {n: v for n, v in METHODS[method].parameters.items() if v != "auto"} | parameters
    more = {"base": base} if METHODS[method].takes("base") else {}
    return base + getattr(reference, method)([one - base for one in tuned], **given, **more)


CASES: list[tuple[str, dict[str, Any], tuple[float, ...]]] = [
    ("slerp", {"t": 0.3}, ()),
    ("nuslerp", {}, (0.2, 0.6)),
    ("nuslerp", {"origin": "zero"}, (0.2, 0.6)),
    ("nuslerp", {"nuslerp_flatten": False}, (3.0, 1.0)),
    ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True, "origin": "zero"}, ()),
    ("multislerp", {}, (0.5, 2.0, 1.0)),
    ("multislerp", {"origin": "zero", "normalize_weights": False}, (0.5, 0.2, 0.4)),
    ("karcher", {}, ()),
    ("karcher", {"max_iter": 2, "tol": 1e-3}, ()),
    ("nearswap", {"t": 0.02}, ()),
    ("arcee_fusion", {}, ()),
    ("model_stock", {}, ()),
    ("model_stock", {"filter_wise": True}, ()),
]


def count(method: str) -> int:
    return METHODS[method].models[1] or 3


@pytest.mark.parametrize(("method", "parameters", "weights"), CASES, ids=str)
def test_full_models_make_a_full_model(
    method: str, parameters: dict[str, Any], weights: tuple[float, ...], merged: Merge, models: Path
) -> None:
    names = [f"tuned{index + 1}" for index in range(count(method))]
    found = merged(method, *names, weights=weights, parameters=parameters)
    tensors = [tensors_of(models / name) for name in ("base", *names)]
    more = {"weights": list(weights)} if weights else {}
    for slot in SLOTS:
        np.testing.assert_allclose(found[slot], reference_of(method, tensors, slot, **parameters, **more), atol=2e-7)
    base, *tuned = tensors
    assert np.array_equal(found["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    shares = np.array(weights or [1.0] * len(tuned))
    shares = shares / shares.sum() if parameters.get("normalize_weights", True) else shares
    for norm in NORMS:
        wanted = base[norm] + sum(w * (one[norm] - base[norm]) for w, one in zip(shares, tuned, strict=True))
        if method == "slerp":
            wanted = 0.7 * base[norm] + 0.3 * tuned[0][norm]
        elif method in ("nearswap", "arcee_fusion"):
            wanted = base[norm]
        np.testing.assert_allclose(found[norm], wanted, atol=1e-7)


@pytest.mark.parametrize(
    "method", ["slerp", "nuslerp", "multislerp", "karcher", "nearswap", "arcee_fusion", "model_stock"]
)
def test_bfloat16_and_float64_arithmetic(method: str, merged: Merge, models: Path) -> None:
    names = [f"half-tuned{index + 1}" for index in range(count(method))]
    parameters = {"t": 0.02} if method == "nearswap" else {}
    found = merged(method, *names, base="half-base", parameters=parameters, dtype="float64", out_dtype="float32")
    tensors = [tensors_of(models / name) for name in ("half-base", *names)]
    for slot in SLOTS:
        np.testing.assert_allclose(found[slot], reference_of(method, tensors, slot, **parameters), atol=5e-8)
    rounded = merged(method, *names, base="half-base", parameters=parameters)
    for slot in SLOTS:
        np.testing.assert_allclose(rounded[slot], found[slot], rtol=2**-8)


@pytest.mark.parametrize("method", ["nuslerp", "multislerp", "model_stock"])
def test_sums_of_updates_stay_adapters(method: str, merged: Merge, models: Path) -> None:
    found = merged(method, "lora1", "lora2", modules={}, output={"form": "adapter"})
    full = merged(method, "lora1", "lora2", modules={}, output={"form": "full"})
    base = tensors_of(models / "base")
    for slot in SLOTS:
        stem = f"base_model.model.{slot.removesuffix('.weight')}"
        update = found[f"{stem}.lora_B.weight"] @ found[f"{stem}.lora_A.weight"]
        np.testing.assert_allclose(base[slot] + update, full[slot], atol=1e-6)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        *((name, {}) for name in (*ONES, "karcher")),
        ("nuslerp", {"origin": "zero"}),
        ("multislerp", {"origin": "zero"}),
        ("nuslerp", {"nuslerp_flatten": False}),
        ("model_stock", {"filter_wise": True}),
    ],
    ids=str,
)
def test_an_adapter_cannot_hold_the_others_but_an_approximation(
    method: str, parameters: dict[str, Any], merged: Merge, tmp_path: Path
) -> None:
    names = ["lora1", "lora2"][: METHODS[method].models[1]]
    given: dict[str, Any] = {"modules": {}, "parameters": parameters}
    with pytest.raises(
        RecipeError, match=f"{method} gives a full matrix for .*, which an adapter cannot hold; write form: full"
    ):
        merged(method, *names, **given, output={"form": "adapter"})
    assert not (tmp_path / "out").exists()
    merged(method, *names, **given, output={"form": "adapter", "compress_rank": 8})


def test_lists_of_t_and_of_weights_go_over_the_depth(merged: Merge, models: Path) -> None:
    base, one, two = (tensors_of(models / name) for name in ("base", "tuned1", "tuned2"))
    found = merged("slerp", "tuned1", parameters={"t": [0, 0.5, 1]})
    for slot in [*SLOTS, *NORMS]:
        t = int(slot.split(".")[2]) / 2
        wanted = (1 - t) * base[slot] + t * one[slot]
        if slot in SLOTS:
            wanted = reference_of("slerp", [base, one], slot, t=t)
        np.testing.assert_allclose(found[slot], wanted, atol=2e-7)
    assert all(np.array_equal(found[slot], base[slot]) for slot in SLOTS if ".0." in slot)
    found = merged("nuslerp", "tuned1", "tuned2", weights=([1, 0], [0, 1]))
    for slot in SLOTS:
        t = int(slot.split(".")[2]) / 2
        wanted = reference_of("nuslerp", [base, one, two], slot, weights=[1 - t, t])
        np.testing.assert_allclose(found[slot], wanted, atol=2e-7)
        if t in (0, 1):  # a weight of 0 is the other model, which is still there
            np.testing.assert_allclose(found[slot], (two if t else one)[slot], atol=2e-7)


def test_a_t_of_0_is_the_base_bit_for_bit(merged: Merge, models: Path, tmp_path: Path) -> None:
    for method in ("slerp", "nearswap"):
        merged(method, "tuned1", parameters={"t": 0})
        written = load_file(tmp_path / "out/model.safetensors")
        for name, tensor in load_file(models / "base/model.safetensors").items():
            assert torch.equal(written[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_the_base_among_the_models_is_what_it_is_to_mergekit(merged: Merge, models: Path) -> None:
    """For what goes on from the base it is the base; where the weights are the points, it is one of them."""
    base, one, two = (tensors_of(models / name) for name in ("base", "tuned1", "tuned2"))
    for method in ONES:
        both, alone = merged(method, "base", "tuned1"), merged(method, "tuned1")
        assert all(np.array_equal(both[slot], alone[slot]) for slot in SLOTS)
    for method, parameters in (("karcher", {}), ("nuslerp", {"origin": "zero"}), ("multislerp", {"origin": "zero"})):
        names = ("base", "tuned1") if method == "nuslerp" else ("base", "tuned1", "tuned2")
        found = merged(method, *names, parameters=parameters)
        tensors = [base, base, one, two][: 1 + len(names)]
        for slot in SLOTS:
            np.testing.assert_allclose(found[slot], reference_of(method, tensors, slot, **parameters), atol=2e-7)
        for norm in NORMS:
            np.testing.assert_allclose(found[norm], np.mean([t[norm] for t in tensors[1:]], axis=0), atol=1e-7)
    counted, listed = merged("model_stock", "tuned1", "tuned2"), merged("model_stock", "base", "tuned1", "tuned2")
    assert all(np.array_equal(counted[slot], listed[slot]) for slot in SLOTS)


@pytest.mark.parametrize(
    ("method", "names", "changes", "message"),
    [
        ("slerp", ("tuned1", "tuned2"), {}, "slerp merges exactly 1 model beside the base, but 2 count"),
        ("nearswap", ("lora1", "tuned2"), {}, "nearswap merges exactly 1 model"),
        ("nuslerp", ("base", "tuned1"), {}, "nuslerp merges exactly 2 models beside the base, but 1 counts"),
        ("model_stock", ("tuned1",), {}, "model_stock merges at least 2 models"),
        ("slerp", ("tuned1",), {"parameters": {"t": 2}}, "t: 2 is out of range"),
        ("slerp", ("tuned1",), {"parameters": {"scale": 1.0}}, "method 'slerp' has no parameter 'scale'"),
        ("model_stock", ("tuned1", "tuned2"), {"parameters": {"filter_wise": [True, False]}}, "must hold numbers only"),
        ("karcher", ("tuned1", "tuned2"), {"parameters": {"max_iter": 2.5}}, "max_iter: 2.5 is not a whole number"),
        ("nuslerp", ("tuned1", "tuned2"), {"weights": (1.0, -1.0)}, "the weights sum to 0"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_one_line(
    method: str, names: tuple[str, ...], changes: dict[str, Any], message: str, merged: Merge, tmp_path: Path
) -> None:
    with pytest.raises((RecipeError, MethodError), match=message) as caught:
        merged(method, *names, **changes)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ONES)
def test_a_target_and_its_donors_are_too_many_for_one(method: str) -> None:
    with pytest.raises(ValueError, match=f"{method} goes between the base and one model, but a target and its donors"):
        Recipe(base_model="base", target="target", models=({"model": "donor"},), merge_method=method)


@pytest.mark.parametrize("method", ["nearswap", "arcee_fusion"])
def test_norms_that_stay_the_bases_are_said_and_a_rule_averages_them(
    method: str, merged: Merge, models: Path, tmp_path: Path
) -> None:
    merged(method, "tuned1")
    planned = modalloy.plan(modalloy.load_recipe(tmp_path / "recipe.yaml"))
    fate = next(fate for fate in planned.fates if fate.source == "tuned1" and fate.tensor == NORMS[0])
    assert (fate.fate, fate.detail) == ("left out", f"{method} keeps the base's norms and biases")
    found = merged(method, "tuned1", modules=KEEP | {"*norm*": {"policy": "average"}})
    np.testing.assert_allclose(found[NORMS[0]], tensors_of(models / "tuned1")[NORMS[0]], atol=1e-7)


@pytest.mark.parametrize("method", ["slerp", "karcher", "arcee_fusion", "model_stock"])
def test_verify_finds_a_weight_that_is_not_what_the_recipe_gives(
    method: str, merged: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged(method, *[f"tuned{index + 1}" for index in range(count(method))])
    path, manifest = tmp_path / "out/model.safetensors", tmp_path / "out/manifest.json"
    tensors = load_file(path)
    tensors[next(iter(SLOTS))] *= 1.001
    save_file(tensors, path, metadata={"format": "pt"})
    listed = json.loads(manifest.read_text())
    listed["outputs"]["model.safetensors"] = file_sha256(path)
    manifest.write_text(json.dumps(listed))
    with pytest.raises(CheckpointError, match="differs from what the recipe gives"):
        verify(tmp_path / "out")


@pytest.mark.parametrize(
    ("method", "parameters"), [("slerp", {}), ("karcher", {}), ("model_stock", {"filter_wise": True})]
)
def test_experts_are_each_a_weight_of_its_own(
    method: str, parameters: dict[str, Any], merged: Merge, models: Path, tmp_path: Path
) -> None:
    """Stored as (in, out), which a method that tells rows from columns is not given."""
    names = ["base", *(f"tuned{index + 1}" for index in range(count(method)))]
    experts = {}
    for seed, name in enumerate(names):
        folder = tmp_path / name
        shutil.copytree(models / name, folder)
        tensors = load_file(folder / "model.safetensors")
        generator = torch.Generator().manual_seed(seed)
        fused = torch.randn(2, 16, 12, generator=generator) * (1 if name == "base" else 0.3)
        experts[name] = fused if name == "base" else experts["base"] + fused
        tensors["model.layers.0.mlp.experts.up_proj"] = experts[name]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = merged(
        method, *(str(tmp_path / name) for name in names[1:]), base=str(tmp_path / "base"), parameters=parameters
    )
    for index in range(2):
        own = [{"w": experts[name][index].double().numpy().T} for name in names]
        wanted = reference_of(method, own, "w", **parameters).T
        np.testing.assert_allclose(found["model.layers.0.mlp.experts.up_proj"][index], wanted, atol=5e-7)


def test_inspect_measures_what_the_base_is_needed_for(models: Path) -> None:
    entry = ({"model": str(models / "tuned1")},)
    recipe = Recipe(base_model=str(models / "base"), models=entry, merge_method="slerp", output={"form": "full"})
    found = inspect(recipe)
    tensors = [tensors_of(models / name) for name in ("base", "tuned1")]
    for weight in found.slots:
        if weight.name in SLOTS:
            update = reference_of("slerp", tensors, weight.name, t=0.5) - tensors[0][weight.name]
            assert weight.merged_norm == pytest.approx(float(np.linalg.norm(update)), rel=1e-5)


@pytest.mark.parametrize(
    ("method", "parameters", "said"),
    [
        ("nuslerp", {}, "a model's weight is its share, of the sum of all"),
        ("multislerp", {"normalize_weights": False}, "a model's weight is its share, as it is"),
        ("model_stock", {}, "a model's weight is a factor of its update, never normalised"),
    ],
)
def test_the_summary_says_what_weights_are(method: str, parameters: dict[str, Any], said: str, models: Path) -> None:
    entries = tuple({"model": str(models / f"tuned{i}"), "parameters": {"weight": i}} for i in (1, 2))
    given: dict[str, Any] = {"base_model": str(models / "base"), "models": entries, "output": {"form": "full"}}
    planned = modalloy.plan(Recipe(**given, merge_method=method, parameters=parameters))
    assert said in planned.summary()

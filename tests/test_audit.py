"""Audits of merges that PEFT, mergekit, transformers and plain arithmetic made: right ones, and each known fault."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import base_tokenizer
from safetensors.torch import load_file, save_file
from test_target_parameters import make as make_experts
from test_target_parameters import write as write_experts
from torch import Tensor
from typer.testing import CliRunner

import modalloy
from modalloy.auditing.found import Audit
from modalloy.cli import app
from modalloy.errors import CheckpointError, ModalloyError, RecipeError

RANK, ALPHA = 8, 12
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
UPDATED = 2 * len(TARGETS)
Change = Callable[[dict[str, Tensor]], None]


@pytest.fixture(scope="module")
def shelf(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base; adapters one, two (α/r) and rooted (rsLoRA), trained by nobody; and full models of noise, by name."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("shelf")
    for seed, (name, more) in enumerate({"one": {}, "two": {}, "rooted": {"use_rslora": True}}.items()):
        torch.manual_seed(10 + seed)
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, **more)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.05)
        model.save_pretrained(folder / name)
    for seed, name in enumerate(("tuned", "other")):
        draw = torch.Generator().manual_seed(20 + seed)
        tensors = load_file(base / "model.safetensors")
        noise = {key: one + 0.02 * torch.randn(one.shape, generator=draw) for key, one in tensors.items()}
        copy_of(base, folder / name, lambda held, noise=noise: held.update(noise))  # type: ignore[misc]
    return folder


def copy_of(source: Path, folder: Path, change: Change = lambda tensors: None, **config: Any) -> Path:
    """A model's folder with other tensors, or fields of its config."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: one.contiguous() for name, one in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    content = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({key: one for key, one in content.items() if one is not ...}))
    return folder


def peft_merged(base: Path, adapter: Path, out: Path, dtype: torch.dtype = torch.float32, **changed: Any) -> Path:
    """What PEFT's merge_and_unload saves, with the base's tokenizer; `changed` replaces fields of the adapter's config."""
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM

    config = PeftConfig.from_pretrained(str(adapter))
    for name, value in changed.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    PeftModel.from_pretrained(model, adapter, config=config).merge_and_unload().save_pretrained(out)
    base_tokenizer().save_pretrained(out)
    return out


def mergekit_merged(config: dict[str, Any], out: Path) -> Path:
    """What mergekit writes."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    run_merge(MergeConfiguration.model_validate(config), str(out), MergeOptions(copy_tokenizer=True, quiet=True))
    return out


def lora_delta(adapter: Path, name: str) -> Tensor:
    """α/r B A of a weight, in float64."""
    held = load_file(adapter / "adapter_model.safetensors")
    stem = f"base_model.model.{name.removesuffix('.weight')}"
    a, b = (held[f"{stem}.lora_{side}.weight"].double() for side in "AB")
    return ALPHA / RANK * b @ a


def add(adapter: Path, factor: float = 1.0, only: str = "") -> Change:
    """Adds an adapter by plain arithmetic to the weights whose names hold `only`."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name, one in tensors.items():
            if name.rpartition(".")[0].rpartition(".")[2] in TARGETS and only in name:
                tensors[name] = (one.double() + factor * lora_delta(adapter, name)).to(one.dtype)

    return change


def codes(audit: Audit) -> dict[str, str]:
    """Faults by their code."""
    return {finding.code: finding.message for finding in audit.findings if finding.level == "fault"}


def notes(audit: Audit) -> set[str]:
    return {finding.code for finding in audit.findings if finding.level == "note"}


# right merges


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", ["one", "rooted"])
def test_a_merge_of_peft_is_right(base: Path, shelf: Path, tmp_path: Path, adapter: str, dtype: torch.dtype) -> None:
    found = modalloy.audit(
        peft_merged(base, shelf / adapter, tmp_path / "out", dtype), base=base, adapters=[shelf / adapter]
    )
    assert found.ok and not codes(found), found.findings
    assert found.kinds == {"base": found.tensors - UPDATED, "source": UPDATED}
    (factor,) = found.coefficients
    assert factor.value == 1 and (factor.low, factor.high) == (1, 1) and factor.weights == UPDATED
    assert ("dtype" in notes(found)) == (dtype != torch.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_task_arithmetic_of_mergekit_is_a_sum_whose_factors_are_found(
    base: Path, shelf: Path, tmp_path: Path, dtype: str
) -> None:
    config = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "dtype": dtype,
        "models": [
            {"model": str(shelf / "tuned"), "parameters": {"weight": 0.7}},
            {"model": str(shelf / "other"), "parameters": {"weight": 0.4}},
        ],
    }
    out = mergekit_merged(config, tmp_path / "out")
    found = modalloy.audit(out, base=base, models=[shelf / "tuned", shelf / "other"])
    assert found.ok and found.kinds == {"sum": found.tensors}, found.findings
    near = 0 if dtype == "float32" else 2e-3  # mergekit's own factor is of the type: 0.6992
    assert [one.value for one in found.coefficients] == pytest.approx([0.7, 0.4], rel=near)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config))
    by_recipe = modalloy.audit(out, base=base, recipe=tmp_path / "recipe.yaml")
    assert by_recipe.ok and by_recipe.kinds["method"] == found.tensors, by_recipe.findings
    config["models"][0]["parameters"]["weight"] = 0.6  # type: ignore[index]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config))
    wrong = modalloy.audit(out, base=base, recipe=tmp_path / "recipe.yaml")
    factor = 0.7 if dtype == "float32" else 0.699  # mergekit's own is of the type
    assert re.search(rf"{factor}( to 0\.7\d+)? × tuned", codes(wrong)["not_the_recipe"])


def test_a_mean_and_a_ties_of_mergekit_are_named(base: Path, shelf: Path, tmp_path: Path) -> None:
    models = [{"model": str(shelf / name)} for name in ("tuned", "other")]
    sources = [shelf / "tuned", shelf / "other"]
    linear = {
        "merge_method": "linear",
        "dtype": "float32",
        "models": [m | {"parameters": {"weight": 1}} for m in models],
    }
    mean = modalloy.audit(mergekit_merged(linear, tmp_path / "mean"), base=base, models=sources)
    assert mean.ok and mean.kinds == {"mean": mean.tensors}
    ties = {
        "merge_method": "ties",
        "base_model": str(base),
        "dtype": "float32",
        "parameters": {"normalize": True, "density": 0.4, "weight": 1.0},
        "models": models,
    }
    found = modalloy.audit(mergekit_merged(ties, tmp_path / "ties"), base=base, models=sources)
    assert found.ok and found.kinds == {"ties": found.tensors}, found.findings
    assert {round(one.detail["density"], 2) for one in found.weights if one.kind == "ties"} == {0.4}


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ties", {"normalize": False, "density": 0.37, "weight": 0.5}),
        ("breadcrumbs", {"density": 0.7, "gamma": 0.01, "weight": 1.0}),
        ("slerp", {"t": 0.3}),
    ],
)
def test_what_mergekit_makes_of_a_recipe_is_what_it_gives(
    base: Path, shelf: Path, tmp_path: Path, method: str, parameters: dict[str, Any]
) -> None:
    names = [base, shelf / "tuned"] if method == "slerp" else [shelf / "tuned", shelf / "other"]
    config = {
        "merge_method": method,
        "base_model": str(base),
        "dtype": "float32",
        "parameters": parameters,
        "models": [{"model": str(name)} for name in names],
    }
    out = mergekit_merged(config, tmp_path / "out")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config))
    found = modalloy.audit(out, base=base, recipe=tmp_path / "recipe.yaml")
    assert found.ok and found.kinds == {"method": found.tensors}, found.findings
    if method == "slerp":
        found = modalloy.audit(out, base=base, models=[shelf / "tuned"])
        assert found.ok and found.kinds["slerp"] == 1 + 2 * 7, found.findings
        assert {round(one.detail["t"], 3) for one in found.weights if one.kind == "slerp"} == {0.3}


def test_a_base_that_a_recipe_should_have_changed_is_a_fault(base: Path, shelf: Path, tmp_path: Path) -> None:
    recipe = {"base_model": str(base), "merge_method": "task_arithmetic", "models": [{"model": str(shelf / "one")}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    found = modalloy.audit(copy_of(base, tmp_path / "out"), base=base, recipe=tmp_path / "recipe.yaml")
    assert f"{UPDATED} weights are the base's, not what the recipe gives" in codes(found)["not_the_recipe"]


def test_a_result_of_modalloy_is_what_its_recipe_gives(base: Path, shelf: Path, tmp_path: Path) -> None:
    recipe = {
        "base_model": str(base),
        "merge_method": "ssam",
        "parameters": {"rank": 6},
        "models": [{"model": str(shelf / "one")}, {"model": str(shelf / "two")}],
    }
    for form in ("full", "adapter"):
        path = tmp_path / f"{form}.yaml"
        path.write_text(yaml.safe_dump(recipe | {"output": {"form": form}}))
        modalloy.merge(path, tmp_path / form)
        found = modalloy.audit(tmp_path / form, base=base, recipe=path)
        assert found.ok and found.kinds["method"] == UPDATED, found.findings
    sources = [shelf / "one", shelf / "two"]
    unsaid = modalloy.audit(tmp_path / "full", base=base, adapters=sources)  # right by a method that nobody named
    assert unsaid.ok and unsaid.untold == UPDATED and "cannot be told" in unsaid.verdict
    wrong = modalloy.audit(tmp_path / "full", base=base, adapters=sources, weights=[0.5, 0.5])
    assert "unexplained" in codes(wrong)


# merges in a type of few digits: confirmed, or said to be open; never a right one a fault, never a wrong one confirmed

BOTH, ONE = ("tuned", "other"), ("tuned",)
MERGES: dict[
    str, tuple[dict[str, Any], tuple[str, ...], dict[str, Any]]
] = {  # parameters, models, what makes them wrong
    "ties": ({"density": 0.4, "weight": 1.0}, BOTH, {"density": 0.5}),
    "breadcrumbs": ({"density": 0.7, "gamma": 0.01, "weight": 1.0}, BOTH, {"gamma": 0.05}),
    "breadcrumbs_ties": ({"density": 0.7, "gamma": 0.01, "weight": 0.6}, BOTH, {"weight": 0.5}),
    "sce": ({"select_topk": 0.3}, BOTH, {"select_topk": 0.4}),
    "model_stock": ({}, BOTH, {}),
    "multislerp": ({"weight": 0.5}, BOTH, {}),
    "nearswap": ({"t": 0.001}, ONE, {"t": 0.002}),
    "ram": ({}, BOTH, {}),
    "arcee_fusion": ({}, ONE, {}),
    "dare_ties": ({"density": 0.5, "weight": 0.5}, BOTH, {}),
}
UNTOLD = {"dare_ties", "arcee_fusion"}


@pytest.mark.parametrize("method", MERGES)
def test_a_merge_of_mergekit_in_bfloat16_is_what_its_recipe_gives_or_cannot_be_told(
    base: Path, shelf: Path, tmp_path: Path, method: str
) -> None:
    parameters, names, wrong = MERGES[method]
    config: dict[str, Any] = {
        "merge_method": method,
        "base_model": str(base),
        "dtype": "bfloat16",
        "parameters": parameters,
        "models": [{"model": str(shelf / name)} for name in names],
    }
    out, recipe = mergekit_merged(config, tmp_path / "out"), tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(config))
    found = modalloy.audit(out, base=base, recipe=recipe)
    assert found.ok and found.kinds.get("unexplained") is None, found.findings
    assert bool(found.untold) == (method in UNTOLD), found.kinds
    if method not in UNTOLD:
        assert found.kinds.get("method", 0) + found.kinds.get("base", 0) == found.tensors
        assert "ok: every weight" in found.verdict
    else:
        assert "cannot be told" in found.verdict and "cannot_tell" in notes(found)
    if wrong:
        recipe.write_text(yaml.safe_dump(config | {"parameters": parameters | wrong}))
        assert not modalloy.audit(out, base=base, recipe=recipe).ok
        recipe.write_text(yaml.safe_dump(config))
    name = "model.layers.0.mlp.up_proj.weight"

    def reverted(
        tensors: dict[str, Tensor],
    ) -> None:  # rows of the base, where others were changed; all, where it is open which
        rows = slice(None, None, 1 if method in UNTOLD else 16)
        tensors[name][rows] = load_file(base / "model.safetensors")[name][rows].to(tensors[name].dtype)

    def pushed(tensors: dict[str, Tensor]) -> None:  # what no choice of entries gives
        tensors[name][::16] += 0.1

    change = pushed if method == "arcee_fusion" else reverted
    damaged = modalloy.audit(copy_of(out, tmp_path / "damaged", change), base=base, recipe=recipe)
    (one,) = (weight for weight in damaged.weights if weight.name == name)
    assert not damaged.ok and one.kind not in ("method", "untold"), (one.kind, one.worst)


@pytest.mark.parametrize(("method", "count"), [("ties", 2), ("ties", 4), ("breadcrumbs", 2), ("sce", 2)])
def test_updates_of_few_steps_are_told_though_most_entries_are_at_the_cut(
    base: Path, tmp_path: Path, method: str, count: int
) -> None:
    """Fine-tunes in bfloat16 move most entries by no step or one: magnitudes are equal, and updates cancel exactly."""

    def stepped(seed: int) -> Change:
        def change(tensors: dict[str, Tensor]) -> None:
            draw = torch.Generator().manual_seed(seed)
            for name, one in tensors.items():
                plain = one.bfloat16()
                steps = torch.randint(-2, 3, one.shape, generator=draw) if seed else torch.zeros(one.shape)
                tensors[name] = (plain.float() * (1 + steps * 2.0**-7)).bfloat16()

        return change

    tuned = ("one", "two", "three", "four")[:count]
    names = {name: copy_of(base, tmp_path / name, stepped(seed)) for seed, name in enumerate(("plain", *tuned))}
    parameters, _, _ = MERGES[method]
    config = {
        "merge_method": method,
        "base_model": str(names["plain"]),
        "dtype": "bfloat16",
        "parameters": parameters,
        "models": [{"model": str(names[name])} for name in tuned],
    }
    out, recipe = mergekit_merged(config, tmp_path / "out"), tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(config))
    found = modalloy.audit(out, base=names["plain"], recipe=recipe)
    assert found.ok and not found.untold, found.findings
    if method == "ties":
        # others keep few of those that are equal, or nearly all; larger and smaller entries are the same
        name = "model.layers.0.mlp.up_proj.weight"
        few, every = cut_shares(names["plain"], names["one"], name)
        for part in (0.02, 0.98):
            recipe.write_text(
                yaml.safe_dump(config | {"parameters": {"density": few + part * (every - few), "weight": 1.0}})
            )
            (one,) = (w for w in modalloy.audit(out, base=names["plain"], recipe=recipe).weights if w.name == name)
            assert one.kind not in ("method", "untold"), (one, part)


def cut_shares(base: Path, model: Path, name: str, density: float = 0.4) -> tuple[float, float]:
    """Shares of the entries of an update that are larger than the cut of a density, and at least as large."""
    change = load_file(model / "model.safetensors")[name].float() - load_file(base / "model.safetensors")[name].float()
    sizes = change.abs().flatten().sort(descending=True).values
    cut = sizes[int(density * len(sizes))]
    return float((sizes > cut).float().mean()), float((sizes >= cut).float().mean())


# faults of scale


@pytest.mark.parametrize(
    ("adapter", "changed", "words"),
    [
        ("one", {"use_rslora": True}, "√r for r = 8"),
        ("rooted", {"use_rslora": False}, "1/√r for r = 8"),
        ("one", {"lora_alpha": RANK}, "was left out"),
        ("one", {"lora_alpha": ALPHA * ALPHA / RANK}, "was applied twice"),
        ("one", {"lora_alpha": ALPHA * RANK}, "α was not divided by r"),
        ("one", {"lora_alpha": 2 * ALPHA}, "it was added twice"),
    ],
)
def test_a_wrong_scale_is_named(
    base: Path, shelf: Path, tmp_path: Path, adapter: str, changed: dict[str, Any], words: str
) -> None:
    out = peft_merged(base, shelf / adapter, tmp_path / "out", torch.bfloat16, **changed)
    found = modalloy.audit(out, base=base, adapters=[shelf / adapter])
    assert set(codes(found)) == {"scale"} and words in codes(found)["scale"], found.findings
    assert f"in {UPDATED} of" in codes(found)["scale"]


def test_a_single_weight_of_another_scale_stands_out(base: Path, shelf: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        add(shelf / "one")(tensors)
        add(shelf / "two", 0.5)(tensors)
        add(shelf / "two", 0.3, "layers.1.self_attn.q_proj")(tensors)

    out = copy_of(base, tmp_path / "out", change)
    found = modalloy.audit(out, base=base, adapters=[shelf / "one", shelf / "two"])
    (fault,) = (one for one in found.findings if one.level == "fault")
    assert fault.code == "coefficient" and fault.tensors == ("model.layers.1.self_attn.q_proj.weight",)
    assert [one.value for one in found.coefficients] == [1.0, 0.5]
    assert modalloy.audit(out, base=base, adapters=[shelf / "one", shelf / "two"], weights=[1, 0.5]).ok is False


def test_updates_that_are_smaller_than_the_steps_of_bfloat16_are_read_without_bias(
    base: Path, shelf: Path, tmp_path: Path
) -> None:
    """Most entries of such an update are swallowed by rounding, and least squares give half of the true factor."""
    coarse = copy_of(base, tmp_path / "base", lambda held: held.update({n: one.bfloat16() for n, one in held.items()}))
    small = tmp_path / "small"
    shutil.copytree(shelf / "one", small)
    held = load_file(small / "adapter_model.safetensors")
    save_file(
        {name: one * (0.003 if "lora_B" in name else 1) for name, one in held.items()},
        small / "adapter_model.safetensors",
    )
    right = modalloy.audit(
        peft_merged(coarse, small, tmp_path / "right", torch.bfloat16), base=coarse, adapters=[small]
    )
    assert right.ok and right.kinds["source"] == UPDATED, right.findings
    rooted = peft_merged(coarse, small, tmp_path / "rooted", torch.bfloat16, use_rslora=True)
    found = modalloy.audit(rooted, base=coarse, adapters=[small])
    assert "√r for r = 8" in codes(found)["scale"], found.findings
    assert "was not applied" in codes(modalloy.audit(coarse, base=coarse, adapters=[small]))["not_applied"]


# faults of what was merged


def test_adapters_whose_factors_peft_merged_apart_are_named(base: Path, shelf: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def merged(kind: str) -> Path:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), shelf / "one", adapter_name="one")
        model.load_adapter(shelf / "two", adapter_name="two")
        model.add_weighted_adapter(["one", "two"], [0.6, 0.4], "both", combination_type=kind)
        model.set_adapter("both")
        model.save_pretrained(tmp_path / f"{kind}-adapter", selected_adapters=["both"])
        model.delete_adapter("one")
        model.delete_adapter("two")
        model.merge_and_unload().save_pretrained(tmp_path / kind)
        return tmp_path / kind

    sources = [shelf / "one", shelf / "two"]
    right, wrong = merged("cat"), merged("linear")
    found = modalloy.audit(right, base=base, adapters=sources)
    assert found.ok and [one.value for one in found.coefficients] == [0.6, 0.4], found.findings
    for folder in (wrong, tmp_path / "linear-adapter" / "both"):
        found = modalloy.audit(folder, base=base, adapters=sources)
        assert set(codes(found)) == {"merged_apart"}, found.findings
        assert "B with another's A" in codes(found)["merged_apart"]
    assert modalloy.audit(tmp_path / "cat-adapter" / "both", base=base, adapters=sources).ok


def test_an_adapter_that_is_missing_on_some_modules_is_named(base: Path, shelf: Path, tmp_path: Path) -> None:
    out = copy_of(base, tmp_path / "out", add(shelf / "one", only="self_attn"))
    found = modalloy.audit(out, base=base, adapters=[shelf / "one"])
    (fault,) = (one for one in found.findings if one.level == "fault")
    assert fault.code == "not_applied" and "is missing in 4 of the 8 weights" in fault.message
    assert "mlp.up_proj" in fault.message and not any("self_attn" in name for name in fault.tensors)
    found = modalloy.audit(copy_of(base, tmp_path / "none"), base=base, adapters=[shelf / "one"])
    assert "was not applied at all" in codes(found)["not_applied"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fused", [True, False], ids=["one tensor", "hub"])
def test_an_adapter_that_is_missing_on_some_experts_is_named(tmp_path: Path, fused: bool) -> None:
    from peft import PeftModel

    write_experts(tmp_path, "Qwen3Moe", fused=fused)
    model = PeftModel.from_pretrained(make_experts("Qwen3Moe"), tmp_path / "one").merge_and_unload()
    model.save_pretrained(tmp_path / "out", save_original_format=not fused)
    found = modalloy.audit(tmp_path / "out", base=tmp_path / "base", adapters=[tmp_path / "one"])
    matrices = 2 * 3 * (2 if fused else 3)  # layers, experts, matrices of each
    assert found.ok and found.kinds["source"] == 2 + matrices, found.findings
    kept, held = load_file(tmp_path / "base" / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for name in held:
        if "experts" in name and "layers.1." in name:
            held[name] = kept[name]
    save_file(held, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    found = modalloy.audit(tmp_path / "out", base=tmp_path / "base", adapters=[tmp_path / "one"])
    message = codes(found)["not_applied"]
    assert f"is missing in {matrices // 2} of the {2 + matrices} weights" in message and "experts" in message


def test_one_of_two_adapters_that_is_missing_somewhere_is_named(base: Path, shelf: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        add(shelf / "one", 0.5)(tensors)
        add(shelf / "two", 0.5, "self_attn")(tensors)

    found = modalloy.audit(copy_of(base, tmp_path / "out", change), base=base, adapters=[shelf / "one", shelf / "two"])
    assert "two is missing in 4 of the 8 weights" in codes(found)["not_applied"], found.findings


def test_an_adapter_that_was_saved_beside_the_model_is_named(base: Path, shelf: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors.update(load_file(shelf / "one" / "adapter_model.safetensors"))

    found = modalloy.audit(copy_of(base, tmp_path / "out", change), base=base, adapters=[shelf / "one"])
    assert "not merged into it" in codes(found)["extra"] and "not_applied" in codes(found)


def test_factors_that_do_not_sum_to_one_are_named(base: Path, shelf: Path, tmp_path: Path) -> None:
    config = {
        "merge_method": "linear",
        "dtype": "float32",
        "parameters": {"normalize": False},
        "models": [{"model": str(shelf / name), "parameters": {"weight": 0.4}} for name in ("tuned", "other")],
    }
    out = mergekit_merged(config, tmp_path / "out")
    found = modalloy.audit(out, base=base, models=[shelf / "tuned", shelf / "other"])
    assert "hold the base 0.8 times" in codes(found)["base_scaled"], found.findings


# faults of tables, types and of what stands beside


def test_rows_of_a_table_that_are_shifted_or_overwritten_are_named(base: Path, shelf: Path, tmp_path: Path) -> None:
    table = "model.embed_tokens.weight"

    def shifted(tensors: dict[str, Tensor]) -> None:
        tensors[table] = torch.cat([tensors[table][:3], tensors[table][:1], tensors[table][3:-1]])

    def overwritten(tensors: dict[str, Tensor]) -> None:
        tensors[table][5:8] = 0.01 * torch.randn(3, tensors[table].shape[1], generator=torch.Generator().manual_seed(0))

    def longer(tensors: dict[str, Tensor]) -> None:
        tensors[table] = torch.cat([tensors[table], torch.zeros(2, tensors[table].shape[1])])

    found = modalloy.audit(copy_of(base, tmp_path / "shifted", shifted), base=base)
    assert "shifted down by 1, from row 3 on" in codes(found)["rows_shifted"], found.findings
    found = modalloy.audit(copy_of(base, tmp_path / "overwritten", overwritten), base=base)
    assert "3 of its" in codes(found)["rows_overwritten"]
    found = modalloy.audit(copy_of(base, tmp_path / "longer", longer), base=base)
    assert "was resized, and config.json does not say so" in codes(found)["resized"]
    height = len(load_file(base / "model.safetensors")[table]) + 2
    found = modalloy.audit(copy_of(base, tmp_path / "told", longer, vocab_size=height), base=base)
    assert found.ok and "resized" in notes(found), found.findings

    def both(tensors: dict[str, Tensor]) -> None:
        tensors[table] = torch.cat([torch.zeros(2, tensors[table].shape[1]), tensors[table]])

    found = modalloy.audit(copy_of(base, tmp_path / "both", both, vocab_size=height), base=base)
    assert "shifted down by 2, from row 0 on" in codes(found)["rows_shifted"]


@pytest.mark.parametrize("coarse", [torch.bfloat16, torch.float16])
def test_a_round_trip_through_a_coarser_type_is_named(
    base: Path, shelf: Path, tmp_path: Path, coarse: torch.dtype
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        add(shelf / "one")(tensors)
        tensors.update({name: one.to(coarse).float() for name, one in tensors.items()})

    found = modalloy.audit(copy_of(base, tmp_path / "out", change), base=base, adapters=[shelf / "one"])
    assert set(codes(found)) == {"precision"}, found.findings
    assert f"went through {str(coarse).removeprefix('torch.')}" in codes(found)["precision"]


def test_lost_scales_of_fp8_are_named(tmp_path: Path, base: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    scale = torch.full((1, 1), 0.01)

    def quantised(tensors: dict[str, Tensor]) -> None:
        tensors[name] = (tensors[name] / 0.01).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale

    scheme = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    eight = copy_of(base, tmp_path / "eight", quantised, quantization_config=scheme)
    assert modalloy.audit(copy_of(eight, tmp_path / "same"), base=eight).ok

    def numbers(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].float()
        del tensors[f"{name}_scale_inv"]

    found = modalloy.audit(copy_of(eight, tmp_path / "numbers", numbers, quantization_config=...), base=eight)
    assert "their scales were lost" in codes(found)["scales_lost"], found.findings
    lone = copy_of(eight, tmp_path / "lone", lambda tensors: tensors.pop(f"{name}_scale_inv"))  # type: ignore[arg-type]
    assert "codes without their scales" in codes(modalloy.audit(lone, base=eight))["scales_lost"]


def test_a_head_that_is_no_longer_tied_is_named(base: Path, tmp_path: Path) -> None:
    table = "model.embed_tokens.weight"
    untied = copy_of(base, tmp_path / "untied", tie_word_embeddings=False)
    assert "drawn at random" in codes(modalloy.audit(untied, base=base))["head"]

    def own_head(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors[table] + 0.1

    apart = copy_of(base, tmp_path / "apart", own_head)
    assert "is not the embeddings; config.json drops it" in codes(modalloy.audit(apart, base=base))["head"]
    copied = copy_of(
        base, tmp_path / "copied", lambda tensors: tensors.update({"lm_head.weight": tensors[table].clone()})
    )
    found = modalloy.audit(copied, base=base)
    assert found.ok and "head" in notes(found)
    lost = modalloy.audit(
        copy_of(apart, tmp_path / "lost", lambda t: t.pop("lm_head.weight"), tie_word_embeddings=True),
        base=copy_of(apart, tmp_path / "two", tie_word_embeddings=False),
    )  # type: ignore[arg-type, return-value]
    assert "is missing, and config.json ties it" in codes(lost)["head"]


def test_changed_fields_of_the_config_are_named(base: Path, tmp_path: Path) -> None:
    out = copy_of(
        base, tmp_path / "out", rms_norm_eps=1e-5, max_position_embeddings=64, eos_token_id=1, dtype="bfloat16"
    )
    found = codes(modalloy.audit(out, base=base))
    assert "rms_norm_eps is 1e-05, the base's 1e-06" in found["config_changed"]
    assert "max_position_embeddings is 64" in found["config_changed"] and "dtype" not in found["config_changed"]
    assert "eos_token_id is 1, the base's 2" in found["special_tokens"]
    (out / "config.json").unlink()
    assert "config_lost" in codes(modalloy.audit(out, base=base))


def test_a_lost_template_and_lost_special_tokens_are_named(base: Path, tmp_path: Path) -> None:
    out = copy_of(base, tmp_path / "out")
    (out / "chat_template.jinja").unlink()
    tokenizer = base_tokenizer()
    tokenizer.chat_template = None
    tokenizer.eos_token = "yes"
    tokenizer.save_pretrained(out)
    found = codes(modalloy.audit(out, base=base))
    assert "chat template is lost" in found["template_lost"]
    assert "eos_token is 'yes', the base's is '</s>'" in found["special_tokens"]
    for path in out.glob("*token*"):
        path.unlink()
    found_without = modalloy.audit(out, base=base)
    assert found_without.ok and "tokenizer_absent" in notes(found_without)


def test_another_base_is_named(base: Path, shelf: Path, tmp_path: Path) -> None:
    found = modalloy.audit(
        peft_merged(base, shelf / "one", tmp_path / "out"), base=shelf / "tuned", adapters=[shelf / "one"]
    )
    assert "another base" in codes(found)["another_base"]


def test_nan_is_named(base: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"][3] = torch.nan

    assert (
        "model.norm.weight" in codes(modalloy.audit(copy_of(base, tmp_path / "out", change), base=base))["not_finite"]
    )


# bad input


def test_missing_extra_and_reshaped_tensors_are_faults(base: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.norm.bias"] = torch.zeros(4)
        tensors["model.norm.weight"] = torch.zeros(7)

    found = modalloy.audit(copy_of(base, tmp_path / "out", change), base=base)
    assert {"missing", "extra", "shape"} == set(codes(found))


def test_bad_input_is_one_line(base: Path, shelf: Path, tmp_path: Path) -> None:
    truncated = copy_of(base, tmp_path / "truncated")
    data = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(data[:-100])
    quantised = copy_of(
        base,
        tmp_path / "quantised",
        lambda tensors: tensors.update({"model.norm.weight": torch.zeros(32, dtype=torch.uint8)}),
        quantization_config={"quant_method": "bitsandbytes"},
    )
    narrow = copy_of(
        base, tmp_path / "narrow", lambda tensors: tensors.update({n: t[..., :8] for n, t in tensors.items()})
    )
    good = copy_of(base, tmp_path / "good")
    cases: list[tuple[Path, dict[str, Any], type[ModalloyError], str]] = [
        (truncated, {}, CheckpointError, "truncated"),
        (quantised, {}, CheckpointError, "quantised by bitsandbytes"),
        (narrow, {}, CheckpointError, "give the base that it was merged from"),
        (tmp_path / "none", {}, CheckpointError, "no such folder; correct the path$"),
        (good, {"adapters": [shelf / "one", shelf / "one"]}, CheckpointError, "is given twice"),
        (good, {"adapters": [shelf / "one"], "weights": [float("nan")]}, RecipeError, "nan is no number"),
        (good, {"adapters": [shelf / "tuned"]}, CheckpointError, "give it with --model"),
        (good, {"models": [shelf / "one"]}, CheckpointError, "give it with --adapter"),
        (good, {"adapters": [shelf / "one"], "weights": [1, 2]}, RecipeError, "2 weights for 1"),
    ]
    for folder, given, error, words in cases:
        with pytest.raises(error, match=words) as caught:
            modalloy.audit(folder, base=base, **given)
        assert "\n" not in str(caught.value)


# the command


def test_the_command(base: Path, shelf: Path, tmp_path: Path) -> None:
    def run(*argv: object) -> Any:
        return CliRunner().invoke(app, ["audit", *map(str, argv)], standalone_mode=False)

    good, page = copy_of(base, tmp_path / "good", add(shelf / "one")), tmp_path / "page.html"
    bad = copy_of(base, tmp_path / "<b>bad", add(shelf / "one", RANK**0.5))
    done = run(good, "--base", base, "--adapter", shelf / "one", "--json")
    told = json.loads(done.stdout)
    assert done.return_value == 0 and told["ok"] and told["coefficients"][0]["value"] == 1
    done = run(bad, "--base", base, "--adapter", shelf / "one", "--html", page)
    assert done.return_value == 1 and "√r for r = 8" in done.stdout and "verdict  1 fault found" in done.stdout
    html = page.read_text()
    assert "&lt;b&gt;bad" in html and "<b>bad" not in html and "√r for r = 8" in html and "script-src 'none'" in html
    method = run(good, "--base", base, "--adapter", shelf / "one", "--method", "task_arithmetic", "--set", "scale=1")
    assert method.return_value == 0, method.stdout
    method = run(good, "--base", base, "--adapter", shelf / "one", "--method", "task_arithmetic", "--set", "scale=0.5")
    assert method.return_value == 1 and "not what the recipe gives" in method.stdout
    refused = run(good, "--base", base, "--adapter", shelf / "one", "--set", "scale=1")
    assert isinstance(refused.exception, RecipeError)
    before = page.read_bytes()
    refused = run(tmp_path / "none", "--base", base, "--html", page, "--overwrite")
    assert isinstance(refused.exception, CheckpointError) and page.read_bytes() == before


def test_a_large_model_is_sampled_the_same_each_time(
    base: Path, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modalloy.auditing.audit.SMALL_BYTES", 0)
    monkeypatch.setattr("modalloy.recompute.SAMPLED", 1 + 1)
    good = copy_of(base, tmp_path / "good", add(shelf / "one"))
    one, two = (modalloy.audit(good, base=base, adapters=[shelf / "one"]) for _ in range(2))
    assert one.to_dict() == two.to_dict()
    full = modalloy.audit(good, base=base, adapters=[shelf / "one"], full=True)
    assert full.full and full.checked == full.tensors

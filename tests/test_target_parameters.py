"""LoRAs on the parameters of fused experts (PEFT's target_parameters): exact, in every way that files store experts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from modalloy import merge
from modalloy.errors import ModalloyError
from modalloy.verify import verify

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 48,
    "tie_word_embeddings": False,
}
CLASSES: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 8},
    "Mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 12},
    "GptOss": {
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "intermediate_size": 12,
        "head_dim": 8,
        "layer_types": ["full_attention", "full_attention"],
    },
}
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def make(kind: str) -> Any:
    """A tiny model of random float32 weights."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(SIZES | CLASSES[kind]))
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


def adapter(kind: str, folder: Path, seed: int, targets: list[str], **more: Any) -> None:
    """A saved adapter of random factors."""
    torch.manual_seed(seed)
    settings = LoraConfig(
        r=2, lora_alpha=6, target_modules=["q_proj"], target_parameters=targets, init_lora_weights=False, **more
    )
    model = get_peft_model(make(kind), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)


def own_update(kind: str, folder: Path) -> dict[str, Tensor]:
    """What PEFT adds to each parameter of the model, by its own name."""
    base = make(kind).double()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    merged = PeftModel.from_pretrained(base, folder).merge_and_unload()
    return {name: tensor - before[name] for name, tensor in merged.state_dict().items()}


def recipe(folder: Path, **more: Any) -> Path:
    content = {"base_model": "base", "merge_method": "task_arithmetic", "parameters": {"scale": 0.5}, **more}
    content.setdefault("models", [{"model": "one"}, {"model": "two"}])
    (folder / "recipe.yaml").write_text(json.dumps(content))
    return folder / "recipe.yaml"


def write(folder: Path, kind: str, *, fused: bool, targets: tuple[list[str], list[str]] = (TARGETS, TARGETS)) -> None:
    make(kind).save_pretrained(folder / "base", save_original_format=not fused)
    for seed, (name, chosen) in enumerate(zip(("one", "two"), targets, strict=True), 1):
        adapter(kind, folder / name, seed, chosen)
        path = folder / name / "adapter_config.json"
        settings = json.loads(path.read_text())
        path.write_text(json.dumps(settings | {"base_model_name_or_path": None}))


@pytest.mark.parametrize("fused", [True, False], ids=["one tensor", "hub"])
@pytest.mark.parametrize("kind", CLASSES)
def test_full_models_hold_what_peft_adds(tmp_path: Path, kind: str, fused: bool) -> None:
    """Half the sum of both updates, by PEFT in float64: also where the hub's files store each expert's matrices apart."""
    write(tmp_path, kind, fused=fused)
    report = merge(recipe(tmp_path, output={"form": "full"}), tmp_path / "out")
    stored_apart = not fused and kind != "GptOss"
    said = "18 of the linear weights are experts'" if stored_apart else "12 experts in 4 tensors merged"
    assert said in report.plan.summary()
    assert "recomputed" in verify(tmp_path / "out", full=True).summary()
    wanted = {name: tensor.double() for name, tensor in make(kind).state_dict().items()}
    for specialist in ("one", "two"):
        for name, update in own_update(kind, tmp_path / specialist).items():
            wanted[name] = wanted[name] + 0.5 * update
    found, info = type(make(kind)).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor.double(), wanted[name], atol=1e-6, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:The following:RuntimeWarning")
@pytest.mark.parametrize("kind", ["Qwen3Moe", "Mixtral"])
def test_an_adapter_of_a_hub_base_names_its_matrices(tmp_path: Path, kind: str) -> None:
    """`experts.0.up_proj.lora_A`, as adapters were before experts were fused: PEFT turns these into its own form."""
    write(tmp_path, kind, fused=False)
    merge(recipe(tmp_path), tmp_path / "out")
    one, two, found = (own_update(kind, tmp_path / name) for name in ("one", "two", "out"))
    assert float(found["model.layers.1.mlp.experts.gate_up_proj"].abs().max()) > 1e-3
    for name, update in found.items():
        torch.testing.assert_close(update, 0.5 * (one[name] + two[name]), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("method", ["ssam", "ties", "tsv"])
@pytest.mark.parametrize("targets", [(TARGETS, TARGETS), (TARGETS, TARGETS[1:])], ids=["both", "one of them"])
@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss"])
def test_adapters_hold_each_experts_merge(tmp_path: Path, kind: str, targets: Any, method: str) -> None:
    """PEFT loads the adapter, and adds to every expert what the method gives of this expert's updates alone."""
    from modalloy import merge_deltas

    write(tmp_path, kind, fused=True, targets=targets)
    more = {"output": {"compress_rank": 16}} if method == "ties" else {}
    parameters = {"scale": 1.0, "rank": 2} if method == "ssam" else {"scale": 1.0}
    made = recipe(tmp_path, merge_method=method, parameters=parameters, missing="zero", **more)
    report = merge(made, tmp_path / "out")
    assert report.plan.form.name == "adapter"
    assert "recomputed" in verify(tmp_path / "out", full=True).summary()
    one, two, found = (own_update(kind, tmp_path / name) for name in ("one", "two", "out"))
    for name, update in found.items():
        if ".experts." not in name or name.endswith("_bias"):
            continue
        for index in range(3):
            wanted = merge_deltas([one[name][index], two[name][index]], method=method, **parameters)
            torch.testing.assert_close(update[index], wanted, atol=2e-5, rtol=1e-4)


def test_an_expert_is_summed_with_a_fine_tuned_copy(tmp_path: Path) -> None:
    """An adapter beside a full model: every method gets both of an expert's updates."""
    write(tmp_path, "Qwen3Moe", fused=True)
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    torch.manual_seed(9)
    tuned = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in tensors.items() if "experts" in name}
    make("Qwen3Moe").save_pretrained(tmp_path / "full", save_original_format=False)
    save_file(tensors | tuned, tmp_path / "full" / "model.safetensors", metadata={"format": "pt"})
    models = [{"model": "one"}, {"model": "full"}]
    merge(recipe(tmp_path, models=models, missing="zero"), tmp_path / "out")
    assert "recomputed" in verify(tmp_path / "out", full=True).summary()
    merged, update = load_file(tmp_path / "out" / "model.safetensors"), own_update("Qwen3Moe", tmp_path / "one")
    for name, start in tensors.items():
        if "experts" in name:
            wanted = start.double() + 0.5 * (update[name] + tuned[name].double() - start.double())
            torch.testing.assert_close(merged[name].double(), wanted, atol=1e-6, rtol=1e-6)


def test_the_weight_of_a_router_is_a_parameter_too(tmp_path: Path) -> None:
    """It is a matrix like others, and a router: kept unless a rule speaks of it."""
    make("Qwen3Moe").save_pretrained(tmp_path / "base")
    adapter("Qwen3Moe", tmp_path / "one", 1, [*TARGETS, "mlp.gate.weight"])
    with pytest.raises(ModalloyError, match=r"updates model\.layers\.0\.mlp\.gate\.weight, but routers are kept"):
        merge(recipe(tmp_path, models=[{"model": "one"}]), tmp_path / "out")
    rules = {"*mlp.gate.weight": {"policy": "average"}}
    merge(recipe(tmp_path, models=[{"model": "one"}], modules=rules, output={"form": "full"}), tmp_path / "out")
    found = transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    update = own_update("Qwen3Moe", tmp_path / "one")
    for name, start in make("Qwen3Moe").state_dict().items():
        torch.testing.assert_close(found[name].double(), start + 0.5 * update[name], atol=1e-6, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:The following:RuntimeWarning")  # PEFT looks for modules, and uses them
def test_ranks_and_alphas_by_pattern_are_read(tmp_path: Path) -> None:
    make("Qwen3Moe").save_pretrained(tmp_path / "base")
    more: dict[str, Any] = {"use_rslora": True, "rank_pattern": {"down_proj": 3}, "alpha_pattern": {"gate_up_proj": 5}}
    adapter("Qwen3Moe", tmp_path / "one", 1, TARGETS, **more)
    merge(recipe(tmp_path, models=[{"model": "one"}], output={"form": "full"}), tmp_path / "out")
    found = transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    update = own_update("Qwen3Moe", tmp_path / "one")
    for name, start in make("Qwen3Moe").state_dict().items():
        torch.testing.assert_close(found[name].double(), start + 0.5 * update[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_parameters": ["mlp.experts.w_in", "mlp.experts.down_proj"]},
            r"updates none of the parameters .*w_in",
        ),
        ({"target_parameters": ["gate_up_proj"]}, r"names a parameter without its module"),
        ({"target_parameters": "mlp.experts.down_proj"}, r"target_parameters is .*, not a list of names"),
        (
            {"r": 4, "rank_pattern": {"q_proj": 2}},
            r"has 6 rows, .* implies 3 experts of rank 4 in model\.layers\.0\.mlp\.experts\.(gate_up|down)_proj",
        ),
        ({"target_parameters": []}, r"has rank 6, .* implies 2; the two files do not belong together"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    write(tmp_path, "Qwen3Moe", fused=True)
    path = tmp_path / "one" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(ModalloyError, match=message):
        merge(recipe(tmp_path, models=[{"model": "one"}]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_square_experts_are_refused(tmp_path: Path) -> None:
    """Versions of PEFT differ in which side of a parameter is which, and a square one does not tell."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**(SIZES | CLASSES["Qwen3Moe"] | {"moe_intermediate_size": 16}))
    model = transformers.Qwen3MoeForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    settings = LoraConfig(r=2, target_modules=[], target_parameters=TARGETS[1:], init_lora_weights=False)
    get_peft_model(model, settings).save_pretrained(tmp_path / "one")
    with pytest.raises(
        ModalloyError, match=r"experts of .*down_proj are square \(16 × 16\), and versions of PEFT differ"
    ):
        merge(recipe(tmp_path, models=[{"model": "one"}]), tmp_path / "out")

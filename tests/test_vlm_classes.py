"""Fine-tunes and LoRAs of whole multimodal models, of every class: equal to float64 arithmetic, tensor by tensor.

What is a linear weight is asked of the class's modules (`torch.nn.Linear`), not of our own rules. `benchmarks/vlm_classes.py`
runs what is here with every method, and its results are a table of the documentation.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from native_models import MAKERS
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from modalloy import merge
from modalloy.senses.anatomy import own_names
from modalloy.verify import verify

METHODS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"scale": 0.5},
    "ties": {"density": 0.4, "combine": "mean", "scale": 0.8},
    "ssam": {"rank": 3, "scale": 0.7},
    "optmerge": {"variant": "lora", "iterations": 40, "lr": 0.02, "momentum": 0.9, "scale": 0.9},
}
WITH_ONE = {"task_arithmetic": 0.5, "ties": 0.8, "ssam": 1.4, "optmerge": 0.9}  # λ / λ_auto, for norms and biases
Updates = dict[str, Tensor]  # by the class's own names, float64


def linears(model: Any) -> list[str]:
    """The own names of all linear weights but the output head's."""
    head = model.get_output_embeddings()
    modules = model.named_modules()
    return [f"{name}.weight" for name, one in modules if isinstance(one, torch.nn.Linear) and one is not head]


@torch.no_grad()
def fine_tune(name: str, folder: Path, seed: int, *, hub: bool) -> Updates:
    """A copy of a model with other linear weights, norms and biases, saved in the hub's names or in the class's own."""
    model, draw = MAKERS[name]()[0], torch.Generator().manual_seed(seed)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    chosen = set(linears(model))
    for key, parameter in model.named_parameters():
        if key in chosen or parameter.dim() == 1:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    model.save_pretrained(folder, save_original_format=hub)
    return {key: tensor.double() - before[key].double() for key, tensor in model.state_dict().items()}


def lora(name: str, folder: Path, seed: int, *, hub: bool) -> Updates:
    """An all-linear LoRA, its tensors named after the modules of today or after the hub's files (trainers of older versions)."""
    torch.manual_seed(seed)
    model = MAKERS[name]()[0]
    stored = {
        own: file for file, own in own_names(model, load_file(folder.parent / "base" / "model.safetensors")).items()
    }
    settings = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules="all-linear")
    get_peft_model(model, settings).save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    rows, renamed, found = load_file(file), {}, {}
    for key, tensor in rows.items():
        module, _, factor = key.removeprefix("base_model.model.").rpartition(".lora_")
        stem = stored.get(f"{module}.weight", f"{module}.weight").removesuffix(".weight") if hub else module
        renamed[f"base_model.model.{stem}.lora_{factor}"] = tensor
        if factor == "A.weight":
            found[f"{module}.weight"] = 2 * rows[key.replace("lora_A", "lora_B")].double() @ tensor.double()
    save_file(renamed, file)
    return found


def wanted(model: Any, method: str, updates: list[Updates]) -> dict[str, Tensor]:
    """Every tensor of the result by the class's own names: linear weights by the method, norms and biases as their mean."""
    found = {key: tensor.double() for key, tensor in model.state_dict().items()}
    merged = getattr(reference, method)
    for key in linears(model):
        if all(key in one for one in updates):
            found[key] = found[key] + torch.as_tensor(merged([one[key].numpy() for one in updates], **METHODS[method]))
    for key in found:
        if found[key].dim() == 1 and all(key in one for one in updates):
            found[key] = found[key] + WITH_ONE[method] * sum(one[key] for one in updates) / len(updates)
    return found


def check(name: str, folder: Path, kind: str, methods: list[str], *, hub: bool) -> int:
    """Merge two fine-tunes ("full") or two LoRAs ("lora") into a class's model; how many tensors were compared in each merge.

    One of the two is in the hub's names and one in the class's own; `hub`: which the base has.
    """
    base = MAKERS[name]()[0]
    base.save_pretrained(folder / "base", save_original_format=hub)
    make = fine_tune if kind == "full" else lora
    updates = [make(name, folder / f"{kind}{seed}", seed, hub=seed == 1) for seed in (1, 2)]
    assert any(bool(update.any()) for update in updates[0].values())
    compared = 0
    for method in methods:
        content = {
            "base_model": "base",
            "merge_method": method,
            "parameters": METHODS[method],
            "dtype": "float64",
            "models": [{"model": f"{kind}1"}, {"model": f"{kind}2"}],
            "output": {"form": "full"},
        }
        (folder / "recipe.yaml").write_text(json.dumps(content))
        out = folder / f"{kind}-{method}-{hub}"
        merge(folder / "recipe.yaml", out)
        assert "recomputed" in verify(out, full=True).summary()
        result, info = type(base).from_pretrained(out, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        state = result.state_dict()
        for key, tensor in wanted(base, method, updates).items():
            error = float((state[key].double() - tensor).abs().max())
            assert error < 2e-6 * max(1.0, float(tensor.abs().max())), f"{method}: {key} is {error:.1e} away"
        compared = len(state)
    return compared


SOME = list(MAKERS)[::3]  # all are in the benchmark, with every method


@pytest.mark.parametrize("name", SOME)
def test_two_of_a_class_equal_float64(tmp_path: Path, name: str) -> None:
    """One method and kind for each class, in turn."""
    index = SOME.index(name)
    kind, method = ("full", "lora")[index % 2], list(METHODS)[index // 2 % 4]
    assert check(name, tmp_path, kind, [method], hub=index // 4 % 2 == 0) > 10

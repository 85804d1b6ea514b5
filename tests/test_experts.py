"""Fused experts (experts, ·, ·) are so many weights, each merged by the recipe's method."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modalloy import merge, merge_deltas
from modalloy.errors import ModalloyError
from modalloy.verify import verify

EXPERTS, WIDTH, FFN = 3, 16, 24
LAYER = "model.layers.0."
UP, DOWN = f"{LAYER}mlp.experts.gate_up_proj", f"{LAYER}mlp.experts.down_proj"
ROUTER, QUERY = f"{LAYER}mlp.gate.weight", f"{LAYER}self_attn.q_proj.weight"
SHAPES = {
    "out, in": {UP: (EXPERTS, 2 * FFN, WIDTH), DOWN: (EXPERTS, WIDTH, FFN)},
    "in, out": {UP: (EXPERTS, WIDTH, 2 * FFN), DOWN: (EXPERTS, FFN, WIDTH)},
}
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_experts": EXPERTS,
    "vocab_size": 40,
}


def write(folder: Path, sides: str, count: int = 2) -> list[dict[str, Tensor]]:
    """A base and fine-tunes; their tensors in float64."""
    draw = torch.Generator().manual_seed(0)
    shapes = SHAPES[sides] | {QUERY: (WIDTH, WIDTH), ROUTER: (EXPERTS, WIDTH)}
    found = [{name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}]
    for _ in range(count):
        found.append({name: w + 0.1 * torch.randn(w.shape, generator=draw) for name, w in found[0].items()})
    for index, tensors in enumerate(found):
        place = folder / ("base" if index == 0 else f"tuned{index}")
        place.mkdir(parents=True, exist_ok=True)
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        (place / "config.json").write_text(json.dumps(CONFIG))
    return [{name: tensor.double() for name, tensor in tensors.items()} for tensors in found]


def recipe(folder: Path, method: str, **more: Any) -> Path:
    models = [{"model": f"tuned{index}"} for index in (1, 2)]
    content = {"base_model": "base", "merge_method": method, "models": models, "output": {"form": "full"}, **more}
    (folder / "recipe.yaml").write_text(json.dumps(content))
    return folder / "recipe.yaml"


@pytest.mark.parametrize("sides", SHAPES)
@pytest.mark.parametrize("method", ["task_arithmetic", "ssam", "ties", "tsv", "optmerge", "wudi", "knots", "iso_cts"])
def test_each_expert_is_merged_as_a_weight_of_its_own(tmp_path: Path, method: str, sides: str) -> None:
    """As E separate merges; methods that tell a weight's sides apart get it as (out, in), whatever way it is stored."""
    base, *tuned = write(tmp_path, sides)
    report = merge(recipe(tmp_path, method), tmp_path / "out")
    assert f"1 linear weights merged ({method}" in report.plan.summary()
    assert f"{2 * EXPERTS} experts in 2 tensors merged" in report.plan.summary()
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name in (UP, DOWN):
        for index in range(EXPERTS):
            turn = sides == "in, out"
            updates = [one[name][index] - base[name][index] for one in tuned]
            updates = [one.T.contiguous() if turn else one for one in updates]
            wanted = merge_deltas(updates, method=method)
            dense = wanted.up @ wanted.down if hasattr(wanted, "up") else wanted
            difference = found[name][index].double() - base[name][index] - (dense.T if turn else dense)
            assert float(difference.abs().max()) < 2e-5, (name, index)
    assert torch.equal(found[ROUTER].double(), base[ROUTER])
    assert "12 of" not in verify(tmp_path / "out", full=True).note
    counted = verify(tmp_path / "out", full=True).recomputed
    assert counted["merged"] == 1 + 2 * EXPERTS


def test_a_changed_expert_is_noticed(tmp_path: Path) -> None:
    write(tmp_path, "out, in")
    merge(recipe(tmp_path, "ssam"), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors[UP][1, 5, 5] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    import hashlib

    manifest["outputs"]["model.safetensors"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    with pytest.raises(ModalloyError, match=r"gate_up_proj\[1\] differs from what the recipe gives"):
        verify(tmp_path / "out", full=True)


@pytest.mark.parametrize("method", ["optmerge", "ssam"])
def test_a_way_round_that_cannot_be_told(tmp_path: Path, method: str) -> None:
    """Square experts: methods that mind are refused, others need not know."""
    draw = torch.Generator().manual_seed(1)
    write(tmp_path, "out, in")
    for folder in ("base", "tuned1", "tuned2"):
        tensors = load_file(tmp_path / folder / "model.safetensors")
        tensors[DOWN] = torch.randn(EXPERTS, WIDTH, WIDTH, generator=draw)
        save_file(tensors, tmp_path / folder / "model.safetensors", metadata={"format": "pt"})
    file = recipe(tmp_path, method)
    if method == "ssam":
        assert merge(file, tmp_path / "out").plan.merged_weights() == 1 + 2 * EXPERTS
        return
    said = r"down_proj: optmerge tells a weight's inputs from its outputs, and neither name nor config say which is which in 3 ×"
    with pytest.raises(ModalloyError, match=said):
        merge(file, tmp_path / "out")


def test_experts_need_a_form_that_holds_them(tmp_path: Path) -> None:
    write(tmp_path, "out, in")
    file = recipe(tmp_path, "ssam", output={"form": "adapter", "compress_rank": 4})
    with pytest.raises(
        ModalloyError, match=r"holds low-rank updates only, but \S+experts\S+ holds whole experts; write form: full"
    ):
        merge(file, tmp_path / "out")


def test_a_bfloat16_mixture_is_merged_within_its_memory(tmp_path: Path) -> None:
    write(tmp_path, "out, in")
    report = merge(recipe(tmp_path, "ssam", out_dtype="bfloat16"), tmp_path / "out", jobs=1)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert report.verification.layers == 1 + 2 * EXPERTS

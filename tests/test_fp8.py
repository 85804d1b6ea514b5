"""FP8 checkpoints: codes and scales are read as the numbers that they stand for, never merged as codes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from modalloy import merge
from modalloy.errors import ModalloyError
from modalloy.storage.locate import open_base
from modalloy.verify import verify

BLOCK = (16, 24)
LARGEST = 448.0  # of float8_e4m3fn
KINDS = ("block", "row", "tensor")
SCHEMES: dict[str, dict[str, Any]] = {
    "block": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)},
    "row": {"quant_method": "compressed-tensors", "format": "float-quantized"},
    "tensor": {"quant_method": "compressed-tensors", "format": "float-quantized"},
}


def quantised(weight: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales, and the numbers that they stand for in float64."""
    rows, columns = weight.shape
    high, wide = {"block": BLOCK, "row": (1, columns), "tensor": (rows, columns)}[kind]
    scales = torch.empty(-(-rows // high), -(-columns // wide))
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    numbers = torch.empty(rows, columns, dtype=torch.float64)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide))
            scales[i, j] = weight[part].abs().max() / LARGEST
            codes[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
            numbers[part] = codes[part].double() * scales[i, j].double()
    return codes, scales.reshape(()) if kind == "tensor" else scales, numbers


def write(folder: Path, model: Any, kind: str) -> dict[str, Tensor]:
    """The model in FP8 (its linears) and float32; its numbers in float64."""
    model.save_pretrained(folder)
    rows, found = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        found[name] = tensor.double()
        if name.endswith("_proj.weight"):
            codes, scales, found[name] = quantised(tensor, kind)
            rows |= {name: codes, name + ("_scale_inv" if kind == "block" else "_scale"): scales}
            if kind == "tensor":
                rows[name.removesuffix("weight") + "input_scale"] = torch.ones(1)
        else:
            rows[name] = tensor
    save_file(rows, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": SCHEMES[kind]}
    (folder / "config.json").write_text(json.dumps(config))
    return found


def tiny(seed: int) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, vocab_size=40
    )
    model = transformers.LlamaForCausalLM(config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * seed * torch.randn_like(parameter))
    return model


def recipe(folder: Path, models: list[str], **more: Any) -> Path:
    content = {
        "base_model": "base",
        "merge_method": "task_arithmetic",
        "models": [{"model": m} for m in models],
        **more,
    }
    (folder / "recipe.yaml").write_text(json.dumps(content))
    return folder / "recipe.yaml"


@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_scales_are_read_as_their_numbers(tmp_path: Path, kind: str) -> None:
    wanted = write(tmp_path / "base", tiny(0), kind)
    base = open_base(tmp_path / "base")
    assert base.refs.keys() == wanted.keys()
    for name, ref in base.refs.items():
        assert torch.allclose(base.read(ref).double(), wanted[name], rtol=1e-7, atol=0), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_is_that_of_the_dequantised_models(tmp_path: Path, kind: str) -> None:
    base, one, two = (write(tmp_path / name, tiny(seed), kind) for seed, name in enumerate(("base", "one", "two")))
    report = merge(recipe(tmp_path, ["one", "two"], out_dtype="float32"), tmp_path / "out")
    assert report.plan.form.name == "full" and report.plan.merged_weights() == 14
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == base.keys()
    for name, tensor in found.items():
        if name.endswith("_proj.weight"):
            assert torch.allclose(tensor.double(), one[name] + two[name] - base[name], atol=1e-6), name
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and loaded.dtype == torch.float32
    assert "recomputed" in verify(tmp_path / "out", full=True).summary()


def test_numbers_are_written_as_bfloat16_by_themselves(tmp_path: Path) -> None:
    write(tmp_path / "base", tiny(0), "block")
    write(tmp_path / "one", tiny(1), "block")
    merge(recipe(tmp_path, ["one"], modules={"*.layers.0.*": {"policy": "keep"}}), tmp_path / "out")
    types = {name: tensor.dtype for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items()}
    assert {dtype for name, dtype in types.items() if name.endswith("_proj.weight")} == {torch.bfloat16}
    assert "recomputed" in verify(tmp_path / "out", full=True).summary()


def test_an_adapter_goes_into_an_fp8_base(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(tiny(0), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "lora")
    base = write(tmp_path / "base", tiny(0), "block")
    merge(recipe(tmp_path, ["lora"], output={"form": "full"}, out_dtype="float32"), tmp_path / "out")
    rows = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    update = (
        2
        * rows[f"base_model.model.{name}.lora_B.weight"].double()
        @ rows[f"base_model.model.{name}.lora_A.weight"].double()
    )
    found = load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight"]
    assert torch.allclose(found.double(), base[f"{name}.weight"] + update, atol=1e-6)


def test_codes_without_scales_are_refused(tmp_path: Path) -> None:
    for name in ("base", "one"):
        write(tmp_path / name, tiny(0), "block")
    file = tmp_path / "one" / "model.safetensors"
    rows = load_file(file)
    del rows["model.layers.1.mlp.up_proj.weight_scale_inv"]
    save_file(rows, file, metadata={"format": "pt"})
    with pytest.raises(
        ModalloyError, match=r"model\.layers\.1\.mlp\.up_proj\.weight \(torch\.float8_e4m3fn.*"
    ) as error:
        merge(recipe(tmp_path, ["one"]), tmp_path / "out")
    assert "\n" not in str(error.value)


def test_scales_of_another_shape_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "base", tiny(0), "block")
    write(tmp_path / "one", tiny(1), "block")
    file = tmp_path / "base" / "model.safetensors"
    rows = load_file(file)
    rows["model.layers.1.mlp.up_proj.weight_scale_inv"] = torch.ones(3, 3)
    save_file(rows, file, metadata={"format": "pt"})
    said = r"up_proj\.weight_scale_inv is \(3, 3\), which are no scales of 56 × 32 codes \(blocks of \[16, 24\]\)"
    with pytest.raises(ModalloyError, match=said):
        merge(recipe(tmp_path, ["one"]), tmp_path / "out")

"""FP8 checkpoints: codes and scales are read as the numbers that they stand for, never merged as codes."""

import hashlib
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


def again(weight: Tensor, kind: str) -> Tensor:
    """The numbers of a weight that is written as codes and scales, in float64."""
    return quantised(weight.float(), kind)[2]


@pytest.mark.parametrize("method", ["task_arithmetic", "ssam"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_codes_and_scales_again_on_request(tmp_path: Path, kind: str, method: str) -> None:
    """What is merged is quantised in the base's scheme, what is kept has the base's codes, and transformers' config says so."""
    from modalloy import merge_deltas

    base, one, two = (write(tmp_path / name, tiny(seed), kind) for seed, name in enumerate(("base", "one", "two")))
    rules = {"*.layers.0.*": {"policy": "keep"}}
    parameters = {"scale": 1.0} | ({"rank": 2} if method == "ssam" else {})
    made = recipe(
        tmp_path, ["one", "two"], merge_method=method, parameters=parameters, modules=rules, output={"requantize": True}
    )
    report = merge(made, tmp_path / "out")
    before, found = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {n: (t.dtype, t.shape) for n, t in before.items()}
    read, errors = open_base(tmp_path / "out"), []
    for name, ref in read.refs.items():
        if "layers.0." in name or not name.endswith("_proj.weight"):
            continue
        exact = base[name] + merge_deltas([one[name] - base[name], two[name] - base[name]], method=method, **parameters)
        written = read.read(ref).double()
        assert (
            float((written - again(exact, kind)).norm() / exact.norm()) < 2e-3
        )  # ties between two codes fall either way
        errors.append(float((written - exact).norm() / exact.norm()))
    assert len(errors) == 7 and report.compression_error == pytest.approx(max(errors), rel=1e-3)
    assert 0.01 < max(errors) < 0.04
    for name, tensor in before.items():
        if "layers.0." in name or "_proj" not in name or name.endswith("input_scale"):
            assert (
                torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
                or "norm" in name
            )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"] == SCHEMES[kind]
    assert "recomputed" in verify(tmp_path / "out", full=True).summary()


def test_a_changed_scale_is_noticed(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "one")):
        write(tmp_path / name, tiny(seed), "block")
    merge(recipe(tmp_path, ["one"], output={"requantize": True}), tmp_path / "out")
    file, manifest = tmp_path / "out" / "model.safetensors", tmp_path / "out" / "manifest.json"
    rows = load_file(file)
    rows["model.layers.1.mlp.up_proj.weight_scale_inv"][0, 0] *= 1.01
    save_file(rows, file, metadata={"format": "pt"})
    content = json.loads(manifest.read_text())
    content["outputs"]["model.safetensors"] = hashlib.sha256(file.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(content))
    with pytest.raises(ModalloyError, match=r"up_proj\.weight differs from what the recipe gives"):
        verify(tmp_path / "out", full=True)


def test_scales_that_are_powers_of_two_stay_so(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "one")):
        write(tmp_path / name, tiny(seed), "block")
        file = tmp_path / name / "model.safetensors"
        rows = load_file(file)
        for key, scales in rows.items():
            if key.endswith("_scale_inv"):
                rows[key] = torch.exp2(scales.log2().ceil())
        save_file(rows, file, metadata={"format": "pt"})
        path = tmp_path / name / "config.json"
        config = json.loads(path.read_text())
        config["quantization_config"]["scale_fmt"] = "ue8m0"
        path.write_text(json.dumps(config))
    merge(recipe(tmp_path, ["one"], output={"requantize": True}), tmp_path / "out")
    rows = load_file(tmp_path / "out" / "model.safetensors")
    scales = [tensor for name, tensor in rows.items() if name.endswith("_scale_inv")]
    assert len(scales) == 14 and all(torch.equal(one.log2(), one.log2().round()) for one in scales)
    assert "recomputed" in verify(tmp_path / "out", full=True).summary()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"output": {"requantize": True, "dtype": "bfloat16"}},
            r"writes the base's own FP8 scheme, and dtype bfloat16",
        ),
        ({"output": {"requantize": True, "form": "omni"}}, r"is of full models, but the form is 'omni'"),
        (
            {"output": {"requantize": True}, "base_model": "plain"},
            r"plain has no FP8 weights whose scheme could be used",
        ),
    ],
)
def test_there_must_be_a_scheme(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    for seed, name in enumerate(("base", "one")):
        write(tmp_path / name, tiny(seed), "block")
    tiny(0).save_pretrained(tmp_path / "plain")
    with pytest.raises(ModalloyError, match=message):
        merge(recipe(tmp_path, ["one"], **more), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("requantize", [False, True])
def test_experts_of_codes_in_one_tensor(tmp_path: Path, requantize: bool) -> None:
    """Each expert's matrix is dequantised, merged and, on request, written as codes and scales by itself."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_experts": 3, "vocab_size": 40}
    draw, name = torch.Generator().manual_seed(0), "model.layers.0.mlp.experts.down_proj"
    first = torch.randn(3, 32, 48, generator=draw)
    numbers = []
    for folder in ("base", "one", "two"):
        tuned = first + (0 if folder == "base" else 0.1 * torch.randn(first.shape, generator=draw))
        parts = [quantised(matrix, "block") for matrix in tuned]
        rows = {
            name: torch.stack([codes for codes, _, _ in parts]),
            f"{name}_scale_inv": torch.stack([scales for _, scales, _ in parts]),
        }
        numbers.append(torch.stack([one for _, _, one in parts]))
        (tmp_path / folder).mkdir()
        save_file(rows, tmp_path / folder / "model.safetensors", metadata={"format": "pt"})
        config = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], **sizes}
        (tmp_path / folder / "config.json").write_text(json.dumps(config | {"quantization_config": SCHEMES["block"]}))
    report = merge(recipe(tmp_path, ["one", "two"], output={"requantize": requantize}), tmp_path / "out")
    exact = numbers[1] + numbers[2] - numbers[0]
    found = open_base(tmp_path / "out")
    written = found.read(found.refs[name]).double()
    wanted = torch.stack([again(matrix, "block") for matrix in exact]) if requantize else exact
    assert float((written - wanted).norm() / exact.norm()) < 4e-3
    assert (report.compression_error is not None) == requantize
    assert "recomputed" in verify(tmp_path / "out", full=True).summary()

"""One tensor under all the names that trainers, wrappers and versions of transformers have for it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import native_models
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from modalloy import merge
from modalloy.errors import CheckpointError, ModalloyError
from modalloy.specialists.spelling import canonical, unwrapped
from modalloy.verify import verify

SAME = {
    "decoder.layers.0.mlp.up_proj.weight": [
        "model.layers.0.mlp.up_proj.weight",
        "language_model.model.layers.0.mlp.up_proj.weight",
        "model.language_model.layers.0.mlp.up_proj.weight",
        "model.text_model.layers.0.mlp.up_proj.weight",
    ],
    "visual.blocks.0.attn.qkv.weight": ["visual.blocks.0.attn.qkv.weight", "model.visual.blocks.0.attn.qkv.weight"],
    "lm_head.weight": ["lm_head.weight", "language_model.lm_head.weight"],
}


@pytest.mark.parametrize("wanted", SAME)
def test_spellings_of_one_tensor(wanted: str) -> None:
    assert {canonical(name) for name in SAME[wanted]} == {wanted}


WRAPPED: dict[str, Callable[[str], str]] = {
    "torch.compile": lambda name: "_orig_mod." + name,
    "torch.compile inside": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    "FSDP": lambda name: name.replace("self_attn", "_fsdp_wrapped_module.self_attn"),
    "checkpointing": lambda name: name.replace("self_attn", "_checkpoint_wrapped_module.self_attn"),
    "DDP": lambda name: "module." + name,
    "a raw state dict": lambda name: name.replace(".weight", ".default.weight"),
}


@pytest.fixture(scope="module")
def vlms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Multimodal bases as transformers saves them, in the hub's names."""
    root = tmp_path_factory.mktemp("vlms")
    for name in ("llava", "qwen2_5_vl", "gemma3", "qwen3_vl", "qwen2_audio"):
        native_models.MAKERS[name]()[0].save_pretrained(root / name)
    return root


def lora(root: Path, base: str, folder: Path, targets: str, seed: int) -> dict[str, torch.Tensor]:
    """A PEFT adapter of a base, saved; its updates by modules in float64."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    cls = getattr(transformers, json.loads((root / base / "config.json").read_text())["architectures"][0])
    settings = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=targets)
    get_peft_model(cls.from_pretrained(root / base), settings).save_pretrained(folder)
    rows = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name, a in rows.items():
        if ".lora_A." in name:
            b = rows[name.replace("lora_A", "lora_B")]
            stem = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[f"{stem}.weight"] = 2 * b.double() @ a.double()
    return found


def write_recipe(folder: Path, base: Path, models: list[Path], **more: Any) -> Path:
    content = {
        "base_model": str(base),
        "merge_method": "task_arithmetic",
        "models": [{"model": str(m)} for m in models],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(json.dumps(content | more))
    return folder / "recipe.yaml"


ALL_LINEAR = (
    r".*(language_model|visual|vision_tower|audio_tower).*\.(q_proj|v_proj|qkv|fc1|up_proj|down_proj|gate_proj)"
)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "qwen3_vl", "qwen2_audio"])
def test_adapters_of_a_multimodal_base_act_in_peft_and_in_the_model(vlms: Path, tmp_path: Path, name: str) -> None:
    """Through decoder and tower, though files and modules have other names: as a merged adapter, and in a full model."""
    from peft import PeftModel

    wanted: dict[str, torch.Tensor] = {}
    for seed in (1, 2):
        for module, update in lora(vlms, name, tmp_path / f"a{seed}", ALL_LINEAR, seed).items():
            wanted[module] = wanted.get(module, 0) + update
    cls = getattr(transformers, json.loads((vlms / name / "config.json").read_text())["architectures"][0])
    before = dict(cls.from_pretrained(vlms / name).named_parameters())
    adapters = [tmp_path / "a1", tmp_path / "a2"]
    for form in ("adapter", "full"):
        out = tmp_path / form
        merge(write_recipe(tmp_path / f"r{form}", vlms / name, adapters, output={"form": form}), out)
        assert "recomputed" in verify(out, full=True).summary()
        if form == "adapter":
            after: Any = PeftModel.from_pretrained(cls.from_pretrained(vlms / name), out).merge_and_unload()
        else:
            after, info = cls.from_pretrained(out, output_loading_info=True)
            assert not info["missing_keys"] and not info["unexpected_keys"]
        moved = dict(after.named_parameters())
        for module, start in before.items():
            error = (moved[module].detach().double() - start.detach().double() - wanted.get(module, 0)).abs().max()
            assert float(error) < 1e-5, (form, module)


def test_a_text_adapter_of_the_plain_decoder_fits_the_model_around_it(vlms: Path, tmp_path: Path) -> None:
    updates = lora(vlms, "qwen3_vl", tmp_path / "a", r".*language_model.*\.q_proj", 3)
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({name.replace("model.language_model.", "model."): t for name, t in load_file(file).items()}, file)
    report = merge(
        write_recipe(tmp_path, vlms / "qwen3_vl", [tmp_path / "a"], output={"form": "full"}), tmp_path / "out"
    )
    assert report.plan.merged_weights() == len(updates) == 2


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_what_wrappers_leave_in_names(vlms: Path, tmp_path: Path, wrapper: str) -> None:
    lora(vlms, "llava", tmp_path / "a", r".*language_model.*self_attn\.q_proj", 1)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    file = tmp_path / "b" / "adapter_model.safetensors"
    save_file({WRAPPED[wrapper](name): tensor for name, tensor in load_file(file).items()}, file)
    for name in "ab":
        merge(write_recipe(tmp_path / f"r{name}", vlms / "llava", [tmp_path / name]), tmp_path / f"out{name}")
    first, second = ((tmp_path / f"out{name}" / "adapter_model.safetensors").read_bytes() for name in "ab")
    assert first == second


def test_an_adapter_of_which_no_name_is_the_bases(vlms: Path, tmp_path: Path) -> None:
    lora(vlms, "llava", tmp_path / "a", r".*language_model.*self_attn\.q_proj", 1)
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({name.replace("layers", "blocks"): tensor for name, tensor in load_file(file).items()}, file)
    said = (
        r"none of its 2 updates names a weight of the base llava: \S+blocks\.0\.self_attn\.q_proj\.lora_A\.weight would be one "
        r"of \S+, and the nearest name there is \S+layers\.0\.self_attn\.q_proj\.weight .* rename its tensors"
    )
    with pytest.raises(ModalloyError, match=said):
        merge(write_recipe(tmp_path, vlms / "llava", [tmp_path / "a"]), tmp_path / "out")


def test_two_names_that_are_one_without_wrappers() -> None:
    with pytest.raises(CheckpointError, match=r"_orig_mod\.a\.weight and a\.weight are two names of one tensor"):
        unwrapped(["a.weight", "_orig_mod.a.weight"])
    assert unwrapped(["module.a", "b"]) == {"module.a": "module.a", "b": "b"}  # not every name has it


def test_an_adapter_one_folder_down_is_named(vlms: Path, tmp_path: Path) -> None:
    lora(vlms, "llava", tmp_path / "down" / "checkpoint-10", r".*language_model.*self_attn\.q_proj", 1)
    with pytest.raises(
        ModalloyError, match=r"down holds no weights, but an adapter in \S*down/checkpoint-10; give that folder"
    ):
        merge(write_recipe(tmp_path, vlms / "llava", [tmp_path / "down"]), tmp_path / "out")


def test_towers_are_kept_on_request(vlms: Path, tmp_path: Path) -> None:
    model = native_models.llava()[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "tuned")
    recipe = write_recipe(tmp_path, vlms / "llava", [tmp_path / "tuned"], towers="keep", output={"form": "full"})
    report = merge(recipe, tmp_path / "out")
    assert report.plan.merged_weights() == 14
    found, base = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", vlms / "llava"))
    for name, tensor in base.items():
        outside = not canonical(name).startswith(("decoder.", "lm_head."))
        assert not outside or torch.equal(found[name], tensor)
    assert "recomputed" in verify(tmp_path / "out", full=True).summary()
    plain = native_models.built(native_models.text("Llama"), "LlamaForCausalLM")
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(
        ModalloyError, match=r"towers: keep is of a multimodal base, but plain has nothing beside its decoder"
    ):
        merge(write_recipe(tmp_path, tmp_path / "plain", [tmp_path / "tuned"], towers="keep"), tmp_path / "two")

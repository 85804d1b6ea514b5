"""What a tensor is: told from config, modules and shape; and what a merge does with what is no linear weight."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from synthetic import write_base, write_lora, write_tuned
from torch import Tensor

import modalloy
from modalloy.errors import CheckpointError, ModalloyError, RecipeError
from modalloy.planning.kinds import kinds
from modalloy.promise import Promises
from modalloy.storage.tensors import TensorRef
from modalloy.verify import verify

CONFIG = {
    "hidden_size": 32,
    "text_config": {"intermediate_size": 48, "vocab_size": 40, "max_position_embeddings": 64},
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
NAMES: dict[str, tuple[str, tuple[int, ...]]] = {
    "model.tok_embeddings.weight": ("embedding", (40, 32)),
    "output.weight": ("embedding", (40, 32)),
    "transformer.word_embeddings.weight": ("embedding", (40, 32)),
    "transformer.wte.weight": ("embedding", (40, 32)),
    "shared.weight": ("embedding", (40, 32)),
    "model.embed_tokens_per_layer.weight": ("embedding", (40, 64)),
    "transformer.odd_name.weight": ("embedding", (40, 32)),  # by its rows, outside the layers
    "transformer.turned.weight": ("embedding", (32, 40)),
    "transformer.wpe.weight": ("position", (64, 32)),
    "model.decoder.embed_positions.weight": ("position", (66, 32)),
    "visual.pos_embed.weight": ("position", (100, 32)),
    "vision_model.embeddings.position_embedding.weight": ("position", (50, 32)),
    "visual.positional_embedding": ("position", (50, 32)),
    "vision_tower.layers.0.attn.rel_pos_h": ("position", (27, 8)),
    "transformer.rows.weight": ("position", (66, 32)),  # by its rows, outside the layers
    "aligner.vision_proj.weight": ("linear", (64, 48)),  # which has a bias
    "aligner.vision_proj.bias": ("vector", (64,)),
    "talker.audio_bos_eos_token.weight": ("embedding", (2, 32)),
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": ("position", (32, 8)),
    "model.layers.0.mlp.gate.weight": ("router", (4, 32)),
    "model.layers.0.mlp.gate.e_score_correction_bias": ("router", (4,)),
    "model.layers.0.block_sparse_moe.router.layer.weight": ("router", (4, 32)),
    "model.layers.0.mlp.experts.0.up_proj.weight": ("linear", (48, 32)),
    "model.layers.0.ffn.experts.expert_0.fc1.weight": ("linear", (48, 32)),
    "model.layers.0.mlp.deepspeed_moe.experts.deepspeed_experts.0.up_proj.weight": ("linear", (48, 32)),
    "model.layers.0.mlp.deepspeed_moe.gate.wg.weight": ("router", (4, 32)),
    "model.layers.0.mlp.experts.gate_up_proj": ("expert", (4, 32, 96)),
    "model.layers.0.mlp.experts.gate_up_proj_bias": ("expert", (4, 96)),
    "transformer.blocks.0.ffn.experts.mlp.w1": ("expert", (192, 32)),
    "model.layers.0.block_sparse_moe.input_linear.weight": ("expert", (4, 96, 32)),
    "visual.patch_embed.proj.weight": ("kernel", (32, 3, 2, 2, 2)),
    "vision_model.embeddings.patch_embedding.weight": ("kernel", (32, 3, 14, 14)),
    "encoder.conv1.weight": ("kernel", (32, 80, 3)),
    "query_tokens": ("parameter", (1, 32, 32)),
    "visual.proj": ("parameter", (32, 48)),
    "model.layers.0.mlp.gate_proj.weight": ("linear", (48, 32)),
    "model.layers.0.self_attn.q_proj.weight": ("linear", (32, 32)),
    "visual.attn.in_proj_weight": ("linear", (96, 32)),
    "vision_model.patch_embedding.weight": ("linear", (32, 588)),  # a linear layer over patches
    "visual.vision_patch_embed.weight": ("linear", (32, 588)),
    "multi_modal_projector.linear_1.weight": ("linear", (32, 48)),
    "model.layers.0.output.dense.weight": ("linear", (32, 48)),
    "model.layers.0.input_layernorm.weight": ("vector", (32,)),
    "logit_scale": ("vector", ()),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_is_what_its_module_and_shape_say(name: str) -> None:
    refs = {one: TensorRef(one, torch.bfloat16, shape, Path("x"), 0) for one, (_, shape) in NAMES.items()}
    assert kinds(CONFIG, refs)[name] == NAMES[name][0]


def test_verify_says_of_every_tensor_what_the_planner_says() -> None:
    """The two say it by themselves; where they differ, a right merge would be refused."""
    same = {"linear": "matrix", "vector": "vector", "embedding": "rows", "position": "rows", "router": "rows"}
    names = ["patch_embed.weight", "posemb", "rel_emb.weight", "mlp_shared.weight", "unembed.weight", "lm_head.weight"]
    names += [
        "router.layer.weight",
        "moe.gate.global_scale",
        "moe.gate.norm.weight",
        "wte.weight",
        "vision_embed_tokens.weight",
    ]
    shapes = [(32,), (32, 48), (40, 32), (66, 32), (50, 32), (4, 32, 48), (1, 64, 32), (32, 3, 2, 2)]
    tables = [{name: shape for name, (_, shape) in NAMES.items()}]
    tables += [dict.fromkeys(["moe.experts.w", *NAMES, *names], shape) for shape in shapes]
    config = CONFIG | {"codebook_size": 50}
    for table in tables:
        refs = {name: TensorRef(name, torch.float32, shape, Path("x"), 0) for name, shape in table.items()}
        promises = Promises.__new__(Promises)
        promises.config, promises.base = config, cast(Any, SimpleNamespace(refs=refs))
        for name, kind in kinds(config, refs).items():
            assert promises._what(refs[name]) == same.get(kind, "other"), (name, refs[name].shape, kind)


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "kind"),
    [
        ("model.layers.0.q_proj.weight", torch.int8, (32, 32), "code"),
        ("model.layers.0.experts.gate_up_proj_blocks", torch.uint8, (4, 96, 2, 16), "code"),
        ("vision_model.embeddings.position_ids", torch.int64, (1, 50), "buffer"),
        ("h.0.attn.bias", torch.uint8, (1, 1, 64, 64), "buffer"),
        ("h.0.attn.masked", torch.bool, (64, 64), "buffer"),
        ("bn.num_batches_tracked", torch.int64, (), "buffer"),
    ],
)
def test_whole_numbers_are_codes_or_buffers(name: str, dtype: torch.dtype, shape: tuple[int, ...], kind: str) -> None:
    assert kinds(CONFIG, {name: TensorRef(name, dtype, shape, Path("x"), 0)})[name] == kind


def test_names_without_end_are_read_in_time() -> None:
    names = ["pos" * 100_000, "experts." * 50_000, "a_" * 200_000 + "embed.weight", "x." * 200_000 + "weight"]
    refs = {name: TensorRef(name, torch.float32, (8, 8), Path("x"), 0) for name in names}
    assert set(kinds({"num_experts": 8}, refs).values()) <= {"linear", "parameter", "expert"}


# --------------------------------------------------------------------------------------------------------- merges


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A base, two full fine-tunes and two adapters of it."""
    write_base(tmp_path / "base")
    for seed in (1, 2):
        write_tuned(tmp_path / f"tuned{seed}", tmp_path / "base", seed=seed)
        write_lora(tmp_path / f"lora{seed}", tmp_path / "base", seed=seed)
    return tmp_path


def edit(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file({name: value.contiguous() for name, value in change(load_file(path)).items()}, path, {"format": "pt"})


def recipe(folder: Path, *names: str, **changes: Any) -> Path:
    content: dict[str, Any] = {"base_model": "base", "merge_method": "task_arithmetic", "output": {"form": "full"}}
    content["models"] = [{"model": name} for name in names]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content | changes))
    return folder / "recipe.yaml"


def merged(folder: Path, *names: str, **changes: Any) -> tuple[dict[str, Tensor], str]:
    """The tensors of the verified result, and what the merge says of itself."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    report = modalloy.merge(recipe(folder, *names, **changes), out)
    verify(out)
    return {name: one.double() for path in out.glob("*.safetensors") for name, one in load_file(path).items()}, (
        report.plan.summary()
    )


def of(folder: Path, name: str) -> dict[str, Tensor]:
    return {key: one.double() for key, one in load_file(folder / name / "model.safetensors").items()}


def refused(folder: Path, *names: str, **changes: Any) -> str:
    with pytest.raises(ModalloyError) as error:
        modalloy.merge(recipe(folder, *names, **changes), folder / "out")
    assert not (folder / "out").exists() and "\n" not in str(error.value)
    return str(error.value)


NORM = "model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize("method", ["task_arithmetic", "ssam", "average", "tsv"])
@pytest.mark.parametrize("names", [("base", "tuned1", "tuned2"), ("tuned1", "copy", "tuned2")])
def test_the_base_among_the_models_is_no_specialist(names: tuple[str, ...], method: str, models: Path) -> None:
    shutil.copytree(models / "base", models / "copy")
    without, _ = merged(models, "tuned1", "tuned2", merge_method=method)
    found, said = merged(models, *names, merge_method=method)
    assert all(torch.equal(found[name], without[name]) for name in without)
    assert re.search(r"(base#1|base|copy) does not count \((is the base itself|changes nothing)", said)


@pytest.mark.parametrize("method", ["average", "ssam", "ties", "tsv", "linear", "metagpt"])
def test_a_weight_of_0_is_absence(method: str, models: Path) -> None:
    alone, _ = merged(models, "tuned1", merge_method=method)
    listed = [{"model": "tuned1"}, {"model": "tuned2", "parameters": {"weight": 0}}]
    found, said = merged(models, merge_method=method, models=listed)
    assert all(torch.equal(found[name], alone[name]) for name in alone)
    assert "tuned2 does not count (its weight is 0)" in said


def test_a_weight_of_0_in_one_layer_is_absence_there(models: Path) -> None:
    listed = [{"model": "tuned1"}, {"model": "tuned2", "parameters": {"weight": [0, 1, 1, 1, 1]}}]
    found, _ = merged(
        models, merge_method="average", models=listed, modules={"model.resampler.weight": {"policy": "keep"}}
    )
    base, one, two = (of(models, name) for name in ("base", "tuned1", "tuned2"))
    for name in one:
        if "layers.0." in name:
            torch.testing.assert_close(found[name], one[name], atol=1e-7, rtol=0)
        elif "layers." in name:
            torch.testing.assert_close(found[name], (one[name] + two[name]) / 2, atol=1e-7, rtol=0)
        else:
            assert torch.equal(found[name], base[name])


@pytest.mark.parametrize("kind", ["tuned", "lora"])
@pytest.mark.parametrize("method", ["ssam", "linear", "ties", "dare_ties", "wudi", "metagpt"])
def test_where_all_weights_are_0_a_layer_is_the_bases_bit_for_bit(method: str, kind: str, models: Path) -> None:
    edit(models / "base/model.safetensors", lambda t: {k: v.where(v > 0, -0.0) for k, v in t.items()})
    listed = [{"model": f"{kind}{i}", "parameters": {"weight": [0, 1]}} for i in (1, 2)]
    outside = {"model.resampler.weight": {"policy": "keep"}} if kind == "tuned" else {}
    merged(models, merge_method=method, models=listed, modules=outside)
    written, start = load_file(models / "out/model.safetensors"), load_file(models / "base/model.safetensors")
    for name in (name for name in start if "layers.0." in name):
        assert torch.equal(written[name].view(torch.uint8), start[name].view(torch.uint8)), name
    last = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(written[last], start[last])


@pytest.mark.parametrize(
    "method", ["average", "ssam", "ties", "tsv", "iso_c", "dare_linear", "consensus", "metagpt", "linear"]
)
def test_a_scale_of_0_is_the_base_bit_for_bit(method: str, models: Path) -> None:
    edit(models / "base/model.safetensors", lambda t: {k: v.where(v > 0, -0.0) for k, v in t.items()})
    strength = "alpha" if method == "linear" else "scale"
    merged(models, "tuned1", "tuned2", merge_method=method, parameters={strength: 0})
    written = load_file(models / "out/model.safetensors")
    for name, tensor in load_file(models / "base/model.safetensors").items():
        assert torch.equal(written[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize(
    ("method", "parameters", "factor"),
    [("task_arithmetic", {"scale": 0.25}, 0.25), ("ssam", {"scale": 0.25}, 0.5), ("linear", {"alpha": 0.3}, 0.3)],
)
def test_weights_and_scale_reach_norms(method: str, parameters: dict[str, Any], factor: float, models: Path) -> None:
    weights = (2.0, -0.5)
    listed = [{"model": f"tuned{i + 1}", "parameters": {"weight": weight}} for i, weight in enumerate(weights)]
    found, said = merged(models, merge_method=method, parameters=parameters, models=listed)
    base, *tuned = (of(models, name)[NORM] for name in ("base", "tuned1", "tuned2"))
    mean = sum(weight * (one - base) for weight, one in zip(weights, tuned, strict=True)) / 2
    torch.testing.assert_close(found[NORM], base + factor * mean, atol=1e-7, rtol=0)
    assert "a model's weight is a factor of its update, never normalised" in said


def test_what_full_models_changed_of_embeddings_is_said(models: Path) -> None:
    found, said = merged(models, "tuned1", "tuned2")
    assert torch.equal(found["model.embed_tokens.weight"], of(models, "base")["model.embed_tokens.weight"])
    share = 20 * 16 / sum(tensor.numel() for tensor in of(models, "base").values())
    assert f"1 embeddings that tuned1, tuned2 changed stay the base's ({share:.1%} of the parameters)" in said
    ruled, said = merged(models, "tuned1", "tuned2", modules={"*embed_tokens*": {"merge_method": "average"}})
    mean = (of(models, "tuned1")["model.embed_tokens.weight"] + of(models, "tuned2")["model.embed_tokens.weight"]) / 2
    torch.testing.assert_close(ruled["model.embed_tokens.weight"], mean, atol=1e-7, rtol=0)
    assert "changed stay" not in said


def with_experts(models: Path, *, names: tuple[str, ...] = ("base", "tuned1", "tuned2"), router: bool = False) -> None:
    for seed, name in enumerate(names):
        more = {"model.layers.0.mlp.experts.down_proj": torch.full((3, 4, 5), float(seed))}
        more |= {"model.layers.0.mlp.gate.weight": torch.full((3, 16), float(seed))} if router else {}
        edit(models / name / "model.safetensors", lambda tensors, more=more: tensors | more)


def test_fused_experts_are_merged_by_the_method_or_by_a_rule(models: Path) -> None:
    with_experts(models)
    found, said = merged(models, "tuned1", "tuned2", merge_method="ties", parameters={"density": 1})
    assert bool((found["model.layers.0.mlp.experts.down_proj"] == 1.5).all())
    assert "3 experts in 1 tensors merged, each as a weight of its own" in said
    shutil.rmtree(models / "out")
    found, said = merged(models, "tuned1", "tuned2", merge_method="ties", modules={"*experts*": {"policy": "average"}})
    assert bool((found["model.layers.0.mlp.experts.down_proj"] == 1.5).all())
    assert re.search(r"1 fused experts averaged by rule \(\d\.\d% of the parameters\)", said)
    found, said = merged(models, "tuned1", "tuned2", merge_method="ties", modules={"*experts*": {"policy": "keep"}})
    assert not found["model.layers.0.mlp.experts.down_proj"].any()
    assert "1 fused experts that tuned1, tuned2 changed stay the base's" in said


def test_fused_experts_that_nobody_changed_are_kept(models: Path) -> None:
    for name in ("base", "tuned1", "tuned2"):
        with_experts(models, names=(name,))
    found, said = merged(models, "tuned1", "tuned2", merge_method="ties")
    assert not found["model.layers.0.mlp.experts.down_proj"].any() and "experts that" not in said


def test_routers_stay_the_bases_and_are_named(models: Path) -> None:
    with_experts(models, router=True)
    found, said = merged(models, "tuned1", "tuned2")
    assert bool((found["model.layers.0.mlp.experts.down_proj"] == 3).all())  # a sum of updates, whatever the shape
    assert not found["model.layers.0.mlp.gate.weight"].any()
    assert "1 routers that tuned1, tuned2 changed stay the base's" in said


def test_a_rule_reaches_the_bias_of_a_router_or_is_refused(models: Path) -> None:
    with_experts(models, router=True)
    bias = "model.layers.0.mlp.gate.bias"
    for value, name in enumerate(("base", "tuned1", "tuned2")):
        edit(models / f"{name}/model.safetensors", lambda t, value=value: t | {bias: torch.full((3,), float(value))})
    found, _ = merged(models, "tuned1", "tuned2", modules={"*mlp.gate.*": {"merge_method": "task_arithmetic"}})
    assert bool((found[bias] == 3).all() and (found["model.layers.0.mlp.gate.weight"] == 3).all())
    shutil.rmtree(models / "out")
    said = refused(models, "tuned1", "tuned2", modules={"*mlp.gate.*": {"merge_method": "ties"}})
    assert f"ties merges matrices, but {bias} is one of the routers (3); write policy: keep or average" in said


def test_a_matrix_that_is_no_modules_weight_is_merged_by_the_method_of_its_rule(models: Path) -> None:
    for value, name in enumerate(("base", "tuned1", "tuned2")):
        edit(
            models / f"{name}/model.safetensors",
            lambda t, value=value: t | {"visual.proj": torch.full((3, 4), value / 2)},
        )
    assert "changed visual.proj" in refused(models, "tuned1", "tuned2", merge_method="ties")
    rule = {"visual.proj": {"merge_method": "ties", "parameters": {"density": 1}}}
    found, _ = merged(models, "tuned1", "tuned2", merge_method="ties", modules=rule)
    assert bool((found["visual.proj"] == 0.75).all())


def test_the_correction_bias_of_a_router_stays_the_bases(models: Path) -> None:
    name = "model.layers.0.mlp.gate.e_score_correction_bias"
    with_experts(models, router=True)
    for value, model in enumerate(("base", "tuned1", "tuned2")):
        edit(models / f"{model}/model.safetensors", lambda t, value=value: t | {name: torch.full((3,), float(value))})
    found, said = merged(models, "tuned1", "tuned2")
    assert not found[name].any() and "2 routers that tuned1, tuned2 changed stay the base's" in said


def test_an_adapter_of_a_router_needs_a_rule(models: Path) -> None:
    with_experts(models, names=("base",), router=True)
    stem = "base_model.model.model.layers.0.mlp.gate"
    factors = {f"{stem}.lora_A.weight": torch.ones(4, 16), f"{stem}.lora_B.weight": torch.ones(3, 4)}
    edit(models / "lora1/adapter_model.safetensors", lambda tensors: tensors | factors)
    assert "updates model.layers.0.mlp.gate.weight, but routers are kept" in refused(models, "lora1")
    rule = {"model.layers.0.mlp.gate.weight": {"merge_method": "task_arithmetic"}}
    found, _ = merged(models, "lora1", modules=rule)
    assert bool((found["model.layers.0.mlp.gate.weight"] == 8).all())  # 2 · 1 · 4


@pytest.mark.parametrize("form", ["full", "adapter"])
def test_an_adapter_of_zeros_is_said_and_not_counted(form: str, models: Path) -> None:
    edit(models / "lora2/adapter_model.safetensors", lambda t: {k: v * ("lora_A" in k) for k, v in t.items()})
    alone, _ = merged(models, "lora1", merge_method="average", output={"form": form})
    found, said = merged(models, "lora1", "lora2", merge_method="average", output={"form": form})
    assert all(torch.equal(found[name], alone[name]) for name in alone)
    assert "lora2 does not count (changes nothing: every update is zero)" in said


def test_what_a_rule_merges_otherwise_is_said(models: Path) -> None:
    rules = {"*q_proj*": {"policy": "average"}, "*k_proj*": {"policy": "keep"}}
    for names in (("lora1", "lora2"), ("tuned1", "tuned2")):
        _, said = merged(models, *names, merge_method="ties", modules=rules)
        assert "5 of the linear weights by average" in said
        assert f"5 linear weights that {', '.join(names)} changed stay the base's" in said


def test_where_every_update_is_zero_the_result_is_the_base_and_says_so(models: Path) -> None:
    for name in ("copy1", "copy2"):
        shutil.copytree(models / "base", models / name)
    found, said = merged(models, "copy1", "copy2", merge_method="ssam")
    assert all(torch.equal(found[name], tensor) for name, tensor in of(models, "base").items())
    assert "copy1, copy2 changes nothing: every update is zero, and the result is the base" in said


def test_a_merge_of_nothing_is_refused(models: Path) -> None:
    assert "nothing would be merged (base#1: is the base itself" in refused(models, "base")
    zero = [{"model": "tuned1", "parameters": {"weight": 0}}]
    assert "nothing would be merged (tuned1: its weight is 0)" in refused(models, models=zero)
    edit(models / "tuned1/model.safetensors", lambda t: {k: v for k, v in t.items() if "norm" in k})
    assert "no model holds a tuned linear weight of the base" in refused(models, "tuned1")


# ------------------------------------------------------------------------------------------------------ quantised


def quantise(folder: Path, *, config: bool) -> None:
    def codes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | {k: (v * 127).to(torch.int8) for k, v in tensors.items() if k.endswith("q_proj.weight")}

    edit(folder / "model.safetensors", codes)
    if config:
        content = json.loads((folder / "config.json").read_text())
        content["text_config"] = {"quantization_config": {"quant_method": "w8a8"}}
        (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize("which", ["base", "tuned1"])
def test_quantised_models_are_refused(which: str, config: bool, models: Path) -> None:
    quantise(models / which, config=config)
    (models / which / "README.md").write_text("---\nbase_model:\n- someone/whole-7b\n---\n")
    said = refused(models, "lora1" if which == "base" else "tuned1")
    assert "use the unquantised model that it was made from (someone/whole-7b, says its card)" in said
    assert ("says that the model is quantised by w8a8" if config else "q_proj.weight (torch.int8, ") in said


def test_scales_of_codes_are_no_weights(models: Path) -> None:
    edit(
        models / "tuned1/model.safetensors",
        lambda t: t | {"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1, 1)},
    )
    with pytest.raises(
        CheckpointError, match=r"weight_scale_inv \(torch\.float32, .*holds codes or scales of a quantised"
    ):
        modalloy.plan(modalloy.load_recipe(recipe(models, "tuned1")))


def test_a_config_that_says_quantised_of_plain_weights(models: Path) -> None:
    content = json.loads((models / "base/config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (models / "base/config.json").write_text(json.dumps(content))
    with pytest.raises(
        CheckpointError, match=r"quantised by fp8 .*if its weights are plain numbers, remove quantization_c"
    ):
        modalloy.plan(modalloy.load_recipe(recipe(models, "lora1")))


def test_a_rule_for_whole_numbers_can_only_keep_them(models: Path) -> None:
    for name in ("base", "tuned1"):
        edit(models / name / "model.safetensors", lambda t: t | {"tower.position_ids": torch.arange(3).view(1, 3)})
    with pytest.raises(
        RecipeError, match=r"tower\.position_ids holds whole numbers, which have no mean; write policy: keep"
    ):
        modalloy.plan(modalloy.load_recipe(recipe(models, "tuned1", modules={"tower.*": {"policy": "average"}})))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", NORM])
def test_whole_numbers_in_the_place_of_a_weight_are_refused(name: str, dtype: torch.dtype, models: Path) -> None:
    def codes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | {f"base_model.model.{name}": torch.ones(of(models, "base")[name].shape, dtype=dtype)}

    edit(models / "lora1/adapter_model.safetensors", codes)
    said = refused(models, "lora1", modules={name: {"policy": "average"}})
    assert f"{name} holds {dtype}, no weights" in said and "the base has torch.float32" in said


@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
def test_a_cut_between_equal_singular_values_is_verified(method: str, models: Path) -> None:
    """Many cuts are the best there: which is found depends on the precision."""
    kept = {name: {"policy": "keep"} for name, one in of(models, "base").items() if one.dim() != 2}
    output = {"form": "adapter", "compress_rank": 2}
    merged(models, "tuned1", "tuned2", merge_method=method, output=output, modules=kept)

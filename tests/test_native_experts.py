"""Native specialists whose decoder is a mixture of experts, in every way that files store experts."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from native_models import SIGN, UNTIED, Medium, built, clip, pixels, text
from test_native import EXACT, logits_of, own_logits, write_base, write_recipe, write_specialist

from modalloy import merge
from modalloy.errors import ModalloyError
from modalloy.model.load import load_model
from modalloy.verify import verify

ROUTERS = {"modules": {"*.gate.weight": {"policy": "average"}}}  # they are the base's unless a rule says more


def llava(kind: str) -> tuple[Any, Medium]:
    sizes: dict[str, Any] = {"num_experts_per_tok": 2}
    if kind == "Qwen3Moe":
        sizes |= {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 16}
    else:
        sizes |= {"num_local_experts": 4}
    config = transformers.LlavaConfig(
        vision_config=clip(), text_config=text(kind, **sizes), image_token_index=SIGN, vision_feature_layer=-2, **UNTIED
    )
    model = built(config, "LlavaForConditionalGeneration")
    return model, Medium("image", [SIGN] * 4, {"pixel_values": pixels(1, 3, 28, 28)})


@pytest.mark.parametrize("kind", ["Qwen3Moe", "Mixtral"])
@pytest.mark.parametrize("base_is_hub", [True, False], ids=["hub base", "own base"])
@pytest.mark.parametrize("is_hub", [True, False], ids=["hub", "own"])
def test_experts_are_merged_and_load(tmp_path: Path, kind: str, is_hub: bool, base_is_hub: bool) -> None:
    """A matrix of each expert, as on the hub, or one tensor of all, as transformers' class has them: the same logits."""
    model, medium = llava(kind)
    base = write_base(tmp_path / "base", model)
    write_specialist(tmp_path / "own", model)
    base.save_pretrained(tmp_path / "base", save_original_format=base_is_hub)
    model.save_pretrained(tmp_path / "own", save_original_format=is_hub)
    report = merge(write_recipe(tmp_path, [{"model": "own"}], **EXACT, **ROUTERS), tmp_path / "out")
    assert report.plan.merged_weights() > 20
    assert "recomputed" in verify(tmp_path / "out", full=True).summary()
    found = logits_of(load_model(tmp_path / "out").model, medium)
    torch.testing.assert_close(found, own_logits(model, medium), atol=1e-5, rtol=1e-5)


def test_an_own_update_leaves_experts_out(tmp_path: Path) -> None:
    """Tokens do not choose between two sets of experts: all use the merged ones."""
    model, medium = llava("Qwen3Moe")
    write_base(tmp_path / "base", model)
    write_specialist(tmp_path / "own", model)
    models = [{"model": "own", "own": {"rank": 64}}]
    merge(write_recipe(tmp_path, models, **EXACT, **ROUTERS), tmp_path / "out")
    found = logits_of(load_model(tmp_path / "out").model, medium)
    torch.testing.assert_close(found, own_logits(model, medium), atol=1e-5, rtol=1e-5)


def test_a_matrix_that_is_missing_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, _ = llava("Qwen3Moe")
    write_base(tmp_path / "base", model)
    write_specialist(tmp_path / "own", model)
    file = tmp_path / "own" / "model.safetensors"
    rows = load_file(file)
    del rows["language_model.model.layers.0.mlp.experts.2.up_proj.weight"]
    save_file(rows, file, metadata={"format": "pt"})
    with pytest.raises(ModalloyError, match=r"lacks matrices of the experts \S+experts\.gate_up_proj; download"):
        merge(write_recipe(tmp_path, [{"model": "own"}], **EXACT), tmp_path / "out")

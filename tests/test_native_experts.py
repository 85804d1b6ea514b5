"""Native specialists whose decoder is a mixture of experts."""

from pathlib import Path

import torch
import transformers
from native_models import SIGN, UNTIED, Medium, built, clip, pixels, text
from test_native import EXACT, logits_of, own_logits, write_base, write_recipe, write_specialist

from modalloy import merge
from modalloy.model.load import load_model
from modalloy.verify import verify

ROUTERS = {"modules": {"*mlp.gate.weight": {"policy": "average"}}}  # they are the base's unless a rule says more


def test_fused_experts_are_merged_and_load(tmp_path: Path) -> None:
    """LLaVA on Qwen3-MoE, in the names of transformers' own modules: the omni folder gives its logits."""
    decoder = text("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=16)
    config = transformers.LlavaConfig(
        vision_config=clip(), text_config=decoder, image_token_index=SIGN, vision_feature_layer=-2, **UNTIED
    )
    model = built(config, "LlavaForConditionalGeneration")
    medium = Medium("image", [SIGN] * 4, {"pixel_values": pixels(1, 3, 28, 28)})
    base = write_base(tmp_path / "base", model)
    write_specialist(tmp_path / "own", model)
    for tuned, folder in ((base, "base"), (model, "own")):
        tuned.save_pretrained(tmp_path / folder, save_original_format=False)
    report = merge(write_recipe(tmp_path, [{"model": "own"}], **EXACT, **ROUTERS), tmp_path / "out")
    assert report.plan.merged_weights() > 8
    assert "recomputed" in verify(tmp_path / "out", full=True).summary()
    found = logits_of(load_model(tmp_path / "out").model, medium)
    torch.testing.assert_close(found, own_logits(model, medium), atol=1e-5, rtol=1e-5)

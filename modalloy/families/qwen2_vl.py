"""Qwen2-VL and Qwen2.5-VL, as published and as transformers writes them since 4.52. Their positions in three dimensions
have no weights."""

from modalloy.families.qwen2 import RULES
from modalloy.families.rules import Family, Spelling, outside

QWEN2_VL = Family(
    "qwen2_vl",
    ("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"),
    ("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text"),
    (*RULES, *outside("vision encoder and projector", "visual.{rest}", "model.visual.{rest}")),
    (Spelling(), Spelling("model.language_model.", "")),
    {"rope_theta": 1000000.0},
)

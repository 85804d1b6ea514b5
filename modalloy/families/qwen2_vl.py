"""Qwen2-VL, as published and as transformers writes it since 4.52. Its positions in three dimensions have no weights."""

from modalloy.families.qwen2 import RULES
from modalloy.families.rules import Family, Spelling, outside

QWEN2_VL = Family(
    "qwen2_vl",
    ("Qwen2VLForConditionalGeneration",),
    ("qwen2_vl", "qwen2_vl_text"),
    (*RULES, *outside("vision encoder and projector", "visual.{rest}", "model.visual.{rest}")),
    (Spelling(), Spelling("model.language_model.", "")),
    {"rope_theta": 1000000.0},
)

"""Qwen3 and Qwen3-VL: Llama's names, with norms of queries and keys. Positions in three dimensions have no weights."""

from modalloy.families.rules import Family, NameRule, Spelling, decoder, outside

LAYER = "{model}layers.{i}.self_attn."
RULES = (
    *decoder(),
    NameRule(LAYER + "q_norm.weight", ("q_norm",)),
    NameRule(LAYER + "k_norm.weight", ("k_norm",)),
)

QWEN3 = Family("qwen3", ("Qwen3ForCausalLM",), ("qwen3",), RULES)

QWEN3_VL = Family(
    "qwen3_vl",
    ("Qwen3VLForConditionalGeneration",),
    ("qwen3_vl", "qwen3_vl_text"),
    (*RULES, *outside("vision encoder and projector", "visual.{rest}", "model.visual.{rest}")),
    (Spelling(), Spelling("model.language_model.", "")),
)

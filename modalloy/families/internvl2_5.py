"""InternVL2.5 on Qwen2.5, and on InternLM2.5, whose queries, keys and values are one tensor, interleaved by key head."""

from modalloy.families.qwen2 import RULES
from modalloy.families.rules import Family, NameRule, Spelling, outside

CHAT = ("InternVLChatModel",)
VISION = (*outside("vision encoder", "vision_model.{rest}"), *outside("projector", "mlp1.{rest}"))
SPELLING = (Spelling("language_model.model.", "language_model."),)
LAYER = "{model}layers.{i}."

INTERNVL2_5 = Family("internvl2_5", CHAT, ("qwen2",), (*RULES, *VISION), SPELLING)

INTERNVL2_5_INTERNLM = Family(
    "internvl2_5_internlm",
    CHAT,
    ("internlm2",),
    (
        NameRule("{model}tok_embeddings.weight", ("embed",)),
        NameRule(LAYER + "attention_norm.weight", ("input_norm",)),
        NameRule(LAYER + "attention.wqkv.weight", ("q", "k", "v"), grouped=True),
        NameRule(LAYER + "attention.wo.weight", ("o",)),
        NameRule(LAYER + "ffn_norm.weight", ("post_norm",)),
        NameRule(LAYER + "feed_forward.w1.weight", ("gate",)),
        NameRule(LAYER + "feed_forward.w3.weight", ("up",)),
        NameRule(LAYER + "feed_forward.w2.weight", ("down",)),
        NameRule("{model}norm.weight", ("norm",)),
        NameRule("{head}output.weight", ("head",)),
        *VISION,
    ),
    SPELLING,
    embedding="{model}tok_embeddings.weight",
)

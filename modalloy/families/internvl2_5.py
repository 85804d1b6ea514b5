"""InternVL2.5 on Qwen2.5, and on InternLM2.5, whose queries, keys and values are one tensor, interleaved by key head."""

from modalloy.families.qwen2 import RULES
from modalloy.families.rules import Family, Rule, Spelling, outside

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
        Rule("{model}tok_embeddings.weight", ("embed",)),
        Rule(LAYER + "attention_norm.weight", ("input_norm",)),
        Rule(LAYER + "attention.wqkv.weight", ("q", "k", "v"), grouped=True),
        Rule(LAYER + "attention.wo.weight", ("o",)),
        Rule(LAYER + "ffn_norm.weight", ("post_norm",)),
        Rule(LAYER + "feed_forward.w1.weight", ("gate",)),
        Rule(LAYER + "feed_forward.w3.weight", ("up",)),
        Rule(LAYER + "feed_forward.w2.weight", ("down",)),
        Rule("{model}norm.weight", ("norm",)),
        Rule("{head}output.weight", ("head",)),
        *VISION,
    ),
    SPELLING,
    embedding="{model}tok_embeddings.weight",
)

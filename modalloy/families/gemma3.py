"""Gemma 3, alone and inside its multimodal class: four norms a layer, and norms of queries and keys."""

from modalloy.families.llama import HUGGING_FACE, VISION
from modalloy.families.rules import Family, NameRule, Spelling, decoder

LAYER = "{model}layers.{i}."
RULES = (
    *decoder(),
    NameRule(LAYER + "pre_feedforward_layernorm.weight", ("pre_ffn_norm",)),
    NameRule(LAYER + "post_feedforward_layernorm.weight", ("post_ffn_norm",)),
    NameRule(LAYER + "self_attn.q_norm.weight", ("q_norm",)),
    NameRule(LAYER + "self_attn.k_norm.weight", ("k_norm",)),
)
TIED = {"tie_word_embeddings": True}  # of configs that leave it out

GEMMA3 = Family(
    "gemma3",
    ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    ("gemma3", "gemma3_text"),
    (*RULES, *VISION),
    (Spelling(), *HUGGING_FACE),
    TIED,
)

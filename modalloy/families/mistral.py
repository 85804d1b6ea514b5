"""Mistral, and LLaVA and Mistral 3 on it: Llama's names with fewer key heads."""

from modalloy.families.llama import HUGGING_FACE, VISION
from modalloy.families.rules import Family, Spelling, decoder

MISTRAL = Family(
    "mistral",
    (
        "MistralForCausalLM",
        "LlavaMistralForCausalLM",
        "LlavaForConditionalGeneration",
        "LlavaNextForConditionalGeneration",
        "Mistral3ForConditionalGeneration",
    ),
    ("mistral", "llava_mistral"),
    (*decoder(), *VISION),
    (Spelling(), *HUGGING_FACE),
    # of MistralConfig, which Hugging Face's LLaVA leaves out
    {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
)

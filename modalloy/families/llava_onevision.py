"""LLaVA-OneVision on Qwen2, in its own spelling and Hugging Face's."""

from modalloy.families.llama import HUGGING_FACE, VISION
from modalloy.families.qwen2 import RULES
from modalloy.families.rules import Family, Spelling

LLAVA_ONEVISION = Family(
    "llava_onevision",
    ("LlavaQwenForCausalLM", "LlavaOnevisionForConditionalGeneration"),
    ("qwen2", "llava", "llava_qwen"),
    (*RULES, *VISION),
    (Spelling(), *HUGGING_FACE),
)

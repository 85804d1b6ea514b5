"""Classes of transformers that hold a Qwen2 or Qwen3 beside a tower: InternVL, Qwen2-Audio, Audio Flamingo 3."""

from modalloy.families import qwen2, qwen3
from modalloy.families.llama import HUGGING_FACE, VISION
from modalloy.families.rules import Family, Spelling, outside

HEARING = outside("audio encoder", "model.audio_tower.{rest}", "audio_tower.{rest}")
CLASSES = (
    "InternVLForConditionalGeneration",
    "Qwen2AudioForConditionalGeneration",
    "AudioFlamingo3ForConditionalGeneration",
)

BESIDE_QWEN2 = Family(
    "beside_qwen2", CLASSES, ("qwen2",), (*qwen2.RULES, *VISION, *HEARING), (Spelling(), *HUGGING_FACE)
)
BESIDE_QWEN3 = Family(
    "beside_qwen3", CLASSES, ("qwen3",), (*qwen3.RULES, *VISION, *HEARING), (Spelling(), *HUGGING_FACE)
)

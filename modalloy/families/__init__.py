"""Model families: one architecture, one file, one line in FAMILIES. Any two that share an ancestor can be mapped."""

from typing import Any

from modalloy.errors import CheckpointError, nearest
from modalloy.families.cogvlm import COGVLM
from modalloy.families.gemma3 import GEMMA3
from modalloy.families.hugging_face import BESIDE_QWEN2, BESIDE_QWEN3
from modalloy.families.internvl2_5 import INTERNVL2_5, INTERNVL2_5_INTERNLM
from modalloy.families.llama import LLAMA
from modalloy.families.llava_onevision import LLAVA_ONEVISION
from modalloy.families.mistral import MISTRAL
from modalloy.families.mplug_owl2 import MPLUG_OWL2
from modalloy.families.qwen2 import QWEN2
from modalloy.families.qwen2_vl import QWEN2_VL
from modalloy.families.qwen3 import QWEN3, QWEN3_VL
from modalloy.families.rules import Family, text_config

FAMILIES = {
    family.name: family
    for family in (
        BESIDE_QWEN2,
        BESIDE_QWEN3,
        COGVLM,
        GEMMA3,
        INTERNVL2_5,
        INTERNVL2_5_INTERNLM,
        LLAMA,
        LLAVA_ONEVISION,
        MISTRAL,
        MPLUG_OWL2,
        QWEN2,
        QWEN2_VL,
        QWEN3,
        QWEN3_VL,
    )
}


def family_of(config: dict[str, Any]) -> Family:
    """The family that a config.json names by its `architectures` and, where one class holds several, its text part.

    Raises:
        CheckpointError: no family has this architecture.
    """
    named = config.get("architectures")
    architectures = named if isinstance(named, list) else []
    decoder = text_config(config).get("model_type")
    fitting = [family for family in FAMILIES.values() if set(architectures).intersection(family.architectures)]
    chosen = [family for family in fitting if len(fitting) == 1 or decoder in family.decoders]
    if len(chosen) == 1:
        return chosen[0]
    known = [name for family in FAMILIES.values() for name in family.architectures]
    found = f"{', '.join(map(str, architectures)) or 'nothing'} with a decoder of type {decoder}"
    hint = nearest(str(architectures[0]) if architectures else "", set(known))
    raise CheckpointError(f"config.json: architectures names {found}, which no family maps; {hint}")

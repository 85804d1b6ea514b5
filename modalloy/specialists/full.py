"""The layout of full models: every weight is a fine-tuned copy of the base's, ΔW = W − W_0.

A LLaVA model holds its vision tower and projector beside the language model. Which names these are is known only against
the base, so `place_in_base` is called once that is open.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modalloy.errors import CheckpointError
from modalloy.specialists.specialist import (
    ADAPTER_STEMS,
    LLAVA_PROJECTOR,
    Layout,
    Specialist,
    put,
    put_update,
    twice,
    unignored,
)
from modalloy.specialists.spelling import places_in
from modalloy.specialists.stacked import place_stacked
from modalloy.storage.config import read_config
from modalloy.storage.folder import present
from modalloy.storage.locate import BASE_STEMS
from modalloy.storage.tensors import Checkpoint

# prefixes of the language model inside a Hugging Face LLaVA, before and since transformers 4.52, and in a plain decoder
DECODER = {"language_model.model.": "model.", "model.language_model.": "model.", "language_model.lm_head.": "lm_head."}
TOWER = re.compile(r"(?:model\.)?vision_tower\..+")


def open_full(folder: Path, label: str, ignore: Sequence[str]) -> Specialist:
    """A specialist that is a full model; all its tensors count as tuned copies until `place_in_base` has seen the base."""
    has_model = any(path for stem in BASE_STEMS for path in folder.glob(f"{stem}.*"))
    if not has_model and present(folder, ["mm_projector.bin"]):
        raise CheckpointError(
            f"{folder}: holds only the projector of a pretraining stage (mm_projector.bin), no update of the language "
            "model; give the folder of the fine-tuning stage"
        )
    checkpoint = Checkpoint(folder, (*BASE_STEMS, *ADAPTER_STEMS))  # no adapter file: named for the message
    config = read_config(folder)
    text = config.get("text_config")
    specialist = Specialist(
        label, checkpoint, "full", config | (text if isinstance(text, dict) else {}), None, is_whole=True
    )
    specialist.tuned = dict(unignored(specialist, ignore))
    return specialist


def place_in_base(specialist: Specialist, base: Checkpoint, base_config: dict[str, Any]) -> None:
    """Give every update and tuned tensor whose name the base does not have the place it belongs to.

    Raises:
        CheckpointError: a tensor belongs nowhere, or it is not certain that it can be left out.
    """
    place_stacked(specialist, base, base_config)
    folder = specialist.checkpoint.folder if specialist.is_whole else base.folder
    respelled = places_in(base, base_config, [*specialist.tuned, *specialist.text_lora], folder)
    for name in respelled.keys() & specialist.tuned.keys():
        put(specialist.tuned, respelled[name], specialist.tuned.pop(name))
    for slot in respelled.keys() & specialist.text_lora.keys():
        put_update(specialist, respelled[slot], specialist.text_lora.pop(slot))
    for slot in [slot for slot in specialist.text_lora if slot not in base.refs and decoder_name(slot) in base.refs]:
        put_update(specialist, decoder_name(slot), specialist.text_lora.pop(slot))
    for name in [name for name in specialist.tuned if name not in base.refs]:
        ref = specialist.tuned.pop(name)
        plain = decoder_name(name)
        if plain in base.refs:
            put(specialist.tuned, plain, ref)
        elif projector := LLAVA_PROJECTOR.fullmatch(name):
            put(specialist.projector, projector["rest"], ref)
        elif TOWER.fullmatch(name) and _tower_is_frozen(specialist):
            specialist.dropped[ref.name] = "frozen encoder; named by `encoder:`"
        elif name.endswith(".rotary_emb.inv_freq"):
            specialist.dropped[ref.name] = "computed from the config when a model is loaded"
        elif plain == "lm_head.weight" and _is_tied(specialist, base_config):
            specialist.dropped[ref.name] = "the base ties it to its embeddings"
        else:
            raise CheckpointError(f"{specialist.label} specialist: {ref.name} ({ref.file}) {_misfit(ref.name, plain)}")
    for slot in specialist.text_lora.keys() & specialist.tuned.keys():
        raise twice(specialist.text_lora[slot].a, specialist.tuned[slot])


def _misfit(name: str, plain: str) -> str:
    """Why a tensor cannot be placed, and what to do about it."""
    if TOWER.search(name):
        return (
            "may have been trained (only a full LLaVA's unfreeze_mm_vision_tower: false says otherwise); "
            f"list '{name.partition('vision_tower.')[0]}vision_tower.*' under `ignore:` to leave the encoder out"
        )
    if plain == "lm_head.weight":
        return (
            "is a head of its own, but the base ties its head to its embeddings; "
            "use the base it was trained from, or list the tensor under `ignore:`"
        )
    return "is not in the base; use the base it was trained from, or list the tensor under `ignore:`"


def decoder_name(name: str) -> str:
    """The name of a tensor in a plain decoder."""
    for prefix, plain in DECODER.items():
        if name.startswith(prefix):
            return plain + name.removeprefix(prefix)
    return name


def _tower_is_frozen(specialist: Specialist) -> bool:
    """Whether LLaVA's own record says which encoder it is and that it was not trained."""
    config = specialist.config
    recorded = config.get("unfreeze_mm_vision_tower") is False and isinstance(config.get("mm_vision_tower"), str)
    return recorded and specialist.is_whole  # what is saved beside an adapter was trained


def _is_tied(specialist: Specialist, base_config: dict[str, Any]) -> bool:
    """Whether its head is a copy of its embeddings: its config says so, or is silent where the base's, which ties, is too."""
    if not specialist.is_whole:
        return bool(specialist.config.get("ensure_weight_tying"))  # else PEFT trains the head apart from the embeddings
    own = specialist.config.get("tie_word_embeddings")
    if own is None:
        return base_config.get("tie_word_embeddings") is None
    return own is True


LAYOUT = Layout("full", lambda folder: True, open_full)  # whatever is no adapter

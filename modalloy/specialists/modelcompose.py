"""The layout of ModelCompose (arXiv 2402.12750): one file of adapters, projector and extra tokens, and `config.json`.

The text adapter is called `default`, the modality adapter after its modality; `lora_strategy: same` has `default` only.
"""

from collections.abc import Sequence
from pathlib import Path

from modalloy.errors import CheckpointError, shown
from modalloy.names import disk_name
from modalloy.specialists.specialist import (
    ADAPTER_STEMS,
    BESIDE_ADAPTER,
    COMPOSE_LORA,
    LOCAL_TOKENS,
    PEFT_PREFIX,
    Layout,
    Specialist,
    check_rank,
    number,
    pair_factors,
    put,
    put_projector,
    recorded_base,
    set_modality,
    twice,
    unignored,
    unknown_tensor,
)
from modalloy.storage.config import read_config
from modalloy.storage.tensors import Checkpoint, TensorRef

MERGED = ("reset_scaling_weights", "merge_default_weights")  # config keys that ModelCompose's own merge writes


def open_modelcompose(folder: Path, label: str, ignore: Sequence[str]) -> Specialist:
    """A specialist in ModelCompose's layout, LoRA scale `lora_alpha / lora_r`."""
    checkpoint = Checkpoint(folder, ADAPTER_STEMS, BESIDE_ADAPTER)
    path = folder / "config.json"
    config = read_config(folder)
    if key := next((key for key in MERGED if config.get(key)), None):
        raise CheckpointError(f"{path}: {key} marks a merge of several specialists; give the specialists themselves")
    specialist = Specialist(label, checkpoint, "modelcompose", config, recorded_base(config, "_name_or_path"))
    pairs: dict[tuple[str, str], dict[str, TensorRef]] = {}
    for name, ref in unignored(specialist, ignore):
        if lora := COMPOSE_LORA.fullmatch(name):
            put(pairs.setdefault((lora["adapter"], lora["stem"] + ".weight"), {}), lora["side"], ref)
        elif tokens := LOCAL_TOKENS.fullmatch(name):
            if tokens["adapter"] == "default":
                specialist.dropped[name] = "nothing reads it (ModelCompose)"
            else:
                set_modality(specialist, tokens["adapter"], name)
                put(specialist.tokens, tokens["side"], ref)
        elif not put_projector(specialist, name.removeprefix(PEFT_PREFIX), ref):
            raise unknown_tensor(specialist, ref, "lora_A/lora_B, modal_projectors, prefix_tokens, suffix_tokens")
    rank = number(config, "lora_r", 128, path)
    scale = number(config, "lora_alpha", 256, path) / rank
    for (adapter, slot), pair in pairs.items():
        factors = pair_factors(specialist, slot, pair, scale)
        check_rank(specialist, factors, rank, path)
        if adapter == "default":
            specialist.text_lora[slot] = factors
        else:
            set_modality(specialist, adapter, factors.a.name)
            if slot in specialist.modality_lora:
                raise twice(specialist.modality_lora[slot].a, factors.a)
            specialist.modality_lora[slot] = factors
    if not specialist.text_lora:
        raise CheckpointError(f"{folder}: has no text adapter ('default'), so there is nothing to merge")
    if specialist.modality is None:
        raise CheckpointError(f"{folder}: no tensor names a modality; give a ModelCompose specialist or a PEFT adapter")
    _check_config(specialist, path)
    return specialist


def _check_config(specialist: Specialist, path: Path) -> None:
    """What config.json says of the adapters must be what the weights hold."""
    config, disk = specialist.config, disk_name(specialist.modality or "")
    for key, default in (("lora_r", 128), ("lora_alpha", 256)):
        general = config.get(key, default)
        if config.get(f"{disk}_{key}", general) != general:
            raise CheckpointError(
                f"{path}: {disk}_{key} is {shown(config[f'{disk}_{key}'])}, {key} is {shown(general)}, and ModelCompose "
                "reads only the latter; make them the same"
            )
    strategy = config.get("lora_strategy")
    if strategy is not None and not isinstance(strategy, str):
        raise CheckpointError(f"{path}: lora_strategy is {shown(strategy)}, not a text; correct the file")
    expected = {"modal+language": True, "same": False}
    if strategy in expected and expected[strategy] != bool(specialist.modality_lora):
        has = "a modality adapter" if specialist.modality_lora else "no modality adapter"
        raise CheckpointError(
            f"{path.parent}: config.json says lora_strategy '{strategy}' but the file has {has}; use matching files"
        )


LAYOUT = Layout("modelcompose", lambda folder: any(folder.glob("adapter_model.*")), open_modelcompose)

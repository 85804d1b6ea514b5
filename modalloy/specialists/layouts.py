"""Opening a specialist: its layout is told by its files and tensor names, never by the folder's name.

- ModelCompose (`adapter_model.{safetensors,bin}` + `config.json`): modelcompose.py
- PEFT (`adapter_model.{safetensors,bin}` + `adapter_config.json`), also with LLaVA's `non_lora_trainables.bin`: peft.py
- a full model (`model.safetensors`, sharded or `.bin`), also LLaVA's: full.py
- a multimodal model of transformers, beside a base that is a language model: native.py
"""

from collections.abc import Sequence
from pathlib import Path

from modalloy.errors import CheckpointError
from modalloy.specialists import full, modelcompose, native, peft
from modalloy.specialists.specialist import ADAPTER_STEMS, Layout, Specialist
from modalloy.storage.folder import is_there, reading
from modalloy.storage.locate import BASE_STEMS

LAYOUTS = (peft.LAYOUT, modelcompose.LAYOUT, full.LAYOUT)  # the first that recognises a folder opens it
NATIVE = (native.LAYOUT, *LAYOUTS)  # where the base is a language model, and a multimodal one is more than it
ENDINGS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")


def open_specialist(
    folder: Path,
    *,
    modality: str | None = None,
    label: str | None = None,
    ignore: Sequence[str] = (),
    layouts: Sequence[Layout] = LAYOUTS,
) -> Specialist:
    """A specialist whose tensors are sorted; reads headers and configs only.

    Args:
        folder: local folder.
        modality: what the recipe says it sees; checked against the tensor names.
        label: how messages call it; default: the modality, else the folder's name.
        ignore: name patterns of tensors to leave out.
        layouts: those that are looked for, in this order.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor is one that no rule covers.
    """
    label = label or modality or folder.name
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; correct the path of the {label} specialist in the recipe")
    check_not_above(folder, label)
    layout = next(layout for layout in layouts if layout.recognise(folder))
    if not layout.joins_adapter:
        check_one_kind(folder)
    specialist = layout.open(folder, label, ignore)
    if specialist.native is not None:
        able = specialist.native.modalities
        if modality is not None and modality not in able:
            raise CheckpointError(
                f"{folder}: a {specialist.native.cls} takes {' and '.join(able)}, the recipe says '{modality}'; correct the recipe"
            )
        specialist.modality = modality or (able[0] if len(able) == 1 else None)
    elif specialist.modality is None:
        specialist.modality = modality
    elif modality is not None and modality != specialist.modality:
        raise CheckpointError(
            f"{folder}: its tensors belong to modality '{specialist.modality}', the recipe says '{modality}'; correct the recipe"
        )
    return specialist


def check_not_above(folder: Path, label: str) -> None:
    """Refuse a folder that holds nothing itself, but folders of adapters: which one is meant only its user knows."""
    if any(is_there(folder / (stem + ending)) for stem in (*ADAPTER_STEMS, *BASE_STEMS) for ending in ENDINGS):
        return
    with reading(folder):
        below = sorted(path.parent for path in folder.glob("*/adapter_config.json"))
    if below and not is_there(folder / "adapter_config.json"):
        raise CheckpointError(
            f"{label} specialist: {folder} holds no weights, but an adapter in {', '.join(map(str, below[:3]))}; give that folder"
        )


def check_one_kind(folder: Path) -> None:
    """An adapter beside the model that it was merged into: each alone would be read, and they are two specialists."""
    adapters, models = (
        [stem + ending for stem in stems for ending in ENDINGS if is_there(folder / (stem + ending))]
        for stems in (ADAPTER_STEMS, BASE_STEMS)
    )
    if adapters and models:
        raise CheckpointError(
            f"{folder}: holds an adapter ({adapters[0]}) and a full model ({models[0]}); give a folder that holds only the "
            "one that is meant"
        )

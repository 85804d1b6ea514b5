"""Loading something that answers: a merged `omni` folder, or a single specialist."""

from pathlib import Path
from typing import Any

import torch

from modalloy.checkpoints import Checkpoint, locate, open_specialist, read_json
from modalloy.checkpoints.specialist import COMPOSE_LORA, LOCAL_TOKENS, PROJECTOR
from modalloy.delta import LowRank
from modalloy.encoders import ENCODERS, encoder_sizes, load_encoder
from modalloy.errors import CheckpointError
from modalloy.model.chat import ChatModel
from modalloy.model.config import ModalloyConfig
from modalloy.model.omni import ModalloyForConditionalGeneration
from modalloy.model.processor import ModalloyProcessor
from modalloy.model.routing import TEXT
from modalloy.names import disk_name, modality_name


def load_model(path: str | Path, *, base: str | None = None, device: str = "cpu", dtype: str = "float32") -> ChatModel:
    """A model that answers questions about media, from an `omni` folder or a ModelCompose specialist's folder.

    Args:
        path: folder written by `modalloy merge` with `output.form: omni`, or a specialist.
        base: base model, for a specialist whose config records none that can be found.
        device: "cpu" or "cuda".
        dtype: type that everything is computed in.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor is unknown or missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: has no config.json; give a folder written with output.form: omni, or a specialist"
        )
    settings = read_json(folder / "config.json")
    if settings.get("model_type") == "multimodal":
        settings = _specialist_settings(folder, settings, base)
    elif settings.get("model_type") != "modalloy":
        raise CheckpointError(
            f"{folder}: is a {settings.get('model_type')} model, which takes no media; merge with output.form: omni to chat"
        )
    base_folder = locate(settings["base_model"], folder)
    decoder = AutoModelForCausalLM.from_pretrained(base_folder, dtype=getattr(torch, dtype))
    config = ModalloyConfig(decoder.config, settings["modalities"], settings["text_rank"])
    model = ModalloyForConditionalGeneration(config, decoder)
    preprocess = {}
    for modality, sizes in config.modalities.items():
        encoder = load_encoder(sizes["encoder"])
        model.encoders[modality], preprocess[modality] = encoder, encoder.preprocess
    _load_weights(model, folder, settings)
    tokens_from = folder if (folder / "tokenizer_config.json").is_file() else base_folder
    tokenizer = AutoTokenizer.from_pretrained(tokens_from)
    if (folder / "chat_template.jinja").is_file():
        tokenizer.chat_template = (folder / "chat_template.jinja").read_text()
    processor = ModalloyProcessor(tokenizer, config, preprocess)
    return ChatModel(model.to(device).eval(), processor)


def _specialist_settings(folder: Path, config: dict[str, Any], base: str | None) -> dict[str, Any]:
    """The settings of an omni model that holds one specialist alone."""
    specialist = open_specialist(folder)
    assert specialist.modality is not None
    recorded = config.get(f"mm_{disk_name(specialist.modality)}_encoder")
    if recorded not in ENCODERS:
        raise CheckpointError(
            f"{folder}: its encoder '{recorded}' is not built in; merge it with `encoder:` set in a recipe"
        )
    location = base or specialist.base_name
    if location is None:
        raise CheckpointError(f"{folder}: records no base model; name one with base=")
    sizes = specialist.modality_settings(recorded, *encoder_sizes(recorded))
    scale = next(iter(specialist.text.values())).scale
    return {
        "base_model": location,
        "text_rank": specialist.rank,
        "text_scale": scale,
        "modalities": {specialist.modality: sizes},
    }


def _load_weights(model: ModalloyForConditionalGeneration, folder: Path, settings: dict[str, Any]) -> None:
    """Adapters, projectors and extra tokens from the folder's one file of weights; every tensor must find its place."""
    weights = Checkpoint(folder, ("adapter_model",))
    modalities = model.config.modalities
    scales = {TEXT: settings.get("text_scale", 1.0)} | {name: sizes["scale"] for name, sizes in modalities.items()}
    parameter = next(model.decoder.parameters())
    expected = {
        f"{side}_tokens.{disk_name(m)}"
        for m, s in modalities.items()
        for side in ("prefix", "suffix")
        if s[f"n_{side}"]
    }
    for modality in modalities:
        expected |= {
            f"model.modal_projectors.{disk_name(modality)}.{name}" for name in model.projectors[modality].state_dict()
        }
    pairs: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for name, ref in weights.refs.items():
        tensor = weights.read(ref).to(parameter.dtype)
        expected.discard(name)
        if lora := COMPOSE_LORA.fullmatch(name):
            owner = TEXT if lora["adapter"] == "default" else modality_name(lora["adapter"])
            pairs.setdefault((lora["stem"] + ".weight", owner), {})[lora["side"]] = tensor
            continue
        if (tokens := LOCAL_TOKENS.fullmatch(name)) and tokens["adapter"] == "default":
            continue  # nothing reads these
        projector = PROJECTOR.fullmatch(name)
        owner = modality_name(projector["modality"] if projector else tokens["adapter"] if tokens else "?")
        if owner not in modalities:
            raise CheckpointError(
                f"{ref.file}: {name} belongs to no modality of config.json; the folder mixes two models"
            )
        if projector:
            target = model.projectors[owner].state_dict().get(projector["rest"])
        else:
            assert tokens is not None
            target = (model.prefix_tokens if tokens["side"] == "prefix" else model.suffix_tokens)[owner].data
        if target is None or target.shape != tensor.shape:
            found = "does not exist" if target is None else f"is {tuple(target.shape)}"
            raise CheckpointError(
                f"{ref.file}: {name} is {tuple(tensor.shape)}, in the model it {found}; use matching files"
            )
        target.copy_(tensor)
    if expected:
        raise CheckpointError(f"{weights.folder}: {sorted(expected)[0]} is missing; merge or download it again")
    for (slot, owner), pair in pairs.items():
        if slot not in model.linears or len(pair) < 2:
            raise CheckpointError(
                f"{weights.folder}: the update of {slot} ({owner}) is incomplete or fits no linear of the decoder"
            )
        model.linears[slot].add(owner, LowRank(pair["B"] * scales[owner], pair["A"]))

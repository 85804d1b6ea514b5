"""What an `omni` folder needs beside the merged text path: encoders, projectors, and the configs that tell how to load it."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modalloy.checkpoints import (
    Checkpoint,
    Specialist,
    StoredLora,
    config_size,
    is_portable,
    locate,
    present,
    read_config,
)
from modalloy.checkpoints.writer import copy_file
from modalloy.encoders import EncoderChoice, choose, registered, sizes
from modalloy.errors import CheckpointError, RecipeError
from modalloy.files import replace_text
from modalloy.names import disk_name
from modalloy.projectors import build_projector, recognise
from modalloy.recipe import Recipe
from modalloy.templates import own_template

if TYPE_CHECKING:
    from modalloy.plan import Plan

REMOTE_CODE = "modeling_modalloy"  # the module beside a model's config that imports these classes from the package
AUTO_MAP = {
    "AutoConfig": f"{REMOTE_CODE}.ModalloyConfig",
    "AutoModelForCausalLM": f"{REMOTE_CODE}.ModalloyForConditionalGeneration",
    "AutoProcessor": f"{REMOTE_CODE}.ModalloyProcessor",
}
# the linears of a Llama-shaped decoder's blocks, which tokens are routed through
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ENCODER_CONFIGS = ("config.json", "preprocessor_config.json")
# the prompt that ModelCompose and LLaVA-1.5 were trained with
VICUNA_V1 = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% set messages = messages[1:] %}
{%- else %}A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, \
and polite answers to the user's questions.{% endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}{{ ' USER: ' if loop.first else 'USER: ' }}{{ message.content }}
{%- else %}{{ ' ASSISTANT: ' + message.content + eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"""


@dataclass(frozen=True)
class Sense:
    """How the merged model takes in one modality: its encoder, with the place of its files, and its projector."""

    choice: EncoderChoice
    path: Path | None
    settings: dict[str, Any]  # of the encoder
    projector: dict[str, Any]
    n_tokens: int  # projected features of one medium
    is_portable: bool  # whether the encoder's location means the same on another machine

    @property
    def local(self) -> Path | None:
        """The place of the encoder's files if only this machine would find it."""
        return None if self.is_portable else self.path

    def source(self, modality: str) -> str | None:
        """Where an omni folder says that the encoder's files are."""
        if self.local is None:
            return self.choice.location
        return f"encoders/{modality}" + ("" if self.local.is_dir() else f"/{self.local.name}")

    def files(self) -> list[Path]:
        """The encoder's files that an omni folder takes a copy of."""
        if self.local is None:
            return []
        if self.local.is_file():
            return [self.local]
        if pickled := sorted(self.local.glob("*.pt")):  # of encoders that are published as a single file
            return pickled
        return _model_files(Checkpoint(self.local, ("model", "pytorch_model")), ENCODER_CONFIGS)


def choose_senses(recipe: Recipe, specialists: list[Specialist], width: int) -> dict[str, Sense]:
    """Encoder and projector of each modality: the recipe's encoder, else one that the specialist names and that is built in.

    `width` is the decoder's. Raises RecipeError or CheckpointError where they do not lead from one to the other.
    """
    senses: dict[str, Sense] = {}
    for entry, specialist in zip(recipe.models, specialists, strict=True):
        modality = specialist.modality
        if modality is None:
            raise RecipeError(
                f"output.form 'omni' needs the modality of every specialist, but '{specialist.label}' records none; "
                "add `modality:` to it"
            )
        if not specialist.projector:
            raise RecipeError(
                f"output.form 'omni' needs a projector from every specialist, but '{specialist.label}' has none; "
                "write form: adapter or full, or leave it out"
            )
        if modality in senses:
            raise RecipeError(
                f"two specialists claim modality '{modality}' ({specialist.label}); 'omni' takes one of each: remove one, "
                "or write form: adapter or full"
            )
        given = entry.encoder or recorded_encoder(specialist)
        if given is None:
            raise RecipeError(
                f"no encoder for modality '{modality}'; add `encoder:` to the {specialist.label} specialist"
            )
        senses[modality] = open_sense(given, specialist, width, recipe.folder)
    return senses


def recorded_encoder(specialist: Specialist) -> str | None:
    """The encoder that a specialist's config names, if that is a name and not a place on its author's machine."""
    recorded = specialist.config.get(f"mm_{disk_name(specialist.modality or '')}_encoder")
    return recorded if recorded in registered() else None


def open_sense(given: str | dict[str, Any], specialist: Specialist, width: int, folder: Path) -> Sense:
    """The encoder that `given` names and the specialist's projector, which must fit each other and the decoder's width."""
    modality = specialist.modality
    assert modality is not None
    choice = choose(given, modality)
    path = None if choice.location is None else locate(choice.location, folder)
    settings = choice.settings(path)
    dim, n_features = sizes(choice.name, settings)
    projector = recognise({name: ref.shape for name, ref in specialist.projector.items()}, specialist.label)
    built = build_projector(projector, meta=True)
    if (built.dim, built.width) != (dim, width):
        raise CheckpointError(
            f"{specialist.label} specialist: its projector takes {built.dim} features to {built.width}, but the encoder "
            f"'{given}' gives {dim} and the base takes {width}; set the `encoder:` it was trained with"
        )
    for ref in specialist.tokens.values():
        if len(ref.shape) != 3 or ref.shape[0] != 1 or ref.shape[2] != width:
            raise CheckpointError(
                f"{specialist.label} specialist: {ref.name} is {ref.shape}, not (1, tokens, {width}) ({ref.file}); "
                "use the base it was trained from"
            )
    n_tokens = built.n_tokens(n_features)
    portable = choice.location is None or is_portable(choice.location, folder)
    return Sense(choice, path, settings, projector, n_tokens, portable)


def omni_config(planned: "Plan") -> dict[str, Any]:
    """config.json of the merged model (see `modalloy.model.config.ModalloyConfig`)."""
    merged = [job for job in planned.jobs if job.kind == "merge"]
    low_rank = [job.name for job in merged if len(job.outputs) == 2]
    modalities = {
        specialist.modality or "": _modality(specialist, planned.senses[specialist.modality or ""], planned.base)
        for specialist in planned.specialists
    }
    return {
        "architectures": ["ModalloyForConditionalGeneration"],
        "model_type": "modalloy",
        "auto_map": AUTO_MAP,
        "base_model": planned.base_name if planned.base_is_portable else "base",
        "text_config": read_config(planned.base_folder),
        "text_update": _update(low_rank, planned.rank, 1.0, planned.base),
        "text_linears": [job.name for job in merged if len(job.outputs) == 1],
        "modalities": modalities,
    }


def specialist_config(specialist: Specialist, base: Checkpoint, encoder: str | dict[str, Any] | None) -> dict[str, Any]:
    """The same of a single specialist, to load it alone."""
    config, folder = read_config(base.folder), specialist.checkpoint.folder
    given = encoder or recorded_encoder(specialist)
    if given is None:
        recorded = specialist.config.get(f"mm_{disk_name(specialist.modality or '')}_encoder")
        raise CheckpointError(f"{folder}: its encoder '{recorded}' is not built in; give its location as encoder=")
    sense = open_sense(given, specialist, config_size(config, "hidden_size", base.folder), Path())
    settings = _modality(specialist, sense, base)
    if sense.path is not None:
        settings["source"] = str(sense.path.resolve())
    return {
        "base_model": str(base.folder.resolve()),
        "text_config": config,
        "text_update": specialist_update(specialist.text, base),
        "modalities": {specialist.modality: settings},
    }


def write_omni(planned: "Plan", folder: Path) -> None:
    """Everything of an omni folder beside its merged weights and the tokenizer."""
    config = omni_config(planned)
    replace_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    template, labels = prompt_format(planned)
    if template is not None:
        (folder / "chat_template.json").unlink(missing_ok=True)
        replace_text(folder / "chat_template.jinja", template)
    processor = processor_config(config["modalities"], labels)
    replace_text(folder / "processor_config.json", json.dumps(processor, indent=2) + "\n")
    write_remote_code(folder)
    if planned.copies_base:
        _copy(_model_files(planned.base, ["config.json"]), folder / "base")
    for modality, sense in planned.senses.items():
        _copy(sense.files(), folder / "encoders" / modality)


def processor_config(modalities: dict[str, dict[str, Any]], labels: bool) -> dict[str, Any]:
    """The content of processor_config.json."""
    plain = {
        name: {key: value for key, value in sizes.items() if key != "source"} for name, sizes in modalities.items()
    }
    return {"processor_class": "ModalloyProcessor", "auto_map": AUTO_MAP, "labels": labels, "modalities": plain}


def write_remote_code(folder: Path) -> None:
    """The module that `auto_map` names, for `trust_remote_code`: it finds everything in the installed package."""
    replace_text(
        folder / f"{REMOTE_CODE}.py",
        '"""Classes of this folder\'s model, from the package modalloy."""\n\n'
        "from modalloy.model import ModalloyConfig, ModalloyForConditionalGeneration, ModalloyProcessor\n\n"
        '__all__ = ["ModalloyConfig", "ModalloyForConditionalGeneration", "ModalloyProcessor"]\n',
    )


def _model_files(checkpoint: Checkpoint, configs: Iterable[str]) -> list[Path]:
    """Those of a model's `configs` that there are, its weights and their index."""
    folder = checkpoint.folder
    found = [folder / name for name in present(folder, configs)]
    return [*found, *(file.path for file in checkpoint.files), *sorted(folder.glob("*.index.json"))]


def _copy(files: Iterable[Path], folder: Path) -> None:
    for file in files:
        folder.mkdir(parents=True, exist_ok=True)
        copy_file(file, folder / file.name)


def prompt_format(planned: "Plan") -> tuple[str | None, bool]:
    """The chat template to write, None for the base's own; and whether media have labels, as ModelCompose's prompts do."""
    if planned.chat_template is not None:
        return planned.chat_template, False
    return (VICUNA_V1, True) if own_template(planned.base_folder) is None else (None, False)


def _modality(specialist: Specialist, sense: Sense, base: Checkpoint) -> dict[str, Any]:
    """One entry of `ModalloyConfig.modalities`."""
    tokens = specialist.tokens
    assert specialist.modality is not None
    found = {
        "encoder": {"name": sense.choice.name, "settings": sense.settings},
        "projector": sense.projector,
        "n_tokens": sense.n_tokens,
        "n_prefix": tokens["prefix"].shape[1] if "prefix" in tokens else 0,
        "n_suffix": tokens["suffix"].shape[1] if "suffix" in tokens else 0,
        "update": specialist_update(specialist.own, base),
    }
    source = sense.source(specialist.modality)
    return found if source is None else found | {"source": source}


def specialist_update(updates: dict[str, StoredLora], base: Checkpoint) -> dict[str, Any] | None:
    kinds = {(factors.rank, factors.scale) for factors in updates.values()}
    if len(kinds) > 1:
        raise CheckpointError(
            f"its updates have different ranks or scales ({', '.join(map(str, sorted(kinds)))}), which the routed model "
            "does not take; merge it into an adapter instead"
        )
    rank, scale = next(iter(kinds), (0, 1.0))
    return _update(list(updates), rank, scale, base)


def _update(slots: list[str], rank: int | None, scale: float, base: Checkpoint) -> dict[str, Any] | None:
    """What the config says of a low-rank update: `linears` is null where it has all of the decoder's blocks."""
    if not slots:
        return None
    routed = [name for name in base.refs if name.split(".")[-2:-1] and name.split(".")[-2] in LINEARS]
    weights = {name for name in routed if name.endswith(".weight")}
    if strange := sorted(set(slots) - weights):
        raise CheckpointError(
            f"{strange[0]} is updated, but 'omni' routes tokens through {', '.join(LINEARS)} only; write form: adapter or full"
        )
    return {"rank": rank, "scale": scale, "linears": None if weights == set(slots) else sorted(slots)}

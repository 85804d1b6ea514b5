"""`form: omni`: beside the merged text path, what a folder needs to take in media: encoders, projectors, configs, prompt."""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from modalloy.errors import CheckpointError
from modalloy.files import replace_text
from modalloy.names import disk_name
from modalloy.outputs.full import copy_companions
from modalloy.outputs.writer import Writer
from modalloy.planning.kinds import Kind, kinds, layer_of
from modalloy.planning.native import decoder_config
from modalloy.planning.plan import Plan
from modalloy.planning.senses import NativeSense, Sense, model_files, open_sense, recorded_encoder
from modalloy.senses.stored import parts_of_experts
from modalloy.specialists.specialist import Specialist, StoredLora
from modalloy.specialists.templates import own_template
from modalloy.storage.config import config_size, read_config
from modalloy.storage.scaled import is_scaled
from modalloy.storage.tensors import Checkpoint
from modalloy.storage.writer import copy_file

USE = """```
modalloy chat path/to/this/folder {options} -p "What is this?"
```"""
REMOTE_CODE = "modeling_modalloy"  # the module beside a model's config that imports these classes from the package
AUTO_MAP = {
    "AutoConfig": f"{REMOTE_CODE}.ModalloyConfig",
    "AutoModelForCausalLM": f"{REMOTE_CODE}.ModalloyForConditionalGeneration",
    "AutoProcessor": f"{REMOTE_CODE}.ModalloyProcessor",
}
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


def omni_config(planned: Plan) -> dict[str, Any]:
    """config.json of the merged model (see `modalloy.model.config.ModalloyConfig`)."""
    target = planned.target
    experts = parts_of_experts(read_config(target.folder), target.refs, target.folder)
    merged = [job for job in planned.jobs if job.kind == "merge" and job.name not in experts]
    low_rank = [job.name for job in merged if len(job.outputs) == 2]
    text = decoder_config(read_config(planned.target.folder), planned.specialists)
    if is_scaled(planned.target.refs):  # read as numbers, wherever they are
        text.pop("quantization_config", None)
    modalities = {
        specialist.sense or "": _modality(specialist, planned.senses[specialist.sense or ""], planned.target)
        for specialist in planned.specialists
    }
    return {
        "architectures": ["ModalloyForConditionalGeneration"],
        "model_type": "modalloy",
        "auto_map": AUTO_MAP,
        "base_model": planned.target_name if planned.target_is_portable else "base",
        "text_config": text,
        "text_update": _update(low_rank, planned.rank, 1.0, planned.target),
        "text_linears": [job.name for job in merged if len(job.outputs) == 1],
        **_tensors(planned, experts),
        "modalities": modalities,
    }


def _tensors(planned: Plan, experts: Collection[str]) -> dict[str, Any]:
    """Norms, biases, experts and what else of the decoder is another for all tokens."""
    names = [job.name for job in planned.jobs if job.kind in ("average", "fuse") or job.name in experts]
    return {"text_tensors": names} if names else {}


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
        "text_update": specialist_update(specialist.text_lora, base),
        "modalities": {specialist.modality: settings},
    }


def write(planned: Plan, folder: Path) -> None:
    """Everything of an omni folder beside its merged weights."""
    copy_companions(planned.target.folder, folder)
    config = omni_config(planned)
    replace_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    template, labels = prompt_format(planned)
    if template is not None:
        (folder / "chat_template.json").unlink(missing_ok=True)
        replace_text(folder / "chat_template.jinja", template)
    processor = processor_config(config["modalities"], labels)
    replace_text(folder / "processor_config.json", json.dumps(processor, indent=2) + "\n")
    write_remote_code(folder)
    if planned.copies_target:
        _copy(model_files(planned.target, ["config.json"]), folder / "base")
    for modality, sense in planned.senses.items():
        if not isinstance(sense, NativeSense):
            _copy(sense.files(), folder / "encoders" / modality)
        elif sense.native.like is None:
            write_native(sense, folder / "senses" / modality)


def write_native(sense: NativeSense, folder: Path) -> None:
    """What a native specialist's media are prepared with: its processor, its tokenizer, and its config without blocks."""
    folder.mkdir(parents=True)
    copy_companions(sense.folder, folder)
    replace_text(folder / "config.json", json.dumps(sense.native.config, indent=2) + "\n")


def promised(planned: Plan, base_name: str) -> dict[str, Any]:
    """What config.json says of the merged text path."""
    return {key: value for key, value in omni_config(planned).items() if key.startswith("text_")}


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


def _copy(files: Iterable[Path], folder: Path) -> None:
    for file in files:
        folder.mkdir(parents=True, exist_ok=True)
        copy_file(file, folder / file.name)


def prompt_format(planned: Plan) -> tuple[str | None, bool]:
    """The chat template to write, None for the base's own; and whether media have labels, as ModelCompose's prompts do."""
    if planned.chat_template is not None:
        return planned.chat_template, False
    return (VICUNA_V1, True) if own_template(planned.target.folder) is None else (None, False)


def _modality(specialist: Specialist, sense: Sense | NativeSense, base: Checkpoint) -> dict[str, Any]:
    """One entry of `ModalloyConfig.modalities`."""
    beside = {"of": specialist.modality} if specialist.place > 1 else {}
    if isinstance(sense, NativeSense):
        native: dict[str, Any] = {"config": sense.native.config, "rows": list(sense.native.ids)}
        if sense.native.like is not None:
            native = {"like": sense.native.like}
        native |= {"frame": sense.frame}
        return {"native": native, "update": _own_update(specialist, base)} | beside
    tokens = specialist.tokens
    assert specialist.modality is not None
    found = {
        "encoder": {"name": sense.choice.name, "settings": sense.settings},
        "projector": sense.projector,
        "n_tokens": sense.n_tokens,
        "n_prefix": tokens["prefix"].shape[1] if "prefix" in tokens else 0,
        "n_suffix": tokens["suffix"].shape[1] if "suffix" in tokens else 0,
        "update": _own_update(specialist, base),
    } | beside
    source = sense.source(specialist.sense or "")
    return found if source is None else found | {"source": source}


def _own_update(specialist: Specialist, base: Checkpoint) -> dict[str, Any] | None:
    """What its own tokens use beside the base's weights."""
    if specialist.own_rank is None:
        return specialist_update(specialist.modality_lora, base)
    routed = _routed(base, kinds(read_config(base.folder), base.refs))
    return _update([slot for slot in specialist.tuned if slot in routed], specialist.own_rank, 1.0, base)


def _routed(base: Checkpoint, sorts: Mapping[str, Kind]) -> set[str]:
    """The weights that tokens are routed through: linear ones of the decoder's blocks, but experts that are one parameter."""
    linears = {name for name, kind in sorts.items() if kind == "linear" and layer_of(name) is not None}
    return linears - parts_of_experts(read_config(base.folder), linears, base.folder)


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
    sorts = kinds(read_config(base.folder), base.refs)
    weights = _routed(base, sorts)
    if strange := sorted(set(slots) - weights):
        raise CheckpointError(
            f"{strange[0]} is updated, but 'omni' routes tokens through the linear weights of the decoder's blocks only; write "
            "form: adapter or full"
        )
    is_all = weights == set(slots) and not {"router", "expert"} & set(sorts.values())
    return {"rank": rank, "scale": scale, "linears": None if is_all else sorted(slots)}


WRITER = Writer(
    write,
    "config.json",
    promised,
    lambda key: key.startswith("text_"),
    "modalloy",
    "merge",
    USE,
    pipeline="any-to-any",
)

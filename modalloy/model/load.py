"""Loading something that answers: a merged `omni` folder, a model that `save_pretrained` wrote, or a single specialist."""

import re
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modalloy.errors import CheckpointError, RecipeError
from modalloy.machine.memory import release_memory
from modalloy.model.chat import ChatModel
from modalloy.model.config import LLAMA_CPP, ModalloyConfig, check_content
from modalloy.model.hosted import is_hosted, load_hosted
from modalloy.model.omni import ModalloyForConditionalGeneration
from modalloy.model.opening import check_code, open_tokenizer, opening, set_ends
from modalloy.model.processor import ModalloyProcessor
from modalloy.model.quantised import quantisation, report
from modalloy.model.routing import TEXT
from modalloy.names import modality_name
from modalloy.outputs.omni import VICUNA_V1, omni_config, prompt_format, specialist_config, specialist_update
from modalloy.planning.senses import NativeSense
from modalloy.senses.anatomy import check_counts
from modalloy.senses.encoders import build, encoder_weights
from modalloy.senses.projectors import projector_class
from modalloy.specialists.layouts import open_specialist
from modalloy.specialists.specialist import COMPOSE_LORA, LOCAL_TOKENS, PROJECTOR, Specialist, adapter_names
from modalloy.specialists.templates import own_template
from modalloy.storage.folder import read_json
from modalloy.storage.locate import locate, open_base
from modalloy.storage.tensors import Checkpoint, TensorRef, checked

if TYPE_CHECKING:
    from modalloy.planning.plan import Plan

Read = Callable[[TensorRef], Tensor]
# of old checkpoints: a table that transformers computes itself
NATIVE = re.compile(r"senses\.(?P<modality>[\w-]+)\..+")
COMPUTED = re.compile(r".*\.rotary_emb\.inv_freq")


def load_model(
    path: str | Path,
    *,
    base: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    fold: bool = False,
    encoder: str | None = None,
    quantize: str | None = None,
) -> ChatModel:
    """A model that answers questions about media, from an `omni` folder or a specialist's folder; or about text only.

    A multimodal model that transformers itself has, such as a merge into LLaVA or Qwen2-VL, answers about images.

    Args:
        path: folder written by `modalloy merge` with `output.form: omni` or by `save_pretrained`, its hub id, or a
            ModelCompose specialist; or a model of transformers', such as a base or a merge of `output.form: full`.
        base: base model, for a specialist whose config records none that can be found.
        device: "cpu", "cuda", or "auto" for transformers' `device_map="auto"`.
        dtype: type of the weights, or "auto" for the base's. On a CPU, 16-bit weights are computed with in float32.
        fold: fold the text adapter into the base weights; what that costs the other paths is printed on stderr.
        encoder: encoder of a specialist, as a recipe names it, where its config names no built-in one.
        quantize: "int8" or "int4" holds the linears of the base's blocks in that many bits a number, by torchao; updates
            stay as they are. What it saves is printed on stderr.

    Raises:
        RecipeError: what is asked for does not go together with `quantize`.
        MissingPackageError: `quantize` without torchao.
        CheckpointError: a file is missing or damaged, or a tensor is unknown or missing.
    """
    from transformers.models.auto import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = locate(str(path), whole=True)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: has no config.json; give a folder written with output.form: omni, or a specialist"
        )
    check_code(folder)
    content = read_json(folder / "config.json")
    check_counts(content, str(folder))
    kind = content.get("model_type")
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype), "trust_remote_code": False}
    if device == "auto":
        options["device_map"] = "auto"
    if quantize is not None:
        if fold:
            raise RecipeError("quantize: the base's weights would lose the folded update; leave out fold or quantize")
        if is_hosted(content):
            raise RecipeError(
                f"quantize: {folder} is a model of transformers' own, which modalloy does not route; load it without quantize"
            )
        options["quantization_config"] = quantisation(quantize, device, options["dtype"])
        options["device_map"] = {"": device}
    if kind == "multimodal":
        specialist = open_specialist(folder)
        config, base_folder = _specialist_config(specialist, base, encoder)
        weights = _base_weights(base_folder) | _specialist_weights(specialist, config) | _encoders(config, folder)
        model = _routed(base_folder, config, weights, options)
        set_ends(model, base_folder, read_json(base_folder / "config.json"))
        tokenizer = open_tokenizer(base_folder)
        if (template := own_template(folder)) is not None:
            tokenizer.chat_template = template
        labels = tokenizer.chat_template is None  # as in `omni`: ModelCompose's prompt where nobody has another
        tokenizer.chat_template = tokenizer.chat_template or VICUNA_V1
        processor = ModalloyProcessor(tokenizer, config.modalities, labels)
    elif kind == LLAMA_CPP:
        raise CheckpointError(f"{folder}: is an export for llama.cpp; open it with --engine llama.cpp")
    elif kind == "modalloy":
        check_content(content, folder / "config.json")
        with opening(folder, "model"):
            model = ModalloyForConditionalGeneration.from_pretrained(folder, **options)
        set_ends(model, folder, content)
        processor = open_omni_processor(folder)
    elif is_hosted(content):
        if fold:
            raise ValueError("a model of transformers' own has no text adapter to fold; load it without fold")
        hosted = load_hosted(folder, content, **options)
        return hosted if device == "auto" else replace(hosted, model=moved(hosted.model, device))
    elif isinstance(kind, str) and kind in CONFIG_MAPPING and CONFIG_MAPPING[kind] in MODEL_FOR_CAUSAL_LM_MAPPING:
        config = _config(folder, content)
        model = _routed(folder, config, _base_weights(folder), options)
        set_ends(model, folder, content)
        processor = ModalloyProcessor(open_tokenizer(folder), {})
    else:
        raise CheckpointError(
            f"{folder}: is a {kind} model, which neither transformers nor modalloy runs without code of its own; "
            "give a folder written with output.form: omni, or a specialist"
        )
    if fold:
        _report(model.fold())
    if quantize is not None:
        report(model.linears)
    return ChatModel(model if device == "auto" else moved(model, device), processor)


def moved(model: Any, device: str) -> Any:
    """The model on a device, "cpu" or "cuda"; CheckpointError if it does not fit there."""
    with opening(f"device {device}", "memory", "used for this model"):
        return model.to(device)


def _config(folder: Path, content: dict[str, Any]) -> ModalloyConfig:
    """The config of a decoder without modalities."""
    with opening(folder, "config.json", "used"):
        return ModalloyConfig(content)


def _routed(
    folder: Path, config: ModalloyConfig, weights: dict[str, "Stored"], options: dict[str, Any]
) -> ModalloyForConditionalGeneration:
    """The routed model of a config and its tensors; `dtype` "auto" is the decoder's."""
    if options["dtype"] == "auto":
        options = options | {"dtype": config.text_config.dtype}
    with opening(folder, "model"):
        found: ModalloyForConditionalGeneration = ModalloyForConditionalGeneration.from_pretrained(
            None, config=config, state_dict=weights, where=folder, **options
        )
    return found


def open_omni_processor(folder: Path) -> ModalloyProcessor:
    """The processor of an omni folder.

    Raises:
        CheckpointError: its tokenizer or its processor_config.json is missing or damaged.
    """
    check_content(read_json(folder / "processor_config.json"), folder / "processor_config.json")
    with opening(folder, "processor", silent=True):
        found: ModalloyProcessor = ModalloyProcessor.from_pretrained(folder, trust_remote_code=False)
    return found


def load_text_path(specialist: str | None, base: str, tokenizer: Any, *, device: str = "cpu") -> ChatModel:
    """What text goes through in a specialist, without its senses; without one, in the base. Both are folders.

    `tokenizer` has the chat template that is wanted; weights have the base's type.
    """
    folder = Path(base)
    content = read_json(folder / "config.json")
    if specialist is None and is_hosted(content):
        return load_model(folder, device=device, dtype="auto")
    check_code(folder)
    check_counts(content, str(folder))
    config, weights = _config(folder, content), _base_weights(folder)
    if specialist is not None:
        opened = open_specialist(Path(specialist))
        if not opened.text_lora:
            return load_model(specialist, device=device, dtype="auto")  # a full model
        config.text_update = specialist_update(opened.text_lora, open_base(folder))
        weights |= _owned(opened.checkpoint.read, adapter_names(opened.text_lora, "default"), config)
    model = _routed(folder, config, weights, {"dtype": "auto", "trust_remote_code": False})
    set_ends(model, folder, content)
    return ChatModel(moved(model, device), ModalloyProcessor(tokenizer, {}))


def load_planned(planned: "Plan", *, device: str = "cpu", dtype: str = "float32") -> ChatModel:
    """The routed model of a plan for `omni`, of which nothing was written; its text path is the base's.

    Everything else is as in the folder that a merge would write. `modalloy.search` gives it one text path after another.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder, content = planned.target.folder, omni_config(planned)
    check_code(folder)
    for modality, sense in planned.senses.items():
        if sense.path is not None:
            content["modalities"][modality]["source"] = str(sense.path.resolve())
    content |= {"base_model": str(folder.resolve()), "text_update": None, "text_linears": [], "text_tensors": []}
    with opening(folder, "config.json", "used"):
        config = ModalloyConfig(**{key: content[key] for key in content if key not in ("architectures", "model_type")})
    weights = _base_weights(folder) | _encoders(config, folder)
    for specialist in planned.specialists:
        weights |= _owned(planned.inputs.read, specialist.carried(), config)
    chosen = dtype if dtype == "auto" else getattr(torch, dtype)
    model = _routed(folder, config, weights, {"dtype": chosen, "trust_remote_code": False})
    set_ends(model, folder, content)
    tokenizer = open_tokenizer(folder)
    template, labels = prompt_format(planned)
    tokenizer.chat_template = template or tokenizer.chat_template
    processor = ModalloyProcessor(tokenizer, config.modalities, labels)
    processor.places = {name: one.folder for name, one in planned.senses.items() if isinstance(one, NativeSense)}
    return ChatModel(moved(model, device), processor)


def is_language_model(config: dict[str, Any]) -> bool:
    """Whether a config.json names a language model of transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(config.get("model_type"))) in (config.get("architectures") or [])


def local_folder(where: Any, options: dict[str, Any]) -> Path:
    """The folder of a model that transformers is asked to load: local, or fetched from the hub."""
    if Path(where).is_dir():
        return Path(where)
    from huggingface_hub import snapshot_download

    known = ("revision", "token", "cache_dir", "force_download", "local_files_only")
    return Path(snapshot_download(str(where), **{key: options[key] for key in known if options.get(key) is not None}))


def composed_weights(config: ModalloyConfig, folder: Path) -> dict[str, "Stored"]:
    """Every tensor of an `omni` folder's model by the model's own names, to be read when it is wanted.

    A folder that `save_pretrained` wrote has them under these names itself.
    """
    if config.base_model is None:
        checkpoint = open_base(folder)
        return {name: _stored(checkpoint, ref) for name, ref in checkpoint.refs.items()}
    base = locate(config.base_model, folder)
    return _base_weights(base) | _omni_weights(folder, config) | _encoders(config, folder)


class Stored:
    """A tensor in a file, read at `[...]`: what transformers' loader takes in place of one."""

    def __init__(self, read: Callable[[], Tensor], dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.read, self.dtype, self.shape = read, dtype, shape

    def __getitem__(self, index: Any) -> Tensor:
        return self.read()

    def is_floating_point(self) -> bool:
        """Whether its type is, for the loader's choice of the model's."""
        return self.dtype.is_floating_point


class _EncoderWeights:
    """An encoder's weights, read when the first of them is wanted, and each let go when it was given."""

    def __init__(self, name: str, path: Path | None, shapes: dict[str, tuple[int, ...]]) -> None:
        self.name, self.path, self.shapes = name, path, shapes
        self.lock = threading.Lock()
        self.tensors: dict[str, Tensor] | None = None

    def take(self, key: str) -> Tensor:
        with self.lock:
            if self.tensors is None:
                self.tensors = encoder_weights(self.name, self.path)
                self._check({key: tuple(tensor.shape) for key, tensor in self.tensors.items()})
            tensor = self.tensors.pop(key)
            if not self.tensors:
                release_memory()
            return tensor

    def _check(self, found: dict[str, tuple[int, ...]]) -> None:
        """Refuse tensors that are not those of the encoder that the config describes."""
        if wrong := sorted(key for key in self.shapes | found if self.shapes.get(key) != found.get(key)):
            key = wrong[0]
            state = "is missing" if key not in found else "is unknown"
            if key in found and key in self.shapes:
                state = f"is of shape {found[key]}, not {self.shapes[key]} as config.json says"
            raise CheckpointError(
                f"{self.path or self.name}: {key} {state} ({len(wrong)} tensors in all); give the encoder's own files"
            )


def _base_weights(folder: Path) -> dict[str, Stored]:
    checkpoint = open_base(folder)
    return {
        f"decoder.{name}": _stored(checkpoint, ref)
        for name, ref in checkpoint.refs.items()
        if not COMPUTED.fullmatch(name)
    }


def _stored(checkpoint: Checkpoint, ref: Any) -> Stored:
    return Stored(partial(checkpoint.read, ref), ref.dtype, ref.shape)


def _omni_weights(folder: Path, config: ModalloyConfig) -> dict[str, Stored]:
    """Adapters, projectors and extra tokens from the folder's file of weights, which has ModelCompose's names."""
    checkpoint = Checkpoint(folder, ("adapter_model",))

    def read(ref: TensorRef) -> Tensor:
        return checked(checkpoint.read(ref), ref, str(folder))

    return _owned(read, checkpoint.refs, config)


def _specialist_weights(specialist: Specialist, config: ModalloyConfig) -> dict[str, Stored]:
    """The text and modality adapters, projector and extra tokens of one specialist."""
    refs = adapter_names(specialist.text_lora, "default") | specialist.carried()
    return _owned(specialist.read, refs, config)


def _owned(read: Read, refs: dict[str, TensorRef], config: ModalloyConfig) -> dict[str, Stored]:
    """Tensors by the model's names, from those by ModelCompose's."""
    found = {}
    for name, ref in refs.items():
        own = _own_name(name, config)
        if own is None:
            raise CheckpointError(
                f"{ref.file}: {name} belongs to no modality of config.json; the folder mixes two models"
            )
        found[own] = Stored(partial(read, ref), ref.dtype, ref.shape)
    return found


def _own_name(name: str, config: ModalloyConfig) -> str | None:
    """The model's name of a tensor in an omni folder; None if config.json has no place for it."""
    if lora := COMPOSE_LORA.fullmatch(name):
        owner = TEXT if lora["adapter"] == "default" else modality_name(lora["adapter"])
        return f"decoder.{lora['stem']}.{'down' if lora['side'] == 'A' else 'up'}_{owner}"
    if tokens := LOCAL_TOKENS.fullmatch(name):
        return f"{tokens['side']}_tokens.{modality_name(tokens['adapter'])}"
    if projector := PROJECTOR.fullmatch(name):
        modality = modality_name(projector["modality"])
        if modality not in config.modalities:
            return None
        kind = projector_class(config.modalities[modality]["projector"].get("type"))
        return f"projectors.{modality}.{kind.own_name(projector['rest'])}"
    if native := NATIVE.fullmatch(name):
        return name if "native" in config.modalities.get(native["modality"], {}) else None
    if name in config.replaced:
        return f"decoder.{name}"
    return f"decoder.{name.removesuffix('.weight')}.text_weight" if name in config.text_linears else None


def _specialist_config(specialist: Specialist, base: str | None, encoder: str | None) -> tuple[ModalloyConfig, Path]:
    location = base or specialist.base_name
    if location is None:
        raise CheckpointError(f"{specialist.checkpoint.folder}: records no base model; name one with base=")
    folder = locate(location, specialist.checkpoint.folder)
    check_counts(read_json(folder / "config.json"), str(folder))
    checkpoint = open_base(folder)
    return ModalloyConfig(**specialist_config(specialist, checkpoint, encoder)), folder


def _encoders(config: ModalloyConfig, folder: Path) -> dict[str, Stored]:
    """The encoders' tensors, from where each modality's `source` says."""
    found: dict[str, Stored] = {}
    for modality, sizes in config.modalities.items():
        if "native" in sizes:  # its tensors are with the folder's own
            continue
        name, source = sizes["encoder"]["name"], sizes.get("source")
        path = None if source is None else locate(source, folder)
        built = build(name, sizes["encoder"]["settings"], meta=True).state_dict()
        weights = _EncoderWeights(name, path, {key: tuple(tensor.shape) for key, tensor in built.items()})
        for key, tensor in built.items():
            found[f"encoders.{modality}.{key}"] = Stored(partial(weights.take, key), tensor.dtype, tuple(tensor.shape))
    return found


def _report(errors: dict[str, float]) -> None:
    shown = ", ".join(f"{owner} {error:.2%}" for owner, error in errors.items())
    print(
        f"fold     rounding of the folded weights, relative to each path's own update (worst linear): {shown}",
        file=sys.stderr,
    )

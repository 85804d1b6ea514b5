"""Reading a specialist: which of its tensors are text updates, which belong to its modality, and what becomes of the rest.

Three layouts are told apart by their files and tensor names, never by the folder's name:

- ModelCompose (`adapter_model.{safetensors,bin}` + `config.json`): text adapter `default`, modality adapter named after
  the modality, `model.modal_projectors.*`, `prefix_tokens.*`, `suffix_tokens.*`. `lora_strategy: same` has `default` only.
- PEFT (`adapter_model.{safetensors,bin}` + `adapter_config.json`): its adapter is the text update.
- a full model (`model.safetensors`, sharded or `.bin`): every weight is a fine-tuned copy of the base's.
"""

import fnmatch
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modalloy.checkpoints.locate import BASE_STEMS
from modalloy.checkpoints.tensors import Checkpoint, TensorRef, checked, read_json
from modalloy.delta import LowRank
from modalloy.errors import CheckpointError
from modalloy.names import MODALITIES, disk_name, modality_name

ADAPTER_STEMS = ("adapter_model",)
COMPOSE_LORA = re.compile(r"(?:base_model\.model\.)?(?P<stem>.+)\.lora_(?P<side>[AB])\.(?P<adapter>[\w-]+)\.weight")
PEFT_LORA = re.compile(r"base_model\.model\.(?P<stem>.+)\.lora_(?P<side>[AB])\.weight")
PROJECTOR = re.compile(r"model\.modal_projectors\.(?P<modality>[a-z_]+)\.(?P<rest>.+)")
LOCAL_TOKENS = re.compile(r"(?P<side>prefix|suffix)_tokens\.(?P<adapter>[\w-]+)")


@dataclass(frozen=True)
class Factors:
    """A stored low-rank update: ΔW = scale · B @ A, with A (rank, in) and B (out, rank)."""

    a: TensorRef
    b: TensorRef
    scale: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight that this updates."""
        return self.b.shape[0], self.a.shape[1]


@dataclass
class Specialist:
    """One input of a merge. `text` and `own` map the name of a base weight to its stored update."""

    label: str
    checkpoint: Checkpoint
    layout: str  # "modelcompose", "peft" or "full"
    config: dict[str, Any]
    base_name: str | None  # the base that the files themselves record
    modality: str | None = None
    text: dict[str, Factors] = field(default_factory=dict)
    own: dict[str, Factors] = field(default_factory=dict)
    full: dict[str, TensorRef] = field(default_factory=dict)
    projector: dict[str, TensorRef] = field(default_factory=dict)
    tokens: dict[str, TensorRef] = field(default_factory=dict)  # "prefix" and "suffix", of the modality
    dropped: dict[str, str] = field(default_factory=dict)  # tensor name → why it is left out

    def delta(self, slot: str, read: Callable[[TensorRef], Tensor] | None = None) -> LowRank:
        """The text update of one weight in its stored precision, scaling folded into `up` (float32 or wider)."""
        factors, read = self.text[slot], read or self.read
        up, down = read(factors.b), read(factors.a)
        wide = torch.promote_types(up.dtype, torch.float32)
        return LowRank(up.to(wide) * factors.scale, down.to(wide))

    def read(self, ref: TensorRef, buffer: Tensor | None = None) -> Tensor:
        """The data of one tensor; NaN or infinity in a weight is refused."""
        return checked(self.checkpoint.read(ref, buffer), ref, f"{self.label} specialist")

    @property
    def rank(self) -> int | None:
        """Largest rank of the text updates, None for a full model."""
        return max((factors.rank for factors in self.text.values()), default=None)

    def modality_settings(self, encoder: str, dim: int, n_tokens: int) -> dict[str, Any]:
        """What `ModalloyConfig.modalities` holds of this specialist, with its encoder's name and sizes."""
        own = list(self.own.values())
        return {
            "encoder": encoder,
            "dim": dim,
            "n_tokens": n_tokens,
            "n_prefix": self.tokens["prefix"].shape[1] if "prefix" in self.tokens else 0,
            "n_suffix": self.tokens["suffix"].shape[1] if "suffix" in self.tokens else 0,
            "rank": max((factors.rank for factors in own), default=0),
            "scale": own[0].scale if own else 1.0,
        }


def open_specialist(
    folder: Path, *, modality: str | None = None, label: str | None = None, ignore: Sequence[str] = ()
) -> Specialist:
    """Open a specialist's folder and sort its tensors; reads headers and configs only.

    Args:
        folder: local folder.
        modality: what the recipe says it sees; checked against the tensor names.
        label: how messages call it; default: the modality, else the folder's name.
        ignore: name patterns of tensors to leave out.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor is one that no rule covers.
    """
    label = label or modality or folder.name
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; correct the path of the {label} specialist in the recipe")
    if (folder / "adapter_config.json").is_file():
        specialist = _open_peft(folder, label, ignore)
    elif any(folder.glob("adapter_model.*")):
        specialist = _open_modelcompose(folder, label, ignore)
    else:
        checkpoint = Checkpoint(folder, (*BASE_STEMS, *ADAPTER_STEMS))  # no adapter file: named for the message
        config = read_json(folder / "config.json")
        specialist = Specialist(label, checkpoint, "full", config, None)
        for name, ref in checkpoint.refs.items():
            if not _ignored(specialist, name, ignore):
                specialist.full[name] = ref
    if specialist.modality is None:
        specialist.modality = modality
    elif modality is not None and modality != specialist.modality:
        raise CheckpointError(
            f"{folder}: its tensors belong to modality '{specialist.modality}', the recipe says '{modality}'; correct the recipe"
        )
    return specialist


def _open_modelcompose(folder: Path, label: str, ignore: Sequence[str]) -> Specialist:
    checkpoint = Checkpoint(folder, ADAPTER_STEMS)
    config = read_json(folder / "config.json")
    specialist = Specialist(label, checkpoint, "modelcompose", config, _recorded_base(config, "_name_or_path"))
    pairs: dict[tuple[str, str], dict[str, TensorRef]] = {}
    for name, ref in checkpoint.refs.items():
        if _ignored(specialist, name, ignore):
            continue
        if lora := COMPOSE_LORA.fullmatch(name):
            _put(pairs.setdefault((lora["adapter"], lora["stem"] + ".weight"), {}), lora["side"], ref)
        elif projector := PROJECTOR.fullmatch(name):
            _set_modality(specialist, projector["modality"], name)
            _put(specialist.projector, projector["rest"], ref)
        elif tokens := LOCAL_TOKENS.fullmatch(name):
            if tokens["adapter"] == "default":
                specialist.dropped[name] = "nothing reads it (ModelCompose)"
            else:
                _set_modality(specialist, tokens["adapter"], name)
                _put(specialist.tokens, tokens["side"], ref)
        else:
            raise _unknown(specialist, ref, "lora_A/lora_B, modal_projectors, prefix_tokens, suffix_tokens")
    path = folder / "config.json"
    rank = _number(config, "lora_r", 128, path)
    scale = _number(config, "lora_alpha", 256, path) / rank
    for (adapter, slot), pair in pairs.items():
        factors = _factors(specialist, slot, pair, scale)
        if "lora_r" in config:
            _check_rank(specialist, factors, rank, path)
        if adapter == "default":
            specialist.text[slot] = factors
        else:
            _set_modality(specialist, adapter, factors.a.name)
            if slot in specialist.own:
                raise _twice(specialist.own[slot].a, factors.a)
            specialist.own[slot] = factors
    if specialist.modality is None:
        raise CheckpointError(f"{folder}: no tensor names a modality; give a ModelCompose specialist or a PEFT adapter")
    strategy = config.get("lora_strategy")
    expected = {"modal+language": True, "same": False}
    if strategy in expected and expected[strategy] != bool(specialist.own):
        has = "a modality adapter" if specialist.own else "no modality adapter"
        raise CheckpointError(
            f"{folder}: config.json says lora_strategy '{strategy}' but the file has {has}; use matching files"
        )
    if not specialist.text:
        raise CheckpointError(f"{folder}: has no text adapter ('default'), so there is nothing to merge")
    return specialist


def _open_peft(folder: Path, label: str, ignore: Sequence[str]) -> Specialist:
    checkpoint = Checkpoint(folder, ADAPTER_STEMS)
    config = read_json(folder / "adapter_config.json")
    path = folder / "adapter_config.json"
    if config.get("peft_type", "LORA") != "LORA":
        raise CheckpointError(f"{path}: peft_type {config['peft_type']} is not LoRA; only LoRA adapters can be merged")
    if config.get("use_dora"):
        raise CheckpointError(
            f"{path}: DoRA rescales whole weights, so it is no low-rank update; merge it into a full model first"
        )
    if config.get("fan_in_fan_out"):
        raise CheckpointError(f"{path}: fan_in_fan_out stores transposed weights (GPT-2); such bases are not supported")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(("pissa", "olora", "corda", "loftq")):
        raise CheckpointError(
            f"{path}: init_lora_weights '{start}' changed the base that this adapter updates; convert it to a plain LoRA "
            "when saving (PEFT: path_initial_model_for_weight_conversion)"
        )
    specialist = Specialist(label, checkpoint, "peft", config, _recorded_base(config, "base_model_name_or_path"))
    pairs: dict[str, dict[str, TensorRef]] = {}
    for name, ref in checkpoint.refs.items():
        if _ignored(specialist, name, ignore):
            continue
        lora = PEFT_LORA.fullmatch(name)
        if lora is None:
            raise _unknown(specialist, ref, "base_model.model.*.lora_A.weight and lora_B.weight")
        pairs.setdefault(lora["stem"], {})[lora["side"]] = ref
    for stem, pair in pairs.items():
        rank = _pattern(config, "rank_pattern", stem, _number(config, "r", 8, path), path)
        alpha = _pattern(config, "alpha_pattern", stem, _number(config, "lora_alpha", 8, path), path)
        scale = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
        specialist.text[stem + ".weight"] = _factors(specialist, stem, pair, scale)
        _check_rank(specialist, specialist.text[stem + ".weight"], rank, path)
    if not specialist.text:
        raise CheckpointError(f"{folder}: has no lora_A and lora_B, so there is nothing to merge")
    return specialist


def _factors(specialist: Specialist, slot: str, pair: dict[str, TensorRef], scale: float) -> Factors:
    """Check that both halves of an update are there and fit."""
    where = specialist.checkpoint.files[0].path.name
    if len(pair) < 2:
        (side, ref), other = next(iter(pair.items())), "B" if "A" in pair else "A"
        raise CheckpointError(
            f"{specialist.label} specialist: {ref.name} has no matching lora_{other} ({where}); "
            f"the file is incomplete (only lora_{side}): download it again or remove the specialist"
        )
    a, b = pair["A"], pair["B"]
    for ref in (a, b):
        if len(ref.shape) != 2 or not ref.dtype.is_floating_point:
            raise CheckpointError(
                f"{specialist.label} specialist: {ref.name} is {ref.shape} of {ref.dtype}, not a floating-point matrix ({where})"
            )
    if a.shape[0] != b.shape[1]:
        raise CheckpointError(
            f"{specialist.label} specialist: {slot}: lora_A has {a.shape[0]} rows, lora_B has {b.shape[1]} columns ({where}); "
            "the file is damaged or mixes two adapters: download it again or remove the specialist"
        )
    return Factors(a, b, scale)


def _put(table: dict[str, TensorRef], key: str, ref: TensorRef) -> None:
    """Enter a tensor under its role; another name of the same role (an alias, a prefix) is refused."""
    if key in table:
        raise _twice(table[key], ref)
    table[key] = ref


def _twice(first: TensorRef, second: TensorRef) -> CheckpointError:
    return CheckpointError(
        f"{second.file}: {second.name} and {first.name} are two names of one tensor; list one under `ignore:`"
    )


def _check_rank(specialist: Specialist, factors: Factors, recorded: float, path: Path) -> None:
    """The recorded rank divides alpha, so one that is not the tensors' would scale the update wrongly."""
    if factors.rank != recorded:
        raise CheckpointError(
            f"{specialist.label} specialist: {factors.a.name} has rank {factors.rank}, {path} says {recorded:g}; "
            "the two files do not belong together: download both again"
        )


def _set_modality(specialist: Specialist, disk: str, tensor: str) -> None:
    modality = modality_name(disk)
    if modality not in MODALITIES:
        known = ", ".join(disk_name(m) for m in MODALITIES)
        raise CheckpointError(f"{specialist.checkpoint.folder}: {tensor} names modality '{disk}'; known: {known}")
    if specialist.modality not in (None, modality):
        raise CheckpointError(
            f"{specialist.checkpoint.folder}: holds tensors of two modalities ({specialist.modality}, {modality}); "
            "give one specialist per folder"
        )
    specialist.modality = modality


def _ignored(specialist: Specialist, name: str, patterns: Sequence[str]) -> bool:
    for pattern in patterns:
        if fnmatch.fnmatchcase(name, pattern):
            specialist.dropped[name] = f"ignore: {pattern}"
            return True
    return False


def _unknown(specialist: Specialist, ref: TensorRef, known: str) -> CheckpointError:
    return CheckpointError(
        f"{specialist.label} specialist: no rule for tensor {ref.name} {ref.shape} ({ref.file}); "
        f"known here: {known}. To leave it out, list it under `ignore:`"
    )


def _number(config: dict[str, Any], key: str, default: float, path: Path) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise CheckpointError(f"{path}: {key} is {value!r}, not a positive number; correct the file")
    return value


def _pattern(config: dict[str, Any], name: str, stem: str, default: float, path: Path) -> float:
    """The value of a module in PEFT's rank_pattern or alpha_pattern: the first key that ends its name, as PEFT matches."""
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{path}: {name} is {patterns!r}, not a table of patterns; correct the file")
    try:
        for key in patterns:
            if re.fullmatch(rf"(.*\.)?({key})", stem):
                return _number(patterns, key, default, path)
    except re.error as error:
        raise CheckpointError(f"{path}: {name}: '{key}' is not a pattern ({error}); correct the file") from error
    return default


def _recorded_base(config: dict[str, Any], key: str) -> str | None:
    """The base that a specialist's config names, if it names one."""
    value = config.get(key)
    return value if isinstance(value, str) and value else None

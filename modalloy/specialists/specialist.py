"""A specialist: which of its tensors are text updates, which belong to its modality, and what becomes of the rest.

`layouts.open_specialist` finds out which layout a folder has; each layout's own file sorts its tensors with what is here.
"""

import fnmatch
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from modalloy.delta import LowRank, Scaled
from modalloy.errors import CheckpointError, shown
from modalloy.names import disk_name, modality_name
from modalloy.senses.encoders import modalities
from modalloy.specialists.spelling import unwrapped
from modalloy.storage.tensors import Checkpoint, TensorRef, checked
from modalloy.storage.views import chosen_rows

ADAPTER_STEMS = ("adapter_model",)
# what training scripts of LLaVA and ModelCompose save beside an adapter: other trained tensors, a pretrained projector
BESIDE_ADAPTER = ("non_lora_trainables.bin", "mm_projector.bin")
PEFT_PREFIX = "base_model.model."
COMPOSE_LORA = re.compile(r"(?:base_model\.model\.)?(?P<stem>.+)\.lora_(?P<side>[AB])\.(?P<adapter>[\w-]+)\.weight")
PROJECTOR = re.compile(r"model\.modal_projectors\.(?P<modality>[\w-]+)\.(?P<rest>.+)")
LLAVA_PROJECTOR = re.compile(r"(?:model\.)?mm_projector\.(?P<rest>.+)")
LOCAL_TOKENS = re.compile(r"(?P<side>prefix|suffix)_tokens\.(?P<adapter>[\w-]+)")


@dataclass(frozen=True)
class StoredLora:
    """A stored low-rank update: ΔW = scale · B @ A, with A (rank, in) and B (out, rank)."""

    a: TensorRef
    b: TensorRef
    scale: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in) of the weight that this updates."""
        return self.b.shape[0], self.a.shape[1]

    def delta(self, read: Callable[[TensorRef], Tensor]) -> Scaled:
        """The update as it is stored, its scaling beside it."""
        return Scaled(LowRank(read(self.b), read(self.a)), self.scale)


@dataclass
class Native:
    """What a multimodal model of transformers is beside its decoder.

    `config`: its config.json with no blocks in the decoder. `ids`: the rows of the vocabulary that are its own.
    """

    cls: str
    config: dict[str, Any]
    text_config: dict[str, Any]  # of its decoder, as transformers completes it
    modalities: tuple[str, ...]
    table: TensorRef  # of input embeddings
    tokens: tuple[int, ...]  # that its tokenizer adds, and that its config names
    sense: dict[str, TensorRef] = field(default_factory=dict)  # by the class's own names
    has_three_positions: bool = False
    has_deepstack: bool = False
    ids: tuple[int, ...] = ()  # set once the base's vocabulary is known
    like: str | None = None  # the sense that is the same model's, and carries its tensors

    def carried(self, modality: str) -> dict[str, TensorRef]:
        """The tensors of its sense, by their names in an omni folder; none where another carries them."""
        if self.like is not None:
            return {}
        found = {f"senses.{modality}.model.{name}": ref for name, ref in self.sense.items()}
        if self.ids:
            found[f"senses.{modality}.rows"] = chosen_rows(f"senses.{modality}.rows", self.table, self.ids)
        return found


@dataclass
class Specialist:
    """One input of a merge. All its tables go by names of the base: stored updates of text and of its modality, tuned copies."""

    label: str
    checkpoint: Checkpoint
    layout: str  # "modelcompose", "peft", "llava" (PEFT with the files that LLaVA saves beside it), "native" or "full"
    config: dict[str, Any]
    base_name: str | None  # the base that the files themselves record
    modality: str | None = None
    text_lora: dict[str, StoredLora] = field(default_factory=dict)
    modality_lora: dict[str, StoredLora] = field(default_factory=dict)
    stacked: dict[str, StoredLora] = field(
        default_factory=dict
    )  # by PEFT's module: of experts, until they are placed in the base
    tuned: dict[str, TensorRef] = field(default_factory=dict)
    projector: dict[str, TensorRef] = field(default_factory=dict)
    tokens: dict[str, TensorRef] = field(default_factory=dict)  # "prefix" and "suffix", of the modality
    is_whole: bool = False  # a whole model: it holds copies of everything, trained or not
    native: Native | None = None  # of a multimodal model of transformers
    frozen: dict[str, TensorRef] = field(default_factory=dict)  # copies of the base's weights that its adapter updates
    shorter: dict[str, TensorRef] = field(
        default_factory=dict
    )  # tables of fewer tokens than the base's, which are kept
    adapter: str = ""  # the folder of its adapter in that of its model
    own_rank: int | None = None  # of the update that its own tokens use, cut from a full fine-tune's
    place: int = 1  # among the specialists of its modality
    dropped: dict[str, str] = field(default_factory=dict)  # tensor name → why it is left out

    def read(self, ref: TensorRef, buffer: Tensor | None = None) -> Tensor:
        """The data of one tensor; NaN or infinity in a weight is refused."""
        return checked(self.checkpoint.read(ref, buffer), ref, f"{self.label} specialist")

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self.checkpoint.folder / self.adapter

    @property
    def sense(self) -> str | None:
        """The name of its sense in a merged model: its modality, numbered where it is not the first."""
        return self.modality if self.place == 1 or self.modality is None else f"{self.modality}_{self.place}"

    @property
    def rank(self) -> int | None:
        """Largest rank of the text updates, None for a full model."""
        return max((factors.rank for factors in self.text_lora.values()), default=None)

    def carried(self) -> dict[str, TensorRef]:
        """What belongs to its modality alone, by the names of the ModelCompose layout, which `omni` is written in.

        Of a native specialist: `senses.MODALITY.model.` and the class's own names, and the rows of its vocabulary.
        """
        disk = disk_name(self.sense or "")
        refs = adapter_names(self.modality_lora, disk)
        if self.native is not None:
            return refs | self.native.carried(self.sense or "")
        refs |= {f"model.modal_projectors.{disk}.{rest}": ref for rest, ref in self.projector.items()}
        return refs | {f"{side}_tokens.{disk}": ref for side, ref in self.tokens.items()}


@dataclass(frozen=True)
class Layout:
    """One way in which training scripts store specialists; one layout, one file, one line in `layouts.LAYOUTS`."""

    name: str
    recognise: Callable[[Path], bool]  # by the folder's files and their headers, never by its name
    open: Callable[[Path, str, Sequence[str]], Specialist]  # folder, label, patterns to ignore
    joins_adapter: bool = False  # a model and an adapter beside it are one specialist


def adapter_names(updates: dict[str, StoredLora], adapter: str) -> dict[str, TensorRef]:
    """The factors of stored updates by their names in the ModelCompose layout."""
    refs: dict[str, TensorRef] = {}
    for slot, factors in updates.items():
        stem = slot.removesuffix(".weight")
        refs |= {f"{stem}.lora_A.{adapter}.weight": factors.a, f"{stem}.lora_B.{adapter}.weight": factors.b}
    return refs


def unignored(specialist: Specialist, ignore: Sequence[str]) -> Iterator[tuple[str, TensorRef]]:
    """Name and place of every tensor that no pattern of `ignore` names; the others are entered as dropped.

    Names come without what wrappers of training left in them.
    """
    plain = unwrapped(specialist.checkpoint.refs)
    for name, ref in specialist.checkpoint.refs.items():
        pattern = next((pattern for pattern in ignore if fnmatch.fnmatchcase(name, pattern)), None)
        if pattern is None:
            yield plain[name], ref
        else:
            specialist.dropped[name] = f"ignore: {pattern}"


def pair_factors(specialist: Specialist, slot: str, pair: dict[str, TensorRef], scale: float) -> StoredLora:
    """A stored update of the weight `slot`, of whose halves both must be there and fit."""
    where = next(iter(pair.values())).file.name
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
    return StoredLora(a, b, scale)


def put(table: dict[str, TensorRef], key: str, ref: TensorRef) -> None:
    """Enter a tensor under its role; another name of the same role (an alias, a prefix) is refused."""
    if key in table:
        raise twice(table[key], ref)
    table[key] = ref


def put_update(specialist: Specialist, slot: str, factors: StoredLora) -> None:
    """Enter an update of a weight; a second one of the same weight is refused."""
    if slot in specialist.text_lora:
        raise twice(specialist.text_lora[slot].a, factors.a)
    specialist.text_lora[slot] = factors


def put_projector(specialist: Specialist, name: str, ref: TensorRef) -> bool:
    """Whether `name`, without PEFT's prefix, is one of a projector's; if so, it is entered."""
    if projector := PROJECTOR.fullmatch(name):
        set_modality(specialist, projector["modality"], name)
    else:
        projector = LLAVA_PROJECTOR.fullmatch(name)  # whose modality only the recipe knows
    if projector:
        put(specialist.projector, projector["rest"], ref)
    return projector is not None


def twice(first: TensorRef, second: TensorRef) -> CheckpointError:
    """The error of two tensors that claim one role."""
    return CheckpointError(
        f"{second.file}: {second.name} and {first.name} are two names of one tensor; list one under `ignore:`"
    )


def check_rank(specialist: Specialist, factors: StoredLora, recorded: float, path: Path) -> None:
    """The recorded rank divides alpha, so one that is not the tensors' would scale the update wrongly."""
    if factors.rank != recorded:
        raise CheckpointError(
            f"{specialist.label} specialist: {factors.a.name} has rank {factors.rank}, {path} implies {recorded:g}; "
            "the two files do not belong together: download both again"
        )


def set_modality(specialist: Specialist, disk: str, tensor: str) -> None:
    """Note the modality that a tensor's name holds, in the spelling on disk; a specialist has one."""
    modality = modality_name(disk)
    if modality not in modalities():
        known = ", ".join(disk_name(m) for m in modalities())
        raise CheckpointError(f"{specialist.checkpoint.folder}: {tensor} names modality '{disk}'; known: {known}")
    if specialist.modality not in (None, modality):
        raise CheckpointError(
            f"{specialist.checkpoint.folder}: holds tensors of two modalities ({specialist.modality}, {modality}); "
            "give one specialist per folder"
        )
    specialist.modality = modality


def unknown_tensor(specialist: Specialist, ref: TensorRef, known: str) -> CheckpointError:
    """The error of a tensor that its layout has no rule for."""
    return CheckpointError(
        f"{specialist.label} specialist: no rule for tensor {ref.name} {ref.shape} ({ref.file}); "
        f"known here: {known}. To leave it out, list it under `ignore:`"
    )


def number(config: dict[str, Any], key: str, default: float, path: Path) -> float:
    """A positive number of the configuration in `path`."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
        raise CheckpointError(f"{path}: {key} is {shown(value)}, not a positive number; correct the file")
    return value


def recorded_base(config: dict[str, Any], key: str) -> str | None:
    """The base that a specialist's config names, if it names one."""
    value = config.get(key)
    return value if isinstance(value, str) and value else None

"""Are two models' weights related? Cosines of a few linear weights of models of other architectures with the target's."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod, sqrt
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modalloy.errors import CheckpointError
from modalloy.families.mapping import ModelMap
from modalloy.linalg import BLOCK_ENTRIES, row_blocks
from modalloy.planning.kinds import layer_of
from modalloy.recompute import BLOCKS, spread
from modalloy.storage.tensors import TensorRef
from modalloy.storage.views import cut_rows

if TYPE_CHECKING:
    from modalloy.planning.plan import Plan

# the largest cosine of two weights of unrelated decoders that was found is 0.021: 210 weights of SmolLM2-135M against
# the same place in its other layers, and against Gemma-3-270M (0.006) and random ones (0.006). Fine-tuning hardly turns a
# weight (0.9999 and more for the built-in specialists), long training little (HuRef, Zeng et al., NeurIPS 2024). The limit
# leaves a factor of ten above the unrelated; relatives below it would both have moved by twice their ancestor's norm
LEAST_COSINE = 0.2
SAMPLED_LAYERS = 5
LINEAR = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Kinship:
    """How near two models' weights are: medians over a few linear weights, one in each of some layers."""

    cosine: float
    distance: float  # ‖θ_other − θ_target‖ / ‖θ_target‖
    weight: str  # the target's, of the median cosine

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def check_kinship(planned: "Plan") -> dict[str, Kinship]:
    """How near every donor's weights, and the base's, are to the target's, by label; refuses those that are unrelated.

    Compares one linear weight in each of five layers: the smallest that serves all tokens and is no copy made for image
    tokens; of a large one, some of its rows. Two tensors are held at a time. Models of which the recipe merges no such
    weight are not compared.
    """
    measured: dict[str, list[Kinship]] = {}
    for label, name, own, other in kinship_pairs(planned):
        pairs = ((planned.inputs.read(one), planned.inputs.read(same)) for one, same in rows_compared(own, other))
        measured.setdefault(label, []).append(_compared(name, pairs))
    found = {}
    for label, one in measured.items():
        cosines = sorted(one, key=lambda kinship: kinship.cosine)
        middle = cosines[len(cosines) // 2]
        if middle.cosine < LEAST_COSINE:
            raise CheckpointError(
                f"{label} and {planned.target_label} are unrelated: the cosine of their weights is {middle.cosine:.3f} "
                f"({middle.weight}, the median of {len(one)}), at least {LEAST_COSINE} where both descend from one decoder; choose "
                "models of one ancestor, or say --allow-base-mismatch"
            )
        found[label] = Kinship(middle.cosine, median(kinship.distance for kinship in one), middle.weight)
    return found


def kinship_pairs(planned: "Plan") -> Iterator[tuple[str, str, TensorRef, TensorRef]]:
    """What `check_kinship` reads: a model's label, a target tensor's name, its place and that of the model's counterpart."""
    across = planned.across
    if across is None:
        for model in planned.counted:
            copies = model.tuned | model.frozen if model.native is not None else {}
            for name in _smallest(planned, copies):
                yield model.label, name, planned.target.refs[name], copies[name]
        return
    for donor in planned.specialists:
        for name in _sampled(across.maps[donor.label]) if donor.tuned else ():  # an adapter is an update of the base
            yield donor.label, name, planned.target.refs[name], donor.tuned[name]
    if across.base_map is not None and across.target is not None:
        for name in _sampled(across.base_map):
            slot = across.parts[name][0][0]
            yield "base", name, across.target.tuned[slot], across.starts[slot]


def _sampled(found: ModelMap) -> list[str]:
    """The target tensors that are compared."""
    layers: dict[int, list[tuple[int, str]]] = {}
    for name, tensor in found.tensors.items():
        slots = [piece.slot for piece in tensor.pieces]
        common = all(slot.owner == "language" and slot.part == "weight" and slot.role in LINEAR for slot in slots)
        copied = any(piece.duplicated for piece in tensor.pieces)
        if slots and common and not copied and slots[0].layer is not None and tensor.policy == "merge":
            read = sum(prod(found.donor_header[piece.source]) for piece in tensor.pieces)
            layers.setdefault(slots[0].layer, []).append((prod(tensor.shape) + read, name))
    return _spread(layers)


def _smallest(planned: "Plan", copies: Mapping[str, TensorRef]) -> list[str]:
    """The target's linear weights that are compared with a copy of the whole decoder."""
    layers: dict[int, list[tuple[int, str]]] = {}
    for name in copies:
        layer = layer_of(name)
        if layer is not None and planned.kinds[name] == "linear":
            layers.setdefault(layer, []).append((prod(copies[name].shape), name))
    return _spread(layers)


def _spread(layers: Mapping[int, list[tuple[int, str]]]) -> list[str]:
    """The smallest weight of each of some layers, spread evenly."""
    return spread([min(layers[layer])[1] for layer in sorted(layers)], SAMPLED_LAYERS)


def rows_compared(own: TensorRef, other: TensorRef) -> list[tuple[TensorRef, TensorRef]]:
    """Two large tensors of one shape by blocks of some of their rows; else as they are."""
    some = spread(row_blocks(own.shape), BLOCKS)
    cut = [(cut_rows(own, rows), cut_rows(other, rows)) for rows in some]
    found = [(one, same) for one, same in cut if one is not None and same is not None]
    return found if len(found) == len(cut) == BLOCKS else [(own, other)]


def _compared(name: str, pairs: Iterator[tuple[Tensor, Tensor]]) -> Kinship:
    dot = size = other_size = distance = 0.0
    blocks = (zip(a.flatten().split(BLOCK_ENTRIES), b.flatten().split(BLOCK_ENTRIES), strict=True) for a, b in pairs)
    for some, others in itertools.chain.from_iterable(blocks):
        a, b = some.to(torch.float64), others.to(torch.float64)
        dot, size, other_size = dot + float(a @ b), size + float(a @ a), other_size + float(b @ b)
        distance += float((b - a).square().sum())
    sizes = sqrt(size) * sqrt(other_size)
    return Kinship(
        dot / sizes if sizes else float(not distance), sqrt(distance / size) if size else sqrt(distance), name
    )

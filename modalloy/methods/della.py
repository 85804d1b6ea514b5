"""DELLA (Deep et al., arXiv 2406.11617): drop entries at random, the small ones of every row more often than the large."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from modalloy.linalg import row_blocks
from modalloy.methods.dare import TILE_ROWS, random_numbers
from modalloy.methods.entries import absolute_sum, norm_factor
from modalloy.methods.method import MASK_LAWS, Method, always
from modalloy.methods.parameters import Number, Probabilities, Seed, Shares, each
from modalloy.methods.ties import Combine, elect_and_merge

Rescale = Literal["norm", "probability", "none"]


def della_linear(
    deltas: list[Tensor],
    *,
    density: Shares = 0.8,
    epsilon: Probabilities = 0.15,
    rescale: Rescale = "norm",
    seed: Seed = 42,
    scale: Number,
    shape: tuple[int, int],
    slot: str = "",
) -> Tensor:
    """λ Σ c_i m_i ∘ D_i, where the random mask m_i keeps large entries of a row more often than small ones.

    The j-th smallest of the n magnitudes of a row (of equal ones, the first is the smaller) is kept with probability
    density − epsilon + 2 epsilon (j − 1)/(n − 1). Masks are drawn as DARE's are (see dare_linear): with epsilon 0 they
    are the same. A density of 1 keeps everything, whatever epsilon.

    Args:
        deltas: one matrix (out, in) per specialist, scaling folded in.
        density: mean share of the entries that is kept, 1 − the paper's drop rate p.
        epsilon: half the width of the probabilities' range; density ± epsilon must lie between 0 and 1.
        rescale: c_i: "norm" gives what is left the L1 norm of the update (mergekit's rescale: true), "probability"
            divides every entry that is kept by its probability (the paper's, whose mean over seeds is λ Σ D_i), "none"
            is 1 (mergekit's rescale: false).
        seed: of the masks.
        scale: λ, 1 by default.
        shape: of the original weight; unused.
        slot: name of the weight.

    Cost: O(T N log in) for N entries, whose rows are sorted; memory two matrices beside the inputs.
    """
    merged = torch.zeros_like(deltas[0])
    for index, (D, mean, half) in enumerate(_with_chances(deltas, density, epsilon)):
        merged += prune(D, mean, half, rescale, seed, index, slot)
    return merged.mul_(scale)


def della(
    deltas: list[Tensor],
    *,
    density: Shares = 0.8,
    epsilon: Probabilities = 0.15,
    rescale: Rescale = "norm",
    seed: Seed = 42,
    combine: Combine = "mean",
    scale: Number,
    shape: tuple[int, int],
    slot: str = "",
    folded: Sequence[float] | None = None,
) -> Tensor:
    """The entries c_i m_i ∘ D_i that DELLA leaves (see della_linear), merged where they have the elected sign (see ties).

    Args:
        deltas: one matrix (out, in) per specialist, scaling folded in.
        density: mean share of the entries that is kept, 1 − the paper's drop rate p.
        epsilon: half the width of the probabilities' range; density ± epsilon must lie between 0 and 1.
        rescale: of what is left: to the L1 "norm" of the update, by 1 / "probability" of every entry, or "none".
        seed: of the masks.
        combine: the merged magnitude of the entries that agree in sign: "mean" (mergekit's normalize: true, its
            default here), "sum" (normalize: false) or "max".
        scale: λ, 1 by default.
        shape: of the original weight; unused.
        slot: name of the weight.
        folded: the weights that are folded into the updates already, for "weighted_mean".

    Cost: that of della_linear and of ties; memory T + 1 matrices beside the inputs.
    """
    entries = enumerate(_with_chances(deltas, density, epsilon))
    pruned = [prune(D, mean, half, rescale, seed, index, slot) for index, (D, mean, half) in entries]
    return elect_and_merge(pruned, [0.0] * len(pruned), None, combine, folded).mul_(scale)


def _with_chances(
    deltas: list[Tensor], density: Shares, epsilon: Probabilities
) -> Iterator[tuple[Tensor, float, float]]:
    """Every update with its density and its epsilon."""
    yield from zip(deltas, each(density, len(deltas)), each(epsilon, len(deltas)), strict=True)


def prune(delta: Tensor, density: float, epsilon: float, rescale: Rescale, seed: int, model: int, slot: str) -> Tensor:
    """c m ∘ D of the `model`-th specialist; D itself where everything is kept."""
    if density == 1:
        return delta
    left, columns = torch.empty_like(delta), delta.shape[1]
    chances = np.linspace(density - epsilon, density + epsilon, columns) if columns > 1 else np.full(columns, density)
    limits = np.maximum(1, np.round(chances * 2**32)) - 1
    for tile, part in enumerate(left.split(TILE_ROWS)):
        numbers = random_numbers((part.shape[0], columns), seed, model, slot, tile)
        for rows in row_blocks(part.shape):
            block = delta[tile * TILE_ROWS : (tile + 1) * TILE_ROWS][rows]
            ranks = ranks_of(block.abs()).cpu().numpy()
            factors = numbers[rows] <= limits[ranks]
            if rescale == "probability":
                factors = factors / chances[ranks]
            part[rows] = block * torch.from_numpy(factors).to(delta)
    return left.mul_(norm_factor(absolute_sum(delta), absolute_sum(left))) if rescale == "norm" else left


def ranks_of(magnitudes: Tensor) -> Tensor:
    """How many entries of its row are smaller than each, 0 to n − 1; of equal ones, those before it count as smaller."""
    order = magnitudes.argsort(dim=1, stable=True)
    places = torch.arange(magnitudes.shape[1], device=magnitudes.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def conflict(parameters: dict[str, Any]) -> str:
    """One line where density and epsilon give no probabilities."""
    several = [len(parameters[name]) for name in ("density", "epsilon") if isinstance(parameters[name], tuple)]
    pairs = (each(parameters[name], max(several, default=1)) for name in ("density", "epsilon"))
    for density, epsilon in zip(*pairs, strict=True):
        if density != 1 and epsilon >= min(density, 1 - density):
            return (
                f"epsilon: {epsilon:g} is out of range for density: {density:g}; entries are kept with probability density ± "
                f"epsilon, which must lie between 0 and 1: write epsilon below {min(density, 1 - density):g}"
            )
    return ""


DELLA_LINEAR = Method(della_linear, "dense", "arXiv 2406.11617", MASK_LAWS, conflict=conflict)

DELLA = Method(della, "dense", "arXiv 2406.11617", MASK_LAWS, copies_updates=always, conflict=conflict)

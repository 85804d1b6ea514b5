"""DARE (Yu et al., ICML 2024, arXiv 2311.03099): drop entries at random, and rescale those that are left."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modalloy.methods.method import MASK_LAWS, Method, always, is_global
from modalloy.methods.parameters import Number, Seed, Share, Shares, each
from modalloy.methods.ties import Combine, Threshold, survey_ties, ties

TILE_ROWS = 128  # part of what defines the masks: another value gives other masks


def dare_linear(
    deltas: list[Tensor],
    *,
    density: Shares = 0.8,
    seed: Seed = 42,
    scale: Number,
    shape: tuple[int, int],
    slot: str = "",
) -> Tensor:
    """λ Σ m_i ∘ D_i / density, where the random mask m_i keeps every entry with probability `density`.

    The mean over seeds is λ Σ D_i. An entry of a mask depends on the seed, the specialist's place, the slot and the
    entry's place only, so the same bytes come out in any order, on any number of threads.

    Args:
        deltas: one matrix (out, in) per specialist, scaling folded in.
        density: share of the entries that is kept, one or one for each specialist, 1 − the paper's drop rate p. The paper goes
            down to 0.1 and, for large models, 0.01; others drop 0.1 to 0.5.
        seed: of the masks.
        scale: λ, 1 by default.
        shape: of the original weight; unused.
        slot: name of the weight.

    Cost: O(T N) for N entries, one random 32-bit number each; memory one matrix beside the inputs.
    """
    merged = torch.zeros_like(deltas[0])
    for index, (D, share) in enumerate(zip(deltas, each(density, len(deltas)), strict=True)):
        for tile, rows in enumerate(merged.split(TILE_ROWS)):
            rows += drop_tile(D, share, seed, index, slot, tile)
    return merged.mul_(scale)


def dare_ties(
    deltas: list[Tensor],
    *,
    density: Shares = 0.8,
    seed: Seed = 42,
    trim_density: Share = 0.2,
    threshold: Threshold = "tensor",
    combine: Combine = "mean",
    scale: Number,
    shape: tuple[int, int],
    slot: str = "",
    whole: dict[str, Any] | None = None,
    folded: Sequence[float] | None = None,
) -> Tensor:
    """TIES of the updates m_i ∘ D_i / density that DARE leaves.

    Args:
        deltas: one matrix (out, in) per specialist, scaling folded in.
        density: share of the entries that DARE keeps, one or one for each specialist, 1 − the paper's drop rate p.
        seed: of the masks.
        trim_density: share of all entries, dropped ones included, that survive the trimming of TIES; when it is above
            `density` nothing more is trimmed. 1 gives what other codebases call dare_ties without trimming.
        threshold: what the largest entries are counted over, "tensor" or "global" (see ties).
        combine: the merged magnitude of the entries that agree in sign: "mean", "sum", "max" or "weighted_mean" (see ties).
        scale: λ, 1 by default.
        shape: of the original weight; unused.
        slot: name of the weight.
        whole: the counts over the whole model, for threshold "global".
        folded: the weights that are folded into the updates already, for "weighted_mean".

    Cost: that of dare_linear and ties; memory T + 1 matrices beside the inputs.
    """
    return ties(
        _dropped(deltas, density, seed, slot),
        density=trim_density,
        threshold=threshold,
        combine=combine,
        scale=scale,
        shape=shape,
        whole=whole,
        folded=folded,
    )


def survey_dare_ties(
    model: Callable[[], Iterable[tuple[str, list[Tensor]]]],
    *,
    density: Shares,
    seed: int,
    trim_density: float,
    **_: Any,
) -> dict[str, Any]:
    """The counts of TIES over the whole model that DARE leaves."""

    def left() -> Iterable[tuple[str, list[Tensor]]]:
        for slot, deltas in model():
            yield slot, _dropped(deltas, density, seed, slot)

    return survey_ties(left, density=trim_density)


def _dropped(deltas: list[Tensor], density: Shares, seed: int, slot: str) -> list[Tensor]:
    """What DARE leaves of every update."""
    shares = each(density, len(deltas))
    return [drop(D, share, seed, index, slot) for index, (D, share) in enumerate(zip(deltas, shares, strict=True))]


def drop(delta: Tensor, density: float, seed: int, model: int, slot: str) -> Tensor:
    """m ∘ D / density with the mask of the `model`-th specialist."""
    left = torch.empty_like(delta)
    for tile, rows in enumerate(left.split(TILE_ROWS)):
        rows.copy_(drop_tile(delta, density, seed, model, slot, tile))
    return left


def drop_tile(delta: Tensor, density: float, seed: int, model: int, slot: str, tile: int) -> Tensor:
    """The rows of one tile of m ∘ D / density."""
    rows = delta[tile * TILE_ROWS : (tile + 1) * TILE_ROWS]
    kept = keep_mask((rows.shape[0], rows.shape[1]), density, seed, model, slot, tile)
    return (rows / density).mul_(torch.from_numpy(kept).to(delta.device))


def keep_mask(shape: tuple[int, int], density: float, seed: int, model: int, slot: str, tile: int) -> np.ndarray:
    """One tile of a mask: boolean, True with probability `density` to 32 bits.

    The tile's 32-bit numbers are those of Philox (a counter-based generator), low half of every 64-bit word first, with
    the first 128 bits of the sha256 of [seed, model, slot, tile] as its key.
    """
    return random_numbers(shape, seed, model, slot, tile) <= np.uint32(max(1, round(density * 2**32)) - 1)


def random_numbers(shape: tuple[int, int], seed: int, model: int, slot: str, tile: int) -> np.ndarray:
    """The 32-bit numbers, uint32, that decide on the entries of one tile: an entry stays where its own is small."""
    key = hashlib.sha256(json.dumps([seed, model, slot, tile]).encode()).digest()[:16]
    n = shape[0] * shape[1]
    words = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(-(-n // 2))
    return words.astype("<u8", copy=False).view("<u4")[:n].reshape(shape)


DARE_LINEAR = Method(dare_linear, "dense", "arXiv 2311.03099", MASK_LAWS)

DARE_TIES = Method(
    dare_ties, "dense", "arXiv 2311.03099", MASK_LAWS, survey=survey_dare_ties, surveys=is_global, copies_updates=always
)

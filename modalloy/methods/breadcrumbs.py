"""Model Breadcrumbs (Davari and Belilovsky, ECCV 2024, arXiv 2312.06795): drop the outliers and the small entries."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from modalloy.linalg import row_blocks
from modalloy.methods.entries import absolute_sum, kept_ranks, magnitude_cuts, norm_factor
from modalloy.methods.method import ENTRY_LAWS, Method, always
from modalloy.methods.parameters import Number, Probabilities, Shares
from modalloy.methods.ties import Combine, elect_and_merge

Rescale = Literal["none", "norm"]


def breadcrumbs(
    deltas: list[Tensor],
    *,
    density: Shares = 0.9,
    gamma: Probabilities = 0.01,
    rescale: Rescale = "none",
    scale: Number,
    shape: tuple[int, int],
) -> Tensor:
    """λ Σ m_i ∘ D_i, where the mask m_i leaves out the largest entries and the smallest.

    Of the N magnitudes of D_i the largest round(gamma · N) go, and of the others the largest max(1, round(density · N))
    stay; where fewer are left, fewer of the largest go. Entries that equal the first or the last that stays, stay.

    Args:
        deltas: one matrix (out, in) per specialist, scaling folded in.
        density: share of the entries that stays.
        gamma: share that is left out as outliers, the largest.
        rescale: what is left as it is ("none"), or with the L1 "norm" of the update (mergekit's rescale: true).
        scale: λ, 1 by default.
        shape: of the original weight; unused.

    Cost: O(T N) time for N entries, five passes; memory one matrix beside the inputs.
    """
    merged = torch.zeros_like(deltas[0])
    for D, (low, high), factor in _bands(deltas, density, gamma, rescale):
        for rows in row_blocks(merged.shape):
            merged[rows] += factor * _between(D[rows], low, high)
    return merged.mul_(scale)


def breadcrumbs_ties(
    deltas: list[Tensor],
    *,
    density: Shares = 0.9,
    gamma: Probabilities = 0.01,
    rescale: Rescale = "none",
    combine: Combine = "sum",
    scale: Number,
    shape: tuple[int, int],
    folded: Sequence[float] | None = None,
) -> Tensor:
    """λ times what breadcrumbs leaves of every update, merged where it has the elected sign (see ties).

    Args:
        deltas: one matrix (out, in) per specialist, scaling folded in.
        density: share of the entries that stays.
        gamma: share that is left out as outliers, the largest.
        rescale: what is left as it is ("none"), or with the L1 "norm" of the update (mergekit's rescale: true).
        combine: the merged magnitude of the entries that agree in sign: "sum" (mergekit's normalize: false, its default
            here), "mean" (normalize: true) or "max".
        scale: λ, 1 by default.
        shape: of the original weight; unused.
        folded: the weights that are folded into the updates already, for "weighted_mean".

    Cost: that of breadcrumbs and of ties; memory T + 1 matrices beside the inputs.
    """
    left = []
    for D, (low, high), factor in _bands(deltas, density, gamma, rescale):
        left.append(torch.empty_like(D))
        for rows in row_blocks(D.shape):
            left[-1][rows] = factor * _between(D[rows], low, high)
    return elect_and_merge(left, [0.0] * len(left), None, combine, folded).mul_(scale)


def _bands(
    deltas: list[Tensor], density: Shares, gamma: Probabilities, rescale: Rescale
) -> list[tuple[Tensor, tuple[float, float], float]]:
    """Every update with the least and the largest magnitude that stay, and what it is multiplied by."""
    n = deltas[0].numel()
    ranks = kept_ranks(n, density, gamma, len(deltas))
    outliers = [first for first, _ in ranks]
    lows = magnitude_cuts(lambda: [deltas], [last / max(1, n) for _, last in ranks])
    cuts = magnitude_cuts(lambda: [deltas], [(one + 1) / n for one in outliers]) if any(outliers) else lows
    highs = [cut if one else math.inf for cut, one in zip(cuts, outliers, strict=True)]
    found = []
    for D, band in zip(deltas, zip(lows, highs, strict=True), strict=True):
        factor = 1.0
        if rescale == "norm":
            after = (float(_between(D[rows], *band).abs().sum(dtype=torch.float64)) for rows in row_blocks(D.shape))
            factor = norm_factor(absolute_sum(D), sum(after))
        found.append((D, band, factor))
    return found


def _between(rows: Tensor, low: float, high: float) -> Tensor:
    magnitudes = rows.abs()
    return rows * ((magnitudes >= low) & (magnitudes <= high))


BREADCRUMBS = Method(breadcrumbs, "dense", "arXiv 2312.06795", ENTRY_LAWS)

BREADCRUMBS_TIES = Method(breadcrumbs_ties, "dense", "arXiv 2312.06795", ENTRY_LAWS, copies_updates=always)

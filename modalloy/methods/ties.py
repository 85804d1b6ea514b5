"""TIES (Yadav et al., NeurIPS 2023, arXiv 2306.01708): trim the small entries, elect a sign, merge what agrees."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from modalloy.errors import MethodError
from modalloy.linalg import row_blocks
from modalloy.methods.entries import magnitude_cuts
from modalloy.methods.method import ENTRY_LAWS, Method, is_global
from modalloy.methods.parameters import Number, Shares

Combine = Literal["mean", "sum", "max", "weighted_mean"]
Threshold = Literal["tensor", "global"]


def ties(
    deltas: list[Tensor],
    *,
    density: Shares = 0.2,
    threshold: Threshold = "tensor",
    combine: Combine = "mean",
    scale: Number,
    shape: tuple[int, int],
    whole: dict[str, Any] | None = None,
    folded: Sequence[float] | None = None,
) -> Tensor:
    """λ times the entries that agree in sign, after every update was trimmed to its largest (Algorithm 1 of the paper).

    Trim: v_i keeps the max(1, round(density · N)) entries of D_i that are largest in magnitude, and all that equal the
    smallest of them. Elect: s = sign(Σ v_i), and where that is 0 the sign that most entries have (none if there is no
    such sign). Merge: over the v_i with sign s.

    Args:
        deltas: one matrix (out, in) per specialist, scaling folded in.
        density: share of the entries that survive the trimming, one for all specialists or one for each.
        threshold: over what the largest entries, and the sign of most entries, are counted: every "tensor" by itself,
            or "global", the whole model, as the paper's code does (which costs more passes over the inputs).
        combine: the merged magnitude: the "mean" (the paper's), "sum" or "max" of those that agree, or "weighted_mean",
            their sum divided by that of their specialists' weights (by 1 where this is 0), as mergekit's normalize: true.
        scale: λ, 1 by default.
        shape: of the original weight; unused.
        whole: the counts over the whole model (`survey_ties`), for threshold "global".
        folded: the weights that are folded into the updates already, for "weighted_mean".

    Cost: O(T N) time for N entries, three to four passes; memory one matrix beside the inputs.
    """
    if threshold == "tensor":
        whole = {"cuts": magnitude_cuts(lambda: [deltas], density), "majority": None}
    assert whole is not None
    return elect_and_merge(deltas, whole["cuts"], whole["majority"], combine, folded).mul_(scale)


def survey_ties(
    model: Callable[[], Iterable[tuple[str, list[Tensor]]]], *, density: Shares, **_: Any
) -> dict[str, Any]:
    """What threshold "global" needs: the trimming thresholds and the sign of most entries over the whole model."""

    def layers() -> Iterable[list[Tensor]]:
        return (matrices for _, matrices in model())

    cuts = magnitude_cuts(layers, density)
    return {"cuts": cuts, "majority": majority_sign(layers(), cuts)}


def majority_sign(layers: Iterable[list[Tensor]], cuts: list[float]) -> int:
    """The sign (1, -1 or 0) of the sum of all elected signs."""
    balance = 0
    for matrices in layers:
        for rows in row_blocks(matrices[0].shape):
            balance += int(_trimmed(matrices, cuts, rows).sum(0).sign().sum(dtype=torch.int64))
    return (balance > 0) - (balance < 0)


def elect_and_merge(
    deltas: list[Tensor],
    cuts: list[float],
    majority: int | None,
    combine: Combine,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """The merged entries for given thresholds. A `majority` of None is these matrices'; "weighted_mean" needs `weights`."""
    if combine == "weighted_mean" and weights is None:
        raise MethodError("combine: weighted_mean needs the weights of the updates; give one each")
    merged = torch.empty_like(deltas[0])
    factors = merged.new_tensor(list(weights or [1.0] * len(deltas)))[:, None, None]
    for rows in row_blocks(merged.shape):
        trimmed = _trimmed(deltas, cuts, rows)  # (T, rows, in)
        elected = trimmed.sum(0).sign()
        undecided = (elected == 0) & (trimmed.abs().sum(0) > 0)
        if bool(undecided.any()):  # entries that cancel exactly: rare, so the majority is counted on demand
            majority = majority_sign([deltas], cuts) if majority is None else majority
            elected[undecided] = majority
        agreeing = (trimmed * elected).clamp(min=0)  # magnitudes of the entries that have the elected sign
        size = agreeing.amax(0) if combine == "max" else agreeing.sum(0)
        if combine == "mean":
            size /= agreeing.sign().sum(0).clamp(min=1)
        elif combine == "weighted_mean":
            total = (agreeing.sign() * factors).sum(0)
            size /= torch.where(total == 0, 1.0, total)
        merged[rows] = elected * size
    return merged


def _trimmed(deltas: list[Tensor], cuts: list[float], rows: slice) -> Tensor:
    """These rows of every update with the entries below its threshold set to 0: (T, rows, in)."""
    blocks = []
    for D, cut in zip(deltas, cuts, strict=True):
        below = torch.tensor(cut, dtype=D.dtype).nextafter(torch.zeros((), dtype=D.dtype))
        blocks.append(hardshrink(D[rows], below.item()))  # zeroes |v| ≤ λ, much faster than comparing and selecting
    return torch.stack(blocks)


METHOD = Method(ties, "dense", "arXiv 2306.01708", ENTRY_LAWS, survey=survey_ties, surveys=is_global)

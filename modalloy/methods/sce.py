"""SCE: select, calculate, erase (FuseChat, Wan et al., arXiv 2408.07990)."""

import torch
from torch import Tensor

from modalloy.linalg import frobenius, row_blocks
from modalloy.methods.entries import magnitude_cuts
from modalloy.methods.method import ENTRY_LAWS, Method
from modalloy.methods.parameters import Number, Share


def sce(deltas: list[Tensor], *, select_topk: Share = 1.0, scale: Number, shape: tuple[int, int]) -> Tensor:
    """λ times the weighted mean of the entries that have the elected sign, at the places where the updates differ most.

    Select: of the places at which the updates' variance is not 0, the share select_topk of the largest variance (at
    least one, and those that equal the last); with 1 all places. Calculate: the weight of update i is the sum of its
    squares at these places. Erase: entries whose sign is not that of the sum of the updates; where that is 0, all.

    Args:
        deltas: one matrix (out, in) per specialist, scaling folded in.
        select_topk: share of the places that is selected. 1, mergekit's default, selects all. Below 1
            nothing is left where all updates are alike, and so of one specialist.
        scale: λ, 1 by default.
        shape: of the original weight; unused.

    Cost: O(T N) time for N entries, two passes, five where places are selected; memory one matrix beside the inputs.
    """
    merged = torch.empty_like(deltas[0])
    blocks = list(row_blocks(merged.shape))
    cut = 0.0
    if select_topk < 1:
        varying = sum(int(_variance(_stacked(deltas, rows)).count_nonzero()) for rows in blocks)
        if not varying:
            return merged.zero_()
        share = max(1, round(select_topk * varying)) / merged.numel()
        (cut,) = magnitude_cuts(lambda: ([_variance(_stacked(deltas, rows))] for rows in blocks), share)
    weights = [0.0] * len(deltas)
    for rows in blocks:
        for index, part in enumerate(_selected(deltas, rows, cut)):
            weights[index] += frobenius(part) ** 2
    largest = max(weights) or 1.0
    shares = torch.tensor([weight / largest for weight in weights], dtype=merged.dtype, device=merged.device)
    for rows in blocks:
        D = _selected(deltas, rows, cut)  # (T, rows, in)
        counted = shares[:, None, None] * (D * D.sum(0).sign() > 0)
        total = counted.sum(0)
        merged[rows] = (D * counted).sum(0) / torch.where(total > 0, total, 1)
    return merged.mul_(scale)


def _stacked(deltas: list[Tensor], rows: slice) -> Tensor:
    """These rows of every update: (T, rows, in)."""
    return torch.stack([D[rows] for D in deltas])


def _variance(D: Tensor) -> Tensor:
    """Variance over the updates, exactly 0 where they are alike."""
    differences = D - D[0]
    return (differences - differences.mean(0)).square_().mean(0)


def _selected(deltas: list[Tensor], rows: slice, cut: float) -> Tensor:
    """These rows of every update, 0 at the places whose variance is below the cut: (T, rows, in)."""
    D = _stacked(deltas, rows)
    return D * (_variance(D) >= cut) if cut else D


METHOD = Method(sce, "dense", "arXiv 2408.07990", ("identity at n=1", *ENTRY_LAWS))

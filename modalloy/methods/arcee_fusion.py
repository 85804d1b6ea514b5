"""Arcee Fusion (Arcee AI, 2025; in mergekit): the entries of one model that matter most replace the base's."""

import torch
from torch import Tensor

from modalloy.linalg import row_blocks
from modalloy.methods.entries import magnitude_cuts
from modalloy.methods.method import Method, always

FLOOR = 1e-8  # added to every probability
QUARTERS = (0.25, 0.5, 0.75)


def arcee_fusion(deltas: list[Tensor], *, base: Tensor, shape: tuple[int, int]) -> Tensor:
    """D where its importance reaches median + 1.5 (Q3 − Q1), else 0. Importance: |D| times its row's divergence.

    The divergence of a row is that of its softmax after, p, from its softmax before, q: Σ (p + ε) log((p + ε)/(q + ε)) with
    ε = 1e-8. The quartiles are those of the whole weight, exactly. Norms and biases stay the base's, as most entries do.

    Args:
        deltas: the update (out, in) of one model.
        base: W_0 (out, in).
        shape: of the original weight; unused.

    Cost: one pass, and two for each quartile in float32; memory two matrices beside the inputs.
    """
    (delta,) = deltas
    importance = torch.empty_like(delta)
    for rows in row_blocks(delta.shape):
        importance[rows] = delta[rows].to(torch.float64).abs() * divergences(delta[rows], base[rows])
    count = importance.numel()
    low, median, high = (_ordered(importance, int(quarter * (count - 1))) for quarter in QUARTERS)
    cut = median + 1.5 * (high - low)
    return torch.where(importance >= cut, delta, 0)


def divergences(delta: Tensor, base: Tensor) -> Tensor:
    """How far the softmax of every row moves, (out, 1) in float64: the Kullback-Leibler divergence of after from before."""
    before = base.to(torch.float64)
    p, q = ((before + one).softmax(1) + FLOOR for one in (delta.to(torch.float64), 0))
    return (p * (p / q).log()).sum(1, keepdim=True).clamp(min=0)


def _ordered(importance: Tensor, index: int) -> float:
    """The entry at this place in ascending order."""
    count = importance.numel()
    return magnitude_cuts(lambda: [[importance]], (count - index) / count)[0]


METHOD = Method(
    arcee_fusion,
    "dense",
    "arcee.ai",
    ("permutation", "gauge", "factored = dense"),
    base=always,
    models=(1, 1),
    copies_updates=always,
    keeps_vectors=True,
)

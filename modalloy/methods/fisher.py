"""Fisher-weighted averaging (Matena and Raffel, NeurIPS 2022, arXiv 2111.09832)."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from modalloy.linalg import row_blocks
from modalloy.methods.method import ENTRY_LAWS, Method
from modalloy.methods.parameters import Number, Positive


def fisher(
    deltas: list[Tensor],
    *,
    floor: Positive = 1e-6,
    normalize: Literal["none", "l2"] = "none",
    scale: Number,
    shape: tuple[int, int],
    fishers: Sequence[Tensor],
) -> Tensor:
    """λ Σ c_i F_i ∘ D_i / Σ c_i F_i: per entry, the mean of the updates weighted by their diagonal Fisher information.

    The paper writes it for the parameters θ_i. The same holds for the updates D_i = θ_i − θ_0, since the weights of
    every entry sum to 1.

    Args:
        deltas: one matrix (out, in) per specialist, scaling folded in.
        floor: the least value of every F_i, so that an entry about which no specialist has information is averaged.
            It is absolute: choose it below the Fisher values that should count.
        normalize: c_i, "none" for 1 or "l2" for 1 / ‖F_i‖ so that no specialist outweighs the others by the size of
            its loss. The norm is that of this weight's F_i after the floor; the authors' code takes it over the model.
        scale: λ, 1 by default.
        shape: of the original weight; unused.
        fishers: one matrix F_i (out, in) of squared gradients per specialist, from data.

    Cost: O(T N) for N entries, in float64 by blocks; memory one matrix beside the inputs.
    """
    weights = [1.0 if normalize == "none" else 1 / _norm(F, floor) for F in fishers]
    merged = torch.empty_like(deltas[0])
    for rows in row_blocks(merged.shape):
        total = weighted = torch.zeros((), dtype=torch.float64, device=merged.device)
        for c, F, D in zip(weights, fishers, deltas, strict=True):
            share = c * _floored(F[rows], floor).to(merged.device)
            total = total + share
            weighted = weighted + share * D[rows].to(torch.float64)
        merged[rows] = (scale * weighted / total).to(merged.dtype)
    return merged


def _floored(F: Tensor, floor: float) -> Tensor:
    return F.to(torch.float64).clamp(min=floor)


def _norm(F: Tensor, floor: float) -> float:
    return sum(float(_floored(F[rows], floor).square().sum()) for rows in row_blocks(F.shape)) ** 0.5


METHOD = Method(fisher, "dense", "arXiv 2111.09832", ("identity at n=1", *ENTRY_LAWS))

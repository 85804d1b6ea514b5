"""Isotropic merging, Iso-C and Iso-CTS (Marczak et al., ICML 2025, arXiv 2502.04959).

Both give all singular directions of the merged update one common singular value. The singular vectors of zero are
arbitrary, so only the support gets it (relative tolerance `linalg.RANK_TOLERANCE`); on updates of full rank this is
the paper's result. The mean that is given to them is over all min(out, in) values, as in the paper, or over the
support: larger by min(out, in)/rank, so that λ is not the same for both.
"""

from typing import Literal

import torch
from torch import Tensor

from modalloy.delta import LowRank
from modalloy.linalg import polar, singular_triples
from modalloy.methods.method import FLAT_LAWS, ROW_LAWS, Method
from modalloy.methods.parameters import Number, UnitInterval

MeanOver = Literal["all", "support"]


def iso_c(deltas: list[Tensor], *, mean_over: MeanOver = "all", scale: Number, shape: tuple[int, int]) -> LowRank:
    """λ σ̄ U Vᵀ of Σ D_i = U diag(σ) Vᵀ: the sum with its spectrum made flat.

    Args:
        deltas: one matrix (out, in) per specialist, scaling folded in.
        mean_over: what σ̄ = Σσ/count counts: "all" min(out, in) singular values, or those of the "support", the rank.
        scale: λ, 1 by default.
        shape: of the original weight (out, in).

    Cost: O(mn·min(m, n)) for m × n matrices.
    """
    U, s, V = singular_triples(sum(deltas[1:], deltas[0]))
    return LowRank(scale * _mean(s, mean_over, shape) * U, V.T)


def iso_cts(
    deltas: list[Tensor],
    *,
    common: UnitInterval = 0.8,
    mean_over: MeanOver = "all",
    scale: Number,
    shape: tuple[int, int],
) -> LowRank:
    """λ σ̄ U_⊥ V_⊥ᵀ: a flat spectrum on the sum's leading directions and on those that every update has beside them.

    Of the r directions, r − n come from Σ D_i (the common space, with left vectors U_c) and n/T from each
    D_i − U_c U_cᵀ D_i (the task's own); both sides are then made orthogonal and get the mean σ̄ of all their values.
    The paper's r is min(out, in). Beyond the support those directions would be arbitrary, so r is the rank of Σ D_i,
    the same where that is full. The projection is on the left only, as published: D_iᵀ give another result.

    Args:
        deltas: one matrix (out, in) per specialist, scaling folded in.
        common: f, the share of directions in the common space, before rounding to n = T·round((r − ⌊f r⌋)/T).
        mean_over: what σ̄ = Σσ/count counts: "all" min(out, in) values, or those of the "support", which are not zero.
        scale: λ, 1 by default.
        shape: of the original weight (out, in).

    Cost: O(T mn·min(m, n)) for m × n matrices.
    """
    T = len(deltas)
    U, s, V = singular_triples(sum(deltas[1:], deltas[0]))
    rank = len(s)
    each = min(round((rank - int(rank * common)) / T), rank // T)
    U, s, V = (part[..., : rank - T * each] for part in (U, s, V))
    spaces = [(U, s, V)]
    for D in deltas:
        own = D - U @ (U.T @ D.to(torch.float64))
        spaces.append(singular_triples(own, each, largest=float(torch.linalg.matrix_norm(D.to(torch.float64)))))
    left, values, right = (torch.cat(parts, -1) for parts in zip(*spaces, strict=True))
    return LowRank(scale * _mean(values, mean_over, shape) * polar(left), polar(right).T)


def _mean(values: Tensor, over: MeanOver, shape: tuple[int, int]) -> float:
    count = min(shape) if over == "all" else len(values)
    return float(values.sum()) / max(count, 1)


ISO_C = Method(iso_c, "core", "arXiv 2502.04959", FLAT_LAWS)

ISO_CTS = Method(iso_cts, "core", "arXiv 2502.04959", ROW_LAWS[1:])

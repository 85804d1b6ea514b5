"""Core Space merging (Panariello et al., NeurIPS 2025, arXiv 2509.17786): merge r-dimensional cores of LoRA updates."""

from typing import Literal

import torch

from modalloy.delta import Delta, LowRank
from modalloy.errors import MethodError
from modalloy.linalg import Basis, left_singular_vectors
from modalloy.methods.method import Method
from modalloy.methods.parameters import Number, Share
from modalloy.methods.ties import Combine, ties
from modalloy.methods.tsv import tsv

CUT = 1e-12  # of the largest singular value: only what is zero but for float64 rounding is left out


def core_space(
    deltas: list[Delta],
    *,
    inner: Literal["ties", "task_arithmetic", "tsv"] = "ties",
    density: Share = 0.1,
    combine: Combine = "mean",
    scale: Number,
    shape: tuple[int, int],
) -> LowRank:
    """U f(M_1, …, M_T) Vᵀ with M_i = Uᵀ B_i A_i V, U and V the singular vectors of [B_1 … B_T] and of [A_1; …; A_T].

    U M_i Vᵀ is D_i = B_i A_i exactly, so a linear f gives what it gives on the full matrices; other f depend on the basis,
    and so on how every D_i is split into its factors (alpha/r is folded into B_i).

    Args:
        deltas: one `LowRank` update per specialist.
        inner: f, the method that merges the cores.
        density: share of the entries of every core that "ties" keeps (the default is the authors').
        combine: the merged magnitude that "ties" gives entries that agree in sign: "mean", "sum" or "max".
        scale: λ, 1 by default.
        shape: of the original weight; unused.

    Raises:
        MethodError: an update is a full matrix.

    Cost: O((out + in) R² + R³), R = Σ rank_i.
    """
    factors = [delta for delta in deltas if isinstance(delta, LowRank)]
    if len(factors) < len(deltas):
        raise MethodError(
            "core_space merges in the span of LoRA factors, but an update is a full matrix; use another method, for example ties"
        )
    rows, columns = Basis(*(delta.up for delta in factors)), Basis(*(delta.down.T for delta in factors))
    U, V = left_singular_vectors(rows.triangle, CUT), left_singular_vectors(columns.triangle, CUT)
    splits = [delta.rank for delta in factors]
    lefts, rights = (U.T @ rows.triangle).split(splits, 1), (V.T @ columns.triangle).split(splits, 1)
    M = [left @ right.T for left, right in zip(lefts, rights, strict=True)]
    if inner == "ties":
        merged = ties(M, density=density, combine=combine, scale=scale, shape=shape)
    elif inner == "tsv":
        merged = tsv(M, scale=scale, shape=shape).dense()
    else:
        merged = scale * torch.stack(M).sum(0)
    dtype = factors[0].up.dtype
    return LowRank(rows.times(U @ merged, dtype), columns.times(V, dtype).T)


METHOD = Method(
    core_space,
    "factors",
    "arXiv 2509.17786",
    ("permutation", "scaling", "left rotation", "rotation", "transpose", "rank ≤ Σ r_i"),
)

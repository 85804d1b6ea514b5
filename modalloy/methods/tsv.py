"""TSV-Merge: task singular vectors (Gargiulo et al., CVPR 2025, arXiv 2412.00081)."""

from typing import Literal

import torch
from torch import Tensor

from modalloy.delta import LowRank
from modalloy.linalg import polar, singular_triples
from modalloy.methods.method import LINEAR_LAWS, Method
from modalloy.methods.parameters import Count, Number


def tsv(
    deltas: list[Tensor], *, rank: Count | Literal["auto"] = "auto", scale: Number, shape: tuple[int, int]
) -> LowRank:
    """λ U_⊥ Σ V_⊥ᵀ: the leading singular triples of every update, their vectors made orthogonal across updates.

    U = [U_1 … U_T] and V likewise hold the first k_i singular vectors of each D_i, Σ all their singular values; the
    orthogonal factors U_⊥ and V_⊥ (Procrustes) of U and V remove the interference between updates.
    Singular vectors of zero are arbitrary, and would turn the others: none are taken, k_i ≤ rank D_i (relative
    tolerance `linalg.RANK_TOLERANCE`). Where U or V is itself deficient (two updates share a direction), U_⊥ is the
    partial isometry of U's own column space, which is unique: T copies of D give D.

    Args:
        deltas: one matrix (out, in) per specialist, scaling folded in.
        rank: k, the most singular triples that one update contributes; "auto" is the paper's ⌊min(out, in)/T⌋
            (at least 1), which on LoRA updates is seldom below their rank.
        scale: λ, 1 by default.
        shape: of the original weight (out, in).

    Cost: O(T mn·min(m, n)) for m × n matrices, and O((Σ k_i)³).
    """
    k = max(1, min(shape) // len(deltas)) if rank == "auto" else rank
    left, values, right = zip(*(singular_triples(D, k) for D in deltas), strict=True)
    U, V = polar(torch.cat(left, 1)), polar(torch.cat(right, 1))
    return LowRank(scale * U * torch.cat(values), V.T)


METHOD = Method(tsv, "core", "arXiv 2412.00081", LINEAR_LAWS)

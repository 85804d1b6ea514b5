"""SSAM: Singular Subspace Alignment and Merging (arXiv 2603.21584, Algorithm 1), and variants that even out norms."""

from collections.abc import Sequence
from statistics import fmean
from typing import Literal

from torch import Tensor

from modalloy.delta import Delta, LowRank, norm, second_moment, shared_subspaces, total
from modalloy.linalg import RANK_TOLERANCE, energy_rank, frobenius
from modalloy.methods.method import ROTATION_LAWS, Method
from modalloy.methods.parameters import Number, Rank


def ssam(
    deltas: list[Delta],
    *,
    rank: Rank,
    scale: Number,
    balance: Literal["none", "subspace", "updates"] = "none",
    match: Literal["none", "norm"] = "none",
    shape: tuple[int, int],
) -> LowRank:
    """λ Σ U Uᵀ D_i V Vᵀ as a rank-k update: every update projected onto the subspaces they share, then summed.

    A = Σ D_i D_iᵀ and B = Σ D_iᵀ D_i leave out the cross terms D_i D_jᵀ that a decomposition of Σ D_i would mix in.
    U and V (their top-k eigenvectors, which are their singular vectors) minimise Σ ‖D_i − U Uᵀ D_i‖² and
    Σ ‖D_i − D_i V Vᵀ‖². `balance` and `match` are ours, not the paper's. They need Frobenius norms only, which are the
    same on cores, so that the variants are as exact there; m̄ is the mean norm of the updates that are not zero.

    Args:
        deltas: one matrix (out, in) per specialist, scaling folded in.
        rank: k, the dimension kept on each side (clipped to that side's size); below 1 it is the fraction of the
            spectral energy of A and of B that k must keep.
        scale: λ of the merged update; 1/n when the updates' norms are alike. With match: norm, the merged update's norm
            in units of m̄.
        balance: "subspace" takes A and B of D_i/‖D_i‖, so that a large update does not take the shared subspaces for
            itself; "updates" brings what is summed to one norm too, m̄ D_i/‖D_i‖, so that of a specialist's weight only
            the sign is left. Zero updates stay zero.
        match: "norm" scales the merged update of each weight to the norm λ m̄, whatever cancelled or was projected away;
            one that is zero (to rounding) stays zero.
        shape: of the original weight; unused.

    Cost: O(T (m²n + mn²) + m³ + n³) for m × n matrices, O(T m n k) an iteration where both are large and the spectrum
    falls (see `top_subspaces`); the engine calls it on cores of at most (n·r × n·r).
    """
    seen = deltas if balance == "none" else balanced(deltas)
    transposed = [D.T for D in seen]
    k = int(rank)
    if rank < 1:
        k = max(energy_rank(second_moment(transposed), rank), energy_rank(second_moment(seen), rank))
    summed = seen if balance == "updates" else deltas
    U, core, V = aligned(seen, summed, k)  # U and V are orthonormal, so that the core's norm is the merged update's
    core = scale * core
    if match == "norm":
        core = resized(core, abs(scale) * mean_norm([norm(D) for D in deltas]))
    if U.shape[1] <= V.shape[1]:  # k is clipped on each side by itself; the narrower side carries the rank
        return LowRank(U, core @ V.T)
    return LowRank(U @ core, V.T)


def aligned(deltas: Sequence[Delta], summed: Sequence[Delta], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, k) and V (in, k) of A = Σ D_i D_iᵀ and of B = Σ D_iᵀ D_i, and the core Uᵀ (Σ S_i) V (k, k) between them.

    S_i are what is summed, which `balance` may tell from the D_i. Where k is more than a third of the larger side: for a
    smaller k, the leading columns of U and V, and the leading block of the core, are those of that k.
    """
    U, V = shared_subspaces(deltas, k)
    return U, U.T @ (total(summed) @ V), V


def balanced(deltas: Sequence[Delta]) -> list[Delta]:
    """m̄ D_i/‖D_i‖: every update at their mean norm, zero ones left zero. The common m̄ changes neither U nor V."""
    norms = [norm(D) for D in deltas]
    mean = mean_norm(norms)
    return [D * (mean / size) if size else D for D, size in zip(deltas, norms, strict=True)]


def mean_norm(norms: Sequence[float]) -> float:
    """m̄, the mean of the norms that are not zero; 0 if all are."""
    return fmean([size for size in norms if size] or [0.0])


def resized(matrix: Tensor, size: float) -> Tensor:
    """The matrix at Frobenius norm `size`; zero if its own norm is nothing beside that but rounding."""
    own = frobenius(matrix)
    return matrix * (size / own if own > RANK_TOLERANCE * size else 0.0)


METHOD = Method(
    ssam,
    "factored_core",
    "arXiv 2603.21584",
    (*ROTATION_LAWS, "rank ≤ k", "rank ≤ Σ r_i"),
    mean_scale=True,
    scale_when=("match", "norm", 1.0),
    copies_updates=lambda parameters: parameters["balance"] != "none",
)

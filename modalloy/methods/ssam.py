"""SSAM: Singular Subspace Alignment and Merging (arXiv 2603.21584, Algorithm 1)."""

from modalloy.delta import Delta, LowRank, second_moment, shared_subspace
from modalloy.linalg import energy_rank
from modalloy.methods.parameters import Number, Rank


def ssam(deltas: list[Delta], *, rank: Rank, scale: Number, shape: tuple[int, int]) -> LowRank:
    """λ Σ U Uᵀ D_i V Vᵀ as a rank-k update: every update projected onto the subspaces they share, then summed.

    A = Σ D_i D_iᵀ and B = Σ D_iᵀ D_i leave out the cross terms D_i D_jᵀ that a decomposition of Σ D_i would mix in.
    U and V (their top-k eigenvectors, which are their singular vectors) minimise Σ ‖D_i − U Uᵀ D_i‖² and
    Σ ‖D_i − D_i V Vᵀ‖².

    Args:
        deltas: one matrix (out, in) per specialist, scaling folded in.
        rank: k, the dimension kept on each side (clipped to that side's size); below 1 it is the fraction of the
            spectral energy of A and of B that k must keep.
        scale: λ of the merged update; 1/n when the updates' norms are alike.
        shape: of the original weight; unused.

    Cost: O(T (m²n + mn²) + m³ + n³) for m × n matrices, O(T m n k) an iteration where both are large and the spectrum
    falls (see `top_subspace`); the engine calls it on cores of at most (n·r × n·r).
    """
    transposed = [D.T for D in deltas]
    k = int(rank)
    if rank < 1:
        k = max(energy_rank(second_moment(transposed), rank), energy_rank(second_moment(deltas), rank))
    U, V = shared_subspace(deltas, k), shared_subspace(transposed, k)  # of A = Σ D_i D_iᵀ and of B = Σ D_iᵀ D_i
    total = scale * sum(deltas[1:], deltas[0])
    if U.shape[1] <= V.shape[1]:  # k is clipped on each side by itself; the narrower side carries the rank
        return LowRank(U, (U.T @ (total @ V)) @ V.T)
    return LowRank(U @ (U.T @ (total @ V)), V.T)

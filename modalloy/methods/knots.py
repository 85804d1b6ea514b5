"""KnOTS (Stoica et al., ICLR 2025, arXiv 2410.19735): TIES in the coordinates of a subspace that all updates share."""

import torch
from torch import Tensor

from modalloy.delta import LowRank
from modalloy.linalg import gram, leading_eigenvectors
from modalloy.methods.method import Method
from modalloy.methods.parameters import Number, Share
from modalloy.methods.ties import Combine, ties

CUT = 1e-5  # of the largest singular value


def knots(
    deltas: list[Tensor],
    *,
    density: Share = 0.2,
    combine: Combine = "mean",
    scale: Number,
    shape: tuple[int, int],
) -> LowRank:
    """λ U TIES(X_1, …, X_T), where [D_1 … D_T] = U S [V_1ᵀ … V_Tᵀ] and X_i = S V_iᵀ are aligned coordinates.

    Every D_i is U X_i, so that summing the X_i would be task arithmetic; the methods that work on single entries find
    fewer conflicts there. Equal singular values leave the coordinates, and so the result, undetermined.

    Two differences from the authors' code: singular values below 1e-5 of the largest are left out (there below 1e-5,
    whatever the size of the updates), and the largest coordinates are found in every layer by itself (there over all layers).

    Args:
        deltas: one matrix (out, in) per specialist, scaling folded in.
        density: share of the coordinates of every specialist that TIES keeps.
        combine: the merged magnitude of the coordinates that agree in sign: "mean", "sum" or "max".
        scale: λ, 1 by default.
        shape: of the original weight; unused.

    Cost: O(T m² n + m³) for m × n matrices; the engine calls it with m at most the sum of the ranks.
    """
    U = leading_eigenvectors(gram(*(D.T for D in deltas)), CUT**2)
    X = [U.T @ D.to(torch.float64) for D in deltas]  # S V_iᵀ: (ρ, in)
    return LowRank(U, ties(X, density=density, combine=combine, scale=scale, shape=shape))


METHOD = Method(
    knots,
    "left_core",
    "arXiv 2410.19735",
    ("permutation", "scaling", "left rotation", "gauge", "factored = dense", "rank ≤ Σ r_i"),
    picks=True,
)

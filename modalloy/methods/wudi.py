"""WUDI-Merging: whoever merges, do not interfere (Cheng et al., ICML 2025, arXiv 2503.08099)."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from modalloy.linalg import Basis, gram, inverse, spectral_function
from modalloy.methods.method import ROW_LAWS, Method
from modalloy.methods.parameters import Count, Number, Positive


def wudi(
    deltas: list[Tensor],
    *,
    solver: Literal["exact", "adam"] = "exact",
    iterations: Count = 300,
    lr: Positive = 1e-5,
    scale: Number,
    shape: tuple[int, int],
) -> Tensor:
    """λ X with X minimising Σ ‖(X − D_i) D_iᵀ‖²/‖D_i‖²: no update disturbs what another does to its own inputs.

    The rows of D_i stand for the inputs of task i. The exact minimiser on the row space of the updates is
    X = E C⁺ with C = Σ D_iᵀD_i/‖D_i‖² and E = Σ D_i D_iᵀD_i/‖D_i‖², which solves the weak directions of C as fully as
    the strong ones. The published method stops early instead: Adam from Σ D_i, whose steps have the size of `lr`
    however small the updates are.

    Args:
        deltas: one matrix (out, in) per specialist, scaling folded in; a zero one contributes nothing.
        solver: "exact", or "adam" as published; Adam works on single entries, so it needs and gives full matrices.
        iterations: steps of Adam; the exact solver has none.
        lr: step size of Adam.
        scale: λ, 1 by default.
        shape: of the original weight; unused.

    Cost: exact O(T mn·min(m, n) + n³) for m × n matrices. Adam O(mn²) per iteration (300 for 4096 × 4096: 4e13
    operations, a quarter of an hour on one core) and, in float32, about 4 (T + 22) mn bytes at m = n.
    """
    problem = Interference(sum(deltas[1:], deltas[0]), deltas, deltas, deltas)
    if solver == "adam":
        return scale * problem.adam(iterations, lr, deltas[0].dtype)
    return scale * problem.relax(inverse)


class Interference:
    """The loss L(X) = Σ w_i ‖(X − G_i) P_iᵀ‖² with w_i = 1/‖D_i‖² (0 for D_i = 0), and ways to descend it from X_0.

    ½ ∇L(X_0 + Y) = Y C − F with C = Σ w_i P_iᵀP_i (n, n) and F = Σ w_i (G_i − X_0) P_iᵀP_i (m, n), so a step costs one
    product with C; F is computed from differences, so that where all G_i equal X_0 the answer is X_0 to the last bit.

    Args:
        start: X_0 (m, n).
        targets: G_i (m, n).
        projectors: P_i (any, n).
        deltas: D_i, whose norms weigh the terms.
    """

    def __init__(
        self, start: Tensor, targets: Sequence[Tensor], projectors: Sequence[Tensor], deltas: Sequence[Tensor]
    ) -> None:
        n = start.shape[1]
        self.start = start.to(torch.float64)
        self.force = torch.zeros_like(self.start)
        self.few = 2 * sum(len(P) for P in projectors) < n  # C is then kept as its rows, C = rowsᵀ rows
        self.rows, self.curvature = self.start.new_zeros(0, n), self.start.new_zeros((0, 0) if self.few else (n, n))
        for G, P, D in zip(targets, projectors, deltas, strict=True):
            norm = float(torch.linalg.matrix_norm(D.to(torch.float64)))
            if norm == 0:
                continue
            row, away = P.to(torch.float64) / norm, G - self.start
            if self.few:
                self.rows = torch.cat([self.rows, row])
                self.force += (away @ row.T) @ row
            else:
                own = gram(row)
                self.curvature += own
                self.force += away @ own

    def relax(self, gain: Callable[[Tensor], Tensor]) -> Tensor:
        """X_0 + F V diag(g(λ)) Vᵀ (m, n) of C = V diag(λ) Vᵀ. Each mode goes the share λ g(λ) of its way to the minimum.

        Every linear descent has such a g: 1/λ is the minimiser, (1 − exp(−λt))/λ the gradient flow at time t.
        Where the P_i have few rows, C is decomposed on the space that they span; F lies in it.
        """
        if not self.few:
            return self.start + self.force @ spectral_function(self.curvature, gain)
        basis = Basis(self.rows.T)
        Q = basis.q_in(torch.float64)
        return self.start + (self.force @ Q) @ spectral_function(gram(basis.triangle.T), gain) @ Q.T

    def adam(self, iterations: int, lr: float, dtype: torch.dtype) -> Tensor:
        """X (m, n) after as many steps of Adam (β = 0.9 and 0.999, ε = 1e-8) on L, computed in `dtype`."""
        C, rows, force = (part.to(dtype) for part in (self.curvature, self.rows, self.force))
        Y, mean, square = torch.zeros_like(force), torch.zeros_like(force), torch.zeros_like(force)
        for step in range(1, iterations + 1):
            gradient = 2 * (((Y @ rows.T) @ rows if self.few else Y @ C) - force)
            mean.lerp_(gradient, 1 - 0.9)
            square.mul_(0.999).addcmul_(gradient, gradient, value=1 - 0.999)
            Y.addcdiv_(mean, (square / (1 - 0.999**step)).sqrt_().add_(1e-8), value=-lr / (1 - 0.9**step))
        return self.start.to(dtype) + Y


METHOD = Method(wudi, "core", "arXiv 2503.08099", ROW_LAWS, dense=lambda parameters: parameters.get("solver") == "adam")

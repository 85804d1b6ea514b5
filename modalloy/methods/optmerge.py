"""OptMerge (Wei et al., ICLR 2026, arXiv 2505.19892): WUDI on truncated updates, in the variant for LoRA or for full models."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from modalloy.errors import MethodError
from modalloy.linalg import singular_triples
from modalloy.methods.method import ROW_LAWS, Method
from modalloy.methods.parameters import Count, Number, Positive, Probability
from modalloy.methods.wudi import Interference

LEARNING_RATES = {"lora": 1e-4, "full": 1e-5}  # `lr: auto`, as published


def optmerge(
    deltas: list[Tensor],
    *,
    variant: Literal["lora", "full"] = "lora",
    iterations: Count = 300,
    lr: Positive | Literal["auto"] = "auto",
    momentum: Probability = 0.9,
    scale: Number,
    shape: tuple[int, int],
) -> Tensor:
    """λ X with X after some steps down L(X) = Σ ‖(X − G_i) P_iᵀ‖²/‖D_i‖², where G_i and P_i are truncated to rank k.

    k = ⌊min(out, in)/T⌋ (at least 1), (D)_k is the best rank-k approximation, and the norms are of the whole D_i.
    "lora": G_i = P_i = (D_i)_k, gradient descent with momentum from the mean of the D_i. It is linear, so every mode
    of Σ P_iᵀP_i/‖D_i‖² moves by itself and all iterations are done at once, on cores.
    "full": G_i = D̄ + (D_i − D̄)_k with the mean D̄, P_i = (D_i)_k, Adam from Σ D_i, which needs the full matrices.

    Args:
        deltas: one matrix (out, in) per specialist, scaling folded in; a zero one only counts in T.
        variant: "lora" or "full", after how the specialists were trained.
        iterations: steps of the descent.
        lr: step size; "auto" is 1e-4 for "lora", 1e-5 for "full".
        momentum: of the gradient descent; Adam ("full") has its own.
        scale: λ; by default 1 for "lora", 0.1 for "full".
        shape: of the original weight (out, in).

    Raises:
        MethodError: the gradient descent diverges at this `lr`.

    Cost: lora O(T mn·min(m, n) + n³) for m × n matrices; full as much, and O(mn²) per iteration.
    """
    k = max(1, min(shape) // len(deltas))
    rate = LEARNING_RATES[variant] if lr == "auto" else lr
    total = sum(deltas[1:], deltas[0])
    mean = total / len(deltas)
    truncated, projectors = zip(*(truncate(D, k) for D in deltas), strict=True)
    if variant == "full":
        targets = [mean + truncate(D - mean, k)[0] for D in deltas]
        return scale * Interference(total, targets, projectors, deltas).adam(iterations, rate, deltas[0].dtype)
    return scale * Interference(mean, truncated, projectors, deltas).relax(momentum_gain(iterations, rate, momentum))


def truncate(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(X)_k = U S Vᵀ, the best approximation of rank k, and S Vᵀ (k, in), which weighs rows as (X)_k does."""
    if k >= min(matrix.shape):
        return matrix, matrix
    U, s, V = singular_triples(matrix, k)
    return (U * s) @ V.T, (V * s).T


def momentum_gain(iterations: int, lr: float, momentum: float) -> Callable[[Tensor], Tensor]:
    """g(λ) for `Interference.relax`: gradient descent with momentum, v ← μ v + ∇L, X ← X − η v (torch: no dampening)."""

    def gain(modes: Tensor) -> Tensor:
        largest = float(modes.max()) if len(modes) else 0.0
        if lr * largest >= 1 + momentum:
            raise MethodError(
                f"lr {lr:g} makes the descent diverge (the steepest mode is {largest:.3g}); "
                f"take less than {(1 + momentum) / largest:.3g}"
            )
        g, v = torch.zeros_like(modes), torch.zeros_like(modes)
        for _ in range(iterations):
            v = momentum * v - 2 * (
                1 - modes * g
            )  # the gradient in units of the mode's distance to the minimum, over λ
            g = g - lr * v
        return g

    return gain


METHOD = Method(
    optmerge,
    "core",
    "arXiv 2505.19892",
    ROW_LAWS,
    dense=lambda parameters: parameters.get("variant") == "full",
    scale_when=("variant", "full", 0.1),
)

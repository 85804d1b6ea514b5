"""DO-Merging (Zheng et al., arXiv 2505.15875): LoRAs made orthogonal, then magnitudes and directions merged apart."""

import torch
from torch import Tensor

from modalloy.delta import Delta, LowRank
from modalloy.errors import MethodError
from modalloy.linalg import BLOCK_ROWS, RANK_TOLERANCE, gram, require_finite
from modalloy.methods.method import Method
from modalloy.methods.parameters import Count, Number, Positive


def do_merging(
    deltas: list[Delta],
    *,
    iterations: Count = 100,
    penalty: Positive = 1.0,
    scale: Number,
    shape: tuple[int, int],
) -> LowRank:
    """λ (Σ_i α_i / n) ∘ Σ_i B̂_i Â_i / α_i, with α_i the norms of the columns of B̂_i Â_i, one for every input.

    Â_i = A_i + δ_i and B̂_i likewise are made nearly orthogonal to those of the other specialists, without data and in
    every layer by itself: gradient descent from δ = 0 on Σ_{i≠j} ‖Â_i Â_jᵀ‖² + penalty Σ_i ‖δ_i‖², and on
    Σ_{i≠j} ‖B̂_iᵀ B̂_j‖² + penalty Σ_i ‖δ_i‖². With λ = 1/n, the default, magnitudes and directions are both averaged.

    The paper's text was not at hand as a whole: the steps are those of its abstract and of public accounts of it. Read
    into them: norms are Frobenius norms, squared; orthogonality is that of the r-dimensional sides; all A_i are divided
    by one number before (the root mean square norm of their rows), and the B_i likewise, so that the result does not
    depend on the size of the updates; the step is 1 / (2 penalty + 12 g), g the largest eigenvalue of the stacked
    factors' Gram, with which the loss cannot rise at first. Columns below 1e-6 of an update's largest count as zero.
    The result depends on how an update is factored (B_i G and G⁻¹A_i are the same update), as the paper's does.

    Args:
        deltas: one `LowRank` update per specialist; `up` is B_i with alpha/r folded in, `down` is A_i.
        iterations: steps of the descent.
        penalty: weight of the size of δ; a large one leaves the factors as they are.
        scale: λ, 1/n by default.
        shape: of the original weight; unused.

    Raises:
        MethodError: an update is a full matrix.

    Cost: O((out + in) R² + iterations · R³), R = Σ rank_i.
    """
    factors = [delta for delta in deltas if isinstance(delta, LowRank)]
    if len(factors) < len(deltas):
        raise MethodError(
            "do_merging makes LoRA factors orthogonal, and a full matrix has none; use another method, for example tsv"
        )
    ups = orthogonalized([delta.up.T for delta in factors], iterations, penalty)
    downs = orthogonalized([delta.down for delta in factors], iterations, penalty)
    magnitudes = [_column_norms(up, down) for up, down in zip(ups, downs, strict=True)]
    mean = torch.stack(magnitudes).sum(0) / len(factors)
    turned = []
    for down, own in zip(downs, magnitudes, strict=True):
        counts = own > RANK_TOLERANCE * own.max()
        turned.append(down * torch.where(counts, mean / torch.where(counts, own, 1), 0).to(down.dtype))
    return LowRank(scale * torch.cat(ups).T, torch.cat(turned))


def orthogonalized(factors: list[Tensor], iterations: int, penalty: float) -> list[Tensor]:
    """Factors (r_i, n) after the descent, whose steps are taken on the coefficients of the stacked rows: (R, R), float64."""
    rows, ranks = torch.cat(factors), [len(factor) for factor in factors]
    require_finite(rows)
    G = gram(rows.T)
    size = float(G.trace()) / max(1, int((G.diagonal() > 0).sum()))
    if not size:
        return factors
    G = G / size
    own = torch.block_diag(*(torch.ones(rank, rank) for rank in ranks)).to(G)
    start = torch.eye(len(G)).to(G)
    step = 1 / (2 * penalty + 12 * float(torch.linalg.eigvalsh(G)[-1]))
    K = start.clone()
    for _ in range(iterations):
        overlap = (K @ G @ K.T).mul_(1 - own)
        K = K - step * (4 * overlap @ K + 2 * penalty * (K - start))
    return list((K.to(rows.dtype) @ rows).split(ranks))


def _column_norms(up: Tensor, down: Tensor) -> Tensor:
    """Norms (in,) of the columns of B A, in float64, from Bᵀ (r, out) and A (r, in): O((out + in) r²)."""
    G = gram(up.T)
    wide = (part.to(torch.float64) for part in down.split(BLOCK_ROWS, 1))
    return torch.cat([(part * (G @ part)).sum(0) for part in wide]).clamp(min=0).sqrt()


METHOD = Method(
    do_merging,
    "factors",
    "arXiv 2505.15875",
    ("identity at n=1", "permutation", "scaling", "left rotation", "rank ≤ Σ r_i"),
    mean_scale=True,
)

"""DC-Merge (Zhang et al., CVPR 2026, arXiv 2603.06242): updates of even energy, merged in a space that covers them all."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from modalloy.delta import LowRank
from modalloy.linalg import polar, singular_triples
from modalloy.methods.entries import magnitude_cuts
from modalloy.methods.method import FLAT_LAWS, Method
from modalloy.methods.parameters import Count, Number, Share
from modalloy.methods.ties import elect_and_merge

PUBLISHED_DENSITY = 0.001
ROUNDING = 1e-6  # relative: entries nearer to the cut equal it, as those of orthogonal updates; smaller ones are zero

Smoothing = Literal["mean", "linear", "none"]


def dc_merge(
    deltas: list[Tensor],
    *,
    rank: Count | Literal["auto"] = "auto",
    smoothing: Smoothing = "mean",
    rho: Annotated[float, Field(strict=True, allow_inf_nan=False, ge=1)] = 5.0,
    density: Share | Literal["auto"] = "auto",
    scale: Number,
    shape: tuple[int, int],
) -> LowRank:
    """λ U_⊥ (m ∘ TIES(M_1, …, M_T)) V_⊥ᵀ with M_i = U_⊥ᵀ U_i S_i V_iᵀ V_⊥, the updates in a space that covers them all.

    U_i, V_i are the first k_i singular vectors of D_i; U_⊥, V_⊥ the orthogonal factors of [U_1 … U_T] and of
    [V_1 … V_T] (see tsv); S_i the singular values, smoothed with their sum kept. TIES: every M_i keeps its largest
    entries (and those within 1e-6 of the last; none below 1e-6 of the first), then the mean is taken of those that have
    the sign of their sum. m keeps the T diagonal blocks (k_i, k_i): every update's own.

    From the authors' code. Singular vectors of zero are not taken: k_i ≤ rank D_i. Equal singular values leave
    the vectors, and so the result, undetermined.

    Args:
        deltas: one matrix (out, in) per specialist, scaling folded in.
        rank: k, the most singular triples of one update; "auto" is ⌊min(out, in)/T⌋ (at least 1), which is seldom below
            the rank of a LoRA. The authors take the LoRA's rank, and ⌊min(out, in)/T⌋ of full fine-tunes.
        smoothing: of the singular values: all the "mean", or "linear" from rho (s_1/s_k if that is less) to 1, both
            as the authors merge LoRAs; "none" as they merge full fine-tunes.
        rho: ratio of the first to the last of "linear".
        density: share of the N entries of every M_i that is kept, max(1, round(density · N)); "auto" is the authors'
            0.001, but at least k_i entries: as many as there are directions, which 0.001 is in the authors' merges of
            eight LoRAs of rank 16, and would fall short of in smaller ones.
        scale: λ, 1 by default. The authors choose it from 0.1 to 3 on validation data.
        shape: of the original weight (out, in).

    Cost: O(T mn·min(m, n)) for m × n matrices, and O((Σ k_i)³).
    """
    k = max(1, min(shape) // len(deltas)) if rank == "auto" else rank
    triples = [singular_triples(D, k) for D in deltas]
    U, V = (polar(torch.cat([triple[side] for triple in triples], 1)) for side in (0, 2))
    M = [(U.T @ left * smoothed(s, smoothing, rho)) @ (right.T @ V) for left, s, right in triples]
    cuts = [_cut(core, len(s), density) for core, (_, s, _) in zip(M, triples, strict=True)]
    own = torch.block_diag(*(torch.ones(len(s), len(s)) for _, s, _ in triples)).to(U)
    merged = elect_and_merge(M, cuts, 0, "mean") * own
    return LowRank(scale * U @ merged, V.T)


def _cut(core: Tensor, directions: int, density: float | Literal["auto"]) -> float:
    """What the entries of a core must reach to be kept."""
    share = max(PUBLISHED_DENSITY, directions / max(1, core.numel())) if density == "auto" else density
    cut = (1 - ROUNDING) * magnitude_cuts(lambda: [[core]], share, torch.float64)[0]
    return max(cut, ROUNDING * float(core.abs().max())) if core.numel() else cut


def smoothed(values: Tensor, smoothing: Smoothing, rho: float) -> Tensor:
    """Singular values in descending order, none of them 0, with the same sum and a flatter course."""
    if smoothing == "none" or not len(values):
        return values
    ratio = min(rho, float(values[0] / values[-1])) if smoothing == "linear" else 1.0
    course = torch.linspace(ratio, 1, len(values), dtype=values.dtype, device=values.device)
    return values.sum() * course / course.sum()


METHOD = Method(dc_merge, "core", "arXiv 2603.06242", FLAT_LAWS, picks=True)

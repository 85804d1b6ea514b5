"""Consensus merging with TALL masks (Wang et al., ICML 2024, arXiv 2405.07813)."""

import torch
from torch import Tensor

from modalloy.linalg import row_blocks
from modalloy.methods.method import ENTRY_LAWS, Method
from modalloy.methods.parameters import Count, NotNegative, Number


def consensus(
    deltas: list[Tensor], *, agreement: Count = 2, mask_scale: NotNegative = 0.4, scale: Number, shape: tuple[int, int]
) -> Tensor:
    """λ times the entries of τ = Σ D_i that at least `agreement` specialists need.

    Specialist t needs an entry where |D_t| > λ_t |τ − D_t| (its TALL mask). The paper calls entries that no specialist
    needs catastrophic, and those that a single one needs selfish.

    Args:
        deltas: one matrix (out, in) per specialist, scaling folded in.
        agreement: k, how many specialists must need an entry. 1 removes the catastrophic entries, 2 also the
            selfish ones; more than there are specialists removes everything.
        mask_scale: λ_t; larger values keep less. The paper chooses it per task among 0.2 to 0.6 on validation data;
            without data one value holds for all. An entry that all T updates share survives below 1 / (T − 1) only.
        scale: λ, 1 by default.
        shape: of the original weight; unused.

    Cost: O(T N) for N entries; memory one matrix beside the inputs.
    """
    merged = torch.empty_like(deltas[0])
    for rows in row_blocks(merged.shape):
        D = torch.stack([delta[rows] for delta in deltas])  # (T, rows, in)
        total = D.sum(0)
        needed = D.abs() > mask_scale * (total - D).abs()
        merged[rows] = total * (needed.sum(0) >= agreement)
    return merged.mul_(scale)


METHOD = Method(consensus, "dense", "arXiv 2405.07813", ENTRY_LAWS, rowwise=True)

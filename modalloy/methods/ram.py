"""RAM: reinforced agent merging (arXiv 2601.13572): average the entries that several updates have, keep those of one."""

import torch
from torch import Tensor

from modalloy.linalg import row_blocks
from modalloy.methods.method import Method
from modalloy.methods.parameters import NotNegative, Number

LAWS = ("permutation", "transpose", "gauge", "factored = dense")


def ram(deltas: list[Tensor], *, epsilon: NotNegative = 1e-5, scale: Number, shape: tuple[int, int]) -> Tensor:
    """λ times, at every place, the mean of the entries that are active there: those with |D_i| > epsilon.

    An entry that one update alone has keeps its size, which a mean over all would shrink. Made for reinforcement
    learning, which changes few weights. epsilon is a size, not a share: updates that are smaller all over, as those of a
    LoRA may be, need a smaller one, or nothing is active.

    Args:
        deltas: one matrix (out, in) per specialist, scaling folded in.
        epsilon: what an entry must exceed to be active.
        scale: λ, 1 by default.
        shape: of the original weight; unused.

    Cost: O(T N) time for N entries, one pass; memory one matrix beside the inputs.
    """
    return _merged(deltas, epsilon, [1.0] * len(deltas)).mul_(scale)


def ramplus_tl(
    deltas: list[Tensor],
    *,
    r: NotNegative = 0.1,
    alpha: NotNegative = 0.2,
    epsilon: NotNegative = 1e-5,
    scale: Number,
    shape: tuple[int, int],
) -> Tensor:
    """RAM with the entries of one update alone enlarged, by as much as it shares others: RAM+, counted in every tensor.

    The active entries of update i that no other has are multiplied by 1 + r · min(ρ_i, alpha), where ρ_i is the number
    of its active entries that others have too over the number of those that none has.

    Args:
        deltas: one matrix (out, in) per specialist, scaling folded in.
        r: how much is added for every unit of ρ_i.
        alpha: the most of ρ_i that counts.
        epsilon: what an entry must exceed to be active (see ram).
        scale: λ, 1 by default.
        shape: of the original weight; unused.

    Cost: O(T N) time for N entries, two passes; memory one matrix beside the inputs.
    """
    shared, alone = [0] * len(deltas), [0] * len(deltas)
    for rows in row_blocks(deltas[0].shape):
        active = torch.stack([D[rows].abs() > epsilon for D in deltas])
        count = active.sum(0)
        for index, own in enumerate(active):
            shared[index] += int((own & (count > 1)).sum())
            alone[index] += int((own & (count == 1)).sum())
    factors = [1 + r * min(many / max(1, few), alpha) for many, few in zip(shared, alone, strict=True)]
    return _merged(deltas, epsilon, factors).mul_(scale)


def _merged(deltas: list[Tensor], epsilon: float, factors: list[float]) -> Tensor:
    """The mean of the active entries, times its update's factor where there is one only."""
    merged = torch.empty_like(deltas[0])
    own = torch.tensor(factors, dtype=merged.dtype, device=merged.device)[:, None, None]
    for rows in row_blocks(merged.shape):
        D = torch.stack([delta[rows] for delta in deltas])  # (T, rows, in)
        active = D.abs() > epsilon
        count = active.sum(0)
        D = D * active
        merged[rows] = torch.where(count == 1, (D * own).sum(0), D.sum(0) / count.clamp(min=1))
    return merged


RAM = Method(ram, "dense", "arXiv 2601.13572", LAWS, rowwise=True)

RAMPLUS_TL = Method(ramplus_tl, "dense", "arXiv 2601.13572", LAWS)

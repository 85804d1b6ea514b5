"""What the methods that work on single entries share: blocks of rows, and the exact k-th largest magnitude."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from modalloy.linalg import row_blocks
from modalloy.methods.parameters import Probabilities, Shares, each

DIGIT_BITS = 16


def magnitude_cuts(
    model: Callable[[], Iterable[list[Tensor]]], density: float | Sequence[float], dtype: torch.dtype = torch.float32
) -> list[float]:
    """For every specialist, the magnitude of its max(1, round(density · N))-th largest entry, N entries in all.

    A radix select: magnitudes are ordered as their IEEE 754 bit patterns, so every pass counts the next 16 bits of
    those entries that share the bits found before. Nothing is sorted or copied whole.

    Args:
        model: gives one list of matrices (one per specialist) per weight; called once per pass.
        density: share of the entries that are at least as large as the cut, one or one for each specialist.
        dtype: in which the entries are compared; when a wider matrix turns up, everything is compared in its type.

    Cost: two passes over the entries in float32, four in float64; memory O(2¹⁶) per specialist.
    """
    integer, bits = (torch.int32, 32) if dtype == torch.float32 else (torch.int64, 64)
    found: list[int] = []
    missing: list[int] = []
    for shift in range(bits - DIGIT_BITS, -1, -DIGIT_BITS):
        counts: list[Tensor] = []
        for matrices in model():
            if any(torch.promote_types(matrix.dtype, dtype) != dtype for matrix in matrices):
                return magnitude_cuts(model, density, torch.float64)
            counts = counts or [torch.zeros(1 << DIGIT_BITS, dtype=torch.int64, device=m.device) for m in matrices]
            for index, (matrix, count) in enumerate(zip(matrices, counts, strict=True)):
                for rows in row_blocks(matrix.shape):
                    patterns = matrix[rows].to(dtype).abs().view(integer).flatten()
                    if found:
                        patterns = patterns[(patterns >> (shift + DIGIT_BITS)) == found[index]]
                    count += torch.bincount((patterns >> shift) & ((1 << DIGIT_BITS) - 1), minlength=len(count))
        shares = each(density, len(counts))
        missing = missing or [max(1, round(share * int(n.sum()))) for share, n in zip(shares, counts, strict=True)]
        digits = []
        for index, count in enumerate(counts):
            at_least = count.flip(0).cumsum(0).flip(0)  # entries whose digit is this one or larger
            digit = max(0, int((at_least >= missing[index]).sum()) - 1)
            missing[index] -= int(at_least[digit] - count[digit])
            digits.append(digit)
        found = [high << DIGIT_BITS | digit for high, digit in zip(found or [0] * len(digits), digits, strict=True)]
    return [float(torch.tensor(pattern, dtype=integer).view(dtype)) for pattern in found]


def kept_ranks(n: int, density: Shares, gamma: Probabilities, updates: int) -> list[tuple[int, int]]:
    """Of each update of `n` entries, by magnitude from the largest on: the first entry that stays, and the one after the last.

    The largest round(gamma · n) go, and of the others the largest max(1, round(density · n)) stay; where fewer are left, fewer of
    the largest go.
    """
    found = []
    for share, outliers in zip(each(density, updates), each(gamma, updates), strict=True):
        kept = max(1, round(share * n))
        first = max(0, min(round(outliers * n), n - kept))
        found.append((first, first + kept))
    return found


def norm_factor(before: float, after: float) -> float:
    """What gives entries that are left the L1 norm that there was before; 1 where there is none."""
    return before / after if after else 1.0


def absolute_sum(matrix: Tensor) -> float:
    """The L1 norm of all entries, summed in float64."""
    return sum(float(matrix[rows].abs().sum(dtype=torch.float64)) for rows in row_blocks(matrix.shape))

"""Methods that pick single entries: which of them a tool may have picked, as rounding leaves that open.

A TIES keeps the entries above a cut and elects a sign by a sum. In a type of few digits many magnitudes are equal, and sums
cancel; an entry at the cut may then be kept or dropped, and a sum of nearly 0 have either sign. So what is written is right if
the method gives it of updates that differ from the given ones by no more than a few roundings of the type (its backward error).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modalloy.auditing.weight import Expected, Weight
from modalloy.delta import Delta, LowRank
from modalloy.methods.entries import magnitude_cuts
from modalloy.methods.sce import sce
from modalloy.methods.ties import elect_and_merge

ROUNDINGS = 4.0  # of an update's entry, by which it may be another: of both weights, their difference, and its factor
EACH_OF = 4  # sources up to which every combination of smaller and larger entries is tried
EVERY_OF = 3  # and up to which every choice of those that keep an entry is
ROUNDS = 4
MOST = 0.25  # share of entries beyond rounding up to which it may be the picks
LEAST_DIGITS = torch.float32  # of any tool's arithmetic
Merge = Callable[[Tensor, Sequence[int], float], Expected]  # of updates that are `altered` so
Merging = Callable[[Sequence[Delta], Mapping[str, Any]], Tensor]  # of dense updates, and parameters


@dataclass(frozen=True)
class Trim:
    """That a method keeps entries of every update by the rank of their magnitude, before it merges what is left entry by entry.

    `updates`: (rows, columns) each. `ranks`: of each, the first that stays, counted from the largest on, and the one after the
    last. `merge` gives the change for what stays of some entries of each, (1, entries).
    """

    updates: Sequence[Tensor]
    ranks: Sequence[tuple[int, int]]
    merge: Callable[[list[Tensor]], Tensor]


@dataclass(frozen=True)
class Stated:
    """One change that a recipe allows a weight.

    `merge` gives it for `n` updates that are altered at some entries, of a method that picks single ones, `by` is how much
    rounding may alter them (None: as of any entry). `dtype` is that of the arithmetic, if it is coarser than what is written.
    `by_factors`: it is a sum of updates and base whose factors come from inner products; `whole`: the base is multiplied too.
    `trim` makes it of a method that keeps a number of entries by their magnitude, which few weights need.
    `untold` says why what the method picks cannot be worked out again, `either` is what is there where it picks.
    """

    change: Expected
    merge: Merge | None = None
    n: int = 0
    by: float | None = None
    dtype: torch.dtype | None = None
    by_factors: bool = False
    whole: bool = False
    trim: Callable[[], Trim] | None = None
    untold: str = ""
    either: Expected | None = None


def explained(weight: Weight, stated: Stated) -> bool:
    """Whether updates that differ by rounding alone give every entry of a weight."""
    by = ROUNDINGS * max(unit_of(stated.dtype or weight.dtype), weight.unit) if stated.by is None else stated.by
    if stated.trim is not None and weight.written is not None:  # else an adapter's factors, which are no entries
        return _kept(weight, stated, stated.trim(), by)
    if stated.merge is None:
        return False
    left = weight.beyond(stated.change, stated.dtype)
    if float(left.float().mean()) > MOST:
        return False
    lacking = torch.cat([(weight.change(rows) - stated.change(rows)).sign() for rows in weight.blocks()])
    for _ in range(ROUNDS):  # of many that move, some take others' places: again without those that fit
        before, wish = int(left.sum()), lacking * left
        for signs in _signs(stated.n):
            if bool(left.any()):
                left &= weight.beyond(stated.merge(wish, signs, by), stated.dtype)
        if 2 * int(left.sum()) > before:
            break
    return not bool(left.any())


def _kept(weight: Weight, stated: Stated, trim: Trim, by: float) -> bool:
    """Whether some entries give a weight that a method may keep, as many as it keeps.

    Of entries at a cut any may stay, but their number is given. What is written tells of most whether they stayed; the number of
    each update, and of all, must be between that of those which must have stayed, and of those which may have.
    """
    open_ones, fixed, equal, kept, at_cut = weight.beyond(stated.change, stated.dtype), [], [], [], []
    for update, (first, last) in zip(trim.updates, trim.ranks, strict=True):
        size = update.abs()
        low, high = _magnitude(size, last), _magnitude(size, first + 1) if first else math.inf
        near = [(size >= cut * (1 - 2 * by)) & (size <= cut * (1 + 2 * by)) for cut in (low, high) if cut < math.inf]
        at_cut.append(torch.stack(near).any(0))
        kept.append((size >= low) & (size <= high))
        equal.append(int(kept[-1].sum()))
        kept[-1] &= ~at_cut[-1]
        fixed.append(int(kept[-1].sum()))
        open_ones |= at_cut[-1]
    # all other entries are right whatever stays
    cut, surely = (torch.stack([one[open_ones] for one in each]) for each in (at_cut, kept))
    updates = torch.stack([update[open_ones] for update in trim.updates])
    scale, n = weight.size(stated.change), len(cut)
    others, choices, right = ~cut.any(0), torch.tensor(_choices(n))[:, :, None], []  # choices: (choices, updates, 1)
    for is_in in choices:
        left = updates * (surely | (cut & is_in))
        gives = torch.zeros_like(others)
        for side in (0, 1, -1):  # sums that cancel within rounding may fall to either
            merged = trim.merge([one[None] for one in left * (1 + side * by * updates.sign())])
            gives |= ~weight.beyond_at(open_ones, merged[0], scale, stated.dtype)
        if not bool(gives[others].all()):
            return False
        right.append(gives)
    given = torch.stack(right)  # (choices, entries)
    if not bool(given.any(0).all()):
        return False
    several = (cut.sum(0) > 2) & (n > EVERY_OF)  # at the cut of so many that not every choice was tried
    may_stay, may_go = (cut & ((one & given[:, None]).any(0) | several) for one in (choices, ~choices))
    number = (cut & choices).sum(1)  # of updates that keep an entry at their cut, by choice
    fewest = torch.where(several, 0, number.masked_fill(~given, n).amin(0))
    most = torch.where(several, cut.sum(0), number.masked_fill(~given, 0).amax(0))
    must = [own + int(one.sum()) for own, one in zip(fixed, may_stay & ~may_go, strict=True)]
    may = [own + int(one.sum()) for own, one in zip(fixed, may_stay, strict=True)]
    must.append(sum(fixed) + int(fewest.sum()))
    may.append(sum(fixed) + int(most.sum()))
    exact = [last - first for first, last in trim.ranks]
    for counts in (exact, equal):  # some of those that equal the last stay, or all as here
        if all(low <= count <= high for low, count, high in zip(must, [*counts, sum(counts)], may, strict=True)):
            return True
    return False


def _choices(n: int) -> list[tuple[bool, ...]]:
    """Which of the updates keep an entry: all choices that differ at an entry which is at the cut of at most two of them."""
    both = (True, False)
    if n <= EVERY_OF:
        return list(itertools.product(both, repeat=n))
    alone = (tuple((place == index) == is_in for place in range(n)) for index in range(n) for is_in in both)
    return [*((one,) * n for one in both), *alone]


def _magnitude(sizes: Tensor, rank: int) -> float:
    """The magnitude of this rank, 1 being the largest."""
    return magnitude_cuts(lambda: [[sizes]], rank / sizes.numel())[0]


def possible(weight: Weight, stated: Stated) -> bool:
    """Whether a choice that cannot be worked out again may have given a weight: of every entry the base's or the only source's,
    or, of sums of several, anything but the base."""
    if stated.either is None:
        return not weight.is_base()
    kept = weight.beyond(lambda rows: torch.zeros_like(weight.change(rows)), stated.dtype)
    return not bool((kept & weight.beyond(stated.either, stated.dtype)).any())


def unit_of(dtype: torch.dtype) -> float:
    """The largest relative error of rounding in a type, at least that of float32."""
    return max(torch.finfo(dtype).eps / 2, torch.finfo(LEAST_DIGITS).eps / 2)


def altered(updates: Sequence[Delta], wish: Tensor, signs: Sequence[int], by: float) -> list[Delta]:
    """Updates by a relative change nearer to a wish (1: the merged entry should be more, −1: less), or farther (sign −1)."""
    found: list[Delta] = []
    for update, sign in zip(updates, signs, strict=True):
        dense = update.dense() if isinstance(update, LowRank) else update
        way = wish.reshape(dense.shape).to(dense.dtype) * dense.sign()
        found.append(dense * (1 + sign * by * way))
    return found


def _signs(n: int) -> Iterator[tuple[int, ...]]:
    """Which updates are larger and which smaller: every combination of few; of many all, and each against the others."""
    if n <= EACH_OF:
        yield from itertools.product((1, -1), repeat=n)
        return
    for sign in (1, -1):
        yield (sign,) * n
        for index in range(n):
            yield tuple(-sign if place == index else sign for place in range(n))


def sce_down(updates: Sequence[Delta], parameters: Mapping[str, Any]) -> Tensor:
    """SCE whose places are counted down, as in mergekit."""
    dense, share = _selecting(updates, parameters)
    if not share:
        return torch.zeros_like(dense[0])
    return sce(dense, select_topk=share, scale=parameters["scale"], shape=(len(dense[0]), dense[0].shape[1]))


def sce_alike(updates: Sequence[Delta], parameters: Mapping[str, Any]) -> Tensor:
    """SCE whose sources weigh alike, as in mergekit where the mean squares of all updates sum to less than 1e-6."""
    dense, share = _selecting(updates, parameters)
    stacked = torch.stack(dense)
    if share < 1:
        variance = stacked.var(0, unbiased=False)
        count = round(share * int(variance.count_nonzero()))
        cut = variance.flatten().topk(count).values[-1] if count else torch.inf
        stacked = stacked * (variance >= cut)
    return elect_and_merge(list(stacked), [0.0] * len(stacked), 1, "mean").mul_(parameters["scale"])


def _selecting(updates: Sequence[Delta], parameters: Mapping[str, Any]) -> tuple[list[Tensor], float]:
    """Dense updates, and the share of the places at which they vary that SCE selects, counted down."""
    dense = [one.dense() if isinstance(one, LowRank) else one for one in updates]
    varying = int(torch.stack(dense).var(0, unbiased=False).count_nonzero())
    selected = float(parameters["select_topk"])
    return dense, selected if selected >= 1 or not varying else math.floor(selected * varying) / varying

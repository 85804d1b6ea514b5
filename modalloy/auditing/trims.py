"""A TIES of the updates that nobody told the density of: looked for among those that change as many entries."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from modalloy.auditing.picked import Stated, Trim, explained
from modalloy.auditing.weight import Weight
from modalloy.methods.ties import Combine, ties

IN_VAIN = 3  # weights on which one is looked for without success before it is given up
COMBINES: tuple[Combine, ...] = ("mean", "sum")
MOST_ENTRIES = 1 << 26  # of a weight


class Trims:
    """The densities of a TIES that explained a weight, which are tried on the next first."""

    def __init__(self) -> None:
        self.known: list[tuple[Combine, float]] = []
        self.in_vain = 0  # weights of which none was found since

    def of(self, weight: Weight) -> dict[str, Any] | None:
        """`density`, `combine` and `scale` of a TIES that a weight is, and its `change`; None if it is none."""
        entries, share = weight.n_rows * weight.columns, _changed(weight)
        if not 0 < share < 1 or entries > MOST_ENTRIES:
            return None
        deltas = [weight.dense(label) for label in weight.terms]
        change = torch.cat([weight.change(rows) for rows in weight.blocks()])
        for combine, density, count in self._candidates(deltas, share):
            exact = count(density * entries) / entries
            merged = _merge(combine, exact)(deltas)
            both = (merged != 0) & (change != 0)
            if not bool(both.any()):
                continue
            # a fit by squares would follow the few that are wrong
            scale = float((change[both] / merged[both]).median())
            ranks = [(0, max(1, int(count(density * entries))))] * len(deltas)
            trim = partial(Trim, deltas, ranks, _merge(combine, 1.0, scale))
            stated = Stated((scale * merged).__getitem__, trim=trim)
            if weight.test(stated.change).holds or explained(weight, stated):
                if (combine, density) not in self.known:
                    self.known.append((combine, density))
                    self.in_vain = 0
                return {"density": density, "combine": combine, "scale": scale, "change": stated.change}
        return None

    def _candidates(
        self, deltas: list[Tensor], share: float
    ) -> Iterator[tuple[Combine, float, Callable[[float], float]]]:
        """Those that explained another weight, then what the share of changed entries tells, of few weights if it is in vain.

        Tools count entries to the nearest number, or down.
        """
        counts: tuple[Callable[[float], float], ...] = (round, math.floor)
        yield from ((combine, density, count) for combine, density in self.known for count in counts)
        if self.in_vain < IN_VAIN:
            self.in_vain += 1
            yield from itertools.product(COMBINES, _densities(deltas, share), counts)


def _merge(combine: Combine, density: float, scale: float = 1.0) -> Callable[[list[Tensor]], Tensor]:
    """A TIES of updates, in float64."""
    return lambda updates: scale * ties(updates, density=density, combine=combine, scale=1.0, shape=(0, 0)).double()


def _changed(weight: Weight) -> float:
    """Share of the entries that are not the base's."""
    count = sum(int((weight.change(rows) != 0).sum()) for rows in weight.blocks())
    return count / max(1, weight.n_rows * weight.columns)


def _densities(deltas: list[Tensor], share: float) -> list[float]:
    """Densities at which a TIES changes about this share of the entries: round ones first."""
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        merged = _merge("mean", middle)(deltas)
        low, high = (middle, high) if float((merged != 0).float().mean()) < share else (low, middle)
    near = (low + high) / 2
    return [one for one in dict.fromkeys((round(near, 2), round(near, 3), near)) if 0 < one <= 1]

"""What a search found: candidates compared with each other, which of them is chosen, how stable that is, and what it cost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from modalloy.search.objective import Aggregate, Health, Point, Table, choose, grouped, spearman, stability, totals
from modalloy.search.space import Axis, Changes
from modalloy.search.trials import SCHEMA

STEADY = 0.5  # share of bootstrap samples with the same choice, below which the page warns
TELLING = 0.25  # share of probes that tell candidates apart, likewise


@dataclass
class Sweep:
    """Candidates that were compared with each other: the values of one axis, or points of a grid."""

    axes: list[Axis]
    candidates: list[Changes]
    points: list[Point]
    loss: Table
    default: Point | None
    duplicates: dict[str, Any] = field(default_factory=dict)  # value → the value whose merge is the same
    steps: list[float] | None = None
    health: list[Health] = field(default_factory=list)
    disqualified: list[str] = field(default_factory=list)
    accuracy: list[float] | None = None
    groups: list[str] = field(default_factory=list)  # of the probes
    aggregate: Aggregate = "probes"
    sizes: list[float] = field(default_factory=list)  # about ‖ΔW‖: how far each candidate is from the base

    def __post_init__(self) -> None:
        self.disqualified = self.disqualified or [""] * len(self.candidates)
        self.loss[[bool(reason) for reason in self.disqualified]] = np.nan
        self.losses: list[float] = totals(self.loss, self.groups, self.aggregate)[0].tolist()

    @cached_property
    def chosen(self) -> int | None:
        """Index of the candidate of choice, None where none can be chosen."""
        return None if np.isnan(self.losses).all() else self._choose(self.losses)[0]

    def _choose(self, losses: Sequence[float]) -> tuple[int, list[int]]:
        return choose(self.points, losses, self.default)

    @cached_property
    def stability(self) -> list[float]:
        """Share of bootstrap samples in which each candidate is chosen."""
        if self.chosen is None:
            return [0.0] * len(self.candidates)
        return stability(self.loss, self.groups, self.aggregate, lambda losses: self._choose(losses)[0])

    @property
    def home(self) -> int | None:
        """Index of the recipe's own candidate, None where it is not among them."""
        return None if self.default is None else self.points.index(self.default)

    @property
    def alone(self) -> dict[str, int]:
        """Which candidate the probes of each combination of senses would choose by themselves."""
        if self.chosen is None:
            return {}
        tables = {name: self.loss[:, own].mean(1).tolist() for name, own in grouped(self.groups).items()}
        return {name: self._choose(losses)[0] for name, losses in tables.items()}

    def warnings(self) -> list[str]:
        """What is worth a look, in words."""
        names, found = " × ".join(axis.name for axis in self.axes), []
        for index, reason in enumerate(self.disqualified):
            if reason:
                found.append(f"{_shown(self.candidates[index], self.axes)} is out: {reason}")
        if self.chosen is None:
            return [*found, f"{names}: no candidate can be chosen; the recipe's own value is kept"]
        can = [loss for loss in self.losses if not math.isnan(loss)]
        if len(can) > 1 and max(can) - min(can) < 1e-9:
            found.append(f"{names}: all candidates are alike to these probes; the choice is by the rule for ties")
        elif self.stability[self.chosen] < STEADY:
            found.append(f"{names}: only {self.stability[self.chosen]:.0%} of bootstrap samples choose the same")
        telling = int((np.ptp(self.loss[~np.isnan(self.losses)], axis=0) > 0).sum())
        if 0 < telling < TELLING * self.loss.shape[1]:
            found.append(
                f"{names}: only {telling} of {self.loss.shape[1]} probes tell the candidates apart; ask harder ones"
            )
        for number, axis in enumerate(self.axes):
            places = [
                point[number] for point, loss in zip(self.points, self.losses, strict=True) if not math.isnan(loss)
            ]
            end = {min(places): "lowest", max(places): "highest"}.get(self.points[self.chosen][number])
            if axis.ordered and end is not None and self.points[self.chosen] != self.default:
                value = self.candidates[self.chosen][axis.name]
                found.append(f"{axis.name} = {value:g} is the {end} that could be chosen; the best may lie beyond it")
        return found

    def proxy(self) -> dict[str, float | None] | None:
        """Does the objective know what is right? Against accuracy, where every probe has a gold answer."""
        if self.accuracy is None or self.chosen is None:
            return None
        able = [index for index, loss in enumerate(self.losses) if not math.isnan(loss)]
        right = self.accuracy[self.chosen]
        return {
            "spearman": spearman([-self.losses[i] for i in able], [self.accuracy[i] for i in able]),
            "accuracy": right,
            "regret_to_oracle": max(self.accuracy) - right,
            "gain_over_default": None if self.home is None else right - self.accuracy[self.home],
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything, for `search.json`."""
        rows = []
        for index, candidate in enumerate(self.candidates):
            loss = self.losses[index]
            row: dict[str, Any] = {"candidate": candidate, "loss": None if math.isnan(loss) else loss}
            if not math.isnan(loss):
                found = grouped(self.groups)
                row["loss_by_senses"] = {name: float(self.loss[index, own].mean()) for name, own in found.items()}
            row |= {"chosen_in_bootstrap": self.stability[index], "disqualified": self.disqualified[index] or None}
            row |= {"distance_from_base": self.sizes[index]}
            row |= {"health": self.health[index].to_dict()} if self.health else {}
            row |= {"accuracy": self.accuracy[index]} if self.accuracy is not None else {}
            rows.append(row)
        ties = [] if self.chosen is None else self._choose(self.losses)[1]
        return {
            "axes": [axis.name for axis in self.axes],
            "ordered": all(axis.ordered for axis in self.axes),
            "rows": rows,
            "chosen": self.chosen,
            "default": self.home,
            "ties": ties,
            "chosen_by_senses": self.alone,
            "duplicates": self.duplicates,
            "steps": self.steps,
            "proxy": self.proxy(),
        }


@dataclass(frozen=True)
class Found:
    """What a search found, in the folder `out`: the chosen changes of the recipe, the comparisons, what it cost."""

    out: Path
    chosen: Changes
    default: Changes
    sweeps: list[Sweep]
    settled: bool  # whether another pass over the axes would find the same
    settings: dict[str, Any]
    cost: dict[str, Any]

    @property
    def warnings(self) -> list[str]:
        """What is worth a look, in words."""
        found = [warning for sweep in self.sweeps for warning in sweep.warnings()]
        if left := self.settings.get("left_out"):
            found.append(
                f"{left} of {self.settings['probes']} probes were not asked: no specialist answers them, as they show no sense or "
                "several, or it says nothing"
            )
        return (
            found
            if self.settled
            else [*found, "the last pass over the axes still changed the choice: it depends on where the search began"]
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, for `search.json` and `--json`."""
        return {
            "schema": SCHEMA,
            **self.settings,
            "chosen": self.chosen,
            "default": self.default,
            "settled": self.settled,
            "sweeps": [sweep.to_dict() for sweep in self.sweeps],
            "warnings": self.warnings,
            "cost": self.cost,
        }


def _shown(changes: Changes, axes: list[Axis]) -> str:
    return ", ".join(f"{axis.name} = {changes[axis.name]}" for axis in axes)

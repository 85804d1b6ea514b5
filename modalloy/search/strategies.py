"""Which candidates are tried: all combinations, one axis after the other, or those that a sampler proposes."""

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from modalloy.errors import ModalloyError, RecipeError, shown
from modalloy.search.comparing import Compare
from modalloy.search.found import Sweep
from modalloy.search.objective import (
    Point,
)
from modalloy.search.space import Axis, Changes, start

if TYPE_CHECKING:
    from modalloy.search.settings import Settings

STRATEGIES = ("auto", "grid", "coordinate", "tpe", "random")
PASSES = 2  # over the axes, coordinate by coordinate


def by_coordinate(compare: Compare, axes: list[Axis]) -> tuple[Changes, list[Sweep], bool]:
    """One axis after the other, the others held, until nothing changes or PASSES are over; and whether nothing did."""
    current = start(compare.asking.planned, axes)
    sweeps: dict[str, Sweep] = {}
    for _ in range(PASSES):
        before = dict(current)
        compare.asking.expected += sum(len(axis.values) for axis in axes) * len(compare.asking.probes)
        for axis in axes:
            sweeps[axis.name] = compare.axis(axis, {n: v for n, v in current.items() if n != axis.name})
            if (index := sweeps[axis.name].chosen) is not None:
                current[axis.name] = sweeps[axis.name].candidates[index][axis.name]
        if current == before:
            break
    return current, list(sweeps.values()), current == before


def whole(compare: Compare, axes: list[Axis], strategy: str, trials: int) -> tuple[Changes, Sweep]:
    """All combinations, or those that a sampler of Optuna tries."""
    asking = compare.asking
    if len(axes) == 1 and strategy == "grid":
        asking.expected = len(axes[0].values) * len(asking.probes)
        sweep = compare.axis(axes[0], {})
    else:
        points: list[Point] = list(itertools.product(*(range(len(axis.values)) for axis in axes)))
        asking.expected = len(points) * len(asking.probes)
        if strategy != "grid":
            asking.expected = min(trials, len(points)) * len(asking.probes)
            points = _sampled(lambda point: compare.loss(compare.at(axes, point)), axes, strategy, trials)
        sweep = compare.points(axes, points)
    chosen = start(asking.planned, axes) if sweep.chosen is None else sweep.candidates[sweep.chosen]
    return chosen, sweep


def _sampled(loss: Callable[[Point], float], axes: list[Axis], strategy: str, trials: int) -> list[Point]:
    """The points that a sampler of Optuna tries, sorted; its seed is 0."""
    optuna = require_optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    samplers = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
    study = optuna.create_study(sampler=samplers[strategy](seed=0))
    tried: dict[Point, float] = {}
    for _ in range(trials):
        trial = study.ask()
        point = tuple(trial.suggest_int(axis.name, 0, len(axis.values) - 1) for axis in axes)
        if point not in tried:
            tried[point] = loss(point)
        study.tell(trial, tried[point])
    return sorted(tried)


def require_optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ModalloyError(
            "--strategy tpe and random need Optuna, which is not installed; run `pip install 'modalloy[search]'`, or use "
            "--strategy coordinate"
        ) from error
    return optuna


def chosen_strategy(settings: "Settings", axes: list[Axis]) -> str:
    """The strategy that is meant; refused where the objective cannot follow it."""
    strategy = ("grid" if len(axes) == 1 else "coordinate") if settings.strategy == "auto" else settings.strategy
    if strategy in ("tpe", "random"):
        require_optuna()
        if settings.aggregate != "probes":
            raise ModalloyError(
                f"--aggregate {settings.aggregate}: compares a candidate with all others, and --strategy {strategy} sees one at a "
                "time; use --strategy grid or coordinate"
            )
    if settings.objective != "consistency":
        return strategy
    if strategy in ("tpe", "random") or (strategy == "grid" and len(axes) > 1):
        raise ModalloyError(
            f"--strategy {strategy}: consistency compares neighbours along one axis; use --strategy coordinate, or another "
            "objective"
        )
    least = 2 if settings.variant == "one-sided" else 3
    for axis in axes:
        if not axis.ordered:
            raise RecipeError(
                f"--vary {axis.name}: consistency compares neighbouring values, and {shown(axis.values[0])} is no number; use "
                "another --objective"
            )
        if len(axis.values) < least:
            raise RecipeError(
                f"--vary {axis.name}: consistency needs at least {least} values, for the ends lack a neighbour; give more"
            )
    return strategy

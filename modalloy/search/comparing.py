"""Tables of losses of candidates: how their answers differ, how many are right, how near they are to the specialists'."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import numpy as np

from modalloy.errors import ModalloyError
from modalloy.evals.ask import NO_TOKENS
from modalloy.evals.benchmark import LETTERS, Answer, Sample
from modalloy.evals.scores import golds_are_options
from modalloy.evals.scoring import normalized_match, parse_letter
from modalloy.model.chat import Tokens
from modalloy.search.asking import Asking, Line
from modalloy.search.candidates import distance
from modalloy.search.embedding import Embedder
from modalloy.search.expected import Expected
from modalloy.search.found import Sweep
from modalloy.search.objective import (
    Health,
    Point,
    Table,
    Variant,
    compared,
    degenerate,
    grouped,
    health,
    inconsistency,
    log_shares,
    scripts,
)
from modalloy.search.space import Axis, Changes, start

if TYPE_CHECKING:
    from modalloy.search.settings import Settings

Objective = Literal["consistency", "labels", "agreement", "kl", "option_agreement"]
OBJECTIVES = get_args(Objective)
DEFAULT: Objective = "kl"  # of merges of specialists; into a target consistency is the only one without labels
OF_SPECIALISTS = ("agreement", "kl", "option_agreement")  # ask each about its own sense
SAME = 1e-4  # relative distance below which two merges are one
FACTORS = ("alpha", "scale")  # of the whole update: their steps are known, and would be blurred by tensors of few bits
ALIKE = 0.01  # steps between neighbours that differ by less count as even


class Compare:
    """Makes tables of losses of candidates."""

    def __init__(self, asking: Asking, settings: "Settings", embedder: Embedder | None) -> None:
        self.asking, self.settings, self.embedder = asking, settings, embedder
        self.expected = Expected(asking)

    def axis(self, axis: Axis, others: Changes) -> Sweep:
        """The values of one axis, the others held. Of merges that are the same, the lowest value stands for all."""
        home = start(self.asking.planned, [axis])[axis.name]
        kept: list[Any] = []
        sketches: list[list[float]] = []
        duplicates: dict[str, Any] = {}
        for value in axis.values:
            changes = others | {axis.name: value}
            sketch = self.asking.sketch(changes)
            if axis.ordered and sketches and _is_same(sketch, sketches[-1]):
                duplicates[json.dumps(value)] = kept[-1]
                home = kept[-1] if value == home else home
                continue
            kept.append(value)
            sketches.append(sketch)
            self._lines(changes)
        default = (kept.index(home),) if home in kept else None
        steps: list[float] = []
        if self.settings.objective == "consistency" and axis.name in FACTORS:
            steps = [high - low for low, high in itertools.pairwise(kept)]
        elif self.settings.objective == "consistency":
            steps = [distance(*pair) for pair in itertools.pairwise(sketches)]
        uneven = len(steps) > 1 and max(steps) - min(steps) > ALIKE * max(steps)
        candidates = [others | {axis.name: value} for value in kept]
        return self._sweep(
            [axis], candidates, [(index,) for index in range(len(kept))], default, duplicates, steps if uneven else None
        )

    def points(self, axes: list[Axis], points: list[Point]) -> Sweep:
        """Points of the grid that the axes span."""
        home = start(self.asking.planned, axes)
        places = [axis.values.index(home[axis.name]) if home[axis.name] in axis.values else -1 for axis in axes]
        default = tuple(places) if tuple(places) in points else None
        return self._sweep(axes, [self.at(axes, point) for point in points], points, default, {}, None)

    def at(self, axes: list[Axis], point: Point) -> Changes:
        """The candidate at a point."""
        return {axis.name: axis.values[place] for axis, place in zip(axes, point, strict=True)}

    def loss(self, changes: Changes) -> float:
        """Mean loss of one candidate by itself."""
        return float(np.mean(self._losses([self._lines(changes)], None)))

    @property
    def left_out(self) -> int:
        """How many probes no candidate is asked, as no specialist answers them."""
        return len(self.asking.probes) - len(self._asked)

    @property
    def _tells_right(self) -> bool:
        """Whether what candidates are asked says if they are right."""
        if self.settings.objective == "kl":
            return all(probe.choices for probe in self._asked)
        return self.settings.objective != "agreement" and not self._predicts

    def _lines(self, changes: Changes) -> list[Line]:
        return self.asking.ask(changes, self._asked, self._tokens)

    @property
    def _predicts(self) -> bool:
        return self.settings.objective == "consistency" and self.settings.match == "top1"

    @cached_property
    def _asked(self) -> list[Sample]:
        """The probes as they are put to a candidate."""
        probes = self.asking.probes
        if self._predicts:
            own = self.asking.ask(self.asking.home, probes)
            return [replace(probe, options=(line["text"],)) for probe, line in zip(probes, own, strict=True)]
        if self.settings.objective == "consistency":
            return probes
        if self.settings.objective == "labels":
            return [replace(probe, options=probe.choices) for probe in probes]
        if self.settings.objective in ("kl", "option_agreement"):
            return self.expected.asked
        said = {key: line["text"] for key, line in self.asking.parents.items() if line["text"]}
        if not said:
            raise ModalloyError("the specialists answer none of the probes of one sense with a word; ask them others")
        return [replace(probe, options=(said[probe.id],)) for probe in probes if probe.id in said]

    @property
    def _tokens(self) -> Mapping[str, Tokens]:
        """The tokens that candidates are asked for at every place of a probe's option, by its id."""
        if self._predicts:
            return {probe.id: 1 for probe in self._asked}
        return self.expected.tokens if self.settings.objective == "kl" else NO_TOKENS

    def _losses(self, lines: list[list[Line]], steps: list[float] | None) -> Table:
        asked = self._asked
        if self.settings.objective == "consistency":
            pairs = itertools.pairwise(lines)
            changed = [[self._difference(*one) for one in zip(asked, *pair, strict=True)] for pair in pairs]
            return inconsistency(
                np.reshape(changed, (len(lines) - 1, len(asked))), cast(Variant, self.settings.variant), steps
            )
        if self.settings.objective == "labels":
            score = gold_share if self.settings.variant == "probability" else is_right
            return np.array([[1.0 - score(p, line) for line, p in zip(own, asked, strict=True)] for own in lines])
        if self.settings.objective == "kl":
            return np.array([self.expected.divergences(own) for own in lines])
        if self.settings.objective == "option_agreement":
            weighted = self.settings.variant == "weighted"
            return np.array([self.expected.disagreements(own, weighted=weighted) for own in lines])
        sizes = [self.asking.parents[probe.id]["n_out"] for probe in asked]
        return np.array([[-line["likelihoods"][0] / n for line, n in zip(own, sizes, strict=True)] for own in lines])

    def _difference(self, probe: Sample, one: Line, other: Line) -> float:
        """How much two answers to a probe differ."""
        if self._predicts:
            return float(np.mean(np.not_equal(one["predicted"], other["predicted"])))
        if self.embedder is not None:
            return self.embedder.difference(one["text"], other["text"])
        return float(
            compared(one["text"], probe, self.settings.match) != compared(other["text"], probe, self.settings.match)
        )

    def _sweep(
        self,
        axes: list[Axis],
        candidates: list[Changes],
        points: list[Point],
        default: Point | None,
        duplicates: dict[str, Any],
        steps: list[float] | None,
    ) -> Sweep:
        lines, asked = [self._lines(changes) for changes in candidates], self._asked
        states: list[Health] = []
        out: list[str] = []
        accuracy = None
        if self.settings.objective not in OF_SPECIALISTS and not self._predicts:
            said = self.asking.parents if self.settings.objective == "consistency" else {}
            texts = [text for probe in asked for text in (probe.text, *probe.choices)]
            known = scripts([*texts, *(line["text"] for line in said.values())])
            limit = self.settings.max_new_tokens
            by_parent = grouped([line["model"] for line in said.values()])
            spoken = [[list(said.values())[index] for index in own] for own in by_parent.values()]
            states = [_health(own, asked, limit, known) for own in lines]
            out = degenerate(states, [_health(own, asked, limit, known) for own in spoken])
        if self._tells_right and all(probe.golds for probe in asked):
            right = [[is_right(p, line) for line, p in zip(own, asked, strict=True)] for own in lines]
            accuracy = [sum(own) / len(own) for own in right]
        sketches = [self.asking.sketch(changes) for changes in candidates]
        return Sweep(
            axes,
            candidates,
            points,
            self._losses(lines, steps),
            default,
            duplicates,
            steps,
            health=states,
            disqualified=out,
            accuracy=accuracy,
            groups=[probe.group["senses"] for probe in asked],
            aggregate=self.settings.aggregate,
            sizes=[distance(sketch, [0.0] * len(sketch)) for sketch in sketches],
        )


def is_right(probe: Sample, line: Line) -> bool:
    """Whether an answer is a gold one: by its likeliest option, the option that its text names, or its words."""
    if not probe.choices:
        return normalized_match(probe, Answer(line["text"])).correct
    letter = _predicted(probe, line)
    return letter is not None and is_gold(probe, letter)


def gold_share(probe: Sample, line: Line) -> float:
    """The probability of the gold options among all, from the likelihoods of each."""
    shares = np.exp(log_shares(line["likelihoods"])[0])
    return float(sum(share for letter, share in zip(LETTERS, shares, strict=False) if is_gold(probe, letter)))


def is_gold(probe: Sample, letter: str) -> bool:
    """Whether the option of a letter is a gold one, by its text or its letter."""
    named = probe.choices[LETTERS.index(letter)]
    return named in probe.golds or (letter in probe.golds and not golds_are_options(probe))


def _predicted(probe: Sample, line: Line) -> str | None:
    """The letter of the option that an answer means."""
    if not line["likelihoods"]:
        return parse_letter(line["text"], probe.choices)
    return LETTERS[max(range(len(line["likelihoods"])), key=lambda index: (line["likelihoods"][index], -index))]


def _health(lines: list[Line], asked: Sequence[Sample], limit: int, known: set[str]) -> Health:
    choices = {probe.id: probe for probe in asked}
    texts = []
    for line in lines:
        letter = _predicted(choices[line["probe"]], line) if line["likelihoods"] else None
        texts.append(line["text"] if letter is None else choices[line["probe"]].choices[LETTERS.index(letter)])
    return health(texts, [line["n_out"] >= limit for line in lines], known)


def _is_same(a: list[float], b: list[float]) -> bool:
    zero = [0.0] * len(a)
    return distance(a, b) <= SAME * max(distance(a, zero), distance(b, zero))

"""What makes one candidate better than another, as tables of losses (candidates × probes), and which one is chosen.

Lower is better, and NaN means that a candidate cannot be chosen. No model is needed here.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from modalloy.evals.benchmark import Sample
from modalloy.evals.scoring import is_repetitive, parse_letter, vqa_normalize

Variant = Literal["sum", "union", "one-sided"]
VARIANTS: dict[str, tuple[str, ...]] = {  # by objective, the first where none is named
    "consistency": get_args(Variant),
    "labels": ("accuracy", "probability"),
    "option_agreement": ("share", "weighted"),
}
Match = Literal["normalised", "exact", "embedding", "top1"]
Aggregate = Literal["probes", "senses", "minimax"]
Table = NDArray[np.float64]  # (candidates, probes)
Point = tuple[int, ...]  # place of a candidate on the axes
SLACK = 0.2  # share of answers by which a candidate may be worse than the best rate of parents and candidates
COLLAPSED = 0.8  # share of one same answer from which a candidate has collapsed
RESAMPLES = 1000
TIE = 1e-9


def compared(text: str, sample: Sample, match: Match) -> str:
    """What of an answer must be the same: "exact" the whole of it in lower case, as AdaMMS' code does; "normalised" the
    option that it names where there are some, else the words as the VQA challenge compares them."""
    if match == "exact":
        return text.lower()
    letter = parse_letter(text, sample.choices) if sample.choices else None
    return f"option {letter}" if letter is not None else vqa_normalize(text)


def inconsistency(changed: Table, variant: Variant, steps: Sequence[float] | None = None) -> Table:
    """How much every candidate's answers (candidates in order, probes) differ from its neighbours' (AdaMMS 3.3).

    - sum (Algorithm 1): the difference to both neighbours; of answers that are the same or not, 0, 1 or 2
    - union (appendix B): the larger of the two; 1 if either answer is another one
    - one-sided (the published Qwen script): the difference to the candidate before

    The ends cannot be chosen: they lack a neighbour.

    Args:
        changed: (candidates − 1, probes), how much the answers of neighbours differ: 0 or 1, or anything between.
        steps: distances of neighbours, where they are not alike: a change counts the less the further apart they are, in
            units of the mean.
    """
    n = len(changed) + 1
    loss = np.full((n, changed.shape[1]), np.nan)
    if n < (2 if variant == "one-sided" else 3):
        return loss
    weights = np.ones(n - 1) if steps is None else np.asarray(steps, dtype=np.float64) / np.mean(steps)
    per_step = changed / weights[:, None]
    if variant == "one-sided":
        loss[1:] = per_step
    elif variant == "sum":
        loss[1:-1] = per_step[:-1] + per_step[1:]
    else:
        loss[1:-1] = np.maximum(changed[:-1], changed[1:]) / ((weights[:-1] + weights[1:]) / 2)[:, None]
    return loss


def log_shares(nats: Sequence[float], places: int = 1) -> Table:
    """Log-probabilities (places, n) of what may stand at each place, from log-likelihoods in nats: all of a place's sum to 1."""
    table = np.reshape(np.asarray(nats, dtype=np.float64), (places, -1))
    return np.asarray(table - np.logaddexp.reduce(table, axis=1, keepdims=True))


def divergence(specialist: Table, merged: Table) -> float:
    """KL(specialist || merged) in nats from log-probabilities (places, n) of both, its mean over the places."""
    gaps = np.subtract(specialist, merged, out=np.zeros_like(specialist), where=specialist > -np.inf)
    return max(0.0, float((np.exp(specialist) * gaps).sum(1).mean()))  # below 0 by rounding only


def totals(loss: Table, groups: Sequence[str], aggregate: Aggregate, resamples: int = 0) -> Table:
    """Loss of every candidate over all probes (1, candidates), or over bootstrap samples of them (resamples, candidates).

    - probes: the mean over all of them
    - senses: of every group of probes the mean, divided by its mean over the candidates that can be chosen, so that a
      group whose answers change easily, or that is large, does not decide alone; then the mean over the groups
    - minimax: the same, and the largest of the groups in place of their mean

    Samples are drawn within a group, where groups count. A group in which no candidate loses anything is 0 for all.
    """
    everything = list(range(loss.shape[1]))
    generator = np.random.default_rng(0)
    means = []
    for own in [everything] if aggregate == "probes" else grouped(groups).values():
        even = np.full(len(own), 1 / len(own))
        counts = generator.multinomial(len(own), even, resamples) if resamples else np.ones((1, len(own)))
        means.append(counts @ loss[:, own].T / len(own))
    found = np.stack(means)  # (groups, samples, candidates)
    if aggregate == "probes":
        return found[0]
    able = ~np.isnan(found)
    level = np.nansum(found, 2, keepdims=True) / np.maximum(able.sum(2, keepdims=True), 1)
    found = found / np.where(level > 0, level, 1)
    return found.mean(0) if aggregate == "senses" else found.max(0)


def choose(points: Sequence[Point], losses: Sequence[float], default: Point | None = None) -> tuple[int, list[int]]:
    """Index of the candidate of least loss, and of all that tie for it.

    Of ties the default is taken; else the middle of the largest plateau (ties that neighbour each other), of two middles
    the one nearer to the default, then the first.

    Raises:
        ValueError: all losses are NaN.
    """
    values = np.asarray(losses, dtype=np.float64)
    if np.isnan(values).all():
        raise ValueError("no candidate can be chosen")
    ties = [int(index) for index in np.flatnonzero(values <= np.nanmin(values) + TIE)]
    for index in ties:
        if points[index] == default:
            return index, ties
    plateaus = _plateaus({points[index]: index for index in ties})
    widest = max(map(len, plateaus))
    ranked = []
    for plateau in plateaus:
        centre = np.mean(list(plateau), axis=0)
        for point, index in plateau.items():
            off = float(np.abs(np.array(point) - centre).sum())
            far = 0.0 if default is None else float(np.abs(np.array(point) - np.array(default)).sum())
            ranked.append((-len(plateau) + widest, round(off, 9), far, index))
    return min(ranked)[-1], ties


def _plateaus(places: dict[Point, int]) -> list[dict[Point, int]]:
    """Places that lie side by side, put together."""
    left, found = dict(places), []
    while left:
        first = next(iter(left))
        plateau, edge = {first: left.pop(first)}, [first]
        while edge:
            point = edge.pop()
            for axis in range(len(point)):
                for step in (-1, 1):
                    beside = (*point[:axis], point[axis] + step, *point[axis + 1 :])
                    if beside in left:
                        plateau[beside] = left.pop(beside)
                        edge.append(beside)
        found.append(plateau)
    return found


def stability(
    loss: Table, groups: Sequence[str], aggregate: Aggregate, choice: Callable[[Sequence[float]], int]
) -> list[float]:
    """Share of bootstrap samples of the probes in which each candidate is chosen."""
    chosen = Counter(choice(losses) for losses in totals(loss, groups, aggregate, RESAMPLES).tolist())
    return [chosen[index] / RESAMPLES for index in range(len(loss))]


@dataclass(frozen=True)
class Health:
    """Shares of a model's answers that are no answers, or not such as were to be expected."""

    empty: float
    cut: float  # as long as they may be
    repetitive: float
    same: float  # share of the most frequent answer
    foreign: float  # share of the letters

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def health(texts: Sequence[str], at_limit: Sequence[bool], scripts: Collection[str]) -> Health:
    """What share of the answers is empty, was cut at the length limit, repeats itself, or is one and the same, and what share
    of their letters is of none of the `scripts`."""
    n = len(texts)
    letters = Counter(script for text in texts for script in _scripts(text))
    return Health(
        empty=sum(not re.search(r"\w", text) for text in texts) / n,
        cut=sum(at_limit) / n,
        repetitive=sum(map(is_repetitive, texts)) / n,
        same=max(Counter(text.lower() for text in texts).values()) / n,
        foreign=sum(count for script, count in letters.items() if script not in scripts) / max(1, letters.total()),
    )


def scripts(texts: Iterable[str]) -> set[str]:
    """The scripts that texts are written in: LATIN, CYRILLIC, CJK, …"""
    return {script for text in texts for script in _scripts(text)}


def _scripts(text: str) -> list[str]:
    """The script of every letter, as Unicode's name of it begins."""
    return [unicodedata.name(letter, "?").split()[0] for letter in text if letter.isalpha()]


REASONS = {
    "empty": "of its answers are empty",
    "cut": "of its answers are over-long",
    "repetitive": "of its answers are repetitive",
    "same": "of its answers are the same",
    "foreign": "of its letters are of a script that neither the questions nor the specialists use",
}


def degenerate(candidates: Sequence[Health], parents: Sequence[Health] = ()) -> list[str]:
    """Why each candidate is not to be chosen, "" if it may be.

    A rate is too high if it is `SLACK` above the lowest of all candidates and parents (so that a long-winded base
    disqualifies nobody), and for one same answer at least COLLAPSED.
    """
    found = []
    for one in candidates:
        reasons = []
        for name, words in REASONS.items():
            rate = getattr(one, name)
            least = min(getattr(other, name) for other in (*candidates, *parents))
            if rate > max(least + SLACK, COLLAPSED if name == "same" else 0.0):
                reasons.append(f"{rate:.0%} {words}")
        found.append("; ".join(reasons))
    return found


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Rank correlation, ties at their mean rank; None where one side does not vary."""
    x, y = _ranks(a), _ranks(b)
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


def grouped(values: Sequence[Hashable]) -> dict[Any, list[int]]:
    """Value → the places where it stands."""
    groups: dict[Any, list[int]] = {}
    for index, value in enumerate(values):
        groups.setdefault(value, []).append(index)
    return groups

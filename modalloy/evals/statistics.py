"""Is a difference real? An exact paired test, and bootstrap intervals that know which answers depend on each other."""

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p of the exact McNemar test: what chance gives if either of two runs is as likely to be the right one.

    `only_a`, `only_b`: questions that only one of them answered rightly; those where both or neither did tell nothing.
    """
    n, term, total = only_a + only_b, 1, 0
    for index in range(min(only_a, only_b) + 1):  # term = n over index
        total += term
        term = term * (n - index) // (index + 1)
    return min(1.0, 2 * total / 2**n)


def holm(ps: Sequence[float]) -> list[float]:
    """The p of several tests, each raised for there being several (S. Holm, 1979)."""
    result, largest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda index: ps[index])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        result[index] = largest
    return result


def bootstrap_interval(
    values: Sequence[float], clusters: Sequence[tuple[str, ...]], *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of `values` (one a question).

    `clusters` names what each depends on, from coarse to fine: the coarsest clusters are drawn with replacement, within
    each the finer ones, and so on; values of one finest cluster stay together, those without a cluster stand alone.
    Give differences between two runs on the same questions for a paired interval.
    """
    depth = max([1, *map(len, clusters)])
    paths: list[tuple[Hashable, ...]] = []
    for index, cluster in enumerate(clusters):
        named: tuple[Hashable, ...] = cluster or (index,)
        paths.append((*named, *[""] * (depth - len(named))))
    rows = list(zip(paths, map(float, values), strict=True))
    totals = _drawn(rows, 0, np.ones(resamples, dtype=np.int64), np.random.default_rng(seed))
    low, high = np.quantile(totals[:, 0] / totals[:, 1], [0.025, 0.975])
    return float(low), float(high)


def _drawn(
    rows: list[tuple[tuple[Hashable, ...], float]], level: int, times: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Sum and number of the values drawn, (resamples, 2), where resample i draws from all the clusters `times[i]` times.

    Drawing n clusters k times over is one multinomial draw of k·n. Alike finest clusters are drawn as one.
    """
    groups: dict[Hashable, list[tuple[tuple[Hashable, ...], float]]] = {}
    for row in rows:
        groups.setdefault(row[0][level], []).append(row)
    n = len(groups)
    if level == len(rows[0][0]) - 1:
        alike = Counter((sum(value for _, value in group), len(group)) for group in groups.values())
        counts = rng.multinomial(times * n, [number / n for number in alike.values()])
        return counts @ np.array(list(alike), dtype=np.float64)
    counts = rng.multinomial(times * n, [1 / n] * n)
    totals = np.zeros((len(times), 2))
    for column, group in zip(counts.T, groups.values(), strict=True):
        totals += _drawn(group, level + 1, column, rng)
    return totals

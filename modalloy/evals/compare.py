"""Is one run really better than another? Paired tests on the questions that both were asked."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from modalloy.errors import ModalloyError
from modalloy.evals.benchmark import Sample, by_group
from modalloy.evals.log import Entry, Run
from modalloy.evals.statistics import bootstrap_interval, holm, mcnemar

LEVEL = 0.05


@dataclass(frozen=True)
class Paired:
    """Two runs on the same questions, by one rule. Differences are B − A, as shares of the questions."""

    n: int
    n_clusters: int | None  # of the coarsest kind; None: questions count as independent
    acc_a: float
    acc_b: float
    difference: float
    ci95: tuple[float, float]  # paired bootstrap of the difference, of clusters where there are any; (-1, 1) of one
    only_a: int  # questions that only A answered rightly
    only_b: int
    p: float  # exact McNemar test
    p_adjusted: float  # raised (Holm) for the number of groups that are tested beside it

    @property
    def real(self) -> bool:
        """Whether both say so: the test, and the interval, which alone knows of clusters."""
        return self.p_adjusted < LEVEL and not self.ci95[0] <= 0 <= self.ci95[1]

    @property
    def verdict(self) -> str:
        """One sentence that says whether the difference is real."""
        low, high = self.ci95
        p = f"McNemar {_p(self.p)}" + (f", {_p(self.p_adjusted)} adjusted" if self.p_adjusted != self.p else "")
        if not self.only_a + self.only_b:
            return "cannot be told apart: each question is answered rightly by both or by neither"
        if not self.real:
            return (
                f"cannot be told apart: B − A is {points(self.difference)} points "
                f"(95 % {points(low)} to {points(high)}; {p}; {self.only_b} questions against {self.only_a})"
            )
        winner, wins, losses = (
            ("B", self.only_b, self.only_a) if self.difference > 0 else ("A", self.only_a, self.only_b)
        )
        low, high = (low, high) if self.difference > 0 else (-high, -low)
        return (
            f"{winner} is better by {100 * abs(self.difference):.1f} points "
            f"(95 % {100 * low:.1f} to {100 * high:.1f}; {p}; {wins} questions against {losses})"
        )


@dataclass(frozen=True)
class Comparison:
    """Run B against run A."""

    task: str
    a: str  # folder
    b: str
    n: int  # questions that both were asked
    left_out: tuple[int, int]  # questions of A, and of B, that the other was not asked
    unanswered: tuple[int, int]  # of the n, those that A, and B, could not be asked; they count as wrong
    modalities: tuple[Any, Any]  # shown to A, and to B
    rules: dict[str, Paired]
    groups: dict[str, dict[str, dict[str, Paired]]]  # rule → key → value

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON has it, each pair with its sentence."""

        def pair(one: Paired) -> dict[str, Any]:
            return asdict(one) | {"ci95": list(one.ci95), "real": one.real, "verdict": one.verdict}

        return {
            "task": self.task,
            "a": self.a,
            "b": self.b,
            "n": self.n,
            "left_out": list(self.left_out),
            "unanswered": list(self.unanswered),
            "modalities": list(self.modalities),
            "protocol": {
                rule: pair(whole)
                | {
                    "groups": {
                        key: {value: pair(one) for value, one in values.items()}
                        for key, values in self.groups[rule].items()
                    }
                }
                for rule, whole in self.rules.items()
            },
        }


def compare(a: Run, b: Run, *, resamples: int = 2000, seed: int = 0) -> Comparison:
    """What B does better or worse than A on the questions that both were asked, by every rule and group.

    Questions are paired by place and id. A difference counts as real where the exact McNemar test gives p < 0.05, for
    groups after Holm's correction for the number of groups of their key, and the 95 % bootstrap interval leaves out 0.

    Raises:
        ModalloyError: the runs are of different tasks or data, or have no question in common.
    """
    for what in ("task", "variant", "data"):
        if a.meta[what] != b.meta[what]:
            found = f": {a.meta[what]} and {b.meta[what]}" if what != "data" else ", by the hashes of their files"
            raise ModalloyError(f"{a.folder} and {b.folder}: are of different {what}{found}; compare runs of the same")
    asked_of_b = {(entry.index, entry.sample.id): entry for entry in b.entries}
    pairs = [
        (entry, asked_of_b[entry.index, entry.sample.id])
        for entry in a.entries
        if (entry.index, entry.sample.id) in asked_of_b
    ]
    if not pairs:
        raise ModalloyError(f"{a.folder} and {b.folder}: were asked no question in common; compare runs of the same")
    samples = [entry.sample for entry, _ in pairs]
    rules, groups = {}, {}
    for rule in a.benchmark.rules:
        right_a = _right(a, rule, [entry for entry, _ in pairs])
        right_b = _right(b, rule, [entry for _, entry in pairs])

        def paired(indices: Sequence[int], right_a: list[bool] = right_a, right_b: list[bool] = right_b) -> Paired:
            return _paired(
                [samples[i] for i in indices],
                [right_a[i] for i in indices],
                [right_b[i] for i in indices],
                resamples,
                seed,
            )

        rules[rule] = paired(range(len(pairs)))
        keys: dict[str, dict[str, Paired]] = {}
        for (key, value), indices in by_group(samples).items():
            keys.setdefault(key, {})[value] = paired(indices)
        groups[rule] = {key: _adjusted(values) for key, values in keys.items()}
    return Comparison(
        task=a.meta["task"],
        a=str(a.folder),
        b=str(b.folder),
        n=len(pairs),
        left_out=(len(a.entries) - len(pairs), len(b.entries) - len(pairs)),
        unanswered=(sum(x.status != "ok" for x, _ in pairs), sum(y.status != "ok" for _, y in pairs)),
        modalities=(a.meta["modalities"], b.meta["modalities"]),
        rules=rules,
        groups=groups,
    )


def _right(run: Run, rule: str, entries: list[Entry]) -> list[bool]:
    return [verdict.correct for verdict in replace(run, entries=entries).verdicts(rule)]


def _paired(samples: list[Sample], right_a: list[bool], right_b: list[bool], resamples: int, seed: int) -> Paired:
    n = len(samples)
    clusters = [sample.cluster for sample in samples]
    only_a = sum(x and not y for x, y in zip(right_a, right_b, strict=True))
    only_b = sum(y and not x for x, y in zip(right_a, right_b, strict=True))
    differences = [float(y) - float(x) for x, y in zip(right_a, right_b, strict=True)]
    n_clusters = len({cluster[:1] for cluster in clusters}) if any(clusters) else None
    interval = (-1.0, 1.0)  # how much one cluster differs from another cannot be seen in one
    if n_clusters != 1:
        interval = bootstrap_interval(differences, clusters, resamples=resamples, seed=seed)
    p = mcnemar(only_a, only_b)
    return Paired(
        n=n,
        n_clusters=n_clusters,
        acc_a=sum(right_a) / n,
        acc_b=sum(right_b) / n,
        difference=(only_b - only_a) / n,
        ci95=interval,
        only_a=only_a,
        only_b=only_b,
        p=p,
        p_adjusted=p,
    )


def _adjusted(values: dict[str, Paired]) -> dict[str, Paired]:
    ps = holm([one.p for one in values.values()])
    return {value: replace(one, p_adjusted=p) for (value, one), p in zip(values.items(), ps, strict=True)}


def points(share: float) -> str:
    """A difference of shares in percentage points: "+2.1", "−0.4"."""
    return f"{100 * share:+.1f}".replace("-", "−")


def _p(p: float) -> str:
    return f"p = {p:.3f}" if p >= 0.001 else "p < 0.001"

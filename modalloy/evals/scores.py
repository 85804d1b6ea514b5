"""Scores of a run by every rule, with intervals, groups, and what blind answers would get."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from modalloy.evals.benchmark import LETTERS, Sample, Verdict, by_group, wilson
from modalloy.evals.log import SCHEMA, STATUSES, Run, prompts_sha256
from modalloy.evals.statistics import bootstrap_interval


def result(run: Run) -> dict[str, Any]:
    """Scores of a run by every rule, with intervals, groups, and what blind answers would get.

    Accuracy counts every sample, also those without an answer (as wrong), such as those whose media could not be read;
    `acc_scored` leaves these out.
    """
    samples = [entry.sample for entry in run.entries]
    statuses = Counter(entry.status for entry in run.entries)
    seconds = sum(entry.seconds for entry in run.entries)
    protocols = {name: _scores(run, name) for name in run.benchmark.rules}
    headline = next(iter(protocols.values()))
    return {
        "schema": SCHEMA,
        **{key: run.meta[key] for key in ("task", "variant", "modalities")},
        "protocol": protocols,
        "n": len(samples),
        "n_all": run.meta["n_samples"],
        "n_ids": len({sample.id for sample in samples}),
        "n_media": len({medium for sample in samples for medium in sample.media}),
        "n_scored": statuses["ok"],
        "n_unparsed": headline["n_unparsed"],
        **{f"n_{status}": statuses[status] for status in STATUSES[1:]},
        "acc": headline["acc"],
        "ci95": headline["ci95"],
        "ci95_clustered": headline["ci95_clustered"],
        "groups": headline["groups"],
        "baselines": baselines(samples),
        "generation": run.meta["generation"],
        "prompt_sha256": prompts_sha256(run.entries),
        **{key: run.meta[key] for key in ("data", "model", "environment")},
        "time": {"seconds": round(seconds, 1), "seconds_per_sample": round(seconds / len(samples), 4)},
    }


def _scores(run: Run, rule: str) -> dict[str, Any]:
    verdicts = run.verdicts(rule)
    ok = [index for index, entry in enumerate(run.entries) if entry.status == "ok"]
    n, correct = len(verdicts), sum(verdict.correct for verdict in verdicts)
    groups: dict[str, dict[str, Any]] = {}
    for (key, value), indices in by_group(entry.sample for entry in run.entries).items():
        right = sum(verdicts[index].correct for index in indices)
        groups.setdefault(key, {})[value] = {
            "n": len(indices),
            "acc": right / len(indices),
            "ci95": list(wilson(right, len(indices))),
            "ci95_clustered": _clustered([run.entries[i].sample for i in indices], [verdicts[i] for i in indices]),
        }
    return {
        "acc": correct / n,
        "acc_scored": correct / len(ok) if ok else None,
        "correct": correct,
        "ci95": list(wilson(correct, n)),
        "ci95_clustered": _clustered([entry.sample for entry in run.entries], verdicts),
        "n_unparsed": sum(verdicts[index].prediction is None for index in ok),
        "groups": groups,
    }


def _clustered(samples: Sequence[Sample], verdicts: Sequence[Verdict]) -> list[float] | None:
    """Bootstrap interval that draws whole clusters; None without clusters, or where they cannot tell: one, or all alike."""
    clusters = [sample.cluster for sample in samples]
    values = [float(verdict.correct) for verdict in verdicts]
    if not any(clusters) or len({cluster[:1] for cluster in clusters}) == 1 or len(set(values)) == 1:
        return None
    return list(bootstrap_interval(values, clusters))


def baselines(samples: Sequence[Sample]) -> dict[str, float | None]:
    """Accuracy of blind answers: the most frequent gold (of all, and of each kind of question), the first option, chance.

    None where a baseline does not exist, as chance does where any answer may be given.
    """
    n = len(samples)
    closed = [sample for sample in samples if sample.choices]
    kinds: dict[str, Counter[tuple[str, ...]]] = {}
    for sample in samples:
        kinds.setdefault(sample.kind, Counter())[sample.golds] += 1
    return {
        "majority": max(Counter(sample.golds for sample in samples).values()) / n,
        "majority_by_kind": sum(max(golds.values()) for golds in kinds.values()) / n if len(kinds) > 1 else None,
        "first_option": sum(_is_first(sample) for sample in samples) / n if len(closed) == n else None,
        "chance": sum(_chance(sample) for sample in samples) / n if len(closed) == n else None,
    }


def _is_first(sample: Sample) -> bool:
    return sample.choices[0] in sample.golds or (LETTERS[0] in sample.golds and not golds_are_options(sample))


def _chance(sample: Sample) -> float:
    if golds_are_options(sample):
        return sum(choice in sample.golds for choice in sample.choices) / len(sample.choices)
    return len(sample.golds) / len(sample.choices)


def golds_are_options(sample: Sample) -> bool:
    """Whether a sample's golds are texts of options, not letters."""
    return any(gold in sample.choices for gold in sample.golds)

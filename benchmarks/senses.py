"""Does merging work? The `senses` benchmark: specialists, their merges by every method, and reference models.

    python benchmarks/senses.py --data DIR [--rows NAME …] [--ablations]

Every row is a run of `modalloy eval` in build/senses/ (a stopped one goes on where it was), so `modalloy eval-compare` and
the page work on them. Tables are made of what the runs hold. Intervals are 95 % bootstraps that resample concepts and,
within them, files; those of differences are paired.

Named in advance: the primary contrasts are SSAM against averaging, TIES and task arithmetic over all questions about media,
by accuracy; all others are exploratory and corrected by Holm's method. The secondary measure is the probability that a model
gives the right option among those offered. Prints Markdown for people and one JSON document as its last line.

NaiveMC and the joint model need specialists that examples/specialists/single_path.py trains; without them their rows are
left out, and the table says so.
"""

import argparse
import functools
import gc
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measuring import machine, table

from modalloy import builtin, merge
from modalloy.evals import find_benchmark
from modalloy.evals.ask import evaluate, identify
from modalloy.evals.benchmark import Source, by_group
from modalloy.evals.features import FeatureCache
from modalloy.evals.log import Entry, Run, load_run
from modalloy.evals.scores import baselines
from modalloy.evals.senses import SIZES
from modalloy.evals.statistics import bootstrap_interval, holm, mcnemar
from modalloy.model import load_model
from modalloy.recipe import Output, Recipe, SpecialistEntry

BATCH = 8
REFERENCES = Path("build/references")
LEVEL = 0.05


@dataclass(frozen=True)
class Row:
    """One model of a table: a folder or built-in name, or a merge of the four specialists that is made first."""

    name: str
    method: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    model: str | None = None  # instead of a merge
    specialists: str = builtin.PREFIX  # what the modality's name is put behind
    shows: tuple[str, ...] | None = None  # None: every medium

    @property
    def slug(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.name).strip("-").lower()


SPECIALISTS = [Row(f"{m} specialist", model=str(builtin.specialist(m)), shows=(m,)) for m in builtin.specialists()]
OURS = Row("SSAM", "ssam")
PRIMARY = [
    Row("average (= DAMC)", "average"),
    Row("TIES", "ties"),
    Row("task arithmetic", "task_arithmetic"),
]
MERGES = [
    OURS,
    *PRIMARY,
    Row("TSV", "tsv"),
    Row("WUDI", "wudi"),
    Row("OptMerge", "optmerge"),
    Row("KnOTS", "knots"),
    Row("Core Space", "core_space"),
    Row("Iso-C", "iso_c"),
    Row("SSAM, norms matched", "ssam", {"match": "norm"}),
    Row("no text update (λ = 0)", "ssam", {"scale": 0.0}),
    Row("NaiveMC", "average", specialists=f"{REFERENCES}/same/"),
    Row("joint training", "average", specialists=f"{REFERENCES}/joint/"),
]
BASE = Row("base", model=builtin.BASE, shows=())
ABLATIONS = [
    OURS,
    *(Row(f"k = {k}", "ssam", {"rank": k}) for k in (1, 2, 4, 16, 32)),
    *(Row(f"λ = {scale:g}", "ssam", {"scale": scale}) for scale in (0.1, 0.5, 0.75, 1.0)),
    Row("balance: updates", "ssam", {"balance": "updates"}),
    Row("average (= DAMC)", "average"),
    Row("task arithmetic", "task_arithmetic"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by `make data`")
    parser.add_argument("--out", type=Path, default=Path("build/senses-runs"), help="folder of runs and merged models")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these rows, in this order")
    parser.add_argument("--ablations", action="store_true", help="k, λ and variants on validation questions instead")
    args = parser.parse_args()
    rows = ABLATIONS if args.ablations else [BASE, *SPECIALISTS, *MERGES]
    if args.rows:
        named = {row.name: row for row in rows}
        rows = [named[name] for name in args.rows]
    variant, cache = "validation" if args.ablations else "test", FeatureCache(args.out / "features")
    runs = {row.name: run for row in rows if (run := asked(row, args.data, args.out, variant, cache)) is not None}
    document = {"machine": machine(), "variant": variant, **measured(runs)}
    for part in (accuracies(document), contrasts(document), kinds(document)):
        print(part + "\n")
    print(json.dumps(document, allow_nan=False))


def measured(runs: dict[str, Run]) -> dict[str, Any]:
    """All figures of all tables: by row, cell and kind, and the paired differences of SSAM and every other merge."""
    right = {name: rights(run) for name, run in runs.items()}
    asked_in_all = max(runs.values(), key=lambda run: len(run.entries))
    cells = {}
    for (key, cell), places in by_group(entry.sample for entry in asked_in_all.entries).items():
        if key == "cell":
            samples = [asked_in_all.entries[place].sample for place in places]
            media = len({medium for sample in samples for medium in sample.media})
            blind = {name: value for name, value in baselines(samples).items() if value is not None}
            cells[cell] = {"n": len(samples), "media": media, "blind": max(blind.values())}
    return {
        "cells": cells,
        "rows": {name: {"cell": grouped(run, "cell"), "kind": grouped(run, "kind")} for name, run in runs.items()},
        "ssam_minus": differences(runs, right),
        "seconds": {name: round(sum(entry.seconds for entry in run.entries)) for name, run in runs.items()},
    }


def rights(run: Run) -> list[bool]:
    """Whether each question was answered rightly."""
    return [verdict.correct for verdict in run.verdicts("likelihood")]


def probability(entry: Entry) -> float:
    """What a model gives the right option, of what it gives all that are offered."""
    if entry.status != "ok":
        return 0.0
    top = max(entry.answer.likelihoods)
    weights = [math.exp(nats - top) for nats in entry.answer.likelihoods]
    gold = entry.sample.choices.index(entry.sample.golds[0])
    return weights[gold] / sum(weights)


def grouped(run: Run, key: str) -> dict[str, Any]:
    """Accuracy with its clustered interval, and the mean probability of the right option, by cell or kind of question."""
    right, found = rights(run), {}
    for (name, value), places in by_group(entry.sample for entry in run.entries).items():
        if name != key:
            continue
        values = [float(right[place]) for place in places]
        found[value] = {
            "n": len(places),
            "accuracy": sum(values) / len(values),
            "ci95": bootstrap_interval(values, [run.entries[place].sample.cluster for place in places]),
            "probability": sum(probability(run.entries[place]) for place in places) / len(places),
        }
    return found


def differences(runs: dict[str, Run], right: dict[str, list[bool]]) -> dict[str, Any]:
    """SSAM minus every other merge on the same questions about media: paired clustered intervals, McNemar, Holm."""
    if OURS.name not in runs:
        return {}
    ours, found = runs[OURS.name], {}
    about_media = [place for place, entry in enumerate(ours.entries) if entry.sample.media]
    clusters = [ours.entries[place].sample.cluster for place in about_media]
    for name, run in runs.items():
        if run is ours or run.meta["modalities"] is not None:
            continue
        a, b = right[OURS.name], right[name]
        accuracy = [float(a[place]) - float(b[place]) for place in about_media]
        sure = [probability(ours.entries[place]) - probability(run.entries[place]) for place in about_media]
        figures: dict[str, Any] = {
            "n": len(about_media),
            "difference": sum(accuracy) / len(accuracy),
            "ci95": bootstrap_interval(accuracy, clusters),
            "p": mcnemar(sum(x < 0 for x in accuracy), sum(x > 0 for x in accuracy)),
            "probability": sum(sure) / len(sure),
            "probability_ci95": bootstrap_interval(sure, clusters),
            "primary": name in {row.name for row in PRIMARY},
        }
        found[name] = figures
    for primary in (True, False):
        group = [one for one in found.values() if one["primary"] == primary]
        for one, p in zip(group, holm([one["p"] for one in group]), strict=True):
            one["p_holm"] = p
            one["real"] = p < LEVEL and not one["ci95"][0] <= 0 <= one["ci95"][1]
    return found


def accuracies(document: dict[str, Any]) -> str:
    """Accuracy by model and cell, with what a blind answer gets."""
    cells = [cell for cell in (*SIZES, "text") if cell in document["cells"]]
    rows = [
        [label, *(f"{document['cells'][cell][key]:.3g}" for cell in cells)]
        for label, key in (("questions", "n"), ("distinct media", "media"), ("best blind answer", "blind"))
    ]
    for name, found in document["rows"].items():
        rows.append([name, *(_share(found["cell"].get(cell)) for cell in cells)])
    return table(["", *cells], rows)


def contrasts(document: dict[str, Any]) -> str:
    """SSAM minus every other merge over all questions about media, in points; * where interval and test both say so."""
    rows = []
    for name, one in sorted(document["ssam_minus"].items(), key=lambda item: not item[1]["primary"]):
        rows.append(
            [
                name,
                "primary" if one["primary"] else "",
                f"{_points(one['difference'], one['ci95'])}{'*' if one['real'] else ''}",
                f"{one['p_holm']:.3f}",
                _points(one["probability"], one["probability_ci95"]),
            ]
        )
    return table(["SSAM minus", "", "accuracy", "p (Holm)", "probability of the right option"], rows)


def kinds(document: dict[str, Any]) -> str:
    """Accuracy by kind of question."""
    names = list(document["rows"])
    values = dict.fromkeys(kind for found in document["rows"].values() for kind in found["kind"])
    rows = []
    for kind in values:
        shown = [document["rows"][name]["kind"].get(kind) for name in names]
        rows.append([kind, *("–" if one is None else f"{one['accuracy']:.2f}" for one in shown)])
    return table(["", *names], rows)


def _share(one: dict[str, Any] | None) -> str:
    return "–" if one is None else f"{one['accuracy']:.3f} ({one['ci95'][0]:.2f}–{one['ci95'][1]:.2f})"


def _points(value: float, interval: tuple[float, float]) -> str:
    return f"{100 * value:+.1f} ({100 * interval[0]:+.1f} to {100 * interval[1]:+.1f})"


def asked(row: Row, data: Path, out: Path, variant: str, cache: FeatureCache) -> Run | None:
    """The run of a row, finished if it was not; None where its specialists have not been trained."""
    folder = out / f"{variant}-{row.slug}"
    if (folder / "done").is_file():
        return load_run(folder)
    model = row.model or merged(row, out)
    if model is None:
        print(f"{row.name}: left out; {row.specialists} holds no specialists", file=sys.stderr)
        return None
    source = Source(data, variant=variant, modalities=row.shows)
    load: Callable[[], Any] = functools.partial(load_model, model)
    start = time.perf_counter()

    def report(done: int, total: int) -> None:
        if done % 40 < 8 or done == total:
            print(f"{row.name}: {done}/{total}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)

    identity, benchmark = identify(model), find_benchmark("senses")
    run = evaluate(
        load, identity, benchmark, source, folder, resume=True, batch_size=BATCH, cache=cache, on_sample=report
    )
    (folder / "done").touch()
    if row.model is None:
        shutil.rmtree(model)
    gc.collect()
    return run


def merged(row: Row, out: Path) -> str | None:
    """Folder of the merge that a row asks for."""
    places = {m: f"{row.specialists}{m}" for m in builtin.specialists()}
    if not row.specialists.startswith(builtin.PREFIX):
        places = {m: str(Path(place).resolve()) for m, place in places.items()}
        if not all(Path(place).is_dir() for place in places.values()):
            return None
    recipe = Recipe(
        base_model=builtin.BASE,
        merge_method=row.method or "",
        parameters=row.parameters,
        models=tuple(SpecialistEntry(model=place, modality=m) for m, place in places.items()),
        output=Output(form="omni", dtype="float32"),
    )
    folder = out / f"model-{row.slug}"
    merge(recipe, folder, overwrite=True)
    return str(folder)


if __name__ == "__main__":
    main()

"""Does merging work? The `senses` benchmark: specialists, their merges by every method, and reference models.

    python benchmarks/senses.py --data DIR [--rows NAME …] [--ablations]

Every row is a run of `modalloy eval` in build/senses/ (a stopped one goes on where it was), so `modalloy eval-compare` and
the page work on them. Tables are made of what the runs hold. Intervals are 95 % bootstraps that resample concepts and,
within them, files; those of differences are paired. Prints Markdown for people and one JSON document as its last line.

NaiveMC and the joint model need specialists that examples/specialists/single_path.py trains; without them their rows are
left out, and the table says so.
"""

import argparse
import functools
import gc
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measuring import table

from modalloy import builtin, merge
from modalloy.evals import find_benchmark
from modalloy.evals.ask import evaluate, identify
from modalloy.evals.benchmark import Sample, Source
from modalloy.evals.compare import Comparison, Paired, compare
from modalloy.evals.features import FeatureCache
from modalloy.evals.log import Run, load_run
from modalloy.evals.scores import baselines, result
from modalloy.evals.senses import CELLS
from modalloy.model import load_model
from modalloy.recipe import Output, Recipe, SpecialistEntry

BATCH = 8
REFERENCES = Path("build/references")


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
MERGES = [
    OURS,
    Row("average (= DAMC)", "average"),
    Row("task arithmetic", "task_arithmetic"),
    Row("TSV", "tsv"),
    Row("TIES", "ties"),
    Row("WUDI", "wudi"),
    Row("OptMerge", "optmerge"),
    Row("KnOTS", "knots"),
    Row("Core Space", "core_space"),
    Row("Iso-C", "iso_c"),
    Row("no text update (λ = 0)", "ssam", {"scale": 0.0}),
    Row("NaiveMC", "average", specialists=f"{REFERENCES}/same/"),
    Row("joint training", "average", specialists=f"{REFERENCES}/joint/"),
]
BASE = Row("base", model=builtin.BASE, shows=())
ABLATIONS = [
    Row("SSAM (k = 8, λ = 1/4)", "ssam"),
    *(Row(f"k = {k}", "ssam", {"rank": k}) for k in (1, 2, 4, 16, 32)),
    *(Row(f"λ = {scale:g}", "ssam", {"scale": scale}) for scale in (0.1, 0.5, 0.75, 1.0)),
    Row("k by energy 0.9", "ssam", {"rank": {"energy": 0.9}}),
    Row("balance: subspace", "ssam", {"balance": "subspace"}),
    Row("balance: updates", "ssam", {"balance": "updates"}),
    Row("match: norm", "ssam", {"match": "norm"}),
    Row("average", "average"),
    Row("task arithmetic", "task_arithmetic"),
]
# The best of the ablations, by all validation questions; asked the test's once.
CHOSEN = [Row("SSAM, λ = 0.1 (chosen on validation)", "ssam", {"scale": 0.1})]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by `make data`")
    parser.add_argument("--out", type=Path, default=Path("build/senses"), help="folder of the runs and merged models")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these rows, in this order")
    parser.add_argument("--ablations", action="store_true", help="k, λ and variants on validation questions instead")
    args = parser.parse_args()
    rows = ABLATIONS if args.ablations else [BASE, *SPECIALISTS, *MERGES, *CHOSEN]
    if args.rows:
        named = {row.name: row for row in rows}
        rows = [named[name] for name in args.rows]
    variant, cache = "validation" if args.ablations else "test", FeatureCache(args.out / "features")
    runs = {row.name: run for row in rows if (run := asked(row, args.data, args.out, variant, cache)) is not None}
    results = {name: result(run) for name, run in runs.items()}
    ours = next((run for name, run in runs.items() if name.startswith(OURS.name)), None)
    merges = [name for name, run in runs.items() if run.meta["modalities"] is None and run is not ours]
    compared = {} if ours is None else {name: compare(runs[name], ours) for name in merges}
    print_accuracies(runs, results)
    print_differences(compared)
    print_groups(results, "tier")
    print_groups(results, "kind")
    accuracies = {name: found["groups"]["cell"] for name, found in results.items()}
    differences = {name: _differences(found) for name, found in compared.items()}
    print(json.dumps({"variant": variant, "accuracy": accuracies, "ssam_minus": differences}))


def cells_of(results: dict[str, dict[str, Any]]) -> list[str]:
    """The cells that were asked, one sense first, text last."""
    there = {cell for found in results.values() for cell in found["groups"]["cell"]}
    return [cell for cell in ("+".join(shown) for shown in CELLS) if cell in there] + ["text"] * ("text" in there)


def print_accuracies(runs: dict[str, Run], results: dict[str, dict[str, Any]]) -> None:
    """Accuracy by model and cell with its clustered interval, and the means over cells of one and of several senses."""
    cells = cells_of(results)
    asked_by_cell: dict[str, list[Sample]] = {}
    for cell in cells:
        runs_of_cell = [run for name, run in runs.items() if cell in results[name]["groups"]["cell"]]
        whole = max(runs_of_cell, key=lambda run: len(run.entries))
        asked_by_cell[cell] = [e.sample for e in whole.entries if e.sample.group["cell"] == cell]
    blind = {cell: baselines(asked) for cell, asked in asked_by_cell.items()}
    rows = [
        ["questions", *(str(len(asked)) for asked in asked_by_cell.values()), "", ""],
        [
            "distinct media",
            *(str(len({m for s in asked for m in s.media})) for asked in asked_by_cell.values()),
            "",
            "",
        ],
        ["chance", *(f"{found['chance']:.2f}" for found in blind.values()), "", ""],
        ["majority", *(f"{_majority(found):.2f}" for found in blind.values()), "", ""],
    ]
    for name, found in results.items():
        groups = found["groups"]["cell"]
        means = []
        for several in (False, True):
            wanted = [cell for cell in cells if cell != "text" and ("+" in cell) == several]
            have = [groups[cell]["acc"] for cell in wanted if cell in groups]
            means.append(f"{sum(have) / len(have):.3f}" if len(have) == len(wanted) else "–")
        rows.append([name, *(_share(groups.get(cell)) for cell in cells), *means])
    print(table(["", *cells, "mean of one sense", "mean of several"], rows) + "\n")


def print_differences(compared: dict[str, Comparison]) -> None:
    """SSAM minus every other merge on the same questions, in points, with the paired clustered interval; * where real."""
    if not compared:
        return
    cells = [*("+".join(shown) for shown in CELLS), "text"]
    rows = []
    for name, found in compared.items():
        pairs = [found.rules["likelihood"], *(found.groups["likelihood"]["cell"][cell] for cell in cells)]
        rows.append([f"SSAM − {name}", *(_difference(pair) for pair in pairs)])
    print(table(["", "all", *cells], rows) + "\n")


def print_groups(results: dict[str, dict[str, Any]], key: str) -> None:
    """Accuracy by tier, or by cell and kind of question."""
    values = list(dict.fromkeys(value for found in results.values() for value in found["groups"][key]))
    rows = []
    for value in values:
        shown = [found["groups"][key].get(value) for found in results.values()]
        n = max(one["n"] for one in shown if one)
        rows.append([value, str(n), *("–" if one is None else f"{one['acc']:.2f}" for one in shown)])
    print(table([key, "n", *results], rows) + "\n")


def _majority(blind: dict[str, float | None]) -> float:
    """What the most frequent answer of each kind of question gets, or chance where that is better."""
    return max(one for one in (blind["majority_by_kind"], blind["majority"], blind["chance"]) if one is not None)


def _share(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "–"
    low, high = cell["ci95_clustered"] or cell["ci95"]
    return f"{cell['acc']:.2f} ({low:.2f}–{high:.2f})"


def _differences(found: Comparison) -> dict[str, Any]:
    """What `print_differences` shows, for machines."""
    pairs = {"all": found.rules["likelihood"]} | found.groups["likelihood"]["cell"]
    return {
        cell: {"difference": pair.difference, "ci95": pair.ci95, "p_adjusted": pair.p_adjusted, "real": pair.real}
        for cell, pair in pairs.items()
    }


def _difference(pair: Paired) -> str:
    low, high = pair.ci95
    return f"{100 * pair.difference:+.0f} ({100 * low:+.0f} to {100 * high:+.0f}){'*' if pair.real else ''}"


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

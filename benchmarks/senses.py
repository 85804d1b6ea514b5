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
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modalloy import builtin, merge
from modalloy.evals import find_benchmark
from modalloy.evals.benchmark import Source
from modalloy.evals.features import FeatureCache
from modalloy.evals.run import Run, load_run
from modalloy.evals.runner import evaluate, identify
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
MERGES = [
    Row("SSAM", "ssam"),
    Row("average (= DAMC)", "average"),
    Row("task arithmetic", "task_arithmetic"),
    Row("TIES", "ties"),
    Row("TSV", "tsv"),
    Row("WUDI", "wudi"),
    Row("OptMerge", "optmerge"),
    Row("KnOTS", "knots"),
    Row("Core Space", "core_space"),
    Row("Iso-C", "iso_c"),
    Row("NaiveMC", "average", specialists=f"{REFERENCES}/same/"),
    Row("joint training", "average", specialists=f"{REFERENCES}/joint/"),
]
BASE = Row("base", model=builtin.BASE, shows=())
RANKS = [Row(f"k = {k}", "ssam", {"rank": k}) for k in (1, 2, 4, 8, 16, 24, 32)]
SCALES = [Row(f"λ = {scale:g}", "ssam", {"scale": scale}) for scale in (0.1, 0.25, 0.4, 0.6, 1.0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by `make data`")
    parser.add_argument("--out", type=Path, default=Path("build/senses"), help="folder of the runs and merged models")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these rows, in this order")
    parser.add_argument("--ablations", action="store_true", help="k, λ and variants on validation questions instead")
    args = parser.parse_args()
    rows = [*RANKS, *SCALES] if args.ablations else [BASE, *SPECIALISTS, *MERGES]
    if args.rows:
        named = {row.name: row for row in rows}
        rows = [named[name] for name in args.rows]
    variant, cache = "validation" if args.ablations else "test", FeatureCache(args.out / "features")
    runs = {row.name: run for row in rows if (run := asked(row, args.data, args.out, variant, cache)) is not None}
    print(list(runs))


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

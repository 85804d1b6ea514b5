"""Many merges from one pass over their inputs: each tensor is read once, each decomposition made once, each result as alone."""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from modalloy.compute import compute_several, survey
from modalloy.engines import ENGINES
from modalloy.errors import OutputError, RecipeError, memory_errors, shown
from modalloy.files import disk_errors
from modalloy.machine import memory
from modalloy.machine.cores import default_workers
from modalloy.merging import check_disk, inputs_of, resolve_device, write_beside
from modalloy.outputs.streamed import StreamedWeights
from modalloy.planning import cost
from modalloy.planning.differences import settle
from modalloy.planning.job import Job, Survey
from modalloy.planning.kinship import check_kinship
from modalloy.planning.plan import Plan
from modalloy.planning.planner import plan
from modalloy.recipe import Recipe, load_recipe
from modalloy.search.space import Axis, Changes, applied, parse_axes
from modalloy.storage.staging import Staging, check_apart
from modalloy.verify import Verification

MAX_RESULTS = 256
SET = "--set"


@dataclass(frozen=True)
class Result:
    """One of the merges of a sweep."""

    out: Path
    changes: Changes
    verification: Verification


@dataclass(frozen=True)
class SweepReport:
    """What a sweep did. Times in seconds of wall clock, memory as the process's peak resident size."""

    results: tuple[Result, ...]
    merge_s: float
    total_s: float
    peak_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Everything, for `--json`."""
        return {
            "results": [
                {"out": str(one.out), "set": one.changes, "verify": one.verification.to_dict()} for one in self.results
            ],
            "merge_seconds": round(self.merge_s, 3),
            "total_seconds": round(self.total_s, 3),
            "peak_bytes": self.peak_bytes,
        }


@memory_errors("use fewer --jobs, fewer values of --set, or a larger machine; nothing was written")
def sweep(
    recipe: Recipe | str | Path,
    out: str | Path,
    given: Iterable[str],
    *,
    jobs: int | None = None,
    device: str = "auto",
    max_memory: int | None = None,
    allow_base_mismatch: bool = False,
    on_job: Callable[[int, int], None] | None = None,
) -> SweepReport:
    """Merge `recipe` once for every combination of the values that `given` has (`NAME=VALUES`, see `parse_axes`).

    The results are folders in `out`, named after their values; each has the bytes that `merge` gives for its recipe.yaml.
    They appear only when all are complete. The other arguments are those of `merge`.

    Raises:
        ModalloyError: a mistake in the recipe, the inputs, the values or the target; nothing is written then.
    """
    file, recipe = (None, recipe) if isinstance(recipe, Recipe) else (Path(recipe), load_recipe(recipe))
    out, start = Path(out), time.perf_counter()
    chosen = resolve_device(device)
    every = combinations(parse_axes(given, recipe, SET))
    stagings = [Staging(out / name_of(changes)) for changes in every]
    plans = _plans(recipe, every, allow_base_mismatch)
    check_apart(out, inputs_of(plans[0], file))
    check_disk(out, sum(map(cost.disk_bytes, plans)))
    if not allow_base_mismatch:
        check_kinship(plans[0])
    work = together(plans)
    n_workers = 1 if chosen == "cuda" else jobs or default_workers()
    budget = cost.budget(plans[0], n_workers, max_memory, jobs=work)
    if budget.n_bytes is not None:
        memory.return_freed_memory()
    with ExitStack() as stack, disk_errors(out):
        for staging, planned in zip(stagings, plans, strict=True):
            stack.enter_context(staging.begin(planned.fingerprint))
        begin = time.perf_counter()
        streams = [StreamedWeights(planned, staging) for planned, staging in zip(plans, stagings, strict=True)]
        surveys = _write_weights(plans, streams, work, budget, partial(compute_several, device=chosen), on_job)
        merge_s = time.perf_counter() - begin
        _share_hashes(plans)
        results = []
        for staging, planned, stream, changes, told in zip(stagings, plans, streams, every, surveys, strict=True):
            run = stream.close(told)
            checked = write_beside(planned, planned.recipe, run, staging, budget, chosen)
            results.append(Result(staging.out, changes, checked))
    plans[0].inputs.forget()
    return SweepReport(tuple(results), merge_s, time.perf_counter() - start, memory.peak_bytes())


def combinations(axes: Sequence[Axis]) -> list[Changes]:
    """Every combination of the axes' values."""
    if not axes:
        raise RecipeError(f"{SET}: nothing is varied; write for example {SET} scale=0.1,0.2")
    count = math.prod(len(one.values) for one in axes)
    if count > MAX_RESULTS:
        raise RecipeError(f"{SET}: {count:,} results; at most {MAX_RESULTS} are made at once: write fewer values")
    names = [one.name for one in axes]
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*(one.values for one in axes))]


def name_of(changes: Changes) -> str:
    """The name of a result's folder: scale=0.1,rank=64."""
    name = ",".join(f"{axis}={value}" for axis, value in changes.items())
    if "/" in name or not name.isprintable() or len(name.encode()) > 200:
        raise OutputError(f"{SET}: {shown(name)} is no name of a folder; merge these one by one")
    return name


def together(plans: Sequence[Plan]) -> list[Job]:
    """The jobs of all plans that make the same tensor, as one.

    Raises:
        RecipeError: the plans are not of the same tensors.
    """
    names = [[job.name for job in planned.jobs] for planned in plans]
    if any(one != names[0] for one in names):
        raise RecipeError(f"{SET}: the values give results of other tensors; merge these one by one")
    return [
        Job("several", pieces[0].name, tuple(spec for piece in pieces for spec in piece.outputs), pieces=pieces)
        for pieces in zip(*(planned.jobs for planned in plans), strict=True)
    ]


def _plans(recipe: Recipe, every: Sequence[Changes], allow: bool) -> list[Plan]:
    """The plan of each combination; what only the data show of the inputs is compared once where all plans ask the same."""
    first = settle(plan(applied(recipe, every[0]), allow_base_mismatch=allow), allow_base_mismatch=allow)
    found = [first]
    for changes in every[1:]:
        planned = plan(applied(recipe, changes), allow_base_mismatch=allow, idle=first.idle)
        same = (planned.absent, _kinds(planned)) == (first.absent, _kinds(first))
        known = replace(planned, unchanged=first.unchanged, trained=first.trained)
        found.append(known if same else settle(planned, allow_base_mismatch=allow))
    return found


def _kinds(planned: Plan) -> list[tuple[str, str]]:
    return [(job.name, job.kind) for job in planned.jobs]


def _share_hashes(plans: Sequence[Plan]) -> None:
    """The hashes of inputs that one plan's files took on the way, for those of the others."""
    hashed = {file.path: file for file in plans[0].hashed_files()}
    for planned in plans[1:]:
        for path, (file, _) in planned.inputs.files.items():
            if path in hashed and file.stamp == hashed[path].stamp:
                file.trust(hashed[path].sha256)


def _surveys(plans: Sequence[Plan]) -> list[dict[str, Survey]]:
    """What methods must know of the whole model, for each plan; once for those that differ in λ only."""
    made: list[tuple[list[Job], dict[str, Survey]]] = []
    for planned in plans:
        group = [replace(job, parameters=job.parameters | {"scale": None}) for job in planned.surveyed()]
        known = next((told for jobs, told in made if jobs == group), None)
        made.append((group, survey(planned.merges(), planned.inputs.read) if known is None else known))
    return [told for _, told in made]


def _write_weights(
    plans: Sequence[Plan],
    streams: Sequence[StreamedWeights],
    work: Sequence[Job],
    budget: cost.Budget,
    run: Callable[..., Any],
    on_job: Callable[[int, int], None] | None,
) -> list[dict[str, Survey]]:
    """Run the jobs of all plans at once, and stream each one's tensors to its own folder."""
    inputs = plans[0].inputs
    surveys = _surveys(plans)
    inputs.keep(ref for one in cost.sample(plans[0]) for ref in (one.start, *one.reads) if ref is not None)
    for file in plans[0].hashed_files():
        file.hash_reads()
    results = ENGINES["local"](
        work,
        inputs,
        partial(run, surveys=surveys),
        budget.n_workers,
        budget.fits_merging,
        ample=budget.is_ample,
    )
    try:
        for index, (job, done) in enumerate(results, 1):
            for stream, piece, part in zip(streams, job.pieces, done.parts, strict=True):
                stream.add(piece, part)
            del done, part  # or their tensors are held until the next result is there
            if on_job is not None:
                on_job(index, len(work))
    except BaseException:
        for stream in streams:
            stream.abort()
        raise
    finally:
        results.close()
    return surveys

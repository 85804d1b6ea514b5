"""Many merges from one pass over their inputs: each tensor is read once, each decomposition made once, each result as alone."""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modalloy.compute import compute_several, survey
from modalloy.errors import ModalloyError, OutputError, RecipeError, memory_errors, shown
from modalloy.files import disk_errors
from modalloy.machine import memory
from modalloy.machine.cores import default_workers
from modalloy.merging import (
    check_disk,
    check_engine,
    cluster_of,
    finished_before,
    inputs_of,
    resolve_device,
    run_here,
    run_there,
    write_beside,
)
from modalloy.outputs.streamed import StreamedWeights
from modalloy.planning import cost
from modalloy.planning.differences import settle
from modalloy.planning.job import Done, Job, Survey
from modalloy.planning.kinship import check_kinship
from modalloy.planning.plan import Plan
from modalloy.planning.planner import plan
from modalloy.recipe import Recipe, load_recipe
from modalloy.search.space import Axis, Changes, applied, parse_axes
from modalloy.storage.apart import check_apart
from modalloy.storage.inputs import Inputs
from modalloy.storage.remote import is_remote
from modalloy.storage.staging import Staging
from modalloy.verify import Verification

if TYPE_CHECKING:
    from modalloy.engines.ray import Cluster, Shard, WrittenShard

MAX_RESULTS = 256
SET = "--set"
REMEDY = "remove it; a sweep that was killed goes on with --resume"


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
    resume: bool = False,
    engine: str = "local",
    ray_address: str | None = None,
    allow_base_mismatch: bool = False,
    on_job: Callable[[int, int], None] | None = None,
) -> SweepReport:
    """Merge `recipe` once for every combination of the values that `given` has (`NAME=VALUES`, see `parse_axes`).

    The results are folders in `out`, named after their values; each has the bytes that `merge` gives for its recipe.yaml.
    They appear only when all are complete. With `resume`, what a sweep that was killed had finished is kept. The other
    arguments are those of `merge`.

    Raises:
        ModalloyError: a mistake in the recipe, the inputs, the values or the target; nothing is written then.
    """
    file, recipe = (None, recipe) if isinstance(recipe, Recipe) else (Path(recipe), load_recipe(recipe))
    if is_remote(str(out)):
        raise OutputError(f"{out}: a sweep's results are made on this machine; give a folder, and upload what you keep")
    out, start = Path(out), time.perf_counter()
    chosen = resolve_device(device, engine)
    check_engine(engine, ray_address)
    every = combinations(parse_axes(given, recipe, SET))
    stagings = [Staging(out / name_of(changes), resume=resume, remedy=REMEDY) for changes in every]
    plans = _plans(recipe, every, allow_base_mismatch)
    for staging in stagings:
        check_apart(staging.out, inputs_of(plans[0], file))
    found = (finished_before(staging, planned.fingerprint) for staging, planned in zip(stagings, plans, strict=True))
    checks = {index: check for index, check in enumerate(found) if check is not None}
    todo = [index for index in range(len(plans)) if index not in checks]
    if not resume:
        check_disk(stagings[0].out, sum(map(cost.disk_bytes, plans)))
    if not allow_base_mismatch:
        check_kinship(plans[0])
    merge_s = 0.0
    if todo:
        left = [(plans[index], stagings[index]) for index in todo]
        n_workers = 1 if chosen == "cuda" else jobs or default_workers()
        work = together([planned for planned, _ in left])
        budget = cost.budget(left[0][0], n_workers, None if engine == "ray" else max_memory, jobs=work)
        if budget.n_bytes is not None:
            memory.return_freed_memory()
        with cluster_of(engine, ray_address, jobs, max_memory) as cluster, _placed(left), disk_errors(out):
            there = sum(path.stat().st_size for _, staging in left for path in staging.folder.iterdir())
            check_disk(stagings[0].out, sum(cost.disk_bytes(planned) for planned, _ in left) - there)
            begin = time.perf_counter()
            streams = [StreamedWeights(planned, staging) for planned, staging in left]
            surveys = _write_weights(streams, budget, chosen, on_job, cluster)
            merge_s = time.perf_counter() - begin
            _share_hashes([planned for planned, _ in left])
            for index, stream, told in zip(todo, streams, surveys, strict=True):
                run = stream.close(told)
                checks[index] = write_beside(stream.planned, stream.planned.recipe, run, stream.staging, budget, chosen)
    for planned in plans:
        planned.inputs.forget()
    results = tuple(
        Result(staging.out, changes, checks[index])
        for index, (staging, changes) in enumerate(zip(stagings, every, strict=True))
    )
    return SweepReport(results, merge_s, time.perf_counter() - start, memory.peak_bytes())


@contextmanager
def _placed(left: Sequence[tuple[Plan, Staging]]) -> Iterator[None]:
    """The results' folders; they take their places together once all are whole, and if one cannot, what remains is kept."""
    stagings = [staging for _, staging in left]
    try:
        with ExitStack() as stack:
            for planned, staging in left:
                stack.enter_context(staging.begin(planned.fingerprint))
            yield
            for staging in stagings:
                staging.is_whole = True
            for staging in stagings:
                staging.check_free()
    except ModalloyError as error:
        if not all(staging.is_whole for staging in stagings):
            raise
        n_placed = sum(not staging.folder.exists() for staging in stagings)
        raise OutputError(
            f"{str(error).removesuffix('; nothing was written')}; {n_placed} of {len(left)} results are in place, the others "
            "are whole and kept: then go on with --resume"
        ) from error


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


def together(plans: Sequence[Plan], left: Sequence[Sequence[Job]] | None = None) -> list[Job]:
    """The jobs of all plans that make the same tensor, as one; only those that are `left` of each plan, if that is given.

    Raises:
        RecipeError: the plans are not of the same tensors.
    """
    names = [[job.name for job in planned.jobs] for planned in plans]
    if any(one != names[0] for one in names):
        raise RecipeError(f"{SET}: the values give results of other tensors; merge these one by one")
    wanted = None if left is None else [{job.name for job in jobs} for jobs in left]
    found = []
    for pieces in zip(*(planned.jobs for planned in plans), strict=True):
        own = [n for n, piece in enumerate(pieces) if wanted is None or piece.name in wanted[n]]
        if own:
            found.append(_several(tuple(pieces[n] for n in own), own))
    return found


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


def _surveys(surveyed: Sequence[Sequence[Job]], inputs: Inputs) -> list[dict[str, Survey]]:
    """What methods must know of the whole model, for each plan; once for those that differ in λ only."""
    made: list[tuple[list[Job], dict[str, Survey]]] = []
    for jobs in surveyed:
        group = [replace(job, parameters=job.parameters | {"scale": None}) for job in jobs]
        known = next((told for before, told in made if before == group), None)
        made.append((group, survey(jobs, inputs.read) if known is None else known))
    return [told for _, told in made]


def _write_weights(
    streams: Sequence[StreamedWeights],
    budget: cost.Budget,
    device: str,
    on_job: Callable[[int, int], None] | None,
    cluster: "Cluster | None",
) -> list[dict[str, Survey]]:
    """Run the jobs of all plans at once, and stream each one's tensors to its own folder."""
    plans = [stream.planned for stream in streams]
    first, n_all, surveyed = plans[0], len(plans[0].jobs), [planned.surveyed() for planned in plans]
    work = together(plans, [stream.remaining for stream in streams])
    names = [stream.staging.out.name for stream in streams]

    def add(job: Job, done: Done) -> None:
        for number, piece, part in zip(job.parameters["of"], job.pieces, done.parts, strict=True):
            streams[number].add(piece, part)

    if cluster is None:
        surveys = _surveys(surveyed, first.inputs)
        compute = partial(compute_several, surveys=surveys, names=names, device=device)
        results = run_here(first, work, first.inputs, compute, budget, add)
    else:
        cluster.check(first.inputs, streams[0].staging.folder)
        surveys = cluster.call(partial(_surveys, surveyed), first.inputs) if any(surveyed) else [{} for _ in plans]
        of = {stream.staging.folder.absolute(): stream for stream in streams}

        def adopt(shard: "WrittenShard") -> None:
            of[shard.folder].adopt(shard)

        shards = _shards(streams) if first.form.has_shards else []
        compute = partial(compute_several, surveys=surveys, names=names)
        results = run_there(first, work, shards, first.inputs, compute, cluster, add, adopt)
    n_done = n_all - len(work)
    try:
        for count in results:
            n_done += count
            if on_job is not None:
                on_job(min(n_done, n_all), n_all)  # a job of two shards is done twice
    finally:
        results.close()
        for stream in streams:
            stream.abort()
    return surveys


def _shards(streams: Sequence[StreamedWeights]) -> "list[Shard]":
    """Every shard that is not written yet, of all results that miss it: one task writes them.

    Results whose tensors are of other sizes have other shards, which are tasks of their own.
    """
    from modalloy.engines.ray import Shard

    alike: dict[tuple[tuple[str, ...], ...], list[int]] = {}
    for number, stream in enumerate(streams):
        names = tuple(tuple(spec.name for spec in shard) for shard in stream.writer.shards)
        alike.setdefault(names, []).append(number)
    own = [{index: parts for index, *parts in stream.shards(stream.remaining)} for stream in streams]
    found = []
    for numbers in alike.values():
        for index in sorted(set().union(*(own[number] for number in numbers))):
            of = [number for number in numbers if index in own[number]]
            specs, jobs = zip(*(own[number][index] for number in of), strict=True)
            several = tuple(_several(parts, of) for parts in zip(*jobs, strict=True))
            folders = tuple(streams[number].staging.folder.absolute() for number in of)
            found.append(Shard(index, folders, specs, several))
    return found


def _several(pieces: tuple[Job, ...], of: Sequence[int]) -> Job:
    """The pieces of these merges as one job."""
    outputs = tuple(spec for piece in pieces for spec in piece.outputs)
    return Job("several", pieces[0].name, outputs, pieces=pieces, parameters={"of": tuple(of)})

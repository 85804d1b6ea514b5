"""merge(recipe, out): plan → run → write → verify → card. Read this file first."""

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from modalloy.compute import compute, survey
from modalloy.engines import ENGINES, NAMES
from modalloy.engines.local import Compute
from modalloy.errors import OutputError, memory_errors
from modalloy.files import disk_errors, write_text
from modalloy.machine import memory
from modalloy.machine.cores import default_workers
from modalloy.outputs import WRITERS
from modalloy.outputs.card import model_card
from modalloy.outputs.earlier import Earlier, records
from modalloy.outputs.manifest import build_manifest
from modalloy.outputs.sources import SOURCES
from modalloy.outputs.streamed import StreamedWeights
from modalloy.planning import cost
from modalloy.planning.differences import settle
from modalloy.planning.job import Done, Job, Run, Survey
from modalloy.planning.kinship import Kinship, check_kinship
from modalloy.planning.plan import Plan
from modalloy.planning.planner import plan
from modalloy.recipe import Recipe, load_recipe
from modalloy.specialists.specialist import Specialist
from modalloy.storage.apart import check_apart
from modalloy.storage.folder import read_json
from modalloy.storage.inputs import Inputs
from modalloy.storage.staging import MANIFEST, Staging
from modalloy.verify import Verification, verify, verify_folder

if TYPE_CHECKING:
    from modalloy.engines.ray import Cluster, Shard, WrittenShard

Add = Callable[[Job, Done], None]  # takes what a job gives


@dataclass(frozen=True)
class MergeReport:
    """What a merge did. Times in seconds of wall clock, memory as the process's peak resident size."""

    out: Path
    plan: Plan
    verification: Verification
    merge_s: float
    total_s: float
    peak_bytes: int
    budget: cost.Budget
    compression: Mapping[str, float] = field(default_factory=dict)  # relative Frobenius error of updates cut to a rank
    kinship: Mapping[str, Kinship] = field(default_factory=dict)  # of models of other architectures with the target
    n_reused: int = 0  # jobs whose tensors are an earlier result's

    @property
    def compression_error(self) -> float | None:
        """Largest relative Frobenius error of an update that `output.compress_rank` cut, None if none was."""
        return max(self.compression.values(), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the list of tensors, for `--json`."""
        planned = {key: value for key, value in self.plan.to_dict().items() if key != "tensors"}
        if self.kinship:
            planned["kinship"] = {label: found.to_dict() for label, found in self.kinship.items()}
        return planned | {
            "out": str(self.out),
            "merge_seconds": round(self.merge_s, 3),
            "total_seconds": round(self.total_s, 3),
            "peak_bytes": self.peak_bytes,
            "predicted_peak_bytes": self.budget.predicted_bytes,
            "workers": self.budget.n_workers,
            "compression_error": self.compression_error,
            "reused": self.n_reused,
            "verify": self.verification.to_dict(),
        }


@memory_errors("use fewer --jobs, give a --max-memory that is free, or use a larger machine; nothing was written")
def merge(
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    jobs: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
    resume: bool = False,
    earlier: str | Path | None = None,
    max_memory: int | None = None,
    engine: str = "local",
    ray_address: str | None = None,
    allow_base_mismatch: bool = False,
    on_job: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Merge as `recipe` says and write the result to the folder `out`, which appears only when it is complete.

    Args:
        recipe: a Recipe, or the path of its YAML file.
        out: folder to make; an existing one is refused unless `overwrite`.
        jobs: workers (default: one per core). The bytes written do not depend on it.
        device: "cpu", "cuda" or "auto" (cuda where there is one).
        overwrite: replace an earlier result at `out`.
        resume: go on with a merge into `out` that was killed; its finished shards are kept.
        earlier: an earlier result whose tensors are taken over where the same inputs and numbers made them; the bytes
            written are those of a merge without it.
        max_memory: bytes that the process may hold, by default what there is room for. Fewer jobs are in flight together
            where that is needed, or fewer workers; refused before anything is merged if one weight at a time needs more.
            Unless it is ample, freed memory is returned at once (`memory.return_freed_memory`, for good), which takes time.
        engine: "local" (threads of this process), or "ray" (see `engines/ray.py`): `jobs` are then tasks at once, and
            `max_memory` is that of one.
        ray_address: of a cluster that is there; by default that of RAY_ADDRESS, else one of this machine.
        allow_base_mismatch: merge specialists that record another base than the recipe's.
        on_job: called with (jobs done, jobs in all).

    Raises:
        ModalloyError: a mistake in the recipe, the inputs or the target; `out` is then as it was.
    """
    file, recipe = (None, recipe) if isinstance(recipe, Recipe) else (Path(recipe), load_recipe(recipe))
    out = Path(out)
    check_engine(engine, ray_address)
    staging = Staging(out, overwrite=overwrite, resume=resume)
    start = time.perf_counter()
    chosen_device = resolve_device(device, engine)
    n_workers = 1 if chosen_device == "cuda" else jobs or default_workers()
    before = None if earlier is None else Earlier(Path(earlier), chosen_device)
    held = memory.peak_bytes()
    planned = plan(recipe, allow_base_mismatch=allow_base_mismatch)
    read = list(inputs_of(planned, file))
    if before is not None and not (out.exists() and out.samefile(before.folder)):
        read.append(("the earlier result", before.folder))
    check_apart(out, read)
    if not resume:
        check_disk(out, cost.disk_bytes(planned))
    planned = settle(planned, allow_base_mismatch=allow_base_mismatch)
    memory.release_memory()
    planning = memory.peak_bytes() if memory.peak_bytes() > held else 0
    budget = cost.budget(planned, n_workers, None if engine == "ray" else max_memory, planning)
    if budget.n_bytes is not None:
        memory.return_freed_memory()
    fingerprint = planned.fingerprint
    if (verification := finished_before(staging, fingerprint)) is not None:
        return MergeReport(out, planned, verification, 0.0, time.perf_counter() - start, memory.peak_bytes(), budget)
    kinship = {} if allow_base_mismatch else check_kinship(planned)
    with (
        cluster_of(engine, ray_address, jobs, max_memory) as cluster,
        staging.begin(fingerprint, None if before is None else before.sha256) as folder,
        disk_errors(out),
    ):
        begin = time.perf_counter()
        there = sum(path.stat().st_size for path in folder.iterdir())
        check_disk(out, cost.disk_bytes(planned) - there)
        weights = StreamedWeights(planned, staging)
        run, n_reused = _write_weights(planned, weights, budget, chosen_device, before, on_job, cluster)
        merge_s = time.perf_counter() - begin
        verification = write_beside(planned, recipe, run, staging, budget, chosen_device)
    planned.inputs.forget()
    total_s, peak = time.perf_counter() - start, memory.peak_bytes()
    return MergeReport(out, planned, verification, merge_s, total_s, peak, budget, run.compression, kinship, n_reused)


def resolve_device(device: str, engine: str = "local") -> str:
    """ "auto" as "cuda" where there is one, else "cpu"; "cuda" without one, or on a cluster, is refused."""
    if engine == "ray":
        if device == "cuda":
            raise OutputError("--engine ray: its tasks run on processors; use --device cpu")
        return "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise OutputError("--device cuda: no CUDA device is available here; use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def finished_before(staging: Staging, fingerprint: str) -> Verification | None:
    """The check of a result that an earlier run finished, where one is to be resumed; one of something else is refused."""
    out = staging.out
    if not (staging.resume and out.is_dir()) or staging.interrupted:
        return None
    if not (out / SOURCES).is_file() or read_json(out / SOURCES).get("fingerprint") != fingerprint:
        raise OutputError(
            f"{out}: already exists and is not this recipe's result, or its inputs changed since; choose another folder, or "
            f"{staging.remedy}"
        )
    verification = verify(out)
    staging.clean()
    return verification


def check_disk(out: Path, needed: int) -> None:
    """Refuse what the disk has no room for."""
    with disk_errors(out):
        free = shutil.disk_usage(next(parent for parent in out.absolute().parents if parent.exists())).free
    if free < needed:
        raise OutputError(
            f"{out}: the disk is full: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free; "
            "free space or choose another folder"
        )


def check_engine(engine: str, address: str | None) -> None:
    """Refuse an engine that there is not, and a cluster's address without one."""
    if engine not in NAMES:
        raise OutputError(f"--engine {engine}: not an engine; known: {', '.join(NAMES)}")
    if engine == "local" and address is not None:
        raise OutputError("--ray-address is of --engine ray: add it, or leave the address out")


@contextmanager
def cluster_of(
    engine: str, address: str | None, jobs: int | None, max_memory: int | None
) -> "Iterator[Cluster | None]":
    """The cluster that an engine needs."""
    if engine == "local":
        yield None
        return
    from modalloy.engines.connection import connected
    from modalloy.engines.ray import Cluster

    with connected(address):
        yield Cluster(jobs, max_memory)


def _write_weights(
    planned: Plan,
    weights: StreamedWeights,
    budget: cost.Budget,
    device: str,
    before: Earlier | None,
    on_job: Callable[[int, int], None] | None,
    cluster: "Cluster | None",
) -> tuple[Run, int]:
    """Run all jobs and stream their tensors to disk; how many of them an earlier result had done."""
    inputs, todo = planned.inputs, weights.remaining
    if cluster is not None:
        cluster.check(inputs, weights.staging.folder)
    surveys = _surveys(planned, cluster)
    reused: dict[str, Job] = {}
    if before is not None:
        reused = before.reused(planned, surveys)
        inputs = inputs.joined("earlier result", before.taken)
        todo = [reused.get(job.outputs[0].name, job) for job in todo]
    work = partial(compute, surveys=surveys, device=device)
    if cluster is None:
        results = run_here(planned, todo, inputs, work, budget, weights.add)
    else:
        from modalloy.engines.ray import Shard

        place = weights.staging.folder.absolute()
        shards = [Shard(index, (place,), (specs,), own) for index, specs, own in weights.shards(todo)]
        results = run_there(planned, todo, shards, inputs, work, cluster, weights.add, weights.adopt)
    n_done = len(planned.jobs) - len(todo)
    try:
        for count in results:
            n_done += count
            if on_job is not None:
                on_job(n_done, len(planned.jobs))
        run = weights.close(surveys)
    finally:
        results.close()
        weights.abort()
    if before is not None:
        before.check()
    return run, len(reused)


def _surveys(planned: Plan, cluster: "Cluster | None") -> dict[str, Survey]:
    """What methods must know of the whole model before its first weight."""
    if cluster is None or not planned.surveyed():
        return survey(planned.merges(), planned.inputs.read)
    found: dict[str, Survey] = cluster.call(partial(_surveyed, planned.merges()), planned.inputs)
    return found


def _surveyed(jobs: list[Job], inputs: Inputs) -> dict[str, Survey]:
    return survey(jobs, inputs.read)


def run_here(
    planned: Plan, jobs: Sequence[Job], inputs: Inputs, work: Compute, budget: cost.Budget, add: Add
) -> Generator[int, None, None]:
    """Runs jobs in threads of this process and hands what they give to `add`; yields how many are done."""
    read = Counter(source for job in jobs for source in {source for ref in job.reads for source in ref.sources})
    planned.inputs.keep(source for source, count in read.items() if count > 1)
    planned.inputs.keep(ref for job in cost.sample(planned) for ref in (job.start, *job.reads) if ref is not None)
    for file in planned.hashed_files():
        file.hash_reads()
    shared = cost.shared(jobs) if budget.is_ample else {}
    results = ENGINES["local"](
        jobs, inputs, work, budget.n_workers, budget.fits_merging, ample=budget.is_ample, shared=shared
    )
    with closing(results):
        for job, done in results:
            add(job, done)
            del done  # or its tensors are held until the next result is there
            yield 1


def run_there(
    planned: Plan,
    jobs: Sequence[Job],
    shards: Sequence["Shard"],
    inputs: Inputs,
    work: Compute,
    cluster: "Cluster",
    add: Add,
    adopt: Callable[["WrittenShard"], None],
) -> Generator[int, None, None]:
    """The same on a cluster, whose workers write the shards, where the form has any, and hash the inputs."""
    if planned.form.has_shards:
        counts = {(shard.folders[0], shard.index): len(shard.jobs) for shard in shards}
        with closing(cluster.write(shards, inputs, work)) as written:
            for parts in written:
                for part in parts:
                    adopt(part)
                yield counts[parts[0].folder, parts[0].index]
        cluster.remove_left(folder for shard in shards for folder in shard.folders)
    else:
        with closing(cluster.run(jobs, inputs, work)) as results:
            for job, done in results:
                add(job, done)
                yield 1
    files = planned.hashed_files()
    for file, sha256 in zip(files, cluster.hashes(planned.inputs, [file.path for file in files]), strict=True):
        file.trust(sha256)


def write_beside(
    planned: Plan, recipe: Recipe, run: Run, staging: Staging, budget: cost.Budget, device: str
) -> Verification:
    """Write what stands beside the weights, and check the whole."""
    folder = staging.folder
    WRITERS[planned.form.name].write(planned, folder)
    write_text(folder / "recipe.yaml", recipe.to_yaml())
    write_text(folder / "README.md", model_card(planned))
    manifest = build_manifest(planned, run, folder)
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    sources = _sources(planned) | {"fingerprint": staging.fingerprint} | records(planned, run, folder, device)
    write_text(folder / SOURCES, json.dumps(sources, indent=1) + "\n")
    return verify_folder(folder, planned, manifest, rehash=False, budget=budget)


def inputs_of(planned: Plan, recipe: Path | None) -> Iterator[tuple[str, Path]]:
    """Every file or folder that a merge reads, as a message calls it."""
    if recipe is not None:
        yield "the recipe", recipe
    for label, model in planned.starts:
        yield f"the {label}", model.folder
    for specialist in planned.specialists:
        yield f"the model {specialist.label}", specialist.folder
    for file in filter(None, planned.fishers):
        yield "a Fisher file", file.path
    for modality, sense in planned.senses.items():
        if sense.path is not None:
            yield f"the encoder of {modality}", sense.path


def _sources(planned: Plan) -> dict[str, Any]:
    """Where the inputs were on this machine, so that `verify` can merge again; not part of what is hashed."""
    return {
        **{label: str(model.folder.resolve()) for label, model in planned.starts},
        "specialists": [str(s.folder.resolve()) for s in planned.specialists],
        "encoders": [_encoder_source(planned, s) for s in planned.specialists],
        "fishers": [None if file is None else str(file.path.resolve()) for file in planned.fishers],
    }


def _encoder_source(planned: Plan, specialist: Specialist) -> str | None:
    """Where an encoder that only this machine would find is, as a recipe says it."""
    sense = planned.senses.get(specialist.sense or "")
    if sense is None or sense.local is None:
        return None
    return f"{sense.choice.name}:{sense.local.resolve()}"

"""What a plan costs: bytes read, room on the disk, memory; and which of its weights are merged again to verify it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modalloy.errors import OutOfMemoryError
from modalloy.linalg import BLOCK_ENTRIES, FACTOR_ROWS, row_blocks
from modalloy.machine import memory
from modalloy.machine.cores import AHEAD
from modalloy.methods import METHODS
from modalloy.planning.job import Job
from modalloy.planning.kinship import kinship_pairs, rows_compared
from modalloy.recompute import BLOCKS, PART_BYTES, SMALL_BYTES, is_dense_check, spread_over_places
from modalloy.specialists.specialist import StoredLora
from modalloy.storage.scaled import ScaledRef
from modalloy.storage.source import BLOCK_BYTES
from modalloy.storage.tensors import TensorRef
from modalloy.storage.views import MappedRef
from modalloy.subspaces import EXACT_SIZE

if TYPE_CHECKING:
    from modalloy.planning.plan import Plan

WRITE_BYTES = 3 * BLOCK_BYTES  # on their way to the disk
LIBRARY_BYTES = 22 << 20  # of torch, BLAS and LAPACK, which the first product and decomposition bring in
THREAD_BYTES = 2 << 20  # of a worker: its stack, and what BLAS keeps for it
LISTED_BYTES = 2 << 10  # of a tensor in lists: those of the plan, the headers, the manifest
KEPT_FREED = 1.3  # times what is used is the most that glibc was seen to hold when it keeps what was freed
NEAR = 12  # jobs over which a tensor is held that several of them read
MARGIN = 0.01  # by which the memory that a process begins with differs from run to run
# float64 matrices that an eigendecomposition holds, 3.1 to 3.6 measured: the Gram, its vectors, LAPACK's workspace
EIGEN_COPIES = 4
SPECTRAL_COPIES = 6  # of the weight's size, in float64: an update, its projection, factors, a workspace


def read_bytes(planned: Plan) -> int:
    """Bytes that a merge reads: every file that it hashes, once; surveyed weights and those merged again to verify, again."""
    once = sum(file.n_bytes for file in planned.hashed_files())
    again = sum(job.read_bytes for job in planned.surveyed())
    again += sum(
        sum(ref.n_bytes for pair in rows_compared(own, other) for ref in pair)
        for _, _, own, other in kinship_pairs(planned)
    )
    checked = sample(planned)
    in_part = sum(map(_bytes_with_start, checked)) > SMALL_BYTES
    return once + again + sum(_checked_bytes(job, in_part) for job in checked)


def _checked_bytes(job: Job, in_part: bool) -> int:
    """What verifying reads for one job: what it read and wrote, and the start again to add its update; of large ones, some rows."""
    twice = job.kind == "merge" and len(job.outputs) == 1 and job.has_tuned
    start = job.start.n_bytes if twice and job.start is not None else 0
    whole = job.read_bytes + start + job.write_bytes
    if not in_part or len(job.outputs) != 1 or job.pieces or job.rows:
        return whole
    blocks = len(row_blocks(job.outputs[0].shape))
    if job.kind in ("keep", "carry"):
        blocks = -(-job.write_bytes // PART_BYTES)
    blocks = max(1, blocks)  # of tensors without entries, too
    factors = sum(model.a.n_bytes + model.b.n_bytes for model in job.models if isinstance(model, StoredLora))
    if job.kind == "merge" and job.has_tuned and not METHODS[job.method].rowwise:
        return job.read_bytes + (start + job.write_bytes) * min(blocks, BLOCKS) // blocks
    return factors + (whole - factors) * min(blocks, BLOCKS) // blocks


def disk_bytes(planned: Plan) -> int:
    """Room that the result takes: the tensors, and copies of the base and encoders that only this machine would find."""
    copied = sum(file.n_bytes for file in planned.target.files) if planned.copies_target else 0
    encoders = (path for sense in planned.senses.values() for path in sense.files())
    return planned.write_bytes + copied + sum(path.stat().st_size for path in encoders)


def sample(planned: Plan) -> list[Job]:
    """What is worked out again to verify a merge: all of a small result, else some of each kind and method."""
    every = [one for job in planned.jobs for one in job.merges or (job,)]
    if sum(_bytes_with_start(one) for one in every) <= SMALL_BYTES:
        return every
    groups: dict[tuple[str, str], list[Job]] = {}
    for one in every:
        groups.setdefault((one.kind, one.method), []).append(one)
    return [job for group in groups.values() for job in spread_over_places(group, lambda job: job.name)]


def _bytes_with_start(job: Job) -> int:
    """Size of what a job reads, and of the weight that it updates, which the factors of factors need not."""
    return sum(ref.n_bytes for ref in {ref for ref in (job.start, *job.reads) if ref is not None})


def is_checked_densely(planned: Plan, job: Job) -> bool:
    """Whether a merged weight is verified on dense float64 matrices (see `recompute.is_dense_check`)."""
    compress = planned.recipe.output.compress_rank
    interpolates = planned.base is None
    return is_dense_check(job.method, job.parameters, job.shape, compress, interpolates)


@dataclass(frozen=True)
class Budget:
    """How many workers a merge gets, and which jobs may be in flight together: all unless memory is limited (`n_bytes`)."""

    planned: Plan
    n_workers: int
    predicted_bytes: int  # the process's peak
    n_bytes: int | None  # for the jobs in flight, beside what the process holds anyway

    @property
    def is_ample(self) -> bool:
        """Whether memory is no limit."""
        return self.n_bytes is None

    def fits_merging(self, jobs: Sequence[Job]) -> bool:
        """Whether these jobs may be held together while merging."""
        costs = [(_held_bytes(job), _job_bytes(job)) for job in jobs]
        return (
            self.n_bytes is None
            or _together(costs, self.n_workers) + _written_bytes(self.planned, jobs) <= self.n_bytes
        )

    def fits_verifying(self, jobs: Sequence[Job]) -> bool:
        """Whether these jobs may be held together while verifying."""
        costs = [(0, _check_bytes(self.planned, job)) for job in jobs]
        return self.n_bytes is None or _together(costs, self.n_workers) <= self.n_bytes


def budget(
    planned: Plan, n_workers: int, limit: int | None, planning_bytes: int = 0, jobs: Sequence[Job] | None = None
) -> Budget:
    """How a merge keeps within `limit`, or else within the room that there is: with fewer jobs in flight, or fewer workers.

    A limit that was given is what counts, whatever the room; nothing is limited where either is ample. `planning_bytes` is
    the process's peak while it made the plan; `jobs` are what is run, if not the plan's own.

    Raises:
        OutOfMemoryError: not even one weight at a time fits.
    """
    predicted, room = max(planning_bytes, peak_bytes(planned, n_workers, jobs=jobs)), memory.room()
    most = limit if limit is not None or room is None else memory.resident_bytes() + room.n_bytes
    if most is None or predicted * (1 if limit is None else KEPT_FREED) <= most:
        return Budget(planned, n_workers, predicted, None)
    for n in range(n_workers, 0, -1):
        least = max(planning_bytes, peak_bytes(planned, n, together=1, jobs=jobs))
        if least <= most:
            left = most - _anyway_bytes(planned, n)
            return Budget(planned, n, min(most, max(planning_bytes, peak_bytes(planned, n, jobs=jobs))), left)
    enough = f"--max-memory {math.ceil(least * (1 + MARGIN) / 1e6)}MB"
    if limit is not None or room is None:
        raise OutOfMemoryError(
            f"--max-memory {most / 1e6:.0f} MB: this merge holds {least / 1e6:.0f} MB even with one weight at a time; "
            f"write {enough}"
        )
    raise OutOfMemoryError(
        f"this merge holds {least / 1e6:.0f} MB even with one weight at a time, and {room.limit} has room for "
        f"{most / 1e6:.0f} MB; free memory, use a larger machine, or write {enough} to try all the same"
    )


def peak_bytes(planned: Plan, n_workers: int, together: int | None = None, jobs: Sequence[Job] | None = None) -> int:
    """Memory that a merge with `n_workers` holds at its peak, while merging or verifying, with what the process holds now.

    At most `together` jobs are in flight, as many as the engine takes by default; `jobs` are run, by default the plan's.
    """
    jobs = planned.jobs if jobs is None else jobs
    costs = [(_held_bytes(job), _job_bytes(job)) for job in jobs]
    window = together or n_workers + AHEAD
    merging = max((_together(costs[i : i + window], n_workers) for i in range(len(costs))), default=0)
    checks = sorted((0, _check_bytes(planned, job)) for job in sample(planned))
    verifying = _together(checks[-window:], n_workers)
    shared_bytes = 0 if together else _shared_bytes(jobs)  # where memory is limited nothing is held for later
    most = max(
        merging + shared_bytes + _written_bytes(planned, jobs),
        verifying,
        _compared_bytes(planned),
        _surveyed_bytes(planned),
    )
    return _anyway_bytes(planned, n_workers) + most


def shared(jobs: Sequence[Job]) -> dict[TensorRef, int]:
    """The stored tensors that several jobs read, one soon after the other, and none changes; and how often they are read."""
    return {ref: len(places) for ref, places in _shared_places(jobs).items()}


def _shared_places(jobs: Sequence[Job]) -> dict[TensorRef, list[int]]:
    places: dict[TensorRef, list[int]] = {}
    changed: set[TensorRef] = set()
    for index, job in enumerate(jobs):
        changed |= _changed(job)
        for source in (source for ref in job.reads for source in set(ref.sources)):
            places.setdefault(source, []).append(index)
    return {ref: at for ref, at in places.items() if 0 < at[-1] - at[0] <= NEAR and ref not in changed}


def _changed(job: Job) -> set[TensorRef]:
    """The stored tensors in whose memory the job may write."""
    starts = set() if job.start is None else set(job.start.sources)
    if isinstance(job.start, ScaledRef):
        starts |= {ref for ref in (job.start.codes, job.start.scales) if ref is not None}
    return starts.union(*map(_changed, job.pieces))


def _shared_bytes(jobs: Sequence[Job]) -> int:
    """What is held at most for jobs that come later."""
    held = [0] * (len(jobs) + 1)
    for ref, places in _shared_places(jobs).items():
        for index in range(places[0], places[-1]):
            held[index] += ref.n_bytes
    return max(held)


def _together(costs: Sequence[tuple[int, int]], n_workers: int) -> int:
    """What jobs in flight hold, (while they wait, beside that while one is worked on) each."""
    return sum(held for held, _ in costs) + sum(sorted(working for _, working in costs)[-n_workers:])


def _anyway_bytes(planned: Plan, n_workers: int) -> int:
    """What the process holds whatever is in flight: what it holds now, libraries, blocks that are read, lists of tensors."""
    files = [file for checkpoint in planned.checkpoints() for file in checkpoint.files]
    files += [file for file in planned.fishers if file is not None]
    largest = max((ref.n_bytes for job in planned.jobs for ref in job.reads), default=0)
    # tensors that are not in one piece are read by torch, which maps the file, or holds it whole
    mapped = sum(file.n_bytes for file in files if any(ref.begin < 0 for ref in file.refs.values()))
    blocks = (n_workers + 1) * min(BLOCK_BYTES, largest)
    listed = LISTED_BYTES * (len(planned.fates) + len(planned.jobs))
    return memory.resident_bytes() + LIBRARY_BYTES + n_workers * THREAD_BYTES + blocks + mapped + listed


def _written_bytes(planned: Plan, jobs: Sequence[Job]) -> int:
    """What is on its way to the disk, to that of every result."""
    results = max((len(job.pieces) for job in jobs if job.kind == "several"), default=1)
    return results * min(WRITE_BYTES, planned.write_bytes)


def _held_bytes(job: Job) -> int:
    """What a job holds from the start of its reads until its outputs are written."""
    return job.read_bytes + job.write_bytes


def _compared_bytes(planned: Plan) -> int:
    """What comparing models with the target takes: two tensors, one of which may be put together, and blocks in float64."""
    pairs = [(own, other) for _, _, own, other in kinship_pairs(planned)]
    sources = [ref.largest_bytes for pair in pairs for ref in pair if isinstance(ref, MappedRef)]
    tensors = max((own.n_bytes + other.n_bytes for own, other in pairs), default=0)
    return tensors + max(sources, default=0) + (4 * 8 * BLOCK_ENTRIES if pairs else 0)


def _surveyed_bytes(planned: Plan) -> int:
    """What a survey takes: the updates of one weight, those of the next, and what these are read from."""
    sizes = [0]
    for job in planned.surveyed():
        method = METHODS[job.method]
        rows, columns = job.shape
        whole = method.gets(job.parameters) == "dense" or job.has_tuned
        copies = 1 + method.copies_updates(job.parameters)
        entries = len(job.models) * copies * rows * columns if whole else 2 * job.stacked_rank * (rows + columns)
        sizes.append(job.read_bytes + 2 * job.wide.itemsize * entries + 4 * 8 * min(BLOCK_ENTRIES, rows * columns))
    return max(sizes)


def _job_bytes(job: Job, *, dense: bool = False) -> int:
    """What working on a job takes beside its inputs and outputs."""
    if job.kind == "requantise":  # the weight, what codes stand for, a block's part
        piece, entries = job.pieces[0], job.pieces[0].write_bytes
        return piece.read_bytes + 3 * entries + _job_bytes(piece)
    if job.kind == "several":
        return max(_job_bytes(piece) for piece in job.pieces)
    if job.kind == "fuse":
        return job.write_bytes + max(_job_bytes(piece) for piece in job.pieces)
    assembling = max((ref.largest_bytes for ref in job.reads if isinstance(ref, MappedRef)), default=0)
    if job.kind in ("average", "interpolate"):
        entries = job.outputs[0].n_bytes // job.outputs[0].dtype.itemsize
        return assembling + 8 * 5 * min(entries, BLOCK_ENTRIES)
    if job.kind not in ("merge", "own"):
        return 0
    rows, columns = job.shape
    method, n = METHODS[job.method], len(job.models)
    gets = method.gets(job.parameters)
    wide = 8 if dense else job.wide.itemsize
    stacked, full = job.stacked_rank, job.has_tuned
    if not full and gets != "dense" and not dense:
        blocks = 2 * 8 * min(4096, max(rows, columns)) * stacked  # of tall factors, in float64
        added = min(rows * columns, max(BLOCK_ENTRIES, FACTOR_ROWS * columns)) if len(job.outputs) == 1 else 0
        return wide * 3 * stacked * (rows + columns) + 8 * 10 * stacked**2 + max(blocks, wide * added)
    if full and not stacked and method.rowwise and len(job.outputs) == 1:
        return assembling + wide * (n + 4) * min(BLOCK_ENTRIES, rows * columns)
    copies = n * method.copies_updates(job.parameters)
    taken = wide * rows * columns * (n + 2 + copies + job.takes_base)  # the updates, the merged one, and one on the way
    if gets == "dense":
        taken += wide * 4 * (n + job.takes_base) * BLOCK_ENTRIES
    elif method.combines:  # blocks in float64
        taken += 8 * (n + 2) * min(BLOCK_ENTRIES, rows * columns)
    elif not method.rowwise:
        # where both sides play one part, the Gram is that of the shorter
        side = min(rows, columns) if gets == "core" and "transpose" in method.laws else max(rows, columns)
        own = {"core": SPECTRAL_COPIES, "left_core": n}.get(gets, 0)
        # drafts are given up before a Gram is decomposed
        drafts = wide // 2 * n * rows * columns if gets == "factored_core" else 0
        taken += max(8 * EIGEN_COPIES * side**2, drafts) + 8 * own * rows * columns
    if len(job.outputs) == 2:  # then cut to factors: a Gram decomposed, the update in float64, what is left of it
        taken = max(taken, 8 * EIGEN_COPIES * min(rows, EXACT_SIZE) ** 2 + (3 * wide + 8) * rows * columns)
    return taken


def _check_bytes(planned: Plan, job: Job) -> int:
    """What verifying a tensor takes: reading it, working it out again, and their difference; or reading it in parts."""
    if job.kind in ("keep", "carry"):
        return 3 * PART_BYTES
    if job.kind not in ("merge", "own"):
        return job.read_bytes + job.write_bytes + _job_bytes(job) + 4 * 8 * BLOCK_ENTRIES
    rows, columns = job.shape
    dense = is_checked_densely(planned, job)
    whole = len(job.outputs) == 1
    entries = min(BLOCK_ENTRIES, rows * columns) if whole else rows * columns if dense else 0
    return job.read_bytes + job.write_bytes + _job_bytes(job, dense=dense) + 2 * 8 * entries

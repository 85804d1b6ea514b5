"""One job of a plan to its tensors: base plus merged update, means, interpolations, and what is carried as it is."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from modalloy.checkpoints import TensorRef, TensorSpec, all_finite
from modalloy.delta import Delta, LowRank, compressed
from modalloy.engines import local
from modalloy.errors import MethodError
from modalloy.families.stored import MappedRef
from modalloy.linalg import BLOCK_ENTRIES
from modalloy.methods import METHODS, apply, survey_model
from modalloy.plan import Plan
from modalloy.planner import Job

Read = Callable[[TensorRef], Tensor]  # how a job gets at the data of its inputs


def compute(planned: Plan, job: Job, read: Read, device: str = "cpu") -> list[Tensor]:
    """The tensors that one job writes, in the order and type of `job.outputs`; the memory of its inputs may be reused."""
    if job.kind == "merge" and len(job.outputs) == 1:
        return [_merged_weight(planned, job, read, device)]
    if job.kind == "merge":
        assert planned.rank is not None
        merged = merged_delta(planned, job, read, device)
        if not isinstance(merged, LowRank) or merged.rank > planned.rank:
            merged, planned.compression[job.slot] = compressed(merged, planned.rank)
        fill = planned.rank - merged.rank  # zero columns and rows, so that every layer has the adapter's one rank
        up = torch.nn.functional.pad(merged.up, (0, fill)).cpu()
        down = torch.nn.functional.pad(merged.down, (0, 0, 0, fill)).cpu()
        return [_fitted(tensor, spec) for tensor, spec in zip((down, up), job.outputs, strict=True)]
    if job.kind == "interpolate":
        return [_interpolated(planned, job, read)]
    if job.kind == "fuse":
        return [_fused(planned, job, read, device)]
    if job.kind == "average":
        return [_averaged(job, read)]
    return [_fitted(read(job.reads[0]), job.outputs[0])]


def merged_delta(
    planned: Plan, job: Job, read: Read, device: str = "cpu", *, literal: bool = False, rows: slice = slice(None)
) -> Delta:
    """The merged update of one linear weight, or of some of its rows where the method allows.

    With `literal`, everything is computed on dense float64 matrices instead (for checking).
    """
    rows_of_weight, columns = planned.start(job.slot).shape
    if not any(job.weights):  # no model takes part here
        return LowRank(torch.zeros(rows_of_weight, 0, device=device)[rows], torch.zeros(0, columns, device=device))
    fishers = None
    if METHODS[job.method].takes("fishers"):
        shares = zip(planned.fishers, job.weights, strict=True)
        files = [file for file, share in shares if file is not None and share is not None]
        fishers = [read(file.refs[job.slot]).to(device) for file in files]
    try:
        return apply(
            job.method,
            specialists_deltas(planned, job, read, device, literal=literal, rows=rows),
            job.parameters,
            (rows_of_weight, columns),
            slot=job.slot,
            fishers=fishers,
            whole=planned.surveys.get(job.group),
        )
    except MethodError as error:
        raise MethodError(f"{job.slot}: {error}") from error


def specialists_deltas(
    planned: Plan, job: Job, read: Read, device: str = "cpu", *, literal: bool = False, rows: slice = slice(None)
) -> list[Delta]:
    """The update of every specialist that takes part, times its weight; one that has none is a zero of rank 0 (`missing: zero`)."""
    wide = torch.float64 if literal or planned.recipe.dtype == "float64" else torch.float32
    shape = planned.start(job.slot).shape
    deltas: list[Delta] = []
    dense = literal and not METHODS[job.method].one_rank  # which has no form on full matrices
    for specialist, weight in planned.taking_part(job):
        if job.slot in specialist.text:
            stored = specialist.delta(job.slot, read)
            low_rank = weight * LowRank(stored.up[rows].to(device, wide), stored.down.to(device, wide))
            deltas.append(low_rank.dense() if dense else low_rank)
        elif job.slot in specialist.full:
            tuned, base = read(specialist.full[job.slot])[rows], read(planned.start(job.slot))[rows]
            difference = tuned.to(device, wide, copy=True).sub_(base.to(device, wide))
            deltas.append(difference if weight == 1 else difference.mul_(weight))
        else:
            zero = LowRank(torch.zeros(shape[0], 0, device=device)[rows], torch.zeros(0, shape[1], device=device))
            deltas.append(zero.dense().to(wide) if dense else zero)
    return deltas


def merges_by_rows(planned: Plan, job: Job) -> bool:
    """Whether a merged weight is computed a block of rows at a time: of full updates, where the method allows."""
    return METHODS[job.method].rowwise and any(job.slot in one.full for one in planned.updated)


def _merged_weight(planned: Plan, job: Job, read: Read, device: str) -> Tensor:
    """Base plus merged update in the output type, in the base's memory where the type is the same."""
    spec = job.outputs[0]
    base = read(planned.start(job.slot))
    merged = None if merges_by_rows(planned, job) else merged_delta(planned, job, read, device)
    out = base if base.dtype == spec.dtype else torch.empty(spec.shape, dtype=spec.dtype)
    # bit for bit the base where nothing is added: adding 0 would change −0
    keeps = job.adds_nothing or any(isinstance(ref, MappedRef) and ref.keeps for ref in job.reads)
    step = max(1, BLOCK_ENTRIES // spec.shape[1])
    for start in range(0, spec.shape[0], step):
        rows = slice(start, start + step)
        update = merged_delta(planned, job, read, device, rows=rows) if merged is None else merged
        if isinstance(update, LowRank):
            up = update.up if merged is None else update.up[rows]
            total = torch.addmm(base[rows].to(up.device, up.dtype), up, update.down)
            changed = None if not keeps else (up @ update.down) != 0
        else:
            update = update if merged is None else update[rows]
            total = base[rows].to(update.device, update.dtype) + update
            changed = None if not keeps else update != 0
        out[rows] = total if changed is None else torch.where(changed, total, base[rows].to(total.device))
        if not all_finite(out[rows]):
            raise _does_not_fit(spec)
    return out


def _fused(planned: Plan, job: Job, read: Read, device: str) -> Tensor:
    """Several merged weights in the rows of the one tensor that the target stores them as."""
    out = torch.empty(job.outputs[0].shape, dtype=job.outputs[0].dtype)
    for piece in job.pieces:
        merged, done = _merged_weight(planned, piece, read, device), 0
        for begin, end in piece.rows:
            out[begin:end] = merged[done : done + end - begin]
            done += end - begin
    return out


def _averaged(job: Job, read: Read) -> Tensor:
    """Base plus the scaled mean of the weighted updates of some tensors of one shape, by blocks in float64 until the one cast.

    What no update changes is the base's, bit for bit.
    """
    spec, scale = job.outputs[0], job.parameters["scale"]
    base, *tuned = (read(ref).reshape(-1) for ref in job.reads)
    out = torch.empty(spec.shape, dtype=spec.dtype)
    flat = out.view(-1)
    for start in range(0, len(flat), BLOCK_ENTRIES):
        block = slice(start, start + BLOCK_ENTRIES)
        old = base[block].to(torch.float64)
        update = torch.zeros_like(old)
        for weight, one in zip(job.weights, tuned, strict=True):
            assert weight is not None
            update.add_(one[block].to(torch.float64).sub_(old), alpha=weight)
        update.mul_(scale / max(1, len(tuned)))
        flat[block] = _fitted(torch.where(update == 0, old, old + update), spec)
    return out


def _interpolated(planned: Plan, job: Job, read: Read) -> Tensor:
    """A tensor of any shape on its way from the target's to the donors', in float64 until the one cast."""
    target = read(planned.base.refs[job.slot]).to(torch.float64)
    total, donors = target.clone(), planned.taking_part(job)
    for donor, weight in donors:
        if job.slot in donor.full:
            share = job.parameters["alpha"] / len(donors) * weight
            total.add_(read(donor.full[job.slot]).to(torch.float64).sub_(target), alpha=share)
    return _fitted(total, job.outputs[0])


def _fitted(tensor: Tensor, spec: TensorSpec) -> Tensor:
    """The tensor in the type that is written; a value that this type cannot hold is refused."""
    if tensor.dtype == spec.dtype:
        return tensor
    cast = tensor.to(spec.dtype)
    if not all_finite(cast):
        raise _does_not_fit(spec)
    return cast


def _does_not_fit(spec: TensorSpec) -> MethodError:
    return MethodError(
        f"{spec.name}: the merged values do not fit {spec.dtype}; choose a wider output.dtype or a smaller scale"
    )


def survey(planned: Plan) -> dict[str, dict[str, Any]]:
    """What methods must know of the whole model before its first weight, by group of jobs."""
    groups: dict[str, list[Job]] = {}
    for job in planned.surveyed():
        groups.setdefault(job.group, []).append(job)
    found = {}
    for group, jobs in groups.items():
        model = partial(map, partial(_slot_and_deltas, planned), jobs)
        with local.one_thread():
            found[group] = survey_model(jobs[0].method, model, jobs[0].parameters) or {}
    return found


def _slot_and_deltas(planned: Plan, job: Job) -> tuple[str, list[Delta]]:
    return job.slot, specialists_deltas(planned, job, planned.read)

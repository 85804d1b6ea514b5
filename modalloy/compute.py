"""One job to its tensors: base plus merged update, means, interpolations, and what is carried as it is. Pure: no files, no plan."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from modalloy.delta import Delta, LowRank, Scaled, compressed, once, sharing
from modalloy.errors import MethodError, ModalloyError
from modalloy.linalg import FACTOR_ROWS, all_finite, row_blocks
from modalloy.machine.threads import one_thread
from modalloy.methods import METHODS
from modalloy.methods.apply import apply, survey_model
from modalloy.planning.job import Done, Job, Survey
from modalloy.specialists.specialist import StoredLora
from modalloy.storage.scaled import ScaledRef, numbers_of, requantised
from modalloy.storage.tensors import TensorRef
from modalloy.storage.views import MappedRef, TransposedRef
from modalloy.storage.writer import TensorSpec

Read = Callable[[TensorRef], Tensor]  # how a job gets at the data of its inputs
Surveys = Mapping[str, Survey]  # by the jobs' `survey_key`
NO_SURVEYS: Surveys = MappingProxyType({})


def compute(job: Job, read: Read, *, surveys: Surveys = NO_SURVEYS, device: str = "cpu") -> Done:
    """What one job writes, in the order and type of `job.outputs`; the memory of its inputs may be reused.

    `surveys`: what methods must know of the whole model (see `survey`); empty if the plan's need nothing.

    Raises:
        MethodError: the inputs are nothing that the method can merge, or the result does not fit the type written.
    """
    if job.kind in ("merge", "own") and len(job.outputs) == 2:
        return _factors(job, merged_update(job, read, surveys=surveys, device=device))
    if job.kind == "merge":
        return Done([_merged_weight(job, read, surveys, device)])
    if job.kind == "requantise":
        return _requantised(job, compute(job.pieces[0], read, surveys=surveys, device=device).tensors[0], read)
    if job.kind == "fuse" and len(job.outputs) == 2:
        return _stacked(job, read, surveys, device)
    if job.kind == "fuse":
        return Done([_fused(job, read, surveys, device)])
    if job.kind == "interpolate":
        return Done([_interpolated(job, read)])
    if job.kind == "average":
        return Done([_averaged(job, read)])
    if job.kind == "reuse":
        return Done([read(ref) for ref in job.reads], job.parameters)
    assert job.start is not None
    return Done([_fitted(read(job.start), job.outputs[0])])


def compute_several(
    job: Job, read: Read, *, surveys: Sequence[Surveys], names: Sequence[str], device: str = "cpu"
) -> Done:
    """What every piece of several merges gives, as `parts`; equal ones, and what others have in common, are worked out once.

    `surveys`, `names`: those of each merge; whose the pieces are is told by the job.
    """
    given: list[Done] = []
    of = job.parameters["of"]
    own = [surveys[place] for place in of]
    with sharing():
        for index, (piece, told) in enumerate(zip(job.pieces, own, strict=True)):
            same = (before for before in range(index) if (job.pieces[before], own[before]) == (piece, told))
            if (before := next(same, None)) is not None:
                given.append(given[before])
                continue
            copied = {ref for one in (piece, *piece.merges) for ref in _overwritten(one)}
            try:
                given.append(compute(piece, partial(_copied, read, copied), surveys=told, device=device))
            except ModalloyError as error:
                raise type(error)(f"{names[of[index]]}: {error}") from error
    return Done([], parts=tuple(given))


def _copied(read: Read, refs: set[TensorRef], ref: TensorRef) -> Tensor:
    return read(ref).clone() if ref in refs else read(ref)


def _overwritten(job: Job) -> Iterator[TensorRef]:
    """The inputs in whose memory a job may write."""
    if isinstance(job.start, ScaledRef) and job.kind == "requantise":
        yield from (ref for ref in (job.start.codes, job.start.scales) if ref is not None)
    if job.start is not None:
        yield job.start


def survey(jobs: Iterable[Job], read: Read) -> dict[str, Survey]:
    """What methods must know of the whole model before its first weight, by the jobs' `survey_key`."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        if METHODS[job.method].needs_survey(job.parameters):
            groups.setdefault(job.survey_key, []).append(job)
    made = {}
    for key, group in groups.items():
        model = partial(map, lambda job: (job.name, weighted_updates(job, read)), group)
        with one_thread():
            made[key] = survey_model(group[0].method, model, group[0].parameters) or {}
    return made


def merged_update(
    job: Job, read: Read, *, surveys: Surveys = NO_SURVEYS, device: str = "cpu", rows: slice = slice(None)
) -> Delta:
    """The merged update of one linear weight, or of some of its rows where the method allows."""
    n_rows, n_columns = job.shape
    if not any(job.weights):  # no model takes part here
        return LowRank(torch.zeros(n_rows, 0, device=device)[rows], torch.zeros(0, n_columns, device=device))
    method, base = METHODS[job.method], None
    if method.base(job.parameters):
        assert job.start is not None
        base = read(job.start)[rows].to(device, job.wide)
    try:
        return apply(
            job.method,
            _updates(
                job, read, device, rows, weigh=not method.takes("weights"), stored=method.on_cores(job.parameters)
            ),
            job.parameters,
            (n_rows, n_columns),
            slot=job.name,
            fishers=[read(ref).to(device) for ref in job.fishers] or None,
            whole=surveys.get(job.survey_key),
            base=base,
            weights=job.weights,
        )
    except MethodError as error:
        raise MethodError(f"{job.name}: {error}") from error


def weighted_updates(job: Job, read: Read) -> list[Delta]:
    """w_i δ_i of every model that takes part; one that has no update is a zero of rank 0 (`missing: zero`)."""
    updates = _updates(job, read, "cpu", slice(None), weigh=True, stored=False)
    return [update for update in updates if not isinstance(update, Scaled)]


def _updates(job: Job, read: Read, device: str, rows: slice, *, weigh: bool, stored: bool) -> list[Delta | Scaled]:
    """w_i δ_i or δ_i, of some rows; with `stored`, factors as they are stored where all is low-rank and float32 holds them."""
    assert job.start is not None
    stored = stored and not job.has_tuned and job.wide == torch.float32
    deltas: list[Delta | Scaled] = []
    for model, weight in zip(job.models, job.weights if weigh else [1.0] * len(job.models), strict=True):
        if isinstance(model, StoredLora):
            deltas.append(
                once(
                    (model, weight, device, job.wide, rows.start, rows.stop, stored),
                    partial(_update, model, weight, read, device, job.wide, rows, stored),
                )
            )
        elif model is not None:
            tuned, base = read(model)[rows], read(job.start)[rows]
            difference = tuned.to(device, job.wide, copy=True).sub_(base.to(device, job.wide))
            deltas.append(difference if weight == 1 else difference.mul_(weight))
        else:
            n_rows, n_columns = job.shape
            deltas.append(
                LowRank(torch.zeros(n_rows, 0, device=device)[rows], torch.zeros(0, n_columns, device=device))
            )
    return deltas


def _update(
    model: StoredLora, weight: float, read: Read, device: str, wide: torch.dtype, rows: slice, stored: bool
) -> LowRank | Scaled:
    whole = model.delta(read)
    update = Scaled(LowRank(whole.update.up[rows].to(device), whole.update.down.to(device)), whole.scale)
    if stored and update.is_narrow:
        return replace(update, scale=weight * update.scale)
    applied = update.applied().to(wide)
    return applied if weight == 1 else weight * applied


def _factors(job: Job, merged: Delta) -> Done:
    """The merged update as the two factors of an adapter, cut or filled up to the adapter's one rank."""
    lost: dict[str, float] = {}
    rank = job.outputs[0].shape[0]
    if not isinstance(merged, LowRank) or merged.rank > rank:
        merged, lost[job.name] = compressed(merged, rank)
    fill = rank - merged.rank  # zero columns and rows, so that every layer has the same rank
    up = torch.nn.functional.pad(merged.up, (0, fill)).cpu()
    down = torch.nn.functional.pad(merged.down, (0, 0, 0, fill)).cpu()
    return Done([_fitted(tensor, spec) for tensor, spec in zip((down, up), job.outputs, strict=True)], lost)


def _requantised(job: Job, numbers: Tensor, read: Read) -> Done:
    """A weight, or every expert's, as codes and scales, and how far from it these are; the base's own where it is the base's."""
    ref = job.start
    assert isinstance(ref, ScaledRef) and ref.codes is not None and ref.scales is not None
    codes, scales = read(ref.codes), read(ref.scales)
    before = numbers_of(codes, scales, ref)  # what was read of it holds the merged weight by now
    parts = [(job.name, ref, numbers, before, codes, scales)]
    if numbers.dim() == 3:
        of_each = zip(numbers, before, codes, scales, strict=True)
        parts = [(f"{job.name}[{index}]", ref.one(index), *own) for index, own in enumerate(of_each)]
    lost = {}
    for name, like, matrix, old, own_codes, own_scales in parts:
        if torch.equal(matrix, old):
            continue
        for kept, new in zip((own_codes, own_scales), requantised(matrix, like), strict=True):
            kept.copy_(new)
        distance, size = float(numbers_of(own_codes, own_scales, like).sub_(matrix).norm()), float(matrix.norm())
        lost[name] = distance / size if size else 0.0
    return Done([codes, scales], lost)


def _stacked(job: Job, read: Read, surveys: Surveys, device: str) -> Done:
    """The factors of every expert's update, in the two matrices that PEFT has of them (see `specialists/stacked.py`)."""
    down, up = (torch.empty(spec.shape, dtype=spec.dtype) for spec in job.outputs)
    count, lost = len(job.pieces), dict[str, float]()
    rank = len(down) // count
    for index, piece in enumerate(job.pieces):
        done = _factors(piece, merged_update(piece, read, surveys=surveys, device=device))
        a, b = done.tensors
        if a.shape[1] != down.shape[1]:  # experts are stored the other way round than PEFT takes them
            a, b = b.T, a.T
        down[index * rank : (index + 1) * rank], up[:, index::count] = a, b
        lost |= done.compression
    return Done([down, up], lost)


def _merged_weight(job: Job, read: Read, surveys: Surveys, device: str) -> Tensor:
    """Base plus merged update in the output type, in the base's memory where the type is the same."""
    assert job.start is not None
    spec, base = job.outputs[0], read(job.start)
    # of full updates a block of rows at a time, where the method allows
    by_rows = METHODS[job.method].rowwise and job.has_tuned
    merged = None if by_rows else merged_update(job, read, surveys=surveys, device=device)
    out = base if base.dtype == spec.dtype else torch.empty(spec.shape, dtype=spec.dtype)
    # bit for bit the base where nothing is added: adding 0 would change −0
    keeps = job.adds_nothing or any(isinstance(ref, MappedRef) and ref.keeps for ref in job.reads)
    for rows in row_blocks(spec.shape, 1 if merged is None else FACTOR_ROWS):
        update = merged_update(job, read, surveys=surveys, device=device, rows=rows) if merged is None else merged
        if isinstance(update, LowRank):
            up = update.up if merged is None else update.up[rows]
            total = base[rows].to(up.device, up.dtype, copy=True).addmm_(up, update.down)
            changed = None if not keeps else (up @ update.down) != 0
        else:
            update = update if merged is None else update[rows]
            total = base[rows].to(update.device, update.dtype) + update
            changed = None if not keeps else update != 0
        out[rows] = total if changed is None else torch.where(changed, total, base[rows].to(total.device))
        if not all_finite(out[rows]):
            raise _does_not_fit(spec)
    return out


def _fused(job: Job, read: Read, surveys: Surveys, device: str) -> Tensor:
    """Several merged weights in the rows of the one tensor that the target stores them as."""
    out = torch.empty(job.outputs[0].shape, dtype=job.outputs[0].dtype)
    rows = out.view(-1, out.shape[-1])  # of experts, one after another
    for piece in job.pieces:
        merged, done = _merged_weight(piece, read, surveys, device), 0
        if isinstance(piece.start, TransposedRef):
            merged = merged.T
        for begin, end in piece.rows:
            rows[begin:end] = merged[done : done + end - begin]
            done += end - begin
    return out


def _averaged(job: Job, read: Read) -> Tensor:
    """Start plus the scaled mean of the weighted updates of tensors of one shape, by blocks in float64 until the one cast.

    What no update changes is the start's, bit for bit.
    """
    spec, scale = job.outputs[0], job.parameters["scale"]
    base, *tuned = (read(ref).reshape(-1) for ref in job.reads)
    out = torch.empty(spec.shape, dtype=spec.dtype)
    for block in row_blocks([out.numel()]):
        old = base[block].to(torch.float64)
        update = torch.zeros_like(old)
        for weight, one in zip(job.weights, tuned, strict=True):
            update.add_(one[block].to(torch.float64).sub_(old), alpha=weight)
        update.mul_(scale / max(1, len(tuned)))
        out.view(-1)[block] = _fitted(torch.where(update == 0, old, old + update), spec)
    return out


def _interpolated(job: Job, read: Read) -> Tensor:
    """A tensor of any shape on its way from the target's to the donors', by blocks in float64 until the one cast."""
    assert job.start is not None
    spec, start = job.outputs[0], read(job.start).reshape(-1)
    shares = [job.parameters["alpha"] / len(job.models) * weight for weight in job.weights]
    donors = [
        (read(donor).reshape(-1), share)
        for donor, share in zip(job.models, shares, strict=True)
        if isinstance(donor, TensorRef)
    ]
    out = torch.empty(spec.shape, dtype=spec.dtype)
    for block in row_blocks([out.numel()]):
        target = start[block].to(torch.float64)
        total = target.clone()
        for donor, share in donors:
            total.add_(donor[block].to(torch.float64).sub_(target), alpha=share)
        out.view(-1)[block] = _fitted(total, spec)
    return out


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

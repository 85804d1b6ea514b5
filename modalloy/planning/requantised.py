"""A full model that stores its weights as its base does: as FP8 codes and scales (`output.requantize`)."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from modalloy.errors import RecipeError
from modalloy.planning.job import Job
from modalloy.storage.scaled import ScaledRef, is_scaled
from modalloy.storage.tensors import Checkpoint, TensorRef
from modalloy.storage.writer import TensorSpec


def as_stored(base: Checkpoint, jobs: Sequence[Job]) -> list[Job]:
    """The jobs of a full model, of which those of codes and scales write such again; what nothing changes is kept as it is.

    Raises:
        RecipeError: the base has no codes and scales.
    """
    if not is_scaled(base.refs):
        raise RecipeError(
            f"output.requantize: {base.folder.name} has no FP8 weights whose scheme could be used; leave it out"
        )
    found: list[Job] = []
    for job in jobs:
        ref = base.refs[job.name]
        if not isinstance(ref, ScaledRef) or ref.codes is None or ref.scales is None:
            found.append(job)
        elif job.kind == "keep":
            found += [_kept(ref.codes), _kept(ref.scales)]
        else:
            specs = tuple(TensorSpec(one.name, one.dtype, one.shape) for one in (ref.codes, ref.scales))
            found.append(Job("requantise", job.name, specs, ref, pieces=(_in_float32(job),)))
    return found + [_kept(ref) for ref in _beside(base)]


def _kept(ref: TensorRef) -> Job:
    return Job("keep", ref.name, (TensorSpec(ref.name, ref.dtype, ref.shape),), ref)


def _in_float32(job: Job) -> Job:
    """The job with its weight in float32, and no rounding before that to codes."""
    outputs = tuple(replace(spec, dtype=torch.float32) for spec in job.outputs)
    return replace(job, outputs=outputs, pieces=tuple(_in_float32(piece) for piece in job.pieces))


def _beside(base: Checkpoint) -> Iterator[TensorRef]:
    """What a base stores for running its codes: scales of activations."""
    scales = {ref.scales.name for ref in base.refs.values() if isinstance(ref, ScaledRef) and ref.scales is not None}
    return (ref for name, ref in base.codes.items() if name not in base.refs and name not in scales)

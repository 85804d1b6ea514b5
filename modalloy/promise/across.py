"""What every tensor of a merge across architectures must be, by the plan's map of its models."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from modalloy.promise.promise import Promise, Update
from modalloy.specialists.specialist import StoredLora
from modalloy.storage.tensors import TensorRef

if TYPE_CHECKING:
    from modalloy.planning.job import Job
    from modalloy.planning.plan import Plan


def promises_across(planned: "Plan") -> Iterator[Promise]:
    """What every tensor of a merge across architectures must be, by the plan's map of its models: here only the arithmetic
    is worked out again."""
    interpolates = planned.base is None
    for job in planned.jobs:
        name, start = job.outputs[0].name, job.start
        if job.pieces or job.kind == "merge":
            yield from (replace(_piece(piece, name), interpolates=interpolates) for piece in job.merges)
            continue
        assert start is not None
        if job.kind in ("keep", "carry"):
            yield Promise("kept" if job.kind == "keep" else "carried", name, (name,), start)
        else:
            factor = job.parameters["scale" if job.kind == "average" else "alpha"]
            yield Promise("averaged", name, (name,), start, _updates(job), factor=factor)


def _piece(job: "Job", name: str) -> Promise:
    """A merged weight, or one of several in the rows of one tensor."""
    assert job.start is not None
    return Promise("merged", job.name, (name,), job.start, _updates(job), job.method, job.parameters, rows=job.rows)


def _updates(job: "Job") -> tuple[Update, ...]:
    """The updates of those that take part."""
    found = []
    for model, weight in zip(job.models, job.weights, strict=True):
        pair = (model.a, model.b, model.scale) if isinstance(model, StoredLora) else None
        found.append(Update(weight, model if isinstance(model, TensorRef) else None, pair))
    return tuple(found)

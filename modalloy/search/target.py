"""Candidates of a merge across architectures, served in memory: the target, given the tensors of one merge after another."""

import zlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from modalloy.checkpoints import read_json
from modalloy.engines.local import one_thread
from modalloy.errors import RecipeError
from modalloy.linalg import BLOCK_ENTRIES
from modalloy.merge import compute, survey
from modalloy.model.chat import ChatModel
from modalloy.model.load import Stored
from modalloy.plan import Job, Plan, plan
from modalloy.search.candidates import SKETCHED, directions
from modalloy.search.space import Changes, applied

Loader = Callable[[Plan, dict[str, Stored]], ChatModel]


class LoadedTarget:
    """Candidates that a loader of the caller's makes a model of, each anew.

    The loader gets the plan of a candidate and all tensors of its checkpoint by name; each is read or computed at `[...]`,
    and is what a merge would write, to the bit. What a merge does not change at all is not loaded again.
    """

    def __init__(self, planned: Plan, load: Loader, *, allow_base_mismatch: bool) -> None:
        self.planned, self.load, self.allow_base_mismatch = planned, load, allow_base_mismatch
        self.chat: ChatModel
        self.is_target = False
        self.serve_parent()

    def serve(self, changes: Changes) -> list[float]:
        """Load the merge of a candidate; returns its sketch, all zero for the target itself."""
        planned = candidate(self.planned, changes, self.allow_base_mismatch)
        changed = {spec.name for job in planned.jobs if changes_target(planned, job) for spec in job.outputs}
        if not changed:
            self.serve_parent()
            return [0.0] * SKETCHED
        sketches: dict[str, Tensor] = {}

        def read(job: Job, index: int) -> Tensor:
            with one_thread():
                tensor = compute(planned, job, planned.read)[index]
                if (name := job.outputs[index].name) in changed and name not in sketches:
                    sketches[name] = sketch_of(planned, name, tensor)
            return tensor

        tensors = {
            spec.name: Stored(partial(read, job, index), spec.dtype)
            for job in planned.jobs
            for index, spec in enumerate(job.outputs)
        }
        self._load(planned, tensors)
        self.is_target = False
        for name in changed - sketches.keys():  # what the loader has no use for
            tensors[name].read()
        return summed(sketches)

    def serve_parent(self, index: int = 0) -> None:
        """Load the target itself."""
        if not self.is_target:
            read = self.planned.read
            refs = self.planned.base.refs
            self._load(self.planned, {name: Stored(partial(read, ref), ref.dtype) for name, ref in refs.items()})
            self.is_target = True

    def _load(self, planned: Plan, tensors: dict[str, Stored]) -> None:
        if hasattr(self, "chat"):
            del self.chat  # so that two models need not fit
        self.chat = self.load(planned, tensors)


def serve_target(
    planned: Plan, load: Loader | None, *, device: str, dtype: str, allow_base_mismatch: bool
) -> LoadedTarget:
    """What serves the candidates of a plan with a target."""
    assert load is not None
    return LoadedTarget(planned, load, allow_base_mismatch=allow_base_mismatch)


def target_senses(planned: Plan, load: Loader | None) -> tuple[str, ...] | None:
    """The modalities that candidates can be asked about; None where only the caller's loader knows.

    Raises:
        RecipeError: modalloy does not run the target's architecture, and there is no loader.
    """
    if load is not None:
        return None
    found = ", ".join(read_json(planned.base_folder / "config.json").get("architectures") or ["nothing"])
    raise RecipeError(
        f"target: {planned.base_name} is a {found}, which can be merged but not run here; write the merge of a few alphas "
        "with modalloy merge and ask them with their own code, or give search(…, load=…) a function that loads it"
    )


def candidate(planned: Plan, changes: Changes, allow_base_mismatch: bool) -> Plan:
    """The plan of a candidate, ready to be computed."""
    found = plan(applied(planned.recipe, changes), allow_base_mismatch=allow_base_mismatch)
    found.surveys = survey(found)
    return found


def changes_target(planned: Plan, job: Job) -> bool:
    """Whether what a job writes may be other than the target's."""
    return job.kind != "keep" or any(spec.dtype != planned.base.refs[spec.name].dtype for spec in job.outputs)


def sketch_of(planned: Plan, name: str, merged: Tensor) -> Tensor:
    """Numbers (SKETCHED,) that stand for what a merge changes in one tensor, as `candidates.directions` makes them."""
    rows, columns = (len(merged), merged[0].numel()) if merged.ndim > 1 else (1, merged.numel())
    target, merged = planned.read(planned.base.refs[name]).reshape(rows, columns), merged.reshape(rows, columns)
    x, y = directions(rows, columns, zlib.crc32(name.encode()))
    total = torch.zeros(SKETCHED, dtype=torch.float64)
    step = max(1, BLOCK_ENTRIES // columns)
    for begin in range(0, rows, step):
        block = slice(begin, begin + step)
        difference = merged[block].float() - target[block].float()
        total += ((difference @ x).double() * y[block].double()).sum(0)
    return total


def summed(sketches: dict[str, Tensor]) -> list[float]:
    """The sketch of a whole model from those of the tensors that are changed, all zero where none is."""
    total = torch.zeros(SKETCHED, dtype=torch.float64)
    for name in sorted(sketches):
        total += sketches[name]
    return total.tolist()

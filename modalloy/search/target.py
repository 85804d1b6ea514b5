"""Candidates of a merge across architectures, served in memory: the target, given the tensors of one merge after another."""

import zlib
from collections.abc import Callable, Set
from functools import partial

import torch
from torch import Tensor

from modalloy.compute import Surveys, compute
from modalloy.errors import CheckpointError, RecipeError
from modalloy.linalg import row_blocks
from modalloy.machine.threads import one_thread
from modalloy.model.chat import ChatModel
from modalloy.model.hosted import HostedModel, able, is_hosted, open_processor, places
from modalloy.model.load import COMPUTED, Stored, is_language_model, load_model
from modalloy.planning.job import Job
from modalloy.planning.plan import Plan
from modalloy.search.candidates import SKETCHED, candidate, directions, in_parallel
from modalloy.search.space import Changes
from modalloy.storage.config import read_config

Loader = Callable[[Plan, dict[str, Stored]], ChatModel]


class PlacedTarget:
    """Candidates in the memory of the target, which is loaded once: of each merge, what it changes is computed and put there.

    The parameters are those of a merge that was written and loaded, to the bit.
    """

    def __init__(self, planned: Plan, *, device: str, dtype: str, allow_base_mismatch: bool) -> None:
        self.planned, self.allow_base_mismatch = planned, allow_base_mismatch
        self.chat = load_model(planned.target.folder, device=device, dtype=dtype)
        within = "" if isinstance(self.chat, HostedModel) else "decoder."
        shapes = {within + name: ref.shape for name, ref in planned.target.refs.items() if not COMPUTED.fullmatch(name)}
        self.places = {name.removeprefix(within): place for name, place in places(self.chat.model, shapes).items()}
        self.changed: set[str] = set()  # tensors in memory that are not the target's

    def put(self, changes: Changes) -> list[float]:
        """Put the merge of a candidate in the target's place; returns its sketch, all zero for the target itself."""
        planned, surveys = candidate(self.planned, changes, self.allow_base_mismatch)
        changed = _changed(planned)
        wanted = changed | self.changed
        jobs = [job for job in planned.jobs if any(spec.name in wanted for spec in job.outputs)]
        self.changed = wanted  # until all is put in its place
        sketches: dict[str, Tensor] = {}
        for job, (tensors, own) in in_parallel(partial(_merged, planned, surveys, changed), jobs):
            for spec, tensor in zip(job.outputs, tensors, strict=True):
                self._put(spec.name, tensor)
            sketches |= own
        self.changed = changed
        return _summed(sketches)

    def put_parent(self, index: int = 0) -> None:
        """Put the target back."""
        for name in sorted(self.changed):
            self._put(name, self.planned.inputs.read(self.planned.target.refs[name]))
        self.changed = set()

    def _put(self, name: str, tensor: Tensor) -> None:
        if name not in self.places:
            raise CheckpointError(
                f"{self.planned.target_name}: transformers makes another tensor of {name} when it loads it, so that it cannot be "
                "replaced in memory; give search(…, load=…) a function that loads the model"
            )
        self.places[name].data.copy_(tensor)


class LoadedTarget:
    """Candidates that a loader of the caller's makes a model of, each anew.

    The loader gets the plan of a candidate and all tensors of its checkpoint by name. `tensors[name][...]` reads or computes
    one tensor, bit for bit what a merge would write. If the candidate changes nothing, the target stays loaded.
    """

    def __init__(self, planned: Plan, load: Loader, *, allow_base_mismatch: bool) -> None:
        self.planned, self.load, self.allow_base_mismatch = planned, load, allow_base_mismatch
        self.chat: ChatModel
        self.is_target = False
        self.put_parent()

    def put(self, changes: Changes) -> list[float]:
        """Load the merge of a candidate; returns its sketch, all zero for the target itself."""
        planned, surveys = candidate(self.planned, changes, self.allow_base_mismatch)
        changed = _changed(planned)
        if not changed:
            self.put_parent()
            return _summed({})
        sketches: dict[str, Tensor] = {}

        def read(job: Job, index: int) -> Tensor:
            with one_thread():
                tensors, own = _merged(planned, surveys, changed - sketches.keys(), job, None)
            sketches.update(own)
            return tensors[index]

        tensors = {
            spec.name: Stored(partial(read, job, index), spec.dtype, spec.shape)
            for job in planned.jobs
            for index, spec in enumerate(job.outputs)
        }
        self._load(planned, tensors, is_target=False)
        for name in sorted(changed - sketches.keys()):  # what the loader has no use for
            tensors[name].read()
        return _summed(sketches)

    def put_parent(self, index: int = 0) -> None:
        """Load the target itself."""
        if not self.is_target:
            read, refs = self.planned.inputs.read, self.planned.target.refs
            stored = {name: Stored(partial(read, ref), ref.dtype, ref.shape) for name, ref in refs.items()}
            self._load(self.planned, stored, is_target=True)

    def _load(self, planned: Plan, tensors: dict[str, Stored], *, is_target: bool) -> None:
        if hasattr(self, "chat"):
            del self.chat  # so that two models need not fit
        self.chat, self.is_target = self.load(planned, tensors), is_target


def target_bench(
    planned: Plan, load: Loader | None, *, device: str, dtype: str, allow_base_mismatch: bool
) -> PlacedTarget | LoadedTarget:
    """What serves the candidates of a plan with a target: the caller's loader where there is one, else modalloy."""
    if load is not None:
        return LoadedTarget(planned, load, allow_base_mismatch=allow_base_mismatch)
    return PlacedTarget(planned, device=device, dtype=dtype, allow_base_mismatch=allow_base_mismatch)


def target_senses(planned: Plan, load: Loader | None) -> tuple[str, ...] | None:
    """The modalities that candidates can be asked about; None where only the caller's loader knows.

    Raises:
        CheckpointError: the target's processor cannot be opened.
        RecipeError: modalloy does not run the target's architecture, and there is no loader.
    """
    config = read_config(planned.target.folder)
    if load is not None:
        return None
    if is_hosted(config):
        return able(open_processor(planned.target.folder), config)
    if is_language_model(config):
        return ()
    found = ", ".join(config.get("architectures") or ["no architecture"])
    raise RecipeError(
        f"target: {planned.target_name} is a {found}, which modalloy can merge but not run; merge some values of alpha and "
        "ask them with that model's own code, or give search(…, load=…) a function that loads it (in Python)"
    )


def _changed(planned: Plan) -> set[str]:
    """Names of the tensors that a merge writes otherwise than the target has them."""
    refs = planned.target.refs
    return {
        spec.name
        for job in planned.jobs
        for spec in job.outputs
        if job.kind != "keep" or spec.dtype != refs[spec.name].dtype
    }


def _merged(
    planned: Plan, surveys: Surveys, changed: Set[str], job: Job, _: None
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What a merge writes of one job, and the sketches of what of it is changed."""
    tensors = compute(job, planned.inputs.read, surveys=surveys).tensors
    own = zip((spec.name for spec in job.outputs), tensors, strict=True)
    return tensors, {name: _sketch(planned, name, tensor) for name, tensor in own if name in changed}


def _sketch(planned: Plan, name: str, merged: Tensor) -> Tensor:
    """Numbers (SKETCHED,) that stand for what a merge changes in one tensor, as `candidates.directions` makes them."""
    rows, columns = (len(merged), merged[0].numel()) if merged.ndim > 1 else (1, merged.numel())
    target, merged = (
        planned.inputs.read(planned.target.refs[name]).reshape(rows, columns),
        merged.reshape(rows, columns),
    )
    x, y = directions(rows, columns, zlib.crc32(name.encode()))
    total = torch.zeros(SKETCHED, dtype=torch.float64)
    for block in row_blocks((rows, columns)):
        difference = merged[block].float() - target[block].float()
        total += ((difference @ x).double() * y[block].double()).sum(0)
    return total


def _summed(sketches: dict[str, Tensor]) -> list[float]:
    """The sketch of a whole model from those of the tensors that are changed, all zero where none is."""
    total = torch.zeros(SKETCHED, dtype=torch.float64)
    for name in sorted(sketches):
        total += sketches[name]
    return total.tolist()

"""Candidates served in memory: one model is loaded, and its text path is set to one merge after another. Nothing is written."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from modalloy.compute import Surveys, compute, survey, weighted_updates
from modalloy.delta import Delta, LowRank, Restore, lift
from modalloy.engines import local
from modalloy.errors import RecipeError
from modalloy.machine.cores import default_workers
from modalloy.methods.ssam import aligned
from modalloy.model.chat import ChatModel
from modalloy.model.load import load_planned
from modalloy.model.routing import TEXT, RoutedLinear
from modalloy.planning.job import Job
from modalloy.planning.plan import Plan
from modalloy.planning.planner import plan
from modalloy.search.space import Changes, applied
from modalloy.specialists.specialist import StoredLora
from modalloy.storage.tensors import TensorRef

Result = TypeVar("Result")

SKETCHED = 64  # numbers that stand for a merged update


class RoutedBench:
    """One model in memory that is given one text path after another.

    The tensors of a candidate are those that a merge would write, to the bit; by ssam to rounding, for there one
    decomposition serves every λ and k. It is kept: about as much memory as the specialists' text updates take.
    """

    def __init__(self, planned: Plan, *, device: str, dtype: str, allow_base_mismatch: bool) -> None:
        if cut := next((one.label for one in planned.specialists if one.own_rank is not None), None):
            raise RecipeError(
                f"{cut} specialist: own: {{rank: …}} is not served in memory; leave it out for the search, which does not vary it"
            )
        self.planned, self.allow_base_mismatch = planned, allow_base_mismatch
        self.chat: ChatModel = load_planned(planned, device=device, dtype=dtype)
        self.kept: dict[str, Aligned] = {}  # by weight

    def put(self, changes: Changes) -> list[float]:
        """Set the text path to the merge of a candidate; returns its `sketch`."""
        planned, surveys = candidate(self.planned, changes, self.allow_base_mismatch)
        work = partial(_merged, planned, surveys, self.kept)
        shared = (job for job in planned.jobs if job.kind == "average")
        self._share((job.name, compute(job, planned.inputs.read).tensors[0]) for job in shared)
        return self._set((job.name, tensors) for job, tensors in in_parallel(work, planned.merges()))

    def put_parent(self, index: int) -> None:
        """Set the text path to that of one specialist: the model is then that specialist, for its own sense."""
        work = partial(_parent, self.planned, index)
        tuned, base, read = self.planned.specialists[index].tuned, self.planned.target.refs, self.planned.inputs.read
        names = [job.name for job in self.planned.jobs if job.kind == "average"]
        self._share((name, read(tuned.get(name, base[name]))) for name in names)
        self._set((job.name, [tensor]) for job, tensor in in_parallel(work, self.planned.merges()))

    @torch.no_grad()
    def _share(self, found: Iterable[tuple[str, Tensor]]) -> None:
        """Give the decoder's norms and biases, which all tokens share, their values."""
        for name, tensor in found:
            self.chat.model.decoder.get_parameter(name).copy_(tensor)

    def _set(self, found: Iterator[tuple[str, list[Delta]]]) -> list[float]:
        """Replace the text path by one update, or one whole weight, for every linear."""
        linears = self.chat.model.linears
        for linear in linears.values():
            linear.remove(TEXT)
            linear.text_weight = None
        total = torch.zeros(SKETCHED, dtype=torch.float64)
        for number, (slot, given) in enumerate(found):
            linear, (update,) = linears[slot], given
            like = linear.weight
            if isinstance(update, LowRank):
                linear.add(TEXT, LowRank(update.up.to(like), update.down.to(like)))
            else:
                linear.text_weight = nn.Parameter(update.to(like), requires_grad=False)
            total += _sketch(linear, number)
        return total.tolist()


def candidate(planned: Plan, changes: Changes, allow_base_mismatch: bool) -> tuple[Plan, Surveys]:
    """The plan of a candidate, and the surveys that its jobs need."""
    changed = plan(applied(planned.recipe, changes), allow_base_mismatch=allow_base_mismatch, idle=planned.idle)
    return changed, survey(changed.merges(), changed.inputs.read)


def in_parallel(work: Callable[[Job, None], Result], jobs: Sequence[Job]) -> Iterator[tuple[Job, Result]]:
    """The work of every job, in their order."""
    with closing(local.in_order(jobs, lambda job: None, work, default_workers())) as results:
        yield from results


@dataclass(frozen=True)
class Aligned:
    """ssam's decomposition of one weight at the largest k and λ = 1, in the coordinates of its cores."""

    models: tuple[StoredLora | TensorRef | None, ...]  # whose updates, and their factors
    weights: tuple[float, ...]
    U: Tensor
    core: Tensor
    V: Tensor
    restore: Restore

    def merged(self, k: int, scale: float, dtype: torch.dtype) -> LowRank:
        """The merged update of rank k, multiplied by λ."""
        U, core, V = self.U[:, :k], scale * self.core[:k, :k], self.V[:, :k]
        return self.restore(LowRank(U, core @ V.T), dtype)


def _merged(planned: Plan, surveys: Surveys, kept: dict[str, Aligned], job: Job, _: None) -> list[Delta]:
    """What a merge writes for one weight: its update, or the whole weight."""
    read = planned.inputs.read
    if not _nests(planned, job):
        tensors = compute(job, read, surveys=surveys).tensors
        return [LowRank(tensors[1], tensors[0])] if len(tensors) == 2 else list(tensors)
    found = kept.get(job.name)
    if found is None or (found.models, found.weights) != (job.models, job.weights):
        deltas = [delta for delta in weighted_updates(job, read) if isinstance(delta, LowRank)]
        cores, restore = lift(deltas)
        found = Aligned(job.models, job.weights, *aligned(cores, cores, max(cores[0].shape)), restore)
        kept[job.name] = found
    update = found.merged(job.parameters["rank"], job.parameters["scale"], job.wide)
    return [update.to(job.outputs[0].dtype)]


def _nests(planned: Plan, job: Job) -> bool:
    """Whether all λ and k of a merge come from one decomposition: ssam as published, of low-rank updates."""
    chosen = job.parameters
    return (
        job.method == "ssam"
        and chosen["balance"] == chosen["match"] == "none"
        and chosen["rank"] >= 1
        and planned.recipe.output.compress_rank is None
        and not job.has_tuned
    )


def _parent(planned: Plan, index: int, job: Job, _: None) -> Delta:
    """One specialist's own update of a weight, or its whole weight."""
    specialist, read = planned.specialists[index], planned.inputs.read
    if job.name in specialist.tuned:
        return read(specialist.tuned[job.name])
    return weighted_updates(replace(job, models=(specialist.text_lora.get(job.name),), weights=(1.0,)), read)[0]


def _sketch(linear: RoutedLinear, seed: int) -> Tensor:
    """Numbers yᵀ ΔW x (SKETCHED,) for fixed random x and y: the mean square of their sum over the weights is Σ ‖ΔW‖².

    So the distance of two merges is that of their sketches, to a tenth, and 0 for equal ones.
    """
    x, y = (side.to(linear.weight.device) for side in directions(linear.out_features, linear.in_features, seed))
    if linear.text_weight is not None:
        product = (linear.text_weight.float() - linear.weight.float()) @ x
    else:
        product = linear.update(TEXT).to(torch.float32) @ x
    return (product.double() * y.double()).sum(0).cpu()


def directions(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random x (columns, SKETCHED) and y (rows, SKETCHED) of a weight's sketch."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(columns, SKETCHED, generator=generator)
    return x, torch.randn(rows, SKETCHED, generator=generator)


def distance(a: list[float], b: list[float]) -> float:
    """About ‖ΔW_a − ΔW_b‖ (Frobenius, over all weights) from two sketches."""
    difference = torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)
    return float(difference.square().mean().sqrt())

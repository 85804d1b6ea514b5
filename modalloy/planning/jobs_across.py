"""Works out what a merge across architectures does, as `modalloy.planning.jobs` does for models of one architecture."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from modalloy.errors import RecipeError
from modalloy.families.mapping import ModelMap
from modalloy.planning.choices import Choices, layers
from modalloy.planning.job import Fate, Job, TensorFate
from modalloy.planning.mapped import Across
from modalloy.recipe import Recipe
from modalloy.specialists.specialist import Specialist, StoredLora
from modalloy.storage.tensors import Checkpoint, TensorRef
from modalloy.storage.writer import TensorSpec

FATES: dict[str, Fate] = {"merge": "merged", "interpolate": "merged", "fuse": "merged", "average": "averaged"}


class AcrossPlanner(Choices):
    """Jobs and fates of donors that are merged into a target of another architecture.

    Without a base, all that has a counterpart moves towards it: linear weights, norms, biases, embeddings of the same tokens.
    With a base, the method merges the updates of linear weights, each by itself where the target stores several as one
    tensor, and the target counts as one of the models; whatever else has a counterpart is averaged.
    """

    def __init__(
        self, recipe: Recipe, target: Checkpoint, donors: list[Specialist], across: Across, absent: Mapping[int, str]
    ) -> None:
        super().__init__(recipe, target, absent, own=int(across.base is not None))
        self.donors, self.across = donors, across
        self.reasons = {donors[index].label: reason for index, reason in absent.items()}
        mapped = (name for found in across.maps.values() for name, one in found.tensors.items() if one.pieces)
        self.depth = layers(mapped)  # of the decoder
        self.jobs = [self._job(name) for name in target.refs]

    def all_jobs(self) -> list[Job]:
        """One job for every tensor of the target, in its order."""
        return self.jobs

    def _job(self, name: str) -> Job:
        spec, own = self._like_base(name), self.base.refs[name]
        takes_source = self._policy(name) == "take_source"
        if not takes_source and not any(found.tensors[name].pieces for found in self.across.maps.values()):
            return Job("keep", name, (spec,), own)  # before its depth is asked for: it may be in no layer
        counterparts = [
            (donor.tuned[name], weight)
            for donor, weight in zip(self.donors, self._weights(name), strict=True)
            if name in donor.tuned and weight != 0
        ]
        if takes_source:
            if len(counterparts) != 1:
                raise RecipeError(
                    f"modules: policy take_source of {name} needs one donor, {len(counterparts)} have it; keep the target's by "
                    "a rule above it with policy: keep, or write a narrower pattern"
                )
            return Job("carry", name, (spec,), counterparts[0][0])
        method, written = self._method(name)
        if self.across.base is not None:
            if name not in self.across.parts:
                return self._averaged(name, spec, counterparts)
            return self._fused(name, spec, method, self._resolved(method, written, name))
        parameters = self._resolved(method, written, name)
        if parameters["alpha"] == 0 or not counterparts:  # whose bytes stay the target's
            return Job("keep", name, (spec,), own, method=method, parameters=parameters)
        kind: Literal["merge", "interpolate"] = "merge" if len(own.shape) == 2 else "interpolate"
        models = self._taking_part(name, self.donors, self._shares(name, method, parameters))
        return Job(kind, name, (spec,), own, *models, method, parameters, self.wide)

    def _taking_part(
        self, slot: str, models: Sequence[Specialist], shares: Sequence[float | None]
    ) -> tuple[tuple[StoredLora | TensorRef | None, ...], tuple[float, ...], tuple[str, ...]]:
        """The updates of those that take part in a merge, their factors, and their labels."""
        chosen = [(model, share) for model, share in zip(models, shares, strict=True) if share is not None]
        updates = tuple(model.text_lora.get(slot) or model.tuned.get(slot) for model, _ in chosen)
        return updates, tuple(share for _, share in chosen), tuple(model.label for model, _ in chosen)

    def _averaged(self, name: str, spec: TensorSpec, counterparts: list[tuple[TensorRef, float]]) -> Job:
        """The mean of the updates of target and donors; of a tensor that θ_0 has not, of the donors' distances to the target."""
        refs, weights = tuple(ref for ref, _ in counterparts), tuple(weight for _, weight in counterparts)
        own, factor = self.base.refs[name], self._mean_factor(name, (1.0, *weights))
        if start := self.across.vectors.get(name):
            return Job("average", name, (spec,), start, (own, *refs), (1.0, *weights), parameters={"scale": factor})
        if not counterparts:
            return Job("keep", name, (spec,), own)
        share = {"scale": factor * len(refs) / (1 + len(refs))}  # the target counts, and its own distance is 0
        return Job("average", name, (spec,), own, refs, weights, parameters=share)

    def _fused(self, name: str, spec: TensorSpec, method: str, parameters: dict[str, Any]) -> Job:
        """The merges of the linear weights in a tensor of the target."""
        across = self.across
        assert across.target is not None
        models, shares = (across.target, *self.donors), (1.0, *self._shares(name, method, parameters))
        self._check_number(name, method, shares)
        pieces, parts = [], across.parts[name]
        for slot, rows in parts:
            output = TensorSpec(name, spec.dtype, across.starts[slot].shape)
            taking_part = self._taking_part(slot, models, shares)
            job = Job("merge", slot, (output,), across.starts[slot], *taking_part, method, parameters, self.wide)
            if len(parts) == 1:
                return job
            pieces.append(replace(job, rows=rows))
        return Job("fuse", name, (spec,), pieces=tuple(pieces))

    def fates(self) -> list[TensorFate]:
        """The fate of every tensor of the target, of every donor and of the base."""
        changing = {job.outputs[0].name: job for job in self.jobs if job.kind != "keep"}
        result = [TensorFate("target", name, *self._of_target(name, changing.get(name))) for name in self.base.refs]
        for donor in self.donors:
            result += self._of_donor(donor, changing)
        return result + self._of_base()

    def _of_target(self, name: str, job: Job | None) -> tuple[Fate, str]:
        tensors = [found.tensors[name] for found in self.across.maps.values()]
        if job is None:
            reasons = dict.fromkeys(tensor.reason for tensor in tensors if tensor.reason)
            return "kept", ", ".join(reasons) or "alpha: 0"
        operations = dict.fromkeys(tensor.operation for tensor in tensors if tensor.pieces)
        return FATES.get(job.kind, "left out"), f"{_how(job)}, {', '.join(operations)}"

    def _of_donor(self, donor: Specialist, changing: dict[str, Job]) -> list[TensorFate]:
        found, updates = self.across.maps[donor.label], self.across.updates.get(donor.label, {})
        used = _uses(found, changing)
        sources = {ref.name: source for source, factors in updates.items() for ref in (factors.a, factors.b)}
        result = []
        for name in donor.checkpoint.refs:
            reason = self.reasons.get(donor.label) or found.dropped.get(name, "alpha: 0")
            fate: tuple[Fate, str] = ("left out", reason)
            if donor.label in self.reasons:
                result.append(TensorFate(donor.label, name, *fate))
                continue
            if targets := used.get(sources.get(name, name)):
                more = f"; some rows: {found.partly[name][1]}" if name in found.partly else ""
                kinds = {changing[target].kind for target in targets}
                into: Fate = next((FATES[kind] for kind in FATES if kind in kinds), "carried")
                fate = (into, f"into {' and '.join(targets)}{more}")
            result.append(TensorFate(donor.label, name, *fate))
        return result

    def _of_base(self) -> list[TensorFate]:
        across = self.across
        if across.base is None or across.base_map is None:
            return []
        used, result = _uses(across.base_map, across.parts.keys() | across.vectors.keys()), []
        for name in across.base.refs:
            reason = across.base_map.dropped.get(name, "no update of it is merged")
            fate: tuple[Fate, str] = ("left out", reason)
            if targets := used.get(name):
                is_linear = all(target in across.parts for target in targets)
                fate = ("merged" if is_linear else "averaged", f"the updates of {' and '.join(targets)} start there")
            result.append(TensorFate("base", name, *fate))
        return result


def _how(job: Job) -> str:
    """What is done, in the words of the plan."""
    if job.kind in ("average", "carry"):
        return {"average": "mean of target and donors", "carry": "the donor's is taken"}[job.kind]
    return (job.merges or (job,))[0].method


def _uses(found: ModelMap, targets: Container[str]) -> dict[str, list[str]]:
    """Which of `targets` every tensor of a mapped model goes into."""
    into: dict[str, list[str]] = {}
    for tensor in found.tensors.values():
        if tensor.name in targets:
            for source in dict.fromkeys(piece.source for piece in tensor.pieces):
                into.setdefault(source, []).append(tensor.name)
    return into

"""Works out what a merge does: one independent job per tensor that is written, and the fate of every input tensor."""

import fnmatch
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from modalloy.checkpoints import Checkpoint, Specialist, TensorRef, TensorSpec, WeightFile
from modalloy.errors import CheckpointError, RecipeError
from modalloy.families.rules import Rows
from modalloy.fit import check_complete
from modalloy.methods import METHODS, resolve
from modalloy.names import EMBEDDINGS
from modalloy.recipe import Recipe, Rule

Fate = Literal["merged", "kept", "averaged", "carried", "left out"]
LAYER = re.compile(r"(?:^|\.)(?:layers|layer|blocks|h)\.(\d+)\.")


@dataclass(frozen=True)
class TensorFate:
    """What becomes of one input tensor: its source ("base", "target" or a specialist's label), its name, its fate and why."""

    source: str
    tensor: str
    fate: Fate
    detail: str


@dataclass(frozen=True)
class Job:
    """One independent piece of work: `kind` says what is done to the base tensor `slot`, `outputs` what is written.

    - merge: the specialists' updates of a linear weight, by the recipe's method
    - average: plain mean over the specialists that have the tensor
    - interpolate: a norm or bias of a target towards the donors'
    - fuse: several merged weights, `pieces`, that the target stores as one tensor
    - keep: the base's tensor, unchanged
    - carry: a specialist's tensor, bit for bit
    """

    kind: Literal["merge", "average", "interpolate", "fuse", "keep", "carry"]
    slot: str
    outputs: tuple[TensorSpec, ...]
    reads: tuple[TensorRef, ...] = ()
    method: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)  # resolved, at this weight's depth
    weights: tuple[float, ...] = ()  # of the specialists
    pieces: tuple["Job", ...] = ()
    rows: Rows = ()  # of a piece, in the tensor of its output

    @property
    def merges(self) -> tuple["Job", ...]:
        """The merged weights that it makes: itself, or its pieces."""
        return (self,) if self.kind == "merge" else self.pieces

    @property
    def read_bytes(self) -> int:
        """Size of the tensors that it reads."""
        return sum(ref.n_bytes for ref in self.reads)

    @property
    def write_bytes(self) -> int:
        """Size of the tensors that it writes."""
        return sum(spec.n_bytes for spec in self.outputs)

    @property
    def group(self) -> str:
        """Jobs of one group share what their method must know of the whole model, which λ, applied last, does not change."""
        return json.dumps([self.method, self.parameters | {"scale": None}], sort_keys=True)


class Choices:
    """What a recipe says of every weight: its rule, its method, its parameters and weights at its depth."""

    def __init__(self, recipe: Recipe, base: Checkpoint, n: int, lora_rank: int | None = None) -> None:
        """Of `n` updates, the largest rank of which is `lora_rank`, that are added to the weights of `base`."""
        self.recipe, self.base, self.n, self.lora_rank = recipe, base, n, lora_rank
        self.rules = {name: (pattern, rule) for name in base.refs for pattern, rule in [self._rule(name)] if rule}
        self.depth = layers(base.refs)
        self.parameters = self._resolved(recipe.merge_method, recipe.parameters, None)

    def _policy(self, name: str) -> str | None:
        """What a rule says is done to a weight, if one does."""
        return self.rules[name][1].policy if name in self.rules else None

    def _weights(self, slot: str) -> tuple[float, ...]:
        """The factors of the specialists' updates, at the weight's depth."""
        remedy = "give one number, or keep the base's by `modules:` with policy: keep"
        return tuple(self._at(entry.parameters.weight, slot, "weight", remedy) for entry in self.recipe.models)

    def _rule(self, slot: str) -> tuple[str, Rule | None]:
        for pattern, rule in self.recipe.modules.items():
            if fnmatch.fnmatchcase(slot, pattern):
                return pattern, rule
        return "", None

    def _method(self, slot: str) -> tuple[str, dict[str, Any]]:
        """Method of a weight, and its parameters as written."""
        _, rule = self.rules.get(slot, ("", None))
        if rule is None:
            return self.recipe.merge_method, self.recipe.parameters
        if rule.policy == "average":
            return "average", {}
        if rule.merge_method in (None, self.recipe.merge_method):
            return self.recipe.merge_method, self.recipe.parameters | rule.parameters
        return str(rule.merge_method), rule.parameters

    def _resolved(self, method: str, parameters: dict[str, Any], slot: str | None) -> dict[str, Any]:
        """Parameters with "auto" worked out and gradients at the weight's depth (kept as lists without a slot)."""
        lists = {name: value for name, value in parameters.items() if isinstance(value, list)}
        single = {name: value for name, value in parameters.items() if name not in lists}
        if slot is not None:
            for name, value in lists.items():
                at = self._at(value, slot, name, "give it a value of its own under `modules:`")
                single[name] = round(at) if METHODS[method].is_whole(name) else at
            return resolve(method, single, n=self.n, lora_rank=self.lora_rank)
        return resolve(method, single, n=self.n, lora_rank=self.lora_rank) | lists

    def _at(self, value: Any, slot: str, name: str, remedy: str) -> float:
        """A number, or a list of them interpolated linearly from the first layer to the last."""
        if not isinstance(value, (list, tuple)):
            return value
        layer = _layer(slot)
        if layer is None:
            raise RecipeError(f"{name}: {list(value)} goes over the layers, but {slot} is in none; {remedy}")
        position = layer / max(1, self.depth - 1) * (len(value) - 1)
        below = min(int(position), len(value) - 1)
        above = min(below + 1, len(value) - 1)
        return value[below] + (position - below) * (value[above] - value[below])

    def _like_base(self, name: str) -> TensorSpec:
        """The base's tensor in the output type."""
        ref, chosen = self.base.refs[name], self.recipe.written_dtype
        dtype = ref.dtype if chosen == "auto" or not ref.dtype.is_floating_point else getattr(torch, chosen)
        return TensorSpec(name, dtype, ref.shape)


class Planner(Choices):
    """Works out jobs and fates for checked inputs."""

    def __init__(self, recipe: Recipe, base: Checkpoint, specialists: list[Specialist]) -> None:
        ranks = [s.rank for s in specialists if s.rank is not None]
        super().__init__(recipe, base, len(specialists), max(ranks, default=None))
        self.specialists = specialists
        self.rank: int | None = None
        full = {name for s in specialists for name in s.full if name in base.refs}
        linear = {name for name in full if _is_linear(base.refs[name])} | {slot for s in specialists for slot in s.text}
        kept = {name for name in base.refs if self._policy(name) == "keep"}
        asked = {name for name in base.refs if self._policy(name) == "average"}
        self.merged = [name for name in base.refs if name in linear - kept]
        others = {n for n in full if base.refs[n].dtype.is_floating_point and len(base.refs[n].shape) != 2}
        self.averaged = [name for name in base.refs if name in (others | asked & full) - linear - kept]
        self.fishers = [self._fisher(entry.parameters.fisher) for entry in recipe.models]
        check_complete(recipe, specialists, self.merged, self._owner)

    def _owner(self, slot: str) -> str:
        """One that updates a weight."""
        return next(f"{s.label} specialist" for s in self.specialists if slot in s.text or slot in s.full)

    def adapter_jobs(self) -> list[Job]:
        """For `adapter` and `omni`: one pair of factors per merged weight, then what is carried.

        A method that gives full matrices gives `omni` a second weight for its text tokens.
        """
        if self.averaged:
            raise RecipeError(
                f"output.form '{self.recipe.output.form}' holds low-rank updates only, but {self.averaged[0]} would be averaged; "
                "write form: full, or keep the base's by modules: {\"" + self.averaged[0] + '": {policy: keep}}'
            )
        omni = self.recipe.output.form == "omni"
        dtype = self._dtype()
        slots = sorted(self.merged)  # as safetensors files are, so that the specialists are read in their order
        whole = {slot for slot in slots if omni and self.recipe.output.compress_rank is None and self._is_full(slot)}
        bounds = {slot: self._rank_bound(slot) for slot in slots if slot not in whole}
        self.rank = max(1, max(bounds.values(), default=1))  # PEFT takes no rank 0
        jobs = []
        for slot in slots:
            if slot in whole:
                jobs.append(self._merge_job(slot, (self._like_base(slot),)))
                continue
            rows, columns = self.base.refs[slot].shape
            stem = slot.removesuffix(".weight")
            names = [
                f"{stem}.lora_{side}.default.weight" if omni else f"base_model.model.{stem}.lora_{side}.weight"
                for side in "AB"
            ]
            shapes = [(self.rank, columns), (rows, self.rank)]
            specs = tuple(TensorSpec(name, dtype, shape) for name, shape in zip(names, shapes, strict=True))
            jobs.append(self._merge_job(slot, specs))
        if omni:
            for specialist in self.specialists:
                for name, ref in specialist.carried().items():
                    jobs.append(Job("carry", name, (TensorSpec(name, ref.dtype, ref.shape),), (ref,)))
        return jobs

    def full_jobs(self) -> list[Job]:
        """For `full`: every tensor of the base, in its order, in the output type."""
        jobs = []
        merged, averaged = set(self.merged), set(self.averaged)
        for name, ref in self.base.refs.items():
            spec = self._like_base(name)
            if name in merged:
                jobs.append(self._merge_job(name, (spec,)))
            elif name in averaged:
                having = tuple(s.full[name] for s in self.specialists if name in s.full)
                jobs.append(Job("average", name, (spec,), having))
            else:
                jobs.append(Job("keep", name, (spec,), (ref,)))
        return jobs

    def fates(self) -> list[TensorFate]:
        """The fate of every tensor of the base and of every specialist."""
        form = self.recipe.output.form
        carried: tuple[Fate, str] = ("carried", "bit for bit")
        if form != "omni":
            carried = ("left out", f"form: {form} holds the text path only")
        of_slot: dict[str, tuple[Fate, str]] = {slot: ("merged", self._method(slot)[0]) for slot in self.merged}
        of_slot |= dict.fromkeys(self.averaged, ("averaged", "mean over the specialists that have it"))
        kept: dict[str, str] = {
            name: f"modules: {pattern} keeps the base's"
            for name, (pattern, rule) in self.rules.items()
            if rule.policy == "keep"
        }
        result = [
            TensorFate("base", name, *of_slot.get(name, ("kept", kept.get(name, "no rule changes it"))))
            for name in self.base.refs
        ]
        for specialist in self.specialists:
            label = specialist.label
            for slot, factors in specialist.text.items():
                fate: tuple[Fate, str] = ("left out", kept.get(slot, ""))
                if slot in of_slot:
                    fate = ("merged", f"{of_slot[slot][1]} into {slot}")
                result += [TensorFate(label, ref.name, *fate) for ref in (factors.a, factors.b)]
            result += [TensorFate(label, ref.name, *carried) for ref in specialist.carried().values()]
            for name, ref in specialist.full.items():
                unused: tuple[Fate, str] = ("left out", kept.get(name, "the base's is kept"))
                result.append(TensorFate(label, ref.name, *of_slot.get(name, unused)))
            result += [TensorFate(label, name, "left out", reason) for name, reason in specialist.dropped.items()]
        return result

    def _merge_job(self, slot: str, specs: tuple[TensorSpec, ...]) -> Job:
        method, parameters = self._method(slot)
        reads: list[TensorRef] = []
        if len(specs) == 1 or any(slot in s.full for s in self.specialists):
            reads.append(self.base.refs[slot])
        for specialist, fisher in zip(self.specialists, self.fishers, strict=True):
            if slot in specialist.text:
                reads += [specialist.text[slot].a, specialist.text[slot].b]
            elif slot in specialist.full:
                reads.append(specialist.full[slot])
            if METHODS[method].takes("fishers"):
                reads.append(self._fisher_ref(fisher, slot, specialist))
        resolved = self._resolved(method, parameters, slot)
        return Job("merge", slot, specs, tuple(reads), method, resolved, self._weights(slot))

    def _fisher(self, location: str | None) -> WeightFile | None:
        return None if location is None else WeightFile(self.recipe.folder / Path(location).expanduser())

    def _fisher_ref(self, file: WeightFile | None, slot: str, specialist: Specialist) -> TensorRef:
        if file is None:
            raise RecipeError(
                f"{specialist.label} specialist: its method weighs by Fisher information; give parameters: {{fisher: FILE}}"
            )
        ref = file.refs.get(slot)
        if ref is None or ref.shape != self.base.refs[slot].shape:
            found = "has no" if ref is None else f"has a {' × '.join(map(str, ref.shape))}"
            raise CheckpointError(
                f"{file.path}: {found} {slot}, as the base has it; compute the Fisher file for this base"
            )
        return ref

    def _rank_bound(self, slot: str) -> int:
        """Largest rank that the method's result for this weight can have."""
        method, written = self._method(slot)
        parameters = self._resolved(method, written, slot)
        compress = self.recipe.output.compress_rank
        rows, columns = self.base.refs[slot].shape
        entry = METHODS[method]
        if self._is_full(slot):
            if compress is None:
                raise RecipeError(
                    f"{method} gives a full matrix for {slot}, which an adapter cannot hold; write form: full, or "
                    "output.compress_rank: k to approximate it"
                )
            return min(compress, rows, columns)
        ranks = [s.text[slot].rank for s in self.specialists if slot in s.text]
        bound = max(ranks) if entry.one_rank else sum(ranks)
        if entry.gets(parameters) != "factors":
            bound = min(bound, rows, columns)
        if "rank ≤ k" in entry.laws and parameters["rank"] >= 1:
            bound = min(bound, int(parameters["rank"]))
        return bound if compress is None else min(bound, compress)

    def _is_full(self, slot: str) -> bool:
        """Whether the method's result for this weight is a full matrix."""
        method, written = self._method(slot)
        gets = METHODS[method].gets(self._resolved(method, written, slot))
        return gets == "dense" or any(slot in s.full for s in self.specialists)

    def _dtype(self) -> torch.dtype:
        chosen = self.recipe.written_dtype
        if chosen != "auto":
            return getattr(torch, chosen)
        refs = [f.a for s in self.specialists for f in s.text.values()]
        refs += [ref for s in self.specialists for ref in s.full.values()]
        widest = refs[0].dtype
        for ref in refs:
            widest = torch.promote_types(widest, ref.dtype)
        return widest


def _is_linear(ref: TensorRef) -> bool:
    return len(ref.shape) == 2 and ref.dtype.is_floating_point and not ref.name.endswith(EMBEDDINGS)


def layers(names: Iterable[str]) -> int:
    """How many layers tensors of these names are of."""
    return 1 + max((index for name in names if (index := _layer(name)) is not None), default=-1)


def _layer(name: str) -> int | None:
    found = LAYER.search(name)
    return int(found[1]) if found else None

"""Works out what a merge does: one independent job per tensor that is written, and the fate of every input tensor."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch

from modalloy.errors import CheckpointError, RecipeError
from modalloy.methods import METHODS
from modalloy.names import disk_name
from modalloy.planning.checks import check_complete, check_rows_are_ruled
from modalloy.planning.choices import Choices
from modalloy.planning.experts import expert_job
from modalloy.planning.fates import fates_of
from modalloy.planning.job import Fate, Job, TensorFate
from modalloy.planning.kinds import OF_ROWS, PLURALS, Kind, layer_of
from modalloy.planning.requantised import as_stored
from modalloy.recipe import Recipe
from modalloy.senses.stored import parts_of_experts
from modalloy.specialists.specialist import Specialist
from modalloy.specialists.spelling import module_names
from modalloy.specialists.stacked import StackedLora, nested_stems
from modalloy.storage.tensors import Checkpoint, TensorRef, WeightFile
from modalloy.storage.writer import TensorSpec

Treatment = Literal["merge", "experts", "sum", "average", "keep"]


class Planner(Choices):
    """Works out jobs and fates for checked inputs."""

    def __init__(
        self,
        recipe: Recipe,
        base: Checkpoint,
        specialists: list[Specialist],
        kinds: Mapping[str, Kind],
        absent: Mapping[int, str],
    ) -> None:
        """`kinds` of the base's tensors; `absent`: why a model does not count, by its index."""
        self.counted = [one for index, one in enumerate(specialists) if index not in absent]
        ranks = [s.rank for s in self.counted if s.rank is not None]
        super().__init__(recipe, base, absent, lora_rank=max(ranks, default=None))
        self.specialists, self.kinds = specialists, kinds
        self.reasons = {specialists[index].label: reason for index, reason in absent.items()}
        self.low_rank = {slot for s in self.counted for slot in s.text_lora}
        self.changeable = self.low_rank | {name for s in self.counted for name in s.tuned if name in base.refs}
        self.treatments = {name: self._treatment(name) for name in base.refs}
        self.merged = [name for name in base.refs if self.treatments[name] == "merge"]
        self.merged_set = set(self.merged)
        self.experts = [name for name in base.refs if self.treatments[name] == "experts"]
        self.averaged = [name for name in base.refs if self.treatments[name] in ("average", "sum")]
        self.fishers = [self._fisher(entry.parameters.fisher) for entry in recipe.models]
        sums = [name for name in self.averaged if self.treatments[name] == "sum"]
        check_complete(recipe, self.counted, [*self.merged, *self.experts, *sums], self._owner)
        if not recipe.modules and not self.merged and not self.experts and not sums:
            raise RecipeError(
                "nothing would be merged: no model holds a tuned linear weight of the base; check that they are fine-tunes of "
                "it, or say by `modules:` what becomes of what they hold"
            )

    def _treatment(self, name: str) -> Treatment:
        """What is done to a tensor of the base that some model may have changed."""
        kind, ref, policy = self.kinds[name], self.base.refs[name], self._policy(name)
        if name not in self.changeable or policy == "keep":
            return "keep"
        if name in self.low_rank and len(ref.shape) == 3:
            return "experts"
        if not ref.dtype.is_floating_point:
            if policy == "average" or self._asks_for_method(name):
                raise RecipeError(f"modules: {name} holds whole numbers, which have no mean; write policy: keep")
            return "keep"
        if kind == "linear" or name in self.low_rank:
            if kind in OF_ROWS and policy is None and not self._asks_for_method(name):
                check_rows_are_ruled(self.counted, name, kind)
            return "merge"
        if kind == "vector" and policy is None and METHODS[self._method(name)[0]].keeps_vectors:
            return "keep"
        if policy == "average" or kind == "vector":
            return "average"
        if self._asks_for_method(name) and len(ref.shape) == 2:
            return "merge"
        if kind == "expert" and len(ref.shape) == 3:
            return "experts"
        if kind in OF_ROWS and not self._asks_for_method(name):
            check_rows_are_ruled(self.counted, name, kind)
            return "keep"
        method, _ = self._method(name)
        if METHODS[method].is_sum:
            return "sum"
        if self._asks_for_method(name):
            raise RecipeError(
                f"modules: {method} merges matrices, but {name} is one of the {PLURALS[kind]} "
                f"({' × '.join(map(str, ref.shape))}); write policy: keep or average, or a method that is a sum of the updates "
                f"({', '.join(name for name, method in METHODS.items() if method.is_sum)})"
            )
        return "keep"

    def _asks_for_method(self, name: str) -> bool:
        """Whether a rule names a method for this tensor."""
        return name in self.rules and self.rules[name][1].merge_method is not None

    def must_be_equal(self) -> list[str]:
        """Kept tensors that no method merges, and no rule speaks of: no model may have changed them."""
        return [
            name
            for name, treatment in self.treatments.items()
            if treatment == "keep"
            and name in self.changeable
            and self._policy(name) is None
            and self.kinds[name] not in OF_ROWS
            and not self._is_kept_vector(name)
        ]

    def _is_kept_vector(self, name: str) -> bool:
        """Whether a tensor is a norm or bias that the method leaves as it is."""
        return self.kinds[name] == "vector" and self.base.refs[name].dtype.is_floating_point

    def _owner(self, slot: str) -> str:
        """One that updates a weight."""
        return next(f"{s.label} specialist" for s in self.counted if slot in s.text_lora or slot in s.tuned)

    def all_jobs(self) -> list[Job]:
        """The jobs of the recipe's form.

        Raises:
            RecipeError: the form cannot hold what the recipe gives.
        """
        if self.recipe.form.is_whole:
            return self.full_jobs()
        if self.recipe.output.requantize:
            raise RecipeError(
                f"output.requantize is of full models, but the form is '{self.recipe.form.name}'; leave it out"
            )
        self._check_low_rank()
        return self.adapter_jobs()

    def _check_low_rank(self) -> None:
        """Refuse full updates where the form holds none."""
        form = self.recipe.form
        if form.takes_full_updates or self.recipe.output.compress_rank is not None:
            return
        for specialist in self.counted:
            changed = (name for name in (*self.merged, *self.experts) if name in specialist.tuned)
            if whole := next((specialist.tuned[name] for name in changed), None):
                holds = "is a full model" if specialist.is_whole else f"holds {whole.name} whole"
                raise RecipeError(
                    f"output.form '{form.name}' needs low-rank specialists, but '{specialist.label}' {holds}; write form: full, "
                    "or output.compress_rank: k to approximate what is merged"
                )

    def adapter_jobs(self) -> list[Job]:
        """For forms of low-rank updates: one pair of factors per merged weight, then what is carried.

        Where the form takes it, what a method gives as a full matrix is a second weight, for text tokens.
        """
        if self.averaged and not self.recipe.form.takes_full_updates:
            raise RecipeError(
                f"output.form '{self.recipe.output.form}' holds low-rank updates only, but {self.averaged[0]} would be averaged; "
                "write form: full, or keep the base's by modules: {\"" + self.averaged[0] + '": {policy: keep}}'
            )
        form = self.recipe.form
        dtype, modules = self._dtype(), {}
        if form.names_modules:
            modules = module_names(self.base, self.config)
        slots = sorted(self.merged)  # as safetensors files are, so that the specialists are read in their order
        experts = [] if form.takes_full_updates else self.experts  # written as pairs of factors too
        whole: set[str] = set()
        if form.takes_full_updates:
            parts = parts_of_experts(self.config, slots, self.base.folder)  # which no token chooses between
            cut = self.recipe.output.compress_rank is not None
            whole = {slot for slot in slots if slot in parts or (not cut and self._is_full(slot))}
        bounds = {slot: self._rank_bound(slot) for slot in (*slots, *experts) if slot not in whole}
        self.rank = max(1, max(bounds.values(), default=1))  # PEFT takes no rank 0
        jobs = []
        for slot in slots:
            if slot in whole:
                jobs.append(self._merge_job(slot, (self._like_base(slot),)))
                continue
            rows, columns = self.base.refs[slot].shape
            shapes = [(self.rank, columns), (rows, self.rank)]
            specs = tuple(
                TensorSpec(name, dtype, shape)
                for name, shape in zip(form.factors(modules.get(slot, slot)), shapes, strict=True)
            )
            jobs.append(self._merge_job(slot, specs))
        if experts:
            stems = nested_stems(one.text_lora for one in self.counted)
            if whole_experts := [name for name in experts if name not in stems]:
                raise RecipeError(
                    f"output.form '{form.name}' holds low-rank updates only, but {whole_experts[0]} holds whole experts; write "
                    "form: full"
                )
            jobs += [self._stacked_job(name, stems[name], dtype) for name in sorted(experts)]
        else:
            jobs += [self._expert_job(name) for name in sorted(self.experts)]
        jobs += [self._average_job(name, self._like_base(name)) for name in sorted(self.averaged)]
        if form.carries_senses:
            jobs += [job for specialist in self.specialists for job in self._own_jobs(specialist, dtype)]
            for specialist in self.specialists:
                for name, ref in specialist.carried().items():
                    jobs.append(Job("carry", name, (TensorSpec(name, ref.dtype, ref.shape),), ref))
        return jobs

    def _expert_job(self, name: str) -> Job:
        """A fused tensor, each expert merged by the method."""
        return expert_job(self._merge_job(name, (self._like_base(name),)), self.config)

    def _stacked_job(self, name: str, stem: str, dtype: torch.dtype) -> Job:
        """The factors of every expert's merged update, in the two matrices that PEFT has of them."""
        one = next(found for s in self.counted if isinstance(found := s.text_lora.get(name), StackedLora))
        count, rank = one.experts, self.rank or 1
        shapes = ((count * rank, one.a.shape[1]), (one.b.shape[0], rank * count))
        specs = (TensorSpec(of, dtype, shape) for of, shape in zip(self.recipe.form.factors(stem), shapes, strict=True))
        return expert_job(self._merge_job(name, tuple(specs)), self.config)

    def _own_jobs(self, specialist: Specialist, dtype: torch.dtype) -> list[Job]:
        """The update of a full fine-tune, cut to the rank that its own tokens use."""
        if specialist.own_rank is None:
            return []
        jobs, disk = [], disk_name(specialist.sense or "")
        routed = self.merged_set - parts_of_experts(self.config, self.merged, self.base.folder)
        for slot in sorted(slot for slot in specialist.tuned if slot in routed and layer_of(slot) is not None):
            rows, columns = self.base.refs[slot].shape
            stem, rank = slot.removesuffix(".weight"), specialist.own_rank
            specs = (
                TensorSpec(f"{stem}.lora_A.{disk}.weight", dtype, (rank, columns)),
                TensorSpec(f"{stem}.lora_B.{disk}.weight", dtype, (rows, rank)),
            )
            jobs.append(
                Job(
                    "own",
                    f"{specialist.sense}:{slot}",
                    specs,
                    self.base.refs[slot],
                    (specialist.tuned[slot],),
                    (1.0,),
                    (specialist.label,),
                    "task_arithmetic",
                    {"scale": 1.0},
                    self.wide,
                )
            )
        return jobs

    def full_jobs(self) -> list[Job]:
        """For `full`: every tensor of the base, in its order, in the output type."""
        jobs = [self._full_job(name) for name in self.base.refs]
        return as_stored(self.base, jobs) if self.recipe.output.requantize else jobs

    def _full_job(self, name: str) -> Job:
        """A whole tensor of the base."""
        spec, treatment = self._like_base(name), self.treatments[name]
        if treatment == "merge":
            return self._merge_job(name, (spec,))
        if treatment == "experts":
            return self._expert_job(name)
        if treatment in ("average", "sum"):
            return self._average_job(name, spec)
        return Job("keep", name, (spec,), self.base.refs[name])

    def fates(self) -> list[TensorFate]:
        """The fate of every tensor of the base and of every specialist."""
        of_slot: dict[str, tuple[Fate, str]] = {slot: ("merged", self._method(slot)[0]) for slot in self.merged}
        of_slot |= {name: ("merged", f"{self._method(name)[0]}, each expert") for name in self.experts}
        for name in self.averaged:
            is_sum = self.treatments[name] == "sum"
            of_slot[name] = (
                ("merged", self._method(name)[0]) if is_sum else ("averaged", "mean over the specialists that have it")
            )
        kept: dict[str, str] = dict.fromkeys(self.must_be_equal(), "no model may have changed it: the merge compares")
        kept |= {
            name: f"{self.kinds[name]}: the base's is kept"
            for name in self.changeable
            if self.treatments[name] == "keep" and self.kinds[name] in OF_ROWS
        }
        kept |= {
            name: f"{self._method(name)[0]} keeps the base's norms and biases"
            for name in self.changeable
            if self.treatments[name] == "keep" and self._is_kept_vector(name)
        }
        kept |= {
            name: f"modules: {pattern} keeps the base's"
            for name, (pattern, rule) in self.rules.items()
            if rule.policy == "keep"
        }
        found = [
            TensorFate("base", name, *of_slot.get(name, ("kept", kept.get(name, "no rule changes it"))))
            for name in self.base.refs
        ]
        for specialist in self.specialists:
            found += fates_of(specialist, of_slot, kept, self.reasons.get(specialist.label), self.recipe.form)
        return found

    def _merge_job(self, slot: str, specs: tuple[TensorSpec, ...]) -> Job:
        method, written = self._method(slot)
        parameters = self._resolved(method, written, slot)
        shares = self._shares(slot, method, parameters)
        self._check_number(slot, method, shares)
        fisher = METHODS[method].takes("fishers")
        entries = zip(self.specialists, self.fishers, shares, strict=True)
        taking_part = [(one, file, share) for one, file, share in entries if share is not None]
        if METHODS[method].is_sum and "scale" in parameters:  # who adds nothing is no part of the job
            taking_part = [entry for entry in taking_part if slot in entry[0].text_lora or slot in entry[0].tuned]
        return Job(
            "merge",
            slot,
            specs,
            self.base.refs[slot],
            tuple(one.text_lora.get(slot) or one.tuned.get(slot) for one, _, _ in taking_part),
            tuple(share for _, _, share in taking_part),
            tuple(one.label for one, _, _ in taking_part),
            method,
            parameters,
            self.wide,
            tuple(self._fisher_ref(file, slot, one) for one, file, _ in taking_part if fisher),
        )

    def _average_job(self, name: str, spec: TensorSpec) -> Job:
        """The mean of the updates of those that have a tensor; of a method that is a sum, written as a mean."""
        having = [
            (specialist.tuned[name], weight)
            for specialist, weight in zip(self.specialists, self._weights(name), strict=True)
            if weight != 0 and name in specialist.tuned
        ]
        method, factor = "", 0.0
        if self.treatments[name] == "average":
            factor = self._mean_factor(name, [weight for _, weight in having])
        elif having:
            method, written = self._method(name)
            factor = METHODS[method].sum_factor(self._resolved(method, written, name), len(having)) * len(having)
        refs, weights = tuple(ref for ref, _ in having), tuple(weight for _, weight in having)
        return Job(
            "average", name, (spec,), self.base.refs[name], refs, weights, method=method, parameters={"scale": factor}
        )

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
        rows, columns = self.base.refs[slot].shape[-2:]
        entry = METHODS[method]
        if self._is_full(slot):
            if compress is None:
                raise RecipeError(
                    f"{method} gives a full matrix for {slot}, which an adapter cannot hold; write form: full, or "
                    "output.compress_rank: k to approximate it"
                )
            return min(compress, rows, columns)
        ranks = [s.text_lora[slot].rank for s in self.counted if slot in s.text_lora]
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
        return gets == "dense" or any(slot in s.tuned for s in self.counted)

    def _dtype(self) -> torch.dtype:
        chosen = self.recipe.written_dtype
        if chosen != "auto":
            return getattr(torch, chosen)
        refs = [f.a for s in self.counted for f in s.text_lora.values()]
        refs += [ref for s in self.counted for ref in s.tuned.values()]
        widest = refs[0].dtype
        for ref in refs:
            widest = torch.promote_types(widest, ref.dtype)
        return widest

"""What a merge will do: a list of independent jobs, and the fate of every tensor of every input. Reads headers only."""

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from modalloy import builtin
from modalloy.checkpoints import (
    Checkpoint,
    Specialist,
    TensorRef,
    TensorSpec,
    is_portable,
    locate,
    open_base,
    open_specialist,
    read_json,
)
from modalloy.errors import CheckpointError, RecipeError, nearest
from modalloy.fit import check_base, check_path, check_shapes, choose_encoders, common_chat_template
from modalloy.methods import METHODS, resolve
from modalloy.recipe import Recipe

Fate = Literal["merged", "kept", "averaged", "carried", "left out"]
NOT_MERGED = ("embed_tokens.weight", "lm_head.weight", "wte.weight", "embed_in.weight", "embed_out.weight")


@dataclass(frozen=True)
class TensorFate:
    """What becomes of one input tensor: its source ("base" or a specialist's label), its name, its fate and why."""

    source: str
    tensor: str
    fate: Fate
    detail: str


@dataclass(frozen=True)
class Job:
    """One independent piece of work: `kind` says what is done to the base tensor `slot`, `outputs` what is written.

    - merge: the specialists' updates of a linear weight, by the recipe's method
    - average: plain mean over the specialists that have the tensor
    - keep: the base's tensor, unchanged
    - carry: a specialist's tensor, bit for bit (`ref` of `specialist`)
    """

    kind: Literal["merge", "average", "keep", "carry"]
    slot: str
    outputs: tuple[TensorSpec, ...]
    specialist: int = -1
    ref: TensorRef | None = None


@dataclass
class Plan:
    """The jobs of a merge in the order they are written, and the account of every input tensor."""

    recipe: Recipe
    base_folder: Path
    base: Checkpoint
    specialists: list[Specialist]
    parameters: dict[str, Any]
    jobs: list[Job]
    fates: list[TensorFate]
    rank: int | None  # of the written adapter
    read_bytes: int
    encoders: dict[str, str] = field(default_factory=dict)  # by modality, for `omni`
    chat_template: str | None = None

    @property
    def base_is_portable(self) -> bool:
        """Whether the recipe names the base so that any machine finds it (built in, or a hub id)."""
        return is_portable(self.recipe.base_model, self.recipe.folder)

    @property
    def base_name(self) -> str:
        """The base's name without local folders."""
        return self.recipe.base_model if self.base_is_portable else self.base_folder.name

    @property
    def write_bytes(self) -> int:
        """Size of the tensors that will be written."""
        return sum(spec.n_bytes for job in self.jobs for spec in job.outputs)

    @property
    def peak_bytes(self) -> int:
        """Estimate of the memory one worker holds at once, for the largest job."""
        return max((self._job_bytes(job) for job in self.jobs), default=0)

    def counts(self) -> dict[str, int]:
        """Number of input tensors by fate."""
        counted = Counter(fate.fate for fate in self.fates)
        return {fate: counted[fate] for fate in ("merged", "averaged", "kept", "carried", "left out") if counted[fate]}

    def merged_weights(self) -> int:
        """Number of linear weights that the method merges."""
        return sum(job.kind == "merge" for job in self.jobs)

    def summary(self) -> str:
        """One line: what is merged and how, and what is not."""
        settings = ", ".join(f"{_letter(name)}={_shown(value)}" for name, value in self.parameters.items())
        parts = [f"{self.merged_weights()} linear weights merged ({self.recipe.merge_method}, {settings})"]
        parts += [f"{count} tensors {fate}" for fate, count in self.counts().items() if fate != "merged"]
        return " · ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for `--json`."""
        return {
            "method": self.recipe.merge_method,
            "parameters": self.parameters,
            "form": self.recipe.output.form,
            "specialists": [s.label for s in self.specialists],
            "merged_weights": self.merged_weights(),
            "counts": self.counts(),
            "read_bytes": self.read_bytes,
            "write_bytes": self.write_bytes,
            "peak_bytes_per_worker": self.peak_bytes,
            "tensors": [dataclasses.asdict(fate) for fate in self.fates],
        }

    def _job_bytes(self, job: Job) -> int:
        out_bytes = sum(spec.n_bytes for spec in job.outputs)
        if job.kind != "merge":
            return 2 * out_bytes
        factors = [s.text[job.slot] for s in self.specialists if job.slot in s.text]
        if len(factors) < len([s for s in self.specialists if job.slot in s.text or job.slot in s.full]):
            rows, columns = self.base.refs[job.slot].shape
            return 8 * (rows**2 + columns**2 + (len(self.specialists) + 3) * rows * columns)
        stacked = sum(f.rank * sum(f.shape) for f in factors)
        core = sum(f.rank for f in factors) ** 2
        return 3 * 4 * stacked + 8 * stacked + 8 * 12 * core + 2 * out_bytes


def plan(recipe: Recipe, *, allow_base_mismatch: bool = False) -> Plan:
    """The plan of `recipe`: opens every input's headers, checks that they fit, and lists every tensor's fate.

    Raises:
        CheckpointError: an input is missing, damaged, or does not fit the base.
        RecipeError: the recipe asks for something that these inputs cannot give.
    """
    base_folder = locate(recipe.base_model, recipe.folder)
    base = open_base(base_folder)
    specialists = [
        open_specialist(
            locate_specialist(entry.model, recipe.folder), modality=entry.modality, label=label, ignore=recipe.ignore
        )
        for entry, label in zip(recipe.models, labels(recipe), strict=True)
    ]
    base_config = read_json(base_folder / "config.json")
    for specialist in specialists:
        check_base(specialist, recipe, base_config, allow_base_mismatch)
        check_shapes(specialist, base)
    form = recipe.output.form
    if form != "full" and any(s.layout == "full" for s in specialists):
        label = next(s.label for s in specialists if s.layout == "full")
        raise RecipeError(
            f"output.form '{form}' needs low-rank specialists, but '{label}' is a full model; write form: full"
        )
    encoders = choose_encoders(recipe, specialists) if form == "omni" else {}
    for specialist in specialists:
        if specialist.modality in encoders:
            check_path(specialist, encoders[specialist.modality], base_config.get("hidden_size"))
    template = common_chat_template(specialists) if form == "omni" else None
    ranks = [s.rank for s in specialists if s.rank is not None]
    parameters = resolve(recipe.merge_method, recipe.parameters, n=len(specialists), lora_rank=max(ranks, default=None))
    planner = _Planner(recipe, base, specialists, parameters)
    jobs = planner.full_jobs() if form == "full" else planner.adapter_jobs()
    result = Plan(
        recipe,
        base_folder,
        base,
        specialists,
        parameters,
        jobs,
        planner.fates(),
        planner.rank,
        planner.read_bytes(),
        encoders,
        template,
    )
    _check_all_accounted(result)
    return result


def locate_specialist(location: str, folder: Path) -> Path:
    """Folder of a specialist: as `locate`, and `builtin:MODALITY` for those that ship with modalloy."""
    name = location.removeprefix(builtin.PREFIX)
    if location.startswith(builtin.PREFIX):
        if not builtin.specialist(name).is_dir():
            known = [builtin.PREFIX + modality for modality in builtin.specialists()]
            raise CheckpointError(f"no built-in specialist '{location}'; {nearest(location, known)}")
        return builtin.specialist(name)
    return locate(location, folder)


def labels(recipe: Recipe) -> list[str]:
    """How messages call the specialists: the modality, else the folder's name; numbered where that is not unique."""
    names = [entry.modality or Path(entry.model.removeprefix(builtin.PREFIX)).name for entry in recipe.models]
    taken = Counter([*names, "base"])  # the plan and the manifest call the base so
    return [name if taken[name] == 1 else f"{name}#{index + 1}" for index, name in enumerate(names)]


class _Planner:
    """Works out jobs and fates for checked inputs."""

    def __init__(
        self, recipe: Recipe, base: Checkpoint, specialists: list[Specialist], parameters: dict[str, Any]
    ) -> None:
        self.recipe, self.base, self.specialists, self.parameters = recipe, base, specialists, parameters
        self.rank: int | None = None
        low_rank = {slot for s in specialists for slot in s.text}
        full = {name for s in specialists for name, ref in s.full.items() if name in base.refs and _is_linear(ref)}
        self.merged = [name for name in base.refs if name in low_rank | full]
        self.averaged = [
            name for name, ref in base.refs.items() if len(ref.shape) == 1 and any(name in s.full for s in specialists)
        ]

    def adapter_jobs(self) -> list[Job]:
        """For `adapter` and `omni`: one pair of factors per merged weight, then what is carried."""
        omni = self.recipe.output.form == "omni"
        dtype = self._dtype()
        self.rank = max(1, max((self._rank_bound(slot) for slot in self.merged), default=1))  # PEFT takes no rank 0
        jobs = []
        for slot in self.merged:
            rows, columns = self.base.refs[slot].shape
            stem = slot.removesuffix(".weight")
            names = [
                f"{stem}.lora_{side}.default.weight" if omni else f"base_model.model.{stem}.lora_{side}.weight"
                for side in "AB"
            ]
            shapes = [(self.rank, columns), (rows, self.rank)]
            specs = tuple(TensorSpec(name, dtype, shape) for name, shape in zip(names, shapes, strict=True))
            jobs.append(Job("merge", slot, specs))
        if omni:
            for index, specialist in enumerate(self.specialists):
                for ref in _modality_refs(specialist):
                    jobs.append(Job("carry", ref.name, (TensorSpec(ref.name, ref.dtype, ref.shape),), index, ref))
        return jobs

    def full_jobs(self) -> list[Job]:
        """For `full`: every tensor of the base, in its order, in the output type."""
        chosen, jobs = self.recipe.output.dtype, []
        for name, ref in self.base.refs.items():
            dtype = ref.dtype if chosen == "auto" or not ref.dtype.is_floating_point else getattr(torch, chosen)
            kind: Literal["merge", "average", "keep"] = "keep"
            if name in self.merged:
                kind = "merge"
            elif name in self.averaged:
                kind = "average"
            jobs.append(Job(kind, name, (TensorSpec(name, dtype, ref.shape),)))
        return jobs

    def fates(self) -> list[TensorFate]:
        """The fate of every tensor of the base and of every specialist."""
        method, form = self.recipe.merge_method, self.recipe.output.form
        merged: tuple[Fate, str] = ("merged", method)
        averaged: tuple[Fate, str] = ("averaged", "mean over the specialists that have it")
        carried: tuple[Fate, str] = ("carried", "bit for bit")
        if form != "omni":
            carried = ("left out", f"form: {form} holds the text path only")
        of_slot = dict.fromkeys(self.merged, merged) | dict.fromkeys(self.averaged, averaged)
        result = [
            TensorFate("base", name, *of_slot.get(name, ("kept", "no rule changes it"))) for name in self.base.refs
        ]
        for specialist in self.specialists:
            label = specialist.label
            for slot, factors in specialist.text.items():
                result += [
                    TensorFate(label, ref.name, "merged", f"{method} into {slot}") for ref in (factors.a, factors.b)
                ]
            result += [TensorFate(label, ref.name, *carried) for ref in _modality_refs(specialist)]
            for name in specialist.full:
                result.append(TensorFate(label, name, *of_slot.get(name, ("left out", "the base's is kept"))))
            result += [TensorFate(label, name, "left out", reason) for name, reason in specialist.dropped.items()]
        return result

    def read_bytes(self) -> int:
        """Bytes of tensor data that the jobs read."""
        base = sum(ref.n_bytes for ref in self.base.refs.values()) if self.recipe.output.form == "full" else 0
        factors = [f for s in self.specialists for f in s.text.values()]
        total = base + sum(f.a.n_bytes + f.b.n_bytes for f in factors)
        used = {*self.merged, *self.averaged}
        total += sum(ref.n_bytes for s in self.specialists for name, ref in s.full.items() if name in used)
        if self.recipe.output.form == "omni":
            total += sum(ref.n_bytes for s in self.specialists for ref in _modality_refs(s))
        return total

    def _rank_bound(self, slot: str) -> int:
        """Largest rank that the method's result for this weight can have."""
        ranks = [s.text[slot].rank for s in self.specialists if slot in s.text]
        if METHODS[self.recipe.merge_method].one_rank:
            return max(ranks, default=0)
        stacked = sum(ranks)
        bound = (
            stacked
            if METHODS[self.recipe.merge_method].receives == "factors"
            else min(stacked, *self.base.refs[slot].shape)
        )
        rank = self.parameters.get("rank", bound)
        return min(bound, rank) if rank >= 1 else bound

    def _dtype(self) -> torch.dtype:
        chosen = self.recipe.output.dtype
        if chosen != "auto":
            return getattr(torch, chosen)
        dtypes = [f.a.dtype for s in self.specialists for f in s.text.values()]
        widest = dtypes[0]
        for dtype in dtypes:
            widest = torch.promote_types(widest, dtype)
        return widest


def _modality_refs(specialist: Specialist) -> list[TensorRef]:
    """A specialist's modality-specific tensors in a fixed order: its own adapter, projector, extra tokens."""
    refs = [ref for factors in specialist.own.values() for ref in (factors.a, factors.b)]
    return [*refs, *specialist.projector.values(), *specialist.tokens.values()]


def _is_linear(ref: TensorRef) -> bool:
    return len(ref.shape) == 2 and ref.dtype.is_floating_point and not ref.name.endswith(NOT_MERGED)


def _check_all_accounted(result: Plan) -> None:
    """Every tensor of every input has exactly one fate."""
    listed = Counter((fate.source, fate.tensor) for fate in result.fates)
    inputs = {("base", name) for name in result.base.refs}
    inputs |= {(s.label, name) for s in result.specialists for name in s.checkpoint.refs}
    twice = {key for key, count in listed.items() if count > 1}
    if wrong := sorted((listed.keys() ^ inputs) | twice):
        raise RuntimeError(
            f"the plan does not give one fate to each tensor, for example {wrong[:3]}; please report this"
        )


def _letter(parameter: str) -> str:
    return {"rank": "k", "scale": "λ"}.get(parameter, parameter)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        whole = round(1 / value) if 1e-9 < value < 1 else 0
        return f"1/{whole}" if whole and value == 1 / whole else f"{value:g}"
    return str(value)

"""What a merge will do: a list of independent jobs, and the fate of every tensor of every input. Reads headers only."""

import dataclasses
import fnmatch
import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from modalloy import builtin
from modalloy._version import __version__
from modalloy.checkpoints import (
    Checkpoint,
    Specialist,
    TensorRef,
    TensorSpec,
    WeightFile,
    checked,
    is_portable,
    locate,
    open_base,
    open_specialist,
    present,
    read_json,
)
from modalloy.checkpoints.tensors import BLOCK_BYTES
from modalloy.engines.local import AHEAD, default_workers, resident_bytes
from modalloy.errors import CheckpointError, RecipeError, nearest
from modalloy.families.donors import MappedRef, assembled, open_donors, to_dict
from modalloy.families.mapping import ModelMap
from modalloy.fit import check_base, check_shapes, common_chat_template
from modalloy.linalg import BLOCK_ENTRIES, EXACT_SIZE
from modalloy.methods import METHODS, resolve
from modalloy.methods.entries import BLOCK_ENTRIES as ENTRIES_AT_ONCE
from modalloy.names import EMBEDDINGS
from modalloy.omni import Sense, choose_senses
from modalloy.recipe import Recipe, Rule

Fate = Literal["merged", "kept", "averaged", "carried", "left out"]
SAMPLED_LAYERS = 12  # merged again to verify a result
LITERAL_LIMIT = 2048  # layers up to this size are recomputed on dense float64 matrices where that is equivalent
WRITE_BYTES = 3 * BLOCK_BYTES  # on their way to the disk
LIBRARY_BYTES = 16 << 20  # of BLAS and LAPACK, which the first product and decomposition bring in
# float64 matrices that an eigendecomposition holds: the Gram, its copy that becomes the vectors, LAPACK's two, their reversal
EIGEN_COPIES = 5
SPECTRAL_COPIES = 6  # of the weight's size, in float64: an update, its projection, factors, a workspace
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
    - keep: the base's tensor, unchanged
    - carry: a specialist's tensor, bit for bit
    """

    kind: Literal["merge", "average", "interpolate", "keep", "carry"]
    slot: str
    outputs: tuple[TensorSpec, ...]
    reads: tuple[TensorRef, ...] = ()
    method: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)  # resolved, at this weight's depth
    weights: tuple[float, ...] = ()  # of the specialists

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
    fishers: list[WeightFile | None]
    senses: dict[str, Sense] = field(default_factory=dict)  # by modality, for `omni`
    chat_template: str | None = None
    surveys: dict[str, dict[str, Any]] = field(default_factory=dict)  # by group of jobs, once the merge has made them
    compression: dict[str, float] = field(default_factory=dict)  # relative error of updates that were cut to fit
    maps: dict[str, ModelMap] = field(default_factory=dict)  # by donor, of a merge across architectures

    @property
    def base_is_portable(self) -> bool:
        """Whether the recipe names the base so that any machine finds it (built in, or a hub id)."""
        return is_portable(self.recipe.start, self.recipe.folder)

    @property
    def base_name(self) -> str:
        """The base's name without local folders."""
        return self.recipe.start if self.base_is_portable else self.base_folder.name

    @property
    def base_label(self) -> str:
        """What the plan calls it."""
        return _base_label(self.recipe)

    @property
    def copies_base(self) -> bool:
        """Whether the result holds a copy of the base: an omni folder does, where only this machine would find it."""
        return self.recipe.output.form == "omni" and not self.base_is_portable

    @property
    def reads_base(self) -> bool:
        """Whether the base's files are read as a whole, and so hashed; else their headers identify it."""
        return self.recipe.output.form == "full" or self.copies_base

    @property
    def write_bytes(self) -> int:
        """Size of the tensors that will be written."""
        return sum(job.write_bytes for job in self.jobs)

    @property
    def read_bytes(self) -> int:
        """Bytes that a merge reads: every file that it hashes, once; surveyed weights and those merged again to verify, again."""
        once = sum(file.path.stat().st_size for file in self.hashed_files())
        again = sum(job.read_bytes for job in [*self.surveyed(), *self.sample()])
        for job in self.sample():
            again += job.write_bytes
            if len(job.outputs) == 1 and any(job.slot in s.full for s in self.specialists):
                again += self.base.refs[job.slot].n_bytes  # for the update, and again to add it
        return once + again

    def surveyed(self) -> list[Job]:
        """The merged weights whose method must see the whole model first."""
        return [job for job in self.jobs if job.kind == "merge" and METHODS[job.method].needs_survey(job.parameters)]

    def hashed_files(self) -> list[WeightFile]:
        """The weight files that the merge reads as a whole, once, and hashes on the way."""
        files = [file for specialist in self.specialists for file in specialist.checkpoint.files]
        return files + (self.base.files if self.reads_base else [])

    @property
    def disk_bytes(self) -> int:
        """Room that the result takes: the tensors, and copies of the base and encoders that only this machine would find."""
        copied = [file.path for file in self.base.files] if self.copies_base else []
        copied += [path for sense in self.senses.values() for path in sense.files()]
        return self.write_bytes + sum(path.stat().st_size for path in copied)

    def sample(self) -> list[Job]:
        """The merged weights that are computed again to verify the result."""
        merges = [job for job in self.jobs if job.kind == "merge"]
        last = SAMPLED_LAYERS - 1
        spread = (round(index * (len(merges) - 1) / last) for index in range(SAMPLED_LAYERS))  # the last one too
        return merges if len(merges) <= SAMPLED_LAYERS else [merges[index] for index in spread]

    def is_recomputed_literally(self, job: Job) -> bool:
        """Whether a merged weight is verified on dense float64 matrices.

        What selects single entries may select others in another precision, so it is recomputed exactly as it was merged; so
        is what lies between two models of few bits, which α = 0.1 often puts in the middle of two neighbours.
        """
        method = METHODS[job.method]
        equivalent = "factored = dense" in method.laws and method.gets(job.parameters) != "dense"
        # a larger full matrix is not cut to a rank as its factors are: not exactly
        limit = LITERAL_LIMIT if self.recipe.output.compress_rank is None else EXACT_SIZE
        return equivalent and not self.maps and max(self.base.refs[job.slot].shape) <= limit

    @property
    def fingerprint(self) -> str:
        """Hash of what is made from what: recipe, program, jobs, and every input file's name, size and time of change."""
        files = [file.path for checkpoint in self.checkpoints() for file in checkpoint.files]
        files += [file.path for file in self.fishers if file is not None]
        configs = ("config.json", "adapter_config.json")  # which set the updates' scale, and are copied
        files += [c.folder / name for c in self.checkpoints() for name in present(c.folder, configs)]
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        jobs = [(job.kind, job.slot, job.method, job.parameters, job.weights, str(job.outputs)) for job in self.jobs]
        made = [__version__, torch.__version__, self.recipe.model_dump_json(), self.recipe.to_yaml(), stats, jobs]
        return hashlib.sha256(json.dumps(made).encode()).hexdigest()

    def checkpoints(self) -> list[Checkpoint]:
        """The base's tensors, then the specialists'."""
        return [self.base, *(specialist.checkpoint for specialist in self.specialists)]

    def read(self, ref: TensorRef, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """The data of any input tensor, checked for NaN and infinity; in `buffer` (uint8) if given."""
        if isinstance(ref, MappedRef):
            return assembled(ref, self.read, buffer)
        for specialist in self.specialists:
            if specialist.checkpoint.owns(ref):
                return specialist.read(ref, buffer)
        if self.base.owns(ref):
            return checked(self.base.read(ref, buffer), ref, "base")
        file = next(file for file in self.fishers if file is not None and file.path == ref.file)
        return file.read(ref, buffer)

    def peak_bytes(self, n_workers: int) -> int:
        """Memory that a merge with `n_workers` holds at its peak, while merging or verifying, with what the process holds now."""
        sizes = [self._job_bytes(job) for job in self.jobs]
        held = [job.read_bytes + job.write_bytes for job in self.jobs]
        window = n_workers + AHEAD
        waiting = max((sum(held[i : i + window]) for i in range(len(held))), default=0)
        working = max((sum(sorted(sizes[i : i + window])[-n_workers:]) for i in range(len(sizes))), default=0)
        verifying = sum(sorted(self._check_bytes(job) for job in self.sample())[-n_workers:])
        writing = min(WRITE_BYTES, self.write_bytes)
        return resident_bytes() + LIBRARY_BYTES + max(waiting + working + writing, verifying)

    def counts(self) -> dict[str, int]:
        """Number of input tensors by fate."""
        counted = Counter(fate.fate for fate in self.fates)
        return {fate: counted[fate] for fate in ("merged", "averaged", "kept", "carried", "left out") if counted[fate]}

    def merged_weights(self) -> int:
        """Number of linear weights that the method merges."""
        return sum(job.kind == "merge" for job in self.jobs)

    def summary(self) -> str:
        """One line: what is merged and how, and what is not."""
        chosen = {name: value for name, value in self.parameters.items() if value != "none"}
        settings = ", ".join(f"{_letter(name)}={_shown(value)}" for name, value in chosen.items())
        parts = [f"{self.merged_weights()} linear weights merged ({self.recipe.merge_method}, {settings})"]
        parts += [f"{count} tensors {fate}" for fate, count in self.counts().items() if fate != "merged"]
        if self.maps:
            parts.insert(1, f"{sum(job.kind == 'interpolate' for job in self.jobs)} norms and biases too")
            parts.append("α is the weight of the donor, 0 = target unchanged")
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
            "disk_bytes": self.disk_bytes,
            "peak_bytes": self.peak_bytes(default_workers()),
            "tensors": [dataclasses.asdict(fate) for fate in self.fates],
        } | ({"coverage": to_dict(self.maps)} if self.maps else {})

    def _job_bytes(self, job: Job, *, literal: bool = False) -> int:
        """What working on a job takes beside its inputs and outputs."""
        assembling = max((ref.largest_bytes for ref in job.reads if isinstance(ref, MappedRef)), default=0)
        if job.kind in ("average", "interpolate"):
            return assembling + 2 * 8 * job.outputs[0].n_bytes // job.outputs[0].dtype.itemsize
        if job.kind != "merge":
            return 0
        rows, columns = self.base.refs[job.slot].shape
        method, n = METHODS[job.method], len(self.specialists)
        gets = method.gets(job.parameters)
        wide = 8 if literal or self.recipe.dtype == "float64" else 4
        stacked = sum(s.text[job.slot].rank for s in self.specialists if job.slot in s.text)
        full = any(job.slot in s.full for s in self.specialists)
        if not full and gets != "dense" and not literal:
            blocks = 2 * 8 * min(4096, max(rows, columns)) * stacked  # of tall factors, in float64
            return wide * 3 * stacked * (rows + columns) + 8 * 10 * stacked**2 + blocks
        if full and not stacked and method.rowwise and not literal:
            return assembling + wide * (n + 4) * min(BLOCK_ENTRIES, rows * columns)
        copies = n * method.copies_updates(job.parameters)
        taken = wide * rows * columns * (n + 2 + copies)  # the updates, the merged one, and one on the way
        if gets == "dense":
            return taken + wide * 4 * n * ENTRIES_AT_ONCE
        if method.rowwise:
            return taken
        # where both sides play one part, the Gram is that of the shorter
        side = min(rows, columns) if gets == "core" and "transpose" in method.laws else max(rows, columns)
        own = {"core": SPECTRAL_COPIES, "left_core": n}.get(gets, 0)
        return taken + 8 * EIGEN_COPIES * side**2 + 8 * own * rows * columns

    def _check_bytes(self, job: Job) -> int:
        """What verifying a merged weight takes: reading it, merging it again, and their difference."""
        rows, columns = self.base.refs[job.slot].shape
        literal = self.is_recomputed_literally(job)
        whole = len(job.outputs) == 1
        entries = min(BLOCK_ENTRIES, rows * columns) if whole else rows * columns if literal else 0
        merging = self._job_bytes(job, literal=literal)
        if whole and METHODS[job.method].rowwise and any(job.slot in s.full for s in self.specialists):
            wide = 8 if literal or self.recipe.dtype == "float64" else 4
            merging = wide * rows * columns * (len(self.specialists) + 2)
        return job.read_bytes + job.write_bytes + merging + 2 * 8 * entries


def plan(recipe: Recipe, *, allow_base_mismatch: bool = False) -> Plan:
    """The plan of `recipe`: opens every input's headers, checks that they fit, and lists every tensor's fate.

    Raises:
        CheckpointError: an input is missing, damaged, or does not fit the base.
        RecipeError: the recipe asks for something that these inputs cannot give.
    """
    base_folder = locate(recipe.start, recipe.folder)
    base = open_base(base_folder)
    if recipe.target is not None:
        return _plan_across(recipe, base, allow_base_mismatch)
    specialists = [
        open_specialist(
            locate_specialist(entry.model, recipe.folder), modality=entry.modality, label=label, ignore=recipe.ignore
        )
        for entry, label in zip(recipe.models, labels(recipe), strict=True)
    ]
    base_config = read_json(base_folder / "config.json")
    for specialist in specialists:
        check_base(specialist, recipe, base_config, allow_base_mismatch)
        check_shapes(specialist, base, base_config)
    form, compress = recipe.output.form, recipe.output.compress_rank
    if form == "adapter" and compress is None:
        for specialist in specialists:
            if whole := next((ref for name, ref in specialist.full.items() if not name.endswith(EMBEDDINGS)), None):
                holds = "is a full model" if specialist.layout == "full" else f"holds {whole.name} whole"
                raise RecipeError(
                    f"output.form 'adapter' needs low-rank specialists, but '{specialist.label}' {holds}; write form: full, "
                    "or output.compress_rank: k to approximate what is merged"
                )
    senses = choose_senses(recipe, specialists, base_config["hidden_size"]) if form == "omni" else {}
    template = common_chat_template(specialists) if form == "omni" else None
    planner = _Planner(recipe, base, specialists)
    jobs = planner.full_jobs() if form == "full" else planner.adapter_jobs()
    result = Plan(
        recipe,
        base_folder,
        base,
        specialists,
        planner.parameters,
        jobs,
        planner.fates(),
        planner.rank,
        planner.fishers,
        senses,
        template,
    )
    _check_all_accounted(result)
    _check_fishers(recipe, result)
    _check_patterns(recipe, result)
    return result


def _plan_across(recipe: Recipe, target: Checkpoint, allow_base_mismatch: bool) -> Plan:
    """The plan of a merge of donors into a target of another architecture."""
    places = [
        (label, locate(entry.model, recipe.folder)) for label, entry in zip(labels(recipe), recipe.models, strict=True)
    ]
    donors, maps = open_donors(recipe, target, places, allow=allow_base_mismatch)
    planner = _Planner(recipe, target, donors)
    jobs, fates = planner.full_jobs(), planner.mapped_fates(maps)
    parameters, fishers = planner.parameters, planner.fishers
    result = Plan(recipe, target.folder, target, donors, parameters, jobs, fates, None, fishers, maps=maps)
    _check_all_accounted(result)
    _check_fishers(recipe, result)
    _check_patterns(recipe, result)
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
    taken = Counter([*names, "base", _base_label(recipe)])  # the plan and the manifest call the base so
    return [name if taken[name] == 1 else f"{name}#{index + 1}" for index, name in enumerate(names)]


class _Planner:
    """Works out jobs and fates for checked inputs."""

    def __init__(self, recipe: Recipe, base: Checkpoint, specialists: list[Specialist]) -> None:
        self.recipe, self.base, self.specialists = recipe, base, specialists
        self.rank: int | None = None
        ranks = [s.rank for s in specialists if s.rank is not None]
        self.lora_rank = max(ranks, default=None)
        self.depth = 1 + max((index for name in base.refs if (index := _layer(name)) is not None), default=-1)
        full = {name for s in specialists for name in s.full if name in base.refs}
        linear = {name for name in full if _is_linear(base.refs[name])} | {slot for s in specialists for slot in s.text}
        self.rules = {name: (pattern, rule) for name in base.refs for pattern, rule in [self._rule(name)] if rule}
        kept = {name for name, (_, rule) in self.rules.items() if rule.policy == "keep"}
        asked = {name for name, (_, rule) in self.rules.items() if rule.policy == "average"}
        self.merged = [name for name in base.refs if name in linear - kept]
        others = {n for n in full if base.refs[n].dtype.is_floating_point and len(base.refs[n].shape) != 2}
        self.averaged = [name for name in base.refs if name in (others | asked & full) - linear - kept]
        self.interpolated: list[str] = []
        self.parameters = self._resolved(recipe.merge_method, recipe.parameters, None)
        self.fishers = [self._fisher(entry.parameters.fisher) for entry in recipe.models]
        if recipe.target is None:
            self._check_complete()
            return
        # all that has a counterpart moves, embeddings of the same tokens too; with α = 0 the bytes stay the target's
        self.depth = 1 + max((index for name in full if (index := _layer(name)) is not None), default=-1)
        moving = [n for n in base.refs if n in full and self._resolved(*self._method(n), n)["alpha"] != 0]
        self.merged = [name for name in moving if len(base.refs[name].shape) == 2]
        self.interpolated = [name for name in moving if len(base.refs[name].shape) != 2]
        self.averaged = []

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
        merged, averaged, interpolated = set(self.merged), set(self.averaged), set(self.interpolated)
        for name, ref in self.base.refs.items():
            spec = self._like_base(name)
            if name in merged:
                jobs.append(self._merge_job(name, (spec,)))
            elif name in averaged:
                having = tuple(s.full[name] for s in self.specialists if name in s.full)
                jobs.append(Job("average", name, (spec,), having))
            elif name in interpolated:
                jobs.append(self._merge_job(name, (spec,), "interpolate"))
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

    def mapped_fates(self, maps: dict[str, ModelMap]) -> list[TensorFate]:
        """The same for a merge across architectures."""
        moving = {*self.merged, *self.interpolated}
        result = []
        for name in self.base.refs:
            tensors = [found.tensors[name] for found in maps.values()]
            operations = ", ".join(dict.fromkeys(tensor.operation for tensor in tensors if tensor.pieces))
            reasons = ", ".join(dict.fromkeys(tensor.reason for tensor in tensors if tensor.reason))
            still = TensorFate("target", name, "kept", reasons or "alpha: 0")
            result.append(TensorFate("target", name, "merged", f"linear, {operations}") if name in moving else still)
        for donor in self.specialists:
            found = maps[donor.label]
            into: dict[str, list[str]] = {name: [] for name in donor.checkpoint.refs}
            for tensor in found.tensors.values():
                for source in {piece.source for piece in tensor.pieces if tensor.name in moving}:
                    into[source].append(tensor.name)
            for name, targets in into.items():
                fate: tuple[Fate, str] = ("left out", found.dropped.get(name, "alpha: 0"))
                if targets:
                    more = f"; some rows: {found.partly[name][1]}" if name in found.partly else ""
                    fate = ("merged", f"into {' and '.join(targets)}{more}")
                result.append(TensorFate(donor.label, name, *fate))
        return result

    def _merge_job(
        self, slot: str, specs: tuple[TensorSpec, ...], kind: Literal["merge", "interpolate"] = "merge"
    ) -> Job:
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
        remedy = "give one number, or keep the base's by `modules:` with policy: keep"
        weights = tuple(self._at(entry.parameters.weight, slot, "weight", remedy) for entry in self.recipe.models)
        return Job(kind, slot, specs, tuple(reads), method, self._resolved(method, parameters, slot), weights)

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
            return resolve(method, single, n=len(self.specialists), lora_rank=self.lora_rank)
        return resolve(method, single, n=len(self.specialists), lora_rank=self.lora_rank) | lists

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

    def _check_complete(self) -> None:
        """Every specialist must update every merged weight, unless the recipe says that a missing one counts as zero."""
        if self.recipe.missing == "zero":
            return
        for specialist in self.specialists:
            lacking = [slot for slot in self.merged if slot not in specialist.text and slot not in specialist.full]
            if lacking:
                other = next(s.label for s in self.specialists if lacking[0] in s.text or lacking[0] in s.full)
                raise CheckpointError(
                    f"{specialist.label} specialist: has no update of {lacking[0]} ({len(lacking)} weights in all), the {other} "
                    "specialist has; say `missing: zero` in the recipe to count it as zero, or keep these weights under `modules:`"
                )

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

    def _like_base(self, name: str) -> TensorSpec:
        """The base's tensor in the output type."""
        ref, chosen = self.base.refs[name], self.recipe.written_dtype
        dtype = ref.dtype if chosen == "auto" or not ref.dtype.is_floating_point else getattr(torch, chosen)
        return TensorSpec(name, dtype, ref.shape)

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


def _check_all_accounted(result: Plan) -> None:
    """Every tensor of every input has exactly one fate."""
    listed = Counter((fate.source, fate.tensor) for fate in result.fates)
    inputs = {(result.base_label, name) for name in result.base.refs}
    inputs |= {(s.label, name) for s in result.specialists for name in s.checkpoint.refs}
    twice = {key for key, count in listed.items() if count > 1}
    if wrong := sorted((listed.keys() ^ inputs) | twice):
        raise RuntimeError(
            f"the plan does not give one fate to each tensor, for example {wrong[:3]}; please report this"
        )


def _check_patterns(recipe: Recipe, result: Plan) -> None:
    """A pattern that matches nothing is a mistake in writing."""
    theirs = [name for specialist in result.specialists for name in specialist.checkpoint.refs]
    for key, patterns, names in (
        ("modules", recipe.modules, list(result.base.refs)),
        ("ignore", recipe.ignore, theirs),
    ):
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                raise RecipeError(f"{key}: no tensor matches '{pattern}'; {nearest(pattern, names[:1000])[:200]}")
    merged = [job.slot for job in result.jobs if job.kind == "merge"]
    for pattern, rule in recipe.modules.items():
        if rule.policy is None and not fnmatch.filter(merged, pattern):
            raise RecipeError(
                f"modules: '{pattern}' names a method, but no weight that it matches is merged; write policy: keep or average"
            )


def _check_fishers(recipe: Recipe, result: Plan) -> None:
    """A Fisher file that nothing reads is a mistake."""
    if any(result.fishers) and not any(job.method and METHODS[job.method].takes("fishers") for job in result.jobs):
        raise RecipeError(
            f"parameters.fisher: {recipe.merge_method} does not weigh by Fisher information; write merge_method: fisher, "
            "or remove the file"
        )


def _base_label(recipe: Recipe) -> str:
    return "base" if recipe.target is None else "target"


def _layer(name: str) -> int | None:
    found = LAYER.search(name)
    return int(found[1]) if found else None


def _letter(parameter: str) -> str:
    return {"rank": "k", "scale": "λ"}.get(parameter, parameter)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        whole = round(1 / value) if 1e-9 < value < 1 else 0
        return f"1/{whole}" if whole and value == 1 / whole else f"{value:g}"
    return str(value)

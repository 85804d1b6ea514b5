"""What a merge will do: a list of independent jobs, and the fate of every tensor of every input. Reads headers only."""

import dataclasses
import fnmatch
import hashlib
import json
import os
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from modalloy import builtin, cost
from modalloy._version import __version__
from modalloy.checkpoints import (
    Checkpoint,
    Inputs,
    Specialist,
    WeightFile,
    config_size,
    is_hub_id,
    is_portable,
    locate,
    open_base,
    open_specialist,
    present,
    read_config,
)
from modalloy.companions import notices
from modalloy.engines.local import default_workers
from modalloy.errors import CheckpointError, RecipeError, nearest
from modalloy.families.donors import Across, open_donors
from modalloy.families.mapping import ModelMap
from modalloy.families.planner import AcrossPlanner
from modalloy.families.vocabulary import VOCABULARY_FILES
from modalloy.fit import check_base, check_fishers_are_used, check_shapes
from modalloy.forms import Form
from modalloy.kinds import Kind, check_numbers, kinds
from modalloy.methods import METHODS
from modalloy.planner import Planner
from modalloy.planning.job import Job, TensorFate
from modalloy.recipe import Recipe
from modalloy.senses.sense import Sense, choose_senses
from modalloy.summary import one_line
from modalloy.templates import common_template


@dataclass(frozen=True)
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
    notices: list[str] = field(default_factory=list)  # of tokenizers and code, for the user
    across: Across | None = None  # of a merge across architectures
    kinds: dict[str, Kind] = field(default_factory=dict)  # of the base's tensors
    absent: dict[str, str] = field(default_factory=dict)  # why a model does not count, by label
    idle: tuple[str, ...] = ()  # those of them whose every update is zero
    unchanged: tuple[str, ...] = ()  # all that count, where all their updates are zero
    must_be_equal: list[str] = field(default_factory=list)  # kept tensors that no model may have changed
    trained: dict[str, list[str]] = field(default_factory=dict)  # who changed what is kept, once `settle` has compared

    @property
    def form(self) -> Form:
        """The form of the result."""
        return self.recipe.form

    @property
    def maps(self) -> dict[str, ModelMap]:
        """How the donors of a merge across architectures were mapped, by label."""
        return {} if self.across is None else self.across.maps

    @property
    def across_base(self) -> Checkpoint | None:
        """θ_0 of a merge across architectures that has one; `base` is the target there."""
        return None if self.across is None else self.across.base

    @property
    def updated(self) -> list[Specialist]:
        """Those whose updates are merged: the specialists; before donors of other architectures the target, if there is a base."""
        target = None if self.across is None else self.across.target
        return self.specialists if target is None else [target, *self.specialists]

    @property
    def counted(self) -> list[Specialist]:
        """Those of `updated` that count: a base among the models, a weight of 0 and an update of zeros do not."""
        return [one for one in self.updated if one.label not in self.absent]

    @property
    def base_is_portable(self) -> bool:
        """Whether the recipe names the base so that any machine finds it (built in, or a hub id)."""
        return is_portable(self.recipe.start, self.recipe.folder)

    @property
    def base_name(self) -> str:
        """The base's name without local folders."""
        return self.recipe.start if self.base_is_portable else self.base_folder.name

    @property
    def recorded_base_name(self) -> str:
        """What an adapter records as its base: where that is a local folder, the hub id that all its specialists record."""
        recorded = {one.base_name for one in self.specialists}
        name = recorded.pop() if len(recorded) == 1 else None
        return name if not self.base_is_portable and name is not None and is_hub_id(name) else self.base_name

    @property
    def base_label(self) -> str:
        """What the plan calls it."""
        return _base_label(self.recipe)

    @property
    def copies_base(self) -> bool:
        """Whether the result holds a copy of the base: an omni folder does, where only this machine would find it."""
        return self.form.is_model and self.form.refers_to_base and not self.base_is_portable

    @property
    def reads_base(self) -> bool:
        """Whether the base's files are read as a whole, and so hashed; else their headers identify it."""
        return self.form.is_whole or self.copies_base

    @property
    def write_bytes(self) -> int:
        """Size of the tensors that will be written."""
        return sum(job.write_bytes for job in self.jobs)

    def surveyed(self) -> list[Job]:
        """The merged weights whose method must see the whole model first."""
        return [job for job in self.merges() if METHODS[job.method].needs_survey(job.parameters)]

    def merges(self) -> list[Job]:
        """The merged linear weights."""
        return [merge for job in self.jobs for merge in job.merges]

    def changed(self) -> set[str]:
        """The base's tensors that the result changes."""
        return {job.name for job in self.jobs if job.kind not in ("keep", "carry")}

    def hashed_files(self) -> list[WeightFile]:
        """The weight files that the merge reads as a whole, once, and hashes on the way."""
        files = [file for specialist in self.specialists for file in specialist.checkpoint.files]
        if self.across_base is not None:
            files = files + self.across_base.files
        return files + (self.base.files if self.reads_base else [])

    @property
    def fingerprint(self) -> str:
        """Hash of what is made from what: recipe, program, jobs, and every input file's name, size and time of change."""
        files = [file.path for checkpoint in self.checkpoints() for file in checkpoint.files]
        files += [file.path for file in self.fishers if file is not None]
        configs = ["config.json", "adapter_config.json"]  # which set the updates' scale, and are copied
        configs += VOCABULARY_FILES if self.across else []  # which set the rows that are merged
        files += [c.folder / name for c in self.checkpoints() for name in present(c.folder, configs)]
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        jobs = [(job.kind, job.name, job.method, job.parameters, job.weights, str(job.outputs)) for job in self.jobs]
        made = [__version__, torch.__version__, self.recipe.model_dump_json(), self.recipe.to_yaml(), stats, jobs]
        return hashlib.sha256(json.dumps(made).encode()).hexdigest()

    def checkpoints(self) -> list[Checkpoint]:
        """The base's tensors (the target's, then the base's), then the specialists'."""
        starts = [self.base] if self.across_base is None else [self.base, self.across_base]
        return starts + [one.checkpoint for one in self.specialists]

    @cached_property
    def inputs(self) -> Inputs:
        """Every input tensor's data, checked for NaN and infinity."""
        owners = [(f"{one.label} specialist", one.checkpoint.files) for one in self.specialists]
        owners.append((self.base_label, self.base.files))
        owners += [] if self.across_base is None else [("base", self.across_base.files)]
        owners += [("Fisher file", [file]) for file in self.fishers if file is not None]
        return Inputs(owners)

    def counts(self) -> dict[str, int]:
        """Number of input tensors by fate."""
        counted = Counter(fate.fate for fate in self.fates)
        return {fate: counted[fate] for fate in ("merged", "averaged", "kept", "carried", "left out") if counted[fate]}

    def merged_weights(self) -> int:
        """Number of linear weights that the method merges."""
        return len(self.merges())

    def summary(self) -> str:
        """One line: what is merged and how, and what is not."""
        return one_line(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for `--json`."""
        return {
            "method": self.recipe.merge_method,
            "parameters": self.parameters,
            "form": self.form.name,
            "specialists": [s.label for s in self.specialists],
            "merged_weights": self.merged_weights(),
            "counts": self.counts(),
            "absent": self.absent,
            "trained_but_kept": self.trained,
            "read_bytes": cost.read_bytes(self),
            "write_bytes": self.write_bytes,
            "disk_bytes": cost.disk_bytes(self),
            "peak_bytes": cost.peak_bytes(self, default_workers()),
            "notices": self.notices,
            "tensors": [dataclasses.asdict(fate) for fate in self.fates],
        } | ({"coverage": self.across.to_dict()} if self.across else {})


def plan(recipe: Recipe, *, allow_base_mismatch: bool = False, idle: Collection[str] = ()) -> Plan:
    """The plan of `recipe`: opens every input's headers, checks that they fit, and lists every tensor's fate.

    `idle`: labels of models whose updates are known to be zero, which do not count (see `modalloy.differences`).

    Raises:
        CheckpointError: an input is missing, damaged, or does not fit the base.
        RecipeError: the recipe asks for something that these inputs cannot give.
    """
    base_folder = locate(recipe.start, recipe.folder)
    base = open_base(base_folder)
    if recipe.target is not None:
        return _plan_across(recipe, base, allow_base_mismatch, idle)
    base_config = read_config(base_folder)
    check_numbers("base", base_folder, base_config, base.refs)
    specialists = [
        open_specialist(
            locate_specialist(entry.model, recipe.folder), modality=entry.modality, label=label, ignore=recipe.ignore
        )
        for entry, label in zip(recipe.models, labels(recipe), strict=True)
    ]
    absent = _absent(recipe, specialists, base_folder, idle)
    for specialist in specialists:
        if specialist.is_whole:
            check_numbers(
                f"{specialist.label} specialist", specialist.checkpoint.folder, specialist.config, specialist.full
            )
        check_base(specialist, recipe, base_config, allow_base_mismatch)
        check_shapes(specialist, base, base_config)
    form, compress = recipe.form, recipe.output.compress_rank
    found = kinds(base_config, base.refs)
    planner = Planner(recipe, base, specialists, found, absent)
    if not form.takes_full_updates and compress is None:
        for specialist in planner.counted:
            changed = (name for name in planner.merged if name in specialist.full)
            if whole := next((specialist.full[name] for name in changed), None):
                holds = "is a full model" if specialist.is_whole else f"holds {whole.name} whole"
                raise RecipeError(
                    f"output.form '{form.name}' needs low-rank specialists, but '{specialist.label}' {holds}; write form: full, "
                    "or output.compress_rank: k to approximate what is merged"
                )
    width = config_size(base_config, "hidden_size", base_folder) if form.carries_senses else 0
    senses = choose_senses(recipe, specialists, width) if form.carries_senses else {}
    template = None if not form.is_model or recipe.output.chat_template == "base" else common_template(specialists)
    jobs = planner.full_jobs() if form.is_whole else planner.adapter_jobs()
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
        kinds=found,
        absent=planner.reasons,
        idle=tuple(idle),
        must_be_equal=planner.must_be_equal(),
        notices=notices(base_folder, specialists) if form.is_model else [],
    )
    _check_all_accounted(result)
    used = any(job.method and METHODS[job.method].takes("fishers") for job in jobs)
    check_fishers_are_used(recipe, given=any(result.fishers), used=used)
    _check_patterns(recipe, result)
    return result


def _absent(recipe: Recipe, specialists: list[Specialist], base: Path | None, idle: Collection[str]) -> dict[int, str]:
    """Why a model of the recipe does not count, by its index.

    Raises:
        RecipeError: none counts.
    """
    reasons = {}
    for index, (entry, specialist) in enumerate(zip(recipe.models, specialists, strict=True)):
        weight = entry.parameters.weight
        if base is not None and specialist.is_whole and os.path.samefile(specialist.checkpoint.folder, base):
            reasons[index] = "is the base itself, which is no specialist"
        elif not any(weight if isinstance(weight, tuple) else (weight,)):
            reasons[index] = "its weight is 0"
        elif specialist.label in idle:
            reasons[index] = "changes nothing: every update is zero"
    if len(reasons) == len(specialists):
        listed = "; ".join(f"{specialists[index].label}: {reason}" for index, reason in reasons.items())
        raise RecipeError(f"nothing would be merged ({listed}); give models that were trained from the base")
    return reasons


def _plan_across(recipe: Recipe, target: Checkpoint, allow_base_mismatch: bool, idle: Collection[str]) -> Plan:
    """The plan of a merge of donors into a target of another architecture."""
    places = [
        (label, locate(entry.model, recipe.folder)) for label, entry in zip(labels(recipe), recipe.models, strict=True)
    ]
    base = locate(recipe.base_model, recipe.folder) if recipe.base_model else None
    donors, across = open_donors(recipe, target, places, base, allow=allow_base_mismatch)
    absent = _absent(recipe, donors, base, idle)
    check_numbers("target", target.folder, read_config(target.folder), target.refs)
    if across.base is not None:
        check_numbers("base", across.base.folder, read_config(across.base.folder), across.base.refs)
    for donor in donors:
        if donor.is_whole:
            check_numbers(donor.label, donor.checkpoint.folder, donor.config, donor.checkpoint.refs)
    planner = AcrossPlanner(recipe, target, donors, across, absent)
    unread: list[WeightFile | None] = [None] * len(donors)
    parameters, jobs, fates = planner.parameters, planner.jobs, planner.fates()
    result = Plan(
        recipe,
        target.folder,
        target,
        donors,
        parameters,
        jobs,
        fates,
        None,
        unread,
        across=across,
        absent=planner.reasons,
        idle=tuple(idle),
    )
    _check_all_accounted(result)
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


def _check_all_accounted(result: Plan) -> None:
    """Every tensor of every input has exactly one fate."""
    listed = Counter((fate.source, fate.tensor) for fate in result.fates)
    inputs = {(result.base_label, name) for name in result.base.refs}
    inputs |= {(s.label, name) for s in result.specialists for name in s.checkpoint.refs}
    if result.across_base is not None:
        inputs |= {("base", name) for name in result.across_base.refs}
    twice = {key for key, count in listed.items() if count > 1}
    if wrong := sorted((listed.keys() ^ inputs) | twice):
        raise RuntimeError(
            f"the plan does not give one fate to each tensor, for example {wrong[:3]}; please report this"
        )


def _check_patterns(recipe: Recipe, result: Plan) -> None:
    """A pattern that matches nothing is a mistake in writing."""
    others = [checkpoint for checkpoint in result.checkpoints() if checkpoint is not result.base]
    theirs = [name for checkpoint in others for name in checkpoint.refs]
    for key, patterns, names in (
        ("modules", recipe.modules, list(result.base.refs)),
        ("ignore", recipe.ignore, theirs),
    ):
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                raise RecipeError(f"{key}: no tensor matches '{pattern}'; {nearest(pattern, names[:1000])[:200]}")
    merged = [job.name for job in result.jobs if job.method or job.pieces]
    averaged = merged + [job.name for job in result.jobs if job.kind == "average"]
    for pattern, rule in recipe.modules.items():
        reached = averaged if rule.merge_method is None else merged  # λ reaches norms and biases too
        if rule.policy is None and not fnmatch.filter(reached, pattern):
            raise RecipeError(
                f"modules: '{pattern}' names a method or its parameters, but no weight that it matches is merged by one; write "
                "policy: keep or average"
            )
        if rule.policy == "average" and not fnmatch.filter(averaged, pattern):
            raise RecipeError(
                f"modules: '{pattern}' is to be averaged, but no other model has what it matches; remove the rule"
            )


def _base_label(recipe: Recipe) -> str:
    return "base" if recipe.target is None else "target"

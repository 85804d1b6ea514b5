"""What a merge will do: a list of independent jobs, and the fate of every tensor of every input. Read, never written."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from modalloy._version import __version__
from modalloy.families.mapping import ModelMap
from modalloy.families.union import Vocabulary
from modalloy.families.vocabulary import VOCABULARY_FILES
from modalloy.forms import Form
from modalloy.machine.cores import default_workers
from modalloy.methods import METHODS
from modalloy.planning import cost
from modalloy.planning.job import Job, TensorFate
from modalloy.planning.kinds import Kind
from modalloy.planning.mapped import Across
from modalloy.planning.models import base_label
from modalloy.planning.senses import NativeSense, Sense
from modalloy.planning.summary import one_line
from modalloy.recipe import Recipe
from modalloy.specialists.specialist import Specialist
from modalloy.storage.folder import present
from modalloy.storage.inputs import Inputs
from modalloy.storage.locate import hub_id, is_hub_id, is_portable
from modalloy.storage.tensors import Checkpoint, WeightFile


@dataclass(frozen=True)
class Plan:
    """The jobs of a merge in the order they are written, and the account of every input tensor."""

    recipe: Recipe
    target: Checkpoint  # what is written: the base itself, or a model of another architecture
    base: Checkpoint | None  # θ_0, which all models were trained from; None where donors are interpolated
    specialists: list[Specialist]
    parameters: dict[str, Any]
    jobs: list[Job]
    fates: list[TensorFate]
    rank: int | None  # of the written adapter
    fishers: list[WeightFile | None]
    senses: dict[str, Sense | NativeSense] = field(default_factory=dict)  # by modality, for `omni`
    chat_template: str | None = None
    notices: list[str] = field(default_factory=list)  # of tokenizers and code, for the user
    across: Across | None = None  # of a merge across architectures
    kinds: Mapping[str, Kind] = field(default_factory=dict)  # of the target's tensors
    absent: dict[str, str] = field(default_factory=dict)  # why a model does not count, by label
    idle: tuple[str, ...] = ()  # those of them whose every update is zero
    unchanged: tuple[str, ...] = ()  # all that count, where all their updates are zero
    must_be_equal: list[str] = field(default_factory=list)  # kept tensors that no model may have changed
    vocabulary: Vocabulary | None = None  # of a result that has other tokens than its base
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
    def starts(self) -> list[tuple[str, Checkpoint]]:
        """What updates are added to, by the names that messages have for it: the target, and the base where it is another."""
        further = [] if self.base is None or self.base is self.target else [("base", self.base)]
        return [(base_label(self.recipe), self.target), *further]

    @property
    def models(self) -> list[Specialist]:
        """The models whose updates are merged. Across architectures with a base, the target comes first, then the donors."""
        target = None if self.across is None else self.across.target
        return self.specialists if target is None else [target, *self.specialists]

    @property
    def counted(self) -> list[Specialist]:
        """Those of `models` that count: a base among the models, a weight of 0 and an update of zeros do not."""
        return [one for one in self.models if one.label not in self.absent]

    @property
    def target_is_portable(self) -> bool:
        """Whether the recipe names the target so that any machine finds it (built in, or a hub id)."""
        return is_portable(self.recipe.start, self.recipe.folder)

    @property
    def target_name(self) -> str:
        """The target's name without local folders."""
        return hub_id(self.recipe.start) if self.target_is_portable else self.target.folder.name

    @property
    def base_name(self) -> str:
        """θ_0's name without local folders."""
        return self.across.base_name if self.across is not None and self.across.base is not None else self.target_name

    @property
    def recorded_base_name(self) -> str:
        """What an adapter records as its base: where that is a local folder, the hub id that all its specialists record."""
        recorded = {one.base_name for one in self.specialists}
        name = recorded.pop() if len(recorded) == 1 else None
        return name if not self.target_is_portable and name is not None and is_hub_id(name) else self.target_name

    @property
    def target_label(self) -> str:
        """What the plan calls it."""
        return base_label(self.recipe)

    @property
    def copies_target(self) -> bool:
        """Whether the result holds a copy of the target: an omni folder does, where only this machine would find it."""
        return self.form.is_model and self.form.refers_to_base and not self.target_is_portable

    @property
    def reads_target(self) -> bool:
        """Whether the target's files are read as a whole, and so hashed; else their headers identify it."""
        return self.form.is_whole or self.copies_target

    @property
    def chooses_rows(self) -> bool:
        """Whether the models' tokenizers decide which rows of embeddings are merged."""
        return self.across is not None or self.vocabulary is not None

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

    def written(self) -> list[Job]:
        """The jobs as they are before weights become codes again."""
        return [job.pieces[0] if job.kind == "requantise" else job for job in self.jobs]

    def changed(self) -> set[str]:
        """The target's tensors that the result changes."""
        return {job.name for job in self.jobs if job.kind not in ("keep", "carry")}

    def hashed_files(self) -> list[WeightFile]:
        """The weight files that the merge reads as a whole, once, and hashes on the way."""
        read = [one.checkpoint for one in self.specialists] + [model for _, model in self.starts[1:]]
        return [file for model in read for file in model.files] + (self.target.files if self.reads_target else [])

    @property
    def fingerprint(self) -> str:
        """Hash of what is made from what: recipe, program, jobs, and every input file's name, size and time of change."""
        weights = [file for checkpoint in self.checkpoints() for file in checkpoint.files]
        weights += [file for file in self.fishers if file is not None]
        stats = [(file.path.name, *file.stamp[:2]) for file in weights]
        configs = ["config.json", "adapter_config.json"]  # which set the updates' scale, and are copied
        configs += VOCABULARY_FILES if self.chooses_rows else []  # which set the rows that are merged
        files = [c.folder / name for c in self.checkpoints() for name in present(c.folder, configs)]
        stats += [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        jobs = [(job.kind, job.name, job.method, job.parameters, job.weights, str(job.outputs)) for job in self.jobs]
        made = [__version__, torch.__version__, self.recipe.model_dump_json(), self.recipe.to_yaml(), stats, jobs]
        return hashlib.sha256(json.dumps(made).encode()).hexdigest()

    def checkpoints(self) -> list[Checkpoint]:
        """The target's tensors, the base's, then the specialists'."""
        return [model for _, model in self.starts] + [one.checkpoint for one in self.specialists]

    @cached_property
    def inputs(self) -> Inputs:
        """Every input tensor's data, checked for NaN and infinity."""
        owners = [(f"{one.label} specialist", one.checkpoint.files) for one in self.specialists]
        owners += [(label, model.files) for label, model in self.starts]
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

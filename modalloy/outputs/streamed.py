"""The weights of one result, streamed in the order of its plan's jobs into the folder where it is made."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from modalloy.planning.job import Done, Job, Run, Survey
from modalloy.planning.plan import Plan
from modalloy.storage.staging import Staging
from modalloy.storage.writer import TensorSpec, WeightWriter

if TYPE_CHECKING:
    from modalloy.engines.ray import WrittenShard


class StreamedWeights:
    """Writes what jobs give, and notes every finished shard so that a killed merge keeps it."""

    def __init__(self, planned: Plan, staging: Staging) -> None:
        self.planned, self.staging = planned, staging
        specs = [spec for job in planned.jobs for spec in job.outputs]
        limit = planned.recipe.output.max_shard_size if planned.form.has_shards else None
        self.writer = WeightWriter(staging.folder, planned.form.stem, specs, limit)
        self.kept = self.writer.keep(staging.finished)
        self.compression = dict(staging.facts) if self.kept else {}
        self.remaining = [job for job in planned.jobs if not self.kept.issuperset(spec.name for spec in job.outputs)]

    def add(self, job: Job, done: Done) -> None:
        """Write the tensors of the next job of `remaining`."""
        self.staging.is_untouched = False
        self.compression |= done.compression
        for spec, tensor in zip(job.outputs, done.tensors, strict=True):
            if spec.name in self.kept:  # of a job whose other tensors are in a later shard
                continue
            if finished := self.writer.add(spec.name, tensor):
                self.staging.note(finished, self.writer.sha256[finished], self.compression)

    def shards(self, jobs: Sequence[Job]) -> list[tuple[int, tuple[TensorSpec, ...], tuple[Job, ...]]]:
        """Every shard that is not written yet: its number, what is in it, and those of `jobs` that give that."""
        of = {spec.name: job for job in jobs for spec in job.outputs}
        left = ((index, specs) for index, specs in enumerate(self.writer.shards) if specs[0].name not in self.kept)
        found = []
        for index, specs in left:
            own = {of[spec.name].outputs[0].name: of[spec.name] for spec in specs}
            found.append((index, tuple(specs), tuple(own.values())))
        return found

    def adopt(self, shard: "WrittenShard") -> None:
        """Take a shard that another process wrote."""
        self.staging.is_untouched = False
        name = self.writer.adopt(shard.index, shard.path, shard.sha256)
        shard.path.parent.rmdir()
        self.compression |= shard.compression
        self.staging.note(name, shard.sha256, dict(shard.compression))

    def close(self, surveys: dict[str, Survey]) -> Run:
        """What the merge found out, once everything is on the disk."""
        self.writer.close()
        return Run(surveys, self.compression, self.writer.sha256)

    def abort(self) -> None:
        """Close the open file after a failure."""
        self.writer.abort()

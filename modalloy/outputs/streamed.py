"""The weights of one result, streamed in the order of its plan's jobs into the folder where it is made."""

from modalloy.planning.job import Done, Job, Run, Survey
from modalloy.planning.plan import Plan
from modalloy.storage.staging import Staging
from modalloy.storage.writer import WeightWriter


class StreamedWeights:
    """Writes what jobs give, and notes every finished shard so that a killed merge keeps it."""

    def __init__(self, planned: Plan, staging: Staging) -> None:
        self.staging = staging
        specs = [spec for job in planned.jobs for spec in job.outputs]
        limit = planned.recipe.output.max_shard_size if planned.form.has_shards else None
        self.writer = WeightWriter(staging.folder, planned.form.stem, specs, limit)
        self.kept = self.writer.keep(staging.finished)
        self.compression = dict(staging.facts) if self.kept else {}
        self.remaining = [job for job in planned.jobs if not self.kept.issuperset(spec.name for spec in job.outputs)]

    def add(self, job: Job, done: Done) -> None:
        """Write the tensors of the next job of `remaining`."""
        self.compression |= done.compression
        for spec, tensor in zip(job.outputs, done.tensors, strict=True):
            if spec.name in self.kept:  # of a job whose other tensors are in a later shard
                continue
            if finished := self.writer.add(spec.name, tensor):
                self.staging.note(finished, self.writer.sha256[finished], self.compression)

    def close(self, surveys: dict[str, Survey]) -> Run:
        """What the merge found out, once everything is on the disk."""
        self.writer.close()
        return Run(surveys, self.compression, self.writer.sha256)

    def abort(self) -> None:
        """Close the open file after a failure."""
        self.writer.abort()

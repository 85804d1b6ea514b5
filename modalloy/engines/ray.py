"""A merge on the machines of a Ray cluster: each worker reads what its shards need, and writes these itself.

Inputs and target are on paths that every machine has (checked before any work), or inputs are in a store. Nothing large goes
through the driver: a task is sent a shard's jobs and answers with the shard's hash. A form that is one small file (an adapter,
an omni folder) is computed by the tasks and written by the driver. A task whose worker died runs again; what its worker left
is in a folder of its own, so that no two write one file. Every job runs on one BLAS thread, so the bytes are those of `local`.
A driver that gives up takes away a mark for which tasks look before each job. Ray's own `cancel` is not used: it (2.60) aborts
the driver ("tried to complete task that was not pending") where the task ends in the same moment.
"""

import os
import secrets
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from modalloy.engines import local
from modalloy.engines.connection import knock
from modalloy.errors import ModalloyError, OutputError, PassingError, plain
from modalloy.files import cache_folder
from modalloy.machine.cores import AHEAD
from modalloy.machine.threads import one_thread
from modalloy.planning.job import Done, Job
from modalloy.planning.program import program
from modalloy.storage.inputs import Inputs
from modalloy.storage.tensors import WeightFile
from modalloy.storage.writer import TensorSpec, WeightWriter

LOOK_S, MISSED = 3, 4  # how often to look for a cluster whose tasks do not answer, and how often in vain
STOP_S = 60  # to wait for tasks that are given up
RETRIES = 8  # of a task whose worker died
LEFT = ".shard-"  # how the folders begin in which shards are written, and what killed workers left
Compute = local.Compute
Given = tuple[Any, ...]  # a token, the inputs' files by owner, the driver's folders, and `compute`


class LostTaskError(OutputError, PassingError):
    """The cluster lost a task again and again, or was lost itself."""


@dataclass(frozen=True)
class Shard:
    """An output file of this number in each of some results' folders: what is in it there, and the jobs that give that.

    Of one result the jobs are its own; of more each is "several", with a piece for every result.
    """

    index: int
    folders: tuple[Path, ...]
    specs: tuple[tuple[TensorSpec, ...], ...]
    jobs: tuple[Job, ...]


@dataclass(frozen=True)
class WrittenShard:
    """A shard that is whole, in a folder of its own beside where it belongs."""

    index: int
    path: Path
    sha256: str
    compression: Mapping[str, float]

    @property
    def folder(self) -> Path:
        """That of its result."""
        return self.path.parent.parent


class Cluster:
    """A Ray cluster that runs a merge's jobs."""

    def __init__(self, n_workers: int | None = None, task_bytes: int | None = None) -> None:
        """`n_workers`: tasks at once, as many as the cluster has processors by default; `task_bytes`: memory of one."""
        import ray

        self.ray = ray
        self.is_lost = False
        # of a Ray client, Ray itself tells within half a minute; of others it ends the process after a minute, without a word
        self.address = None if ray.util.client.ray.is_connected() else ray.get_runtime_context().gcs_address
        self.nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
        cpus = sum(int(node["Resources"]["CPU"]) for node in self.nodes)
        if not cpus:
            raise OutputError("the cluster has no machine with a processor for tasks; start one with `ray start`")
        self.n_workers = min(n_workers or cpus, cpus)
        self.functions: dict[Callable[..., Any], Any] = {}
        self.options: dict[str, Any] = {"num_cpus": 1, "max_retries": RETRIES, "scheduling_strategy": "SPREAD"}
        if task_bytes is not None:
            most = max(node["Resources"].get("memory", 0) for node in self.nodes)
            if task_bytes > most:
                raise OutputError(
                    f"--max-memory: no machine of the cluster has {task_bytes / 1e9:.2f} GB for a task, the largest has "
                    f"{most / 1e9:.2f} GB; give less"
                )
            self.options["memory"] = task_bytes

    def run(self, jobs: Sequence[Job], inputs: Inputs, compute: Compute) -> Generator[tuple[Job, Done], None, None]:
        """Yields every job with what it gives, in the jobs' order: the contract of an engine, for small results."""
        given = self._given(inputs, compute)
        yield from self._in_order(jobs, lambda job: self._sent(self._remote(_compute), given, job))

    def write(
        self, shards: Sequence[Shard], inputs: Inputs, compute: Compute
    ) -> Generator[tuple[WrittenShard, ...], None, None]:
        """Yields every shard, of each of its results, as soon as a worker has written it; it is then to be moved to its place."""
        if not shards:
            return
        given = self._given(inputs, compute)
        left, started, waiting = deque(shards), list[Any](), list[Any]()
        try:
            with _mark(shards[0].folders[0]) as mark:
                while left or waiting:
                    while left and len(waiting) < self.n_workers + AHEAD:
                        waiting.append(self._sent(self._remote(_write), given, left.popleft(), mark))
                        started.append(waiting[-1])
                    (done, *_), waiting = self._wait(waiting)
                    try:
                        shard = self._get(done)
                    except ModalloyError:
                        # what is told is what goes wrong first in the shards' order, as on one machine
                        for earlier in (one for one in started[: started.index(done)] if one in waiting):
                            self._get(earlier)
                        raise
                    yield shard
        finally:  # without their mark the tasks end; none may write any more where this process cleans up
            if waiting and not self.is_lost:
                self.ray.wait(waiting, num_returns=len(waiting), timeout=STOP_S)

    @staticmethod
    def remove_left(folders: Iterable[Path]) -> None:
        """Remove what killed workers left in the folders of results."""
        for left in (path for folder in set(folders) for path in folder.glob(f"{LEFT}*")):
            shutil.rmtree(left)

    def hashes(self, inputs: Inputs, paths: Sequence[Path]) -> list[str]:
        """The hashes of input files, each taken by one worker."""
        given = self._given(inputs, None)
        return [
            sha256 for _, sha256 in self._in_order(paths, lambda path: self._sent(self._remote(_hash), given, path))
        ]

    def call(self, function: Callable[[Inputs], Any], inputs: Inputs) -> Any:
        """What a function gives of the inputs, on some worker."""
        return self._get(self._sent(self._remote(_call), self._given(inputs, None), function))

    def check(self, inputs: Inputs, folder: Path) -> None:
        """Refuse machines that do not see what this one sees, or run other programs.

        Raises:
            OutputError: one does not, with its name.
        """
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        with _mark(folder) as mark:
            stamps = {str(path.absolute()): _stamp(path) for path in inputs.files}
            asked = []
            for node in self.nodes:
                there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                task = self._remote(_look, scheduling_strategy=there, memory=None)
                asked.append((node["NodeManagerHostname"], self._sent(task, mark, stamps)))
            own = program()
            for name, answer in asked:
                missing, theirs = self._looked(name, answer)
                if missing:
                    raise OutputError(
                        f"machine {name} of the cluster does not see {missing} as this one does; put inputs and target on a path "
                        "that all machines share"
                    )
                if theirs != own:
                    other, this = (", ".join(made) for made in (theirs, own))
                    raise OutputError(
                        f"machine {name} of the cluster has {other} and this one {this}, whose bytes may differ; install the same"
                    )

    def _looked(self, name: str, answer: Any) -> Any:
        """What `_look` gives on a machine, which must have this program."""
        from ray import exceptions

        try:
            return self._get(answer)
        except exceptions.RayTaskError as error:
            raise OutputError(
                f"machine {name} of the cluster cannot run modalloy ({plain(error.cause)}); install there what is here"
            ) from error

    def _given(self, inputs: Inputs, compute: Compute | None) -> Any:
        """What all tasks get, sent once to each machine; where this process is, too, for paths from there on."""
        owners = tuple((owner, tuple(paths)) for owner, paths in inputs.__getstate__().items())
        places = str(Path.cwd()), str(cache_folder())
        with self._loss():
            return self.ray.put((secrets.token_hex(8), owners, places, compute))

    def _remote(self, function: Callable[..., Any], **options: Any) -> Any:
        """The function as a task; Ray is given each function once, not with every task."""
        if function not in self.functions:
            self.functions[function] = self.ray.remote(**self.options)(function)
        return self.functions[function].options(**options) if options else self.functions[function]

    def _in_order(self, items: Sequence[Any], submit: Callable[[Any], Any]) -> Generator[tuple[Any, Any], None, None]:
        """Every item with its task's answer; a few more tasks are on their way than there are workers."""
        waiting: deque[tuple[Any, Any]] = deque()
        for item in items:
            if len(waiting) == self.n_workers + AHEAD:
                first, answer = waiting.popleft()
                yield first, self._get(answer)
            waiting.append((item, submit(item)))
        while waiting:
            first, answer = waiting.popleft()
            yield first, self._get(answer)

    def _sent(self, task: Any, *arguments: Any) -> Any:
        with self._loss():
            return task.remote(*arguments)

    @contextmanager
    def _loss(self) -> Iterator[None]:
        """A client whose cluster is lost raises ConnectionError."""
        try:
            yield
        except ConnectionError as error:
            self.is_lost = True
            at = f" at {self.address}" if self.address else ""
            raise LostTaskError(
                f"the cluster{at} was lost ({plain(error)}); start it again, then go on with --resume"
            ) from error

    def _wait(self, waiting: list[Any]) -> tuple[list[Any], list[Any]]:
        """Those of the answers that are there, one or more, and the others."""
        missed = 0
        with self._loss():
            while not (found := self.ray.wait(waiting, timeout=LOOK_S))[0]:
                try:
                    knock(self.address)
                    missed = 0
                except OSError as error:
                    missed += 1
                    if missed == MISSED:
                        raise ConnectionError(plain(error)) from error
        return found

    def _get(self, answer: Any) -> Any:
        from ray import exceptions

        self._wait([answer])
        try:
            return self.ray.get(answer)
        except exceptions.RayTaskError as error:
            if isinstance(error.cause, (ModalloyError, OSError)):
                raise error.cause from None
            raise
        except exceptions.RayError as error:
            raise LostTaskError(
                f"the cluster lost a task {RETRIES + 1} times ({plain(error)}); see to its machines, then go on with --resume"
            ) from error


@contextmanager
def _mark(folder: Path) -> Iterator[str]:
    """A file in a folder for the time of the block, for processes of other machines to see."""
    mark = folder.absolute() / f".mark-{secrets.token_hex(4)}"
    mark.touch()
    try:
        yield str(mark)
    finally:
        mark.unlink(missing_ok=True)


@lru_cache(maxsize=1)
def _opened(token: str, owners: tuple[tuple[str, tuple[str, ...]], ...], places: tuple[str, str]) -> Inputs:
    """The inputs of one merge, opened once by each worker, in the driver's folder and with its cache."""
    folder, os.environ["MODALLOY_CACHE"] = places
    if not all(Path(path).is_absolute() for _, paths in owners for path in paths):
        os.chdir(folder)
    return Inputs((owner, map(WeightFile, map(Path, paths))) for owner, paths in owners)


def _compute(given: Given, job: Job) -> Done:
    *named, compute = given
    inputs = _opened(*named)
    with one_thread():
        data = {ref: inputs.read(ref) for ref in dict.fromkeys(job.reads)}
        return compute(job, data.__getitem__)


def _write(given: Given, shard: Shard, mark: str) -> tuple[WrittenShard, ...]:
    *named, compute = given

    def work(job: Job, read: Callable[[Any], Any]) -> Done:
        _look_for(mark)
        return compute(job, read)

    _look_for(mark)  # before anything is read
    token = secrets.token_hex(4)
    own = [folder / f"{LEFT}{shard.index}-{token}" for folder in shard.folders]
    compression: list[dict[str, float]] = [{} for _ in own]
    names = [{spec.name for spec in specs} for specs in shard.specs]
    writers = []
    try:
        for folder, specs in zip(own, shard.specs, strict=True):
            folder.mkdir()
            writers.append(WeightWriter(folder, "shard", list(specs)))
        with closing(local.run(shard.jobs, _opened(*named), work, 1, lambda jobs: len(jobs) <= 2)) as results:
            for job, done in results:
                parts = zip(job.pieces, done.parts, strict=True) if job.kind == "several" else ((job, done),)
                for writer, wanted, told, pair in zip(writers, names, compression, parts, strict=True):
                    told |= _add(writer, wanted, *pair)
                del done, parts, pair  # or their tensors are held until the next result is there
        for writer in writers:
            writer.close()
    except BaseException:
        for writer in writers:
            writer.abort()
        for folder in own:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return tuple(
        WrittenShard(shard.index, folder / name, sha256, told)
        for folder, writer, told in zip(own, writers, compression, strict=True)
        for name, sha256 in writer.sha256.items()
    )


def _look_for(mark: str) -> None:
    if not os.path.exists(mark):
        raise OutputError(f"{mark}: is gone, by which the merge was given up")


def _add(writer: WeightWriter, wanted: set[str], job: Job, done: Done) -> dict[str, float]:
    """Write those of a job's tensors that are `wanted`; what is known of their making."""
    for spec, tensor in zip(job.outputs, done.tensors, strict=True):
        if spec.name in wanted:
            writer.add(spec.name, tensor)
    return dict(done.compression)


def _hash(given: Given, path: Path) -> str:
    *named, _ = given
    file, _ = _opened(*named).files[path]
    return file.sha256


def _call(given: Given, function: Callable[[Inputs], Any]) -> Any:
    *named, _ = given
    with one_thread():
        return function(_opened(*named))


def _stamp(path: str | Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def _look(mark: str, stamps: Mapping[str, tuple[int, int]]) -> tuple[str, list[str]]:
    """The first path that this machine does not see as the driver does, "" if there is none; and its program."""
    if not os.path.exists(mark):
        return os.path.dirname(mark), program()
    for path, stamp in stamps.items():
        try:
            same = _stamp(path) == stamp
        except OSError:
            same = False
        if not same:
            return path, program()
    return "", program()

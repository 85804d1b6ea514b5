"""Threads on this machine. Each job runs on one BLAS thread, so its bytes do not depend on how many run at once."""

from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor

from modalloy.machine.cores import AHEAD
from modalloy.machine.threads import one_thread
from modalloy.planning.job import Done, Job
from modalloy.storage.buffers import Buffers
from modalloy.storage.inputs import Inputs
from modalloy.storage.tensors import TensorRef, room_for

Item = TypeVar("Item")
Input = TypeVar("Input")
Result = TypeVar("Result")
Compute = Callable[[Job, Callable[[TensorRef], Tensor]], Done]
Fetched = tuple[dict[TensorRef, Tensor], list[Callable[[], object]]]  # data, and what is to be done before it is used
Fits = Callable[[Sequence[Job]], bool]


def run(
    jobs: Sequence[Job],
    inputs: Inputs,
    compute: Compute,
    n_workers: int,
    fits: Fits = lambda jobs: True,
    *,
    ample: bool = True,
    shared: Mapping[TensorRef, int] = MappingProxyType({}),
) -> Generator[tuple[Job, Done], None, None]:
    """Yields every job with what it gives, in the jobs' order; the tensors are gone once the next pair is asked for.

    One thread reads, one hashes and checks what was read, `n_workers` compute. With `ample` memory, what inputs were read into
    is used again. Tensors that several jobs read and none changes, `shared`, are read once; it tells how often they are used.
    """
    buffers = Buffers(keep=ample)

    def fetch(job: Job) -> Fetched:
        checks: list[Callable[[], object]] = []
        data = {}
        for ref in job.reads:
            buffer = None if ref in shared else buffers.take(room_for(ref.n_bytes))
            data[ref] = inputs.read(ref, buffer, checks.append)
        return data, checks

    def check(fetched: Fetched) -> None:
        for one in fetched[1]:
            one()

    def work(job: Job, fetched: Fetched) -> tuple[Done, list[Tensor]]:
        data = fetched[0]
        return compute(job, data.__getitem__), [tensor for ref, tensor in data.items() if ref not in shared]

    inputs.share(shared)
    try:
        with closing(in_order(jobs, fetch, work, n_workers, fits, check)) as results:
            for job, (done, data) in results:
                yield job, done
                del done  # or its tensors are held until the next result is there
                while data:
                    buffers.give(data.pop())
    finally:
        inputs.share({})


def in_order(
    items: Sequence[Item],
    fetch: Callable[[Item], Input],
    work: Callable[[Item, Input], Result],
    n_workers: int,
    fits: Callable[[Sequence[Item]], bool] = lambda items: True,
    check: Callable[[Input], object] = lambda fetched: None,
) -> Generator[tuple[Item, Result], None, None]:
    """Yields every item with the result of its work, in the items' order.

    One thread fetches inputs, one checks them, both in the items' order; `n_workers` threads work. At most n_workers + AHEAD
    items are in flight: being fetched, being worked on, or waiting to be taken; no more than one unless they may be held
    together (`fits`).
    """
    reader, checker = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
    pool = ThreadPoolExecutor(n_workers, initializer=torch.set_num_threads, initargs=(1,))
    executors = (reader, checker, pool)
    waiting: deque[tuple[Item, Future[Result]]] = deque()

    def submit(item: Item) -> None:
        fetched = reader.submit(fetch, item)
        checked = checker.submit(lambda: check(fetched.result()))

        def worked() -> Result:
            checked.result()
            return work(item, fetched.result())

        waiting.append((item, pool.submit(worked)))

    with one_thread():
        try:
            for item in items:
                while waiting and (len(waiting) == n_workers + AHEAD or not fits([*(one for one, _ in waiting), item])):
                    yield _first(waiting)
                submit(item)
            while waiting:
                yield _first(waiting)
        finally:
            for executor in executors:
                executor.shutdown(wait=False, cancel_futures=True)
            for executor in executors:
                executor.shutdown(wait=True)


def _first(waiting: deque[tuple[Item, Future[Result]]]) -> tuple[Item, Result]:
    item, future = waiting.popleft()
    return item, future.result()

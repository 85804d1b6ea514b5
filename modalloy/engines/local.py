"""Threads on this machine. Each job runs on one BLAS thread, so its bytes do not depend on how many run at once."""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

import torch
from torch import Tensor

from modalloy.machine.cores import AHEAD
from modalloy.machine.threads import one_thread
from modalloy.planning.job import Done, Job
from modalloy.storage.buffers import Buffers
from modalloy.storage.inputs import Inputs
from modalloy.storage.tensors import TensorRef

Item = TypeVar("Item")
Input = TypeVar("Input")
Result = TypeVar("Result")
Compute = Callable[[Job, Callable[[TensorRef], Tensor]], Done]
Fits = Callable[[Sequence[Job]], bool]


def run(
    jobs: Sequence[Job],
    inputs: Inputs,
    compute: Compute,
    n_workers: int,
    fits: Fits = lambda jobs: True,
    *,
    ample: bool = True,
) -> Generator[tuple[Job, Done], None, None]:
    """Yields every job with what it gives, in the jobs' order; the tensors are gone once the next pair is asked for.

    One thread reads, `n_workers` compute. With `ample` memory, what inputs were read into is used again.
    """
    buffers = Buffers(keep=ample)

    def fetch(job: Job) -> dict[TensorRef, Tensor]:
        return {ref: inputs.read(ref, buffers.take(ref.n_bytes)) for ref in job.reads}

    def work(job: Job, data: dict[TensorRef, Tensor]) -> tuple[Done, list[Tensor]]:
        return compute(job, data.__getitem__), list(data.values())

    with closing(in_order(jobs, fetch, work, n_workers, fits)) as results:
        for job, (done, data) in results:
            yield job, done
            del done  # or its tensors are held until the next result is there
            while data:
                buffers.give(data.pop())


def in_order(
    items: Sequence[Item],
    fetch: Callable[[Item], Input],
    work: Callable[[Item, Input], Result],
    n_workers: int,
    fits: Callable[[Sequence[Item]], bool] = lambda items: True,
) -> Generator[tuple[Item, Result], None, None]:
    """Yields every item with the result of its work, in the items' order.

    One thread fetches the inputs, in order; `n_workers` threads work. At most n_workers + AHEAD items are in flight: being
    fetched, being worked on, or waiting to be taken; no more than one unless they may be held together (`fits`).
    """
    reader, pool = (
        ThreadPoolExecutor(1),
        ThreadPoolExecutor(n_workers, initializer=torch.set_num_threads, initargs=(1,)),
    )
    waiting: deque[tuple[Item, Future[Result]]] = deque()

    def submit(item: Item) -> None:
        fetched = reader.submit(fetch, item)
        waiting.append((item, pool.submit(lambda item, fetched: work(item, fetched.result()), item, fetched)))

    with one_thread():
        try:
            for item in items:
                while waiting and (len(waiting) == n_workers + AHEAD or not fits([*(one for one, _ in waiting), item])):
                    yield _first(waiting)
                submit(item)
            while waiting:
                yield _first(waiting)
        finally:
            for executor in (reader, pool):
                executor.shutdown(wait=False, cancel_futures=True)
            for executor in (reader, pool):
                executor.shutdown(wait=True)


def _first(waiting: deque[tuple[Item, Future[Result]]]) -> tuple[Item, Result]:
    item, future = waiting.popleft()
    return item, future.result()

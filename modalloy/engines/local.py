"""Threads on this machine. Each job runs on one BLAS thread, so its bytes do not depend on how many run at once."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

AHEAD = 2  # items beyond the workers' that are being read or wait to be written

Item = TypeVar("Item")
Input = TypeVar("Input")
Result = TypeVar("Result")


def run(
    items: Sequence[Item],
    fetch: Callable[[Item], Input],
    work: Callable[[Item, Input], Result],
    n_workers: int,
    fits: Callable[[Sequence[Item]], bool] = lambda items: True,
) -> Generator[tuple[Item, Result], None, None]:
    """Yields every item with the result of its work, in the items' order.

    One thread fetches the inputs, in order; `n_workers` threads work. Between the start of their fetch and the next request
    of the caller are at most `n_workers + AHEAD` items, and no more than one unless they may be held together (`fits`).
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


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs the block as the workers run a job, on one BLAS thread: the last bits of a product may depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _first(waiting: deque[tuple[Item, Future[Result]]]) -> tuple[Item, Result]:
    item, future = waiting.popleft()
    return item, future.result()


def default_workers() -> int:
    """One per core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

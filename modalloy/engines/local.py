"""Threads on this machine. Each job runs on one BLAS thread, so its bytes do not depend on how many run at once."""

import ctypes
import os
import resource
import sys
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
    items: Sequence[Item], fetch: Callable[[Item], Input], work: Callable[[Item, Input], Result], n_workers: int
) -> Generator[tuple[Item, Result], None, None]:
    """Yields every item with the result of its work, in the items' order.

    One thread fetches the inputs, in order; `n_workers` threads work. At most `n_workers + AHEAD` items are between the
    start of their fetch and the next request of the caller.
    """
    reader, pool = (
        ThreadPoolExecutor(1),
        ThreadPoolExecutor(n_workers, initializer=torch.set_num_threads, initargs=(1,)),
    )
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    with one_thread():
        try:
            for item in items:
                if len(waiting) == n_workers + AHEAD:
                    yield _first(waiting)
                fetched = reader.submit(fetch, item)
                waiting.append((item, pool.submit(lambda item, fetched: work(item, fetched.result()), item, fetched)))
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


def peak_bytes() -> int:
    """The most that the process held in memory so far; outside Linux, that or what the process that started it held."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_bytes() -> int:
    """What the process holds in memory now; its peak so far where only that is known."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except FileNotFoundError:  # not Linux
        return peak_bytes()


def release_memory() -> None:
    """Give memory that was freed back to the system: glibc keeps it, gigabytes after a large model was loaded."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)

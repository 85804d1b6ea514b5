"""One thread that computes for all who wait.

Products of two threads that each use all cores would wait for each other within every product; and once more threads than one
have computed in a process, GNU OpenMP's workers sleep between products instead of waiting awake: a decoding step then takes
twice as long.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

Found = TypeVar("Found")


class Turns:
    """Does one piece of work after another, in the order in which they came, in a thread that ends with the process."""

    def __init__(self) -> None:
        self._asked: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        threading.Thread(target=self._run, name="compute", daemon=True).start()

    @property
    def waiting(self) -> int:
        """How many pieces of work wait for their turn."""
        return self._asked.qsize()

    def take(self, work: Callable[[], Found]) -> Found:
        """What the work gives, or raises, when its turn has come."""
        found: Future[Found] = Future()
        self._asked.put((found, work))
        return found.result()

    def _run(self) -> None:
        torch.set_num_threads(torch.get_num_threads())  # as they are now, whatever other threads choose for themselves
        while True:
            found, work = self._asked.get()
            try:
                found.set_result(work())
            except BaseException as error:
                found.set_exception(error)
            del found, work  # nothing is held while there is nothing to do


TURNS = Turns()  # of encoders and decoders of all models: each step and each medium takes one

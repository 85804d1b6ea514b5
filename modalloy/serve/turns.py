"""Whose turn it is to compute: products of two threads that each use all cores would wait for each other within every product."""

import threading


class Turns:
    """A lock that goes to those who wait for it in the order in which they came: a loop that takes it again waits as well."""

    def __init__(self) -> None:
        self.asked = 0  # how many have asked for it
        self._given = 0  # how many have given it back
        self._changed = threading.Condition()

    def __enter__(self) -> None:
        with self._changed:
            mine = self.asked
            self.asked += 1
            self._changed.wait_for(lambda: self._given == mine)

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._given += 1
            self._changed.notify_all()


TURNS = Turns()  # of encoders and decoders of all models: each step and each medium takes one

"""A process that has every decoder loaded, and forks a child of bounded memory and time for each medium.

A server decodes many media of strangers: a fresh interpreter for each takes 0.3 s, a fork some milliseconds. Nothing of one
medium is left when the next is decoded, for what decodes is the fork.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from contextlib import suppress
from queue import Empty, LifoQueue
from typing import Any

from modalloy.machine.asking import answer_of

BEGIN = """
import sys
sys.path[:] = sys.argv[1].split(chr(10))
import types
package = sys.modules["modalloy"] = types.ModuleType("modalloy")
package.__path__ = [sys.argv[2]]
from modalloy.senses.media.forks import main
main()
"""
LATE = 1000  # in the place of an exit code: the child did not end in time


class Forker:
    """One such process, started when it is first wanted and again after it had to be ended. One thread uses it at a time."""

    def __init__(self, package: str, environment: dict[str, str]) -> None:
        self.package, self.environment = package, environment
        self.process: subprocess.Popen[bytes] | None = None

    def run(self, request: list[Any], seconds: float) -> int:
        """Exit code of a child that decodes; below 0 a signal, or LATE.

        Args:
            request: arguments of `decode`, the files that take the array and what is said of it, and smaller limits.
            seconds: of the clock.
        """
        try:
            line = answer_of(self._started(), request, seconds)
        except BaseException:
            self.close()
            raise
        if line is not None and line.endswith(b"\n"):
            return int(line)
        self.close()
        return LATE if line is None else -signal.SIGKILL

    def _started(self) -> "subprocess.Popen[bytes]":
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, "-c", BEGIN, "\n".join(sys.path), self.package],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=self.environment,
                start_new_session=True,  # it is ended with its child; and Ctrl-C is the server's
            )
        return self.process

    def close(self) -> None:
        """End the process, and the child that it waits for."""
        process, self.process = self.process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()


class Forkers:
    """As many of them as threads decode at once."""

    def __init__(self, package: str, environment: dict[str, str]) -> None:
        self._given = package, environment
        self._free: LifoQueue[Forker] = LifoQueue()
        self._all: list[Forker] = []
        self._lock = threading.Lock()
        atexit.register(self.close)

    def run(self, request: list[Any], seconds: float) -> int:
        """As `Forker.run`, by one that is free."""
        try:
            forker = self._free.get_nowait()
        except Empty:
            forker = Forker(*self._given)
            with self._lock:
                self._all.append(forker)
        try:
            return forker.run(request, seconds)
        finally:
            self._free.put(forker)

    def close(self) -> None:
        """End them all."""
        with self._lock:
            for forker in self._all:
                forker.close()


def main() -> None:
    """What the process does: load the decoders, and fork for each line of standard input, until it ends."""
    import av  # noqa: F401
    import PIL.Image
    import soundfile  # noqa: F401
    import soxr  # noqa: F401

    from modalloy.senses.media import limits
    from modalloy.senses.media.child import decode

    PIL.Image.init()
    for line in sys.stdin.buffer:
        given, out, err, smaller = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for number, path in ((1, out), (2, err)):
                    os.dup2(os.open(path, os.O_WRONLY | os.O_TRUNC), number)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                sys.stdout = open(1, "w", closefd=False)  # the old one takes it for a pipe  # noqa: SIM115
                for name, value in smaller.items():
                    setattr(limits, name, value)
                decode(*given)
                code = 0
            except BaseException:  # the parent says it
                sys.stderr.buffer.write(traceback.format_exc().encode("utf-8", "replace"))
                sys.stderr.buffer.flush()
            finally:
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        print(os.waitstatus_to_exitcode(status), flush=True)

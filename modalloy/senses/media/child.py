"""Decoding in a child process of bounded memory and time: a decoder that crashes, hangs or swells is a MediaError."""

import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from modalloy.errors import MediaError, plain
from modalloy.senses.media.forks import LATE, Forkers
from modalloy.senses.media.limits import opened

MEMORY_BYTES = 4_000_000_000  # of addresses, of which the libraries themselves take about 1 GB
SECONDS = 120
KEPT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR")  # of the environment; no secrets
PACKAGE = str(Path(__file__).resolve().parents[2])
REFUSED = 3  # exit code of a child that raised a MediaError
# the parent's own search path, and the package without its __init__.py, which would import torch
BEGIN = """
import sys
sys.path[:] = sys.argv[1].split(chr(10))
import types
package = sys.modules["modalloy"] = types.ModuleType("modalloy")
package.__path__ = [sys.argv[2]]
from modalloy.senses.media.child import decode
decode(*sys.argv[3:])
"""


@dataclass(frozen=True)
class Bounds:
    """What a child may take."""

    memory_bytes: int
    seconds: int
    forks: bool = False
    limits: tuple[tuple[str, int], ...] = ()


_BOUNDS: ContextVar[Bounds | None] = ContextVar("bounds of decoders", default=None)


@contextmanager
def isolated(
    on: bool = True,
    *,
    memory_bytes: int = MEMORY_BYTES,
    seconds: int = SECONDS,
    forks: bool = False,
    smaller: Mapping[str, int] | None = None,
) -> Iterator[None]:
    """Every medium that is loaded inside the block, in this thread or task, is decoded in a child process of its own.

    Args:
        on: False: in this process after all.
        memory_bytes: of addresses that the child may ask for.
        seconds: of CPU, and twice as many by the clock.
        forks: the child is a fork of a process that stays, for a program that decodes many media.
        smaller: limits of `modalloy.senses.media.limits` by name, for forks.
    """
    token = _BOUNDS.set(Bounds(memory_bytes, seconds, forks, tuple((smaller or {}).items())) if on else None)
    try:
        yield
    finally:
        _BOUNDS.reset(token)


def is_isolated() -> bool:
    """Whether media are to be decoded in a child."""
    return _BOUNDS.get() is not None


def in_child(modality: str, path: str | Path, number: int = 0) -> np.ndarray:
    """What the modality's loader gives of a file (a picture as uint8 (height, width, 3)); `number` is its option.

    Raises:
        MediaError: the loader raised it; or the child crashed, or needed more than its bounds.
    """
    bounds = _BOUNDS.get()
    assert bounds is not None
    with opened(path):
        pass  # a regular file, or no child is needed
    given = [modality, os.fspath(path), str(number), str(bounds.memory_bytes), str(bounds.seconds)]
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
        try:
            if bounds.forks:
                code = _forkers().run([given, out.name, err.name, dict(bounds.limits)], 2 * bounds.seconds)
            else:
                code = _fresh(given, out, err, 2 * bounds.seconds)
        except OSError as error:
            raise MediaError(f"{plain(path)}: no child process can be started for it ({error.strerror})") from error
        if code == LATE:
            raise MediaError(f"{plain(path)}: was not decoded in {2 * bounds.seconds} s; give another file")
        err.seek(0)
        said = err.read(1 << 16).decode("utf-8", "replace")
        if code == REFUSED:
            raise MediaError(said)
        if code == -signal.SIGXCPU:
            raise MediaError(f"{plain(path)}: its decoder took more than {bounds.seconds} s; give another file")
        if code < 0:
            name = signal.Signals(-code).name
            raise MediaError(f"{plain(path)}: its decoder crashed ({name}); the file is damaged, get it again")
        if code:
            raise RuntimeError(f"the child that decoded {plain(path)} failed: {said}")
        out.seek(0)
        found: np.ndarray = np.lib.format.read_array(out, allow_pickle=False)
        return found


def _fresh(given: list[str], out: Any, err: Any, seconds: float) -> int:
    """Exit code of a new interpreter that decodes; below 0 a signal, or LATE."""
    try:
        return subprocess.run(
            [sys.executable, "-c", BEGIN, "\n".join(sys.path), PACKAGE, *given],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=_environment(),
            timeout=seconds,
            check=False,
        ).returncode
    except subprocess.TimeoutExpired:
        return LATE


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in KEPT if name in os.environ} | {"OPENBLAS_NUM_THREADS": "1"}


@cache
def _forkers() -> Forkers:
    return Forkers(PACKAGE, _environment())


def decode(modality: str, path: str, number: str, memory_bytes: str, seconds: str) -> None:
    """What the child does: bound itself, decode, write the array to standard output."""
    from modalloy.senses import media

    loaders = {
        "image": lambda: np.asarray(media.load_image(path)),
        "audio": lambda: media.load_audio(path, int(number)),
        "video": lambda: media.load_video(path, int(number)),
        "point": lambda: media.load_points(path),
    }
    for what, bound in (
        (resource.RLIMIT_AS, int(memory_bytes)),
        (resource.RLIMIT_CPU, int(seconds)),
        (resource.RLIMIT_FSIZE, int(memory_bytes)),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(what, (bound, bound if what != resource.RLIMIT_CPU else hard))
    try:
        array = np.ascontiguousarray(loaders[modality]())
        np.lib.format.write_array(sys.stdout.buffer, array, allow_pickle=False)
        sys.stdout.buffer.flush()
    except (MediaError, MemoryError) as error:
        text = str(error) or f"{plain(path)}: needs more memory than {memory_bytes} bytes; give a smaller file"
        sys.stderr.buffer.write(text.encode("utf-8", "replace"))
        sys.stderr.buffer.flush()
        os._exit(REFUSED)

"""What decides the bytes of a merge beside its jobs and inputs: the program, its library, the kind of processor."""

import torch

from modalloy._version import __version__


def program(device: str | None = None) -> list[str]:
    """Each of these in words, with the device where it is told."""
    known = [] if device is None else [device]
    return [f"modalloy {__version__}", f"torch {torch.__version__}", *known, torch.backends.cpu.get_cpu_capability()]

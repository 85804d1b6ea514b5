"""`compute` that says which process it runs in, and takes its time: for tests that kill workers."""

import errno
import os
import time
from pathlib import Path
from typing import Any

from modalloy.compute import compute, compute_several
from modalloy.planning.job import Done, Job


def slow(job: Job, read: Any, *, place: str, seconds: float, **options: Any) -> Done:
    """What the job gives, `seconds` later."""
    Path(place, str(os.getpid())).touch()
    time.sleep(seconds)
    return compute(job, read, **options)


def slow_several(job: Job, read: Any, *, seconds: float, **options: Any) -> Done:
    """What the job gives for each of several results, `seconds` later."""
    time.sleep(seconds)
    return compute_several(job, read, **options)


def no_space(job: Job, read: Any, **options: Any) -> Done:
    """What a full disk gives."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/scratch/model.safetensors")


def one_fails(job: Job, read: Any, *, place: str, name: str, **options: Any) -> Done:
    """What a full disk gives for one output, and each other one `place` counts, which takes its time."""
    if job.name == name:
        return no_space(job, read)
    with Path(place).open("a") as counted:
        counted.write("x")
    time.sleep(0.3)
    return compute(job, read, **options)

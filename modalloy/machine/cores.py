"""How many cores there are to work with."""

import os

AHEAD = 2  # jobs beyond the workers' that are being read or wait to be written


def default_workers() -> int:
    """One per core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

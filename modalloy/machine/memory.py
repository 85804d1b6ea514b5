"""Memory: what this process holds, what is left to it, and giving back what it freed."""

import ctypes
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CONTROL_GROUPS = Path("/sys/fs/cgroup")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's mallopt
RETURNED_BYTES = 256 << 10  # pieces of this size on are then returned as soon as they are freed


@dataclass(frozen=True)
class Room:
    """How much memory the process may still take, and what sets that limit."""

    n_bytes: int
    limit: str


def peak_bytes() -> int:
    """The most that the process held in memory so far; outside Linux, that or what the process that started it held."""
    try:
        return _status("VmHWM")
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_bytes() -> int:
    """What the process holds in memory now; its peak so far where only that is known."""
    try:
        return _status("VmRSS")
    except FileNotFoundError:  # not Linux
        return peak_bytes()


def room() -> Room | None:
    """The least of what the machine, the control groups (containers) and `ulimit -v` leave; None where nothing is known."""
    return min(_rooms(), key=lambda one: one.n_bytes, default=None)


def release_memory() -> None:
    """Give memory that was freed back to the system: glibc keeps it, gigabytes after a large model was loaded."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def return_freed_memory() -> None:
    """From now on, give large pieces back to the system as soon as they are freed, which costs a little time.

    By itself glibc raises, as it goes, the size from which it does so, and keeps a heap for each thread: what a process
    then holds is up to a fifth more than what it uses, by luck.
    """
    release_memory()
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is not None:
        for option, value in ((M_MMAP_THRESHOLD, RETURNED_BYTES), (M_TRIM_THRESHOLD, RETURNED_BYTES), (M_ARENA_MAX, 1)):
            set_option(option, value)


def _rooms() -> Iterator[Room]:
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    try:
        if soft != resource.RLIM_INFINITY:
            yield Room(soft - _status("VmSize"), "the process's limit (ulimit -v)")
        with open("/proc/meminfo", encoding="ascii") as file:
            available = next((line.split()[1] for line in file if line.startswith("MemAvailable:")), None)
        if available is not None:
            yield Room(int(available) * 1024, "this machine")
        for folder, limit, used, cache in _control_groups():
            if (most := _number(folder / limit)) is not None and (now := _number(folder / used)) is not None:
                yield Room(most - now + _cached(folder, cache), "the control group (container)")
    except FileNotFoundError:  # not Linux
        return


def _control_groups() -> Iterator[tuple[Path, str, str, str]]:
    """Every control group that the process is in, innermost first: its folder, and its files of limit, use and page cache."""
    with open("/proc/self/cgroup", encoding="utf-8") as file:
        for line in file:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            if controllers == "":
                root, names = CONTROL_GROUPS, ("memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                root = CONTROL_GROUPS / "memory"
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            else:
                continue
            place = root / path.lstrip("/")  # seen from within a container, the folder may be the root itself
            for folder in (place, *place.parents):
                if folder.is_relative_to(root):
                    yield folder, *names


def _cached(folder: Path, name: str) -> int:
    """What of a control group's memory is file pages that the system drops when it needs room."""
    try:
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.split()[:1] == [name])


def _number(path: Path) -> int | None:
    """The number in a file; None without one ("max")."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _status(name: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:"))

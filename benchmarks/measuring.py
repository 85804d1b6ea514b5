"""What a command costs: seconds, bytes read and written, and memory, as the kernel counts them (Linux).

`python measuring.py COMMAND …` runs a command and prints its `Usage` as one JSON line after what the command prints. `run`
starts it so, because a process's peak memory as the kernel reports it begins with what its parent held at the fork: a
small parent keeps the benchmark's own matrices out of it.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")

BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class Usage:
    """What a process and its children cost. The bytes are those of the storage layer: what a cache holds is not read."""

    seconds: float  # until the process ended
    synced_seconds: float  # until everything that it wrote was on the disk
    peak_bytes: int  # resident
    read_bytes: int
    written_bytes: int


def run(command: Sequence[str | Path]) -> tuple[Usage, str]:
    """What `command` costs, and what it prints. A command that fails raises CalledProcessError."""
    launcher = [sys.executable, "-I", __file__, *map(str, command)]
    printed = subprocess.run(launcher, stdout=subprocess.PIPE, text=True, check=True).stdout
    output, _, usage = printed.rstrip("\n").rpartition("\n")
    return Usage(**json.loads(usage)), output.strip()


def merge(recipe: dict[str, Any], out: Path) -> tuple[Usage, dict[str, Any]]:
    """What `modalloy merge` of `recipe` costs as a process of its own, and the document it prints; the result is in `out`."""
    shutil.rmtree(out, ignore_errors=True)
    file = out.with_suffix(".yaml")
    file.write_text(json.dumps(recipe, indent=1))  # JSON is YAML
    usage, printed = run([sys.executable, "-m", "modalloy.cli", "merge", file, "-o", out, "--json"])
    return usage, json.loads(printed)


def evict(folders: Iterable[Path]) -> None:
    """Drop the files in `folders` from the page cache (POSIX_FADV_DONTNEED), so that reading them means the disk."""
    os.sync()  # pages that are not yet written cannot be dropped
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_through(folders: Iterable[Path]) -> int:
    """Read every file in `folders` once, one after the other; the number of bytes."""
    buffer, total = bytearray(BLOCK_BYTES), 0
    for path in (path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total


def write_through(path: Path, n_bytes: int) -> None:
    """Write `n_bytes` to a new file and wait until they are on the disk; the file is removed again."""
    block = os.urandom(BLOCK_BYTES)
    with path.open("wb", buffering=0) as file:
        for start in range(0, n_bytes, BLOCK_BYTES):
            file.write(block[: n_bytes - start])
        os.fsync(file.fileno())
    path.unlink()


def folder_bytes(folder: Path) -> int:
    """Total size of the files in `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def timed(call: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds that `call` takes, and its result."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def measured(call: Callable[[], Result]) -> tuple[dict[str, float], Result]:
    """Seconds, resident megabytes at the peak, and how many of them `call` added; and its result."""
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident("VmRSS")
    elapsed, result = timed(call)
    peak = resident("VmHWM")
    return {"seconds": elapsed, "peak_mb": peak / 1e6, "added_mb": (peak - before) / 1e6}, result


def resident(key: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def machine() -> dict[str, Any]:
    """Where a measurement was made, and how busy it was at that moment."""
    told = Path("/proc/cpuinfo").read_text()
    model, flags = (re.search(rf"^{name}\s*: (.*)", told, re.MULTILINE) for name in ("model name", "flags"))
    known = [name for name in ("avx2", "avx512f", "amx_bf16") if flags and name in flags[1].split()]
    processor = f"{model[1] if model else platform.machine()} ({', '.join(known)})"
    cores = len(os.sched_getaffinity(0))
    return {"processor": processor, "cores": cores, "load": os.getloadavg()[0], "kernel": platform.release()}


def main() -> None:
    os.sync()  # what others left to be written is not this command's
    start = time.perf_counter()
    child = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # the process is kept, so that its counters can be read
    seconds = time.perf_counter() - start
    os.sync()
    synced_seconds = time.perf_counter() - start
    counters = dict(line.split(": ") for line in Path(f"/proc/{child}/io").read_text().splitlines())
    _, status, resources = os.wait4(child, 0)
    if code := os.waitstatus_to_exitcode(status):
        sys.exit(f"exit code {code}: {' '.join(sys.argv[1:])}")
    peak = resources.ru_maxrss * 1024
    usage = Usage(seconds, synced_seconds, peak, int(counters["read_bytes"]), int(counters["write_bytes"]))
    print("\n" + json.dumps(asdict(usage)))  # on a line of its own, whatever the command printed last


if __name__ == "__main__":
    main()

"""Memory: a limit that is accepted is kept, and memory that runs out is one line."""

import errno
import json
import mmap
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from synthetic import write_base, write_lora, write_tuned

import modalloy
from modalloy.engines import local
from modalloy.errors import OutOfMemoryError, memory_errors, ran_out_of_memory
from modalloy.files import disk_errors
from modalloy.machine import memory
from modalloy.planning import cost
from modalloy.planning.planner import plan
from modalloy.storage.buffers import Buffers
from modalloy.storage.folder import reading

LIMITED = """
import resource, sys
from modalloy import cli
import modalloy.merging
held = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (held + int(sys.argv.pop()), resource.RLIM_INFINITY))
cli.main()
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of width 768 in bfloat16, two adapters, two full fine-tunes."""
    folder = tmp_path_factory.mktemp("models")
    base = write_base(folder / "base", width=512, ffn=1024, layers=2, vocabulary=3000, dtype="bfloat16")
    for seed in (1, 2):
        write_lora(folder / f"lora{seed}", base, rank=16, seed=seed)
        write_tuned(folder / f"tuned{seed}", base, seed=seed)
    return folder


def write_recipe(folder: Path, models: Path, kind: str, **changes: Any) -> Path:
    entries = [{"model": str(models / f"{kind}{index}")} for index in (1, 2)]
    content = {"base_model": str(models / "base"), "models": entries, "output": {"form": "full"}} | changes
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


def run(*command: Any) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=env, check=False)


@pytest.mark.parametrize(("kind", "method"), [("lora", "ties"), ("tuned", "task_arithmetic")])
def test_a_limit_that_is_too_small_names_one_that_is_kept(
    kind: str, method: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = write_recipe(tmp_path, models, kind, merge_method=method), tmp_path / "out"
    merge = ("-m", "modalloy.cli", "merge", path, "-o", out, "--jobs", 3, "--json", "--max-memory")
    refused = run(*merge, "1MB")
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
    named = re.search(r"even with one weight at a time; write --max-memory (\d+)MB$", refused.stderr.strip())
    assert named, refused.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"]
    kept = run(*merge, f"{named[1]}MB")
    assert kept.returncode == 0, kept.stderr
    found = json.loads(kept.stdout)
    assert found["peak_bytes"] <= found["predicted_peak_bytes"] <= int(named[1]) * 1_000_000
    freely = modalloy.merge(path, tmp_path / "freely")
    assert (freely.out / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("budget", [0, 5, 12, 100])
def test_jobs_in_flight_are_limited_by_what_they_hold(budget: int) -> None:
    sizes = [3, 9, 1, 1, 1, 7, 20, 2, 2, 2, 2, 5] * 3
    lock, held, most = threading.Lock(), [0], [0]

    def fetch(index: int) -> int:
        with lock:
            held[0] += sizes[index]
            most[0] = max(most[0], held[0])
        return sizes[index]

    def fits(indices: Sequence[int]) -> bool:
        return sum(sizes[index] for index in indices) <= budget

    done = []
    for index, size in local.in_order(range(len(sizes)), fetch, lambda _, size: size, 3, fits):
        done.append(index)
        with lock:
            held[0] -= size
    assert done == list(range(len(sizes)))
    assert most[0] <= max(budget, *sizes)


def test_workers_and_jobs_in_flight_grow_with_the_limit(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "resident_bytes", lambda: 200_000_000)
    planned = plan(modalloy.load_recipe(write_recipe(tmp_path, models, "tuned", merge_method="tsv")))
    freely = cost.peak_bytes(planned, 4)
    least = [cost.peak_bytes(planned, n, together=1) for n in (1, 2, 3, 4)]
    assert least == sorted(least) and least[-1] < freely
    for limit in (*(one + (1 << 19) for one in least), freely, 2 * freely):
        budget = cost.budget(planned, 4, limit)
        n = max(n for n in (1, 2, 3, 4) if least[n - 1] <= limit)
        assert budget.n_workers == n and budget.predicted_bytes <= limit
        if limit > 1.5 * freely:
            assert budget.n_bytes is None and budget.fits_merging(1000 * planned.jobs)
            continue
        assert budget.n_bytes is not None and budget.fits_merging(planned.jobs[:1])
        assert not budget.fits_merging(1000 * planned.jobs)
        assert all(budget.fits_verifying([job]) for job in cost.sample(planned))


def test_what_the_machine_has_no_room_for_is_refused_unless_a_limit_says_otherwise(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tmp_path, models, "tuned", merge_method="tsv")
    monkeypatch.setattr(memory, "resident_bytes", lambda: 200_000_000)
    monkeypatch.setattr(memory, "room", lambda: memory.Room(1000, "this machine"))
    with pytest.raises(
        OutOfMemoryError, match=r"this machine has room for \d+ MB; .* write --max-memory \d+MB"
    ) as refused:
        modalloy.merge(path, tmp_path / "out")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["recipe.yaml"]
    named = re.search(r"--max-memory (\d+)MB", str(refused.value))
    assert named
    planned = plan(modalloy.load_recipe(path))
    assert cost.budget(planned, 2, int(named[1]) * 1_000_000).n_bytes
    least = cost.peak_bytes(planned, 1, together=1) - memory.resident_bytes()
    monkeypatch.setattr(memory, "room", lambda: memory.Room(least + (1 << 21), "this machine"))
    assert cost.budget(planned, 4, None).n_workers == 1
    monkeypatch.setattr(memory, "room", lambda: None)  # where nothing is known
    assert cost.budget(planned, 4, None).n_bytes is None


def test_the_room_is_the_least_that_any_control_group_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    for folder, limit, used, cached in ((inner, "max", 10, 0), (tmp_path / "outer", "5000000", 2_000_000, 500_000)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 7\ninactive_file {cached}\nactive_file 9\n")
    names = ("memory.max", "memory.current", "inactive_file")
    monkeypatch.setattr(memory, "_control_groups", lambda: ((one, *names) for one in (inner, inner.parent)))
    found = memory.room()
    assert found == memory.Room(3_500_000, "the control group (container)")


@pytest.mark.parametrize("more", [5_000_000, 60_000_000])
def test_memory_that_runs_out_is_one_line(more: int, models: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, models, "tuned", merge_method="dare_ties")
    (tmp_path / "limited.py").write_text(LIMITED)
    done = run(tmp_path / "limited.py", "merge", path, "-o", tmp_path / "out", "--jobs", 2, more)
    if done.returncode == 0:
        return
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert re.match("error: .*(memory|room)", done.stderr)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["limited.py", "recipe.yaml"]


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    "ask",
    [
        lambda: bytearray(1 << 62),
        lambda: torch.empty(1 << 50),
        lambda: mmap.mmap(-1, 1 << 60),
        raising(RuntimeError("can't start new thread")),
        raising(ImportError("libx.so: failed to map segment from shared object")),
    ],
)
def test_memory_that_ran_out_is_known_by_what_libraries_raise(ask: Callable[[], Any]) -> None:
    with pytest.raises(OutOfMemoryError, match=r"^memory ran out; use fewer$"), memory_errors("use fewer"):
        ask()


def test_other_errors_are_not_taken_for_memory() -> None:
    for error in (
        RuntimeError("shapes differ"),
        OSError(5, "Input/output error"),
        ImportError("no module"),
        ValueError(),
    ):
        assert not ran_out_of_memory(error)
        with pytest.raises(type(error)), memory_errors(""):
            raise error


@pytest.mark.parametrize("boundary", [reading, disk_errors])
def test_memory_that_ran_out_is_not_called_a_fault_of_a_file_or_disk(
    boundary: Callable[[Path], Any], tmp_path: Path
) -> None:
    with pytest.raises(OutOfMemoryError), memory_errors("use fewer"), boundary(tmp_path):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")


def test_buffers_that_keep_nothing_hold_nothing() -> None:
    for keep in (True, False):
        buffers = Buffers(keep=keep)
        buffers.give(torch.empty(16 << 20, dtype=torch.uint8))
        assert (buffers.take(9 << 20) is not None) == keep and len(buffers.free) == 0

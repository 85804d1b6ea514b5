"""Killed at any moment (really, by SIGKILL), a merge goes on where it stopped and ends with the same bytes."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import SLOTS
from safetensors.torch import load_file, save_file

import modalloy
from modalloy.errors import CheckpointError, OutputError
from modalloy.storage.staging import Staging

WriteRecipe = Callable[..., Path]
FULL = {"form": "full", "max_shard_size": "6KB"}

# Forks before any thread is started; the child dies just before (or, in a write, halfway through) its n-th change to the disk.
# With `cycle`, another child resumes what was killed, and the result is moved to OUT.POINT.
KILLER = textwrap.dedent("""
    import json, os, signal, sys
    import transformers.models.auto.tokenization_auto, modalloy.model  # before the forks, none of which then imports them again
    from modalloy.merging import merge
    from modalloy.storage import staging
    from pathlib import Path

    recipe, out, options, cycle, *points = sys.argv[1:]

    def child(point, **options):
        if pid := os.fork():
            return os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        count = 0
        def dying(function):
            def call(*arguments, **options):
                nonlocal count
                count += 1
                if count == point:
                    if function is write:
                        write(arguments[0], arguments[1][: len(arguments[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)
            return call
        write = os.write
        for name in ("write", "fsync", "rename", "mkdir", "unlink", "rmdir", "ftruncate"):
            setattr(os, name, dying(getattr(os, name)))
        staging.exchange = dying(staging.exchange)
        try:
            merge(recipe, out, jobs=2, **options)
        finally:
            os._exit(0)

    for point in map(int, points):
        killed = child(point, **json.loads(options))
        log = Path(out).parent / f".{Path(out).name}.partial.log"
        print("killed" if killed else "finished", log.read_text().count('"file"') if log.exists() else 0, flush=True)
        if cycle == "cycle":
            child(0, resume=True)
            os.rename(out, f"{out}.{point}")
        if not killed:
            break
""")


def killed_at(points: Iterable[int], recipe: Path, out: Path, cycle: bool = False, **options: bool) -> list[list[str]]:
    """Runs a merge once for each point until one finishes: what became of it, and how many shards its log then lists."""
    arguments = [str(recipe), str(out), json.dumps(options), "cycle" if cycle else "once", *map(str, points)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLER, *arguments], stdout=-1, text=True, check=True, env=environment)
    return [line.split() for line in done.stdout.splitlines()]


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a result but where its inputs were."""
    return {
        path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.is_file() and path.name != "sources.json"
    }


@pytest.fixture
def undisturbed(write_recipe: WriteRecipe, tmp_path: Path) -> dict[str, bytes]:
    modalloy.merge(write_recipe(output=FULL), tmp_path / "undisturbed")
    return contents(tmp_path / "undisturbed")


def test_killed_anywhere_and_resumed(write_recipe: WriteRecipe, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    states = killed_at(range(1, 300, 3), write_recipe(output=FULL), out, cycle=True)
    assert len(states) > 15 and [state for state, _ in states] == ["killed"] * (len(states) - 1) + ["finished"]
    assert len({int(shards) for _, shards in states}) > 5
    for index in range(len(states)):
        assert contents(tmp_path / f"out.{1 + 3 * index}") == undisturbed, f"killed at change {1 + 3 * index}"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_killed_again_and_again(write_recipe: WriteRecipe, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    """Every resumed run gets a little further, and is killed too; the old result stays until the new one is whole."""
    out = tmp_path / "out"
    modalloy.merge(write_recipe(output=FULL | {"dtype": "float16"}), out)
    earlier = contents(out)
    recipe = write_recipe(output=FULL)
    assert killed_at([18], recipe, out, overwrite=True)[0][0] == "killed"
    assert contents(out) == earlier
    states = killed_at([30] * 30, recipe, out, resume=True)
    assert len(states) > 3 and states[-1][0] == "finished"
    assert contents(out) == undisturbed
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_finished_merge_is_resumed_by_checking_it(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe, out = write_recipe(), tmp_path / "out"
    modalloy.merge(recipe, out, resume=True)  # nothing to go on from
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    modalloy.merge(recipe, out, resume=True)
    assert times == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="the file was changed"):
        modalloy.merge(recipe, out, resume=True)


def test_finished_shards_are_not_made_again(
    write_recipe: WriteRecipe, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = write_recipe(output=FULL), tmp_path / "out"
    assert killed_at([30], recipe, out)[0][0] == "killed"
    lines = [json.loads(line) for line in (tmp_path / ".out.partial.log").read_text().splitlines()]
    shards = [line["file"] for line in lines[1:]]
    assert len(shards) > 3
    folder = tmp_path / f".out.partial-{lines[0]['token']}"
    times = {name: (folder / name).stat().st_mtime_ns for name in shards}
    damaged = folder / shards[1]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    modalloy.merge(recipe, out, resume=True)
    changed = [name for name in shards if (out / name).stat().st_mtime_ns != times[name]]
    assert changed == [shards[1]]  # whose hash was not the recorded one
    assert contents(out) == undisturbed


def test_a_refused_resume_leaves_what_was_kept(
    write_recipe: WriteRecipe, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    """Refused for the disk's room, which is looked at once the folder is there."""
    from modalloy import merging

    recipe, out = write_recipe(output=FULL), tmp_path / "out"
    assert killed_at([30], recipe, out)[0][0] == "killed"
    log = (tmp_path / ".out.partial.log").read_text()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(merging.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
        with pytest.raises(OutputError, match="the disk is full"):
            modalloy.merge(recipe, out, resume=True)
    assert (tmp_path / ".out.partial.log").read_text() == log
    modalloy.merge(recipe, out, resume=True)
    assert contents(out) == undisturbed


def test_without_resume_a_killed_merge_starts_again(
    write_recipe: WriteRecipe, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    recipe, out = write_recipe(output=FULL), tmp_path / "out"
    assert killed_at([30], recipe, out)[0][0] == "killed"
    modalloy.merge(recipe, out)
    assert contents(out) == undisturbed
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_resume_of_something_else_is_refused(
    write_recipe: WriteRecipe, specialists: dict[str, Path], tmp_path: Path
) -> None:
    recipe, out = write_recipe(output=FULL), tmp_path / "out"
    assert killed_at([30], recipe, out)[0][0] == "killed"
    message = r"out: the interrupted merge was of another recipe or of inputs that changed since; start again without"
    with pytest.raises(OutputError, match=message):
        modalloy.merge(write_recipe(output=FULL, parameters={"rank": 2}), out, resume=True)
    write_recipe(output=FULL)
    weights = specialists["audio"] / "adapter_model.safetensors"
    os.utime(weights, ns=(1, 1))
    with pytest.raises(OutputError, match=message):
        modalloy.merge(recipe, out, resume=True)
    modalloy.merge(recipe, out)
    with pytest.raises(OutputError, match=r"already exists and is not this recipe's result"):
        modalloy.merge(write_recipe(output=FULL, parameters={"rank": 2}), out, resume=True)
    with pytest.raises(OutputError, match="give one of them"):
        modalloy.merge(recipe, out, resume=True, overwrite=True)


def test_a_log_cut_at_any_byte_is_gone_on_with(tmp_path: Path) -> None:
    """What is whole counts, and what is noted after the cut counts too."""
    killed = Staging(tmp_path / "out").begin("same")
    with killed:
        killed.note("first", "1", {})
        killed.note("second", "2", {"slot": 0.5})
        whole = killed.log.read_bytes()
        for name in ("first", "second"):
            (killed.folder / name).write_text(name)
    shutil.rmtree(killed.out)
    head, first, _ = whole.splitlines(keepends=True)
    for cut in range(len(head), len(whole) + 1):
        killed.folder.mkdir()
        killed.log.write_bytes(whole[:cut])
        for extra in ("third", "fourth"):
            staging = Staging(tmp_path / "out", resume=True).begin("same")
            staging.__enter__()
            expected = ["first"] * (cut >= len(head + first)) + ["second"] * (cut == len(whole))
            assert list(staging.finished) == expected + ["third"] * (extra == "fourth")
            assert staging.facts == ({"slot": 0.5} if cut == len(whole) else {})
            staging.note(extra, "3", {})
            os.close(staging.lock)  # as a kill does
        killed._remove()


HEAD = b'{"modalloy merge": "same", "token": "0123abcd", "overwrite": false}\n'


@pytest.mark.parametrize(
    "log", [b"{}\n", b"7\n", b"\x00\x00\xff", b'{"made": "by another version"}\n', b"notes" + HEAD]
)
def test_a_log_of_something_else_is_refused_and_kept(log: bytes, tmp_path: Path) -> None:
    (tmp_path / ".out.partial.log").write_bytes(log)
    for options in ({}, {"resume": True}, {"overwrite": True}):
        message = r"\.out\.partial\.log: is not the log of a merge; move it away, or choose another folder"
        with pytest.raises(OutputError, match=message):
            Staging(tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial.log"]
    assert (tmp_path / ".out.partial.log").read_bytes() == log


@pytest.mark.parametrize("log", [b"", HEAD[:1], HEAD[:18], HEAD[:40], HEAD, HEAD + b"7", HEAD + b'{"file": 7}\n'])
def test_a_log_that_a_kill_cut_short_is_gone_on_with_or_started_over(log: bytes, tmp_path: Path) -> None:
    (tmp_path / ".out.partial.log").write_bytes(log)
    with Staging(tmp_path / "out", resume=True).begin("same") as folder:
        (folder / "file").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_resumed_run_that_fails_brings_back_what_it_was_to_replace(tmp_path: Path) -> None:
    """Killed between the two renames, then resumed and interrupted."""
    out, old = tmp_path / "out", json.dumps({"modalloy": "0.1", "outputs": {}})
    with Staging(out).begin("same") as folder:
        (folder / "manifest.json").write_text(old)
    staging = Staging(out, overwrite=True).begin("same")
    staging.__enter__()
    os.close(staging.lock)
    out.rename(staging.replaced)
    with pytest.raises(KeyboardInterrupt), Staging(out, resume=True).begin("same"):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "manifest.json").read_text() == old


def test_a_refused_run_leaves_no_log(tmp_path: Path) -> None:
    staging = Staging(tmp_path / "out").begin("same")
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="already exists"):
        staging.__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_log_that_another_process_removes_before_it_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, staging = fcntl.flock, Staging(tmp_path / "out").begin("same")

    def late(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        staging.log.unlink()
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with staging, pytest.raises(OutputError, match="another merge is writing it now"):
        Staging(tmp_path / "out").begin("same").__enter__()


def test_a_finished_adapter_is_kept_with_its_compression_error(
    write_recipe: WriteRecipe, base: Path, tmp_path: Path
) -> None:
    (tmp_path / "tuned").mkdir()
    tensors = load_file(base / "model.safetensors")
    for stem in SLOTS:
        tensors[f"{stem}.weight"] += torch.randn(SLOTS[stem], generator=torch.Generator().manual_seed(0))
    save_file(tensors, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "tuned" / "config.json").write_text((base / "config.json").read_text())
    modules = {"*norm.weight": {"policy": "keep"}}
    models, output = [{"model": str(tmp_path / "tuned")}], {"form": "adapter", "compress_rank": 3}
    recipe = write_recipe(models=models, output=output, merge_method="average", modules=modules)
    modalloy.merge(recipe, tmp_path / "undisturbed")
    states = killed_at(range(1, 60), recipe, tmp_path / "out", cycle=True)
    assert states[-1][0] == "finished" and ["killed", "1"] in states
    for point in range(1, len(states) + 1):
        assert contents(tmp_path / f"out.{point}") == contents(tmp_path / "undisturbed"), f"killed at change {point}"


def test_killed_while_the_base_is_copied(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe(output={"form": "omni"})
    modalloy.merge(recipe, tmp_path / "undisturbed")
    states = killed_at(range(1, 60), recipe, tmp_path / "out", cycle=True)
    assert states[-1][0] == "finished"
    for point in range(1, len(states) + 1):
        assert contents(tmp_path / f"out.{point}") == contents(tmp_path / "undisturbed"), f"killed at change {point}"


def test_files_of_the_base_that_the_result_has_its_own_of(
    write_recipe: WriteRecipe, base: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(base, tmp_path / "base")
    for name in ("processor_config.json", "preprocessor_config.json", "chat_template.json"):
        (other / name).write_text('{"of": "the base"}')
    modalloy.merge(write_recipe(base_model=str(other), output={"form": "omni"}), tmp_path / "out")
    assert "modalities" in json.loads((tmp_path / "out" / "processor_config.json").read_text())


def test_a_shard_that_ends_between_the_two_factors_of_a_weight(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe(output={"form": "omni", "max_shard_size": "1KB"})
    modalloy.merge(recipe, tmp_path / "undisturbed")
    states = killed_at(range(20, 100, 9), recipe, tmp_path / "out", cycle=True)
    assert len({shards for _, shards in states}) > 3
    for index in range(len(states)):
        assert contents(tmp_path / f"out.{20 + 9 * index}") == contents(tmp_path / "undisturbed")


def test_another_scale_is_another_merge(
    write_recipe: WriteRecipe, specialists: dict[str, Path], tmp_path: Path
) -> None:
    recipe, out = write_recipe(output=FULL), tmp_path / "out"
    assert killed_at([30], recipe, out)[0][0] == "killed"
    config = specialists["audio"] / "config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 4'))
    with pytest.raises(OutputError, match="of inputs that changed since"):
        modalloy.merge(recipe, out, resume=True)


@pytest.mark.parametrize("step", ["write", "fsync"])
def test_a_disk_that_fills_up_leaves_nothing(
    step: str, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the thread that writes, and in what follows it."""
    recipe, before = write_recipe(output=FULL), set(tmp_path.iterdir())
    done, count = getattr(os, step), 0

    def failing(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        return done(*arguments)

    monkeypatch.setattr(os, step, failing)
    descriptors, threads = set(os.listdir("/proc/self/fd")), threading.active_count()
    with pytest.raises(OutputError, match="the disk is full"):
        modalloy.merge(recipe, tmp_path / "out")
    assert count >= 8 and set(tmp_path.iterdir()) == before | {recipe}
    assert len(set(os.listdir("/proc/self/fd")) - descriptors) <= 1  # the list's own
    assert threading.active_count() == threads


def test_two_merges_into_one_folder_are_refused(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe, out = write_recipe(), tmp_path / "out"
    with Staging(out).begin("other") as folder:
        with pytest.raises(OutputError, match="another merge is writing it now"):
            modalloy.merge(recipe, out)
        (folder / "file").write_text("theirs")
    assert (out / "file").read_text() == "theirs"


@pytest.mark.parametrize("form", ["adapter", "full"])
def test_same_bytes_whatever_the_environment(form: str, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe, results = write_recipe(output=FULL | {"form": form}), []
    for index, (hash_seed, threads, jobs) in enumerate([("0", "1", "1"), ("1", "2", "3"), ("2", "4", "2")]):
        out = tmp_path / f"out{index}"
        environment = {"PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        command = [sys.executable, "-m", "modalloy.cli", "merge", str(recipe), "-o", str(out), "--jobs", jobs]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | environment)
        results.append(contents(out))
    assert results[0] == results[1] == results[2]

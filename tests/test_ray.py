"""A real Ray cluster of two nodes on this machine: the bytes of the local engine, whoever is killed."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import yaml
from slow_compute import no_space, one_fails, slow

import modalloy
from modalloy import merging
from modalloy.errors import ModalloyError, OutputError, missing_package
from modalloy.planning.planner import plan
from modalloy.recipe import load_recipe
from modalloy.search.sweep import sweep

ray = pytest.importorskip("ray", reason="the extra ray is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray's own start

WriteRecipe = Callable[..., Path]
FULL = {"form": "full", "max_shard_size": "6KB"}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of two nodes of one processor each, and this process connected to it."""
    from ray.cluster_utils import Cluster

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [before])])
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    node = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster.address
    finally:
        ray.shutdown()
        cluster.shutdown()
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a result but where its inputs are on this machine."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "sources.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    "changes",
    [
        {"output": FULL},
        {"output": {"form": "adapter"}},
        {"output": FULL, "merge_method": "metagpt"},
        {"output": {"form": "adapter", "compress_rank": 2}, "merge_method": "ties"},
    ],
    ids=["full", "adapter", "survey", "cut"],
)
def test_the_bytes_are_those_of_the_local_engine(
    changes: dict[str, Any], address: str, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe = write_recipe(**changes)
    modalloy.merge(recipe, tmp_path / "local")
    done: list[int] = []
    report = modalloy.merge(recipe, tmp_path / "ray", engine="ray", on_job=lambda n, of: done.append(n))
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    assert done == sorted(done) and done[-1] >= len(report.plan.jobs)


@pytest.mark.parametrize(
    ("changes", "given"),
    [
        ({"output": FULL}, ["scale=0.1,0.5"]),
        ({"output": {"form": "adapter"}}, ["scale=0.1,0.5", "rank=2,4"]),
        ({"output": FULL, "merge_method": "metagpt"}, ["weight.image=0.5,1"]),
        ({"output": {"form": "omni", "max_shard_size": "6KB"}}, ["rank=1,4"]),
    ],
    ids=["full", "adapter", "survey", "other shards"],
)
def test_a_sweep_has_the_bytes_of_the_local_engine(
    changes: dict[str, Any], given: list[str], address: str, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe = write_recipe(**changes)
    sweep(recipe, tmp_path / "local", given)
    done: list[int] = []
    sweep(recipe, tmp_path / "ray", given, engine="ray", on_job=lambda n, of: done.append(n))
    folders = sorted(path.name for path in (tmp_path / "local").iterdir())
    assert sorted(path.name for path in (tmp_path / "ray").iterdir()) == folders
    for name in folders:
        assert contents(tmp_path / "ray" / name) == contents(tmp_path / "local" / name)
    assert done == sorted(done) and done[-1] >= len(plan(load_recipe(recipe)).jobs)


SWEEP_DRIVER = """
import sys
from functools import partial
from modalloy.search import sweep
from slow_compute import slow_several
sweep.compute_several = partial(slow_several, seconds=0.2)
sweep.sweep(sys.argv[1], sys.argv[2], ["scale=0.1,0.5"], engine="ray", ray_address=sys.argv[3])
"""


def wait_for_two(driver: "subprocess.Popen[Any]", log: Path) -> None:
    """Until two files are finished, or the process has ended."""
    while driver.poll() is None and not (log.exists() and log.read_text().count('"file"') >= 2):
        time.sleep(0.02)


def test_a_sweep_whose_driver_was_killed_is_resumed(address: str, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe, out = write_recipe(output=FULL), tmp_path / "ray"
    log = out / ".scale=0.5.partial.log"
    driver = subprocess.Popen([sys.executable, "-c", SWEEP_DRIVER, str(recipe), str(out), address])
    wait_for_two(driver, log)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL and not list(out.glob("scale=*"))
    sweep(recipe, out, ["scale=0.1,0.5"], engine="ray", resume=True)
    sweep(recipe, tmp_path / "local", ["scale=0.1,0.5"])
    for name in ("scale=0.1", "scale=0.5"):
        assert contents(out / name) == contents(tmp_path / "local" / name)


def test_killed_workers_change_nothing(
    address: str, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, place, killed = write_recipe(output=FULL), tmp_path / "pids", []
    place.mkdir()
    modalloy.merge(recipe, tmp_path / "local")
    monkeypatch.setattr(merging, "compute", partial(slow, place=str(place), seconds=0.1))

    def kill() -> None:
        while len(killed) < 2:
            for path in place.iterdir():
                if path.name not in killed and len(killed) < 2:
                    os.kill(int(path.name), signal.SIGKILL)
                    killed.append(path.name)
            time.sleep(0.02)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    modalloy.merge(recipe, tmp_path / "ray", engine="ray")
    killer.join(timeout=1)
    assert len(killed) == 2 and str(os.getpid()) not in killed
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


DRIVER = """
import sys
from functools import partial
import modalloy
from modalloy import merging
from slow_compute import slow
merging.compute = partial(slow, place=sys.argv[3], seconds=0.2)
modalloy.merge(sys.argv[1], sys.argv[2], engine="ray", ray_address=sys.argv[4])
"""


def test_a_killed_driver_is_resumed(address: str, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe, out, log = write_recipe(output=FULL), tmp_path / "ray", tmp_path / ".ray.partial.log"
    (tmp_path / "pids").mkdir()
    arguments = [str(recipe), str(out), str(tmp_path / "pids"), address]
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, *arguments])
    wait_for_two(driver, log)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL and not out.exists()
    modalloy.merge(recipe, out, engine="ray", resume=True)
    modalloy.merge(recipe, tmp_path / "local")
    assert contents(out) == contents(tmp_path / "local")


def test_a_full_disk_of_one_machine_is_one_line(
    address: str, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "compute", no_space)
    with pytest.raises(OutputError, match="the disk is full") as raised:
        modalloy.merge(write_recipe(output=FULL), tmp_path / "out", engine="ray")
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()


def test_a_merge_that_is_given_up_leaves_no_task_at_work(
    address: str, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, counted = write_recipe(output=FULL | {"max_shard_size": "20KB"}), tmp_path / "counted"
    first, *others = plan(load_recipe(recipe)).jobs
    counted.touch()
    monkeypatch.setattr(merging, "compute", partial(one_fails, place=str(counted), name=first.name))
    with pytest.raises(OutputError, match="the disk is full"):
        modalloy.merge(recipe, tmp_path / "out", engine="ray")
    n_begun = counted.stat().st_size
    time.sleep(1)
    assert n_begun < 9 < len(others) and counted.stat().st_size == n_begun
    assert not list(tmp_path.glob(".out*"))


def test_a_mistake_that_a_worker_finds_is_told_as_the_local_engine_tells_it(
    address: str, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe = write_recipe(output=FULL | {"dtype": "float16"}, parameters={"scale": 1e20})
    told = []
    for engine in ("local", "ray"):
        with pytest.raises(ModalloyError) as raised:
            modalloy.merge(recipe, tmp_path / engine, engine=engine)
        told.append((type(raised.value).__name__, str(raised.value)))
    assert told[0] == told[1]


def test_a_machine_that_sees_another_file_is_named(
    address: str, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modalloy.engines import ray as engine

    monkeypatch.setattr(engine, "_stamp", lambda path: (1, 2))
    with pytest.raises(OutputError, match=r"machine .* of the cluster does not see .*safetensors as this one does"):
        modalloy.merge(write_recipe(output=FULL), tmp_path / "out", engine="ray")
    assert not (tmp_path / "out").exists()


def test_a_machine_with_another_program_is_named(
    address: str, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modalloy.engines import ray as engine

    monkeypatch.setattr(engine, "program", lambda: ["modalloy 9"])
    with pytest.raises(
        OutputError, match=r"machine .* has modalloy 0.* and this one modalloy 9, whose bytes may differ"
    ):
        modalloy.merge(write_recipe(output=FULL), tmp_path / "out", engine="ray")


def test_an_unreachable_cluster_is_one_line(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: Any) -> None:
        raise ConnectionError("Could not reach 127.0.0.1:1")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(OutputError, match=r"--ray-address 127\.0\.0\.1:1: no cluster can be reached there"):
        modalloy.merge(write_recipe(), tmp_path / "out", engine="ray", ray_address="127.0.0.1:1")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"], ids=["nothing", "http"])
def test_what_listens_but_is_not_ray_is_told_at_once(
    says: bytes, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modalloy.engines import connection

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(connection, "KNOCK_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"

        def answer() -> None:
            line, _ = server.accept()
            with line:
                line.sendall(says)
                while line.recv(1024):
                    pass

        listener = threading.Thread(target=answer)
        listener.start()
        with pytest.raises(OutputError, match=r"no cluster can be reached there \(what listens there is not Ray\)"):
            modalloy.merge(write_recipe(), tmp_path / "out", engine="ray", ray_address=address)
        listener.join()


def test_without_ray_the_extra_is_named(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError) as raised:
        modalloy.merge(write_recipe(), tmp_path / "out", engine="ray")
    found = missing_package(raised.value)
    assert found is not None and 'pip install "modalloy[ray]"' in str(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "spark"}, "--engine spark: not an engine; known: local, ray"),
        ({"ray_address": "auto"}, "--ray-address is of --engine ray"),
        ({"engine": "ray", "device": "cuda"}, "--engine ray: its tasks run on processors; use --device cpu"),
    ],
)
def test_options_that_do_not_fit(
    options: dict[str, str], message: str, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match=message):
        modalloy.merge(write_recipe(), tmp_path / "out", **options)


def test_a_shard_is_sent_with_its_own_jobs(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """Nothing large goes through the driver: what a task is sent is small."""
    import pickle

    from modalloy.engines.ray import Shard
    from modalloy.outputs.streamed import StreamedWeights
    from modalloy.storage.staging import Staging

    planned = plan(load_recipe(write_recipe(output=FULL)))
    weights = StreamedWeights(planned, Staging(tmp_path / "out"))
    place = weights.staging.folder
    shards = [Shard(index, (place,), (specs,), jobs) for index, specs, jobs in weights.shards(planned.jobs)]
    assert [spec for shard in shards for specs in shard.specs for spec in specs] == [
        s for job in planned.jobs for s in job.outputs
    ]
    assert all(len(pickle.dumps(shard)) < 8192 for shard in shards) and len(shards) > 3


def test_more_memory_than_a_machine_has_is_one_line(address: str, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    with pytest.raises(
        OutputError, match=r"--max-memory: no machine of the cluster has 900\.00 GB for a task"
    ) as raised:
        modalloy.merge(write_recipe(output=FULL), tmp_path / "out", engine="ray", max_memory=900 * 10**9)
    assert "\n" not in str(raised.value) and not list(tmp_path.glob(".out*"))


def test_an_address_where_nothing_listens_is_told_at_once(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray is not asked"))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(
        OutputError, match=r"RAY_ADDRESS 127\.0\.0\.1:1: no cluster can be reached there .* or unset it"
    ):
        modalloy.merge(write_recipe(), tmp_path / "out", engine="ray")


def test_relative_paths_are_those_of_the_driver(
    address: str, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cluster's machines were started in another folder."""
    recipe = write_recipe(output=FULL)
    told = yaml.safe_load(recipe.read_text())
    monkeypatch.chdir(tmp_path)
    told["base_model"] = os.path.relpath(told["base_model"])
    for entry in told["models"]:
        entry["model"] = os.path.relpath(entry["model"])
    recipe.write_text(yaml.safe_dump(told))
    modalloy.merge(recipe.name, "local")
    modalloy.merge(recipe.name, "ray", engine="ray", earlier="local")
    modalloy.merge(recipe.name, "again", engine="ray")
    assert contents(tmp_path / "ray") == contents(tmp_path / "local") == contents(tmp_path / "again")


COMMAND = """
import sys
from functools import partial
from modalloy import merging
from modalloy.cli import main
from slow_compute import slow
merging.compute = partial(slow, place=sys.argv.pop(), seconds=0.2)
main()
"""


def test_a_driver_that_is_told_to_stop_leaves_what_is_finished(
    address: str, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe, out, log = write_recipe(output=FULL), tmp_path / "ray", tmp_path / ".ray.partial.log"
    (tmp_path / "pids").mkdir()
    arguments = ["merge", str(recipe), "-o", str(out), "--engine", "ray", "--ray-address", address]
    driver = subprocess.Popen([sys.executable, "-c", COMMAND, *arguments, str(tmp_path / "pids")], stderr=-1, text=True)
    wait_for_two(driver, log)
    driver.terminate()
    assert driver.stderr is not None and driver.stderr.read().endswith("go on with --resume\n")
    assert driver.wait() in (-signal.SIGTERM, 128 + signal.SIGTERM) and log.read_text().count('"file"') >= 2
    modalloy.merge(recipe, out, engine="ray", resume=True)
    modalloy.merge(recipe, tmp_path / "local")
    assert contents(out) == contents(tmp_path / "local")


def test_a_cluster_without_processors_is_refused(
    address: str, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tasks would wait for ever."""
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"memory": 4e9}}])
    with pytest.raises(OutputError, match="the cluster has no machine with a processor for tasks"):
        modalloy.merge(write_recipe(), tmp_path / "out", engine="ray")


@pytest.mark.parametrize("by_client", [False, True])
def test_a_cluster_that_is_lost_is_told(
    by_client: bool, address: str, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray itself ends the process a minute later, without a word; its client raises a ConnectionError."""
    from modalloy.engines import ray as engine

    def gone(*_: Any, **options: Any) -> Any:
        raise ConnectionError("nobody there")

    recipe, wait, calls = write_recipe(output=FULL), ray.wait, count()

    def waiting(answers: list[Any], **options: Any) -> Any:
        if "num_returns" in options or next(calls) < 4:
            return wait(answers, **options)
        return gone() if by_client else ([], answers)

    with monkeypatch.context() as patched:
        patched.setattr(engine, "knock", gone)
        patched.setattr(ray, "wait", waiting)
        lost = r"^the cluster( at .*)? was lost \(nobody there\); start it again, then go on with --resume$"
        with pytest.raises(engine.LostTaskError, match=lost):
            modalloy.merge(recipe, tmp_path / "out", engine="ray")
    assert not (tmp_path / "out").exists()
    modalloy.merge(recipe, tmp_path / "out", resume=True)
    modalloy.merge(recipe, tmp_path / "local")
    assert (tmp_path / "out/manifest.json").read_bytes() == (tmp_path / "local/manifest.json").read_bytes()


def test_a_machine_that_cannot_run_modalloy_is_named(
    address: str, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modalloy.engines import ray as engine

    def lacking(*_: Any) -> None:
        raise ModuleNotFoundError("No module named 'modalloy'")

    monkeypatch.setattr(engine, "_look", lacking)
    with pytest.raises(
        OutputError, match=r"machine .* cannot run modalloy \(.*No module named 'modalloy'.*\); install"
    ):
        modalloy.merge(write_recipe(output=FULL), tmp_path / "out", engine="ray")

"""Models elsewhere, by ranges: headers for a plan, each byte once for a merge, and networks that fail."""

import errno
import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import write_compose
from stores import COMMIT, FileServer, serving

import modalloy
from modalloy import merging
from modalloy.errors import CheckpointError, OutputError
from modalloy.outputs.push import uploaded_from
from modalloy.recipe import load_recipe
from modalloy.storage import ranges, remote
from modalloy.verify import verify

pytest.importorskip("aiohttp", reason="the extra remote is not installed")

SMALL = 4096  # bytes of a block, so that tiny models have several


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """A web server, a cache of its own, and blocks as small as the models."""
    monkeypatch.setenv("MODALLOY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)
    for module in (ranges, remote):
        monkeypatch.setattr(module, "BLOCK_BYTES", SMALL)
    monkeypatch.setattr(remote, "HEAD_BYTES", 1024)
    with serving() as store:
        yield store


@pytest.fixture
def write_remote(server: FileServer, base: Path, specialists: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A recipe of the tiny models, by addresses of the server."""

    def write(name: str = "remote.yaml", **changes: Any) -> Path:
        models = [
            {"model": server.add(path, path.name), "modality": modality} for modality, path in specialists.items()
        ]
        content = {"base_model": server.add(base, "base"), "merge_method": "ssam", "models": models}
        path = tmp_path / name
        path.write_text(yaml.safe_dump(content | {"output": {"form": "full", "max_shard_size": "30KB"}} | changes))
        return path

    return write


def weights_of(folder: Path) -> dict[str, bytes]:
    """The weight files of a result."""
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors*")}


def weight_bytes(server: FileServer) -> int:
    """Size of all weight files that are served."""
    return sum(len(data) for path, data in server.files.items() if path.endswith(".safetensors"))


def weights_sent(server: FileServer) -> int:
    """How many bytes of weight files were sent."""
    return sum(count for path, count in server.sent.items() if path.endswith(".safetensors"))


def test_a_plan_reads_headers_only(server: FileServer, write_remote: Callable[..., Path]) -> None:
    planned = modalloy.plan(load_recipe(write_remote()))
    headers = sum(
        8 + int.from_bytes(data[:8], "little") for path, data in server.files.items() if path.endswith(".safetensors")
    )
    assert planned.merged_weights() > 0
    assert weights_sent(server) <= headers + 3 * remote.HEAD_BYTES < weight_bytes(server)


def test_each_byte_comes_once_and_the_result_is_that_of_local_files(
    server: FileServer, write_remote: Callable[..., Path], write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = write_remote()
    modalloy.plan(load_recipe(recipe))
    server.sent.clear()
    modalloy.merge(recipe, tmp_path / "out")
    moved = weights_sent(server) / weight_bytes(server)
    assert 1 <= moved <= 1.02
    modalloy.merge(write_recipe(output={"form": "full", "max_shard_size": "30KB"}), tmp_path / "local")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "local")
    told, local = (json.loads((tmp_path / name / "manifest.json").read_text())["inputs"] for name in ("out", "local"))
    assert told == local
    assert not list((tmp_path / "cache/blocks").iterdir())
    verify(tmp_path / "out")


def test_an_adapter_needs_no_weight_of_its_base(
    server: FileServer, write_remote: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = write_remote(output={"form": "adapter"})
    modalloy.plan(load_recipe(recipe))
    server.sent.clear()
    modalloy.merge(recipe, tmp_path / "out")
    assert not server.sent["/base/model.safetensors"]
    adapters = sum(len(data) for path, data in server.files.items() if path.endswith("adapter_model.safetensors"))
    assert weights_sent(server) == adapters


def test_what_is_kept_serves_later_merges(
    server: FileServer, write_remote: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODALLOY_REMOTE_CACHE", "all")
    recipe = write_remote()
    modalloy.merge(recipe, tmp_path / "one")
    server.sent.clear()
    modalloy.merge(recipe, tmp_path / "two")
    assert not weights_sent(server) and weights_of(tmp_path / "one") == weights_of(tmp_path / "two")


@pytest.mark.parametrize("fault", ["cut", "short", "shifted", "slow", "busy"])
def test_a_network_that_fails_changes_nothing(
    fault: str, server: FileServer, write_remote: Callable[..., Path], write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """Every third answer is cut, too short, slow, or an error."""
    server.fault = lambda path, count: fault if count % 3 == 1 else None
    modalloy.merge(write_remote(output={"form": "adapter"}), tmp_path / "out")
    modalloy.merge(write_recipe(), tmp_path / "local")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "local")


@pytest.mark.parametrize(
    ("fault", "message"),
    [("busy", r"failed 6 times \(.*\)"), ("forbidden", "403.*; .* give your credentials")],
)
def test_a_network_that_is_gone_is_one_line_and_the_merge_goes_on_later(
    fault: str,
    message: str,
    server: FileServer,
    write_remote: Callable[..., Path],
    write_recipe: Callable[..., Path],
    tmp_path: Path,
) -> None:
    recipe = write_remote()
    modalloy.plan(load_recipe(recipe))
    nearly = len(server.files["/base/model.safetensors"]) // SMALL - 2
    server.fault = lambda path, count: fault if path == "/base/model.safetensors" and count > nearly else None
    with pytest.raises(CheckpointError, match=f"base/model.safetensors: {message}") as raised:
        modalloy.merge(recipe, tmp_path / "out")
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()
    assert (finished := (tmp_path / ".out.partial.log").read_text().count('"file"'))
    server.fault = lambda path, count: None
    server.sent.clear()
    modalloy.merge(recipe, tmp_path / "out", resume=True)
    assert finished and weights_sent(server) <= weight_bytes(server)
    modalloy.merge(write_recipe(output={"form": "full", "max_shard_size": "30KB"}), tmp_path / "local")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "local")


def test_a_cache_without_room_is_named_and_the_merge_goes_on_later(
    write_remote: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, write_bytes = write_remote(), Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.parent.parent.name == "blocks":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_bytes(path, data)

    monkeypatch.setenv("MODALLOY_REMOTE_CACHE", "all")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(
            remote.CacheError, match=r"kept there \(No space left on device\); set MODALLOY_CACHE"
        ) as raised:
            modalloy.merge(recipe, tmp_path / "out")
    assert str(raised.value).startswith(os.environ["MODALLOY_CACHE"])
    modalloy.merge(recipe, tmp_path / "out", resume=True)


@pytest.mark.parametrize("size", ["same", "other"])
def test_an_object_that_changes_during_the_merge_is_refused(
    size: str, server: FileServer, write_remote: Callable[..., Path], tmp_path: Path
) -> None:
    recipe, path = write_remote(), "/audio-damc/adapter_model.safetensors"
    modalloy.plan(load_recipe(recipe))

    def change(asked: str, count: int) -> None:
        if asked == "/base/model.safetensors" and count > 4:
            data = server.files[path]
            server.files[path] = data[:-1] + bytes([data[-1] ^ 1]) + (b"" if size == "same" else b"more")

    server.fault = change
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: was changed while being read; start again"):
        modalloy.merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_blocks_of_another_version_do_not_reach_a_later_merge(
    server: FileServer, write_remote: Callable[..., Path], write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """The owner puts the first version back, whose etag (a weak one, by which nothing can be asked for) is as before."""
    server.tag_form = 'W/"{}"'
    recipe, path = write_remote(merge_method="metagpt"), "/audio-damc/adapter_model.safetensors"
    first = server.files[path]
    server.files[path] = first[:-1] + bytes([first[-1] ^ 1])
    planned = modalloy.plan(load_recipe(recipe))
    server.files[path] = first
    file = next(file for file, _ in planned.inputs.files.values() if file.path.parent.name == "audio-damc")
    with pytest.raises(remote.ObjectChangedError):
        file.read(next(iter(planned.specialists[1].checkpoint.refs.values())))
    modalloy.merge(recipe, tmp_path / "out")
    local = {"merge_method": "metagpt", "output": {"form": "full", "max_shard_size": "30KB"}}
    modalloy.merge(write_recipe(**local), tmp_path / "local")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "local")


def test_a_file_that_a_server_fails_to_tell_of_is_asked_for_again(
    server: FileServer, write_remote: Callable[..., Path]
) -> None:
    """Else it would be left out: whatever goes wrong there, fsspec calls it a file that is not found."""
    recipe = write_remote()
    server.files["/base/generation_config.json"] = b"{}"
    server.broken["/base/generation_config.json"] = 2
    assert (modalloy.plan(load_recipe(recipe)).target.folder / "generation_config.json").is_file()


@pytest.mark.parametrize("address", ["s3://", "s3:///x", "s3://models/a/../b", "https://host/."])
def test_what_is_no_address_of_a_folder(address: str) -> None:
    with pytest.raises(CheckpointError, match="is no address of a folder; write"):
        remote.Store(address)


def test_another_version_of_an_object_is_another_model(
    server: FileServer, write_remote: Callable[..., Path], specialists: dict[str, Path], tmp_path: Path
) -> None:
    recipe = write_remote(output={"form": "adapter"})
    first = modalloy.merge(recipe, tmp_path / "one")
    server.add(write_compose(tmp_path / "again", "audio", seed=9), "audio-damc")
    second = modalloy.merge(recipe, tmp_path / "two")
    folders = [report.plan.specialists[1].folder for report in (first, second)]
    assert folders[0] != folders[1] and weights_of(tmp_path / "one") != weights_of(tmp_path / "two")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda server: setattr(server, "gives_ranges", False), "cannot be read by ranges .* download the model"),
        (lambda server: server.files.clear(), "holds no files of a model; correct the address"),
        (
            lambda server: server.files.update({"/base/model.safetensors": b"\xff" * 100}),
            r"not a complete safetensors file \(100 bytes\)",
        ),
        (
            lambda server: server.files.update({"/base/model.safetensors": b"\x40" + b"\0" * 7 + b"{" * 100}),
            "header is damaged",
        ),
        (
            lambda server: server.files.update({"/base/model.safetensors.index.json": b"[1]"}),
            r"index\.json: has no weight_map that names files",
        ),
        (
            lambda server: server.files.update({"/base/model.safetensors.index.json": b"not JSON"}),
            r"index\.json: is not JSON",
        ),
        (lambda server: setattr(server, "tag_form", ""), r"its server tells no version of it \(ETag, Last-Modified\)"),
        (lambda server: server.broken.update({"/base/config.json": 99}), r"config\.json: failed 6 times \(503"),
    ],
    ids=["no ranges", "nothing", "length", "header", "no map", "no JSON", "no version", "unavailable"],
)
def test_what_is_no_model_is_refused(
    break_it: Callable[[FileServer], None], message: str, server: FileServer, write_remote: Callable[..., Path]
) -> None:
    recipe = write_remote()
    break_it(server)
    with pytest.raises(CheckpointError, match=message) as raised:
        modalloy.plan(load_recipe(recipe))
    assert "\n" not in str(raised.value)


def test_only_our_cache_names_addresses(server: FileServer, tmp_path: Path, base: Path) -> None:
    """A record in a stranger's folder makes no request."""
    import shutil

    shutil.copytree(base, tmp_path / "model")
    entry = {"url": f"{server.url}/x", "size": 10**9, "tag": "", "sha256": None, "is_pinned": True}
    (tmp_path / "model" / remote.RECORD).write_text(json.dumps({"model.safetensors": entry}))
    assert remote.record_of(tmp_path / "model/model.safetensors") is None


def run(code: str, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """A process of its own, in which libraries read their addresses from the environment when they are imported."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )


MERGE = "import sys; from modalloy.cli import main; sys.argv[0] = 'modalloy'; main()"


def test_the_hub_by_ranges(
    server: FileServer, base: Path, specialists: dict[str, Path], write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    models = [{"model": server.add_model(path, f"me/{path.name}")} for path in specialists.values()]
    content = {"base_model": server.add_model(base, "me/base"), "models": models, "output": {"form": "full"}}
    (tmp_path / "hub.yaml").write_text(yaml.safe_dump(content))
    environment = {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(tmp_path / "hf")}
    done = run(MERGE, "merge", str(tmp_path / "hub.yaml"), "-o", str(tmp_path / "out"), **environment)
    assert not done.returncode, done.stderr
    weights = weight_bytes(server)
    assert weights_sent(server) <= 1.02 * weights + 3 * (64 << 10)
    told = json.loads((tmp_path / "out/manifest.json").read_text())["inputs"]
    assert told["base"]["name"] == "me/base" and {one["revision"] for one in told.values()} == {COMMIT}
    modalloy.merge(write_recipe(output={"form": "full"}), tmp_path / "local")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "local")


@pytest.fixture(scope="module")
def bucket() -> Iterator[dict[str, str]]:
    """A bucket of moto's S3 server, and the environment that leads to it."""
    pytest.importorskip("s3fs", reason="the extra remote is not installed")
    moto = pytest.importorskip("moto.server", reason="moto's server is not installed")
    place = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    place.start()
    host, port = place.get_host_and_port()
    yield {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    place.stop()


@pytest.fixture
def s3(bucket: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The file system of that server, with a bucket."""
    import fsspec

    for name, value in bucket.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MODALLOY_CACHE", str(tmp_path / "cache"))
    files = fsspec.filesystem("s3", use_listings_cache=False)
    if not files.exists("models"):
        files.mkdir("models")
    return files


@pytest.fixture(scope="module")
def emulator() -> Iterator[str]:
    """Address of a server that speaks as Google's does, with the bucket `models`."""
    pytest.importorskip("gcsfs", reason="the extra remote is not installed")
    module = pytest.importorskip("gcp_storage_emulator.server", reason="gcp-storage-emulator is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = module.create_server("127.0.0.1", port, in_memory=True, default_bucket="models")
    place.start()
    yield f"http://127.0.0.1:{port}"
    place.stop()


@pytest.fixture
def gs(emulator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The file system of that server."""
    import fsspec

    monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator)
    monkeypatch.setenv("NO_GCE_CHECK", "true")  # or Google's own machines are looked for
    monkeypatch.setenv("MODALLOY_CACHE", str(tmp_path / "cache"))
    return fsspec.filesystem("gs", use_listings_cache=False)


def test_a_version_that_a_store_has_no_more_is_not_read(s3: Any, tmp_path: Path) -> None:
    for text in (b"first", b"other", b"first"):
        s3.pipe_file(f"models/{tmp_path.name}/config.json", text)
        listed = remote.Store(f"s3://models/{tmp_path.name}").files()["config.json"]
        if text == b"first":
            assert remote.Store(listed.url).fetch(listed, 1, 4) == b"irs"
        else:
            s3.pipe_file(f"models/{tmp_path.name}/config.json", b"first")
            with pytest.raises(remote.ObjectChangedError, match="was changed while being read; start again"):
                remote.Store(listed.url).fetch(listed, 1, 4)


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_target_without_its_bucket_is_refused_before_any_work(scheme: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(scheme)
    with pytest.raises(CheckpointError, match=r"nosuchbucket/out: no such file; correct the address"):
        uploaded_from(f"{scheme}://nosuchbucket/out")


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_file_in_place_of_a_folder_is_told(scheme: str, base: Path, tmp_path: Path, request: Any) -> None:
    name = f"models/{tmp_path.name}/model.safetensors"
    request.getfixturevalue(scheme).put_file(str(base / "model.safetensors"), name)
    with pytest.raises(CheckpointError, match=rf"^{scheme}://{name}: is a file; give the folder that it is in$"):
        remote.mirror(f"{scheme}://{name}", ["*.json"], ["model"])


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_stores_in_and_out(
    scheme: str,
    base: Path,
    specialists: dict[str, Path],
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    from typer.testing import CliRunner

    from modalloy.cli import app

    store = request.getfixturevalue(scheme)
    for path in (base, *specialists.values()):
        for file in path.iterdir():
            store.put_file(str(file), f"models/{tmp_path.name}/{path.name}/{file.name}")
    root = f"{scheme}://models/{tmp_path.name}"
    models = [{"model": f"{root}/{path.name}"} for path in specialists.values()]
    content = {"base_model": f"{root}/{base.name}", "models": models, "output": {"form": "full"}}
    (tmp_path / "store.yaml").write_text(yaml.safe_dump(content))
    arguments = ["merge", str(tmp_path / "store.yaml"), "-o", f"{root}/out"]
    done = CliRunner().invoke(app, arguments)
    assert not done.exit_code, (done.output, done.exception)
    modalloy.merge(write_recipe(output={"form": "full"}), tmp_path / "local")
    there = {path.rpartition("/")[2]: store.cat_file(path) for path in store.ls(f"{root}/out", detail=False)}
    assert there["model.safetensors"] == (tmp_path / "local/model.safetensors").read_bytes()
    outputs = json.loads(there["manifest.json"])["outputs"]
    assert outputs == {
        name: hashlib.sha256(data).hexdigest() for name, data in there.items() if name != "manifest.json"
    }
    assert not list((tmp_path / "cache/results").rglob("*.safetensors"))
    again = CliRunner().invoke(app, arguments)
    assert isinstance(again.exception, OutputError) and "holds models/" in str(again.exception)


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_an_object_that_changes_is_refused(
    scheme: str, specialists: dict[str, Path], write_recipe: Callable[..., Path], tmp_path: Path, request: Any
) -> None:
    """Uploaded again with other bytes of the same length between the plan and the merge."""
    store = request.getfixturevalue(scheme)
    place = f"models/{tmp_path.name}/image"
    for file in specialists["image"].iterdir():
        store.put_file(str(file), f"{place}/{file.name}")
    models = [
        {"model": f"{scheme}://{place}", "modality": "image"},
        {"model": str(specialists["audio"]), "modality": "audio"},
    ]
    recipe, plans = write_recipe(models=models), merging.plan

    def changed(*arguments: Any, **options: Any) -> Any:
        planned = plans(*arguments, **options)
        name = f"{place}/adapter_model.safetensors"
        data = store.cat_file(name)
        store.pipe_file(name, data[:-4] + bytes(byte ^ 1 for byte in data[-4:]))
        return planned

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(merging, "plan", changed)
        with pytest.raises(
            CheckpointError, match=r"adapter_model\.safetensors: was changed while being read"
        ) as raised:
            modalloy.merge(recipe, tmp_path / "out")
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()


def test_an_upload_that_fails_leaves_nothing_there(
    s3: Any, write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modalloy.outputs import push

    out = modalloy.merge(write_recipe(), tmp_path / "out").out
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)
    put = s3.put_file

    def failing(lpath: str, rpath: str, **options: Any) -> Any:
        if lpath.endswith("recipe.yaml"):
            raise OSError("the network is gone")
        return put(lpath, rpath, **options)

    monkeypatch.setattr(s3, "put_file", failing)
    with pytest.raises(OutputError, match=r"the network is gone.*nothing is left there, and the result is whole in"):
        push.upload(out, "s3://models/broken/out")
    assert not s3.exists("models/broken/out") and (out / "manifest.json").is_file()


def uploads(s3: Any) -> list[str]:
    """The keys of uploads in parts that have not ended."""
    return [one["Key"] for one in s3.call_s3("list_multipart_uploads", Bucket="models").get("Uploads", [])]


class Killed(BaseException):
    """After which nothing is cleaned."""


def stopped_at(name: str, s3: Any, stop: BaseException) -> Callable[..., Any]:
    """`put_file` that stops at a file, of which a part has arrived."""
    put = s3.put_file

    def stopping(lpath: str, rpath: str, **options: Any) -> Any:
        if not lpath.endswith(name):
            return put(lpath, rpath, **options)
        bucket, key, _ = s3.split_path(rpath)
        s3.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
        raise stop

    return stopping


def test_an_upload_that_was_killed_goes_on(
    s3: Any, write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from modalloy.cli import app

    url, cache = "s3://models/killed/out", Path(os.environ["MODALLOY_CACHE"])
    arguments = ["merge", str(write_recipe(output={"form": "full"})), "-o", url]
    for last in ("model.safetensors", "manifest.json"):
        with monkeypatch.context() as patched:
            patched.setattr(s3, "put_file", stopped_at(last, s3, Killed()))
            resumed = [] if last == "model.safetensors" else ["--resume"]
            with pytest.raises(Killed):
                CliRunner().invoke(app, [*arguments, *resumed])
        assert s3.exists(f"{url}/config.json") and not s3.exists(f"{url}/manifest.json")
        assert f"killed/out/{last}" in uploads(s3)
    again = CliRunner().invoke(app, arguments).exception
    assert isinstance(again, OutputError) and str(again).startswith(f"{url}: a result for it is whole in")
    s3.pipe_file(f"{url}/other.txt", b"somebody's")
    refused = CliRunner().invoke(app, [*arguments, "--resume"]).exception
    assert isinstance(refused, OutputError) and "holds models/killed/out/other.txt" in str(refused)
    s3.rm_file(f"{url}/other.txt")
    done = CliRunner().invoke(app, [*arguments, "--resume"])
    assert not done.exit_code, (done.output, done.exception)
    modalloy.merge(write_recipe(output={"form": "full"}), tmp_path / "local")
    assert s3.cat_file(f"{url}/model.safetensors") == (tmp_path / "local/model.safetensors").read_bytes()
    assert s3.exists(f"{url}/manifest.json") and not uploads(s3) and not list((cache / "results").iterdir())


def test_a_result_that_was_uploaded_before_a_kill_is_known(
    s3: Any, write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modalloy.outputs import push

    url = "s3://models/whole/out"
    folder = push.uploaded_from(url)
    modalloy.merge(write_recipe(), folder)
    with monkeypatch.context() as patched:
        patched.setattr(push.shutil, "rmtree", lambda folder: None)
        push.upload(folder, url)
    assert push.uploaded_from(url, resume=True) == folder
    manifest = s3.cat_file(f"{url}/manifest.json")
    s3.pipe_file(f"{url}/manifest.json", manifest.replace(b"modalloy", b"somebody"))
    with pytest.raises(OutputError, match=r"holds models/whole/out/manifest\.json"):
        push.uploaded_from(url, resume=True)


@pytest.mark.parametrize(
    ("reached", "left"), [(True, "nothing is left there"), (False, "what was uploaded is left there")]
)
@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_an_upload_that_stops_tells_what_is_left(
    reached: bool,
    left: str,
    stop: type[BaseException],
    s3: Any,
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """RuntimeError: clients of stores raise errors that are not of the system when there is no network."""
    from modalloy.outputs import push

    def gone(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("no network")

    url = f"s3://models/{tmp_path.name}/out"
    out = modalloy.merge(write_recipe(), tmp_path / "out").out
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(s3, "put_file", stopped_at("recipe.yaml", s3, stop("stopped")))
    if not reached:
        monkeypatch.setattr(s3, "rm_file", gone)
    with pytest.raises((OutputError, KeyboardInterrupt), match=rf"{left}.*the result is whole in ") as told:
        push.upload(out, url)
    assert str(told.value).count("--resume") == 1
    assert s3.exists(url) is not reached and (out / "manifest.json").is_file()
    assert not [key for key in uploads(s3) if tmp_path.name in key]

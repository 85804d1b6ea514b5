"""Reading from the disk and writing to it: bytes, hashes and descriptors, whatever the order, the file system and the threads."""

import hashlib
import json
import os
import resource
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modalloy.errors import CheckpointError
from modalloy.storage import source
from modalloy.storage.inputs import Inputs
from modalloy.storage.tensors import Checkpoint, TensorRef, WeightFile
from modalloy.storage.views import MappedRef, cut_rows
from modalloy.storage.writer import DIRECT_BYTES, TensorSpec, WeightWriter, _header

MEMORY = Path("/dev/shm")  # a file system without O_DIRECT on many kernels


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder on the disk, and one in memory."""
    if request.param == "disk":
        yield tmp_path
        return
    if not os.access(MEMORY, os.W_OK):
        pytest.skip(f"{MEMORY} is not there")
    path = MEMORY / f"modalloy-{os.getpid()}"
    path.mkdir()
    yield path
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


def drop_from_cache(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def odd_sizes() -> dict[str, torch.Tensor]:
    """Tensors that begin and end anywhere in a page."""
    generator = torch.Generator().manual_seed(0)
    sizes = (3, 70_001, 1, 0, 2_000_003, 65_537, 5_000_000, 11)
    return {
        f"{i}": torch.randint(-128, 128, (size,), dtype=torch.int8, generator=generator) for i, size in enumerate(sizes)
    }


@pytest.mark.parametrize("order", ["forward", "backward", "every third", "side by side"])
def test_any_order_gives_the_same_bytes_and_hash(order: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "BLOCK_BYTES", 1 << 18)
    monkeypatch.setattr(source, "MAX_SKIPPED_BYTES", 1 << 17)
    path, wanted = folder / "model.safetensors", odd_sizes()
    save_file(wanted, path)
    drop_from_cache(path)
    file = WeightFile(path)
    refs = list(file.refs.values())
    chosen = {"forward": refs, "backward": refs[::-1], "every third": refs[::3]}.get(order, refs * 4)
    with ThreadPoolExecutor(4 if order == "side by side" else 1) as pool:
        for ref, found in zip(chosen, pool.map(file.read, chosen), strict=True):
            assert torch.equal(found, wanted[ref.name])
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_reads_whose_hashing_is_put_off_give_the_same_hash(folder: Path) -> None:
    path, wanted = folder / "model.safetensors", odd_sizes()
    save_file(wanted, path)
    drop_from_cache(path)
    file = WeightFile(path)
    file.hash_reads()
    later: list[Any] = []
    inputs = Inputs([("it", [file])])
    found = {name: inputs.read(ref, None, later.append) for name, ref in file.refs.items()}
    assert len(later) == 2 * len(wanted) and not file._source.hashed
    for call in later:
        call()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert file._source.hashed == sum(file.refs[name].n_bytes for name in wanted) + min(
        ref.begin for ref in file.refs.values()
    )
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_that_is_gone_when_it_is_hashed_is_named_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(5), "b": torch.ones(5)}, path)
    file, later = WeightFile(path), list[Any]()
    file.hash_reads()
    file.read(file.refs["b"], None, later.append)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such file"):
        later[0]()


@pytest.mark.parametrize(("begin", "end"), [(0, 3), (2, 5), (4, 9), (0, 9)])
def test_some_rows_of_a_tensor_are_those_rows(begin: int, end: int, tmp_path: Path) -> None:
    whole = torch.arange(9 * 4.0).reshape(9, 4)
    save_file({"top": whole[:5].clone(), "rest": whole[5:].clone(), "all": whole}, tmp_path / "a.safetensors")
    file = WeightFile(tmp_path / "a.safetensors")
    inputs = Inputs([("it", [file])])
    top, rest, all_ = (file.refs[name] for name in ("top", "rest", "all"))
    parts = ((top, ((0, 5),), ((0, 5),)), (rest, ((0, 4),), ((5, 9),)))
    joined = MappedRef("joined", torch.float32, (9, 4), top.file, -1, parts)
    for ref in (all_, joined):
        cut = cut_rows(ref, slice(begin, end))
        assert cut is not None and cut.shape == (end - begin, 4)
        assert torch.equal(inputs.read(cut), whole[begin:end])
    scattered = MappedRef("s", torch.float32, (9, 4), top.file, -1, ((all_, ((0, 4), (5, 9)), ((0, 4), (4, 8))),))
    assert cut_rows(scattered, slice(begin, end)) is None


def test_hundreds_of_shards_need_few_descriptors(tmp_path: Path) -> None:
    names = {f"{index}": f"model-{index:05d}.safetensors" for index in range(300)}
    for name, file in names.items():
        save_file({name: torch.full((2,), float(name))}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, hard))
    try:
        checkpoint = Checkpoint(tmp_path, ("model",))
        assert all(float(checkpoint.read(ref)[0]) == float(ref.name) for ref in checkpoint.refs.values())
        assert len({file.sha256 for file in checkpoint.files}) == 300
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_the_page_cache_holds_comes_from_there_and_the_rest_past_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = torch.randn(512, 512)
    save_file({"a": weights, "b": weights + 1}, tmp_path / "two.safetensors")
    past: list[int] = []
    direct = source._Opened._past_cache

    def noted(self: source._Opened) -> int:
        past.append(1)
        return direct(self)

    monkeypatch.setattr(source._Opened, "_past_cache", noted)
    file = WeightFile(tmp_path / "two.safetensors")
    assert torch.equal(file.read(file.refs["a"]), weights)
    with (tmp_path / "two.safetensors").open("rb") as opened:
        os.fsync(opened.fileno())
        assert source.cached_share(opened.fileno(), 0, 1 << 20) in (0.0, 1.0)
        if source.cached_share(opened.fileno(), 0, 1 << 20):  # the system can tell
            assert not past
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        dropped = not source.cached_share(opened.fileno(), 0, 1 << 20)
    assert torch.equal(file.read(file.refs["b"]), weights + 1)
    assert bool(past) or not dropped


def test_a_shared_tensor_is_read_once_and_let_go_after_its_last_use(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = torch.randn(64, 64)
    save_file({"shared": weights, "own": weights + 1}, folder / "two.safetensors")
    file = WeightFile(folder / "two.safetensors")
    inputs = Inputs([("it", [file])])
    reads: list[str] = []
    read = WeightFile.read

    def noted(self: WeightFile, ref: TensorRef, *given: Any) -> torch.Tensor:
        reads.append(ref.name)
        return read(self, ref, *given)

    monkeypatch.setattr(WeightFile, "read", noted)
    shared = file.refs["shared"]
    inputs.share({shared: 3})
    first, second, third = (inputs.read(shared) for _ in range(3))
    assert first is second is third and torch.equal(first, weights) and not inputs.held
    assert torch.equal(inputs.read(shared), weights) and inputs.read(shared) is not first
    assert torch.equal(inputs.read(file.refs["own"]), weights + 1)
    assert reads == ["shared", "shared", "shared", "own"]


def test_a_file_that_changes_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(5)}, path)
    file = WeightFile(path)
    save_file({"a": torch.ones(5)}, path)
    os.utime(path, ns=(1, 1))  # even if within the clock's resolution
    with pytest.raises(CheckpointError, match="was changed while being read; start again"):
        file.read(file.refs["a"])
    with pytest.raises(CheckpointError, match="was changed while being read; start again"):
        _ = file.sha256


@pytest.mark.parametrize(
    ("change", "message"),
    [("compressed", "its tensors are compressed"), ("big", "the highest byte first"), ("short", "a is damaged")],
)
def test_a_bin_file_whose_bytes_are_not_the_tensors_is_refused(change: str, message: str, tmp_path: Path) -> None:
    plain, path = tmp_path / "plain.bin", tmp_path / "adapter_model.bin"
    torch.save({"a": torch.arange(4000.0), "b": torch.zeros(3000)}, plain)
    compression = zipfile.ZIP_DEFLATED if change == "compressed" else zipfile.ZIP_STORED
    with zipfile.ZipFile(plain) as given, zipfile.ZipFile(path, "w") as changed:
        for name in given.namelist():
            data = given.read(name)
            if change == "big" and name.endswith("byteorder"):
                data = b"big"
            if change == "short" and name.endswith("data/0"):
                data = data[:1000]
            changed.writestr(name, data, compression)
    with pytest.raises(CheckpointError, match=message):
        WeightFile(path)


@pytest.mark.parametrize("blocks", ["whole blocks", "an odd end"])
def test_large_files_are_written_past_the_cache_and_hashed(blocks: str, folder: Path) -> None:
    header = len(_header([TensorSpec("a", torch.uint8, (DIRECT_BYTES,))]))
    size = DIRECT_BYTES + source.BLOCK_BYTES - (header if blocks == "whole blocks" else 12_345)
    path = write(folder, size)
    assert int(load_file(path)["a"].sum(dtype=torch.int64)) == sum(range(251)) * (size // 251) + sum(range(size % 251))
    assert path.stat().st_size % source.BLOCK_BYTES == 0 or blocks == "an odd end"


def write(folder: Path, size: int) -> Path:
    data = torch.arange(251, dtype=torch.uint8).repeat(size // 251 + 1)[:size]
    writer = WeightWriter(folder, "model", [TensorSpec("a", torch.uint8, (size,))])
    name = writer.add("a", data)
    writer.close()
    assert name and writer.sha256[name] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    return folder / name

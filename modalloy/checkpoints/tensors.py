"""Opening a folder of weights: every tensor's name, type, shape and place, from headers only; data is read on demand.

safetensors files are read with `pread`, so no mapped page counts as memory. `.bin` files are unpickled with torch's
weights-only loader, which runs no code from the file.
"""

import hashlib
import json
import os
import pickle
import struct
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modalloy.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
# what torch's weights-only unpickler is seen to raise on damaged bytes, beside UnpicklingError
DAMAGED_PICKLE = (RuntimeError, EOFError, ValueError, OSError, AssertionError, LookupError, TypeError, struct.error)


@dataclass(frozen=True)
class TensorRef:
    """One stored tensor: what it is and where its bytes are. `begin` is −1 in a `.bin`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    begin: int

    @property
    def n_bytes(self) -> int:
        """Size of the data."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


class WeightFile:
    """One `.safetensors` or `.bin` file; opening it reads the header only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(path):
            if not path.is_file():
                raise CheckpointError(f"{path}: no such file; download it again or correct the path")
            self.refs = self._bin_refs() if path.suffix in (".bin", ".pt", ".pth") else self._safetensors_refs()

    def read(self, ref: TensorRef) -> Tensor:
        """The tensor's data, a copy of its own."""
        if ref.begin < 0:
            return self._pickled[ref.name].clone()
        buffer = bytearray(ref.n_bytes)
        view, done = memoryview(buffer), 0
        with reading(self.path), self.path.open("rb", buffering=0) as file:
            while done < len(buffer):
                count = os.preadv(file.fileno(), [view[done:]], ref.begin + done)
                if not count:
                    raise CheckpointError(f"{self.path}: ends inside {ref.name}; the file was cut while being read")
                done += count
        if not buffer:
            return torch.empty(ref.shape, dtype=ref.dtype)
        return torch.frombuffer(buffer, dtype=ref.dtype).reshape(ref.shape)

    @cached_property
    def sha256(self) -> str:
        """Hash of the whole file."""
        with reading(self.path):
            return file_sha256(self.path)

    def _safetensors_refs(self) -> dict[str, TensorRef]:
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER_BYTES + 1
            if length > MAX_HEADER_BYTES or 8 + length > size:
                raise CheckpointError(
                    f"{self.path}: not a complete safetensors file ({size} bytes); download or copy it again"
                )
            try:
                header = json.loads(file.read(length))
                entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
                refs = {name: self._safetensors_ref(name, entry, 8 + length) for name, entry in entries.items()}
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise CheckpointError(
                    f"{self.path}: the safetensors header is damaged ({error}); download it again"
                ) from error
        expected = 8 + length
        for ref in sorted(refs.values(), key=lambda ref: (ref.begin, ref.n_bytes)):
            if ref.begin != expected:
                raise CheckpointError(
                    f"{self.path}: the safetensors header is damaged ({ref.name} overlaps another tensor or leaves a gap); "
                    "download it again"
                )
            expected += ref.n_bytes
        if expected != size:
            state = "truncated" if expected > size else "too long"
            raise CheckpointError(
                f"{self.path}: {state}: the header describes {expected} bytes, the file has {size}; download or copy it again"
            )
        return refs

    def _safetensors_ref(self, name: str, entry: dict[str, Any], data_start: int) -> TensorRef:
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(
                f"{self.path}: {name} is stored as {entry['dtype']}, which cannot be merged; convert it to bfloat16 or float32"
            )
        begin, end = entry["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (begin, end, *entry["shape"])):
            raise ValueError(f"shape or offsets of {name} are not whole numbers")
        ref = TensorRef(name, DTYPES[entry["dtype"]], tuple(entry["shape"]), self.path, data_start + begin)
        if end - begin != ref.n_bytes:
            raise ValueError(f"{name} is {ref.n_bytes} bytes by its shape, {end - begin} by its offsets")
        return ref

    @cached_property
    def _pickled(self) -> dict[str, Tensor]:
        try:
            with warnings.catch_warnings():  # an unusual pickle protocol is either read or refused below
                warnings.simplefilter("ignore")
                try:
                    loaded = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
                except (RuntimeError, ValueError) as error:
                    if "mmap" not in str(error):
                        raise
                    loaded = torch.load(self.path, map_location="cpu", weights_only=True)  # as torch < 1.6 wrote it
        except pickle.UnpicklingError as error:
            if ("Weights only load failed" in str(error) and "Unsupported" in str(error)) or "GLOBAL" in str(error):
                raise CheckpointError(
                    f"{self.path}: refused: it holds more than tensors and could run code when loaded; "
                    "ask its author for safetensors"
                ) from error
            raise CheckpointError(f"{self.path}: not a readable .bin file; download or copy it again") from error
        except DAMAGED_PICKLE as error:
            raise CheckpointError(f"{self.path}: not a readable .bin file; download or copy it again") from error
        if not isinstance(loaded, dict) or not all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in loaded.items()
        ):
            raise CheckpointError(f"{self.path}: is not a dictionary of tensors; give the file that holds the weights")
        for name, tensor in loaded.items():
            if tensor.dtype not in CODES or tensor.layout is not torch.strided:
                raise CheckpointError(
                    f"{self.path}: {name} is a {tensor.layout} tensor of {tensor.dtype}, which cannot be merged; "
                    "convert it to dense bfloat16 or float32"
                )
        return loaded

    def _bin_refs(self) -> dict[str, TensorRef]:
        return {
            name: TensorRef(name, tensor.dtype, tuple(tensor.shape), self.path, -1)
            for name, tensor in self._pickled.items()
        }


class Checkpoint:
    """The tensors of a folder: one file, or the shards that its index names; and those of further files beside them."""

    def __init__(self, folder: Path, stems: Sequence[str], extra: Sequence[str] = ()) -> None:
        """Open `folder`, looking for `STEM.safetensors`, `STEM.safetensors.index.json`, `STEM.bin`, … in that order.

        The files named by `extra` are opened too where they exist. No tensor may be in two files, and shards must hold
        exactly what their index places in them.
        """
        self.folder = folder
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder; correct the path in the recipe")
        paths, index = self._main_paths(stems)
        self.files = [WeightFile(path) for path in (*paths, *(folder / name for name in present(folder, extra)))]
        self.refs: dict[str, TensorRef] = {}
        for file in self.files:
            for name, ref in file.refs.items():
                if name in self.refs:
                    raise CheckpointError(
                        f"{file.path}: {name} is also in {self.refs[name].file.name}; keep one of them"
                    )
                self.refs[name] = ref
        self._by_path = {file.path: file for file in self.files}
        if index is not None:
            self._check_index(index, paths)

    def read(self, ref: TensorRef) -> Tensor:
        """The data of one of this checkpoint's tensors."""
        return self._by_path[ref.file].read(ref)

    def header_sha256(self) -> str:
        """Hash of every tensor's name, type and shape: what is known of files whose data was not read."""
        rows = [f"{ref.name} {CODES.get(ref.dtype, ref.dtype)} {ref.shape}" for ref in self.refs.values()]
        return hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest()

    def _main_paths(self, stems: Sequence[str]) -> tuple[list[Path], dict[str, str] | None]:
        """The weight files, and the index (tensor name → file name) if they are shards."""
        for suffix in ("safetensors", "bin"):
            for stem in stems:
                single, index = self.folder / f"{stem}.{suffix}", self.folder / f"{stem}.{suffix}.index.json"
                if single.is_file():
                    return [single], None
                if index.is_file():
                    weight_map = read_json(index).get("weight_map")
                    if not isinstance(weight_map, dict) or not weight_map:
                        raise CheckpointError(f"{index}: has no weight_map of file names; download the file again")
                    for name in weight_map.values():
                        self._check_shard(name, index)
                    return [self.folder / name for name in sorted(set(weight_map.values()))], weight_map
        tried = ", ".join(f"{stem}.safetensors / .bin" for stem in stems)
        raise CheckpointError(f"{self.folder}: holds no weights (looked for {tried}); correct the path in the recipe")

    def _check_shard(self, name: Any, index: Path) -> None:
        if not isinstance(name, str):
            raise CheckpointError(f"{index}: has no weight_map of file names; download the file again")
        if name in ("", "..") or Path(name).name != name:
            raise CheckpointError(
                f"{index}: names the shard '{name}', which is no file of this folder; correct the index"
            )
        if not (self.folder / name).is_file():
            raise CheckpointError(
                f"{self.folder / name}: listed in {index.name} but missing; download the folder again"
            )

    def _check_index(self, index: dict[str, str], shards: list[Path]) -> None:
        """A folder that mixes the shards of two versions shows in an index that disagrees with what they hold."""
        if missing := sorted(index.keys() - self.refs.keys()):
            raise CheckpointError(
                f"{self.folder}: the index lists {missing[0]}, which no shard holds; download the folder again"
            )
        for name, ref in self.refs.items():
            if ref.file in shards and index.get(name) != ref.file.name:
                place = f"places in {index[name]}" if name in index else "does not list"
                raise CheckpointError(f"{ref.file}: holds {name}, which the index {place}; download the folder again")


def present(folder: Path, names: Iterable[str]) -> list[str]:
    """Those of the named files that the folder has."""
    return [name for name in names if (folder / name).is_file()]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a CheckpointError that names the file."""
    try:
        with reading(path):
            content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); download the file again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object; download the file again")
    return content


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an input that is missing or cannot be read into one CheckpointError line that names `path`."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; download the folder again") from error
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"{path}: cannot be read ({reason}); check its permissions and the disk") from error


def file_sha256(path: Path) -> str:
    """Hash of a whole file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

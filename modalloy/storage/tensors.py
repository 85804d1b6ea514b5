"""Opening a folder of weights: every tensor's name, type, shape and place, from headers only; data is read on demand.

Data is read with `pread`, so no mapped page counts as memory: what the page cache holds comes from there, the rest past
it, straight from the disk. `.bin` files are read by `pickled.py`, which runs no code from the file.
"""

import hashlib
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from modalloy.errors import CheckpointError, shown
from modalloy.linalg import all_finite
from modalloy.storage.folder import MAX_TEXT_BYTES, is_there, open_file, parse_json, present, read_json, reading
from modalloy.storage.pickled import ENDINGS, OtherTensor, PickledFile, StoredTensor, checked_count
from modalloy.storage.source import BLOCK_BYTES, PAGE_BYTES, Later, Source

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
    "F8_E4M3": torch.float8_e4m3fn,  # codes, which are numbers with their scales only (see `scaled.py`)
    "F8_E5M2": torch.float8_e5m2,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)  # codes, which .bin files of today have no scales beside
ALIGNED_BYTES = 16 * PAGE_BYTES  # of a tensor that is read by whole pages
MAX_NAME = 1000  # characters of a tensor's name; several patterns take time that is quadratic in it


@dataclass(frozen=True)
class TensorRef:
    """One stored tensor: what it is and where its bytes are; `begin` is −1 where they are not in one piece."""

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

    @property
    def sources(self) -> "tuple[TensorRef, ...]":
        """The stored tensors that reading it reads, as far as it is made of rows of them."""
        return (self,)

    def one(self, index: int) -> "TensorRef":
        """One of the tensors along its first dimension: of matrices that are stored as one tensor, of their scales.

        Raises:
            CheckpointError: the tensor is not in one piece.
        """
        if self.begin < 0:
            raise CheckpointError(
                f"{self.file}: {self.name} holds {self.shape[0]} matrices, but not in one piece; save the model as safetensors"
            )
        return replace(self, shape=self.shape[1:], begin=self.begin + index * self.n_bytes // self.shape[0])


class ComposedRef(TensorRef):
    """A tensor that is made of stored ones."""

    @property
    def sources(self) -> tuple[TensorRef, ...]:
        return ()

    def composed(self, read: Callable[[TensorRef], Tensor], buffer: Tensor | None = None) -> Tensor:
        """Its data, from what `read` gives of the stored ones."""
        raise NotImplementedError


def _source(path: Path) -> Source:
    """Where the file's bytes come from: the file, or the store that a header stands for."""
    from modalloy.storage.remote import record_of

    remote = record_of(path)
    if remote is None:
        return Source(path)
    from modalloy.storage.ranges import RemoteSource

    return RemoteSource(path, remote)


def room_for(n_bytes: int) -> int:
    """The size of a buffer into which so many bytes of a file can be read without a copy, with the pages that they share."""
    return n_bytes + 3 * PAGE_BYTES if n_bytes >= ALIGNED_BYTES else n_bytes


class WeightFile:
    """One `.safetensors` or `.bin` file; opening it reads the header only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(path):
            if not path.exists():
                raise CheckpointError(f"{path}: no such file; download it again or correct the path")
            with open_file(path):  # a pipe, device or folder is refused
                self._source = _source(path)
            self.refs = self._bin_refs() if path.suffix in ENDINGS else self._safetensors_refs()

    def read(self, ref: TensorRef, buffer: Tensor | None = None, later: Later | None = None) -> Tensor:
        """The tensor's data, in a new tensor or in `buffer` (uint8, at least `ref.n_bytes` long); hashed `later`, or now."""
        if ref.begin < 0:
            return self._pickled.tensor(self._pickled.content[ref.name]).clone(memory_format=torch.contiguous_format)
        if buffer is None:
            buffer = torch.empty(room_for(ref.n_bytes), dtype=torch.uint8)
        begin, end, at = ref.begin, ref.begin + ref.n_bytes, 0
        if len(buffer) >= room_for(ref.n_bytes) > ref.n_bytes and begin % ref.dtype.itemsize == 0:  # whole pages
            align = self._source.align
            begin, end, at = (
                begin - begin % align,
                min(-(-end // align) * align, self.n_bytes),
                -buffer.data_ptr() % align,
            )
        with reading(self.path):
            put_off = None if later is None else lambda call: later(partial(self._named, call))
            self._source.read_into(buffer[at : at + end - begin].numpy().data, begin, ref.name, put_off)
        data = buffer[at + ref.begin - begin :][: ref.n_bytes]
        return data.view(ref.dtype).reshape(ref.shape)

    def _named(self, call: Callable[[], object]) -> None:
        with reading(self.path):
            call()

    def hash_reads(self) -> None:
        """From now on, hash what is read in the file's order, so that `sha256` need not read it again."""
        self._source.hashes_reads = True

    @property
    def sha256(self) -> str:
        """Hash of the whole file."""
        with reading(self.path):
            return self._source.sha256()

    @property
    def n_bytes(self) -> int:
        """Size of the file."""
        return self._source.size

    @property
    def stamp(self) -> list[int]:
        """What every change of the file changes (see `stamp_of`)."""
        return self._source.stamp

    def keep(self, ref: TensorRef) -> None:
        """The tensor will be read again once the file was read: one of a store is then asked for once."""
        if ref.begin >= 0:
            self._source.keep(ref.begin, ref.begin + ref.n_bytes)

    def forget(self) -> None:
        """Nothing of it will be read again."""
        self._source.forget()

    def copy_to(self, write: Callable[[memoryview], object]) -> None:
        """Give all its bytes to `write`, in order."""
        block = memoryview(bytearray(min(BLOCK_BYTES, max(self.n_bytes, 1))))
        for begin in range(0, self.n_bytes, len(block)):
            part = block[: self.n_bytes - begin]
            with reading(self.path):
                self._source.read_into(part, begin, "it")
            write(part)

    def trust(self, sha256: str) -> None:
        """Take this for the file's hash: it was taken when the file had the same stamp."""
        self._source.known = sha256

    def _safetensors_refs(self) -> dict[str, TensorRef]:
        size = self._source.size
        with open_file(self.path) as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_TEXT_BYTES + 1
            if length > MAX_TEXT_BYTES or 8 + length > size:
                raise CheckpointError(
                    f"{self.path}: not a complete safetensors file ({size} bytes); download or copy it again"
                )
            text = file.read(length)
        try:
            header = parse_json(text)
            del text
            if not isinstance(header, dict):
                raise ValueError("is no JSON object")
            header.pop("__metadata__", None)
            refs = {name: self._safetensors_ref(name, entry, 8 + length) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError) as error:
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
        return dict(sorted(refs.items(), key=lambda item: item[1].begin))  # so that reading in order is sequential

    def _safetensors_ref(self, name: str, entry: dict[str, Any], data_start: int) -> TensorRef:
        self._check_name(name)
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(
                f"{self.path}: {name} is stored as {shown(entry['dtype'])[1:-1]}, which cannot be merged; "
                "convert it to bfloat16 or float32"
            )
        begin, end = entry["data_offsets"]
        shape = entry["shape"]
        if type(shape) is not list or not all(type(size) is int and size >= 0 for size in (begin, end, *shape)):
            raise ValueError(f"shape or offsets of {name} are not whole numbers")
        checked_count(shape)
        ref = TensorRef(name, DTYPES[entry["dtype"]], tuple(shape), self.path, data_start + begin)
        if end - begin != ref.n_bytes:
            raise ValueError(f"{name} is {ref.n_bytes} bytes by its shape, {end - begin} by its offsets")
        return ref

    def _bin_refs(self) -> dict[str, TensorRef]:
        content = self._pickled.content
        if not isinstance(content, dict) or not all(
            isinstance(name, str) and isinstance(value, (StoredTensor, OtherTensor)) for name, value in content.items()
        ):
            raise CheckpointError(f"{self.path}: is not a dictionary of tensors; give the file that holds the weights")
        return {name: self._bin_ref(name, tensor) for name, tensor in content.items()}

    def _bin_ref(self, name: str, tensor: StoredTensor | OtherTensor) -> TensorRef:
        kind = tensor.kind if isinstance(tensor, OtherTensor) else "torch.strided"
        if isinstance(tensor, OtherTensor) or tensor.storage.dtype not in CODES or tensor.storage.dtype in EIGHT_BITS:
            of = "" if isinstance(tensor, OtherTensor) else f" of {tensor.storage.dtype}"
            raise CheckpointError(
                f"{self.path}: {shown(name)[1:-1]} is a {kind} tensor{of}, which cannot be merged; "
                "convert it to dense bfloat16 or float32"
            )
        self._check_name(name)
        begin = self._pickled.begin(tensor) if tensor.in_one_piece else -1
        return TensorRef(name, tensor.storage.dtype, tensor.shape, self.path, begin)

    def _check_name(self, name: str) -> None:
        if not name or len(name) > MAX_NAME or not name.isprintable():
            raise CheckpointError(
                f"{self.path}: {shown(name)} is no name of a tensor (1 to {MAX_NAME} printable characters); "
                "download the file again"
            )

    @cached_property
    def _pickled(self) -> PickledFile:
        return PickledFile(self.path)


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
        self.codes: dict[str, TensorRef] = {}  # the same as they are stored, of a model of 8-bit codes and scales
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
        if any(ref.dtype.itemsize == 1 and ref.dtype.is_floating_point for ref in self.refs.values()):
            from modalloy.storage.scaled import with_scales

            scheme = (
                read_json(folder / "config.json").get("quantization_config")
                if is_there(folder / "config.json")
                else None
            )
            self.codes, self.refs = self.refs, with_scales(self.refs, scheme)
        self._stored = self.refs

    def replaced(self, refs: Mapping[str, TensorRef]) -> "Checkpoint":
        """The same checkpoint with some tensors made of others'; its headers stay what they are."""
        found = copy(self)
        found.refs = {**self.refs, **refs}
        return found

    def read(self, ref: TensorRef, buffer: Tensor | None = None) -> Tensor:
        """The data of one of this checkpoint's tensors, in a new tensor or in `buffer` (uint8)."""
        if isinstance(ref, ComposedRef):
            return ref.composed(self.read, buffer)
        return self._by_path[ref.file].read(ref, buffer)

    def owns(self, ref: TensorRef) -> bool:
        """Whether the tensor is in one of this checkpoint's files."""
        return ref.file in self._by_path

    def header_sha256(self) -> str:
        """Hash of every tensor's name, type and shape: what is known of files whose data was not read."""
        rows = [f"{ref.name} {CODES.get(ref.dtype, ref.dtype)} {ref.shape}" for ref in self._stored.values()]
        return hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest()

    def _main_paths(self, stems: Sequence[str]) -> tuple[list[Path], dict[str, str] | None]:
        """The weight files, and the index (tensor name → file name) if they are shards."""
        for suffix in ("safetensors", "bin"):
            for stem in stems:
                single, index = self.folder / f"{stem}.{suffix}", self.folder / f"{stem}.{suffix}.index.json"
                if is_there(single):
                    return [single], None
                if is_there(index):
                    weight_map = read_json(index).get("weight_map")
                    if not isinstance(weight_map, dict) or not weight_map:
                        raise CheckpointError(f"{index}: has no weight_map of file names; download the file again")
                    shards = {name: self._shard(name, index) for name in _texts(weight_map.values(), index)}
                    weight_map = {tensor: shards[name] for tensor, name in weight_map.items()}
                    return [self.folder / name for name in sorted(set(shards.values()))], weight_map
        tried = ", ".join(f"{stem}.safetensors / .bin" for stem in stems)
        raise CheckpointError(f"{self.folder}: holds no weights (looked for {tried}); correct the path in the recipe")

    def _shard(self, name: str, index: Path) -> str:
        """The name of a shard's file, which must be one of this folder."""
        plain = PurePosixPath(name).name  # "./shard" is a path of the folder too
        if PurePosixPath(name) != PurePosixPath(plain) or plain in ("", "..") or not plain.isprintable():
            raise CheckpointError(
                f"{index}: names the shard {shown(name)}, which is no file of this folder; correct the index"
            )
        if not is_there(self.folder / plain):
            raise CheckpointError(
                f"{self.folder / plain}: listed in {index.name} but missing; download the folder again"
            )
        return plain

    def _check_index(self, index: dict[str, str], shards: list[Path]) -> None:
        """A folder that mixes the shards of two versions shows in an index that disagrees with what they hold."""
        if missing := sorted(index.keys() - self.refs.keys()):
            raise CheckpointError(
                f"{self.folder}: the index lists {shown(missing[0])[1:-1]}, which no shard holds; download the folder again"
            )
        for name, ref in self.refs.items():
            if ref.file not in shards or index.get(name) == ref.file.name:
                continue
            if name in index:
                raise CheckpointError(
                    f"{ref.file}: holds {name}, which the index places in {index[name]}; download the folder again: index "
                    "and shards are of two versions"
                )
            raise CheckpointError(
                f"{ref.file}: holds {name}, which the index does not list; download the folder again, or add "
                f'"{name}": "{ref.file.name}" to its weight_map if the tensor belongs to the model'
            )


def _texts(values: Iterable[Any], index: Path) -> set[str]:
    """The distinct names of shards, all of which must be texts."""
    found = list(values)
    if not all(isinstance(value, str) for value in found):
        raise CheckpointError(f"{index}: has no weight_map of file names; download the file again")
    return set(found)


def checked(tensor: Tensor, ref: TensorRef, owner: str) -> Tensor:
    """The tensor, unless it holds NaN or infinity."""
    if not all_finite(tensor):
        raise CheckpointError(
            f"{owner}: {ref.name} holds NaN or infinite values ({ref.file}); "
            "the file is damaged or its training diverged: download it again"
        )
    return tensor

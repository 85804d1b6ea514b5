"""`.bin`, `.pt`, `.pth`: what `torch.save` writes, read by a small machine that builds tables, numbers and places of tensors.

None of the file's objects is made and none of its functions called, so the file decides about nothing but values. The zip
that torch writes since 1.6 is read, and the row of pickles that it wrote before.
"""

import io
import mmap
import pickletools
import struct
import zipfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from modalloy.errors import CheckpointError, shown
from modalloy.storage.folder import MAX_DEPTH, open_file, reading, refuse_pickle
from modalloy.storage.small_reads import SmallReads

ENDINGS = (".bin", ".pt", ".pth")
MAX_PICKLE_BYTES = 32 << 20  # of what is no tensor's data; that of a large model takes less than 1 MiB
MAX_STEPS = 2_000_000  # of the machine; a tensor takes about 30
MAX_DIMS, MAX_ELEMENTS = 64, 2**62  # of a tensor
MAGIC = 0x1950A86A20F9469CFC6C  # starts what torch wrote before 1.6
# what damaged bytes are seen to raise in `pickletools`, `struct` and `zipfile`
DAMAGE = (
    ValueError,
    LookupError,
    TypeError,
    OverflowError,
    EOFError,
    struct.error,
    zipfile.BadZipFile,
    NotImplementedError,
)
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
    "UntypedStorage": torch.uint8,  # of `_rebuild_tensor_v3`
}
DTYPE_NAMES = {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
TABLE, REBUILD, PARAMETER = ("collections", "OrderedDict"), "_rebuild_tensor_v2", ("torch._utils", "_rebuild_parameter")
# functions that rebuild tensors of other kinds: called by none, named in the message
OTHERS = {("torch._utils", f"_rebuild_{kind}") for kind in ("sparse_tensor", "qtensor", "tensor_v3", "nested_tensor")}
LAYOUT, SIZE = ("torch.serialization", "_get_layout"), ("torch", "Size")
SIMPLE = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("NONE", "NEWTRUE", "NEWFALSE", "EMPTY_TUPLE"),
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
MARK = object()


@dataclass(frozen=True)
class Storage:
    """A stretch of the file: `count` values of one type under the name `key`."""

    dtype: torch.dtype
    key: str
    count: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file, as a view of its storage: steps and offset in values."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    steps: tuple[int, ...]

    @property
    def in_one_piece(self) -> bool:
        """Whether its values follow one another."""
        step = 1
        for size, own in zip(reversed(self.shape), reversed(self.steps), strict=True):
            if size not in (0, 1) and own != step:
                return not prod(self.shape)
            step *= size
        return True


@dataclass(frozen=True)
class OtherTensor:
    """A tensor that is not read: sparse, quantised, of a newer type."""

    kind: str


class Global(tuple[str, str]):
    """A name that the file takes from a module; it is compared, never looked up."""


class Opaque:
    """An object whose values nobody needs."""


class _MoreThanTensorsError(Exception):
    """The pickle asks for more than tensors."""


class PickledFile:
    """The content of one file: dictionaries, lists, numbers, texts and `StoredTensor`s.

    Raises:
        CheckpointError: the file is damaged, asks for anything else, or would take more memory than it has bytes.
    """

    def __init__(self, path: Path, opaque: Collection[tuple[str, str]] = ()) -> None:
        """Read all but the tensors' data; objects of the classes in `opaque` (module, name) are passed over."""
        refuse_pickle(path)
        self.path, self._opaque = path, opaque
        self._begins: dict[str, int] = {}
        self.content: Any = None
        try:
            with reading(path), open_file(path) as file:
                self._size = file.seek(0, io.SEEK_END)
                file.seek(0)
                self._read_zip(file) if file.read(4) == b"PK\3\4" else self._read_row(file)
        except _MoreThanTensorsError as error:
            raise CheckpointError(
                f"{path}: refused: it holds more than tensors and could run code when loaded; ask its author for safetensors"
            ) from error
        except (*DAMAGE, RecursionError) as error:
            raise CheckpointError(f"{path}: not a readable .bin file; download or copy it again") from error

    def begin(self, tensor: StoredTensor) -> int:
        """Where the file has the tensor's first value."""
        return self._begins[tensor.storage.key] + tensor.offset * tensor.storage.dtype.itemsize

    def tensor(self, tensor: StoredTensor) -> Tensor:
        """The tensor's data, mapped from the file; what is written to it does not reach the file."""
        storage, dtype = tensor.storage, tensor.storage.dtype
        if not prod(tensor.shape):
            return torch.empty(tensor.shape, dtype=dtype)
        n_bytes, begin = storage.count * dtype.itemsize, self._begins[storage.key]
        data = torch.frombuffer(self._map, dtype=torch.uint8, count=n_bytes, offset=begin)
        data = data.clone() if begin % dtype.itemsize else data
        return data.view(dtype).as_strided(tensor.shape, tensor.steps, tensor.offset)

    @cached_property
    def _map(self) -> mmap.mmap:
        with reading(self.path), open_file(self.path) as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def _read_zip(self, file: BinaryIO) -> None:
        with zipfile.ZipFile(SmallReads(file)) as archive:
            entries = archive.infolist()
        names = {entry.filename: entry for entry in entries}
        pickles = [name for name in names if name.endswith("/data.pkl")]
        if len(names) < len(entries) or len(pickles) != 1:
            raise ValueError("no archive of torch")
        folder = pickles[0].removesuffix("/data.pkl")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise self._odd("compressed")
        order = names.get(f"{folder}/byteorder")
        if order is not None and self._record(file, order, 16) == b"big":
            raise self._odd("stored with the highest byte first")
        self.content, storages = self._run(io.BytesIO(self._record(file, names[pickles[0]], MAX_PICKLE_BYTES)))
        for key, storage in storages.items():
            entry, n_bytes = names.get(f"{folder}/data/{key}"), storage.count * storage.dtype.itemsize
            if entry is None or entry.file_size != n_bytes:
                raise self._cut(key, n_bytes, 0 if entry is None else entry.file_size)
            self._place(key, self._begin(file, entry), n_bytes)

    def _read_row(self, file: BinaryIO) -> None:
        """As torch wrote it before 1.6: a magic number, a version, the machine's sizes, the content, and the storages."""
        place, parts = 0, []
        for _ in range(5):
            file.seek(place)
            window = io.BytesIO(file.read(MAX_PICKLE_BYTES))
            parts.append(self._run(window))
            place += window.tell()
            if parts[0][0] != MAGIC:
                raise ValueError("no file of torch")
        (self.content, storages), machine, keys = parts[3], parts[2][0], parts[4][0]
        if isinstance(machine, dict) and machine.get("little_endian") is False:
            raise self._odd("stored with the highest byte first")
        if not isinstance(keys, list) or sorted(keys) != sorted(storages):
            raise ValueError("other storages than the tensors name")
        for key in keys:
            n_bytes = storages[key].count * storages[key].dtype.itemsize
            file.seek(place)
            (count,) = struct.unpack("<q", file.read(8))
            if count != storages[key].count:
                raise self._cut(key, n_bytes, count * storages[key].dtype.itemsize)
            self._place(key, place + 8, n_bytes)
            place += 8 + n_bytes

    def _place(self, key: str, begin: int, n_bytes: int) -> None:
        if begin + n_bytes > self._size:
            raise self._cut(key, n_bytes, max(self._size - begin, 0))
        self._begins[key] = begin

    def _record(self, file: BinaryIO, entry: zipfile.ZipInfo, limit: int) -> bytes:
        if entry.file_size > limit:
            raise CheckpointError(
                f"{self.path}: its record {shown(entry.filename)} has {entry.file_size:,} bytes, at most {limit:,} are read; "
                "ask its author for safetensors"
            )
        file.seek(self._begin(file, entry))
        return file.read(entry.file_size)

    def _begin(self, file: BinaryIO, entry: zipfile.ZipInfo) -> int:
        """Where a record's data begins: after its own header, whose length only that header says."""
        file.seek(entry.header_offset)
        header = file.read(30)
        if header[:4] != b"PK\3\4":
            raise ValueError("no record where the list places it")
        return int(entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:])))

    def _odd(self, odd: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: its tensors are {odd}, which is not read; save it again with torch.save")

    def _cut(self, key: str, wanted: int, found: int) -> CheckpointError:
        named = self.content if isinstance(self.content, dict) else {}
        names = (n for n, tensor in named.items() if isinstance(tensor, StoredTensor) and tensor.storage.key == key)
        name = shown(next(names, f"storage {key}")).strip("'")
        return CheckpointError(
            f"{self.path}: {name} is damaged ({wanted} bytes by its header, {found} stored); download it again"
        )

    def _run(self, file: BinaryIO) -> tuple[Any, dict[str, Storage]]:
        """What one pickle describes, and the storages that it names."""
        stack: list[Any] = []
        memo: dict[int, Any] = {}
        storages: dict[str, Storage] = {}
        argument: Any
        for step, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            name = opcode.name
            if step > MAX_STEPS:
                raise CheckpointError(
                    f"{self.path}: its pickle has more than {MAX_STEPS:,} steps; ask its author for safetensors"
                )
            if name in SIMPLE:
                stack.append(CONSTANTS.get(name, argument))
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name == "MARK":
                stack.append(MARK)
            elif name in ("EMPTY_DICT", "EMPTY_LIST"):
                stack.append({} if name == "EMPTY_DICT" else [])
            elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
                stack.append(_popped(stack, int(name[-1])))
            elif name == "TUPLE":
                stack.append(tuple(_marked(stack)))
            elif name in ("APPEND", "APPENDS"):
                items = _marked(stack) if name == "APPENDS" else list(_popped(stack, 1))
                _is(stack[-1], list).extend(items)
            elif name in ("SETITEM", "SETITEMS"):
                items = _marked(stack) if name == "SETITEMS" else list(_popped(stack, 2))
                for key, value in zip(items[::2], items[1::2], strict=True):
                    _is(stack[-1], dict)[_is(key, (str, int))] = value
            elif name in ("GLOBAL", "STACK_GLOBAL"):
                found = argument.split(" ", 1) if name == "GLOBAL" else _popped(stack, 2)
                stack.append(self._global(*found))
            elif name == "BINPERSID":
                storage = _storage(stack.pop())
                if storages.setdefault(storage.key, storage) != storage:
                    raise ValueError("two storages of one name")
                stack.append(storage)
            elif name in ("REDUCE", "NEWOBJ"):
                function, arguments = _popped(stack, 2)
                stack.append(self._called(_is(function, Global), _is(arguments, tuple)))
            elif name == "BUILD":
                target, _ = _popped(
                    stack, 2
                )  # attributes of a dictionary (a module's versions), or of what is passed over
                _is(target, (dict, Opaque))
                stack.append(target)
            elif name == "STOP":
                return stack.pop(), storages
            elif name not in ("PROTO", "FRAME"):
                raise _MoreThanTensorsError(name)
        raise ValueError("ends without an end")

    def _global(self, module: str, name: str) -> Global:
        found = Global((module, name))
        known = {TABLE, PARAMETER, ("torch._utils", REBUILD), LAYOUT, SIZE, *OTHERS, *self._opaque}
        of_torch = module in ("torch", "torch.storage") and name in STORAGES
        if found not in known and not of_torch and not (module == "torch" and name in DTYPE_NAMES):
            raise _MoreThanTensorsError(shown(f"{module}.{name}"))
        return found

    def _called(self, function: Global, arguments: tuple[Any, ...]) -> Any:
        if function == TABLE:
            if arguments:
                raise ValueError("a table with arguments")
            return {}
        if function == PARAMETER:
            return _is(arguments[0], (StoredTensor, OtherTensor))
        if function in (LAYOUT, SIZE):
            return _is(arguments[0], str if function == LAYOUT else tuple)
        if function in OTHERS:
            layout = arguments[0] if function[1] == "_rebuild_sparse_tensor" else function[1].removeprefix("_rebuild_")
            return OtherTensor(shown(_is(layout, str))[1:-1])
        if function in self._opaque:
            return Opaque()
        if function[1] != REBUILD:
            raise _MoreThanTensorsError(function[1])
        return self._rebuilt(*arguments)

    def _rebuilt(
        self,
        storage: Any,
        offset: Any,
        shape: Any,
        steps: Any,
        _grad: Any = None,
        _hooks: Any = None,
        state: Any = None,
    ) -> StoredTensor | OtherTensor:
        _is(storage, Storage)
        for number in (offset, *_is(shape, tuple), *_is(steps, tuple)):
            if type(number) is not int or not 0 <= number < MAX_ELEMENTS:
                raise ValueError("no size of a tensor")
        if state:  # marks of a negated or conjugated view, whose values are others than those stored
            return OtherTensor("negated or conjugated")
        count = checked_count(shape)
        last = offset + sum((size - 1) * step for size, step in zip(shape, steps, strict=True)) if count else offset - 1
        if last >= storage.count:
            raise ValueError("a tensor that is larger than its storage")
        if count > storage.count:
            raise CheckpointError(
                f"{self.path}: holds a tensor of {count:,} values that repeats {storage.count:,} stored ones (an expanded view); "
                "save it again after .contiguous()"
            )
        return StoredTensor(storage, offset, shape, steps)


def checked_count(shape: Sequence[int]) -> int:
    """Number of entries of a tensor of this shape; a ValueError if torch has none of it."""
    if len(shape) > MAX_DIMS or prod(size for size in shape if size) >= MAX_ELEMENTS:
        raise ValueError(f"no tensor has the shape {shown(shape)}")
    return prod(shape)


def unpickle(path: Path, opaque: Collection[tuple[str, str]] = ()) -> Any:
    """What `torch.save` wrote to the file, tensors mapped from it and tuples as lists; no code of the file is run."""
    file = PickledFile(path, opaque)
    done: dict[int, Any] = {}

    def loaded(part: Any, above: tuple[int, ...]) -> Any:
        if isinstance(part, OtherTensor):
            raise CheckpointError(f"{path}: holds a {part.kind} tensor, which is not read; save dense ones")
        if isinstance(part, StoredTensor):
            return file.tensor(part)
        if not isinstance(part, (dict, list, tuple)):
            return part
        if len(above) > MAX_DEPTH or id(part) in above:
            raise CheckpointError(f"{path}: is nested more than {MAX_DEPTH} deep; ask its author for safetensors")
        if id(part) not in done:
            items = part.items() if isinstance(part, dict) else enumerate(part)
            made = {key: loaded(value, (*above, id(part))) for key, value in items}
            done[id(part)] = made if isinstance(part, dict) else list(made.values())
        return done[id(part)]

    return loaded(file.content, ())


def _storage(given: Any) -> Storage:
    """A storage from the five values by which torch names one, or six with the views of torch < 0.4, which is not read."""
    kind, of, key, _, count, *views = _is(given, tuple)
    if kind != "storage" or not isinstance(of, Global) or of[1] not in STORAGES or any(views):
        raise ValueError("no storage")
    if not isinstance(key, str) or type(count) is not int or not 0 <= count < MAX_ELEMENTS:
        raise ValueError("no storage")
    return Storage(STORAGES[of[1]], key, count)


def _popped(stack: list[Any], n: int) -> tuple[Any, ...]:
    if len(stack) < n:
        raise ValueError("too little on the stack")
    found = tuple(stack[-n:])
    del stack[-n:]
    return found


def _marked(stack: list[Any]) -> list[Any]:
    """What lies above the last mark, which is taken off with it."""
    items: list[Any] = []
    while (item := stack.pop()) is not MARK:
        items.append(item)
    return items[::-1]


def _is(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError("a value where another kind is due")
    return value

"""Tensors made of rows of stored ones: what a mapped tensor is read from, and how."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modalloy.errors import CheckpointError
from modalloy.storage.tensors import ComposedRef, TensorRef

Rows = tuple[tuple[int, int], ...]  # begin and end of stretches of rows, in order

ROWS_AT_ONCE = 512  # so that the copy stays in the cache


@dataclass(frozen=True)
class MappedRef(ComposedRef):
    """A tensor of the target's shape made of rows of stored ones: (source, its rows, the rows that they become).

    With `keeps`, some of these rows are the target's own.
    """

    parts: tuple[tuple[TensorRef, Rows, Rows], ...] = ()
    keeps: bool = False

    @property
    def sources(self) -> tuple[TensorRef, ...]:
        return tuple(dict.fromkeys(one for source, _, _ in self.parts for one in source.sources))

    @property
    def largest_bytes(self) -> int:
        """Size of the largest source, which is read whole."""
        return max(source.n_bytes for source, _, _ in self.parts)

    def composed(self, read: Callable[[TensorRef], Tensor], buffer: Tensor | None = None) -> Tensor:
        return assembled(self, read, buffer)


@dataclass(frozen=True)
class AveragedRef(MappedRef):
    """A mapped tensor some of whose rows are means of stored rows, taken in float64.

    `averaged` are these rows; `means` has (source, its rows, the places in `averaged` that they count for).
    """

    averaged: Rows = ()
    means: tuple[tuple[TensorRef, Rows, Rows], ...] = ()

    @property
    def largest_bytes(self) -> int:
        """Size of the largest source, and of the means in float64."""
        means = 8 * height_of(self.averaged) * math.prod(self.shape[1:])
        return means + max(source.n_bytes for source, _, _ in (*self.parts, *self.means))

    def composed(self, read: Callable[[TensorRef], Tensor], buffer: Tensor | None = None) -> Tensor:
        out = assembled(self, read, buffer)
        if not self.averaged:
            return out
        total = torch.zeros(height_of(self.averaged), *self.shape[1:], dtype=torch.float64)
        count = torch.zeros(len(total), dtype=torch.float64)
        for source, rows, places in self.means:
            where = _index(places)
            total.index_add_(0, where, read(source).index_select(0, _index(rows)).to(torch.float64))
            count.index_add_(0, where, torch.ones(len(where), dtype=torch.float64))
        out.index_copy_(0, _index(self.averaged), total.div_(count.view(-1, *[1] * (total.dim() - 1))).to(self.dtype))
        return out


@dataclass(frozen=True)
class TransposedRef(ComposedRef):
    """A stored matrix with its rows and columns exchanged."""

    source: TensorRef | None = None

    def composed(self, read: Callable[[TensorRef], Tensor], buffer: Tensor | None = None) -> Tensor:
        assert self.source is not None
        return read(self.source).T.contiguous()


@dataclass(frozen=True)
class SpacedRef(ComposedRef):
    """Every so many columns of a stored matrix, from the first on."""

    source: TensorRef | None = None
    first: int = 0
    step: int = 1

    def composed(self, read: Callable[[TensorRef], Tensor], buffer: Tensor | None = None) -> Tensor:
        assert self.source is not None
        return read(self.source)[:, self.first :: self.step].contiguous()


@dataclass(frozen=True)
class JoinedRef(ComposedRef):
    """Matrices as one tensor (matrices, rows, columns), each of parts that stand one below another."""

    parts: tuple[tuple[TensorRef, ...], ...] = ()

    def composed(self, read: Callable[[TensorRef], Tensor], buffer: Tensor | None = None) -> Tensor:
        return torch.stack([torch.cat([read(part) for part in parts]) for parts in self.parts])

    def one(self, index: int) -> TensorRef:
        """One of the matrices."""
        parts, done = self.parts[index], 0
        if len(parts) == 1:
            return parts[0]
        placed = []
        for part in parts:
            height = part.shape[0]
            placed.append((part, ((0, height),), ((done, done + height),)))
            done += height
        return MappedRef(self.name, self.dtype, self.shape[1:], self.file, -1, tuple(placed))


def joined_matrices(name: str, parts: Sequence[Sequence[TensorRef]]) -> JoinedRef:
    """Matrices, each given by its parts, as one tensor.

    Raises:
        CheckpointError: they are not of one shape and type.
    """
    found = {tuple((part.shape, part.dtype) for part in one) for one in parts}
    first = parts[0][0]
    if len(found) != 1:
        raise CheckpointError(f"{first.file}: the parts of {name} differ in shape or type; download the model again")
    shape = (len(parts), sum(part.shape[0] for part in parts[0]), *first.shape[1:])
    return JoinedRef(name, first.dtype, shape, first.file, -1, tuple(map(tuple, parts)))


def sources_of(ref: TensorRef) -> list[str]:
    """The names of the stored tensors that a tensor of a model is made of."""
    return [part.name for parts in ref.parts for part in parts] if isinstance(ref, JoinedRef) else [ref.name]


def spaced_columns(ref: TensorRef, first: int, step: int) -> SpacedRef:
    """Columns first, first + step, … of a stored matrix whose width is a multiple of step."""
    rows, columns = ref.shape
    return SpacedRef(ref.name, ref.dtype, (rows, columns // step), ref.file, -1, ref, first, step)


def transposed(ref: TensorRef) -> TransposedRef:
    """A stored matrix with its rows and columns exchanged."""
    rows, columns = ref.shape
    return TransposedRef(ref.name, ref.dtype, (columns, rows), ref.file, -1, ref)


def assembled(ref: MappedRef, read: Callable[[TensorRef], Tensor], buffer: Tensor | None = None) -> Tensor:
    """The data of a mapped tensor, in a new tensor or in `buffer` (uint8)."""
    if buffer is None:
        buffer = torch.empty(ref.n_bytes, dtype=torch.uint8)
    out = buffer[: ref.n_bytes].view(ref.dtype).reshape(ref.shape)
    for source in dict.fromkeys(source for source, _, _ in ref.parts):
        data = read(source)
        for taken, rows in ((taken, rows) for one, taken, rows in ref.parts if one == source):
            if len(taken) == len(rows) == 1:
                out[slice(*rows[0])] = data[slice(*taken[0])]
                continue
            steps = zip(_index(taken).split(ROWS_AT_ONCE), _index(rows).split(ROWS_AT_ONCE), strict=True)
            for some, places in steps:
                out.index_copy_(0, places, data.index_select(0, some).to(ref.dtype))
    return out


def _index(rows: Rows) -> Tensor:
    """The number of every row, in order; a vocabulary can be cut into a stretch for each token."""
    begins, ends = torch.tensor(rows).T
    lengths = ends - begins
    first = begins - (lengths.cumsum(0) - lengths)  # what is added to a row's place among all
    return torch.arange(height_of(rows)) + first.repeat_interleave(lengths)


def height_of(rows: Rows) -> int:
    """How many rows the stretches hold."""
    return sum(end - begin for begin, end in rows)


def rows_of_tensor(name: str, ref: TensorRef, rows: Rows) -> TensorRef:
    """Some rows of a stored tensor as one of its own; the tensor itself where they are all of it."""
    if rows == ((0, floating(ref).shape[0]),):
        return ref
    height = height_of(rows)
    return MappedRef(name, ref.dtype, (height, *ref.shape[1:]), ref.file, -1, ((ref, rows, ((0, height),)),))


def first_rows(ref: TensorRef, count: int) -> TensorRef:
    """The first rows of a stored tensor as one of its own; the tensor itself where it has no others."""
    if ref.shape[0] == count:
        return ref
    if ref.begin < 0:
        return rows_of_tensor(ref.name, ref, ((0, count),))
    return replace(ref, shape=(count, *ref.shape[1:]))


def cut_rows(ref: TensorRef, rows: slice) -> TensorRef | None:
    """Consecutive rows of a tensor as one of its own, of which only these are read; None where its bytes do not allow that."""
    begin, end = rows.start, rows.stop
    if ref.begin >= 0:
        return stretch(ref, ((begin, end),))[0]
    if type(ref) is not MappedRef or not all(len(taken) == len(places) == 1 for _, taken, places in ref.parts):
        return None
    parts = []
    for source, ((taken, _),), ((first, last),) in ref.parts:
        low, high = max(begin, first), min(end, last)
        if low < high and source.begin < 0:  # it would be read whole for every few rows
            return None
        if low < high:
            less, within = stretch(source, ((taken + low - first, taken + high - first),))
            parts.append((less, within, ((low - begin, high - begin),)))
    return replace(ref, shape=(end - begin, *ref.shape[1:]), parts=tuple(parts))


def chosen_rows(name: str, ref: TensorRef, rows: Sequence[int]) -> MappedRef:
    """Single rows of a stored tensor, in order, as a tensor of its own; only these are read where it is in one piece."""
    parts: list[tuple[TensorRef, Rows, Rows]] = []
    done = 0
    for begin, end in runs(rows):
        source, taken = stretch(ref, ((begin, end),))
        parts.append((source, taken, ((done, done + end - begin),)))
        done += end - begin
    return MappedRef(name, ref.dtype, (done, *ref.shape[1:]), ref.file, -1, tuple(parts))


def runs(rows: Sequence[int]) -> Rows:
    """Numbers in order, as stretches in which they rise by one."""
    found: list[tuple[int, int]] = []
    for row in rows:
        if found and found[-1][1] == row:
            found[-1] = (found[-1][0], row + 1)
        else:
            found.append((row, row + 1))
    return tuple(found)


def stretch(ref: TensorRef, rows: Rows) -> tuple[TensorRef, Rows]:
    """As little of a stored tensor as holds these rows, and where they are in it: padding is a small part of a vocabulary."""
    if ref.begin < 0:  # not in one piece
        return ref, rows
    first, height = rows[0][0], rows[-1][1] - rows[0][0]
    begin = ref.begin + first * ref.n_bytes // ref.shape[0]
    less = replace(ref, shape=(height, *ref.shape[1:]), begin=begin)
    return less, tuple((begin - first, end - first) for begin, end in rows)


def floating(ref: TensorRef) -> TensorRef:
    """The tensor, if it is of a type that can be merged."""
    if not ref.dtype.is_floating_point:
        raise CheckpointError(
            f"{ref.file}: {ref.name} is stored as {ref.dtype}, which cannot be merged; convert it to bfloat16 or float32"
        )
    return ref

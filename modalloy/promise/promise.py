"""What one tensor of a result must be."""

import json
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from modalloy.methods import METHODS
from modalloy.specialists.stacked import StackedLora
from modalloy.storage.scaled import ScaledRef
from modalloy.storage.tensors import TensorRef
from modalloy.storage.views import TransposedRef, cut_rows

Kind = Literal["merged", "averaged", "kept", "carried"]
Rows = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Update:
    """What one model does to a tensor, times its weight: a tuned copy, or factors with ΔW = scale · B A; or nothing."""

    weight: float = 1.0
    tuned: TensorRef | None = None
    factors: tuple[TensorRef, TensorRef, float] | None = None  # A, B, scale
    stacked: StackedLora | None = None  # factors of all experts of a tensor

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """What is read of it."""
        return tuple(ref for ref in (self.tuned, *(self.factors or ())) if isinstance(ref, TensorRef))


@dataclass(frozen=True)
class Promise:
    """What one tensor of a result must be, or the two factors of one (`names`: A, then B).

    - merged: `start` plus the merge of `updates` by the method
    - averaged: `start` plus `factor` times the mean of `updates`
    - kept, carried: `start`, bit for bit in the type that is written
    """

    kind: Kind
    slot: str
    names: tuple[str, ...]
    start: TensorRef
    updates: tuple[Update, ...] = ()
    method: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)  # resolved
    fishers: tuple[TensorRef, ...] = ()
    factor: float = 1.0
    compress_rank: int | None = None
    rows: Rows = ()  # where it is in its tensor, if it is not all of it
    part: tuple[int, int] | None = None  # which of how many experts, where the factors of all are in two matrices
    interpolates: bool = False  # between two models of few bits

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """What is read to work it out; factors of factors need no start, unless the method works on the weights themselves."""
        whole = len(self.names) == 1 or any(update.tuned is not None for update in self.updates) or self.takes_base
        return (
            *((self.start,) if whole else ()),
            *(ref for update in self.updates for ref in update.refs),
            *self.fishers,
        )

    @property
    def takes_base(self) -> bool:
        """Whether its method receives the start beside the updates."""
        return self.kind == "merged" and METHODS[self.method].base(self.parameters)

    @property
    def n_bytes(self) -> int:
        """Size of what is read to work it out."""
        return sum(ref.n_bytes for ref in self.refs)

    @property
    def n_bytes_with_start(self) -> int:
        """The same, and the weight that is updated, whose size says what working it out takes, though factors need it not."""
        return sum(ref.n_bytes for ref in {self.start, *self.refs})

    @property
    def is_exact(self) -> bool:
        """Whether it is the start bit for bit: nothing is added."""
        zero = self.factor == 0 or not self.updates or all(update.weight == 0 for update in self.updates)
        return (
            self.kind in ("kept", "carried") or zero or 0 in (self.parameters.get(n) for n in ("scale", "alpha", "t"))
        )

    @property
    def group(self) -> str:
        """Merged weights of one group share what their method must know of the whole model."""
        return json.dumps([self.method, self.parameters | {"scale": None}], sort_keys=True)

    def cut(self, rows: slice) -> "Promise | None":
        """The promise of some rows of its weight, of which only these are read; None where the bytes do not allow that."""
        start = cut_rows(self.start, rows)
        tuned = [None if one.tuned is None else cut_rows(one.tuned, rows) for one in self.updates]
        if start is None or any(
            one.tuned is not None and ref is None for one, ref in zip(self.updates, tuned, strict=True)
        ):
            return None
        updates = tuple(replace(one, tuned=ref) for one, ref in zip(self.updates, tuned, strict=True))
        return replace(self, start=start, updates=updates)

    def stored(self, written: TensorRef) -> TensorRef:
        """Where it is stored: in a tensor of its own, or as one of the experts' codes and scales."""
        if isinstance(written, ScaledRef) and self.rows:
            (begin, end), *_ = self.rows
            return written.one(begin // (end - begin))
        return written

    def within(self, written: list[Tensor]) -> list[Tensor]:
        """The weight, or its two factors, in the written tensors, which may hold other experts' too."""
        if self.part is not None:
            (a, b), (index, count) = written, self.part
            rank = len(a) // count
            a, b = a[index * rank : (index + 1) * rank], b[:, index::count]
            return [a, b] if a.shape[1] == self.start.shape[1] else [b.T, a.T]
        if self.rows:
            flat = written[0].reshape(-1, written[0].shape[-1])  # of experts, one after another
            found = torch.cat([flat[begin:end] for begin, end in self.rows])
            return [found.T if isinstance(self.start, TransposedRef) else found]
        return written

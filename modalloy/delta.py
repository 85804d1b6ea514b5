"""What a merge merges: weight updates ΔW = W − W_0, kept low-rank wherever they were trained low-rank."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from modalloy.errors import MethodError
from modalloy.linalg import Basis, Spectrum, filled, frobenius, gram, holds, require_finite, symmetric_product
from modalloy.subspaces import approximate_range, top_subspaces

UNCANCELLED = 1e-9  # of the sum of magnitudes: a sum of as much is known to 1e-7 in float64


@dataclass(frozen=True, eq=False)
class LowRank:
    """ΔW = up @ down, with up (out, rank) and down (rank, in); alpha/r and every other scaling is already folded in.

    Sums and multiples stay exact and low-rank: `a + b` concatenates the factors, `2 * a` scales `up`.
    """

    up: Tensor  # (out, rank)
    down: Tensor  # (rank, in)

    def __post_init__(self) -> None:
        if self.up.ndim != 2 or self.down.ndim != 2 or self.up.shape[1] != self.down.shape[0]:
            raise MethodError(
                f"low-rank factors do not fit: up is {tuple(self.up.shape)}, down is {tuple(self.down.shape)}; "
                "up must be (out, rank) and down (rank, in)"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), the shape of the weight that this updates."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def rank(self) -> int:
        """Number of columns of `up`: an upper bound of the true rank."""
        return self.up.shape[1]

    def dense(self) -> Tensor:
        """The full matrix (out, in)."""
        return self.up @ self.down

    def to(self, dtype: torch.dtype) -> LowRank:
        """The same update with both factors in `dtype`."""
        return LowRank(self.up.to(dtype), self.down.to(dtype))

    @property
    def T(self) -> LowRank:  # noqa: N802 - as of a matrix
        """The transposed update (in, out)."""
        return LowRank(self.down.T, self.up.T)

    def __matmul__(self, other: Tensor) -> Tensor:
        return self.up @ (self.down @ other)

    def __add__(self, other: LowRank) -> LowRank:
        return LowRank(torch.cat([self.up, other.up], 1), torch.cat([self.down, other.down], 0))

    def __mul__(self, factor: float) -> LowRank:
        return LowRank(self.up * factor, self.down)

    __rmul__ = __mul__

    def __repr__(self) -> str:
        return (
            f"LowRank({self.shape[0]} × {self.shape[1]}, rank {self.rank}, {str(self.up.dtype).removeprefix('torch.')})"
        )


@dataclass(frozen=True, eq=False)
class Scaled:
    """scale · up @ down with factors in the type they are stored in; the scale is alpha/r, and a weight of the recipe's."""

    update: LowRank
    scale: float

    def to(self, dtype: torch.dtype) -> LowRank:
        """The update with the scale folded in, in `dtype`."""
        return self.scale * self.update.to(dtype)

    def applied(self) -> LowRank:
        """The same in the stored precision, float32 or wider: rounded as where the adapter is applied."""
        return self.to(torch.promote_types(self.update.up.dtype, torch.float32))

    @property
    def is_narrow(self) -> bool:
        """Whether float32 holds the factors."""
        return holds(torch.float32, self.update.up, self.update.down)


Delta = LowRank | Tensor


def factors_of(delta: LowRank | Scaled) -> LowRank:
    """The factors of an update, as they are stored if a scale is beside them."""
    return delta.update if isinstance(delta, Scaled) else delta


Value = TypeVar("Value")


class _Kept(threading.local):
    values: dict[Hashable, Any] | None = None  # what was worked out within `sharing`


_kept = _Kept()


@contextmanager
def sharing() -> Iterator[None]:
    """Within it, and in this thread, what is worked out of the same low-rank updates is worked out once: their cores, the
    subspaces that they share. Nothing else changes, not a bit."""
    _kept.values = {}
    try:
        yield
    finally:
        _kept.values = None


def once(key: Hashable, make: Callable[[], Value]) -> Value:
    """What `make` gives; within `sharing`, what it gave for the same key."""
    if _kept.values is None:
        return make()
    if key not in _kept.values:
        _kept.values[key] = make()
    return _kept.values[key]


def _once_of(name: str, deltas: Sequence[LowRank | Scaled], make: Callable[[], Value]) -> Value:
    """The same for what is made of updates, which are told by the memory of their factors: it is held as long."""
    factors = [factor for delta in deltas for factor in (factors_of(delta).up, factors_of(delta).down)]
    places = tuple((one.data_ptr(), one.device, one.dtype, one.shape, one.stride()) for one in factors)
    return once((name, places, *map(_scale, deltas)), lambda: (make(), deltas))[0]


def _scale(delta: LowRank | Scaled) -> float:
    return delta.scale if isinstance(delta, Scaled) else 1.0


Restore = Callable[["LowRank | Tensor", torch.dtype], "LowRank"]


def lift(deltas: Sequence[LowRank | Scaled]) -> tuple[list[LowRank], Restore]:
    """Cores C_i (p, q), as factors in float64, with D_i = Q_B C_i Q_Aᵀ, and the function that takes a merge of them back.

    Q_B and Q_A are orthonormal bases of the stacked up and down factors, so p, q ≤ Σ rank_i: a method that only
    rotates with its inputs gives exactly the same on the cores as on the full matrices. O((out + in) R²), R = Σ rank_i.
    """
    return _once_of("lift", deltas, lambda: _lift(deltas))


def _lift(deltas: Sequence[LowRank | Scaled]) -> tuple[list[LowRank], Restore]:
    updates = [factors_of(delta) for delta in deltas]
    rows, columns = Basis(*(update.up for update in updates)), Basis(*(update.down.T for update in updates))
    splits = [update.rank for update in updates]
    pairs = zip(rows.triangle.split(splits, 1), columns.triangle.split(splits, 1), map(_scale, deltas), strict=True)
    cores = [LowRank(left if scale == 1 else scale * left, right.T) for left, right, scale in pairs]
    for core in cores:
        require_finite(core.up)

    def restore(merged: LowRank | Tensor, dtype: torch.dtype) -> LowRank:
        if isinstance(merged, Tensor):
            merged = LowRank(merged, torch.eye(merged.shape[1], dtype=merged.dtype, device=merged.device))
        up, down = rows.times(merged.up, dtype), columns.times(merged.down.T, dtype).T
        return LowRank(up.contiguous(), down.contiguous())

    return cores, restore


def lift_left(deltas: list[LowRank]) -> tuple[list[Tensor], Restore]:
    """Matrices L_i (p, in) in float64 with D_i = Q_B L_i, and the function that takes a merge of them back.

    For methods that only rotate with their inputs on the left. O((out + in) R²), R = Σ rank_i; p ≤ R.
    """
    return _once_of("lift_left", deltas, lambda: _lift_left(deltas))


def _lift_left(deltas: list[LowRank]) -> tuple[list[Tensor], Restore]:
    rows = Basis(*(delta.up for delta in deltas))
    lefts = rows.triangle.split([delta.rank for delta in deltas], 1)
    for delta in deltas:
        require_finite(delta.down)
    cores = [left @ delta.down.to(torch.float64) for left, delta in zip(lefts, deltas, strict=True)]

    def restore(merged: LowRank | Tensor, dtype: torch.dtype) -> LowRank:
        if isinstance(merged, Tensor):
            merged = LowRank(torch.eye(merged.shape[0], dtype=merged.dtype, device=merged.device), merged)
        return LowRank(rows.times(merged.up, dtype).contiguous(), merged.down.to(dtype))

    return cores, restore


def total(deltas: Sequence[Delta]) -> Delta:
    """Σ D_i of updates that are all factors or all matrices; of matrices with room for one more, whatever their number."""
    first, *rest = deltas
    if isinstance(first, LowRank):
        factors = [delta for delta in deltas if isinstance(delta, LowRank)]
        return LowRank(torch.cat([one.up for one in factors], 1), torch.cat([one.down for one in factors], 0))
    summed = first.clone()
    for D in rest:
        assert isinstance(D, Tensor)
        summed += D
    return summed


def second_moment(deltas: Sequence[Delta]) -> Tensor:
    """Σ D_iᵀ D_i (in, in) in float64. O(Σ out · in²) for matrices; factors of rank r cost O(Σ r · in²)."""
    factored = [delta for delta in deltas if isinstance(delta, LowRank)]
    dense = gram(*(delta for delta in deltas if isinstance(delta, Tensor))) if len(factored) < len(deltas) else None
    if not factored:
        assert dense is not None
        return dense
    product = symmetric_product(map(_weighed, factored), factored[0].shape[1], factored[0].down.device)
    return product if dense is None else product + dense


def _weighed(delta: LowRank) -> tuple[Tensor, Tensor]:
    """A and BᵀB A of D = B A in float64, whose product is DᵀD, without the zero columns at their end: cores are of a triangle."""
    down = delta.down[:, : filled(delta.down)].to(torch.float64)
    return down, gram(delta.up[: filled(delta.up.T)]) @ down


def shared_subspaces(deltas: Sequence[Delta], rank: int) -> tuple[Tensor, Tensor]:
    """The `rank` leading eigenvectors U (out, k) of Σ D_i D_iᵀ and V (in, k) of Σ D_iᵀ D_i, at most as many as there are."""
    dense = [delta for delta in deltas if isinstance(delta, Tensor)]
    if len(dense) == len(deltas):
        return top_subspaces(dense, rank)
    transposed = [D.T for D in deltas]
    return _leading(transposed, rank), _leading(deltas, rank)


def _leading(deltas: Sequence[Delta], rank: int) -> Tensor:
    """The `rank` leading eigenvectors (in, rank) of Σ D_iᵀ D_i, some of which are factors."""

    def spectrum() -> Spectrum:
        return Spectrum(second_moment(deltas))

    factored = [delta for delta in deltas if isinstance(delta, LowRank)]
    return (_once_of("spectrum", factored, spectrum) if len(factored) == len(deltas) else spectrum()).top(rank)


def thin_svd(delta: Delta) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors U (out, r), values (r,) in descending order and V (in, r); factors are decomposed at their rank."""
    if isinstance(delta, Tensor):
        u, values, vh = torch.linalg.svd(delta, full_matrices=False)
        return u, values, vh.T
    left, right = Basis(delta.up), Basis(delta.down.T)
    u, values, vh = torch.linalg.svd(left.triangle @ right.triangle.T, full_matrices=False)
    return left.times(u, torch.float64), values, right.times(vh.T, torch.float64)


def norm(delta: Delta) -> float:
    """Frobenius norm; of factors without forming the matrix, O((out + in) r²)."""
    if isinstance(delta, LowRank):
        products = gram(delta.up) * gram(delta.down.T)  # ‖BA‖² = Σ (BᵀB) ∘ (AAᵀ), in which what cancels is lost
        squares, terms = float(products.sum()), float(products.abs().sum())
        if squares > UNCANCELLED * terms:
            return math.sqrt(squares)
        (core,), _ = lift([delta])
        return float(core.dense().norm())
    return frobenius(delta)


def compressed(delta: Delta, rank: int) -> tuple[LowRank, float]:
    """An approximation of `delta` of rank at most `rank`, and its relative Frobenius error.

    The best there is for factors and small matrices; close to it for large ones (`subspaces.approximate_range`).
    """
    if isinstance(delta, LowRank):
        (core,), restore = lift([delta])
        u, s, vh = torch.linalg.svd(core.dense(), full_matrices=False)
        cut = LowRank(u[:, :rank] * s[:rank], vh[:rank])
        return restore(cut, delta.up.dtype), float((s[rank:].norm() / s.norm()).nan_to_num(0))
    u = approximate_range(delta, rank)
    cut = LowRank(u.to(delta.dtype), u.T.to(delta.dtype) @ delta)
    size = frobenius(delta)
    return cut, frobenius(delta - cut.dense()) / size if size else 0.0

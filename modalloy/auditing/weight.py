"""One weight beside what it could be made of: its change, coefficients by least squares, and what rounding allows.

Everything is worked out in float64 by blocks of rows; what is held is the stored tensors and two blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modalloy.auditing.opened import Slot
from modalloy.errors import CheckpointError
from modalloy.linalg import all_finite, row_blocks
from modalloy.specialists.specialist import StoredLora
from modalloy.storage.scaled import ScaledRef
from modalloy.storage.tensors import TensorRef

ARITHMETIC = 8.0  # roundings of the written type that a tool may spend on an update before it is added
TWICE = 2.0  # a sum in the middle of two neighbours may be rounded to either
SINGULAR = 1e-10  # relative eigenvalue below which updates are one another's multiples
LARGEST = 1e30
WHOLE = 3.0  # roundings of the weight itself by a tool that multiplies the base too
FEW_DIGITS = 2.0**-13  # unit of rounding above which it biases a fit
NEWTON_STEPS, STEP, NEWTON_LEAST, NEWTON_ENDS = 8, 0.05, 1e-3, 1e-3
Expected = Callable[[slice], Tensor]
Read = Callable[[TensorRef], Tensor]


@dataclass(frozen=True)
class Fit:
    """Coefficients of the updates, by least squares, and their standard errors."""

    coefficients: dict[str, float]
    errors: dict[str, float]


@dataclass(frozen=True)
class Test:
    """How far a weight is from what is expected.

    `worst`: the largest deviation of an entry over what rounding allows. `outside`: share of the entries beyond that.
    `agree`: share of the entries that are the nearest value of the written type. `left`: Frobenius norm of the deviation
    over that of the change.
    """

    worst: float
    outside: float
    agree: float
    left: float

    @property
    def holds(self) -> bool:
        """Whether rounding alone explains the deviation."""
        return self.outside == 0

    @property
    def score(self) -> float:
        """What explanations are compared by: `agree`, less 1 where rounding does not explain the deviation."""
        return self.agree - (not self.holds)


class Weight:
    """A slot's tensors, read once."""

    def __init__(self, slot: Slot, read: Read, read_merged: Read) -> None:
        """Read them.

        Raises:
            CheckpointError: a tensor holds NaN or infinite values, or is no floating-point one.
        """
        self.slot, merged = slot, slot.merged
        for ref in (slot.base, *(one for one in slot.updates.values() if isinstance(one, TensorRef))):
            if not ref.dtype.is_floating_point and isinstance(merged, TensorRef) and slot.updates:
                raise CheckpointError(f"{ref.file}: {ref.name} is {ref.dtype}, no floating-point weight")
        self.written: Tensor | None = None
        self.factors: tuple[Tensor, Tensor] | None = None
        needs_base = isinstance(merged, TensorRef) or any(isinstance(one, TensorRef) for one in slot.updates.values())
        self.base = _rows(read(slot.base)) if needs_base else None
        self.dtype = slot.base.dtype
        if isinstance(merged, StoredLora):
            delta = merged.delta(read_merged).to(torch.float64)
            self.factors, self.dtype = (delta.up, delta.down), merged.b.dtype
        elif merged is not None:
            self.written, self.dtype = _rows(read_merged(merged)), merged.dtype
        self.coded = isinstance(merged, ScaledRef)
        if isinstance(merged, ScaledRef) and merged.codes is not None:
            self.dtype = merged.codes.dtype
        self.unit = max(torch.finfo(self.dtype).eps / 2, 2.0**-24) if self.dtype.is_floating_point else 0.0
        self.lora: dict[str, tuple[Tensor, Tensor, float]] = {}  # B, A and scale
        self.tuned: dict[str, Tensor] = {}
        self.terms: dict[str, Expected] = {label: self._term(label, one, read) for label, one in slot.updates.items()}
        rows, self.columns = _flat(slot.base.shape)
        self.n_rows = rows

    def _term(self, label: str, update: TensorRef | StoredLora, read: Read) -> Expected:
        """A source's update, by rows."""
        if isinstance(update, StoredLora):
            scale, up, down = update.scale, read(update.b).double(), read(update.a).double()
            self.lora[label] = up, down, scale
            return lambda rows: scale * (up[rows] @ down)
        tuned, base = _rows(read(update)), self.base
        assert base is not None
        self.tuned[label] = tuned
        return lambda rows: tuned[rows].double() - base[rows].double()

    def crossed(self, one: str, other: str) -> Expected:
        """B of one source times A of another, times the root of both their scales."""
        (up, _, scale), (_, down, second) = self.lora[one], self.lora[other]
        factor = abs(scale * second) ** 0.5
        return lambda rows: factor * (up[rows] @ down)

    @property
    def is_finite(self) -> bool:
        """Whether no merged entry is NaN or infinite."""
        return all(all_finite(one) for one in (self.written, *(self.factors or ())) if one is not None)

    def blocks(self) -> list[slice]:
        """Consecutive blocks of rows."""
        return row_blocks((self.n_rows, self.columns))

    def change(self, rows: slice) -> Tensor:
        """Merged less base."""
        if self.factors is not None:
            return self.factors[0][rows] @ self.factors[1]
        if self.written is None:
            return torch.zeros(len(range(*rows.indices(self.n_rows))), self.columns, dtype=torch.float64)
        assert self.base is not None
        return self.written[rows].double() - self.base[rows].double()

    def rounding(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """What writing each entry in a type, or each of two factors, may change."""
        info = torch.finfo(dtype)
        if self.factors is not None:
            up, down = self.factors
            return info.eps * up[rows].abs() @ down.abs()
        if self.written is None:
            return torch.zeros(1, self.columns, dtype=torch.float64)
        return self._rounding(self.written[rows].double().abs(), dtype)

    def _rounding(self, size: Tensor, dtype: torch.dtype) -> Tensor:
        """What writing numbers of a size in a type may change."""
        info = torch.finfo(dtype)
        least = info.smallest_normal * info.eps / 2
        if self.coded:  # by blocks that are scaled to the largest code
            least *= float(size.max()) / info.max if size.numel() else 0.0
        return size * (info.eps / 2) + least

    def is_base(self) -> bool:
        """Whether it is the base's bit for bit, in the type that is written."""
        if self.written is None or self.base is None:  # of an adapter
            return not any(bool(self.change(rows).any()) for rows in self.blocks())
        return torch.equal(self.written, self.base.to(self.written.dtype))

    def total(self, coefficients: Mapping[str, float]) -> Expected:
        """Σ wᵢ δᵢ over the sources that update it."""
        used = [(factor, self.terms[label]) for label, factor in coefficients.items() if label in self.terms]

        def expected(rows: slice) -> Tensor:
            found = torch.zeros(len(range(*rows.indices(self.n_rows))), self.columns, dtype=torch.float64)
            for factor, term in used:
                if factor:
                    found.add_(term(rows), alpha=factor)
            return found

        return expected

    def fit(self, terms: Mapping[str, Expected] | None = None, of: Expected | None = None) -> Fit | None:
        """The coefficients of the updates, or of other terms, that leave least; None if they are no independent ones.

        `of` is another change than the weight's, of which least squares are all. A written type of few digits swallows entries
        of a small update, which biases them; then the moments ⟨δᵢ, W − round(W₀ + Σ wⱼ δⱼ)⟩ are brought to 0 by Newton's method.
        """
        terms = self.terms if terms is None else terms
        n = len(terms)
        gram, right, square = torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64), 0.0
        for rows in self.blocks():
            change = (of or self.change)(rows).flatten()
            matrix = torch.stack([term(rows).flatten() for term in terms.values()])
            gram += matrix @ matrix.T
            right += matrix @ change
            square += float(change @ change)
        sizes = gram.diagonal().sqrt()
        if not n or not bool((sizes > 0).all()):
            return None
        scaled = gram / (sizes[:, None] * sizes)
        if float(torch.linalg.eigvalsh(scaled)[0]) < SINGULAR * n:
            return None
        found = torch.linalg.solve(scaled, right / sizes) / sizes
        left = max(0.0, square - float(found @ right))
        slopes = gram
        if self.written is not None and self.unit > FEW_DIGITS and of is None:
            found, slopes, left = self._refined(found, gram, left, list(terms.values()))
        spread = torch.linalg.pinv(slopes)
        count = max(1, self.n_rows * self.columns - n)
        errors = ((spread @ gram @ spread.T).diagonal().clamp(min=0) * left / count).sqrt()
        return Fit(dict(zip(terms, found.tolist(), strict=True)), dict(zip(terms, errors.tolist(), strict=True)))

    def _refined(
        self, found: Tensor, gram: Tensor, left: float, terms: Sequence[Expected]
    ) -> tuple[Tensor, Tensor, float]:
        """Coefficients without rounding's bias, how the moments move with them, and the squares that are left.

        As they were, where that leaves more.
        """
        best, slopes, current = (found, gram, left), gram, found
        for _ in range(NEWTON_STEPS):
            moments, squares = self._moments(current, terms)
            if squares <= best[2]:
                best = current, slopes, squares
            columns = []
            for index in range(len(terms)):
                step = torch.zeros_like(current)
                step[index] = STEP * max(float(current.abs().max()), NEWTON_LEAST)
                columns.append((moments - self._moments(current + step, terms)[0]) / step[index])
            slopes = torch.stack(columns, 1)
            move = torch.linalg.pinv(slopes) @ moments
            most = max(float(current.abs().max()), NEWTON_LEAST)
            current = current + move * min(1.0, most / max(float(move.abs().max()), most))
            if float(move.abs().max()) < NEWTON_ENDS * most:
                break
        squares = self._moments(current, terms)[1]
        return (current, slopes, squares) if squares <= best[2] else best

    def _moments(self, coefficients: Tensor, terms: Sequence[Expected]) -> tuple[Tensor, float]:
        """⟨δᵢ, W − round(W₀ + Σ wⱼ δⱼ)⟩ for every i, and the squares of the difference."""
        assert self.written is not None and self.base is not None
        found, squares = torch.zeros(len(terms), dtype=torch.float64), 0.0
        for rows in self.blocks():
            matrix = torch.stack([term(rows).flatten() for term in terms])
            exact = self.base[rows].double().flatten() + coefficients @ matrix
            apart = self.written[rows].double().flatten() - exact.to(self.written.dtype).double()
            found += matrix @ apart
            squares += float(apart @ apart)
        return found, squares

    def test(self, expected: Expected, dtype: torch.dtype | None = None, whole: bool = False) -> Test:
        """What is written beside base + `expected`, within the rounding of its type, or of a coarser one.

        `whole`: the tool multiplied the base too, and rounded the products.
        """
        worst, beyond, agreeing, left, size = 0.0, 0, 0, 0.0, 0.0
        for rows in self.blocks():
            wanted, change = expected(rows), self.change(rows)
            ratio = self._ratio(rows, wanted, change, dtype or self.dtype, whole)
            worst = max(worst, float(ratio.max()) if ratio.numel() else 0.0)
            beyond += int((ratio > 1).sum())
            left, size = math.hypot(left, float((change - wanted).norm())), math.hypot(size, float(change.norm()))
            if self.written is not None and self.base is not None:
                exact = (self.base[rows].double() + wanted).to(self.written.dtype)
                agreeing += int((exact == self.written[rows]).sum())
        count = max(1, self.n_rows * self.columns)
        worst = min(worst, LARGEST)  # JSON has no infinity
        return Test(worst, beyond / count, agreeing / count if self.written is not None else 1.0, left / (size or 1.0))

    def beyond(self, expected: Expected, dtype: torch.dtype | None = None) -> Tensor:
        """Which entries are farther from base + `expected` than rounding allows: (rows, columns)."""
        coarse = dtype or self.dtype
        ratios = (self._ratio(rows, expected(rows), self.change(rows), coarse, False) for rows in self.blocks())
        return torch.cat([ratio > 1 for ratio in ratios])

    def beyond_at(self, places: Tensor, wanted: Tensor, near: float, dtype: torch.dtype | None = None) -> Tensor:
        """The same of some `places` (rows, columns) alone, at which `wanted` (places,) is expected, of a change of a mean size."""
        assert self.written is not None and self.base is not None
        written, coarse = self.written[places].double(), dtype or self.dtype
        change = written - self.base[places].double()
        return self._over(change, wanted, near, self._rounding(written.abs(), coarse), coarse) > 1

    def size(self, expected: Expected) -> float:
        """The root mean square of the entries of an expected change."""
        squares = sum(float(expected(rows).double().square().sum()) for rows in self.blocks())
        return math.sqrt(squares / max(1, self.n_rows * self.columns))

    def _ratio(self, rows: slice, wanted: Tensor, change: Tensor, dtype: torch.dtype, whole: bool) -> Tensor:
        """The deviation of every entry over what rounding allows."""
        near = float(wanted.square().mean().sqrt()) if wanted.numel() else 0.0
        return self._over(change, wanted, near, self.rounding(rows, dtype) * (WHOLE if whole else 1.0), dtype)

    def _over(self, change: Tensor, wanted: Tensor, near: float, rounding: Tensor, dtype: torch.dtype) -> Tensor:
        unit = max(torch.finfo(dtype).eps / 2, self.unit)
        apart = (change - wanted).abs()
        allowed = TWICE * (rounding + ARITHMETIC * unit * (wanted.abs() + near))
        return torch.where(apart == 0, 0.0, apart / allowed)

    def moved(self, expected: Expected) -> int:
        """How many entries of the base the expected update would change in the type that is written."""
        if self.written is None or self.base is None:
            return int(sum(int((expected(rows) != 0).sum()) for rows in self.blocks()))
        count = 0
        for rows in self.blocks():
            base = self.base[rows]
            count += int(((base.double() + expected(rows)).to(self.written.dtype) != base.to(self.written.dtype)).sum())
        return count

    def dense(self, label: str) -> Tensor:
        """A source's whole update in float32; a model's as tools of few digits take it, which work in the written type."""
        if label in self.tuned and self.base is not None and self.unit > FEW_DIGITS and not self.coded:
            tuned, base = (one.to(self.dtype).float() for one in (self.tuned[label], self.base))
            return (tuned - base).to(self.dtype).float()
        return torch.cat([self.terms[label](rows).float() for rows in self.blocks()])


def _flat(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns in which a tensor of any shape is worked on; a vector is a column."""
    if not shape:
        return 1, 1
    return shape[0], math.prod(shape[1:])


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(_flat(tensor.shape))

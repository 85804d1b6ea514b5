"""Working a promise out again from the inputs, and how far what was written is from it.

Wherever a method gives the same on dense float64 matrices as on factors, it is computed on those: a mistake in the cheaper way
would be seen. Every tolerance is one of rounding: of the float32 in which updates are merged, and of the type that is written.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from modalloy.delta import Delta, LowRank, Scaled, compressed, norm
from modalloy.linalg import row_blocks
from modalloy.machine.threads import one_thread
from modalloy.methods import METHODS
from modalloy.methods.apply import apply, survey_model
from modalloy.names import pattern_of
from modalloy.storage.scaled import ScaledRef, codes_of, numbers_of, scales_of
from modalloy.storage.tensors import TensorRef
from modalloy.storage.views import cut_rows
from modalloy.subspaces import EXACT_SIZE

if TYPE_CHECKING:
    from modalloy.promise.promise import Promise, Update

COMPUTED = 1e-5  # relative error of an update that was merged in float32
SUMMED = 1e-7  # and of its sum with the base
SAMPLED = 12  # tensors of each kind, of those merged by each method, that `verify OUT` recomputes of a large result
CHECKED = 6  # of which a merge itself recomputes so many, and one of each place in a layer
SMALL_BYTES = 64 << 20  # of inputs and of the weights that they update, up to which a result is recomputed as a whole
PART_BYTES = 8 << 20  # of a tensor that is compared bit for bit
BLOCKS = (
    8  # of rows of a large tensor, or such parts, that a merge itself checks: the first, the last, and some between
)
DENSE_CHECK_LIMIT = 2048  # weights up to this size are recomputed on dense float64 matrices where that is equivalent

Item = TypeVar("Item")
Read = Callable[[TensorRef], Tensor]
Surveys = dict[str, dict[str, Any]]


def spread(items: Sequence[Item], n: int = SAMPLED) -> list[Item]:
    """So many of the items, evenly from the first to the last; all if there are fewer."""
    if len(items) <= n or n <= 1:
        return list(items[: max(0, n)])
    return [items[round(index * (len(items) - 1) / (n - 1))] for index in range(n)]


def spread_over_places(items: Sequence[Item], name_of: Callable[[Item], str]) -> list[Item]:
    """One of the items of every place in a layer (q_proj, up_proj, …), at least CHECKED if there are, evenly over the layers.

    A mistake that is made at one place of every layer is always among these.
    """
    places: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        places.setdefault(pattern_of(name_of(item)), []).append(index)
    turns = list(places.values()) * math.ceil(CHECKED / max(1, len(places)))
    last = max(1, len(turns) - 1)
    chosen = {place[round(step * (len(place) - 1) / last)] for step, place in enumerate(turns)}
    others = [index for index in range(len(items)) if index not in chosen]
    chosen.update(spread(others, CHECKED - len(chosen)))
    return [items[index] for index in sorted(chosen)]


def parts_of(ref: TensorRef, n_entries: int) -> Iterator[TensorRef]:
    """A stored tensor as consecutive flat pieces of at most so many entries; whole where its bytes are not in one piece."""
    count = math.prod(ref.shape)
    if ref.begin < 0:
        yield ref
        return
    for start in range(0, count, n_entries):
        size = min(n_entries, count - start)
        yield replace(ref, shape=(size,), begin=ref.begin + start * ref.dtype.itemsize)


def is_dense_check(
    method: str, parameters: dict[str, Any], shape: tuple[int, ...], compress_rank: int | None, interpolates: bool
) -> bool:
    """Whether a merged weight is recomputed on dense float64 matrices.

    Not for methods that select single entries (float64 may select others), nor for interpolation (α = 0.1 between two
    bfloat16 values is often a tie): these are recomputed exactly as they were merged.
    """
    entry = METHODS[method]
    equivalent = "factored = dense" in entry.laws and entry.gets(parameters) != "dense"
    # a larger full matrix is not cut to a rank as its factors are: not exactly
    limit = DENSE_CHECK_LIMIT if compress_rank is None else EXACT_SIZE
    return equivalent and not interpolates and max(shape) <= limit


def updates_of(
    promise: "Promise",
    read: Read,
    wide: torch.dtype,
    *,
    dense: bool,
    rows: slice = slice(None),
    weigh: bool = True,
) -> list[Delta]:
    """w_i δ_i of every model that counts, or δ_i, in its order; that of one without is zero."""
    found = _updates_of(promise, read, wide, dense=dense, rows=rows, weigh=weigh, stored=False)
    return [delta for delta in found if not isinstance(delta, Scaled)]


def _updates_of(
    promise: "Promise", read: Read, wide: torch.dtype, *, dense: bool, rows: slice, weigh: bool, stored: bool
) -> list[Delta | Scaled]:
    """The same; with `stored`, scales are not rounded to the stored precision first: float64 takes them, or stay beside."""
    shape = promise.start.shape
    deltas: list[Delta | Scaled] = []
    for update in promise.updates:
        delta = _update(update if weigh else replace(update, weight=1.0), promise.start, read, wide, rows, stored)
        if delta is None:
            delta = LowRank(torch.zeros(shape[0], 0)[rows], torch.zeros(0, shape[1]))
            deltas.append(delta.dense().to(wide) if dense else delta)
        else:
            deltas.append(delta.dense() if dense and isinstance(delta, LowRank) else delta)
    return deltas


def _update(
    update: "Update", start: TensorRef, read: Read, wide: torch.dtype, rows: slice, stored: bool
) -> Delta | Scaled | None:
    if update.factors is not None:
        a, b, scale = update.factors
        found = Scaled(LowRank(read(b)[rows], read(a)), scale)
        if stored and found.is_narrow:
            found = replace(found, scale=update.weight * scale)
            return found.to(wide) if wide == torch.float64 else found
        return update.weight * found.applied().to(wide)
    if update.tuned is None:
        return None
    difference = read(update.tuned)[rows].to(wide, copy=True).sub_(read(start)[rows].to(wide))
    return difference if update.weight == 1 else difference.mul_(update.weight)


def merged_update(
    promise: "Promise",
    read: Read,
    surveys: Surveys,
    *,
    double: bool,
    rows: slice = slice(None),
    alter: Callable[[list[Delta]], list[Delta]] | None = None,
) -> Delta:
    """The method's merge of a weight's updates, or of some rows of them; `double` if the recipe computes in float64.

    `alter` makes others of the updates first: `audit` asks what small changes of them would give.
    """
    method, shape = promise.method, promise.start.shape
    if all(update.weight == 0 for update in promise.updates):
        return LowRank(torch.zeros(shape[0], 0)[rows], torch.zeros(0, shape[1]))
    literal = is_dense_check(method, promise.parameters, shape, promise.compress_rank, promise.interpolates)
    if METHODS[method].picks and any(update.tuned is not None for update in promise.updates):
        literal = False  # float32 singular vectors give another core, of which other entries are taken
    dense = literal and not METHODS[method].one_rank  # which has no form on full matrices
    wide = torch.float64 if literal or double else torch.float32
    base = read(promise.start)[rows].to(wide) if promise.takes_base else None
    # as merges read factors; what is altered is folded
    stored = METHODS[method].on_cores(promise.parameters) and not double and (alter is None or literal)
    stored = stored and all(update.tuned is None for update in promise.updates)
    weigh = not METHODS[method].takes("weights")
    updates = _updates_of(promise, read, wide, dense=dense, rows=rows, weigh=weigh, stored=stored)
    if alter is not None:
        updates = [*alter([update for update in updates if not isinstance(update, Scaled)])]
    return apply(
        method,
        updates,
        promise.parameters,
        (shape[0], shape[1]),
        slot=promise.slot,
        fishers=[read(ref) for ref in promise.fishers] if promise.fishers else None,
        whole=surveys.get(promise.group),
        base=base,
        weights=[update.weight for update in promise.updates],
    )


def mean_update(promise: "Promise", read: Read, rows: slice = slice(None)) -> Tensor:
    """The promised multiple of the mean of the updates of a tensor of any shape, or of some of its rows."""
    deltas = updates_of(promise, read, torch.float64, dense=True, rows=rows)
    total = sum(delta.dense() if isinstance(delta, LowRank) else delta for delta in deltas)
    assert isinstance(total, Tensor)
    return total * (promise.factor / len(deltas))


def weight_error(
    promise: "Promise", written: Tensor, read: Read, surveys: Surveys, *, double: bool
) -> tuple[float, float]:
    """Relative Frobenius distance of a whole tensor from base plus update, and how large rounding may make it."""

    written, base = torch.atleast_1d(written), torch.atleast_1d(read(promise.start))
    update_of = exact_update(promise, read, surveys, double=double)
    return _distance((written[rows], base[rows], update_of(rows)) for rows in row_blocks(written.shape))


def sampled_error(
    promise: "Promise", written: TensorRef, read_written: Read, read: Read, surveys: Surveys, *, double: bool
) -> tuple[float, float, int] | None:
    """The same of some blocks of rows, and how many entries these hold; None where the tensor is to be read whole."""
    blocks = row_blocks(written.shape)
    if len(blocks) <= BLOCKS or promise.rows or promise.fishers or promise.start.shape != written.shape:
        return None
    tuned = all(update.factors is None and update.stacked is None for update in promise.updates)
    by_rows = tuned and (promise.kind == "averaged" or METHODS[promise.method].rowwise)
    whole = None if by_rows else exact_update(promise, read, surveys, double=double)
    parts: list[tuple[Tensor, Tensor, Delta]] = []
    for rows in spread(blocks, BLOCKS):
        own, found = promise.cut(rows), cut_rows(written, rows)
        if own is None or found is None:
            return None
        update = whole(rows) if whole else exact_update(own, read, surveys, double=double)(slice(None))
        parts.append((read_written(found), read(own.start), update))
    return *_distance(parts), sum(found.numel() for found, _, _ in parts)


def exact_update(promise: "Promise", read: Read, surveys: Surveys, *, double: bool) -> Callable[[slice], Delta]:
    """What a promise adds to its start, by rows: what `verify` and `audit` hold a whole weight to."""

    def rowed(ref: TensorRef) -> Tensor:
        return torch.atleast_1d(read(ref))

    if promise.kind == "averaged":
        return lambda rows: mean_update(promise, rowed, rows)
    full = any(update.tuned is not None for update in promise.updates)
    if METHODS[promise.method].rowwise and full:
        return lambda rows: merged_update(promise, read, surveys, double=double, rows=rows)
    merged = merged_update(promise, read, surveys, double=double)
    return lambda rows: merged.up[rows] @ merged.down if isinstance(merged, LowRank) else merged[rows]


def codes_error(
    promise: "Promise", ref: ScaledRef, read_written: Read, read: Read, surveys: Surveys, *, double: bool
) -> tuple[float, float, float | None]:
    """The same for a weight that is written as codes and scales, each judged by itself; and what writing it so lost.

    An entry in the middle of two codes may have become either, and a scale may be that of a magnitude which rounding moved.
    What is the base's has the base's codes, whatever scales these have.
    """
    base = read(promise.start).to(torch.float64)
    update = exact_update(promise, read, surveys, double=double)(slice(None))
    exact = base + (update.dense() if isinstance(update, LowRank) else update).to(torch.float64)
    assert ref.codes is not None and ref.scales is not None
    scales, codes = read_written(ref.scales), read_written(ref.codes)
    same = _ratio(float((exact - base).norm()), float(base.norm())) <= SUMMED
    if same and torch.equal(numbers_of(codes, scales, ref), read(promise.start)):
        return 0.0, SUMMED, None
    low, high = (scales_of(exact * (1 + by * 4 * COMPUTED), ref).double() for by in (-1, 1))
    beyond = torch.maximum(low - scales.double(), scales.double() - high) / high
    if not bool((beyond <= 0).all()):
        return float(beyond.max()), 0.0, None
    near = numbers_of(codes_of(exact, scales, ref), scales, ref).to(torch.float64)
    written = numbers_of(codes, scales, ref).to(torch.float64)
    excess = (written - exact).abs() - (near - exact).abs()
    size = float(exact.norm())
    return _ratio(float(excess.norm()), size), 4 * COMPUTED, _ratio(float((written - exact).norm()), size)


def factors_error(
    promise: "Promise", written: LowRank, read: Read, surveys: Surveys, *, double: bool
) -> tuple[float, float, float | None]:
    """The same for an update that is written as factors (in their stored type), and what cutting it to its rank lost.

    Where singular values are equal at the cut, as those of `iso_c` are, many cuts are the best: what is written must be as
    near to the whole update as the one that is found here.
    """
    whole = wanted = merged_update(promise, read, surveys, double=double)
    lost = None
    rank = promise.compress_rank
    if rank is not None and (not isinstance(wanted, LowRank) or wanted.rank > rank):
        wanted, lost = compressed(wanted, rank)
    found = written.to(torch.float64)
    distance, size = _apart(found, wanted), norm(wanted)
    # Rounding each entry of both factors by itself costs 0.6 units of roundoff times this sum, at every size and spectrum;
    # it exceeds the size where the columns' products cancel each other.
    products = float((found.up.norm(dim=0) * found.down.norm(dim=1)).norm())
    allowed = COMPUTED + _roundoff(written.up.dtype) * _ratio(products, size)
    if lost is not None and distance > allowed * size:
        distance = max(0.0, _apart(found, whole) - _apart(wanted, whole))
    return _ratio(distance, size), allowed, lost


def _apart(one: Delta, other: Delta) -> float:
    """Frobenius norm of the difference of two updates."""
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        return norm(one.to(torch.float64) + -1.0 * other.to(torch.float64))
    dense = [delta.dense() if isinstance(delta, LowRank) else delta for delta in (one, other)]
    return norm(dense[0].to(torch.float64) - dense[1])


def _distance(parts: Iterable[tuple[Tensor, Tensor, Delta]]) -> tuple[float, float]:
    """How much farther from base plus update what is written is than the nearest value of its type; all three by rows.

    An update that was worked out `computed` away from the exact one makes it at most twice that: a sum in the middle of two
    neighbours, as the mean of two bfloat16 models often is, may be rounded to either.
    """
    distance = size = changed = 0.0
    for written, base, update in parts:
        update = (update.dense() if isinstance(update, LowRank) else update).to(torch.float64)
        changed = math.hypot(changed, float(update.norm()))
        exact = base.to(torch.float64, copy=True).add_(update)
        size = math.hypot(size, float(exact.norm()))
        nearest = exact.to(written.dtype).to(torch.float64, copy=True).sub_(exact).abs_()
        excess = written.to(torch.float64, copy=True).sub_(exact).abs_().sub_(nearest)
        distance = math.hypot(distance, float(excess.norm()))
    return _ratio(distance, size), 2 * (SUMMED + COMPUTED * _ratio(changed, size))


def same_bits(
    written: TensorRef, read_written: Read, start: TensorRef, read: Read, n_parts: int | None = None
) -> tuple[bool, int]:
    """Whether a written tensor is a stored one bit for bit, in the type that is written; and how many entries were compared.

    Both are read in parts: all of them, or `n_parts` from the first to the last.
    """
    if written.shape != start.shape:
        return False, 0
    parts = [(written, start)]
    if start.begin >= 0:  # else it is read whole
        n_entries = PART_BYTES // max(written.dtype.itemsize, start.dtype.itemsize)
        parts = list(zip(parts_of(written, n_entries), parts_of(start, n_entries), strict=True))
    some = parts if n_parts is None else spread(parts, n_parts)
    same = all(_equal(read_written(own), read(other)) for own, other in some)
    return same, sum(math.prod(own.shape) for own, _ in some)


def _equal(written: Tensor, start: Tensor) -> bool:
    """Equal bytes after the one cast; so that −0 is not 0."""
    cast = start.to(written.dtype).contiguous()
    if not written.numel():
        return True
    return torch.equal(written.reshape(-1).view(torch.uint8), cast.reshape(-1).view(torch.uint8))


def _roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of rounding one value."""
    return torch.finfo(dtype).eps / 2


def _ratio(distance: float, size: float) -> float:
    return distance / size if size else distance


def surveyed_groups(promised: Iterable["Promise"]) -> dict[str, list["Promise"]]:
    """The merged weights whose method must know something of the whole model, by what they share."""
    groups: dict[str, list[Promise]] = {}
    for promise in promised:
        if promise.kind == "merged" and METHODS[promise.method].needs_survey(promise.parameters):
            groups.setdefault(promise.group, []).append(promise)
    return groups


def survey_of(group: Sequence["Promise"], read: Read, *, double: bool) -> dict[str, Any]:
    """What the method of a group must know of the whole model; `double` if the recipe computes in float64."""
    wide = torch.float64 if double else torch.float32

    def slot_and_updates(promise: "Promise") -> tuple[str, list[Delta]]:
        return promise.slot, updates_of(promise, read, wide, dense=False)

    with one_thread():
        return survey_model(group[0].method, partial(map, slot_and_updates, group), group[0].parameters) or {}


def is_survey(told: dict[str, Any], n: int) -> bool:
    """Whether it can be what a method counted over the whole of `n` models: a number for each, and a sign."""
    if told.keys() == {"weights"}:
        return _are_numbers(told["weights"], n) and sum(told["weights"]) <= 1 + COMPUTED
    majority = told.get("majority")
    return (
        told.keys() == {"cuts", "majority"}
        and _are_numbers(told["cuts"], n)
        and type(majority) is int
        and majority in (-1, 0, 1)
    )


def _are_numbers(values: Any, n: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == n
        and all(type(value) is float and 0 <= value < float("inf") for value in values)
    )


def alike(wanted: Any, told: Any) -> bool:
    """Whether two surveys are the same to rounding."""
    if isinstance(wanted, dict):
        return wanted.keys() == told.keys() and all(alike(wanted[key], told[key]) for key in wanted)
    if isinstance(wanted, list):
        return len(wanted) == len(told) and all(map(alike, wanted, told))
    return bool(abs(wanted - told) <= COMPUTED * abs(wanted))

"""What a recipe gives every weight: the promises that `verify` holds a result to, for a folder that any tool made."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from modalloy.auditing.opened import Slot
from modalloy.auditing.picked import ROUNDINGS, Merging, Stated, Trim, altered, sce_alike, sce_down, unit_of
from modalloy.auditing.weight import Expected, Read
from modalloy.delta import Delta, LowRank
from modalloy.errors import MethodError, RecipeError
from modalloy.methods import METHODS
from modalloy.methods.apply import apply
from modalloy.methods.arcee_fusion import divergences
from modalloy.methods.entries import kept_ranks, norm_factor
from modalloy.planning.models import labels, locate_specialist
from modalloy.planning.planner import plan
from modalloy.promise import Promises
from modalloy.promise.promise import Promise
from modalloy.recipe import Recipe
from modalloy.recompute import exact_update, mean_update, merged_update, survey_of, surveyed_groups, updates_of
from modalloy.storage.tensors import TensorRef
from modalloy.storage.views import TransposedRef

SHARES = ("density", "gamma")  # of entries
TRIMMING = ("ties", "breadcrumbs", "breadcrumbs_ties")  # which keep a number of entries by their magnitude
PLAIN = (torch.float32, torch.bfloat16, torch.float16)
MULTIPLY_THE_BASE = ("nearswap",)  # beside those whose factors come from inner products
OPEN = 0.25  # relative error of an importance from which on choosing by it says nothing
SUMMED = 64.0  # roundings of an entry's share in a divergence
TINY = 1e-30


class Claim:
    """The changes that a recipe gives the weights of its base."""

    def __init__(self, recipe: Recipe, base: Path) -> None:
        """Work out what the recipe promises, from headers.

        Raises:
            ModalloyError: the recipe does not fit its inputs, or goes across architectures.
        """
        if recipe.is_across:
            raise RecipeError(
                "the recipe merges into a target of another architecture; `modalloy verify` checks modalloy's results of it"
            )
        output = recipe.output.model_copy(update={"form": "full", "compress_rank": None, "requantize": False})
        recipe = recipe.model_copy(update={"base_model": str(base), "output": output, "text": ""})
        plan(recipe, allow_base_mismatch=True)  # refuses what does not fit, from headers
        folders = [locate_specialist(entry.model, recipe.folder) for entry in recipe.models]
        self.promises = Promises(recipe, base, folders, labels(recipe))
        self.double, self.written = recipe.dtype == "float64", recipe.out_dtype
        self.by_slot = {promise.slot: promise for promise in self.promises.all()}
        groups = surveyed_groups(self.by_slot.values())
        self.surveys = {key: survey_of(group, self.promises.read, double=self.double) for key, group in groups.items()}

    def expected(self, slot: Slot) -> Iterator[Stated]:
        """The changes of a weight that the recipe allows, as it is read here and as mergekit reads it; none where it gives no
        such weight.

        modalloy means norms and biases and keeps what belongs to tokens. mergekit merges every tensor by the method, casts its
        inputs to the type that it writes, counts shares of entries down, and weighs small updates alike in SCE.
        """
        promise, part = self._promise(slot)
        if promise is None:
            return
        yield self._stated(slot, promise, part)
        if part is not None or not slot.updates or len(slot.base.shape) not in (1, 2):
            return
        if promise.kind != "merged":
            promise = self._by_method(slot.name)
            yield self._stated(slot, promise)
        if promise.is_exact or not isinstance(slot.merged, TensorRef):
            return
        down = {name: _down(value, slot.base.shape) for name, value in promise.parameters.items() if name in SHARES}
        theirs, cast = replace(promise, parameters=promise.parameters | down), self._cast(slot.merged.dtype, promise)
        if promise.method != "sce" and (theirs != promise or cast is not None):
            yield self._stated(slot, theirs, cast=cast)
        if promise.method == "sce":
            yield self._stated(slot, promise, cast=cast, merge=sce_down)
            yield self._stated(slot, promise, cast=cast, merge=sce_alike)

    def _promise(self, slot: Slot) -> tuple[Promise | None, int | None]:
        """What a weight must be, or the tensor of which it is one of several experts, and which."""
        if slot.name in self.by_slot:
            return self.by_slot[slot.name], None
        whole, _, index = slot.name.removesuffix("]").partition("[")
        return (self.by_slot.get(whole), int(index)) if index else (None, None)

    def _cast(self, written: torch.dtype, promise: Promise) -> torch.dtype | None:
        """The type that a tool works in, where it is coarser than that of its inputs, or than what is written."""
        told = None if self.written is None else getattr(torch, self.written)
        types = [one for one in (told, written, *(ref.dtype for ref in promise.refs)) if one in PLAIN]
        coarsest = min(types, key=lambda one: one.itemsize, default=None)
        return None if coarsest is None or all(one.itemsize == coarsest.itemsize for one in types) else coarsest

    def _stated(
        self,
        slot: Slot,
        promise: Promise,
        part: int | None = None,
        *,
        cast: torch.dtype | None = None,
        merge: Merging | None = None,
    ) -> Stated:
        """What a promise gives a weight; of inputs that are `cast` to a type first, or by another function than its method."""
        if promise.is_exact:
            return Stated(partial(_zeros, slot))
        inputs = {ref: self.promises.read(ref) for ref in promise.refs}  # rows are asked for block by block
        read = {ref: one if cast is None else one.to(cast) for ref, one in inputs.items()}.__getitem__
        if part is not None:
            one = mean_update(promise, read, slice(part, part + 1))[0]
            return Stated(one.reshape(one.shape[0], -1).double().__getitem__)
        try:
            if promise.kind == "averaged":
                return Stated(
                    partial(_rowed, exact_update(promise, read, self.surveys, double=self.double)), dtype=cast
                )
            return self._merged(slot, promise, read, cast, merge)
        except MethodError as reason:
            raise MethodError(f"{slot.name}: {reason}") from reason

    def _merged(
        self, slot: Slot, promise: Promise, read: Read, cast: torch.dtype | None, merge: Merging | None
    ) -> Stated:
        """What a method gives a weight."""
        method, turned = METHODS[promise.method], isinstance(promise.start, TransposedRef)

        def merged(alter: Callable[[list[Delta]], list[Delta]] = list) -> Expected:
            if merge is not None:
                found: Delta = merge(alter(updates_of(promise, read, torch.float32, dense=True)), promise.parameters)
            else:
                found = merged_update(promise, read, self.surveys, double=self.double, alter=alter)
            return _placed(slot, _dense(found).T if turned else _dense(found))

        def nudged(wish: Tensor, signs: Sequence[int], by: float) -> Expected:
            own = wish.T if turned else wish
            return merged(lambda updates: altered(updates, own, signs, by))

        if method.gets(promise.parameters) != "dense" or method.combines:
            if turned or len(slot.base.shape) == 1:
                return Stated(merged(), dtype=cast, by_factors=method.combines, whole=method.combines)
            update = exact_update(promise, read, self.surveys, double=self.double)
            return Stated(partial(_rowed, update), dtype=cast, by_factors=method.combines, whole=method.combines)
        stated = Stated(merged(), nudged, len(promise.updates), dtype=cast, whole=promise.method in MULTIPLY_THE_BASE)
        if promise.method in TRIMMING and promise.parameters.get("threshold") != "global":
            stated = replace(stated, trim=partial(self._trim, slot, promise, read, turned=turned))
        if "seed" in promise.parameters:
            why = f"{promise.method} draws at random which entries it drops, and another tool's draws are others"
            return replace(stated, untold=why)
        if promise.method == "sce" and torch.float16 in (cast, promise.start.dtype):
            why = "the squares by which sce chooses entries are too small for float16, in which mergekit works"
            return replace(stated, untold=why)
        if promise.method == "arcee_fusion":
            return _chosen_by_divergence(slot, promise, read, stated)
        return stated

    def _trim(self, slot: Slot, promise: Promise, read: Read, *, turned: bool) -> Trim:
        """What a method keeps of the updates by their magnitude, and what it gives of what is left: all of that."""
        updates = [_dense(one).float() for one in updates_of(promise, read, torch.float32, dense=True)]
        n, parameters = len(updates), promise.parameters
        ranks = kept_ranks(updates[0].numel(), parameters["density"], parameters.get("gamma", 0.0), n)
        factors = [1.0] * n
        if parameters.get("rescale") == "norm":
            sizes = [one.abs().double().flatten().sort(descending=True).values for one in updates]
            after = [float(one[slice(*band)].sum()) for one, band in zip(sizes, ranks, strict=True)]
            factors = [norm_factor(float(one.sum()), left) for one, left in zip(sizes, after, strict=True)]
        keeps_all = {"density": 1.0, "gamma": 0.0, "rescale": "none"}
        whole = {name: keeps_all.get(name, own) for name, own in parameters.items()}

        def merge(left: list[Tensor]) -> Tensor:
            given: list[Delta] = [one * factor for one, factor in zip(left, factors, strict=True)]
            weights = [update.weight for update in promise.updates]
            shape = (1, left[0].shape[1])
            return _dense(apply(promise.method, given, whole, shape, slot=slot.name, weights=weights))

        rows = slot.base.shape[0] if slot.base.shape else 1
        return Trim([(one.T if turned else one).reshape(rows, -1) for one in updates], ranks, merge)

    def _by_method(self, slot: str) -> Promise:
        """A matrix or vector merged by the recipe's method, whatever kind of tensor it is; a vector is a row."""

        def row(ref: TensorRef) -> TensorRef:
            return replace(ref, shape=(1, *ref.shape)) if len(ref.shape) == 1 else ref

        promise = self.promises.merged(slot, row(self.promises.base.refs[slot]))
        updates = (replace(one, tuned=None if one.tuned is None else row(one.tuned)) for one in promise.updates)
        return replace(promise, updates=tuple(updates), fishers=tuple(map(row, promise.fishers)))


def _chosen_by_divergence(slot: Slot, promise: Promise, read: Read, stated: Stated) -> Stated:
    """What Arcee Fusion gives: its divergences are second-order sums, whose rounding errors are many of an entry's."""
    (delta,) = (_dense(one) for one in updates_of(promise, read, torch.float32, dense=True))
    dtype = stated.dtype or promise.start.dtype
    size = float(divergences(delta, read(promise.start)).median())
    noise = SUMMED * unit_of(dtype) / (math.sqrt(delta.shape[1]) * max(size, TINY))
    every, nudged = _placed(slot, delta), stated.merge
    assert nudged is not None

    def merge(wish: Tensor, signs: Sequence[int], by: float) -> Expected:
        chosen = nudged(wish, signs, by)
        return lambda rows: torch.where(chosen(rows) != 0, every(rows), 0)

    if noise < OPEN:
        return replace(stated, merge=merge, by=max(noise, ROUNDINGS * unit_of(dtype)))
    name = str(dtype).removeprefix("torch.")
    why = f"the divergences of rows by which arcee_fusion chooses entries ({size:.1g}) are below the rounding of {name}"
    return replace(stated, untold=why, either=every)


def _placed(slot: Slot, update: Tensor) -> Expected:
    """A whole update by the rows of the audited weight."""
    return update.reshape(slot.base.shape[0] if slot.base.shape else 1, -1).__getitem__


def _down(value: float | Sequence[float], shape: Sequence[int]) -> float | tuple[float, ...]:
    """A share of entries that is counted down, of one update or of each."""
    entries = math.prod(shape)
    if isinstance(value, (int, float)):
        return math.floor(value * entries) / entries
    return tuple(math.floor(one * entries) / entries for one in value)


def _rowed(update: Callable[[slice], Delta], rows: slice) -> Tensor:
    found = _dense(update(rows))
    return found.reshape(found.shape[0], -1)


def _dense(update: Delta) -> Tensor:
    return (update.dense() if isinstance(update, LowRank) else update).double()


def _zeros(slot: Slot, rows: slice) -> Tensor:
    shape = slot.base.shape or (1,)
    return torch.zeros(len(range(*rows.indices(shape[0]))), math.prod(shape[1:]), dtype=torch.float64)

"""What a recipe gives every weight: the promises that `verify` holds a result to, for a folder that any tool made."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from modalloy.auditing.opened import Slot
from modalloy.auditing.weight import Expected
from modalloy.delta import Delta, LowRank
from modalloy.errors import MethodError, RecipeError
from modalloy.methods import METHODS
from modalloy.planning.models import labels, locate_specialist
from modalloy.planning.planner import plan
from modalloy.promise import Promises
from modalloy.promise.promise import Promise
from modalloy.recipe import Recipe
from modalloy.recompute import exact_update, mean_update, survey_of, surveyed_groups
from modalloy.storage.tensors import TensorRef
from modalloy.storage.views import TransposedRef


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
        self.double = recipe.dtype == "float64"
        self.by_slot = {promise.slot: promise for promise in self.promises.all()}
        self.picks = any(
            p.kind == "merged" and METHODS[p.method].gets(p.parameters) == "dense" for p in self.by_slot.values()
        )
        groups = surveyed_groups(self.by_slot.values())
        self.surveys = {key: survey_of(group, self.promises.read, double=self.double) for key, group in groups.items()}

    def expected(self, slot: Slot) -> list[Expected]:
        """The changes of a weight that the recipe allows, as matrices by rows; none where it gives no such weight.

        modalloy means norms and biases and keeps what belongs to tokens; mergekit merges every tensor by the method.
        """
        whole, _, index = slot.name.removesuffix("]").partition("[")
        promise, part = self.by_slot.get(slot.name), None
        if promise is None and index:
            promise, part = self.by_slot.get(whole), int(index)
        if promise is None:
            return []
        found = [self._change(slot, promise, part)]
        if promise.kind != "merged" and part is None and slot.updates and len(slot.base.shape) in (1, 2):
            found.append(self._change(slot, self._by_method(slot.name), None))
        return found

    def _change(self, slot: Slot, promise: Promise, part: int | None) -> Expected:
        if promise.is_exact:
            return partial(_zeros, slot)
        inputs = {ref: self.promises.read(ref) for ref in promise.refs}  # rows are asked for block by block
        read = inputs.__getitem__
        try:
            if part is not None:
                one = mean_update(promise, read, slice(part, part + 1))[0]
                return one.reshape(one.shape[0], -1).double().__getitem__
            update = exact_update(promise, read, self.surveys, double=self.double)
        except MethodError as reason:
            raise MethodError(f"{slot.name}: {reason}") from reason
        if isinstance(promise.start, TransposedRef):
            return _dense(update(slice(None))).T.__getitem__
        return partial(_rowed, update)

    def _by_method(self, slot: str) -> Promise:
        """A matrix or vector merged by the recipe's method, whatever kind of tensor it is."""

        def column(ref: TensorRef) -> TensorRef:
            return replace(ref, shape=(*ref.shape, 1)) if len(ref.shape) == 1 else ref

        promise = self.promises.merged(slot, column(self.promises.base.refs[slot]))
        updates = (replace(one, tuned=None if one.tuned is None else column(one.tuned)) for one in promise.updates)
        return replace(promise, updates=tuple(updates), fishers=tuple(map(column, promise.fishers)))


def _rowed(update: Callable[[slice], Delta], rows: slice) -> Tensor:
    found = _dense(update(rows))
    return found.reshape(found.shape[0], -1)


def _dense(update: Delta) -> Tensor:
    return (update.dense() if isinstance(update, LowRank) else update).double()


def _zeros(slot: Slot, rows: slice) -> Tensor:
    shape = slot.base.shape or (1,)
    return torch.zeros(len(range(*rows.indices(shape[0]))), math.prod(shape[1:]), dtype=torch.float64)

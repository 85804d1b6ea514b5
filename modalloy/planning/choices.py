"""What a recipe says of every weight: its rule, its method, its parameters and weights at the weight's depth."""

import fnmatch
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from math import fsum
from typing import Any

import torch

from modalloy.errors import RecipeError
from modalloy.methods import METHODS
from modalloy.methods.apply import resolve
from modalloy.planning.kinds import Kind, layer_of
from modalloy.recipe import Recipe, WeightRule
from modalloy.settings import chosen_case
from modalloy.specialists.spelling import towers_of
from modalloy.storage.config import read_config
from modalloy.storage.scaled import ScaledRef
from modalloy.storage.tensors import Checkpoint, WeightFile
from modalloy.storage.writer import TensorSpec


class Choices:
    """What a recipe says of every weight: its rule, its method, its parameters and weights at its depth."""

    def __init__(
        self, recipe: Recipe, base: Checkpoint, absent: Collection[int], *, own: int = 0, lora_rank: int | None = None
    ) -> None:
        """`base` holds the weights that updates are added to. `absent`: indexes of the recipe's models that do not count.

        `own`: how many models are merged beside the recipe's. `lora_rank`: the largest LoRA rank among all.
        """
        self.rank: int | None = None  # of the written adapter
        self.fishers: list[WeightFile | None] = [None] * len(recipe.models)
        self.kinds: Mapping[str, Kind] = {}  # of the target's tensors
        self.wide = torch.float64 if recipe.dtype == "float64" else torch.float32  # of the arithmetic
        self.recipe, self.base, self.absent, self.own, self.lora_rank = recipe, base, absent, own, lora_rank
        self.rules = {name: (pattern, rule) for name in base.refs for pattern, rule in [self._rule(name)] if rule}
        self.towers = towers_of(base, self.config) if recipe.towers == "keep" else set()
        self.depth = layers(base.refs)
        self.written = recipe.written
        self.parameters = self._resolved(recipe.merge_method, self.written, None)
        if recipe.layers not in (None, self.depth):
            raise RecipeError(
                f"slices of layers 0 to {recipe.layers} are not all {self.depth} of {base.folder.name}, and every layer is merged "
                "with its like; list whole models under `models:`, with `modules:` and policy: keep for layers to leave as they are"
            )

    @cached_property
    def config(self) -> dict[str, Any]:
        """The target's config.json."""
        return read_config(self.base.folder)

    def must_be_equal(self) -> list[str]:
        """Kept tensors that no method merges, and no rule speaks of: no model may have changed them."""
        return []

    def _policy(self, name: str) -> str | None:
        """What a rule says is done to a weight, if one does; `towers: keep` is one of all that no other speaks of."""
        if name in self.rules:
            return self.rules[name][1].policy
        return "keep" if name in self.towers else None

    def _weights(self, slot: str) -> tuple[float, ...]:
        """The factors of the models' updates, at the weight's depth; 0 for those that do not count."""
        remedy = "give one number, or keep the base's by `modules:` with policy: keep"
        found: list[float] = []
        shares = self.recipe.weights == "shares"
        for index, entry in enumerate(self.recipe.models):
            if index in self.absent and not shares:
                found.append(0.0)
                continue
            written = chosen_case(entry.parameters.weight, slot)
            if written is None:
                raise RecipeError(
                    f"models.{index}.parameters.weight: no filter matches {slot}; end the list with - value: … for all other names"
                )
            found.append(self._at(written, slot, "weight", remedy))
        total = fsum(found) if shares else 1.0
        if abs(total) < 1e-8:
            raise RecipeError(
                f"the weights of {slot} sum to 0, so none is a share of them; write other weights, or normalize: false"
            )
        return tuple(0.0 if index in self.absent else weight / total for index, weight in enumerate(found))

    def _shares(self, slot: str, method: str, parameters: dict[str, Any]) -> tuple[float | None, ...]:
        """The same, with None for models that take no part: a weight of 0 is absence.

        A method that surveys the whole model gets the same models at every depth; so does one that has weights of its own.
        """
        everywhere = METHODS[method].needs_survey(parameters) or METHODS[method].takes("weights")
        return tuple(
            None if index in self.absent or (weight == 0 and not everywhere) else weight
            for index, weight in enumerate(self._weights(slot))
        )

    def _check_number(self, slot: str, method: str, shares: Iterable[float | None]) -> None:
        """Refuse a method that merges another number of models than take part at a weight."""
        taking_part = [share for share in shares if share is not None]
        wrong = METHODS[method].wrong_number(len(taking_part)) if any(taking_part) else None
        if wrong is not None:
            raise RecipeError(
                f"{slot}: {method} {wrong} (the base itself, a weight of 0 and updates of zeros do not count; to go between two "
                "models, make one of them base_model, as mergekit does); list as many, or choose another method"
            )

    def _count(self, slot: str | None) -> int:
        """How many models are merged, at the depth of a weight if one is given."""
        if slot is None:
            return self.own + len(self.recipe.models) - len(self.absent)
        return self.own + sum(weight != 0 for weight in self._weights(slot))

    def _rule(self, slot: str) -> tuple[str, WeightRule | None]:
        for pattern, rule in self.recipe.modules.items():
            if fnmatch.fnmatchcase(slot, pattern):
                return pattern, rule
        return "", None

    def _method(self, slot: str) -> tuple[str, dict[str, Any]]:
        """Method of a weight, and its parameters as written."""
        _, rule = self.rules.get(slot, ("", None))
        if rule is None:
            return self.recipe.merge_method, self.written
        if rule.policy == "average":
            return "average", {"scale": self._mean_factor(slot) / max(1, self._count(slot))}
        if rule.merge_method in (None, self.recipe.merge_method):
            return self.recipe.merge_method, self.written | rule.parameters
        return str(rule.merge_method), rule.parameters

    def _mean_factor(self, name: str, weights: Sequence[float] = ()) -> float:
        """What multiplies the mean of the updates of a tensor that is averaged: λ / λ_auto, so that "auto" is the mean itself.

        For `linear` it is α, which has no "auto"; some methods say it themselves. `weights` are those of the models that have
        the tensor, all if none are given. Where weights divide the merge, they divide the mean.
        """
        _, rule = self.rules.get(name, ("", None))
        averages = rule is not None and rule.policy == "average"
        method, written = (self.recipe.merge_method, self.written) if averages else self._method(name)
        parameters = self._resolved(method, written, name)
        if (mean := METHODS[method].mean) is not None:
            every = [1.0] * self.own + [weight for weight in self._weights(name) if weight != 0]
            return mean(parameters, weights or every)
        if "scale" not in parameters:
            return parameters.get("alpha", 1.0)
        factor = parameters["scale"] / METHODS[method].automatic_scale(max(1, self._count(name)), parameters)
        if parameters.get("combine") != "weighted_mean":
            return factor
        weights = [weight for weight in self._weights(name) if weight]
        return factor * len(weights) / (fsum(weights) or 1.0)

    def _resolved(self, method: str, parameters: dict[str, Any], slot: str | None) -> dict[str, Any]:
        """Parameters with "auto" worked out, and those written by depth, by name or by model at the weight (as they are written
        without a slot); a value for each of the models that take part where they differ."""
        several = {name: value for name, value in parameters.items() if isinstance(value, (list, tuple))}
        single = {name: value for name, value in parameters.items() if name not in several}
        if slot is not None:
            for name, value in several.items():
                if (found := self._value(method, name, value, slot, single)) is not None:
                    single[name] = found
        n = max(1, self._count(slot))
        chosen = resolve(method, single, n=n, lora_rank=self.lora_rank)
        as_written = {name: list(value) for name, value in several.items()}
        return chosen if slot is not None else chosen | as_written

    def _value(self, method: str, name: str, value: Any, slot: str, known: dict[str, Any]) -> Any:
        """A parameter at a weight, of a list over the depth, by name or by model; None where it says nothing of it."""
        if isinstance(value, tuple):
            default = METHODS[method].parameters[name]
            shares = self._shares(slot, method, METHODS[method].parameters | known)
            found = [
                default if one is None or (at := self._value(method, name, one, slot, known)) is None else at
                for one, share in zip(value, shares, strict=True)
                if share is not None
            ]
            return found[0] if len(set(found)) == 1 else tuple(found) or None
        chosen = chosen_case(value, slot)
        if not isinstance(chosen, list):
            return chosen
        at = self._at(chosen, slot, name, "give it a value of its own under `modules:`")
        return round(at) if METHODS[method].is_whole(name) else at

    def _at(self, value: Any, slot: str, name: str, remedy: str) -> float:
        """A number, or a list of them interpolated linearly from the first layer to the last."""
        if not isinstance(value, (list, tuple)):
            return value
        layer = layer_of(slot)
        if layer is None and self.recipe.outside_layers == "first":
            return value[0]
        if layer is None:
            raise RecipeError(
                f"{name}: {list(value)} goes over the layers, but {slot} is in none; {remedy}, or write "
                "outside_layers: first for the first of them there"
            )
        position = layer / max(1, self.depth - 1) * (len(value) - 1)
        below = min(int(position), len(value) - 1)
        above = min(below + 1, len(value) - 1)
        return value[below] + (position - below) * (value[above] - value[below])

    def _like_base(self, name: str) -> TensorSpec:
        """The base's tensor in the output type."""
        ref, chosen = self.base.refs[name], self.recipe.written_dtype
        stored = torch.bfloat16 if isinstance(ref, ScaledRef) else ref.dtype  # of 8-bit codes and scales
        dtype = stored if chosen == "auto" or not ref.dtype.is_floating_point else getattr(torch, chosen)
        return TensorSpec(name, dtype, ref.shape)


def layers(names: Iterable[str]) -> int:
    """How many layers tensors of these names are of."""
    return 1 + max((index for name in names if (index := layer_of(name)) is not None), default=-1)

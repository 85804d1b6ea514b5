"""Running a method: on cores, factors or full matrices, as it declares; the caller's side of every method."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from modalloy.delta import Delta, LowRank, Scaled, factors_of, lift, lift_left
from modalloy.errors import MethodError, RecipeError, nearest, shown
from modalloy.linalg import require_finite
from modalloy.methods import METHODS
from modalloy.methods.parameters import check_value, parse_rank, schema
from modalloy.settings import are_cases, check_cases

DENSE_RANK = 128  # `rank: auto` when no specialist is low-rank (the paper's k)


def merge_deltas(
    deltas: Sequence[Delta],
    method: str = "ssam",
    *,
    weights: Sequence[float] | None = None,
    slot: str = "",
    fishers: Sequence[Tensor] | None = None,
    base: Tensor | None = None,
    **parameters: Any,
) -> Delta:
    """The merged update of one linear layer: LowRank from LowRank, dense from dense (or mixed).

    Methods that work on single entries (`modalloy methods` says which) give a dense update from anything.

    Args:
        deltas: one update (out, in) per specialist, each a `LowRank` or a dense tensor, alpha/r folded in.
        method: a name in METHODS.
        weights: one factor per specialist, applied first of all and never renormalised; a method that has weights of its
            own (`nuslerp`, `multislerp`) gets them instead.
        slot: name of the weight; random choices are keyed by it.
        fishers: one Fisher matrix (out, in) per specialist, for the methods that weigh by them.
        base: the base's weight (out, in), for the methods that work on the weights themselves, θ_0 + update.
        parameters: the method's own, for example `rank=128, scale=0.25`; what is left out is "auto".

    Raises:
        MethodError: shapes differ, values are not finite, a parameter is out of range, or the method needs another number
            of models, Fisher matrices, or the base's weight.
        RecipeError: no such method or parameter.
    """
    check_method(method, parameters)
    if not deltas:
        raise MethodError("nothing to merge: give at least one update")
    shape = (int(deltas[0].shape[0]), int(deltas[0].shape[1]))
    for index, delta in enumerate(deltas):
        if tuple(delta.shape) != shape:
            raise MethodError(f"update {index} is {tuple(delta.shape)} but update 0 is {shape}; all must be alike")
    if weights is not None:
        if len(weights) != len(deltas):
            raise MethodError(f"{len(weights)} weights for {len(deltas)} updates; give one each")
        if not METHODS[method].takes("weights"):
            deltas = [delta if weight == 1 else weight * delta for delta, weight in zip(deltas, weights, strict=True)]
    ranks = [delta.rank for delta in deltas if isinstance(delta, LowRank)]
    chosen = resolve(method, parameters, n=len(deltas), lora_rank=max(ranks, default=None))
    whole = survey_model(method, lambda: [(slot, list(deltas))], chosen)
    given: dict[str, Any] = {"fishers": fishers, "whole": whole, "base": base, "weights": weights}
    merged = apply(method, list(deltas), chosen, shape, slot=slot, **given)
    return merged.dense() if isinstance(merged, LowRank) and len(ranks) < len(deltas) else merged


def apply(
    method: str,
    deltas: Sequence[Delta | Scaled],
    parameters: dict[str, Any],
    shape: tuple[int, int],
    *,
    slot: str = "",
    fishers: Sequence[Tensor] | None = None,
    whole: dict[str, Any] | None = None,
    base: Tensor | None = None,
    weights: Sequence[float] | None = None,
) -> Delta:
    """Run a method with resolved parameters. Cores are float64; the result is float32, or float64 if an input is.

    It is low-rank if all updates are, or if the method gives a low-rank result for full matrices too. `weights` are folded
    into the updates already, or into the scales beside them.
    """
    entry = METHODS[method]
    if wrong := entry.wrong_number(len(deltas)):
        raise MethodError(f"{method} {wrong}; give as many, or choose another method")
    dtype = _common_dtype(deltas)
    given: dict[str, Any] = {"shape": shape, "slot": slot, "fishers": fishers, "whole": whole}
    given["base"] = _checked_base(method, base, shape).to(dtype) if entry.base(parameters) else None
    given["weights"] = [1.0] * len(deltas) if weights is None else list(weights)
    given["folded"] = given["weights"]
    arguments = parameters | {name: value for name, value in given.items() if entry.takes(name)}
    if entry.takes("fishers"):
        _check_fishers(method, fishers, len(deltas), shape)
    factored = [delta for delta in deltas if not isinstance(delta, Tensor)]
    gets = entry.gets(parameters)
    if len(factored) == len(deltas) and gets != "dense":
        if gets == "factors":
            merged = entry.function([delta.to(dtype) for delta in factored], **arguments)
        elif gets == "left_core":
            matrices, restore = lift_left([delta.to(dtype) for delta in factored])
            merged = restore(entry.function(matrices, **arguments), dtype)
        else:
            cores, restore = lift(factored)
            small = [core.dense() for core in cores] if gets == "core" else cores
            merged = restore(entry.function(small, **arguments), dtype)
        for factor in (merged.up, merged.down):
            require_finite(factor)
        return merged
    result: Delta = entry.function(dense_matrices(deltas), **arguments)
    return result.to(dtype)


def dense_matrices(deltas: Sequence[Delta | Scaled]) -> list[Tensor]:
    """Every update as a finite full matrix, in float32 or in the wider type of the widest."""
    dtype = _common_dtype(deltas)
    matrices = [delta.to(dtype) if isinstance(delta, Tensor) else delta.to(dtype).dense() for delta in deltas]
    for matrix in matrices:
        require_finite(matrix)
    return matrices


def survey_model(
    method: str, model: Callable[[], Iterable[tuple[str, list[Delta]]]], parameters: dict[str, Any]
) -> dict[str, Any] | None:
    """The whole-model numbers that a method needs before its first layer (a global threshold), None if it needs none.

    Args:
        method: a name in METHODS.
        model: gives the slot and the updates of every merged weight, always one update per specialist in the same
            order (zeros where it has none); called several times.
        parameters: resolved parameters.
    """
    entry = METHODS[method]
    if entry.survey is None or not entry.needs_survey(parameters):
        return None
    if entry.gets(parameters) == "dense":
        return entry.survey(lambda: ((slot, dense_matrices(deltas)) for slot, deltas in model()), **parameters)
    return entry.survey(model, **parameters)


def check_method(method: str, parameters: dict[str, Any], *, gradients: bool = False) -> None:
    """Refuse an unknown method or parameter, and values out of range. With `gradients`, a list over depth or by name is a value."""
    if method not in METHODS:
        raise RecipeError(f"unknown merge method '{method}'; {nearest(method, METHODS)}")
    known = schema(METHODS[method].function)
    for name, value in parameters.items():
        if name not in known:
            raise RecipeError(f"method '{method}' has no parameter '{name}'; {nearest(name, known)}")
        if gradients and isinstance(value, list) and not value:
            raise RecipeError(f"{name}: an empty list; give one value, or one or more over the depth of the model")
        if gradients and are_cases(value):
            check_cases(name, value)
            for case in value:
                check_method(method, {name: case["value"]}, gradients=True)
            continue
        several = gradients and isinstance(value, list)
        for single in value if several else [value]:
            check_value(name, single, *known[name])
            if several and (isinstance(single, bool) or not isinstance(single, (int, float))):
                raise RecipeError(
                    f"{name}: {shown(single)} cannot be in a list over the depth; it must hold numbers only"
                )


def resolve(method: str, parameters: dict[str, Any], *, n: int, lora_rank: int | None) -> dict[str, Any]:
    """Every parameter of a method with "auto" worked out for `n` specialists, the largest LoRA rank being `lora_rank`.

    Raises:
        RecipeError: no such method or parameter, a value is out of range, or values do not fit each other.
    """
    check_method(method, parameters)
    entry = METHODS[method]
    chosen = entry.parameters | parameters
    if chosen.get("scale") == "auto":
        chosen["scale"] = entry.automatic_scale(n, chosen)
    if entry.takes_k:
        automatic = max(lora_rank, 1) if lora_rank is not None else DENSE_RANK
        chosen["rank"] = automatic if chosen["rank"] == "auto" else parse_rank(chosen["rank"])
    problem = entry.conflict(chosen)
    if problem:
        raise RecipeError(problem)
    return chosen


def _common_dtype(deltas: Sequence[Delta | Scaled]) -> torch.dtype:
    dtype = torch.float32
    for delta in deltas:
        dtype = torch.promote_types(dtype, delta.dtype if isinstance(delta, Tensor) else factors_of(delta).up.dtype)
    return dtype


def _check_fishers(method: str, fishers: Sequence[Tensor] | None, n: int, shape: tuple[int, int]) -> None:
    if fishers is None or len(fishers) != n:
        raise MethodError(f"method '{method}' weighs by Fisher matrices: give one per specialist ({n}) as fishers=")
    for index, matrix in enumerate(fishers):
        if tuple(matrix.shape) != shape:
            raise MethodError(
                f"Fisher matrix {index} is {tuple(matrix.shape)}, the weight is {shape}; they must be alike"
            )
        if not bool(torch.isfinite(matrix).all()) or bool((matrix < 0).any()):
            raise MethodError(f"Fisher matrix {index} holds negative, NaN or infinite values; compute it again")


def _checked_base(method: str, base: Tensor | None, shape: tuple[int, int]) -> Tensor:
    if base is None:
        raise MethodError(f"method '{method}' works on the weights themselves: give the base's {shape} as base=")
    if tuple(base.shape) != shape:
        raise MethodError(f"the base's weight is {tuple(base.shape)}, the updates are {shape}; they must be alike")
    require_finite(base)
    return base

"""What a method's parameters may be. A method's signature is its schema: types and ranges are read from its annotations."""

import functools
import inspect
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from modalloy.errors import RecipeError, nearest, shown

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Positive = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0)]
NotNegative = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0)]
Share = Annotated[float, Field(strict=True, gt=0, le=1)]  # a fraction that is kept
UnitInterval = Annotated[float, Field(strict=True, ge=0, le=1)]
Probability = Annotated[float, Field(strict=True, ge=0, lt=1)]
Switch = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1)]
Seed = Annotated[int, Field(strict=True, ge=0)]
Shares = Share | tuple[Share, ...]  # one for all specialists, or one for each of them
Probabilities = Probability | tuple[Probability, ...]
Rank = Annotated[int | float, "rank"]  # a whole number from 1; below 1 the share of the spectral energy to keep

# what the caller gives a method beside its parameters, if its signature names it
GIVEN = ("shape", "slot", "fishers", "whole", "base", "weights", "folded")


@functools.cache
def arguments(function: Callable[..., Any]) -> frozenset[str]:
    """What it takes: parameters, and what the caller gives."""
    return frozenset(inspect.signature(function).parameters)


@functools.cache
def schema(function: Callable[..., Any]) -> Mapping[str, tuple[Any, Any]]:
    """Name → (annotation, default) of the parameters that a recipe may set; default "auto" where the caller works it out."""
    hints = typing.get_type_hints(function, include_extras=True)
    empty = inspect.Parameter.empty
    return MappingProxyType(
        {
            p.name: (hints[p.name], "auto" if p.default is empty else p.default)
            for p in inspect.signature(function).parameters.values()
            if p.kind is p.KEYWORD_ONLY and p.name not in GIVEN
        }
    )


def documentation(function: Callable[..., Any]) -> dict[str, str]:
    """Name → meaning of every parameter, from the "Args:" of the docstring."""
    text = inspect.getdoc(function) or ""
    arguments = text.partition("\nArgs:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^    (\w+): ((?:.|\n(?!    \w+:))*)", arguments, re.MULTILINE)
    return {name: " ".join(meaning.split()) for name, meaning in entries}


def is_whole(annotation: Any) -> bool:
    """Whether an annotation allows whole numbers only (a rank's share of the energy is no plain number)."""
    return annotation is Rank or typing.get_args(annotation)[:1] == (int,)


def is_per_model(annotation: Any) -> bool:
    """Whether an annotation allows one value for each specialist, beside one for all."""
    return any(typing.get_origin(one) is tuple for one in typing.get_args(annotation))


def each(value: float | Sequence[float], n: int) -> list[float]:
    """One value for each of n specialists, of one for all or of as many."""
    return [float(one) for one in value] if isinstance(value, (list, tuple)) else [float(value)] * n  # type: ignore[arg-type]


def check_value(name: str, value: Any, annotation: Any, default: Any) -> None:
    """Refuse a value that its annotation does not allow."""
    if value == "auto" and default == "auto":
        return
    if annotation is Rank:
        parse_rank(value)
        return
    if is_per_model(annotation):
        for one in value if isinstance(value, tuple) else [value]:
            check_value(name, one, typing.get_args(annotation)[0], default)
        return
    try:
        TypeAdapter(annotation).validate_python(value)
    except ValidationError as error:
        if typing.get_origin(annotation) is Literal:
            raise RecipeError(
                f"{name}: {shown(value)} is none of its values; {nearest(str(value), typing.get_args(annotation))}"
            ) from None
        problem = error.errors()[0]["msg"].removeprefix("Input should be ")
        if problem.startswith(("greater", "less")):
            raise RecipeError(f"{name}: {shown(value)} is out of range; it must be {problem}") from None
        if "boolean" in problem:
            raise RecipeError(f"{name}: {shown(value)} is neither true nor false; write one of them") from None
        if "integer" in problem:
            raise RecipeError(f"{name}: {shown(value)} is not a whole number; write for example 3") from None
        raise RecipeError(
            f"{name}: {shown(value)} is not a finite number; write for example 0.25 (in YAML 1.0e-3, not 1e-3)"
        ) from None


def parse_rank(value: Any) -> int | float:
    """A rank as a recipe writes it: a whole number from 1, or {energy: f} with 0 < f < 1, which gives f."""
    if isinstance(value, dict) and list(value) == ["energy"]:
        fraction = value["energy"]
        if isinstance(fraction, (int, float)) and not isinstance(fraction, bool) and 0 < fraction < 1:
            return float(fraction)
        raise RecipeError(f"rank: energy {shown(fraction)} is not between 0 and 1; for example {{energy: 0.95}}")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise RecipeError(f"rank: {shown(value)} is not a whole number of at least 1, nor {{energy: 0.95}}")
    return value

"""What a recipe may write for a number: one, a list over the depth of the model, or some of these for names that filters match."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from modalloy.errors import RecipeError, shown

CASE = {"filter", "value"}  # the keys of one entry of a list by name
EVERYWHERE = (None, "*")  # filters that match every name


def is_case(value: Any) -> bool:
    """Whether a value is for names that a filter matches: {filter: mlp, value: 0.5}, or {value: 0.5} for all others."""
    return isinstance(value, Mapping) and "value" in value and CASE.issuperset(value)


def are_cases(value: Any) -> bool:
    """Whether values are chosen by filters, as [{filter: mlp, value: 0.5}, {value: 0}]."""
    return isinstance(value, (list, tuple)) and any(
        isinstance(one, Mapping) and not CASE.isdisjoint(one) for one in value
    )


def cases_of(value: Any) -> Sequence[Mapping[str, Any]]:
    """A value as entries by name; one that no filter chooses is for every name."""
    return value if are_cases(value) else [{"value": value}]


def matches(case: Mapping[str, Any], name: str) -> bool:
    """Whether an entry is for a tensor: its filter is part of the name."""
    wanted = case.get("filter")
    return wanted in EVERYWHERE or str(wanted) in name


def chosen_case(value: Any, name: str) -> Any:
    """The value for a tensor: that of the first entry whose filter is part of its name; None where none is."""
    if not are_cases(value):
        return value
    return next((case["value"] for case in value if matches(case, name)), None)


def filters(value: Any) -> Iterator[str]:
    """The filters of a value that choose among names."""
    for case in value if are_cases(value) else ():
        if case.get("filter") not in EVERYWHERE:
            yield case["filter"]


def followed_by(first: Any, then: Any) -> Any:
    """`first`, and for names that no filter of it matches `then`."""
    if first is None:
        return then
    if (
        then is None
        or not are_cases(first)
        or not all(is_case(one) and one.get("filter") not in EVERYWHERE for one in first)
    ):
        return first
    return [*first, *cases_of(then)]


def check_cases(name: str, value: Sequence[Any]) -> None:
    """Refuse a list by name that holds anything else than entries by name.

    Raises:
        RecipeError: naming what to write.
    """
    for case in value:
        if not is_case(case) or not isinstance(case.get("filter"), (str, type(None))) or case.get("filter") == "":
            raise RecipeError(
                f"{name}: {shown(case)} is no entry by name; write - {{filter: mlp, value: 0.5}}, and last - {{value: 0.5}} for "
                "all other names"
            )


def number_or_list(value: Any) -> float | tuple[float, ...]:
    """A finite number, or a list of them over the depth of the model; for pydantic, which reports the ValueError."""
    several = isinstance(value, (list, tuple))
    for number in value if several else [value]:
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not -1e30 < number < 1e30:
            raise ValueError(
                f"{shown(number)} is not a finite number; write for example 0.5, or [0.2, 0.8] over the depth"
            )
    if several and not value:
        raise ValueError("an empty list; give one value, or one or more over the depth of the model")
    return tuple(float(number) for number in value) if several else float(value)


def numbers(value: Any) -> Any:
    """A number, a list over the depth, or entries by name of these; for pydantic."""
    if not are_cases(value):
        return number_or_list(value)
    try:
        check_cases("by name", value)
    except RecipeError as error:
        raise ValueError(str(error)) from error
    return tuple({**case, "value": number_or_list(case["value"])} for case in value)


def is_zero(value: Any) -> bool:
    """Whether a number is 0 at every depth and for every name."""
    return not any(
        any(one["value"]) if isinstance(one["value"], (list, tuple)) else one["value"] for one in cases_of(value)
    )

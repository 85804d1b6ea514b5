"""What is varied: axes over parameters of the recipe's method and over specialists' weights, checked against its signature."""

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from modalloy.errors import ModalloyError, RecipeError, cut, nearest, shown
from modalloy.methods import METHODS
from modalloy.methods.parameters import Rank, check_value, schema
from modalloy.planning.models import labels
from modalloy.planning.plan import Plan
from modalloy.recipe import Recipe
from modalloy.senses.encoders import choose
from modalloy.settings import are_cases
from modalloy.storage.folder import read_text
from modalloy.storage.locate import is_portable
from modalloy.yaml_text import MAX_BYTES, parse_yaml

MAX_VALUES = 1_000  # of one axis: each is a merge
VARY = "--vary"
WEIGHT = "weight."  # weight.image: the factor of the image specialist's update
NUMBER = r"-?\d+(?:\.\d*)?(?:[eE]-?\d+)?|-?\.\d+"
RANGE = re.compile(rf"\s*({NUMBER}):({NUMBER}):({NUMBER})\s*")
Changes = dict[str, Any]  # axis → value: what makes a candidate of a recipe


@dataclass(frozen=True)
class Axis:
    """One parameter and the values that it may take, numbers in ascending order."""

    name: str
    values: tuple[Any, ...]

    @property
    def ordered(self) -> bool:
        """Whether neighbouring values mean neighbouring models: they are numbers."""
        return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in self.values)


def parse_axes(given: Iterable[str], recipe: Recipe, option: str = VARY) -> list[Axis]:
    """Axes from `NAME=VALUES`: values between commas, or first:last:step, the last included; or from a YAML file of them.

    `option` is what messages call what was given.

    Raises:
        RecipeError: a name that the method's signature lacks, or a value that it does not allow.
    """
    axes: dict[str, Axis] = {}
    for text in _spelled_out(given, option):
        name, separator, values = text.partition("=")
        if not (name and separator and values.strip()):
            raise RecipeError(f"{option} {cut(text)}: not of the form NAME=VALUES; write for example scale=0.1:1.0:0.1")
        if name in axes:
            raise RecipeError(f"{option} {cut(text)}: {name} is given twice; keep one")
        axes[name] = axis(name, _listed(values, text, option), recipe, option)
    return list(axes.values())


def axis(name: str, values: list[Any], recipe: Recipe, option: str = VARY) -> Axis:
    """An axis whose name and values fit the recipe's method."""
    known = schema(METHODS[recipe.merge_method].function)
    weights = [WEIGHT + label for label in labels(recipe)]
    if name not in known and name not in weights:
        raise RecipeError(
            f"{option} {cut(name)}: '{recipe.merge_method}' has no such parameter; {nearest(name, [*known, *weights])}"
        )
    if name in weights:
        if strange := [v for v in values if isinstance(v, (bool, str)) or not _is_finite(v)]:
            raise RecipeError(f"{option} {name}: {shown(strange[0])} is not a finite number; write for example 0.5,1,2")
        found = [float(value) for value in values]
    else:
        for value in values:
            check_value(name, value, *known[name])
        exact = METHODS[recipe.merge_method].is_whole(name) or known[name][0] is Rank
        found = [float(v) if isinstance(v, int) and not isinstance(v, bool) and not exact else v for v in values]
    if len(found) < 2:
        raise RecipeError(f"{option} {name}: one value leaves nothing to choose; give several, or set it in the recipe")
    if twice := [value for index, value in enumerate(found) if value in found[:index]]:
        raise RecipeError(f"{option} {name}: {shown(twice[0])} is given twice; keep one")
    made = Axis(name, tuple(found))
    return Axis(name, tuple(sorted(found))) if made.ordered else made


def default_axes(planned: Plan) -> list[Axis]:
    """λ and k of ssam: λ in steps of half its default 1/n up to 1, k the powers of two from r/4 to n·r, and r.

    α of a merge with a target: 0 to 0.6 in steps of 0.1, as AdaMMS.
    """
    recipe = planned.recipe
    if recipe.is_across and recipe.merge_method == "linear":
        return [Axis("alpha", tuple(step / 10 for step in range(7)))]
    if recipe.merge_method != "ssam":
        known = [*schema(METHODS[recipe.merge_method].function), *(WEIGHT + label for label in labels(recipe))]
        raise RecipeError(
            f"'{recipe.merge_method}' has no default search space; name one with --vary, for example "
            f"--vary {known[0]}=VALUES; it has {', '.join(known)}"
        )
    automatic = METHODS["ssam"].automatic_scale(len(planned.counted), planned.parameters)
    steps = max(4, round(2 / automatic))
    r = max(s.rank or 128 for s in planned.specialists)
    ranks = {2**power for power in range(20) if r / 4 <= 2**power <= r * len(planned.counted)} | {r}
    return [
        Axis("scale", tuple(automatic * index / 2 for index in range(1, steps + 1))),
        Axis("rank", tuple(sorted(ranks))),
    ]


def start(planned: Plan, axes: Iterable[Axis]) -> Changes:
    """The recipe's own values on the axes, "auto" worked out."""
    weights = dict(zip(labels(planned.recipe), planned.recipe.models, strict=True))
    found: Changes = {}
    for one in axes:
        if one.name.startswith(WEIGHT):
            weight = weights[one.name.removeprefix(WEIGHT)].parameters.weight
            if are_cases(weight):
                raise RecipeError(f"--vary {one.name}: its weight is chosen by filters; write one number in the recipe")
            found[one.name] = list(weight) if isinstance(weight, tuple) else weight
        else:
            value = planned.parameters[one.name]
            energy = one.name == "rank" and isinstance(value, float)
            found[one.name] = {"energy": value} if energy else value
    return found


def applied(recipe: Recipe, changes: Changes) -> Recipe:
    """The recipe with other parameters and weights."""
    content = recipe.model_dump()
    for name, value in changes.items():
        if name.startswith(WEIGHT):
            content["models"][labels(recipe).index(name.removeprefix(WEIGHT))]["parameters"]["weight"] = value
        else:
            content["parameters"][name] = value
    return Recipe(**content, folder=recipe.folder)


def relocated(recipe: Recipe, folder: Path) -> Recipe:
    """The same recipe to be read from another folder: its relative paths start there."""

    def place(location: str) -> str:
        path = Path(location).expanduser()
        if is_portable(location, recipe.folder) or path.is_absolute():
            return location
        return os.path.relpath((recipe.folder / path).resolve(), folder.resolve())

    content = recipe.model_dump()
    content["base_model"] = recipe.base_model and place(recipe.base_model)
    content["target"] = recipe.target and place(recipe.target)
    content["tokenizer"] = recipe.tokenizer and place(recipe.tokenizer)
    for entry, model in zip(content["models"], recipe.models, strict=True):
        entry["model"] = place(model.model)
        if model.encoder is not None:
            chosen = choose(model.encoder, model.modality or "image")
            if chosen.location is not None:
                named = f"{chosen.name}:{place(chosen.location)}"
                entry["encoder"] = named if isinstance(model.encoder, str) else model.encoder_at(named)
        if model.parameters.fisher is not None:
            entry["parameters"]["fisher"] = place(model.parameters.fisher)
    return Recipe(**content, folder=folder)


def _spelled_out(given: Iterable[str], option: str) -> Iterator[str]:
    """`NAME=VALUES` of every axis, those of YAML files ({scale: "0.1:1.0:0.1", rank: [2, 4]}) in their place."""
    for text in given:
        if not text.endswith((".yaml", ".yml")):
            yield text
            continue
        try:
            content = parse_yaml(read_text(Path(text), MAX_BYTES))
        except ModalloyError as error:
            raise RecipeError(f"{option} {text}: cannot be read ({error}); give a YAML file") from error
        if not isinstance(content, dict):
            raise RecipeError(f"{option} {text}: is no mapping; write for example scale: 0.1:1.0:0.1")
        for name, values in content.items():
            yield f"{name}={','.join(map(json.dumps, values)) if isinstance(values, list) else values}"


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and -1e30 < value < 1e30


def _listed(text: str, given: str, option: str) -> list[Any]:
    """The values of "a,b,c" or "first:last:step"."""
    if found := RANGE.fullmatch(text):
        first, last, step = map(Decimal, found.groups())
        if any(number and not -30 <= number.adjusted() <= 30 for number in (first, last, step)):
            raise RecipeError(f"{option} {cut(given)}: a number beyond 1e30, or below 1e-30; write smaller powers")
        if step <= 0 or last < first:
            raise RecipeError(f"{option} {cut(given)}: an empty range; write first:last:step with a positive step")
        whole = all(number == number.to_integral_value() and "." not in str(number) for number in (first, last, step))
        count = int((last - first) / step) + 1
        if count > MAX_VALUES:
            raise RecipeError(
                f"{option} {cut(given)}: {count:,} values; write a larger step, at most {MAX_VALUES:,} are tried"
            )
        return [(int if whole else float)(first + index * step) for index in range(count)]
    parts = text.split(",")
    if len(parts) > MAX_VALUES:
        raise RecipeError(f"{option} {cut(given)}: {len(parts):,} values; at most {MAX_VALUES:,} are tried")
    try:
        return [parse_yaml(part) for part in parts]
    except RecipeError as error:
        raise RecipeError(
            f"{option} {cut(given)}: cannot be read ({error}); write values between commas, or first:last:step"
        ) from error

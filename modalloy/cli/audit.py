"""The command that audits a merge of any tool: audit."""

import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modalloy.cli.options import Json, check_exists
from modalloy.cli.progress import progress
from modalloy.cli.terminal import say
from modalloy.errors import RecipeError

if TYPE_CHECKING:
    from modalloy.recipe import Recipe

Paths = list[str]


def audit(
    merged: Annotated[str, typer.Argument(help="folder of a merged model or adapter, of any tool", show_default=False)],
    base: Annotated[str, typer.Option(help="base that it was merged from", show_default=False)],
    adapter: Annotated[Paths | None, typer.Option(help="LoRA adapter that was merged; may be repeated")] = None,
    model: Annotated[Paths | None, typer.Option(help="whole model that was merged; may be repeated")] = None,
    weight: Annotated[
        list[float] | None, typer.Option(help="what each adapter, then each model, must be multiplied by, in order")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="what it must be: a recipe, modalloy's or mergekit's")] = None,
    method: Annotated[str | None, typer.Option(help="what it must be: a merging method of these sources")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="a parameter of the method; may be repeated")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="read every weight, not a sample of a large model")] = False,
    html: Annotated[Path | None, typer.Option(metavar="PAGE", help="HTML page to write", show_default=False)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing page")] = False,
    as_json: Json = False,
) -> int:
    """Is a merge, of any tool, what it is said to be? Weight by weight against base and sources; exit code 1 if not."""
    if recipe is not None:
        check_exists(recipe)
    given = {"--adapter": adapter, "--model": model, "--weight": weight, "--method": method, "--set": setting}
    if recipe is not None and (other := next((name for name, value in given.items() if value), None)):
        raise RecipeError(f"{other}: the recipe says it; give --recipe or {other}, not both")
    if setting and method is None:
        raise RecipeError("--set is of a method; add --method, or leave it out")
    from modalloy.auditing.audit import audit as run
    from modalloy.auditing.text import page, text
    from modalloy.files import new_file

    claim: Path | Recipe | None = recipe
    if method is not None:
        claim = _recipe(base, [*(adapter or ()), *(model or ())], method, setting or [], weight)
    with ExitStack() as stack:
        write = None if html is None else stack.enter_context(new_file(html, overwrite=overwrite))
        with progress("audit") as on_weight:
            found = run(
                merged,
                base=base,
                adapters=adapter or (),
                models=model or (),
                weights=None if method is not None else weight,
                recipe=claim,
                full=full,
                on_weight=on_weight,
            )
        if write is not None:
            write(page(found))
    if as_json:
        print(json.dumps(found.to_dict()))
    else:
        print(text(found))
        if html is not None:
            say(f"wrote    {html}")
    return 0 if found.ok else 1


def _recipe(base: str, models: list[str], method: str, settings: list[str], weights: list[float] | None) -> "Recipe":
    """The recipe that a method and its settings are."""
    from pydantic import ValidationError

    from modalloy.recipe import Recipe
    from modalloy.yaml_text import parse_yaml

    if not models:
        raise RecipeError("--method merges models; give --adapter or --model")
    if weights is not None and len(weights) != len(models):
        raise RecipeError(f"{len(weights)} weights for {len(models)} adapters and models; give one each")
    parameters: dict[str, Any] = {}
    for one in settings:
        name, separator, value = one.partition("=")
        if not separator or not name:
            raise RecipeError(f"--set {one}: write NAME=VALUE, for example density=0.5")
        try:
            parameters[name] = parse_yaml(value)
        except RecipeError:
            raise RecipeError(f"--set {one}: the value is not valid YAML; write for example density=0.5") from None
    entries = [
        {"model": os.path.abspath(place) if os.path.exists(place) else place}
        | ({} if weights is None else {"parameters": {"weight": weights[index]}})
        for index, place in enumerate(models)
    ]
    content = {"base_model": base, "merge_method": method, "parameters": parameters, "models": entries}
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"--method {method}: {error.errors()[0]['msg']}") from None

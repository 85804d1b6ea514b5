"""What a search writes beside its log: the chosen recipe, the figures and the page."""

import json
import os
from pathlib import Path

from modalloy.errors import OutputError
from modalloy.files import disk_errors, is_file, is_page, kind, read_file, replace_text
from modalloy.recipe import Recipe
from modalloy.search.found import Found
from modalloy.search.page import page
from modalloy.search.space import applied, relocated

CHOSEN = "# Chosen by modalloy search"  # how the recipe begins that a search writes
WRITTEN = {"recipe.yaml": CHOSEN, "search.json": '{\n "schema": ', "index.html": ""}  # and how each begins


def check_out(out: Path, inputs: list[Path]) -> None:
    """Refuse a folder in which the search would replace what it did not write."""
    for name, begin in WRITTEN.items():
        path = out / name
        if not os.path.lexists(path):
            continue
        ours = is_file(path) and read_file(path, 100).startswith(begin.encode())
        if not ours or (path.suffix == ".html" and not is_page(path)):
            raise OutputError(f"{path}: is {kind(path)} that no search wrote; move it away, or choose another folder")
        if any(given.exists() and path.samefile(given) for given in inputs):
            raise OutputError(f"{path}: is what the search is asked with, and would be replaced; choose another folder")


def write(found: Found, recipe: Recipe) -> None:
    """recipe.yaml, search.json and index.html of a finished search."""
    chosen = relocated(applied(recipe, found.chosen), found.out)
    said = ", ".join(f"{name} = {value}" for name, value in found.chosen.items())
    texts = {
        "recipe.yaml": f"{CHOSEN} ({found.settings['objective']}): {said}\n{chosen.to_yaml()}",
        "search.json": json.dumps(found.to_dict(), indent=1) + "\n",
        "index.html": page(found.to_dict()),
    }
    with disk_errors(found.out):
        for name, text in texts.items():
            replace_text(found.out / name, text)

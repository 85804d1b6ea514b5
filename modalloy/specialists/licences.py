"""What models' own cards state: their licences, and what a merge of them must heed; what they were made from. No legal advice."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modalloy.errors import CheckpointError, RecipeError, cut
from modalloy.storage.folder import is_there, read_bytes
from modalloy.storage.locate import is_hub_id
from modalloy.yaml_text import parse_yaml

CARD = "README.md"
MAX_CARD_BYTES = 1 << 20
# they ask that what is made from a work has the same licence
SAME_AGAIN = ("gpl", "agpl", "lgpl", "cc-by-sa", "cc-by-nc-sa")


def front_matter(folder: Path) -> dict[str, Any]:
    """What a model card in the folder says in its front matter; empty if there is no card, or it is damaged."""
    if not is_there(folder / CARD):
        return {}
    try:
        text = read_bytes(folder / CARD, MAX_CARD_BYTES).decode("utf-8", errors="replace")
        _, begin, rest = text.partition("---\n")
        front, end, _ = rest.partition("\n---")
        content = parse_yaml(front) if begin and end else None
    except (CheckpointError, RecipeError):
        return {}
    return content if isinstance(content, dict) else {}


def licence_of(folder: Path) -> str | None:
    """What a model card in the folder says under `license`; None if it says nothing."""
    content = front_matter(folder)
    found = content.get("license")
    found = found[0] if isinstance(found, list) and found else found
    named = content.get("license_name") if found == "other" else None
    chosen = named if isinstance(named, str) else found
    return cut(chosen.lower()) if isinstance(chosen, str) and chosen else None


def made_from(folder: Path) -> str | None:
    """The model that a card in the folder names as its base (`base_model`); None if it names none, or several."""
    found = front_matter(folder).get("base_model")
    found = found[0] if isinstance(found, list) and len(found) == 1 else found
    return found if isinstance(found, str) and is_hub_id(found) else None


def licences(parents: Sequence[tuple[str, Path]]) -> list[tuple[str, str]]:
    """Label and licence of each parent whose card states one."""
    return [(label, found) for label, folder in parents if (found := licence_of(folder)) is not None]


def heeded(found: Sequence[tuple[str, str]]) -> list[str]:
    """What a user must know of licences that do not go together, one line each."""
    said = []
    for label, licence in found:
        words = licence.replace("_", "-").split("-")
        if "nd" in words:
            said.append(f"licence: {label} is {licence}, which allows no derivatives, and a merge is one")
        elif "nc" in words or "noncommercial" in licence or {"non", "commercial"} <= set(words):
            said.append(f"licence: {label} is {licence}: what is merged from it may not be used commercially")
        if licence.startswith(SAME_AGAIN) and (other := next((one for one in found if one[1] != licence), None)):
            said.append(
                f"licence: {label} is {licence}, which asks for the same licence again, but {other[0]} is {other[1]}; read both "
                "before you publish the result"
            )
    return said

"""The licences that models' own cards state, and what a merge of them must heed. No legal advice: what the cards say."""

from collections.abc import Sequence
from pathlib import Path

from modalloy.errors import CheckpointError, RecipeError, cut
from modalloy.storage.folder import is_there, read_bytes
from modalloy.yaml_text import parse_yaml

CARD = "README.md"
MAX_CARD_BYTES = 1 << 20
# they ask that what is made from a work has the same licence
SAME_AGAIN = ("gpl", "agpl", "lgpl", "cc-by-sa", "cc-by-nc-sa")


def licence_of(folder: Path) -> str | None:
    """What the front matter of a model card in the folder says under `license`; None if there is no card, or it says nothing."""
    if not is_there(folder / CARD):
        return None
    try:
        text = read_bytes(folder / CARD, MAX_CARD_BYTES).decode("utf-8", errors="replace")
        _, begin, rest = text.partition("---\n")
        front, end, _ = rest.partition("\n---")
        content = parse_yaml(front) if begin and end else None
    except (CheckpointError, RecipeError):  # a damaged card says nothing
        return None
    found = content.get("license") if isinstance(content, dict) else None
    found = found[0] if isinstance(found, list) and found else found
    named = content.get("license_name") if isinstance(content, dict) and found == "other" else None
    chosen = named if isinstance(named, str) else found
    return cut(chosen.lower()) if isinstance(chosen, str) and chosen else None


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

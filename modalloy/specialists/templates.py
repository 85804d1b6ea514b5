"""The chat templates in models' folders, and which one a result gets."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modalloy.errors import CheckpointError
from modalloy.specialists.specialist import Specialist
from modalloy.storage.folder import is_there, read_json, reading

FILES = ("chat_template.jinja", "chat_template.json")
MAX_BYTES = 1 << 20  # of a chat template


def own_template(folder: Path) -> str | None:
    """The chat template in a folder: its chat_template.jinja or .json, else the one in tokenizer_config.json.

    Of several that have names it is the one called default.

    Raises:
        CheckpointError: the file is damaged, or what it holds is no template.
    """
    path = folder / "chat_template.jinja"
    with reading(path):
        if is_there(path):
            content = path.read_bytes()
            if len(content) > MAX_BYTES:
                raise CheckpointError(f"{path}: has {len(content)} bytes, too many for a chat template; remove it")
            try:
                return content.decode("utf-8")
            except UnicodeDecodeError as error:
                raise CheckpointError(f"{path}: is not UTF-8 text ({error}); download it again") from error
    for name in ("chat_template.json", "tokenizer_config.json"):
        if is_there(folder / name) and (
            found := _default(read_json(folder / name).get("chat_template"), folder / name)
        ):
            return found
    return None


def _default(found: Any, path: Path) -> str | None:
    if found is None or isinstance(found, str):
        return found
    if isinstance(found, list) and all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in found):
        found = {one["name"]: one.get("template") for one in found}
    if not isinstance(found, dict) or not isinstance(found.get("default", ""), str):
        raise CheckpointError(
            f"{path}: its chat_template is neither a text nor a list of named ones; download it again"
        )
    return found.get("default")


def common_template(specialists: Sequence[Specialist]) -> str | None:
    """The chat template that the specialists were trained with, None if they bring none; those that bring one must agree.

    Raises:
        CheckpointError: their templates differ, or one is damaged.
    """
    templates: dict[str, str] = {}
    for specialist in specialists:
        template = own_template(specialist.checkpoint.folder)
        if template is not None:
            templates[template] = specialist.label
    if len(templates) > 1:
        raise CheckpointError(
            f"the specialists were trained with different chat templates ({', '.join(templates.values())}); "
            "make their chat_template.jinja the same, or write output.chat_template: base to use the base's"
        )
    return next(iter(templates), None)

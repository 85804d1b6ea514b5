"""The models of a recipe: where they are, how messages call them, and which count."""

import os
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from modalloy import builtin
from modalloy.errors import CheckpointError, RecipeError, cut, nearest
from modalloy.methods import METHODS
from modalloy.recipe import Recipe
from modalloy.settings import is_zero
from modalloy.specialists.specialist import Specialist
from modalloy.storage.locate import is_hub_id, locate
from modalloy.storage.tensors import Checkpoint


def locate_specialist(location: str, folder: Path) -> Path:
    """Folder of a specialist: as `locate`, `builtin:MODALITY` for those that ship with modalloy, and `MODEL#FOLDER` for an
    adapter in a folder of a model's own."""
    whole, sign, inside = location.partition("#")
    if sign:
        root = locate(whole, folder)
        place = root / inside
        if is_hub_id(whole) and not place.exists():
            place = locate(f"{whole}/{inside}")
        if not inside or not place.is_dir() or not place.resolve().is_relative_to(root.resolve()):
            raise CheckpointError(
                f"{cut(location)}: {cut(str(root))} has no folder {cut(inside)!r}; correct the recipe"
            )
        return place
    name = location.removeprefix(builtin.PREFIX)
    if location.startswith(builtin.PREFIX):
        if not builtin.specialist(name).is_dir():
            known = [builtin.PREFIX + modality for modality in builtin.specialists()]
            raise CheckpointError(f"no built-in specialist '{location}'; {nearest(location, known)}")
        return builtin.specialist(name)
    return locate(location, folder)


def labels(recipe: Recipe) -> list[str]:
    """How messages call the specialists: the modality, else the folder's name; numbered where that is not unique."""
    places = [Path(entry.model.removeprefix(builtin.PREFIX).replace("#", "/")) for entry in recipe.models]
    names = [entry.modality or place.name for entry, place in zip(recipe.models, places, strict=True)]
    taken = Counter([*names, "base", base_label(recipe)])  # the plan and the manifest call the base so
    return [name if taken[name] == 1 else f"{name}#{index + 1}" for index, name in enumerate(names)]


def base_label(recipe: Recipe) -> str:
    """What messages call the model that updates are added to."""
    return "base" if recipe.target is None else "target"


def absent_models(
    recipe: Recipe, specialists: Sequence[Specialist], base: Checkpoint | None, idle: Collection[str]
) -> dict[int, str]:
    """Why a model of the recipe does not count, by its index.

    Raises:
        RecipeError: none counts.
    """
    reasons = {}
    counts = METHODS[recipe.merge_method].lets_base_count(recipe.parameters)  # the base, as any other model
    whole: dict[Path, str] = {}  # multimodal models, which several entries may take senses of
    for index, (entry, specialist) in enumerate(zip(recipe.models, specialists, strict=True)):
        weight = entry.parameters.weight
        is_base = (
            specialist.is_whole and base is not None and os.path.samefile(specialist.checkpoint.folder, base.folder)
        )
        if is_base and not counts:
            reasons[index] = "is the base itself, which is no specialist"
        elif is_zero(weight):
            reasons[index] = "its weight is 0"
        elif specialist.native is not None and specialist.is_whole and specialist.folder.resolve() in whole:
            reasons[index] = f"is {whole[specialist.folder.resolve()]}'s model, which counts once"
        elif specialist.label in idle:
            reasons[index] = "changes nothing: every update is zero"
        if specialist.native is not None and specialist.is_whole:
            whole.setdefault(specialist.folder.resolve(), specialist.label)
    if len(reasons) == len(specialists):
        listed = "; ".join(f"{specialists[index].label}: {reason}" for index, reason in reasons.items())
        raise RecipeError(f"nothing would be merged ({listed}); give models that were trained from the base")
    return reasons

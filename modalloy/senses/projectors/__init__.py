"""Projectors: from an encoder's features to the decoder's width, with the published names of their tensors.

A projector's class gives `settings(shapes)` (its keywords, from the names and shapes of published tensors), `own_name`
(its state dict's key for a published name), `n_tokens` (how many tokens n features become), `dim` and `width` (of both).
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from modalloy.errors import CheckpointError, shown

MAX_SIZE = 1 << 24  # of a layer, or number of layers or entries

# type → module:class, tried in this order
PROJECTORS = {
    "mlp": "modalloy.senses.projectors.mlp:Mlp",
    "qformer": "modalloy.senses.projectors.qformer:QFormer",
    "reader": "modalloy.senses.projectors.reader:Reader",
    "embedding_table": "modalloy.senses.projectors.embedding_table:EmbeddingTable",
}
NAMED = ("reader", "embedding_table")  # whose tensors do not say how they are used: a config may name no other


def recognise(shapes: Mapping[str, tuple[int, ...]], label: str) -> dict[str, Any]:
    """The settings, with their `type`, of the projector that has tensors of these published names and shapes."""
    if empty := sorted(name for name, shape in shapes.items() if 0 in shape):
        raise CheckpointError(
            f"{label} specialist: its projector's {empty[0]} is {tuple(shapes[empty[0]])}, which holds no number; the file is "
            "damaged: download it again"
        )
    reasons = []
    for name in PROJECTORS:
        try:
            return {"type": name, **projector_class(name).settings(shapes)}
        except ValueError as error:
            reasons.append(f"{name}: {error}")
    raise CheckpointError(
        f"{label} specialist: its projector is of no known kind ({'; '.join(reasons)}); use a checkpoint of ModelCompose's "
        "or LLaVA's layout"
    )


def build_projector(settings: dict[str, Any], *, meta: bool = False) -> Any:
    """The projector of `settings`, with weights yet to be loaded; `meta`: without memory for them.

    Raises:
        CheckpointError: the settings, which a config gives, are of no known type, or are not that type's sizes.
    """
    kind, sizes = settings.get("type"), {key: value for key, value in settings.items() if key != "type"}
    made = projector_class(kind)
    parameters = inspect.signature(made).parameters
    for key, value in sizes.items():
        several = key in parameters and parameters[key].annotation == list[int]
        every = value if several else [value]
        if not (isinstance(every, list) and every and all(map(_is_size, every))):
            raise CheckpointError(
                f"config.json: {shown(key)} of a projector is {shown(value)}, not a size up to {MAX_SIZE}"
            )
    try:
        with torch.device("meta") if meta else nullcontext():  # of a model that is being loaded: as its other parts
            return made(**sizes)
    except TypeError as error:
        raise CheckpointError(
            f"config.json: the settings of a projector of type {kind} are not its own ({error})"
        ) from error


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and value is not True and 0 < value <= MAX_SIZE


def dimensions(shapes: Mapping[str, tuple[int, ...]], name: str, count: int) -> tuple[int, ...]:
    """The shape of a tensor of `count` dimensions; ValueError if there is none of that name, or it has others."""
    if name not in shapes:
        raise ValueError(f"it has no {name}")
    if len(shapes[name]) != count:
        raise ValueError(f"{name} is {tuple(shapes[name])}, not of {count} dimensions")
    return tuple(shapes[name])


def check_shapes(
    projector: type[nn.Module],
    keywords: dict[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    published: Callable[[str], str] = str,
) -> None:
    """Refuse, with a ValueError that names the first, tensors that are not those that this projector would have.

    `published`: the name in `shapes` of a key of the projector's state dict.
    """
    with torch.device("meta"):
        wanted = {published(name): tuple(tensor.shape) for name, tensor in projector(**keywords).state_dict().items()}
    found = {name: tuple(shape) for name, shape in shapes.items()}
    if wrong := sorted(name for name in wanted | found if wanted.get(name) != found.get(name)):
        raise ValueError(f"{wrong[0]} is {found.get(wrong[0], 'missing')}, not {wanted.get(wrong[0], 'known')}")


def projector_class(name: Any) -> Any:
    """The class of a projector's type: an `nn.Module` with `settings`, `own_name` and `n_tokens`."""
    if not isinstance(name, str) or name not in PROJECTORS:
        raise CheckpointError(f"config.json: a projector of type {shown(name)}; known are {', '.join(PROJECTORS)}")
    module, _, attribute = PROJECTORS[name].partition(":")
    found: type[nn.Module] = getattr(importlib.import_module(module), attribute)
    return found

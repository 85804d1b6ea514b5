"""One tensor under the names that checkpoints, trainers and wrappers have for it.

Wrappers (torch.compile, FSDP, activation checkpointing, DDP) leave words in names; transformers renamed the parts of its
multimodal models more than once. Names of one model are brought to one form here, by rules that need no config; where
these do not tell, by transformers' own renamings.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modalloy.errors import CheckpointError, RecipeError
from modalloy.senses.anatomy import anatomy, native_class_name, own_names
from modalloy.storage.config import read_config
from modalloy.storage.folder import is_there
from modalloy.storage.tensors import Checkpoint

WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_flat_param_module)\."
)
OUTERMOST = "module."  # of DataParallel and DDP, where every name has it
PARTS = ("layers.", "embed_tokens.", "norm.")  # of a decoder that "model." stands before


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Each name without what wrappers left in it.

    Raises:
        CheckpointError: two names are one without it.
    """
    listed = list(names)
    outer = bool(listed) and all(WRAPPERS.sub("", name).startswith(OUTERMOST) for name in listed)
    found: dict[str, str] = {}
    taken: dict[str, str] = {}
    for name in listed:
        plain = WRAPPERS.sub("", name)
        plain = plain.removeprefix(OUTERMOST) if outer else plain
        if plain in taken:
            raise CheckpointError(f"{name} and {taken[plain]} are two names of one tensor; keep one of them")
        taken[plain] = name
        found[name] = plain
    return found


def canonical(name: str) -> str:
    """A name of a language model, or of a multimodal one, in the form that is the same in every spelling.

    The decoder is `decoder.`, its head `lm_head.`; everything else stands without "model.".
    """
    for prefix in (
        "language_model.model.",
        "model.language_model.model.",
        "model.language_model.",
        "model.text_model.",
    ):
        if name.startswith(prefix):
            return "decoder." + name.removeprefix(prefix)
    for prefix in ("language_model.lm_head.", "model.language_model.lm_head."):
        if name.startswith(prefix):
            return "lm_head." + name.removeprefix(prefix)
    if name.startswith("language_model."):
        return "decoder." + name.removeprefix("language_model.")
    if name.startswith("model."):
        inner = name.removeprefix("model.")
        return f"decoder.{inner}" if inner.startswith(PARTS) else inner
    return name


def towers_of(base: Checkpoint, config: Mapping[str, Any]) -> set[str]:
    """The tensors of a multimodal base that are no part of its decoder.

    Raises:
        RecipeError: it has none.
    """
    found = {name for name in base.refs if not canonical(name).startswith(("decoder.", "lm_head."))}
    if native_class_name(config) is None or not found:
        raise RecipeError(
            f"towers: keep is of a multimodal base, but {base.folder.name} has nothing beside its decoder; leave it out"
        )
    return found


def places_in(base: Checkpoint, base_config: Mapping[str, Any], names: Sequence[str], folder: Path) -> dict[str, str]:
    """The base's name of each tensor that a model or an adapter of it spells otherwise; names of the base stand for themselves.

    `folder`: of the model, or of the base for what an adapter updates. Names that belong nowhere are left out.

    Raises:
        CheckpointError: a tensor is stored in another form than the base's class has it.
    """
    wanted = [name for name in names if name not in base.refs]
    if not wanted:
        return {}
    known: dict[str, list[str]] = {}
    for name in base.refs:
        known.setdefault(canonical(name), []).append(name)
    found = {name: places[0] for name in wanted if len(places := known.get(canonical(name), [])) == 1}
    left = [name for name in wanted if name not in found]
    kind = native_class_name(base_config)
    if not left or kind is None or not is_there(folder / "config.json"):
        return found
    config = read_config(folder)
    if native_class_name(config) != kind:
        return found
    try:
        files = {own: file for file, own in own_names(anatomy(base_config, base.folder), base.refs).items()}
        theirs = own_names(anatomy(config, folder), left)
    except CheckpointError:  # what its config does not say, no name tells: unknown tensors are refused by name
        return found
    return found | {name: files[own] for name, own in theirs.items() if own in files}


def module_names(base: Checkpoint, base_config: Mapping[str, Any]) -> dict[str, str]:
    """The name that transformers' module has for each tensor of a multimodal base, where the file's is another.

    That is what PEFT calls a weight, whatever the spelling of the files. Empty for other models, and for a config that makes
    no model of its class.
    """
    if native_class_name(base_config) is None:
        return {}
    try:
        own = own_names(anatomy(base_config, base.folder), base.refs)
    except CheckpointError:
        return {}
    return {file: name for file, name in own.items() if file != name}

"""A model's `config.json`: the types of what is read from it are checked when it is read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from modalloy.errors import CheckpointError, shown
from modalloy.storage.folder import read_json

NESTED = ("text_config", "llm_config")  # the decoder's part of a multimodal model's config


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


SIZE = (_is_size, "a positive whole number")
# key → whether a value fits, and what it must be; null counts as absent
TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "hidden_size": SIZE,
    "num_hidden_layers": SIZE,
    "num_attention_heads": SIZE,
    "vocab_size": SIZE,
    "model_type": (_is_text, "a text"),
    "tie_word_embeddings": (_is_flag, "true or false"),
    "architectures": (lambda value: isinstance(value, list) and all(map(_is_text, value)), "a list of texts"),
    **dict.fromkeys(NESTED, (lambda value: isinstance(value, dict), "a table")),
}


def read_config(folder: Path) -> dict[str, Any]:
    """The config of the model in a folder.

    Raises:
        CheckpointError: it is missing or damaged, or one of TYPES is of another type.
    """
    path = folder / "config.json"
    config = read_json(path)
    _check_types(config, path, "")
    for name in NESTED:
        if config.get(name):
            _check_types(config[name], path, f"{name}.")
    return config


def config_size(config: dict[str, Any], key: str, folder: Path) -> int:
    """A size that the config of the model in `folder` must have."""
    size: Any = config.get(key)
    if not _is_size(size):
        raise CheckpointError(f"{folder / 'config.json'}: {key} is {shown(size)}, not {SIZE[1]}; correct the file")
    return int(size)


def _check_types(config: dict[str, Any], path: Path, within: str) -> None:
    for key, (fits, wanted) in TYPES.items():
        if config.get(key) is not None and not fits(config[key]):
            raise CheckpointError(f"{path}: {within}{key} is {shown(config[key])}, not {wanted}; correct the file")

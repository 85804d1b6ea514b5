"""Modality encoders: one file each, frozen, found by name. A new one is one file and one line in ENCODERS.

A package of its own adds one by an entry point in the group `modalloy.encoders`; a modality that no other encoder has
becomes known by that (see examples/fifth_modality).
"""

import importlib
import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modalloy.builtin import PACKAGES
from modalloy.errors import CheckpointError, RecipeError, cut, nearest, plain, ran_out_of_memory
from modalloy.names import MODALITIES
from modalloy.senses.anatomy import check_counts, faults

# name → module:class
ENCODERS = {
    "beats": "modalloy.senses.encoders.beats:Beats",
    "builtin:efficientnet-lite0": "modalloy.senses.encoders.efficientnet_lite0:EfficientNetLite0",
    "builtin:efficientnet-lite0-layers": "modalloy.senses.encoders.efficientnet_lite0_layers:EfficientNetLite0Layers",
    "builtin:efficientnet-lite0-motion": "modalloy.senses.encoders.efficientnet_lite0_motion:EfficientNetLite0Motion",
    "builtin:efficientnet-lite0-video": "modalloy.senses.encoders.efficientnet_lite0_video:EfficientNetLite0Video",
    "builtin:depth-views": "modalloy.senses.encoders.depth_views:DepthViews",
    "builtin:whisper-tiny.en-speech": "modalloy.senses.encoders.whisper_speech:WhisperSpeech",
    "builtin:whisper-tiny.en": "modalloy.senses.encoders.whisper_tiny:WhisperTiny",
    "clip": "modalloy.senses.encoders.clip:Clip",
    "languagebind": "modalloy.senses.encoders.languagebind:LanguageBindVideo",
    "pointbert": "modalloy.senses.encoders.pointbert:PointBert",
}
# what opens a path or hub id that no name stands before: the encoders of the paper (SSAM; ModelCompose)
PUBLISHED: dict[str, str] = {"image": "clip", "audio": "beats", "video": "languagebind", "point": "pointbert"}


class Encoder(nn.Module):
    """A frozen encoder: features (media, n_tokens, dim) of media that `preprocess` has read.

    The constructor builds the architecture from JSON-able keywords alone, whose defaults are the published ones, reads no
    file, and works on torch's meta device; so there are no buffers but those that the state dict holds.
    """

    modality: ClassVar[str]  # the house's name: image, audio, video, point, or a new one
    dim: int  # width of a feature
    n_tokens: int  # features of one medium

    @classmethod
    def settings(cls, location: Path | None) -> dict[str, Any]:
        """The constructor's keywords that the published files at `location` record."""
        return {}

    @classmethod
    def weights(cls, location: Path | None) -> dict[str, Tensor]:
        """Every tensor of the published files at `location` by its key in `state_dict()`; others are refused by name."""
        return {}

    def preprocess(self, medium: Any) -> Tensor:
        """What `forward` takes of one medium (a file, or an object in memory). Uses no weights.

        Raises:
            MediaError: the medium is unreadable, empty or of another shape.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class EncoderChoice:
    """An encoder as a recipe or a config names it: which class, where its files are, and its settings."""

    name: str  # in ENCODERS
    location: str | None = None  # path or hub id of its weights, None where a package holds them
    options: dict[str, Any] = field(default_factory=dict)  # keywords of the recipe, which win over the files'

    def settings(self, path: Path | None) -> dict[str, Any]:
        """All keywords of the constructor, with what the files at `path` record."""
        found = {**_loaded(encoder_class(self.name).settings, self.name, path), **self.options}
        known = list(inspect.signature(encoder_class(self.name)).parameters)
        for key in found:
            if key not in known:
                raise RecipeError(f"encoder '{self.name}' has no option '{key}'; {nearest(key, known)}")
        return found


def choose(given: str | Mapping[str, Any], modality: str) -> EncoderChoice:
    """The encoder that a recipe's `encoder:` means for a modality.

    `name`, `name:location`, or a location alone, which the published encoder of that modality opens; or a mapping with
    `path`, which is one of these, and options of the encoder.
    """
    options = {} if isinstance(given, str) else {key: value for key, value in given.items() if key != "path"}
    location = given if isinstance(given, str) else given.get("path")
    if not isinstance(location, str) or not location:
        raise RecipeError(f"encoder of '{modality}': give a location, or {{path: LOCATION, OPTION: VALUE}}")
    known = registered()
    name = next((name for name in known if location == name or location.startswith(f"{name}:")), None)
    rest: str | None = location
    if name is not None:
        rest = location.removeprefix(name).removeprefix(":") or None
    elif location.startswith("builtin:") or modality not in PUBLISHED:
        raise RecipeError(f"no encoder '{location}'; {nearest(location, known)}")
    else:
        name = PUBLISHED[modality]
    found = encoder_class(name).modality
    if found != modality:
        raise RecipeError(f"encoder '{location}' is of modality '{found}', not '{modality}'; name another")
    return EncoderChoice(name, rest, options)


def build(name: str, settings: dict[str, Any], *, meta: bool = False) -> Encoder:
    """The encoder's architecture in eval mode, frozen; `meta`: without memory for its weights.

    Raises:
        CheckpointError: the settings, which a config gives, are not this encoder's.
    """
    made = encoder_class(name)
    check_counts(settings, f"encoder '{name}'")
    try:
        inspect.signature(made).bind(**settings)
        with torch.device("meta") if meta else nullcontext():  # of a model that is being loaded: as its other parts
            encoder: Encoder = _loaded(made, name, **settings)
    except faults() as error:
        if ran_out_of_memory(error):
            raise
        raise CheckpointError(f"the settings of encoder '{name}' are not its own ({plain(error)})") from error
    return encoder.requires_grad_(False).eval()


def sizes(name: str, settings: dict[str, Any]) -> tuple[int, int]:
    """(dim, n_tokens) of an encoder; it is built only if these depend on its settings."""
    found: Any = encoder_class(name)
    if not (hasattr(found, "dim") and hasattr(found, "n_tokens")):
        found = build(name, settings, meta=True)
    return found.dim, found.n_tokens


def load_encoder(name: str, path: Path | None = None) -> Encoder:
    """A built-in encoder, or one with its files at `path`, with its weights: frozen, in eval mode, float32."""
    encoder = build(name, EncoderChoice(name).settings(path))
    encoder.load_state_dict(encoder_weights(name, path))
    return encoder


def encoder_weights(name: str, path: Path | None) -> dict[str, Tensor]:
    """The published tensors of an encoder by its own keys."""
    weights: dict[str, Tensor] = _loaded(encoder_class(name).weights, name, path)
    return weights


def modalities() -> tuple[str, ...]:
    """Every known modality: the house's four, then those of encoders that other packages bring."""
    others = (encoder_class(name).modality for name in registered() if name not in ENCODERS)
    return tuple(dict.fromkeys((*MODALITIES, *sorted(others))))


def registered() -> dict[str, str]:
    """All encoders by name: those here and those of entry points; longer names first where one begins another."""
    found = ENCODERS | {point.name: point.value for point in _entry_points()}
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def encoder_class(name: str) -> type[Encoder]:
    """The class of a registered encoder."""
    known = registered()
    if name not in known:
        raise CheckpointError(f"no encoder '{cut(name)}'; {nearest(name, known)}")
    module, _, attribute = known[name].partition(":")
    found: type[Encoder] = getattr(importlib.import_module(module), attribute)
    return found


@cache
def _entry_points() -> tuple[Any, ...]:
    return tuple(entry_points(group="modalloy.encoders"))


def _loaded(call: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """What `call` gives; a package that it lacks is named with the way to get it."""
    try:
        return call(*args, **kwargs)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("modalloy"):
            raise
        raise CheckpointError(
            f"encoder '{name}' needs the package {error.name}, which is not installed; "
            f"run `pip install --no-deps {' '.join(PACKAGES)}`"
        ) from error

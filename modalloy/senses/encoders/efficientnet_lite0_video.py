"""Eight frames of a video through EfficientNet-Lite0: four 2560-dimensional features, one for each quarter of the time.

A token holds what is seen in its two frames (their mean) and how it changes (the second minus the first).
"""

from typing import Any

import torch
from torch import Tensor

from modalloy.senses.encoders.efficientnet_lite0 import EfficientNetLite0
from modalloy.senses.media import video_frames

FRAMES = 8


class EfficientNetLite0Video(EfficientNetLite0):
    """`preprocess(file or frames)` → (8, 3, 160, 160); `forward((batch, 8, 3, 160, 160))` → (batch, 4, 2560)."""

    modality = "video"
    dim = 2 * EfficientNetLite0.dim
    size = 160

    def preprocess(self, video: Any) -> Tensor:
        """A file name or uint8 frames (any number, height, width, 3), eight of them evenly sampled, each like a picture."""
        from PIL import Image

        frames = video_frames(video, FRAMES)
        return torch.stack([super(EfficientNetLite0Video, self).preprocess(Image.fromarray(frame)) for frame in frames])

    def forward(self, frames: Tensor) -> Tensor:
        pooled = self.backbone.extract_features(frames.flatten(0, 1)).mean((2, 3))
        first, second = pooled.unflatten(0, (-1, self.n_tokens, 2)).unbind(2)  # (batch, 4, 1280) each
        return torch.cat([(first + second) / 2, second - first], -1)

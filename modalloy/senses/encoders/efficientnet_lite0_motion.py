"""Eight frames of a video through EfficientNet-Lite0: four features, one for each quarter of the time, that tell motion too.

Means over a frame's places cannot tell left from right. So a feature holds what is seen in its two frames (their mean), how that
changes (the second minus the first), and where something is seen in each of all eight frames: how strongly each of 16 places
answers.
"""

import torch
from torch import Tensor

from modalloy.senses.encoders.efficientnet_lite0 import EfficientNetLite0
from modalloy.senses.encoders.efficientnet_lite0_video import FRAMES, EfficientNetLite0Video

PLACES = 16  # of a frame of 128 pixels: 4 × 4


class EfficientNetLite0Motion(EfficientNetLite0Video):
    """`preprocess(file or frames)` → (8, 3, 128, 128); `forward((batch, 8, 3, 128, 128))` → (batch, 4, 2688)."""

    dim = 2 * EfficientNetLite0.dim + FRAMES * PLACES
    size = 128

    def forward(self, frames: Tensor) -> Tensor:
        features = self.backbone.extract_features(frames.flatten(0, 1))  # (batch · 8, 1280, 4, 4)
        pooled = features.mean((2, 3)).unflatten(0, (-1, self.n_tokens, 2))
        first, second = pooled.unbind(2)  # (batch, 4, 1280) each
        strength = features.pow(2).mean(1).sqrt().flatten(1)  # (batch · 8, 16)
        where = (strength / strength.mean(1, keepdim=True)).unflatten(0, (-1, FRAMES)).flatten(1)
        return torch.cat([(first + second) / 2, second - first, where[:, None].expand(-1, self.n_tokens, -1)], -1)

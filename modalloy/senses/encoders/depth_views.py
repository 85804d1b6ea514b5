"""Depth maps of a point cloud through EfficientNet-Lite0: six 1280-dimensional features, one for each view.

An image classifier that never saw a depth map still tells shapes apart by them; nothing here is trained. Rendering
point clouds for an image encoder is the idea of MVCNN (Su et al. 2015) and PointCLIP (Zhang et al. 2022).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modalloy.senses.encoders.efficientnet_lite0 import MEAN, STD, EfficientNetLite0
from modalloy.senses.media import check_points, load_points

VIEWS = ((0, 10), (40, 20), (90, 10), (140, 20), (180, 10), (0, 75))  # degrees: around the vertical axis, from above


class DepthViews(EfficientNetLite0):
    """`preprocess(file or points (n, 3 or more))` → (6, 96, 96) depths; `forward((batch, 6, 96, 96))` → (batch, 6, 1280)."""

    modality = "point"
    n_tokens = len(VIEWS)

    def preprocess(self, points: Any) -> Tensor:
        """A file name or points (n, 3 or more), y up, as depth maps (6, 96, 96): near is dark."""
        points = load_points(points) if isinstance(points, (str, Path)) else check_points(np.asarray(points))
        return depth_maps(points[:, :3], VIEWS)

    def forward(self, depths: Tensor) -> Tensor:
        pictures = nn.functional.interpolate(depths, self.size, mode="bilinear").flatten(0, 1)  # (batch · 6, 224, 224)
        mean, std = (torch.tensor(c, device=depths.device).view(3, 1, 1) for c in (MEAN, STD))
        features = self.backbone.extract_features((pictures.unsqueeze(1) - mean) / std)
        return features.mean((2, 3)).unflatten(0, (-1, self.n_tokens))


def depth_maps(points: np.ndarray, views: tuple[tuple[float, float], ...], size: int = 96) -> Tensor:
    """Orthographic depth maps (views, size, size) of points (n, 3), y up, whose box is centred and scaled to fit.

    A view is (angle around the vertical axis, angle from above), in degrees. Depths are 0 at the nearest possible point
    (black), 0.8 at the farthest, 1 where there is none; every point covers 5 × 5 pixels, and edges are drawn in by one.
    """
    xyz = torch.from_numpy(np.ascontiguousarray(points, np.float32))
    xyz = xyz - (xyz.amax(0) + xyz.amin(0)) / 2
    xyz = xyz / xyz.norm(dim=1).max().clamp_min(1e-9)
    maps = []
    for around, above in views:
        x, y, z = (xyz @ rotation(around, above).T).unbind(1)
        columns = ((0.92 * x + 1) / 2 * (size - 1)).round().long()
        rows = ((1 - 0.92 * y) / 2 * (size - 1)).round().long()
        nearness = torch.zeros(size * size).scatter_reduce(0, rows * size + columns, 0.6 + 0.4 * z, "amax")
        maps.append(nearness.unflatten(0, (size, size)))
    covered = nn.functional.max_pool2d(torch.stack(maps).unsqueeze(1), 5, stride=1, padding=2)
    return 1 + nn.functional.max_pool2d(-covered, 3, stride=1, padding=1).squeeze(1)


def rotation(around: float, above: float) -> Tensor:
    """Matrix (3, 3) that turns points so that the viewer looks along −z."""
    a, b = np.deg2rad(around), np.deg2rad(above)
    turn = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
    tilt = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    return torch.from_numpy((tilt @ turn).astype(np.float32))

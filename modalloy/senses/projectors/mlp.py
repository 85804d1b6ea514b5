"""LLaVA's projectors `linear` and `mlp2x_gelu` (any depth), as ModelCompose uses them for images, videos and point clouds."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from torch import nn

from modalloy.senses.projectors import check_shapes, dimensions


class Mlp(nn.Sequential):
    """Linear layers with exact GELU between them: (media, n, widths[0]) → (media, n, widths[-1]).

    Published names are `0.weight`, `0.bias`, `2.weight`, …, those of `linear` (one layer) just `weight` and `bias`.
    """

    def __init__(self, widths: list[int]) -> None:
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.GELU()]
        super().__init__(*layers[:-1])
        self.dim, self.width = widths[0], widths[-1]

    @classmethod
    def settings(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """{"widths": …} from the weights' shapes; ValueError if they are not a chain of linear layers."""
        found = {cls.own_name(name): tuple(shape) for name, shape in shapes.items()}
        widths = [dimensions(found, "0.weight", 2)[1]]
        while (name := f"{2 * (len(widths) - 1)}.weight") in found:
            widths.append(dimensions(found, name, 2)[0])
        check_shapes(cls, {"widths": widths}, found)
        return {"widths": widths}

    @staticmethod
    def own_name(published: str) -> str:
        """The state dict's key of a published tensor."""
        return f"0.{published}" if published in ("weight", "bias") else published

    @staticmethod
    def n_tokens(n_features: int) -> int:
        """One token a feature."""
        return n_features

"""Ovis's projector: a feature is told apart as entries of a table, and becomes the mean of their embeddings.

A linear head gives each feature a probability of every entry, and the token is the entries' embeddings weighted by them
(Lu et al., "Ovis: Structural Embedding Alignment for Multimodal Large Language Model", arXiv 2405.20797, equations 2 and 3).
Here there may be several tables, as of what is seen and how it moves; the token is then the mean of what each gives.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modalloy.senses.projectors import check_shapes, dimensions


class EmbeddingTable(nn.Module):
    """Features (media, n, dim) → (media, n, width). `heads.I` tells the entries of `tables.I` apart.

    Args:
        dim: width of a feature.
        width: of the embeddings, which is the decoder's.
        entries: how many embeddings each table has.
    """

    def __init__(self, dim: int, width: int, entries: list[int]) -> None:
        super().__init__()
        self.dim, self.width = dim, width
        self.heads = nn.ModuleList(nn.Linear(dim, count) for count in entries)
        self.tables = nn.ModuleList(nn.Embedding(count, width) for count in entries)

    def forward(self, x: Tensor) -> Tensor:
        made = [self.told(x, place) @ table.get_parameter("weight") for place, table in enumerate(self.tables)]
        return torch.stack(made).mean(0)

    def told(self, x: Tensor, place: int) -> Tensor:
        """(media, n, entries): the probability of each entry of one table."""
        return torch.softmax(self.heads[place](x), -1)

    @classmethod
    def settings(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """{"dim": …, "width": …, "entries": …} from the weights' shapes; ValueError if they are no heads and tables."""
        _, dim = dimensions(shapes, "heads.0.weight", 2)
        tables = [dimensions(shapes, "tables.0.weight", 2)]
        while (name := f"tables.{len(tables)}.weight") in shapes:
            tables.append(dimensions(shapes, name, 2))
        found: dict[str, Any] = {"dim": dim, "width": tables[0][1], "entries": [count for count, _ in tables]}
        check_shapes(cls, found, shapes)
        return found

    @staticmethod
    def own_name(published: str) -> str:
        """The state dict's key of a published tensor."""
        return published

    @staticmethod
    def n_tokens(n_features: int) -> int:
        """One token a feature."""
        return n_features

"""A Q-Former that reads speech: what each query gives is taken for the entries of a table that it is like.

The table holds embeddings of the tokens that can be said. A token is their mean, weighted by a softmax of their cosines with
what the query gives (the probabilistic tokens of Ovis, arXiv 2405.20797, behind BLIP-2's Q-Former), so that the decoder meets
embeddings that it knows. Merged models answered 0.95 to 0.98 of spoken questions about named things so, and 0.90 to 0.92
with what the queries give itself (100 questions each, validation).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modalloy.senses.projectors import dimensions
from modalloy.senses.projectors.qformer import QFormer

SHARPNESS = 2 / 0.07  # of the softmax: twice that of training


class Reader(QFormer):
    """(media, n, dim) → (media, n_queries, width); `table.weight` is (entries, width), the rest is `QFormer`'s."""

    def __init__(self, *, entries: int, **sizes: int) -> None:
        super().__init__(**sizes)
        self.table = nn.Embedding(entries, self.width)

    def forward(self, features: Tensor) -> Tensor:
        table = self.table.weight
        like = nn.functional.normalize(self.queried(features), dim=-1) @ nn.functional.normalize(table, dim=-1).T
        return torch.softmax(SHARPNESS * like, -1) @ table

    def queried(self, features: Tensor) -> Tensor:
        """What the queries give, (media, n_queries, width)."""
        return super().forward(features)

    @classmethod
    def settings(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """The constructor's keywords, from the shapes of the published tensors; ValueError if they are no reader's."""
        table = dimensions(shapes, "table.weight", 2)
        found = QFormer.settings({name: shape for name, shape in shapes.items() if name != "table.weight"})
        if table[1] != found["width"]:
            raise ValueError(f"table.weight is {table}, not (entries, {found['width']})")
        return {"entries": table[0], **found}

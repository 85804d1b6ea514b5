"""ModelCompose's audio projector `qformer_32N_2L`: a Q-Former whose queries read a medium's features, then a linear layer.

Li et al., "BLIP-2", arXiv 2301.12597; Zhang et al., "Video-LLaMA", arXiv 2306.02858; Chen et al., arXiv 2402.12750.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from modalloy.errors import CheckpointError
from modalloy.senses.projectors import check_shapes, dimensions

# how a published name begins, and how ours does instead
OWN = {
    "audio_query_tokens": "queries",
    "audio_position_embedding.": "positions.",
    "audio_Qformer.bert.embeddings.LayerNorm.": "qformer.layernorm.",
    "audio_Qformer.bert.encoder.": "qformer.encoder.",
    "audio_llama_proj.": "linear.",
}
LAYERS = "audio_Qformer.bert.encoder.layer."
HEAD_WIDTH = 64
MAX_LAYERS = 100  # each takes time to build; published ones have two


class QFormer(nn.Module):
    """(media, n, dim) → (media, n_queries, width): features with learned positions, read by cross-attention in every layer.

    `hidden` and `ffn` are widths inside the Q-Former; n may be up to `n_positions`.
    """

    def __init__(
        self,
        *,
        n_queries: int = 32,
        n_layers: int = 2,
        n_positions: int = 1024,
        dim: int = 768,
        hidden: int = 768,
        heads: int = 12,
        ffn: int = 3072,
        width: int = 4096,
    ) -> None:
        super().__init__()
        if heads != max(1, hidden // HEAD_WIDTH) or n_layers > MAX_LAYERS:
            raise CheckpointError(
                f"config.json: a Q-Former of width {hidden} with {heads} heads and {n_layers} layers; published heads are "
                f"{HEAD_WIDTH} wide, and layers at most {MAX_LAYERS}"
            )
        self.dim, self.width, self.n_queries, self.n_positions = dim, width, n_queries, n_positions
        self.queries = nn.Parameter(torch.zeros(1, n_queries, hidden))
        self.positions = nn.Embedding(n_positions, dim)
        config = Blip2QFormerConfig(
            hidden_size=hidden,
            num_hidden_layers=n_layers,
            num_attention_heads=heads,
            intermediate_size=ffn,
            encoder_hidden_size=dim,
            cross_attention_frequency=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.qformer = Blip2QFormerModel(config)
        self.linear = nn.Linear(hidden, width)

    @classmethod
    def settings(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """The constructor's keywords, from the shapes of the published tensors; ValueError if they are no Q-Former's.

        The number of heads shows in no shape: as published, they are 64 wide (one head if `hidden` is less than that).
        """
        _, n_queries, hidden = dimensions(shapes, "audio_query_tokens", 3)
        n_positions, dim = dimensions(shapes, "audio_position_embedding.weight", 2)
        ffn, _ = dimensions(shapes, f"{LAYERS}0.intermediate_query.dense.weight", 2)
        width, _ = dimensions(shapes, "audio_llama_proj.weight", 2)
        settings = {
            "n_queries": n_queries,
            "n_layers": len(
                {name.removeprefix(LAYERS).partition(".")[0] for name in shapes if name.startswith(LAYERS)}
            ),
            "n_positions": n_positions,
            "dim": dim,
            "hidden": hidden,
            "heads": max(1, hidden // HEAD_WIDTH),
            "ffn": ffn,
            "width": width,
        }
        if min(settings.values()) < 1 or hidden % settings["heads"] or settings["n_layers"] > MAX_LAYERS:
            raise ValueError(f"its sizes {settings} are impossible")
        check_shapes(cls, settings, shapes, published_name)
        return settings

    @staticmethod
    def own_name(published: str) -> str:
        """The state dict's key of a published tensor; a name that begins like none of them stays as it is."""
        begin = next((begin for begin in OWN if published.startswith(begin)), "")
        return OWN.get(begin, "") + published.removeprefix(begin).replace("attention.self.", "attention.attention.")

    def n_tokens(self, n_features: int) -> int:
        """One token a query, of any number of features for which there are positions."""
        if n_features > self.n_positions:
            raise CheckpointError(
                f"the Q-Former has positions for {self.n_positions} features of a medium, but the encoder gives {n_features}; "
                "set the `encoder:` it was trained with"
            )
        return self.n_queries

    def forward(self, features: Tensor) -> Tensor:
        placed = features + self.positions.weight[: features.shape[1]]
        queries = self.queries.expand(len(features), -1, -1)
        read = self.qformer(query_embeds=queries, encoder_hidden_states=placed).last_hidden_state
        tokens: Tensor = self.linear(read)
        return tokens


def published_name(own: str) -> str:
    """The published name of a tensor by the state dict's key; a key that begins like none of ours stays as it is."""
    begin = next((begin for begin, ours in OWN.items() if own.startswith(ours)), "")
    return begin + own.removeprefix(OWN.get(begin, "")).replace("attention.attention.", "attention.self.")

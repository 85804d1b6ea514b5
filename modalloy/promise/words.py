"""What names and configs say, read for `verify` alone."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# modules that a table of rows is the weight of: by their last word, by their names
OF_TOKENS = {"embed", "emb", "embeds", "embedding", "embeddings", "wte"}
TABLES = {"lm_head", "embed_out", "output_layer", "text_head", "codec_head", "unembed", "unembedding", "shared"}
OF_POSITIONS = ("pos", "position", "positional", "positions", "relative_attention", "relative_position")
CHOOSERS = {"gate", "router", "wg", "gating", "shared_expert_gate"}


def is_numbered(parts: Sequence[str]) -> bool:
    """Whether what follows `experts` in a name is one expert: `0.up_proj`, `expert_0.fc1`, `each_experts.0.up_proj`."""
    if len(parts) > 1 and parts[0].rpartition("_")[2].isdigit():
        return True
    return len(parts) > 2 and parts[1].isdigit()


def numbers(config: Mapping[str, Any], depth: int = 4) -> Iterator[tuple[str, int]]:
    """Keys and whole numbers of a config and of those inside it."""
    for key, value in config.items():
        if isinstance(value, int) and not isinstance(value, bool) and value > 1:
            yield key, value
        elif isinstance(value, Mapping) and depth:
            yield from numbers(value, depth - 1)

"""Where media stand in a batch: blocks of any length between text, their positions, and what is added to later layers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from modalloy.senses.native import Block

Features = Tensor | Sequence[Block]  # of a modality: (media, n_features, dim), or one block for each medium
Blocks = Mapping[int, Sequence[Block]]  # by owner, in reading order over the batch


def blocks_of(features: Mapping[str, Features], owners: Sequence[str]) -> dict[int, Sequence[Block]]:
    """The blocks of modalities that have such, by the index of their owner."""
    return {
        index: found
        for index, name in enumerate(owners)
        if not isinstance(found := features.get(name, ()), Tensor) and len(found)
    }


@dataclass(frozen=True)
class Placed:
    """A block and where it stands: its row, and its first token in it."""

    row: int
    begin: int
    owner: int
    block: Block


def placed(owners: Tensor, blocks: Blocks) -> Iterator[Placed]:
    """Every block of a batch, row by row.

    Raises:
        ValueError: the tokens of an owner are not those of its blocks.
    """
    queues = {owner: list(found) for owner, found in blocks.items()}
    for row, line in enumerate(owners.tolist()):
        at = 0
        while at < len(line):
            owner = line[at]
            if owner not in queues:
                at += 1
                continue
            if not queues[owner] or line[at : at + len(queues[owner][0])] != [owner] * len(queues[owner][0]):
                raise ValueError("the tokens of a medium are not as many as its block has; use the processor")
            block = queues[owner].pop(0)
            yield Placed(row, at, owner, block)
            at += len(block)
    if any(queues.values()):
        raise ValueError("more media are given than the prompts have places for; use the processor")


def by_row(owners: Tensor, owner: int, blocks: Sequence[Block]) -> list[list[Block]]:
    """The blocks of each row of a batch."""
    rows: list[list[Block]] = [[] for _ in range(len(owners))]
    for one in placed(torch.where(owners == owner, owners, 0), {owner: blocks}):
        rows[one.row].append(one.block)
    return rows


def three_positions(owners: Tensor, mask: Tensor | None, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Positions of time, height and width (3, batch, tokens), and each row's position after its last token (batch,).

    Text goes on by one; a block begins where it stands, and what follows it after its largest (M-RoPE, arXiv 2409.12191).
    Padding has position 1, as in transformers.
    """
    batch, length = owners.shape
    positions = torch.ones(3, batch, length, dtype=torch.long)
    after = torch.zeros(batch, dtype=torch.long)
    found = list(placed(owners, blocks))
    for row in range(batch):
        real = torch.arange(length) if mask is None else mask[row, :length].cpu().nonzero().squeeze(1)
        at, next_position = (int(real[0]) if len(real) else length), 0
        for one in [one for one in found if one.row == row and one.block.positions is not None]:
            assert one.block.positions is not None
            text = one.begin - at
            positions[:, row, at : one.begin] = torch.arange(text) + next_position
            next_position += text
            positions[:, row, one.begin : one.begin + len(one.block)] = one.block.positions.cpu() + next_position
            next_position += one.block.extent
            at = one.begin + len(one.block)
        positions[:, row, at:] = torch.arange(length - at) + next_position
        after[row] = next_position + length - at
    return positions.to(owners.device), after.to(owners.device)


def deepstack(owners: Tensor, blocks: Blocks, like: Tensor) -> dict[str, Any]:
    """What is added to the first layers, as a decoder takes it: where (batch, tokens), and for each layer (places, width)."""
    found = [one for one in placed(owners, blocks) if one.block.deepstack is not None]
    if not found:
        return {}
    where = torch.zeros_like(owners, dtype=torch.bool)
    for one in found:
        assert one.block.visual is not None
        where[one.row, one.begin : one.begin + len(one.block)] = one.block.visual.to(owners.device)
    added = torch.cat([one.block.deepstack for one in found if one.block.deepstack is not None], 1)
    return {"visual_pos_masks": where, "deepstack_visual_embeds": list(added.to(like.device, like.dtype))}


def seen_together(owners: Tensor, blocks: Blocks) -> Tensor | None:
    """Groups (batch, tokens) whose tokens see each other in any order, −1 for none; None where there is no group."""
    groups, count = torch.full_like(owners, -1), 0
    for one in placed(owners, blocks):
        if one.block.together is None:
            continue
        for value in one.block.together.unique().tolist():
            if value >= 0:
                own = (one.block.together == value).to(owners.device)
                groups[one.row, one.begin : one.begin + len(one.block)][own] = count
                count += 1
    return groups if count else None


def masks(config: Any, embeddings: Tensor, mask: Tensor | None, groups: Tensor, given: Mapping[str, Any]) -> Any:
    """A decoder's attention masks where some tokens see each other: causal, or within one group.

    A window of sliding layers holds for both. As a decoder of one kind of layer takes it, or by kind.
    """
    from transformers.masking_utils import create_causal_mask

    def together(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        last = groups.shape[1] - 1
        own, other = groups[batch, query.clamp(max=last)], groups[batch, key.clamp(max=last)]
        return (own == other) & (own >= 0) & (query <= last) & (key <= last)

    kinds = getattr(config, "layer_types", None)
    found = {}
    for kind in dict.fromkeys(kinds or ("full_attention",)):
        window = config.sliding_window if kind == "sliding_attention" else None
        found[kind] = create_causal_mask(
            config=config,
            inputs_embeds=embeddings,
            attention_mask=mask,
            past_key_values=given.get("past_key_values"),
            position_ids=given.get("position_ids"),
            or_mask_function=together,
            and_mask_function=None if window is None else partial(_within, window),
            layer_idx=kinds.index(kind) if kinds else 0,
        )
    return found if kinds else found["full_attention"]


def _within(window: int, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Which keys a query of a sliding layer reaches back to."""
    return key > query - window

"""Answers to several prompts at once: each step is one forward pass for one more token of every row, whatever its media.

A row joins at any step and leaves at any step. Rows stand in one cache of transformers', padded on the left; a mask keeps
padding out, and positions count each row's own tokens, so that an answer is the one that its prompt gets alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, GenerationConfig

from modalloy.model.answering import Answer
from modalloy.model.chat import ChatModel
from modalloy.model.hosted import HostedModel
from modalloy.model.kept import Kept, Layers, Marked, marked
from modalloy.model.opening import opening
from modalloy.model.sequence import Blocks, blocks_of, deepstack, masks, seen_together, three_positions

PREFILL = 512  # tokens of prompts in one pass, so that answers that are under way go on in between
KINDS = ("full_attention", "sliding_attention")  # of layers whose state is a key and a value for each token
BY_LENGTH = ("dynamic", "longrope")  # rotary embeddings that a longer row beside it would change
# settings of `generate` that change which token is the likeliest; such a model is asked through `generate` itself
CHOOSING = (
    *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"),
    *("forced_bos_token_id", "forced_eos_token_id", "sequence_bias", "min_length", "min_new_tokens"),
    *("exponential_decay_length_penalty", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size"),
    *("guidance_scale", "watermarking_config", "remove_invalid_values"),
)
NEUTRAL = (None, 0, 1.0, False)


@dataclass(eq=False)
class Row:
    """A prompt on its way through the decoder, and its answer."""

    answer: Answer
    marks: Marked
    embeddings: Tensor  # (1, tokens, width)
    owners: Tensor  # (1, tokens)
    positions: Tensor  # (1, tokens) or (3, 1, tokens)
    after: int  # position of the first token of the answer
    blocks: Blocks
    reused: int = 0  # tokens of the prompt whose keys and values were known
    done: int = 0  # tokens, of prompt and answer, that went through the decoder
    layers: Layers = field(default_factory=list)  # of those tokens, while the row stands in no batch
    last: int = 0  # the token that goes through next

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return self.owners.shape[1]

    @property
    def is_whole(self) -> bool:
        """Whether its prompt can go through in one piece only: tokens of a medium see each other, or are added to layers."""
        return any(b.deepstack is not None or b.together is not None for own in self.blocks.values() for b in own)


def is_batchable(chat: ChatModel) -> bool:
    """Whether a model's answers can be made in a `Batch`."""
    if isinstance(chat, HostedModel):
        return False
    config, settings = chat.model.config.text_config, chat.model.generation_config
    kinds = set(getattr(config, "layer_types", None) or KINDS)
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = {str(one.get("rope_type")) for one in (rope, *rope.values()) if isinstance(one, dict)}
    stateful = bool(getattr(chat.model.decoder, "_is_stateful", False))
    usual = GenerationConfig()
    chooses = [name for name in CHOOSING if getattr(settings, name, None) not in (*NEUTRAL, getattr(usual, name, None))]
    return not stateful and kinds <= set(KINDS) and not ropes & set(BY_LENGTH) and not chooses


class Batch:
    """The rows of one model that are answered together. One thread uses it.

    Args:
        chat: the model; see `is_batchable`.
        max_rows: how many rows decode together.
        kept_bytes: room for keys and values of earlier prompts and answers.
    """

    def __init__(self, chat: ChatModel, *, max_rows: int = 8, kept_bytes: int = 0) -> None:
        self.chat, self.model, self.max_rows = chat, chat.model, max_rows
        self.kept = Kept(kept_bytes)
        self.waiting: list[Row] = []  # whose prompts are not through yet
        self.rows: list[Row] = []  # in the order of the cache's rows
        self.cache = DynamicCache()
        self.mask = torch.zeros(0, 0, dtype=torch.long)

    @property
    def room(self) -> int:
        """How many more rows can join."""
        return self.max_rows - len(self.rows) - len(self.waiting)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.rows and not self.waiting

    @torch.no_grad()
    def add(self, answer: Answer) -> Row:
        """Let a prompt join at the next step."""
        prompt, device = answer.prompt, self.model.device
        self.chat.check([prompt], answer.sampling.max_new_tokens)
        inputs = self.chat.inputs([prompt])
        owners, features = inputs["owners"], inputs["features"]
        embeddings = self.model.embed(inputs["input_ids"], owners, features)
        blocks = blocks_of(features, self.model.config.owners)
        positions, after = torch.arange(owners.shape[1], device=device)[None], owners.shape[1]
        if self.model.has_three_positions:
            positions, next_ones = three_positions(owners, None, blocks)
            after = int(next_ones)
        row = Row(answer, marked(prompt, self.chat.processor), embeddings, owners, positions, after, blocks)
        row.reused, row.layers = self.kept.longest(row.marks)
        row.done = row.reused
        self.waiting.append(row)
        return row

    @torch.no_grad()
    def step(self) -> None:
        """One pass for prompts that wait, then one more token for every row; rows that ended leave."""
        self.waiting = [row for row in self.waiting if not row.answer.cancelled]
        with opening(self.chat.processor.where, "model", "used"):
            self._leave()
            if self.waiting:
                self._prompts(self._group())
                self._leave()
            if self.rows:
                self._decode()
                self._leave()

    def clear(self) -> list[Answer]:
        """Let every row go, and say whose answers are lost."""
        lost = [row.answer for row in (*self.rows, *self.waiting)]
        self.rows, self.waiting, self.cache = [], [], DynamicCache()
        self.mask = self.mask.new_zeros(0, 0)
        return lost

    def _group(self) -> list[Row]:
        """The rows whose prompts go through next: several new ones of PREFILL tokens in all, padding included, or one."""
        first = self.waiting[0]
        group = [first]
        if first.done or first.is_whole:
            return group
        longest = first.length
        for row in self.waiting[1:]:
            longest = max(longest, row.length)
            if row.done or row.is_whole or longest * (len(group) + 1) > PREFILL:
                break
            group.append(row)
        return group

    def _prompts(self, group: Sequence[Row]) -> None:
        """Run a part of the group's prompts; rows whose prompts are through get their first token, and join."""
        ends = [row.length if row.is_whole else min(row.length, row.done + PREFILL) for row in group]
        spans = [(row, row.done, end) for row, end in zip(group, ends, strict=True)]
        past, new = group[0].done, max(end - begin for _, begin, end in spans)

        def padded(name: str) -> list[Tensor]:
            found = []
            for row, begin, end in spans:
                tensor = getattr(row, name)
                sides = (0, 0, new - end + begin, 0) if name == "embeddings" else (new - end + begin, 0)
                part = tensor[:, begin:end] if name == "embeddings" else tensor[..., begin:end]
                found.append(pad(part, sides))
            return found

        real = torch.tensor([[0] * (new - end + begin) + [1] * (end - begin) for _, begin, end in spans])
        mask = pad(real, (past, 0), value=1).to(self.model.device)
        embeddings = torch.cat(padded("embeddings"))
        given: dict[str, Any] = {
            "position_ids": torch.cat(padded("positions"), -2),
            "past_key_values": _cache(group[0].layers) if past else DynamicCache(),
        }
        attention: Any = mask if len(group) > 1 else None
        if len(group) == 1 and group[0].is_whole:
            extra, attention = self._seen(group[0], past, embeddings, given)
            given |= extra
        output = self.model(
            inputs_embeds=embeddings,
            owners=torch.cat(padded("owners")),
            attention_mask=attention,
            use_cache=True,
            logits_to_keep=1,
            **given,
        )
        joining = []
        for index, (row, _, end) in enumerate(spans):
            row.layers = _row(output.past_key_values, index, mask[index])
            row.done = end
            if end == row.length:
                row.last = row.answer.take(output.logits[index, -1])
                joining.append(row)
        self.waiting = [row for row in self.waiting if row not in joining]
        self._join(joining)

    def _seen(self, row: Row, past: int, embeddings: Tensor, given: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """What a prompt with a native medium hands the decoder besides: additions to layers, and who sees whom."""
        extra = deepstack(row.owners, row.blocks, embeddings)
        if extra and past:
            where = extra["visual_pos_masks"]
            known = int(where[:, :past].sum())
            added = [layer[known:] for layer in extra["deepstack_visual_embeds"]]
            extra = {"visual_pos_masks": where[:, past:], "deepstack_visual_embeds": added}
            extra = extra if len(added[0]) else {}
        groups = seen_together(row.owners, row.blocks)
        config = self.model.config.text_config
        return extra, None if groups is None else masks(config, embeddings, None, groups, given)

    def _join(self, rows: Sequence[Row]) -> None:
        """Take rows into the cache, padded on the left to one length."""
        if not rows:
            return
        parts = [([(one.keys, one.values) for one in self.cache.layers], self.mask)] if self.rows else []
        for row in rows:
            parts.append((row.layers, self.mask.new_ones(1, row.done)))
            row.layers = []
        longest = max(mask.shape[1] for _, mask in parts)
        self.mask = torch.cat([pad(mask, (longest - mask.shape[1], 0)) for _, mask in parts])
        layers = []
        for index in range(len(parts[0][0])):
            sides = [
                [pad(own[index][side], (0, 0, longest - mask.shape[1], 0)) for own, mask in parts] for side in (0, 1)
            ]
            layers.append((torch.cat(sides[0]), torch.cat(sides[1])))
        self.cache = _cache(layers)
        self.rows += rows

    def _decode(self) -> None:
        """One more token for every row."""
        device = self.model.device
        ids = torch.tensor([[row.last] for row in self.rows], device=device)
        positions = torch.tensor([[row.after + row.done - row.length] for row in self.rows], device=device)
        if self.model.has_three_positions:
            positions = positions.expand(3, -1, -1)
        self.mask = pad(self.mask, (0, 1), value=1)
        whole = bool(self.mask.all())
        output = self.model(
            input_ids=ids,
            attention_mask=None if whole else self.mask.to(device),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        for row, logits in zip(self.rows, output.logits[:, -1], strict=True):
            row.done += 1
            row.last = row.answer.take(logits)

    def _leave(self) -> None:
        """Take rows that ended out of the cache, and keep what is known of them."""
        ended = [row for row in self.rows if row.answer.finished or row.answer.cancelled]
        if not ended:
            return
        for row in ended:
            ids = [*row.answer.ids][: row.done - row.length]
            numbers = np.concatenate([row.marks.numbers, np.array(ids, np.int64)])
            if len(numbers) == row.done and self.kept.limit:
                index = self.rows.index(row)
                self.kept.add(numbers, _row(self.cache, index, self.mask[index]))
        staying = [index for index, row in enumerate(self.rows) if row not in ended]
        self.rows = [self.rows[index] for index in staying]
        if not self.rows:
            self.cache, self.mask = DynamicCache(), self.mask.new_zeros(0, 0)
            return
        self.mask = self.mask[staying]
        self.cache.batch_select_indices(torch.tensor(staying, device=self.model.device))
        if spare := int(self.mask.any(0).int().argmax()):
            self.mask = self.mask[:, spare:]
            layers = [(one.keys[:, :, spare:], one.values[:, :, spare:]) for one in self.cache.layers]
            self.cache = _cache(layers)


def _cache(layers: Layers) -> DynamicCache:
    """A cache that holds these keys and values."""
    return DynamicCache(ddp_cache_data=layers)


def _row(cache: Any, index: int, mask: Tensor) -> Layers:
    """The keys and values of one row's own tokens: a copy."""
    own = mask.nonzero().squeeze(1)
    begin, end = int(own[0]), int(own[-1]) + 1  # padding is on the left only
    return [
        (one.keys[index : index + 1, :, begin:end].clone(), one.values[index : index + 1, :, begin:end].clone())
        for one in cache.layers
    ]

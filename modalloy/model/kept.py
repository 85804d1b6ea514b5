"""What earlier prompts and answers left behind: keys and values of their tokens, kept while there is room for them."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modalloy.model.chat import Prompt
from modalloy.model.config import tokens_per_medium
from modalloy.senses.native import Block

Layers = list[tuple[Tensor, Tensor]]  # keys and values (1, heads, tokens, width) of every layer


@dataclass(frozen=True)
class Marked:
    """A number for each token of a prompt (tokens,), equal where what the model reads there is; and where media stand in it."""

    numbers: np.ndarray
    media: tuple[tuple[int, int], ...] = ()


def marked(prompt: Prompt, processor: Any) -> Marked:
    """Numbers of a prompt's tokens: of text its id, of a medium one made from the hash of its features."""
    numbers = np.array(prompt.ids, np.int64)
    media, queues = [], {name: list(found) for name, found in prompt.features.items()}
    at = 0
    while at < len(numbers):
        owner = prompt.owners[at]
        if not owner:
            at += 1
            continue
        sense = processor.owners[owner]
        one = queues[sense].pop(0)
        length = len(one) if isinstance(one, Block) else tokens_per_medium(processor.modalities[sense])
        begin = int.from_bytes(_digest(sense, one)[:8], "little") % 2**62
        numbers[at : at + length] = -1 - begin - np.arange(length)  # below 0, as no id is
        media.append((at, at + length))
        at += length
    return Marked(numbers, tuple(media))


def _digest(sense: str, features: Any) -> bytes:
    parts = [features]
    if isinstance(features, Block):
        parts = [features.embeddings, features.positions, features.visual, features.deepstack, features.together]
    found = hashlib.sha256(sense.encode())
    for part in parts:
        found.update(b"-" if part is None else str((part.shape, part.dtype)).encode())
        if part is not None:
            found.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.digest()


class Kept:
    """Layers by the numbers of their tokens, the longest unused given up first where they take more than `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self._entries: OrderedDict[int, tuple[np.ndarray, Layers]] = OrderedDict()
        self._next = 0

    def longest(self, prompt: Marked) -> tuple[int, Layers]:
        """How many of a prompt's first tokens are known, all but its last at most and no part of a medium; and their layers."""
        lengths = {key: shared(numbers, prompt) for key, (numbers, _) in self._entries.items()}
        found = max(lengths, key=lambda key: lengths[key], default=None)
        best = 0 if found is None else lengths[found]
        if found is None or best <= 0:
            return 0, []
        self._entries.move_to_end(found)
        return best, [(keys[:, :, :best], values[:, :, :best]) for keys, values in self._entries[found][1]]

    def add(self, numbers: np.ndarray, layers: Layers) -> None:
        """Keep the layers of these tokens, in the place of those that they begin with."""
        size = _size(layers)
        if size > self.limit:
            return
        for key, (known, _) in list(self._entries.items()):
            common = _common(known, numbers)
            if common == len(numbers):
                self._entries.move_to_end(key)
                return
            if common == len(known):
                self._remove(key)
        self._entries[self._next] = (numbers, layers)
        self._next += 1
        self.bytes += size
        while self.bytes > self.limit:
            self._remove(next(iter(self._entries)))

    def _remove(self, key: int) -> None:
        self.bytes -= _size(self._entries.pop(key)[1])


def shared(numbers: np.ndarray, prompt: Marked) -> int:
    """How many of a prompt's first tokens known ones begin with: all but its last at most, and no part of a medium."""
    best = min(_common(numbers, prompt.numbers), len(prompt.numbers) - 1)
    return next((begin for begin, end in prompt.media if begin < best < end), best)


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many numbers two rows begin with in common."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length


def _size(layers: Sequence[tuple[Tensor, Tensor]]) -> int:
    return sum(one.nbytes for pair in layers for one in pair)

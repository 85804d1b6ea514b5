"""Answers by llama.cpp: chunks of a prompt under their owners' adapters, then one more token of every answer at each step.

Rows stand as sequences in one cache. One that ended leaves its tokens there, and a prompt that begins with them goes on
from where they part, so that a second turn costs what is new in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch

from modalloy.llamacpp.decoder import PIECE, Decoder
from modalloy.model.answering import Answer
from modalloy.model.chat import ChatModel, Prompt
from modalloy.model.kept import Marked, marked, shared
from modalloy.model.routing import TEXT
from modalloy.senses.native import Block


@dataclass(frozen=True)
class Chunk:
    """A run of tokens of one owner: ids (n,), or embeddings float32 (n, width)."""

    owner: str
    begin: int  # in the prompt
    inputs: np.ndarray

    @property
    def end(self) -> int:
        """Where the next begins."""
        return self.begin + len(self.inputs)


@dataclass(eq=False)
class Place:
    """A sequence of the cache: what its tokens are (numbers as of `Marked`), and whether a row has it."""

    sequence: int
    numbers: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    taken: bool = False


@dataclass(eq=False)
class Row:
    """A prompt on its way through the decoder, and its answer."""

    answer: Answer
    marks: Marked
    chunks: list[Chunk]
    place: Place
    reused: int  # tokens of the prompt that the cache had
    last: int = 0  # the token that goes through next

    @property
    def cells(self) -> int:
        """Tokens that it may take in the cache."""
        return len(self.marks.numbers) + self.answer.sampling.max_new_tokens


class Sequences:
    """The rows of one model that are answered together, with the face of a `Batch`. One thread uses it.

    Args:
        chat: the model, of whose media the chunks are made.
        decoder: what decodes them, with as many sequences as rows may decode together.
    """

    def __init__(self, chat: ChatModel, decoder: Decoder) -> None:
        self.chat, self.decoder = chat, decoder
        self.places = [Place(number) for number in range(decoder.sequences)]
        self.waiting: list[Row] = []  # whose prompts are not through yet
        self.rows: list[Row] = []

    @property
    def room(self) -> int:
        """How many more rows can join."""
        return sum(not place.taken for place in self.places)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.rows and not self.waiting

    def add(self, answer: Answer) -> Row:
        """Let a prompt join as soon as the cache has room for it and its answer."""
        self.chat.check([answer.prompt], answer.sampling.max_new_tokens)
        marks, place, reused = self._placed(answer.prompt)
        row = Row(answer, marks, chunks(self.chat, answer.prompt), place, reused)
        self.waiting.append(row)
        return row

    def step(self) -> None:
        """A chunk of one prompt that waits, then one more token for every row; rows that ended leave."""
        for gone in [one for one in (*self.waiting, *self.rows) if one.answer.cancelled]:
            self._leave(gone)
        if self.waiting and self._fits(self.waiting[0]):
            row = self.waiting[0]
            if (first := self._prompt(row)) is not None:
                self.waiting.remove(row)
                self.rows.append(row)
                self._take(row, first)
        if rows := list(self.rows):
            positions = [len(row.place.numbers) for row in rows]
            ids, sequences = [row.last for row in rows], [row.place.sequence for row in rows]
            logits = self.decoder.run(TEXT, ids, positions, sequences, [True] * len(rows))
            for row, own in zip(rows, logits, strict=True):
                row.place.numbers = np.append(row.place.numbers, row.last)
                self._take(row, own)

    def clear(self) -> list[Answer]:
        """Let every row go, and say whose answers are lost."""
        lost = [row.answer for row in (*self.rows, *self.waiting)]
        for row in [*self.rows, *self.waiting]:
            self._leave(row)
        for place in self.places:
            self._forget(place)
        return lost

    def forced(self, prompt: Prompt, options: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Logits (tokens, vocabulary) at every place of each option, token ids, given the prompt and what comes before."""
        marks, place, _ = self._placed(prompt)
        try:
            for other in self.places:
                if other is not place:
                    self._forget(other)
            first = self._run(place, marks, chunks(self.chat, prompt), len(prompt.ids))
            assert first is not None
            found = []
            for option in options:
                positions = range(len(prompt.ids), len(prompt.ids) + len(option) - 1)
                count = len(positions)
                rest = self.decoder.run(TEXT, option[:count], positions, [place.sequence] * count, [True] * count)
                self.decoder.forget(place.sequence, len(prompt.ids))
                found.append(np.concatenate([first, rest]))
            return found
        finally:
            place.taken = False

    def _placed(self, prompt: Prompt) -> tuple[Marked, Place, int]:
        """The numbers of a prompt, the free place that has most of its first tokens, and how many; the rest is forgotten."""
        marks = marked(prompt, self.chat.processor)
        free = [place for place in self.places if not place.taken]
        place = max(free, key=lambda one: (shared(one.numbers, marks), -len(one.numbers)))
        reused = shared(place.numbers, marks)
        self.decoder.forget(place.sequence, reused)
        place.numbers, place.taken = place.numbers[:reused], True
        return marks, place, reused

    def _fits(self, row: Row) -> bool:
        """Whether the cache has room for a row beside those that run; what is not needed at once is forgotten for it."""
        used = sum(other.cells for other in self.rows) + row.cells
        if used > self.decoder.context:
            return False
        running = [other.place for other in (row, *self.rows)]
        spare = [place for place in self.places if place not in running]
        while used + sum(len(place.numbers) for place in spare) > self.decoder.context:
            self._forget(spare.pop())
        return True

    def _prompt(self, row: Row) -> np.ndarray | None:
        """The next piece of a row's prompt; its last token's logits (1, vocabulary) once it is through."""
        return self._run(row.place, row.marks, row.chunks, PIECE)

    def _run(self, place: Place, marks: Marked, parts: Sequence[Chunk], most: int) -> np.ndarray | None:
        """The chunks of a prompt that begin within the next `most` tokens; the last one's logits if they end it."""
        begin, logits = len(place.numbers), None
        for chunk in parts:
            done = len(place.numbers)
            if chunk.end <= done or done >= begin + most:
                continue
            inputs = chunk.inputs[done - chunk.begin :]
            wanted = [False] * len(inputs)
            wanted[-1] = chunk is parts[-1]
            positions = range(done, chunk.end)
            logits = self.decoder.run(chunk.owner, inputs, positions, [place.sequence] * len(inputs), wanted)
            place.numbers = marks.numbers[: chunk.end]
        return logits if len(place.numbers) == len(marks.numbers) else None

    def _take(self, row: Row, logits: np.ndarray) -> None:
        row.last = row.answer.take(torch.from_numpy(logits.reshape(-1)))
        if row.answer.finished:
            self._leave(row)

    def _leave(self, row: Row) -> None:
        """Free a row's place, whose tokens stay while nobody needs it."""
        row.place.taken = False
        for rows in (self.rows, self.waiting):
            if row in rows:
                rows.remove(row)

    def _forget(self, place: Place) -> None:
        self.decoder.forget(place.sequence)
        place.numbers = place.numbers[:0]


def chunks(chat: ChatModel, prompt: Prompt) -> list[Chunk]:
    """A prompt cut where the owner of its tokens changes; media as projected embeddings.

    Raises:
        CheckpointError: a native medium is more than embeddings, which llama.cpp has no place for.
    """
    names, found, at = chat.processor.owners, [], 0
    queues = {sense: iter(features) for sense, features in prompt.features.items()}
    for owner, run in groupby(prompt.owners):
        end = at + len(list(run))
        while at < end:
            if not owner:
                inputs = np.array(prompt.ids[at:end], np.int32)
            else:
                inputs = _embeddings(chat, names[owner], next(queues[names[owner]]))
            found.append(Chunk(names[owner], at, inputs))
            at += len(inputs)
    return found


def _embeddings(chat: ChatModel, sense: str, features: object) -> np.ndarray:
    """Embeddings float32 (tokens, width) of one medium."""
    if isinstance(features, Block):
        from modalloy.errors import CheckpointError

        if any(part is not None for part in (features.positions, features.deepstack, features.together)):
            raise CheckpointError(
                f"a medium of {sense} has positions, layers or a mask of its own, which llama.cpp is not given; use --engine torch"
            )
        return np.array(features.embeddings.float().cpu())
    assert isinstance(features, torch.Tensor)
    with torch.no_grad():
        return np.array(chat.model.project(sense, features[None])[0].float().cpu())

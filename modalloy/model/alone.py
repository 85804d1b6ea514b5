"""Answers one after another through transformers' `generate`, with the face of a `Batch`: for models that it does not take."""

from collections import deque
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from modalloy.model.answering import Answer
from modalloy.model.batch import Batch, Row, is_batchable
from modalloy.model.chat import ChatModel
from modalloy.model.llama_cpp import LlamaChat
from modalloy.model.opening import opening
from modalloy.model.sequences import Sequences


class Alone:
    """The answers of a model that decodes one prompt at a time: an image encoder inside, or a state that is no key and value."""

    def __init__(self, chat: ChatModel, *, max_rows: int = 1) -> None:
        self.chat, self.waiting, self.max_rows = chat, deque[Answer](), max_rows
        self.running: Answer | None = None

    @property
    def room(self) -> int:
        """How many more can wait."""
        return self.max_rows - len(self.waiting)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.waiting

    def add(self, answer: Answer) -> Row | None:
        """Let a prompt wait for its turn."""
        self.chat.check([answer.prompt], answer.sampling.max_new_tokens)
        self.waiting.append(answer)
        return None

    def step(self) -> None:
        """The whole of the next answer."""
        answer = self.running = self.waiting.popleft()
        if not answer.cancelled:
            with opening(self.chat.processor.where, "model", "used"):
                self.chat.model.generate(
                    **self.chat.inputs([answer.prompt]),
                    max_new_tokens=answer.sampling.max_new_tokens,
                    do_sample=False,
                    num_beams=1,
                    eos_token_id=None if answer.sampling.ignore_ends else list(self.chat.ends.tokens) or None,
                    pad_token_id=self.chat.processor.padding_id,
                    trust_remote_code=False,
                    logits_processor=LogitsProcessorList([_Chosen(answer)]),
                    stopping_criteria=StoppingCriteriaList([_Ended(answer)]),
                )
        self.running = None

    def clear(self) -> list[Answer]:
        """Let every answer go, and say which are lost."""
        lost = [*([self.running] if self.running else []), *self.waiting]
        self.running = None
        self.waiting.clear()
        return lost


class _Chosen(LogitsProcessor):
    """Leaves the token that the answer chooses as the only one."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer

    def __call__(self, input_ids: Any, scores: Tensor) -> Tensor:
        token = self.answer.take(scores[0])
        return torch.full_like(scores, float("-inf")).index_fill(1, torch.tensor([token], device=scores.device), 0.0)


class _Ended(StoppingCriteria):
    """Ends where the answer does, or where nobody waits for it."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        over = self.answer.finished is not None or self.answer.cancelled
        return torch.full((len(input_ids),), over, device=input_ids.device)


def answering(chat: ChatModel, *, max_rows: int, kept_bytes: int) -> Batch | Alone | Sequences:
    """What answers a model's prompts: together where it can be done, else one after another."""
    if isinstance(chat, LlamaChat):
        return chat.sequences
    if is_batchable(chat):
        return Batch(chat, max_rows=max_rows, kept_bytes=kept_bytes)
    return Alone(chat, max_rows=max_rows)

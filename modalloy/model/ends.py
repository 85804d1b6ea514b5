"""Where an answer ends: the end tokens and stop strings of a model's files and of its chat template."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from modalloy.errors import CheckpointError, ModalloyError
from modalloy.model.literal import Literals

Render = Callable[[list[dict[str, Any]]], str]
QUESTION, ANSWER = "aQuestionAsked", "anAnswerGiven"  # words that stand for messages while a template is looked into


@dataclass(frozen=True)
class Ends:
    """End tokens by id, stop strings, and what the model writes itself at the end of an answer."""

    tokens: tuple[int, ...]
    strings: tuple[str, ...]
    text: str

    def kept(self, ids: Sequence[int]) -> int:
        """How many of the generated tokens come before the first end token."""
        return next((index for index, one in enumerate(ids) if one in self.tokens), len(ids))

    def cut(self, text: str) -> str:
        """A text up to the first stop string."""
        return min((text.split(string, 1)[0] for string in self.strings), key=len, default=text)

    def options(self, tokenizer: Any, start: int) -> dict[str, Any]:
        """What transformers' `generate` is told of stop strings; answers begin at token `start` of each row."""
        return {"stopping_criteria": StoppingCriteriaList([Stops(self, tokenizer, start)])} if self.strings else {}


class Stops(StoppingCriteria):
    """Ends a row where its answer has a stop string."""

    def __init__(self, ends: Ends, tokenizer: Any, start: int) -> None:
        self.ends, self.tokenizer, self.start = ends, tokenizer, start

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Which rows (batch,) of the tokens (batch, tokens) are at their end."""
        texts = [str(self.tokenizer.decode(row[self.start :], skip_special_tokens=True)) for row in input_ids]
        return torch.tensor([self.ends.cut(text) != text for text in texts], device=input_ids.device)


def ends_of(settings: Any, tokenizer: Any, literals: Literals, render: Render) -> Ends:
    """The ends of a model's answers: of its generation settings, its tokenizer and its chat template.

    `render` gives the prompt of a conversation without its beginning of an answer.

    Raises:
        CheckpointError: an end token or a stop string in them is none.
    """
    tokens: dict[int, None] = {}
    for one in [*listed(settings.eos_token_id), *listed(tokenizer.eos_token_id)]:
        if not isinstance(one, int) or isinstance(one, bool) or one < 0:
            raise CheckpointError(f"{literals.where}: its end token {one!r} is no token's number; correct eos_token_id")
        tokens[one] = None
    strings = listed(settings.stop_strings)
    if not all(isinstance(one, str) and one for one in strings):
        raise CheckpointError(f"{literals.where}: stop_strings in generation_config.json must be texts; correct them")
    between = of_template(literals, render).lstrip()
    text = tokenizer.eos_token or ""
    if token := next((one for one in literals.controls if between.startswith(one)), None):
        tokens[int(tokenizer.convert_tokens_to_ids(token))] = None
        text = token
    elif between.strip() and between.strip() not in strings:
        strings.append(between.strip())
    return Ends(tuple(tokens), tuple(strings), text)


def listed(given: Any) -> list[Any]:
    """The entries of what may be one, several or none."""
    return [] if given is None or given == -1 else list(given) if isinstance(given, (list, tuple)) else [given]


def of_template(literals: Literals, render: Render) -> str:
    """What the chat template writes between an answer and the next question; "" if it does not say."""
    turns = [("user", QUESTION), ("assistant", ANSWER), ("user", f"{QUESTION}2")]
    try:
        text = literals.shown(render([{"role": role, "content": word} for role, word in turns]))
    except ModalloyError:  # it refuses to be asked
        return ""
    between, asked, _ = text.partition(ANSWER)[2].partition(f"{QUESTION}2")
    return between if asked else ""


class Words(TextStreamer):
    """Hands on the words of an answer, from its first letter on, up to where it ends."""

    def __init__(self, tokenizer: Any, ends: Ends, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.ends, self.on_text = ends, on_text
        self.begun = self.ended = False
        self.held = ""  # the beginning of a stop string, perhaps

    def put(self, value: Any) -> None:
        """One token more, or the prompt."""
        if self.next_tokens_are_prompt or not set(value.flatten().tolist()) & set(self.ends.tokens):
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = self.held + text
        whole = self.ends.cut(text)
        if self.ended:
            return
        self.ended = whole != text
        longest = max(map(len, self.ends.strings), default=1)
        keep = len(whole) if self.ended or stream_end else max(0, len(whole) - longest + 1)
        text, self.held = whole[:keep], whole[keep:]
        text = text if self.begun else text.lstrip()
        if text:
            self.begun = True
            self.on_text(text)

"""A loaded model and its processor: ask a question, or score possible answers."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer

from modalloy.errors import ModalloyError
from modalloy.model.omni import ModalloyForConditionalGeneration
from modalloy.model.processor import Message, ModalloyProcessor


@dataclass(frozen=True)
class Reply:
    """An answer, and what it was made from."""

    answer: str
    prompt: str  # as the tokenizer's template renders it, with a placeholder for each medium
    tokens: dict[str, int]  # of the prompt, by owner: text, and the modalities present
    new_tokens: int


@dataclass
class ChatModel:
    """What `load_model` returns."""

    model: ModalloyForConditionalGeneration
    processor: ModalloyProcessor

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities it takes besides text."""
        return tuple(self.model.config.modalities)

    def chat(self, messages: list[Message], *, max_new_tokens: int = 64) -> str:
        """The answer to a conversation, decoded greedily."""
        return self.reply(messages, max_new_tokens=max_new_tokens).answer

    def reply(
        self, messages: list[Message], *, max_new_tokens: int = 64, on_text: Callable[[str], None] | None = None
    ) -> Reply:
        """The answer to a conversation, decoded greedily, with its prompt. `on_text` gets whole words as they are generated.

        Raises:
            ModalloyError: the conversation leaves no room for `max_new_tokens` in the model's context.
        """
        owners = self.processor.render(messages)[1]
        length, limit = len(owners), self.model.config.text_config.max_position_embeddings
        if length + max_new_tokens > limit:
            raise ModalloyError(
                f"the conversation takes {length} tokens and the answer up to {max_new_tokens}, more than the model's {limit}; "
                "show fewer media, or begin a new conversation"
            )
        tokenizer = self.processor.tokenizer
        output = self.model.generate(
            **self._inputs(messages),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            streamer=None if on_text is None else _Words(tokenizer, on_text),
        )
        return Reply(
            answer=self.processor.answer(output[0, length:]),
            prompt=self.processor.apply_chat_template(messages, add_generation_prompt=True),
            tokens={name: owners.count(i) for i, name in enumerate(self.processor.owners) if i in owners},
            new_tokens=output.shape[1] - length,
        )

    def ask(self, question: str, *, max_new_tokens: int = 64, **media: Any) -> str:
        """The answer to one question about media given by modality: `ask("What is this?", image="dog.png")`.

        A medium may also be a list of them.
        """
        listed = {name: given if isinstance(given, (list, tuple)) else [given] for name, given in media.items()}
        pairs = [(modality, medium) for modality, found in listed.items() for medium in found]
        return self.chat(user_message(question, pairs), max_new_tokens=max_new_tokens)

    def score_options(self, messages: list[Message], options: list[str] | tuple[str, ...]) -> list[float]:
        """Log-likelihood in nats of each option as the whole answer, its end token included."""
        inputs = self._inputs(messages)
        tokenizer = self.processor.tokenizer
        ids = [
            torch.tensor(tokenizer.encode(option + tokenizer.eos_token, add_special_tokens=False)) for option in options
        ]
        scores: list[float] = self.model.score_options(inputs, ids).tolist()
        return scores

    def _inputs(self, messages: list[Message]) -> dict[str, Any]:
        """The processor's output, on the model's device."""
        inputs = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
        return dict(inputs.to(self.model.device))


class _Words(TextStreamer):
    """Hands on the words of an answer, from its first letter on."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text
        self.begun = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text if self.begun else text.lstrip()
        if text:
            self.begun = True
            self.on_text(text)


def user_message(question: str, media: Iterable[tuple[str, Any]]) -> list[Message]:
    """One user turn: the (modality, medium) in the order given, then the question."""
    parts = [{"type": modality, "path": medium} for modality, medium in media]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]

"""A loaded model and its processor: ask a question, or score possible answers."""

from dataclasses import dataclass
from typing import Any

import torch

from modalloy.model.omni import ModalloyForConditionalGeneration
from modalloy.model.processor import Message, ModalloyProcessor


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
        inputs = self._inputs(messages)
        length = inputs["input_ids"].shape[1]
        tokenizer = self.processor.tokenizer
        output = self.model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        return self.processor.answer(output[0, length:])

    def ask(self, question: str, *, max_new_tokens: int = 64, **media: Any) -> str:
        """The answer to one question about media given by modality: `ask("What is this?", image="dog.png")`.

        A medium may also be a list of them.
        """
        return self.chat(user_message(question, media), max_new_tokens=max_new_tokens)

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


def user_message(question: str, media: dict[str, Any]) -> list[Message]:
    """One user turn: the media in the order given, then the question."""
    parts = []
    for modality, given in media.items():
        for medium in given if isinstance(given, (list, tuple)) else [given]:
            parts.append({"type": modality, "path": medium})
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]

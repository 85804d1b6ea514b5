"""A loaded model and its processor: ask a question, or score possible answers."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

from modalloy.errors import LengthError
from modalloy.model.omni import ModalloyForConditionalGeneration
from modalloy.model.processor import Message, ModalloyProcessor


@dataclass(frozen=True)
class Reply:
    """An answer, and what it was made from."""

    answer: str
    prompt: str  # as the tokenizer's template renders it, with a placeholder for each medium
    tokens: dict[str, int]  # of the prompt, by owner: text, and the modalities present
    new_tokens: int


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation whose media are encoded."""

    text: str  # with a placeholder for each medium
    ids: list[int]
    owners: list[int]  # of every token
    features: dict[str, list[Tensor]] = field(
        default_factory=dict
    )  # (n_features, dim) each, by modality in reading order


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
            LengthError: the conversation leaves no room for `max_new_tokens` in the model's context.
        """
        prompt, tokenizer = self.prompt(messages), self.processor.tokenizer
        output = self._generate([prompt], max_new_tokens, None if on_text is None else _Words(tokenizer, on_text))
        new = output[0, len(prompt.ids) :]
        return Reply(
            answer=self.processor.answer(new),
            prompt=prompt.text,
            tokens={name: prompt.owners.count(i) for i, name in enumerate(self.processor.owners) if i in prompt.owners},
            new_tokens=len(new),
        )

    def ask(self, question: str, *, max_new_tokens: int = 64, **media: Any) -> str:
        """The answer to one question about media given by modality: `ask("What is this?", image="dog.png")`.

        A medium may also be a list of them.
        """
        listed = {name: given if isinstance(given, (list, tuple)) else [given] for name, given in media.items()}
        pairs = [(modality, medium) for modality, found in listed.items() for medium in found]
        return self.chat(user_message(question, pairs), max_new_tokens=max_new_tokens)

    def score_options(self, messages: list[Message], options: Sequence[str]) -> list[float]:
        """Log-likelihood in nats of each option as the whole answer, its end token included."""
        return self.score([self.prompt(messages)], [options])[0]

    def prompt(self, messages: list[Message], features: Callable[[str, Any], Tensor] | None = None) -> Prompt:
        """A conversation ready to be answered; `features(modality, medium)` may give what is known of a medium already.

        Raises:
            MediaError: a medium cannot be read, or is of a modality that the model lacks.
        """
        media: list[tuple[str, Any]] = []
        ids, owners = self.processor.render(messages, media)
        encoded: dict[str, list[Tensor]] = defaultdict(list)
        for modality, medium in media:
            encoded[modality].append((features or self.features)(modality, medium))
        return Prompt(
            self.processor.apply_chat_template(messages, add_generation_prompt=True), ids, owners, dict(encoded)
        )

    def plain_prompt(self, text: str) -> Prompt:
        """A prompt of text without a chat template."""
        ids = self.processor.tokenizer.encode(text)
        return Prompt(text, ids, [0] * len(ids))

    def features(self, modality: str, medium: Any) -> Tensor:
        """What the modality's encoder makes of one medium (n_features, dim)."""
        return self.model.encode(modality, self.processor.preprocess(modality, medium)[None])[0]

    def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int = 64) -> list[tuple[str, int]]:
        """Greedy answers to prompts, and how many tokens each took. Several are padded on the left."""
        output = self._generate(prompts, max_new_tokens, None)[:, max(len(prompt.ids) for prompt in prompts) :]
        ends = [row.eq(self.processor.tokenizer.eos_token_id).nonzero() for row in output]
        lengths = [int(end[0]) + 1 if len(end) else output.shape[1] for end in ends]
        return [(self.processor.answer(row[:n]), n) for row, n in zip(output, lengths, strict=True)]

    def score(self, prompts: Sequence[Prompt], options: Sequence[Sequence[str]]) -> list[list[float]]:
        """Log-likelihoods in nats of each prompt's options, each as the whole answer, its end token included."""
        return self._score(prompts, [[self._whole(option) for option in own] for own in options])

    def predict(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[list[int]]:
        """The likeliest token at every place of each prompt's answer, given what comes before it; its end is a place too."""
        return self._predict(prompts, [self._whole(answer) for answer in answers])

    def continuations(self, texts: Sequence[str], options: Sequence[Sequence[str]]) -> list[list[float]]:
        """Log-likelihoods in nats of each text's options, each as its continuation, without a chat template.

        Text and option are tokenised together and cut where the text's own tokens end, as lm-eval does: spaces that end the
        text belong to the option.
        """
        contexts = [text.rstrip() for text in texts]
        prompts = [self.plain_prompt(context) for context in contexts]
        encode = self.processor.tokenizer.encode
        whole = [[encode(text + option) for option in own] for text, own in zip(texts, options, strict=True)]
        cut = [[ids[len(prompt.ids) :] for ids in own] for prompt, own in zip(prompts, whole, strict=True)]
        return self._score(prompts, cut)

    def _whole(self, answer: str) -> list[int]:
        """Token ids of an answer and its end."""
        tokenizer = self.processor.tokenizer
        ids: list[int] = tokenizer.encode(answer + tokenizer.eos_token, add_special_tokens=False)
        return ids

    def _score(self, prompts: Sequence[Prompt], options: list[list[list[int]]]) -> list[list[float]]:
        for prompt, own in zip(prompts, options, strict=True):
            self._check_length(len(prompt.ids), max(map(len, own)))
        tensors = [[torch.tensor(ids) for ids in own] for own in options]
        return [scores.tolist() for scores in self.model.score_options(self._inputs(prompts), tensors)]

    def _predict(self, prompts: Sequence[Prompt], answers: list[list[int]]) -> list[list[int]]:
        for prompt, own in zip(prompts, answers, strict=True):
            self._check_length(len(prompt.ids), len(own))
        found = self.model.predict(self._inputs(prompts), [torch.tensor(own) for own in answers])
        return [ids.tolist() for ids in found]

    def _generate(self, prompts: Sequence[Prompt], max_new_tokens: int, streamer: Any) -> Tensor:
        """Token ids (prompts, tokens) of the padded prompts and their answers."""
        self._check_length(max(len(prompt.ids) for prompt in prompts), max_new_tokens)
        tokenizer = self.processor.tokenizer
        ids: Tensor = self.model.generate(
            **self._inputs(prompts),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=self.processor.padding_id,
            streamer=streamer,
        )
        return ids

    def _inputs(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """The model's inputs, on its device, padded on the left."""
        inputs: dict[str, Any] = dict(self.processor.pad([(p.ids, p.owners) for p in prompts]).to(self.model.device))
        found = {modality for prompt in prompts for modality in prompt.features}
        stacks = {m: torch.stack([one for p in prompts for one in p.features.get(m, ())]) for m in sorted(found)}
        return inputs | {"features": {modality: stack.to(self.model.device) for modality, stack in stacks.items()}}

    def _check_length(self, length: int, new_tokens: int) -> None:
        limit = self.model.config.text_config.max_position_embeddings
        if length + new_tokens > limit:
            raise LengthError(
                f"the conversation takes {length} tokens and the answer up to {new_tokens}, more than the model's {limit}; "
                "show fewer media, or begin a new conversation"
            )


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

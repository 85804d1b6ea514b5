"""A loaded model and its processor: ask a question, or score possible answers."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from modalloy.errors import CheckpointError, LengthError, MediaError
from modalloy.model.ends import Ends, Words, ends_of
from modalloy.model.omni import ModalloyForConditionalGeneration
from modalloy.model.opening import opening
from modalloy.model.processor import PLACEHOLDER, ModalloyProcessor, grouped, too_many
from modalloy.model.rendering import Message
from modalloy.names import modality_name
from modalloy.senses.native import Block

Tokens = (
    int | Sequence[Sequence[int]]
)  # the so many likeliest at every place of an answer, or these, a row for each place


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

    text: str  # as it is read, with a placeholder for each medium
    ids: list[int]
    owners: list[int]  # of every token
    # by modality in reading order: (n_features, dim) each, or of a native modality a block
    features: dict[str, list[Any]] = field(default_factory=dict)
    marked: str = ""  # the text with marks, for a model whose own processor tokenises it again


@dataclass
class ChatModel:
    """What `load_model` returns."""

    model: ModalloyForConditionalGeneration
    processor: ModalloyProcessor
    holder: ClassVar[str] = "model"  # what says how long a conversation may be

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities it takes besides text."""
        return self.processor.able

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
        words = None if on_text is None else Words(tokenizer, self.ends, on_text)
        output = self._generate([prompt], max_new_tokens, words)
        answer, new_tokens = self._answer(output[0, len(prompt.ids) :])
        return Reply(
            answer=answer,
            prompt=prompt.text,
            tokens=self.counts(prompt),
            new_tokens=new_tokens,
        )

    def counts(self, prompt: Prompt) -> dict[str, int]:
        """How many of a prompt's tokens are text's, and each modality's."""
        names = self.processor.owners
        return {name: prompt.owners.count(i) for i, name in enumerate(names) if i in prompt.owners}

    @cached_property
    def ends(self) -> Ends:
        """Where an answer ends: every end token and stop string of the model's files and its chat template."""
        settings, tokenizer = self.model.generation_config, self.processor.tokenizer
        found = ends_of(settings, tokenizer, self.processor.literals(), self._between)
        settings.stop_strings = None  # transformers' own search for them fails with tokenizers of whole words
        return found

    def _between(self, messages: list[Message]) -> str:
        """The prompt of a conversation without its beginning of an answer."""
        return self.processor.rendered(messages, add_generation_prompt=False)

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

    def prompt(
        self,
        messages: list[Message],
        features: Callable[[str, Any], Tensor] | None = None,
        blocks: Callable[[str, list[Any]], list[Block]] | None = None,
    ) -> Prompt:
        """A conversation ready to be answered; `features(modality, medium)` may give what is known of a medium already: its
        features, or of a native modality the medium in memory. `blocks` then gives what becomes of all of a native modality.

        Raises:
            MediaError: a medium cannot be read, or is of a modality that the model lacks.
        """
        media: list[tuple[str, Any]] = []
        text = self.processor.rendered(messages, media)
        encoded: dict[str, list[Any]] = {}
        lengths: dict[str, list[int]] = {}
        for modality, found in grouped(media).items():
            if modality in self.processor.preparers:
                read = [(features or self.processor.preprocess)(modality, medium) for medium in found]
                encoded[modality] = (blocks or self.blocks)(modality, read)
                lengths[modality] = list(map(len, encoded[modality]))
            else:
                encoded[modality] = [(features or self.features)(modality, medium) for medium in found]
        ids, owners = self.processor.tokenize(text, lengths)
        return Prompt(self.processor.shown(text), ids, owners, encoded)

    def blocks(self, modality: str, media: list[Any]) -> list[Block]:
        """A block for each of a conversation's media of a native modality, read already."""
        return list(self.model.encode(modality, self.processor.prepare(modality, media)))

    def plain_prompt(self, text: str) -> Prompt:
        """A prompt of text without a chat template."""
        ids = self._encoded(text)
        return Prompt(text, ids, [0] * len(ids))

    def features(self, modality: str, medium: Any) -> Any:
        """What the modality's encoder makes of one medium (n_features, dim); of a native modality, its block."""
        if modality in self.processor.preparers:
            return self.model.encode(modality, self.processor.prepare(modality, [medium]))[0]
        return self.model.encode(modality, self.processor.preprocess(modality, medium)[None])[0]

    def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int = 64) -> list[tuple[str, int]]:
        """Greedy answers to prompts, and how many tokens each took. Several are padded on the left."""
        output = self._generate(prompts, max_new_tokens, None)[:, max(len(prompt.ids) for prompt in prompts) :]
        return [self._answer(row) for row in output]

    def score(self, prompts: Sequence[Prompt], options: Sequence[Sequence[str]]) -> list[list[float]]:
        """Log-likelihoods in nats of each prompt's options, each as the whole answer, its end token included."""
        return self._score(prompts, [[self._whole(option) for option in own] for own in options])

    def expect(
        self, prompts: Sequence[Prompt], answers: Sequence[str], tokens: Sequence[Tokens]
    ) -> list[tuple[Tensor, Tensor]]:
        """Of each prompt tokens (places, n) at every place of its answer, given what comes before it, and how likely they are:
        log-likelihoods in nats (places, n + 1), the last that of all other tokens together. The answer's end is a place too.
        """
        found = []
        every = self._next_tokens(prompts, [self._whole(answer) for answer in answers])
        for logits, wanted in zip(every, tokens, strict=True):
            nats = logits.log_softmax(-1)
            if isinstance(wanted, int):
                ids = nats.topk(min(wanted, nats.shape[-1] - 1)).indices
            else:
                ids = torch.tensor(wanted, device=nats.device)
            others = nats.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
            found.append((ids, torch.cat([nats.gather(-1, ids), others], -1)))
        return found

    def distributions(self, prompt: Prompt, answer: str) -> tuple[list[int], Tensor]:
        """An answer's tokens and its end, and the log-probabilities (tokens, vocabulary) of all tokens in each one's place."""
        ids = self._whole(answer)
        (logits,) = self._next_tokens([prompt], [ids])
        return ids, logits.log_softmax(-1)

    def continuations(self, texts: Sequence[str], options: Sequence[Sequence[str]]) -> list[list[float]]:
        """Log-likelihoods in nats of each text's options, each as its continuation, without a chat template.

        Text and option are tokenised together and cut where the text's own tokens end, as lm-eval does: spaces that end the
        text belong to the option.
        """
        contexts = [text.rstrip() for text in texts]
        prompts = [self.plain_prompt(context) for context in contexts]
        whole = [[self._encoded(text + option) for option in own] for text, own in zip(texts, options, strict=True)]
        cut = [[ids[len(prompt.ids) :] for ids in own] for prompt, own in zip(prompts, whole, strict=True)]
        return self._score(prompts, cut)

    def _whole(self, answer: str) -> list[int]:
        """Token ids of an answer and its end."""
        literals, end = self.processor.literals(), self.ends.text
        return literals.encode(literals.literal(answer) + end)

    def _encoded(self, text: str) -> list[int]:
        """Token ids of a text without a chat template, with what the tokenizer puts around every text."""
        literals = self.processor.literals()
        return literals.encode(literals.literal(text), add_special_tokens=True)

    def _answer(self, ids: Tensor) -> tuple[str, int]:
        """The answer in what was generated (tokens,), cut where it ends, and how many tokens it took, its end included."""
        kept = self.ends.kept(ids.tolist())
        with opening(self.processor.where, "tokenizer"):
            text = self.processor.answer(ids[:kept])
        return self.ends.cut(text).strip(), min(kept + 1, len(ids))

    def _score(self, prompts: Sequence[Prompt], options: list[list[list[int]]]) -> list[list[float]]:
        for prompt, own in zip(prompts, options, strict=True):
            self._check_length(len(prompt.ids), max(map(len, own)))
        self._check_tokens(prompts)
        tensors = [[torch.tensor(ids) for ids in own] for own in options]
        return [scores.tolist() for scores in self.model.score_options(self.inputs(prompts), tensors)]

    def _next_tokens(self, prompts: Sequence[Prompt], answers: list[list[int]]) -> list[Tensor]:
        """Logits (tokens, vocabulary) at every place of each prompt's answer."""
        for prompt, own in zip(prompts, answers, strict=True):
            self._check_length(len(prompt.ids), len(own))
        found: list[Tensor] = self.model.next_tokens(self.inputs(prompts), [torch.tensor(own) for own in answers])
        return found

    def _generate(self, prompts: Sequence[Prompt], max_new_tokens: int, streamer: Any) -> Tensor:
        """Token ids (prompts, tokens) of the padded prompts and their answers."""
        self.check(prompts, max_new_tokens)
        inputs = self.inputs(prompts)
        with opening(self.processor.where, "model", "used"):
            ids: Tensor = self.model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                eos_token_id=list(self.ends.tokens) or None,
                pad_token_id=self.processor.padding_id,
                streamer=streamer,
                trust_remote_code=False,
                **self.ends.options(self.processor.tokenizer, inputs["input_ids"].shape[1]),
            )
        return ids

    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """The model's inputs, on its device, padded on the left."""
        inputs: dict[str, Any] = dict(self.processor.pad([(p.ids, p.owners) for p in prompts]).to(self.model.device))
        found = {modality for prompt in prompts for modality in prompt.features}
        device, features = self.model.device, {}
        for modality in sorted(found):
            every = [one.to(device) for prompt in prompts for one in prompt.features.get(modality, ())]
            features[modality] = torch.stack(every) if isinstance(every[0], Tensor) else every
        return inputs | {"features": features}

    def check(self, prompts: Sequence[Prompt], new_tokens: int) -> None:
        """Refuse prompts that leave no room for their answers, or whose tokens the model has not.

        Raises:
            LengthError: the model's context is shorter.
            CheckpointError: the tokenizer is not the model's.
        """
        self._check_length(max(len(prompt.ids) for prompt in prompts), new_tokens)
        self._check_tokens(prompts)

    @property
    def context(self) -> int:
        """How many tokens a prompt and its answer may have together."""
        return int(self.model.config.text_config.max_position_embeddings)

    @property
    def vocabulary(self) -> int:
        """How many tokens the decoder knows."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def _check_tokens(self, prompts: Sequence[Prompt]) -> None:
        """Refuse a tokenizer whose numbers go beyond the model's vocabulary."""
        rows, highest = self.vocabulary, max(max(prompt.ids) for prompt in prompts)
        if highest >= rows:
            token = self.processor.tokenizer.convert_ids_to_tokens(highest)
            raise CheckpointError(
                f"{self.processor.where}: its tokenizer gives {token!r} the number {highest}, but the model has {rows} "
                "tokens; use the tokenizer that belongs to the model"
            )

    def _check_length(self, length: int, new_tokens: int) -> None:
        if length + new_tokens > self.context:
            raise LengthError(
                f"the conversation takes {length} tokens and the answer up to {new_tokens}, more than the {self.holder}'s "
                f"{self.context}; "
                "show fewer media, or begin a new conversation"
            )


def user_message(question: str, media: Iterable[tuple[str, Any]]) -> list[Message]:
    """One user turn: the (modality, medium) in the order given, then the question."""
    parts = [{"type": modality, "path": medium} for modality, medium in media]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def placed_message(question: str, media: Iterable[tuple[str, Any]], modalities: Iterable[str]) -> list[Message]:
    """As `user_message`, but media stand where the question has placeholders (`<image>`) of the model's modalities, if any.

    Raises:
        MediaError: the question has more or fewer placeholders of a modality than there are media.
    """
    given, known = list(media), set(modalities)
    queues: dict[str, list[Any]] = defaultdict(list)
    for modality, medium in given:
        queues[modality].append(medium)
    if not any(modality_name(name) in queues for name in PLACEHOLDER.findall(question)):
        return user_message(question, given)
    parts: list[dict[str, Any]] = []
    end = 0
    for found in PLACEHOLDER.finditer(question):
        name = modality_name(found[1])
        if name not in known:
            continue
        if not queues.get(name):
            raise MediaError(too_many(found[1], name))
        parts += [{"type": "text", "text": question[end : found.start()]}]
        parts += [{"type": name, "path": queues[name].pop(0), "inline": True}]
        end = found.end()
    if left := next((name for name, media in queues.items() if media), None):
        raise MediaError(f"the text has placeholders, but too few <{left}> for the {left} media; give one for each")
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question[end:]}]}]

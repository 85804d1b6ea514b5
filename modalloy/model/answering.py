"""One answer as it grows: which token is chosen, what of its text is certain, where it ends."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modalloy.model.chat import ChatModel, Prompt
from modalloy.model.ends import Ends
from modalloy.model.opening import opening

HALF_A_CHARACTER = "\ufffd"  # what a tokenizer writes for bytes that are no whole character yet


@dataclass(frozen=True)
class Sampling:
    """How an answer is decoded."""

    max_new_tokens: int = 64
    temperature: float = 0.0  # 0: the likeliest token, always
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_ends: bool = False  # go on after an end token, to measure how fast answers are made
    top_logprobs: int | None = None  # how many alternatives are told at each token; None: no log-likelihoods at all


@dataclass(frozen=True)
class TokenLogprob:
    """A token's text and its log-likelihood in nats, by the model's own logits, and those of the likeliest tokens there."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


Pieces = Callable[[str, Sequence[TokenLogprob]], None]


class Answer:
    """Grows by `take`. `on_text` gets every piece of text once nothing that follows can change it, and its tokens' figures.

    The pieces together are the answer that `ChatModel.reply` gives: cut at the first stop string, without surrounding space.
    """

    def __init__(self, chat: ChatModel, prompt: Prompt, sampling: Sampling, on_text: Pieces) -> None:
        self.chat, self.prompt, self.sampling, self.on_text = chat, prompt, sampling, on_text
        self.ends: Ends = replace(chat.ends, strings=(*chat.ends.strings, *sampling.stop))
        self.cancelled = False  # another thread may set it: nobody waits for the answer any more
        self.finished: str | None = None  # "stop" or "length", once it ends
        self.ids: list[int] = []  # without an end token
        self.new_tokens = 0  # with it
        self.begun: float | None = None  # when the first token was chosen, on time.perf_counter's clock
        self.text = ""  # certain, but for space at its ends and the beginning of a stop string
        self.answer = ""  # the whole of it, once it has ended
        self._sent = 0  # characters of the text that were handed on, with the space before it
        self._window = self._read = 0  # tokens from which text is decoded, and those whose text is known
        self._figures: list[tuple[int, TokenLogprob]] = []  # not handed on yet: where in the text a token begins
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed % 2**63)

    def take(self, logits: Tensor) -> int:
        """Choose the next token by its logits (vocabulary,); returns it. Sets `finished` where the answer ends."""
        logits = logits.float().cpu()
        token = self._chosen(logits)
        self.new_tokens += 1
        self.begun = time.perf_counter() if self.begun is None else self.begun
        if token in self.ends.tokens and not self.sampling.ignore_ends:
            self._finish("stop")
            return token
        self.ids.append(token)
        if self.sampling.top_logprobs is not None:
            self._figures.append((len(self.text), self._figure(token, logits, self.sampling.top_logprobs)))
        self._grow()
        if self.ends.cut(self.text) != self.text:
            self._finish("stop")
        elif self.new_tokens >= self.sampling.max_new_tokens:
            self._finish("length")
        else:
            held = max(map(len, self.ends.strings), default=1) - 1
            self._send(self.text[: len(self.text) - held].rstrip())
        return token

    def _chosen(self, logits: Tensor) -> int:
        from transformers import TemperatureLogitsWarper, TopPLogitsWarper

        if self.sampling.temperature == 0:
            return int(logits.argmax())
        rows = TemperatureLogitsWarper(self.sampling.temperature)(None, logits[None])
        if self.sampling.top_p < 1:
            rows = TopPLogitsWarper(self.sampling.top_p)(None, rows)
        return int(torch.multinomial(rows[0].softmax(-1), 1, generator=self._random))

    def _figure(self, token: int, logits: Tensor, count: int) -> TokenLogprob:
        nats = logits.log_softmax(-1)
        values, ids = nats.topk(min(count, len(nats)))
        pairs = zip(ids.tolist(), values.tolist(), strict=True)
        return TokenLogprob(
            self._decoded([token], True),
            float(nats[token]),
            tuple((self._decoded([one], True), nat) for one, nat in pairs),
        )

    def _decoded(self, ids: Sequence[int], special: bool = False) -> str:
        with opening(self.chat.processor.where, "tokenizer"):
            return str(self.chat.processor.tokenizer.decode(ids, skip_special_tokens=not special))

    def _grow(self) -> None:
        """Add to the text what the last tokens say, from a window of tokens: some write a space by what stands before."""
        whole = self._decoded(self.ids[self._window :])
        if whole.endswith(HALF_A_CHARACTER):
            return
        known = self._decoded(self.ids[self._window : self._read])
        self.text += whole[len(known) :]
        self._window, self._read = self._read, len(self.ids)

    def _send(self, text: str) -> None:
        """Hand on what of `text`, a beginning of the text, is new; figures of tokens that begin in it, too."""
        begin = self._sent or len(self.text) - len(self.text.lstrip())
        if len(text) <= begin:
            return
        self._sent = len(text)
        figures = [one for at, one in self._figures if at < len(text)]
        self._figures = [(at, one) for at, one in self._figures if at >= len(text)]
        self.on_text(text[begin:], figures)

    def _finish(self, why: str) -> None:
        with opening(self.chat.processor.where, "tokenizer"):
            whole = self.chat.processor.answer(torch.tensor(self.ids, dtype=torch.long))
        self.answer = self.ends.cut(whole).strip()
        space = len(self.text) - len(self.text.lstrip())
        sent = self.text[space : self._sent]
        if self.answer.startswith(sent):  # else the tokenizer writes a whole text otherwise than its parts
            self.text = self.text[:space] + self.answer
            self._send(self.text)
        self._figures = []
        self.finished = why

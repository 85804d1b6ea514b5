"""One thread for each served model: it alone runs the model's decoder, step after step, for all who wait for answers."""

import asyncio
import statistics
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from modalloy.machine.memory import room
from modalloy.model.alone import answering
from modalloy.model.answering import Answer, TokenLogprob
from modalloy.model.batch import Batch
from modalloy.model.chat import ChatModel, Prompt
from modalloy.model.quantised import parts
from modalloy.model.routing import is_quantised
from modalloy.serve.asking import DEFAULT_TOKENS, Asked
from modalloy.serve.metrics import Metrics
from modalloy.serve.preparing import Preparer
from modalloy.serve.refusal import RefusalError, bug, refusal_of
from modalloy.serve.remote import Hosts
from modalloy.serve.turns import TURNS

KEPT_BYTES = 1_000_000_000  # at most, for keys and values of earlier turns, for each model;
KEPT_SHARE = 8  # and at most one part in so many of the memory that is free
KNOWN_BYTES = 256_000_000  # for features of media
DECODING = 2  # media that are decoded side by side, for each model


@dataclass(frozen=True)
class Piece:
    """A piece of an answer's text, with figures of the tokens that begin in it."""

    text: str
    figures: Sequence[TokenLogprob] = ()


@dataclass
class Running:
    """A request that is being answered. `pieces` gives its answer as it grows."""

    asked: Asked
    prompt: Prompt
    loop: asyncio.AbstractEventLoop
    arrived: float  # on time.perf_counter's clock, as the others
    answer: Answer = field(init=False)
    ended: float | None = None
    reused: int = 0
    events: "asyncio.Queue[Piece | BaseException | None]" = field(default_factory=asyncio.Queue)

    def tell(self, event: "Piece | BaseException | None") -> None:
        """Hand an event to the client's task, from any thread."""
        self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    async def pieces(self) -> AsyncIterator[Piece]:
        """The answer's pieces until it ends; whoever stops listening frees its place."""
        try:
            while (event := await self.events.get()) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            self.answer.cancelled = True

    @property
    def first_s(self) -> float | None:
        """Seconds from the request to its first token."""
        return None if self.answer.begun is None else self.answer.begun - self.arrived

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second after the first."""
        if self.answer.begun is None or self.ended is None or self.answer.new_tokens < 2:
            return None
        return (self.answer.new_tokens - 1) / max(self.ended - self.answer.begun, 1e-9)


class Served:
    """A model, its thread, and those who wait."""

    def __init__(
        self, name: str, chat: ChatModel, hosts: Hosts, metrics: Metrics, *, max_batch: int, max_queue: int
    ) -> None:
        self.name, self.chat, self.metrics = name, chat, metrics
        self.max_batch, self.max_queue = max_batch, max_queue
        self.preparer = Preparer(name, chat, hosts, known_bytes=KNOWN_BYTES)
        kept = min(KEPT_BYTES, free_bytes(chat.model.device) // KEPT_SHARE)
        self.engine = answering(chat, max_rows=max_batch, kept_bytes=kept)
        # the step of another engine than a batch is a whole answer, which nobody else should wait for
        self._takes_turns = isinstance(self.engine, Batch)
        _ = chat.ends  # worked out now rather than for the first who asks
        self.created = int(time.time())
        self._preparing = ThreadPoolExecutor(
            DECODING, f"prepare {name}", initializer=torch.set_num_threads, initargs=(1,)
        )  # one thread each: see `turns`
        self._waiting: deque[Running] = deque()
        self._running: list[Running] = []
        self._taken = 0  # places of requests that are being read, prepared, waited for or answered
        self._seconds: deque[float] = deque([1.0], maxlen=32)
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=f"serve {name}", daemon=True)
        self._thread.start()

    def take_place(self) -> None:
        """A place for a request, or a refusal that says when to come again."""
        if self._taken >= self.max_batch + self.max_queue:
            seconds = statistics.mean(self._seconds) * max(1, self.max_queue) / self.max_batch
            raise RefusalError(
                f"{self._taken} requests to {self.name} are under way, as many as there are places for; ask again later",
                status=429,
                code="queue_full",
                headers={"Retry-After": str(min(60, max(1, round(seconds))))},
            )
        self._taken += 1
        self.metrics.queue.labels(self.name).set(self._taken)

    def free_place(self) -> None:
        """Give the place back."""
        self._taken -= 1
        self.metrics.queue.labels(self.name).set(self._taken)

    async def ask(self, asked: Asked, arrived: float) -> Running:
        """Prepare a request, and let it wait for its answer.

        Raises:
            RefusalError: it cannot be answered.
        """
        loop = asyncio.get_running_loop()
        prompt = await loop.run_in_executor(self._preparing, self.preparer.prompt, asked)
        left = self.chat.context - len(prompt.ids)
        most = min(DEFAULT_TOKENS, max(left, 1)) if asked.max_tokens is None else asked.max_tokens
        running = Running(asked, prompt, loop, arrived)
        sampling = replace(asked.sampling, max_new_tokens=most)
        running.answer = Answer(self.chat, prompt, sampling, lambda text, figures: running.tell(Piece(text, figures)))
        try:
            self.chat.check([prompt], most)
        except Exception as error:
            raise refusal_of(error, self.preparer.hidden) or error from error
        with self._changed:
            if self._stopping:
                raise RefusalError("the server is stopping; ask another", status=503, code="stopping")
            self._waiting.append(running)
            self._changed.notify()
        return running

    def stop(self) -> None:
        """Answer what waits, then let the thread end."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()
        self._preparing.shutdown(wait=True, cancel_futures=True)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopping or not self.engine.idle)
                if self._stopping and not self._waiting and self.engine.idle:
                    return
                arriving: list[Running] = []
                while self._waiting and self.engine.room > len(arriving):
                    arriving.append(self._waiting.popleft())
            if self._takes_turns:
                TURNS.take(partial(self._advance, arriving))
            else:
                self._advance(arriving)
            self._tell()

    def _advance(self, arriving: Sequence[Running]) -> None:
        """Take in who arrives, and do one step for all."""
        for running in arriving:
            self._add(running)
        try:
            if not self.engine.idle:
                self.engine.step()
        except Exception as error:
            self.engine.clear()
            self._fail(error, list(self._running))

    def _add(self, running: Running) -> None:
        self._running.append(running)
        try:
            if not running.answer.cancelled:
                row = self.engine.add(running.answer)
                running.reused = 0 if row is None else row.reused
        except Exception as error:
            self._fail(error, [running])

    def _tell(self) -> None:
        """Note what ended, and tell those who wait for it."""
        now = time.perf_counter()
        for running in list(self._running):
            answer = running.answer
            if answer.finished or answer.cancelled:
                running.ended = now
                self._running.remove(running)
                self._seconds.append(now - running.arrived)
                self.metrics.answered(self.name, self.chat.processor.owners, running)
                running.tell(None)
        self.metrics.running.labels(self.name).set(len(self._running))
        self.metrics.known.labels(self.name).set(self.preparer.known.bytes)
        if isinstance(self.engine, Batch):
            self.metrics.kept.labels(self.name).set(self.engine.kept.bytes)

    def _fail(self, error: BaseException, lost: Sequence[Running]) -> None:
        """Tell those who lose their answers; the rest goes on."""
        refusal = refusal_of(error, self.preparer.hidden) or bug(error)
        for running in lost:
            running.tell(refusal)
            self._running.remove(running)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device; of an unknown machine, what KEPT_BYTES needs."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = room()
    return KEPT_BYTES * KEPT_SHARE if found is None else found.n_bytes


def share(chats: Sequence[ChatModel]) -> int:
    """Let models hold one copy of every tensor that is equal in several, by name; returns the bytes that this saves.

    Nothing writes into them while they are served.
    """
    first: dict[tuple[Any, ...], Any] = {}
    saved = 0
    for chat in chats:
        for name, parameter in chat.model.named_parameters():
            # what holds codes cannot be compared, but what it is made of can
            held = parts(parameter) if is_quantised(parameter) else {"data": parameter.data}
            for part, tensor in held.items():
                key = (name, part, tensor.shape, tensor.dtype, tensor.device)
                known = first.setdefault(key, tensor)
                if known.data_ptr() != tensor.data_ptr() and known.equal(tensor):
                    setattr(parameter, part, known)
                    saved += known.nbytes
    return saved

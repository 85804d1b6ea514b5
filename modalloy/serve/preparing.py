"""From a request to a prompt whose media are encoded: each decoded in a bounded child, each encoded once while it is known."""

import hashlib
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from modalloy.errors import MediaError
from modalloy.model.chat import ChatModel, Prompt
from modalloy.model.hosted import HostedModel
from modalloy.model.rendering import Message
from modalloy.senses.media import isolated
from modalloy.senses.native import Block
from modalloy.serve.asking import Asked, Medium
from modalloy.serve.refusal import RefusalError, refusal_of
from modalloy.serve.remote import Hosts
from modalloy.serve.turns import TURNS

SECONDS = 20  # of CPU for one medium
MEMORY_BYTES = 2_500_000_000  # of addresses, of which the libraries take about 1 GB
# what a stranger's medium may be, where a user's own may be larger
SMALLER = {
    "MAX_PIXELS": 25_000_000,
    "MAX_WEBP_PIXELS": 25_000_000,
    "MAX_FRAME_PIXELS": 8_847_360,  # 4K
    "MAX_ANIMATION_PIXELS": 200_000_000,
    "MAX_VIDEO_PIXELS": 4_000_000_000,
    "MAX_SECONDS": 600,
    "MAX_SAMPLES": 28_800_000,
    "MAX_POINTS": 2_000_000,
    "MAX_POINT_FILE_BYTES": 100_000_000,
}


class Known:
    """What is known of media by the hash of what they are, the longest unused given up first beyond `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self._found: OrderedDict[Any, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        """What is known under a key, made now if nothing is."""
        with self._lock:
            if key in self._found:
                self._found.move_to_end(key)
                return self._found[key]
        made = make()
        with self._lock:
            if key not in self._found:
                self._found[key] = made
                self.bytes += _size(made)
            while self.bytes > self.limit:
                self.bytes -= _size(self._found.popitem(last=False)[1])
        return made


class Preparer:
    """Makes the prompts of one model's requests, in any number of threads: media are decoded side by side, then encoded in turn."""

    def __init__(self, name: str, chat: ChatModel, hosts: Hosts, *, known_bytes: int) -> None:
        self.name, self.chat, self.hosts = name, chat, hosts
        self.known = Known(known_bytes)
        self._composing = threading.Lock()

    @property
    def hidden(self) -> dict[str, str]:
        """Words of this machine that no client sees, and what stands for each."""
        where = str(self.chat.processor.where)
        return {where: self.name} if "/" in where else {}

    def prompt(self, asked: Asked) -> Prompt:
        """The prompt of a request.

        Raises:
            RefusalError: the model does not take a medium, or it cannot be read, or its template refuses the conversation.
        """
        with tempfile.TemporaryDirectory(prefix="modalloy-serve-") as folder:
            turns: list[Message] = [
                turn | {"content": self._parts(turn["content"], Path(folder))} for turn in asked.turns
            ]
            with self._composing:
                try:
                    return self.chat.prompt(turns, features=self._features, blocks=self._blocks)
                except Exception as error:
                    raise refusal_of(error, self.hidden) or error from error

    def _parts(self, content: Any, folder: Path) -> Any:
        if isinstance(content, str):
            return content
        return [
            part | {"path": self._read(part["type"], part["path"], folder)} if part["type"] != "text" else part
            for part in content
        ]

    def _read(self, modality: str, medium: Medium, folder: Path) -> "_Shown":
        """A medium as every sense of its modality takes it."""
        able, where = self.chat.modalities, medium.label
        if modality not in able:
            raise RefusalError(
                f"{where}: {self.name} takes no {modality} input; it takes: {', '.join(able) or 'text only'}",
                param=where,
                code="invalid_media",
            )
        path = folder / "medium"
        try:
            data = medium.data if medium.data is not None else self.hosts.fetch(medium.url or "")
            key = hashlib.sha256(data).digest()
            senses = [modality] if isinstance(self.chat, HostedModel) else self.chat.processor.senses_of(modality)

            def decoded(sense: str) -> Any:
                path.write_bytes(data)
                with isolated(seconds=SECONDS, memory_bytes=MEMORY_BYTES, forks=True, smaller=SMALLER):
                    if isinstance(self.chat, HostedModel):
                        return self.chat.features(sense, path)
                    return self.chat.processor.preprocess(sense, path)

            return _Shown(key, {sense: self._known_or(sense, key, decoded) for sense in senses})
        except MediaError as error:
            reason = str(error).replace(str(path), where)
            reason = reason if where in reason else f"{where}: {reason}"
            raise RefusalError(reason, param=where, code="invalid_media") from error

    def _known_or(self, sense: str, key: bytes, decoded: Callable[[str], Any]) -> Any:
        """The features of a medium; or of a hosted model or a native sense, the medium in memory."""

        def make() -> Any:
            found = decoded(sense)
            if isinstance(self.chat, HostedModel) or sense in self.chat.processor.preparers:
                return found
            return TURNS.take(lambda: self.chat.model.encode(sense, found[None])[0])

        return self.known.get((sense, key), make)

    def _features(self, sense: str, medium: Any) -> Any:
        return medium.by_sense[sense]

    def _blocks(self, sense: str, media: list[Any]) -> list[Block]:
        """Blocks of all of a conversation's media of a native modality, which are made together."""

        def make() -> list[Block]:
            return TURNS.take(lambda: self.chat.blocks(sense, media))

        return list(self.known.get((sense, *map(_digest, media)), make))


class _Shown:
    """In the place of a medium's path: its hash, and what each sense takes of it."""

    def __init__(self, key: bytes, by_sense: dict[str, Any]) -> None:
        self.key, self.by_sense = key, by_sense


def _digest(medium: Any) -> bytes:
    """The hash of a picture, of samples, or of frames in memory."""
    array = np.asarray(medium)
    return hashlib.sha256(f"{array.shape} {array.dtype}".encode() + array.tobytes()).digest()


def _size(one: Any) -> int:
    """Bytes that a thing takes, roughly where it is no array."""
    if isinstance(one, (Tensor, np.ndarray)):
        return int(one.nbytes)
    if isinstance(one, Block):
        parts = (one.embeddings, one.positions, one.visual, one.deepstack, one.together)
        return sum(part.nbytes for part in parts if part is not None)
    if isinstance(one, (list, tuple)):
        return sum(map(_size, one))
    return int(np.asarray(one).nbytes)

"""A server of a tiny merged model, on a free port of the loopback, for tests."""

import base64
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from modalloy import builtin
from modalloy.model.chat import ChatModel
from modalloy.serve.app import application
from modalloy.serve.metrics import Metrics
from modalloy.serve.options import listening
from modalloy.serve.queue import Served
from modalloy.serve.remote import Hosts
from modalloy.serve.server import Server, settings

PICTURE, OTHER, SOUND = (builtin.SAMPLES / name for name in ("horse.webp", "cow.webp", "dog.flac"))
CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"


class Site:
    """A server that runs, and what it serves."""

    def __init__(self, port: int, served: Mapping[str, Served], app: Any) -> None:
        self.port, self.served, self.app = port, served, app
        self.url = f"http://127.0.0.1:{port}"

    def ask(
        self, path: str, body: Any = None, *, method: str = "POST", headers: Mapping[str, str] | None = None
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers and body (JSON where it is) of a request."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        connection.request(method, path, content, {"Content-Type": "application/json", **(headers or {})})
        got = connection.getresponse()
        raw, found = got.read(), {name.lower(): value for name, value in got.getheaders()}
        connection.close()
        return got.status, found, json.loads(raw) if "json" in found.get("content-type", "") else raw

    def chat(self, *parts: dict[str, Any], model: str = "merged", **options: Any) -> tuple[int, dict[str, str], Any]:
        """A chat completion for one user turn."""
        return self.ask(CHAT, body(*parts, model=model, **options))

    def figure(self, name: str) -> float:
        """A metric by its name and labels."""
        lines = self.ask("/metrics", method="GET")[2].decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


@contextmanager
def site(
    chats: Mapping[str, ChatModel],
    *,
    folders: Mapping[str, Path] | None = None,
    max_batch: int = 8,
    max_queue: int = 16,
    keys: tuple[str, ...] = (),
) -> Iterator[Site]:
    """A server of these models, loaded from `folders` where a test asks what is in them."""
    metrics = Metrics()
    served = {
        name: Served(name, chat, Hosts(()), metrics, max_batch=max_batch, max_queue=max_queue)
        for name, chat in chats.items()
    }
    app = application(served, metrics, folders=folders or {}, keys=keys)
    with listening("127.0.0.1", 0) as listener:
        server = Server(settings(app))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        until(lambda: server.started)
        try:
            yield Site(listener.getsockname()[1], served, app)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def until(is_so: Any, seconds: float = 20.0) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not become so in time"
        time.sleep(0.01)


def encoded(data: bytes | Path) -> str:
    return base64.b64encode(data if isinstance(data, bytes) else data.read_bytes()).decode()


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def image(data: bytes | Path, kind: str = "image/webp") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{encoded(data)}"}}


def sound(data: bytes | Path) -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": encoded(data), "format": "wav"}}


def body(*parts: dict[str, Any], model: str = "merged", **options: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": list(parts)}], "max_tokens": 12, **options}

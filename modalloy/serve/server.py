"""From folders and options to a server that answers until it is told to stop."""

import asyncio
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from modalloy.model.llama_cpp import load_by
from modalloy.serve.app import GRACE_SECONDS, application
from modalloy.serve.metrics import Metrics
from modalloy.serve.options import Options, address, is_loopback, reached
from modalloy.serve.queue import Served, share
from modalloy.serve.turns import TURNS
from modalloy.storage.locate import locate

MAX_CONNECTIONS = 512
HEAD_SECONDS = 20.0  # for the head of a request, from the connection or its first byte


def serve(
    models: Mapping[str, Path],
    listener: socket.socket,
    options: Options,
    on_line: Callable[[str], None],
    on_ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Answer requests to these models until SIGTERM or SIGINT, then finish what runs.

    Args:
        models: by name, their folders.
        listener: bound to the address.
        options: what else was said.
        on_line: gets what a user is told.
        on_ready: gets the page's address once it can be asked for.

    Raises:
        ModalloyError: an option is wrong, or a model cannot be loaded.
    """
    keys, hosts, metrics = options.keys, options.hosts, Metrics()
    chats = {}
    for name, path in models.items():
        given = {"device": options.device, "dtype": options.dtype, "quantize": options.quantize}
        load = partial(load_by, options.engine, path, context=options.context, sequences=options.max_batch, **given)
        chats[name] = TURNS.take(load)
        on_line(f"loaded   {name}: text, {', '.join(chats[name].modalities) or 'nothing else'}")
    if saved := TURNS.take(partial(share, list(chats.values()))):
        on_line(f"shared   {saved / 1e6:.0f} MB of equal weights are held once")
    served = {
        name: Served(name, chat, hosts, metrics, max_batch=options.max_batch, max_queue=options.max_queue)
        for name, chat in chats.items()
    }
    folders = {name: locate(str(path), whole=True) for name, path in models.items()}  # of the hub: where they are kept
    app = application(served, metrics, folders=folders, keys=keys, loopback=is_loopback(options.host))

    def ready() -> None:
        port = listener.getsockname()[1]
        url = f"http://{address(options.host)}:{port}"
        on_line(f"serving  {url} ({', '.join(served)}): the page is there, the routes under /v1; Ctrl-C ends it")
        on_ready(f"http://{address(reached(options.host))}:{port}")

    asyncio.run(Server(settings(app), ready).serve(sockets=[listener]))


def settings(app: Any) -> uvicorn.Config:
    """How uvicorn serves the application: no logs of requests, no WebSockets, bounded in connections and time."""
    return uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="error",  # a warning for each request that is no HTTP would be a stranger's
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=int(GRACE_SECONDS),
    )


class Protocol(H11Protocol):
    """Ends a connection on which the head of a request does not arrive in time, however slowly its bytes come."""

    late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Wait for the first head."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Take bytes, and wait on while they are no whole head."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._end_wait()
        elif self.late is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._end_wait()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self.late = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _end_wait(self) -> None:
        if self.late is not None:
            self.late.cancel()
            self.late = None


class Server(uvicorn.Server):
    """Says when it can be asked, and ends as a command that did what it was told to, not by the signal that told it to."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None] = lambda: None) -> None:
        super().__init__(config)
        self.on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        if self.started:
            self.on_ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The signals are uvicorn's while it serves, and not raised again afterwards."""
        with super().capture_signals():
            yield
            self._captured_signals.clear()

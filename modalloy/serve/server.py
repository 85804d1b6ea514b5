"""From folders and options to a server that answers until it is told to stop."""

import asyncio
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from modalloy.model.llama_cpp import load_by
from modalloy.serve.app import GRACE_SECONDS, application
from modalloy.serve.metrics import Metrics
from modalloy.serve.options import Options, is_loopback
from modalloy.serve.queue import Served, share
from modalloy.storage.locate import locate

MAX_CONNECTIONS = 512


def serve(
    models: Mapping[str, Path], listener: socket.socket, options: Options, on_line: Callable[[str], None]
) -> None:
    """Answer requests to these models until SIGTERM or SIGINT, then finish what runs. `on_line` gets what a user is told.

    Raises:
        ModalloyError: an option is wrong, or a model cannot be loaded.
    """
    keys, hosts, metrics = options.keys, options.hosts, Metrics()
    chats = {}
    for name, path in models.items():
        given = {"device": options.device, "dtype": options.dtype, "quantize": options.quantize}
        chats[name] = load_by(options.engine, path, context=options.context, sequences=options.max_batch, **given)
        on_line(f"loaded   {name}: text, {', '.join(chats[name].modalities) or 'nothing else'}")
    if saved := share(list(chats.values())):
        on_line(f"shared   {saved / 1e6:.0f} MB of equal weights are held once")
    served = {
        name: Served(name, chat, hosts, metrics, max_batch=options.max_batch, max_queue=options.max_queue)
        for name, chat in chats.items()
    }
    folders = {name: locate(str(path), whole=True) for name, path in models.items()}  # of the hub: where they are kept
    app = application(served, metrics, folders=folders, keys=keys, loopback=is_loopback(options.host))
    settings = uvicorn.Config(
        app,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=int(GRACE_SECONDS),
    )
    port = listener.getsockname()[1]
    shown = f"[{options.host}]" if ":" in options.host else options.host
    on_line(
        f"serving  http://{shown}:{port} ({', '.join(served)}): the page is there, the routes under /v1; Ctrl-C ends it"
    )
    asyncio.run(Server(settings).serve(sockets=[listener]))


class Server(uvicorn.Server):
    """Ends as a command that did what it was told to, rather than by the signal that told it to stop."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The signals are uvicorn's while it serves, and not raised again afterwards."""
        with super().capture_signals():
            yield
            self._captured_signals.clear()

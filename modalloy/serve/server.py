"""From folders and options to a server that answers until it is told to stop."""

import asyncio
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from modalloy.errors import ModalloyError
from modalloy.model import load_model
from modalloy.serve.app import GRACE_SECONDS, application
from modalloy.serve.guard import is_loopback, read_keys
from modalloy.serve.metrics import Metrics
from modalloy.serve.queue import Served, share
from modalloy.serve.remote import Hosts

MAX_CONNECTIONS = 512


@dataclass(frozen=True)
class Options:
    """What a server is told."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    no_key: bool = False
    device: str = "cpu"
    dtype: str = "float32"
    max_batch: int = 8
    max_queue: int = 64
    media_hosts: Sequence[str] = ()


def serve(models: Mapping[str, Path], options: Options, on_line: Callable[[str], None]) -> None:
    """Answer requests to these models until SIGTERM or SIGINT, then finish what runs. `on_line` gets what a user is told.

    Raises:
        ModalloyError: an option is wrong, a model cannot be loaded, or the port is taken.
    """
    keys = () if options.api_key_file is None else read_keys(options.api_key_file)
    loopback = is_loopback(options.host)
    if not loopback and not keys and not options.no_key:
        raise ModalloyError(
            f"--host {options.host}: whoever reaches this machine could ask; give --api-key-file, or say --no-key"
        )
    hosts, metrics = Hosts(options.media_hosts), Metrics()
    with listening(options.host, options.port) as listener:
        chats = {}
        for name, path in models.items():
            chats[name] = load_model(path, device=options.device, dtype=options.dtype)
            on_line(f"loaded   {name}: text, {', '.join(chats[name].modalities) or 'nothing else'}")
        if saved := share(list(chats.values())):
            on_line(f"shared   {saved / 1e6:.0f} MB of equal weights are held once")
        served = {
            name: Served(name, chat, hosts, metrics, max_batch=options.max_batch, max_queue=options.max_queue)
            for name, chat in chats.items()
        }
        app = application(served, metrics, keys=keys, loopback=loopback)
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
        on_line(f"serving  http://{shown}:{port} ({', '.join(served)})")
        asyncio.run(Server(settings).serve(sockets=[listener]))


class Server(uvicorn.Server):
    """Ends as a command that did what it was told to, rather than by the signal that told it to stop."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The signals are uvicorn's while it serves, and not raised again afterwards."""
        with super().capture_signals():
            yield
            self._captured_signals.clear()


@contextmanager
def listening(host: str, port: int) -> Iterator[Any]:
    """A socket that listens, before models are loaded: a port that is taken is told at once.

    Raises:
        ModalloyError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ModalloyError(f"--host {host}: no such address ({error.strerror}); give one of this machine") from error
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise ModalloyError(
                f"--host {host} --port {port}: cannot be listened at ({error.strerror}); choose another --port"
            ) from error
        yield listener

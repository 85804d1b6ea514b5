"""What a server is told, and what of it can be refused before torch is imported."""

import ipaddress
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from modalloy.errors import ModalloyError
from modalloy.serve.remote import Hosts

KEY = re.compile(r"[!-~]{8,}")


@dataclass(frozen=True)
class Options:
    """What a server is told."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    no_key: bool = False
    device: str = "cpu"
    dtype: str = "float32"
    quantize: str | None = None
    engine: str = "torch"
    context: int | None = None  # of llama.cpp's cache
    max_batch: int = 8
    max_queue: int = 64
    media_hosts: Sequence[str] = ()

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The keys that clients may send.

        Raises:
            ModalloyError: the file holds none, or others than it may; or there must be some and are not.
        """
        keys = () if self.api_key_file is None else read_keys(self.api_key_file)
        if not (is_loopback(self.host) or keys or self.no_key):
            raise ModalloyError(
                f"--host {self.host}: whoever reaches this machine could ask; give --api-key-file, or say --no-key"
            )
        return keys

    @cached_property
    def hosts(self) -> Hosts:
        """The hosts that media may be fetched from.

        Raises:
            ModalloyError: one is no host.
        """
        return Hosts(self.media_hosts)


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys in a file, one a line; empty lines and those that begin with # are left out.

    Raises:
        ModalloyError: there are none, or one is shorter than 8 characters, or has others than letters, digits and signs.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ModalloyError(f"--api-key-file {path}: is no text; write one key a line") from error
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ModalloyError(f"--api-key-file {path}: holds no key; write one a line")
    for number, key in enumerate(keys, 1):
        if not KEY.fullmatch(key):
            raise ModalloyError(
                f"--api-key-file {path}: key {number} is shorter than 8 characters, or holds spaces or other letters than "
                "ASCII's; make one with `openssl rand -hex 24`"
            )
    return keys


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def address(host: str) -> str:
    """A host as it stands in a URL."""
    return f"[{host}]" if ":" in host else host


def reached(host: str) -> str:
    """The name by which this machine reaches what listens at a host."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket at this address, had before models are loaded: a port that is taken is told at once.

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

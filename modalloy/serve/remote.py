"""Media from other hosts: those that were allowed by name, over https, at a public address that was checked and no other."""

import ipaddress
import socket
import time
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import urlsplit

from modalloy.errors import MediaError, ModalloyError, plain

MAX_BYTES = 48_000_000
SECONDS = 30.0  # for all of a medium
PORT = 443


class Hosts:
    """The hosts that media may be fetched from, each with the port it was allowed with.

    Raises:
        ModalloyError: what was given is no host's name.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.allowed: set[tuple[str, int]] = set()
        for name in names:
            try:
                parts = urlsplit(f"https://{name}")
                host, port = parts.hostname, parts.port or PORT
            except ValueError:
                host, port = None, PORT
            if not host or parts.netloc.lower() != name.lower() or "@" in name:
                raise ModalloyError(
                    f"--allow-media-host {plain(name)}: is no host; write for example media.example.org"
                )
            self.allowed.add((host.lower(), port))

    def fetch(self, url: str) -> bytes:
        """The bytes at an https address of an allowed host. Redirects are refused; no proxy is used.

        Raises:
            MediaError: the host is not allowed or not public, or the medium is too large, too slow, or not there.
        """
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").lower(), parts.port or PORT
        except ValueError as error:
            raise MediaError(f"'{plain(url)}' is no address ({plain(error)}); correct it") from error
        if not self.allowed:
            raise MediaError(
                "media are not fetched from other hosts here; send the medium itself as data:TYPE;base64,…, or start the "
                "server with --allow-media-host"
            )
        if parts.scheme != "https" or parts.username is not None or (host, port) not in self.allowed:
            raise MediaError(f"the host {plain(host)} is not allowed; send the medium itself, as data:TYPE;base64,…")
        return _get(url, host)


def _get(url: str, host: str) -> bytes:
    import httpcore2

    end = time.monotonic() + SECONDS
    backend = _checked(httpcore2)
    try:
        with (
            httpcore2.ConnectionPool(network_backend=backend, retries=0) as pool,
            pool.stream(
                "GET", url, headers={"Host": urlsplit(url).netloc}, extensions={"timeout": _limits(end)}
            ) as got,
        ):
            if got.status != 200:
                raise MediaError(f"{plain(host)} answered {got.status}; only 200 is taken, and no redirect")
            found = bytearray()
            for piece in got.iter_stream():
                found += piece
                if len(found) > MAX_BYTES:
                    raise MediaError(f"the medium at {plain(host)} has more than {MAX_BYTES} bytes; use a smaller one")
                if time.monotonic() > end:
                    raise MediaError(f"the medium at {plain(host)} did not arrive in {SECONDS:.0f} s; try another")
            return bytes(found)
    except (httpcore2.TimeoutException, httpcore2.NetworkError, httpcore2.ProtocolError, OSError) as error:
        raise MediaError(
            f"the medium at {plain(host)} cannot be fetched ({plain(error) or type(error).__name__}); try again"
        ) from error


def _limits(end: float) -> dict[str, float]:
    left = max(0.1, end - time.monotonic())
    return dict.fromkeys(("connect", "read", "write", "pool"), left)


def _checked(httpcore: Any, resolve: Callable[..., Any] = socket.getaddrinfo) -> Any:
    """A network backend that connects to addresses only which it has checked itself."""

    class Checked(httpcore.SyncBackend):
        def connect_tcp(self, host: str, port: int, **options: Any) -> Any:
            return super().connect_tcp(public_address(host, port, resolve), port, **options)

        def connect_unix_socket(self, *_: Any, **__: Any) -> Any:
            raise MediaError("media are fetched over https only")

    return Checked()


def public_address(host: str, port: int, resolve: Callable[..., Any] = socket.getaddrinfo) -> str:
    """The first address of a host, all of whose addresses must be public.

    Raises:
        MediaError: one is not: it is private, of this machine or its network, or reserved.
    """
    try:
        found = [str(one[4][0]) for one in resolve(host, port, type=socket.SOCK_STREAM)]
    except OSError as error:
        raise MediaError(f"the host {plain(host)} cannot be found ({plain(error.strerror)}); check its name") from error
    for address in found:
        if not is_public(address):
            raise MediaError(
                f"the host {plain(host)} is at {address}, which is not public; nothing is fetched from there"
            )
    return found[0]


def is_public(address: str) -> bool:
    """Whether an address belongs to the public internet, also where an IPv6 one wraps an IPv4 one."""
    one = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(one, ipaddress.IPv6Address):
        inner = one.ipv4_mapped or one.sixtofour or (one.teredo or (None, None))[1]
        if one in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(one) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return one.is_global and not one.is_multicast

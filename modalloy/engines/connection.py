"""The way to a Ray cluster: one that is there, or one of this machine's processors."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from modalloy.errors import OutputError, plain

KNOCK_S = 5
CLIENT_PORT = "10001"  # of ray://HOST
SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # what either side of HTTP/2 sends first (RFC 9113, 3.4), if empty
GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SETTINGS


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """A cluster: that at `address` (or `RAY_ADDRESS`), else one of this machine's processors, for the time of the block.

    Raises:
        OutputError: none can be reached there.
    """
    import ray

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    option = "--ray-address" if address else "RAY_ADDRESS"
    address = address or os.environ.get("RAY_ADDRESS")
    began = not ray.is_initialized()
    if began:
        try:
            knock(address)
            with _own_signals():
                ray.init(
                    address=address or "local", log_to_driver=False, logging_level="ERROR", include_dashboard=False
                )
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            where = f"{option} {address}" if address else "Ray on this machine"
            raise OutputError(
                f"{where}: no cluster can be reached there ({plain(error)}); start one with `ray start --head`, "
                "set RAY_AUTH_MODE=token if it asks for a token, "
                f"or {'unset it' if option == 'RAY_ADDRESS' else 'leave the address out'}"
            ) from error
    try:
        yield
    finally:
        if began:
            ray.shutdown()


@contextmanager
def _own_signals() -> Iterator[None]:
    """SIGTERM stays this process's: by Ray's handler it would look like a refusal, after which what is finished is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def knock(address: str | None) -> None:
    """Fail at once where nothing listens, or what does not answer as gRPC does; Ray itself waits minutes for either."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not colon and "://" in (address or ""):
        host, port = port, CLIENT_PORT
    if not (host and port.isdecimal()):
        return
    with socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_S) as line:
        if os.environ.get("RAY_USE_TLS", "0") != "0":
            return
        line.sendall(GREETING)
        answer = b""
        with suppress(TimeoutError):
            while len(answer) < len(SETTINGS) and (more := line.recv(len(SETTINGS) - len(answer))):
                answer += more
        if answer[3:4] != SETTINGS[3:4]:
            raise ConnectionError("what listens there is not Ray")

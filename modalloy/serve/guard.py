"""What stands before every request: keys, hosts, the sizes of bodies, and headers of every answer."""

import hashlib
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

import anyio
from starlette.requests import Request
from starlette.responses import JSONResponse

from modalloy.serve.options import is_loopback
from modalloy.serve.refusal import RefusalError

MAX_BODY_BYTES = 64_000_000
MAX_BODIES_BYTES = 512_000_000  # of all requests whose media are not decoded yet
PAUSE_SECONDS = 20.0  # between two pieces of a body
BODY_SECONDS = 120.0  # for all of it
KEYED = ("/v1/", "/modalloy/", "/metrics")
# the page is all our own: nothing from other hosts, nothing in a frame
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "font-src 'self'; connect-src 'self'; worker-src 'self' blob:; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
)
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": CSP,
    "x-frame-options": "DENY",
}

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Guard:
    """The outermost layer of the application."""

    def __init__(
        self, app: Any, *, count: Callable[[str, str], Any], keys: tuple[str, ...] = (), loopback: bool = True
    ) -> None:
        self.app, self.loopback, self.count = app, loopback, count
        self.keys = tuple(map(_digest, keys))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                # the page's files are asked for again: those of another version would not fit each other
                own.append((b"cache-control", b"no-store" if scope["path"].startswith(KEYED) else b"no-cache"))
                route = getattr(scope.get("route"), "path", "other")  # a stranger's path would be a counter each
                self.count(route, str(message["status"])).inc()
                known = {name for name, _ in own}
                message["headers"] = [pair for pair in message["headers"] if pair[0].lower() not in known] + own
            await send(message)

        try:
            self.check(scope)
        except RefusalError as refusal:
            await JSONResponse(refusal.body, refusal.status, refusal.headers)(scope, receive, with_headers)
            return
        await self.app(scope, receive, with_headers)

    def check(self, scope: Scope) -> None:
        """Refuse a request from a page of another site, and one without a key where there are keys.

        Raises:
            RefusalError: with status 400, 401, 403 or 413.
        """
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "")
        if self.loopback and not is_loopback(_name(host)):
            # a page of another site, whose name was made to lead to this machine, cannot read what is answered here
            raise RefusalError("the Host header is none of this machine; ask 127.0.0.1 or localhost", status=403)
        origin = headers.get(b"origin")
        if origin is not None and _place(origin) != host.lower():
            raise RefusalError("pages of other sites are not answered; ask from the server's own page", status=403)
        length = headers.get(b"content-length", "")
        if length and b"transfer-encoding" in headers:  # whoever stands in between may go by the other (RFC 9112, 6.3)
            raise RefusalError("Content-Length and Transfer-Encoding exclude each other; send one of them")
        if length.isdecimal() and int(length[:20]) > MAX_BODY_BYTES:
            raise _too_large()
        if self.keys and scope["path"].startswith(KEYED):
            scheme, _, key = headers.get(b"authorization", "").partition(" ")
            given = _digest(key.strip())
            # all are compared, each in constant time, whatever its length
            right = [hmac.compare_digest(given, one) for one in self.keys]
            if scheme.lower() != "bearer" or not any(right):
                raise RefusalError(
                    "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                    status=401,
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )


def _too_large() -> RefusalError:
    return RefusalError(f"the body has more than {MAX_BODY_BYTES} bytes; send fewer or smaller media", status=413)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _place(origin: str) -> str:
    """Host and port of an Origin header."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


class Bodies:
    """Reads bodies within limits of size and time, and counts what is held of all."""

    def __init__(self) -> None:
        self.held = 0

    async def read(self, request: Request) -> bytes:
        """The body of a request, which is JSON. `free` its length when it was used.

        Raises:
            RefusalError: it is too long or too slow, or no JSON by its header, or others take all room.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # what a page of another site may send unasked is none
            raise RefusalError("the content type is not application/json; send JSON", status=415)
        body = bytearray()
        end = anyio.current_time() + BODY_SECONDS
        pieces = request.stream().__aiter__()
        try:
            while True:
                with anyio.fail_after(min(end - anyio.current_time(), PAUSE_SECONDS)):
                    piece = await anext(pieces, None)
                if piece is None:
                    break
                body += piece
                self.held += len(piece)
                if len(body) > MAX_BODY_BYTES:  # which no Content-Length told
                    raise _too_large()
                if self.held > MAX_BODIES_BYTES:
                    raise RefusalError(
                        "too much is being sent at once; ask again later", status=429, headers={"Retry-After": "2"}
                    )
        except TimeoutError as error:
            self.free(len(body))
            raise RefusalError("the body did not arrive in time; send it again", status=408) from error
        except BaseException:
            self.free(len(body))
            raise
        return bytes(body)

    def free(self, length: int) -> None:
        """What was held of a body is let go."""
        self.held -= length

"""What a client is told when something is refused: one line, in the shape of OpenAI's errors."""

import sys
import traceback
from pathlib import Path
from typing import Any

from modalloy.errors import LengthError, MediaError, ModalloyError, OutOfMemoryError, plain, ran_out_of_memory

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class RefusalError(Exception):
    """An answer that is an error: its status, one line, and where in the request the cause is."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def refusal_of(error: BaseException, hidden: dict[str, str] | None = None) -> RefusalError | None:
    """What a client is told of an error; None if it is a bug. `hidden`: words of this machine, and what stands for each."""
    if isinstance(error, RefusalError):
        return error
    message = str(error)
    for word, shown in (hidden or {}).items():
        message = message.replace(word, shown)
    if isinstance(error, OutOfMemoryError) or ran_out_of_memory(error):
        return RefusalError("memory ran out; ask again later, with fewer or smaller media", status=503, code="memory")
    if isinstance(error, LengthError):
        return RefusalError(message, param="messages", code="context_length_exceeded")
    if isinstance(error, MediaError):
        return RefusalError(message, code="invalid_media")
    if isinstance(error, ModalloyError):  # the model is loaded: what fails now fails at this conversation
        return RefusalError(message, code="invalid_conversation")
    return None


def bug(error: BaseException) -> RefusalError:
    """What a client is told of a bug; what it was is a line on stderr."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" in {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    print(f"error: a bug of modalloy{place}: {type(error).__name__}: {plain(error)}", file=sys.stderr, flush=True)
    return RefusalError("a bug of modalloy; the server's own output says more", status=500, code="bug")

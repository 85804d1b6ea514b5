"""A child process that answers lines: a request is a line of JSON, an answer is a line."""

import json
import select
import subprocess
from typing import Any


def answer_of(process: "subprocess.Popen[bytes]", request: Any, seconds: float) -> bytes | None:
    """The child's next line; without its end, or empty, if the child ended; None if none came in time.

    Whoever is interrupted here must end the child: an answer that nobody read would be taken for the next one's.

    Args:
        process: with pipes for its standard input and output.
        request: of JSON's types.
        seconds: of the clock, to wait for the answer.
    """
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        return process.stdout.readline() if ready else None
    except BrokenPipeError:
        return b""

"""The child process of `bounded`: renders a stranger's chat templates and tries a stranger's tokenizers within limits.

Run by path, it imports nothing of modalloy. Each line of standard input is a request in JSON, each line of standard output
its answer. What goes on too long, or takes too much memory, ends the process.
"""

import json
import resource
import sys
from collections import OrderedDict
from datetime import datetime
from functools import lru_cache
from typing import Any

KEPT = 4  # tokenizers that are kept open


class RefusalError(Exception):
    """What a template's `raise_exception` raises."""


class SizeError(Exception):
    """A prompt that grows past the limit."""


def main() -> None:
    """Answer requests until standard input ends."""
    sys.path += json.loads(sys.argv[1])  # where jinja2 and tokenizers are
    limits = json.loads(sys.argv[2])
    if sys.platform == "linux":  # elsewhere the system does not keep it
        resource.setrlimit(resource.RLIMIT_AS, (limits["bytes"], limits["bytes"]))
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        spent = int(used.ru_utime + used.ru_stime)
        resource.setrlimit(resource.RLIMIT_CPU, (spent + limits["seconds"], resource.getrlimit(resource.RLIMIT_CPU)[1]))
        print(json.dumps(answer(json.loads(line), limits["characters"])), flush=True)


def answer(request: dict[str, Any], longest: int) -> dict[str, Any]:
    """What was asked for, or {"error": kind, "reason": text}."""
    try:
        if request["do"] == "render":
            return {"text": render(request["template"], request["variables"], longest)}
        return {"tokens": encode(request["key"], request.get("tokenizer"), request["text"])}
    except RefusalError as error:
        return {"error": "refusal", "reason": str(error)}
    except SizeError:
        return {"error": "size", "reason": ""}
    except MemoryError:
        return {"error": "memory", "reason": ""}
    except BaseException as error:  # Rust's PanicException is no Exception; whatever it is, the parent says it
        line = getattr(error, "lineno", None)
        reason = f"{type(error).__name__}: {str(error)[:1000]}" + (f" (line {line})" if isinstance(line, int) else "")
        return {"error": "failure", "reason": reason}


def render(template: str, variables: dict[str, Any], longest: int) -> str:
    """The text of a template, as transformers renders it."""
    pieces, length = [], 0
    for piece in compiled(template).generate(variables):
        pieces.append(piece)
        length += len(piece)
        if length > longest:
            raise SizeError
    return "".join(pieces)


@lru_cache(maxsize=16)
def compiled(template: str) -> Any:
    """A template in the sandbox whose settings, tags, filters and functions are those of transformers."""
    from jinja2 import ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """{% generation %} marks what the model wrote; here it is rendered like the rest."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: Any) -> None:
        raise RefusalError(str(message))

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment.from_string(template)


opened: "OrderedDict[str, Any]" = OrderedDict()


def encode(key: str, tokenizer: str | None, text: str) -> int:
    """How many tokens a text takes by a tokenizer of the library `tokenizers`, given in JSON at its first use."""
    from tokenizers import Tokenizer

    if tokenizer is not None:
        opened[key] = Tokenizer.from_str(tokenizer)
        opened[key].no_padding()
        opened[key].no_truncation()
        while len(opened) > KEPT:
            opened.popitem(last=False)
    if key not in opened:
        return -1
    opened.move_to_end(key)
    return len(opened[key].encode(text, add_special_tokens=False).ids)


if __name__ == "__main__":
    main()

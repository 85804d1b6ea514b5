"""The command that writes a merged model in the form of another runtime."""

import json
from pathlib import Path
from typing import Annotated

import typer

from modalloy.cli.options import Json, OutFolder, choice
from modalloy.cli.terminal import say
from modalloy.errors import ModalloyError
from modalloy.export import TARGETS


def export(
    out: OutFolder,
    to: Annotated[str, typer.Option(help=", ".join(TARGETS), show_default=False)],
    folder: Annotated[Path, typer.Option("-o", "--out", help="folder to make", show_default=False)],
    kind: Annotated[
        str | None, typer.Option("--type", help="llama.cpp: f16 (default), q8_0 or f32 of the base", show_default=False)
    ] = None,
    gguf: Annotated[
        Path | None, typer.Option(help="llama.cpp: the base as GGUF, of any type, to be copied", show_default=False)
    ] = None,
    as_json: Json = False,
) -> Path:
    """Write a merged model for another runtime: llama.cpp (routed), transformers (without modalloy), or vLLM."""
    choice("--to", to, TARGETS)
    if to != "llama.cpp" and (kind or gguf):
        raise ModalloyError(f"{'--type' if kind else '--gguf'}: is of --to llama.cpp; leave it out")
    if kind and gguf:
        raise ModalloyError("--type: the base of --gguf has a type already; give one of them")
    if gguf is not None and not gguf.is_file():
        raise ModalloyError(f"--gguf {gguf}: no such file; check the path")
    from modalloy.export.targets import write

    done = write(to, out, folder, kind=kind or "f16", gguf=gguf)
    if as_json:
        print(json.dumps(done))
        return folder
    for line in done["lines"]:
        say(line)
    return folder

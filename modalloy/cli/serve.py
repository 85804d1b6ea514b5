"""The command that answers over HTTP."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from modalloy.cli.options import DEVICES, DTYPES, Context, Engine, Quantize, check_engine, check_quantize, choice, here
from modalloy.cli.progress import progress
from modalloy.errors import ModalloyError

DEMO = "demo"


def serve(
    out: Annotated[Path | None, here("omni folder, or any other that `chat` opens")] = None,
    model: Annotated[
        list[str] | None, typer.Option(metavar="NAME=OUT", help="a model under a name of its own; may be repeated")
    ] = None,
    demo: Annotated[
        bool,
        typer.Option("--demo", help="serve the merge of the built-in specialists, made if needed, and open the page"),
    ] = False,
    no_open: Annotated[bool, typer.Option("--no-open", help="open no browser")] = False,
    host: Annotated[str, typer.Option(help="address to listen at")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="file of the keys that clients may send, one a line", show_default=False)
    ] = None,
    no_key: Annotated[
        bool, typer.Option("--no-key", help="listen at another address than this machine's without a key")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the base's")] = "float32",
    quantize: Quantize = None,
    engine: Engine = "torch",
    context: Context = None,
    max_batch: Annotated[int, typer.Option(min=1, max=1024, help="requests answered together, for each model")] = 8,
    max_queue: Annotated[int, typer.Option(min=0, help="requests that wait besides; more get status 429")] = 64,
    allow_media_host: Annotated[
        list[str] | None, typer.Option(metavar="HOST", help="host whose media may be fetched; may be repeated")
    ] = None,
) -> None:
    """Answer OpenAI's chat completions and responses about all modalities, until Ctrl-C."""
    choice("--device", device, DEVICES)
    choice("--dtype", dtype, DTYPES)
    check_engine(engine, context, device=device, dtype=dtype, quantize=quantize)
    check_quantize(quantize)
    if demo and engine != "torch":
        raise ModalloyError(
            "--demo: is a merge as it was written; export it, and serve that folder with --engine llama.cpp"
        )
    if out is None and not model and not demo:
        raise ModalloyError("no model is named; give a folder that `modalloy chat` opens, or --demo")
    import fastapi  # noqa: F401
    import prometheus_client  # noqa: F401
    import sse_starlette  # noqa: F401
    import uvicorn  # noqa: F401

    models: dict[str, Path] = {}
    named = [one.partition("=") for one in model or ()]
    for name, separator, folder in [*([(out.resolve().name or str(out), "=", str(out))] if out else []), *named]:
        if not (name and separator and folder):
            raise ModalloyError(
                f"--model {name}: not of the form NAME=OUT; write for example --model image=build/image"
            )
        if name in models:
            raise ModalloyError(f"--model {name}: two models have this name; give another")
        models[name] = Path(folder)
    from modalloy.serve.options import Options, listening

    options = Options(
        host=host,
        port=port,
        api_key_file=api_key_file,
        no_key=no_key,
        dtype=dtype,
        quantize=quantize,
        engine=engine,
        context=context,
        max_batch=max_batch,
        max_queue=max_queue,
        media_hosts=tuple(allow_media_host or ()),
    )
    if demo and DEMO in models:
        raise ModalloyError(f"--model {DEMO}: --demo has this name; give another")
    _ = options.keys, options.hosts  # what is wrong with them is told before torch is imported
    with listening(host, port) as listener:
        from modalloy.merging import resolve_device
        from modalloy.model.session import to_stderr
        from modalloy.serve.server import serve as run

        if demo:
            from modalloy.demo import merged

            with progress("merge") as on_job:
                models = {DEMO: merged(on_job)} | models
        opens = demo and not no_open and shows_pages()
        settled = replace(options, device=resolve_device(device))
        run(models, listener, settled, to_stderr, open_page if opens else lambda url: None)


def shows_pages() -> bool:
    """Whether this machine has a screen, or its user named what opens pages (BROWSER)."""
    named = ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY")
    return sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in named)


def open_page(url: str) -> None:
    """Open a page in the user's browser, for which nobody waits."""
    import threading
    import webbrowser

    threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()

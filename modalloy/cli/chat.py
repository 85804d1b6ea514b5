"""The command that asks a merged model about media."""

import json
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from modalloy.cli.options import (
    DEVICES,
    DTYPES,
    Context,
    Engine,
    Isolated,
    Json,
    Media,
    Quantize,
    check_engine,
    check_quantize,
    choice,
    here,
)
from modalloy.errors import ModalloyError
from modalloy.names import modality_name
from modalloy.report.text import is_unicode


class InOrder(typer.core.TyperCommand):
    """Keeps, in the context's `meta`, the order in which options were given; values come grouped by option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        order = self.make_parser(ctx).parse_args(list(args))[2]
        ctx.meta[InOrder.__name__] = [option.name for option in order]
        return super().parse_args(ctx, args)


def chat(
    ctx: typer.Context,
    out: Annotated[Path, here("omni folder, or a specialist's folder")],
    prompt: Annotated[
        str | None, typer.Option("-p", "--prompt", help="the question; without one, a conversation", show_default=False)
    ] = None,
    image: Annotated[Media | None, typer.Option(help="image file; may be repeated")] = None,
    audio: Annotated[Media | None, typer.Option(help="sound file; may be repeated")] = None,
    video: Annotated[Media | None, typer.Option(help="video file; may be repeated")] = None,
    point: Annotated[Media | None, typer.Option(help="point cloud file; may be repeated")] = None,
    media: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FILE", help="file of any modality; may be repeated")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the base's")] = "float32",
    quantize: Quantize = None,
    engine: Engine = "torch",
    context: Context = None,
    isolated: Isolated = False,
    as_json: Json = False,
) -> None:
    """Ask a merged model about media, shown in the order given; answers are decoded greedily.

    Without -p it is a conversation: questions are typed, and files attached by their paths.
    """
    choice("--device", device, DEVICES)
    choice("--dtype", dtype, DTYPES)
    check_engine(engine, context, device=device, dtype=dtype, quantize=quantize)
    check_quantize(quantize)
    if prompt is not None and not prompt.strip() and not any((image, audio, video, point, media)):
        raise ModalloyError("-p: the question is empty; write one, or leave -p out to type a conversation")
    if as_json and prompt is None:
        raise ModalloyError("--json prints the answer to one question; ask it with -p")
    if prompt is not None and not is_unicode(prompt):
        raise ModalloyError("-p: the question holds bytes that are no UTF-8; set the terminal's encoding to UTF-8")
    given = {"image": image, "audio": audio, "video": video, "point": point, "media": media}
    files = _in_order(ctx.meta[InOrder.__name__], given)
    from modalloy.merging import resolve_device
    from modalloy.model.chat import user_message
    from modalloy.model.llama_cpp import load_by
    from modalloy.model.session import Session, typed_lines
    from modalloy.senses import media as decoders

    options: dict[str, Any] = {"device": resolve_device(device), "dtype": dtype, "quantize": quantize}
    model = load_by(engine, out, context=context, **options)
    if prompt is None:
        session = Session(model, max_new_tokens)
        with decoders.isolated(isolated):
            session.attach(files)
            session.run(typed_lines())
        return
    start = time.perf_counter()
    with decoders.isolated(isolated):
        reply = model.reply(user_message(prompt, files), max_new_tokens=max_new_tokens)
    if not as_json:
        print(reply.answer)
        return
    shown: dict[str, list[str]] = defaultdict(list)
    for modality, file in files:
        shown[modality].append(str(file))
    asked = {"question": prompt, "media": shown}
    print(json.dumps(asked | asdict(reply) | {"seconds": time.perf_counter() - start}))


def _in_order(order: list[str], given: dict[str, Any]) -> list[tuple[str, Path]]:
    """(modality, existing file) of every medium, in the order of the options."""
    from modalloy.senses.media.limits import opened

    left = {option: iter(values or ()) for option, values in given.items()}
    files = []
    for option in order:
        if option not in left:
            continue
        value = next(left[option])
        name, separator, file = (option, "=", value) if option != "media" else value.partition("=")
        if not (name and separator and file):
            raise ModalloyError(f"--media {value}: not of the form NAME=FILE; write for example --media depth=room.npy")
        with opened(file):  # so that a wrong name is told before a model is loaded
            files.append((modality_name(name), Path(file)))
    return files

"""Options that several commands share, and what is read from them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modalloy.errors import CheckpointError, MediaError, ModalloyError, RecipeError, cut, nearest
from modalloy.names import MODALITIES, modality_name

if TYPE_CHECKING:
    from modalloy.evals.benchmark import Source


def check_exists(recipe: Path) -> None:
    """Refuse a path at which nothing is: a slip of the pen is told before torch is imported."""
    if not os.path.lexists(recipe):
        raise RecipeError(f"{recipe}: no such recipe; check the path")


def path_here(value: str) -> Path:
    """A path on this machine; the address of a store or a page, of which a path would lose a slash, is told as such."""
    if "://" in value:
        raise CheckpointError(f"{cut(value)}: is an address; download it, and give its path here")
    return Path(value)


def here(text: str) -> Any:
    """An argument that is a path on this machine."""
    return typer.Argument(help=text, show_default=False, parser=path_here)


RecipePath = Annotated[Path, here("YAML recipe")]
OutFolder = Annotated[Path, here("folder written by `modalloy merge`")]
Json = Annotated[bool, typer.Option("--json", help="machine-readable result on stdout")]
Mismatch = Annotated[bool, typer.Option("--allow-base-mismatch", help="accept specialists that record another base")]
Workers = Annotated[int | None, typer.Option("--jobs", min=1, help="workers (default: one per core)")]
MaxMemory = Annotated[str | None, typer.Option(help="memory to keep within, for example 4GB")]
Resume = Annotated[bool, typer.Option("--resume", help="go on with one that was killed")]
Where = Annotated[str, typer.Option("--engine", help="local, or ray: the machines of a cluster")]
RayAddress = Annotated[str | None, typer.Option(help="of a Ray cluster (default: RAY_ADDRESS, else one started here)")]
Media = list[Path]
Task = Annotated[str, typer.Option(help="benchmark's name", show_default=False)]
DataFolder = Annotated[
    Path | None, typer.Option("--data", help="folder of its files (default: $MODALLOY_DATA/TASK, the hub's cache)")
]
MediaRoot = Annotated[
    list[str] | None,
    typer.Option(metavar="[NAME=]DIR", help="where media are, all or those of one name; may be repeated"),
]
Variant = Annotated[str | None, typer.Option(help="which of the benchmark's file formats, where several are there")]
Isolated = Annotated[
    bool, typer.Option("--isolated", help="decode each medium in a child process of bounded memory and time")
]
Modalities = Annotated[str | None, typer.Option(help="media to show, for example video+audio (default: all)")]
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("float32", "bfloat16", "float16", "auto")
Quantize = Annotated[
    str | None, typer.Option(help="int8 or int4: hold the base's linears in so many bits", show_default=False)
]
QUANTIZE = ("int8", "int4")
ENGINES = ("torch", "llama.cpp")
Engine = Annotated[
    str, typer.Option(help="torch, or llama.cpp for a folder that `modalloy export --to llama.cpp` wrote")
]
Context = Annotated[
    int | None,
    typer.Option(
        min=16, help="llama.cpp: tokens that its cache holds (default: the model's, at most 8192)", show_default=False
    ),
]


def choice(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ModalloyError(f"{option} {value}: not a {option.strip('-')}; known: {', '.join(known)}")


def check_quantize(kind: str | None) -> None:
    """Refuse another kind of quantising, and one whose library is not there, before torch is imported."""
    if kind is None:
        return
    if kind not in QUANTIZE:
        raise ModalloyError(f"--quantize {kind}: no such kind; known: {', '.join(QUANTIZE)}")
    if find_spec("torchao") is None:
        raise ModuleNotFoundError("no torchao", name="torchao")


def check_engine(engine: str, context: int | None, *, device: str, dtype: str, quantize: str | None = None) -> None:
    """Refuse another engine, options that it has not, and one that is not there, before torch is imported."""
    choice("--engine", engine, ENGINES)
    if engine == "torch":
        if context is not None:
            raise ModalloyError("--context: is of llama.cpp's cache; add --engine llama.cpp, or leave it out")
        return
    if device == "cuda" or dtype != "float32" or quantize is not None:
        given = "--quantize" if quantize is not None else "--dtype" if dtype != "float32" else "--device cuda"
        raise ModalloyError(
            f"{given}: llama.cpp runs on the CPU here, with the types of the exported files; leave it out, and choose with "
            "modalloy export --type or --gguf"
        )
    if find_spec("xllamacpp") is None:
        raise ModuleNotFoundError("no xllamacpp", name="xllamacpp")


def parse_size(option: str, text: str) -> int:
    from modalloy.recipe import parse_bytes

    try:
        return parse_bytes(int(text) if text.isdigit() else text)
    except ValueError as error:
        raise ModalloyError(f"{option}: {error}") from error


@contextmanager
def kept(run: Path) -> Iterator[None]:
    """Says, on Ctrl-C, how to go on."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if run.is_dir():
            raise KeyboardInterrupt(f"{run} keeps the answers that are there; go on with --resume") from stop
        raise


def source_of(
    data: Path, media_root: list[str] | None = None, variant: str | None = None, modalities: str | None = None
) -> "Source":
    """The source that the options of an evaluation name."""
    from modalloy.evals.benchmark import Source

    roots: dict[str, Path] = {}
    for given in media_root or ():
        name, separator, folder = given.partition("=")
        if not separator or "/" in name:  # a folder's own name may hold "="
            name, folder = "", given
        if not folder or not Path(folder).is_dir():
            raise MediaError(f"--media-root {given}: {folder or 'nothing'} is not a folder; write DIR or NAME=DIR")
        if name.lower() in roots:
            raise ModalloyError(f"--media-root {given}: {name or 'the general root'} is given twice; keep one")
        roots[name.lower()] = Path(folder)
    shown = None
    if modalities is not None and modalities != "all":
        shown = tuple(dict.fromkeys(modality_name(name.strip().lower()) for name in modalities.split("+")))
        for name in shown:
            if name not in MODALITIES:
                raise ModalloyError(f"--modalities {modalities}: no modality '{name}'; {nearest(name, MODALITIES)}")
    return Source(data, roots, variant, shown)

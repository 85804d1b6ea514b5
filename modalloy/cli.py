"""The `modalloy` command: every subcommand parses its options, calls one library function and prints the result."""

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
import typer.core

from modalloy.errors import MediaError, ModalloyError, nearest
from modalloy.names import MODALITIES, modality_name

if TYPE_CHECKING:
    from modalloy.evals.benchmark import Benchmark, Source
    from modalloy.evals.run import Run
    from modalloy.evals.sanity import Sanity

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

RecipePath = Annotated[Path, typer.Argument(help="YAML recipe", show_default=False)]
OutFolder = Annotated[Path, typer.Argument(help="folder written by `modalloy merge`", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="machine-readable result on stdout")]
Mismatch = Annotated[bool, typer.Option("--allow-base-mismatch", help="accept specialists that record another base")]
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
EVERY = 30.0  # seconds between lines of progress where stderr is no terminal
DTYPES = ("float32", "bfloat16", "float16", "auto")
RECEIVES = {
    "core": "exact, on small cores",
    "factored_core": "exact, on small cores",
    "left_core": "exact, on small left cores",
    "factors": "on their factors",
    "dense": "on full matrices, which give a full matrix",
}


class InOrder(typer.core.TyperCommand):
    """Keeps, in the context's `meta`, the order in which options were given; values come grouped by option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        order = self.make_parser(ctx).parse_args(list(args))[2]
        ctx.meta[InOrder.__name__] = [option.name for option in order]
        return super().parse_args(ctx, args)


@app.command()
def merge(
    recipe: RecipePath,
    out: Annotated[Path, typer.Option("-o", "--out", help="folder to make", show_default=False)],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only print the plan")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="workers (default: one per core)")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier result")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on with a merge that was killed")] = False,
    max_memory: Annotated[str | None, typer.Option(help="refuse if more is needed, for example 4GB")] = None,
    sanity: Annotated[
        bool, typer.Option("--sanity", help="ask the result, its base and parents; add it to the card")
    ] = False,
    push_to_hub: Annotated[str | None, typer.Option(metavar="REPO", help="upload the result as OWNER/NAME")] = None,
    private: Annotated[bool, typer.Option("--private", help="make that repository private")] = False,
    allow_base_mismatch: Mismatch = False,
    as_json: Json = False,
) -> None:
    """Merge specialists into one model."""
    from modalloy.hub import check_target, push
    from modalloy.merge import merge as run

    _choice("--device", device, DEVICES)
    limit = None if max_memory is None else _parse_size("--max-memory", max_memory)
    if dry_run:
        plan(recipe, allow_base_mismatch, as_json)
        return
    if sanity:
        from modalloy.evals.sanity import check_askable
        from modalloy.recipe import load_recipe

        check_askable(load_recipe(recipe))
    if push_to_hub is not None:
        check_target(push_to_hub)
    elif private:
        raise ModalloyError("--private: nothing is uploaded; add --push-to-hub REPO, or leave it out")
    with progress("merge") as on_job:
        report = run(
            recipe,
            out,
            jobs=jobs,
            device=device,
            overwrite=overwrite,
            resume=resume,
            max_memory=limit,
            allow_base_mismatch=allow_base_mismatch,
            on_job=on_job,
        )
    checked = _sanity(out, device) if sanity else None
    url = None if push_to_hub is None else push(out, push_to_hub, private=private)
    if as_json:
        more = {"sanity": {name: asdict(one) for name, one in checked.items()}} if checked else {}
        print(json.dumps(report.to_dict() | more | ({} if url is None else {"pushed": url})))
        return
    print(f"plan     {report.plan.summary()}")
    for label, kin in report.plan.kinship.items():
        print(f"related  {label} and target: median cosine {kin.cosine:.4f}, relative distance {kin.distance:.4f}")
    print(
        f"merge    {report.merge_s:.1f} s, peak {report.peak_bytes / 1e9:.2f} GB, {report.plan.write_bytes / 1e6:.1f} MB of weights"
    )
    if report.compression_error is not None:
        print(f"cut      to rank {report.plan.rank}, worst relative error of an update {report.compression_error:.3f}")
    print(f"verify   {report.verification.summary()}")
    if checked:
        from modalloy.evals.sanity import findings

        print(f"sanity   {'; '.join(findings(checked)) or 'nothing stands out'} (README.md has the table)")
    print(f"wrote    {out}")
    if url is not None:
        print(f"pushed   {url}")


@app.command()
def plan(recipe: RecipePath, allow_base_mismatch: Mismatch = False, as_json: Json = False) -> None:
    """What a merge would do: the fate of every tensor, bytes read and written, memory. Reads headers only."""
    from modalloy.engines.local import default_workers
    from modalloy.plan import plan as run
    from modalloy.recipe import load_recipe

    planned = run(load_recipe(recipe), allow_base_mismatch=allow_base_mismatch)
    if as_json:
        print(json.dumps(planned.to_dict()))
        return
    for fate in planned.fates:
        print(f"{fate.source:12} {fate.fate:9} {fate.tensor}  ({fate.detail})")
    for found in planned.maps.values():
        print(f"\n{found.page()}")
    print(f"\n{planned.summary()}")
    workers = default_workers()
    print(
        f"reads {planned.read_bytes / 1e6:.1f} MB, writes {planned.write_bytes / 1e6:.1f} MB ({planned.disk_bytes / 1e6:.1f} MB "
        f"of disk), holds about {planned.peak_bytes(workers) / 1e6:.0f} MB in memory with {workers} workers"
    )


@app.command()
def inspect(
    recipe: RecipePath,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="HTML page to write", show_default=False)] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="workers (default: one per core)")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing file")] = False,
    allow_base_mismatch: Mismatch = False,
    as_json: Json = False,
) -> None:
    """Is this merge sane? Norms, spectra, subspace overlap and conflict of the updates, per layer. Merges nothing."""
    from modalloy.inspect import inspect as run
    from modalloy.report.inspect import new_file, page, require_plotly, text

    with ExitStack() as stack:
        if out is not None:  # refused before the work, not after it
            require_plotly()
            write = stack.enter_context(new_file(out, overwrite=overwrite))
        with progress("inspect") as on_job:
            found = run(recipe, jobs=jobs, allow_base_mismatch=allow_base_mismatch, on_job=on_job)
        if out is not None:
            write(page(found))
    if as_json:
        print(json.dumps(found.to_dict()))
        return
    print(text(found, with_tables=out is None))
    if out is not None:
        print(f"wrote    {out}")


@app.command()
def verify(out: OutFolder, as_json: Json = False) -> None:
    """Check a result: hashes, shapes, finite values, and sampled layers against the recipe."""
    from modalloy.verify import verify as run

    checked = run(out)
    print(json.dumps(checked.to_dict()) if as_json else checked.summary())


@app.command()
def methods(as_json: Json = False) -> None:
    """Every merging method: parameters, defaults, paper, and the laws it keeps."""
    from modalloy.methods import METHODS

    if as_json:
        rows = {
            name: {
                "summary": method.summary,
                "parameters": method.parameters,
                "documentation": method.documentation,
                "auto_scale": method.auto_scale,
                "receives": method.receives,
                "paper": method.paper,
                "laws": method.laws,
            }
            for name, method in METHODS.items()
        }
        print(json.dumps(rows))
        return
    for name, method in METHODS.items():
        print(f"{name} ({method.paper})\n  {method.summary}")
        for parameter, default in method.parameters.items():
            shown = method.auto_scale if parameter == "scale" else default
            print(f"  {parameter} ({shown}): {method.documentation[parameter]}")
        print(f"  on low-rank updates: {RECEIVES[method.receives]}; laws: {', '.join(method.laws)}\n")


@app.command(cls=InOrder)
def chat(
    ctx: typer.Context,
    out: Annotated[Path, typer.Argument(help="omni folder, or a specialist's folder", show_default=False)],
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
    isolated: Isolated = False,
    as_json: Json = False,
) -> None:
    """Ask a merged model about media, shown in the order given; answers are decoded greedily.

    Without -p it is a conversation: questions are typed, and files attached by their paths.
    """
    _choice("--device", device, DEVICES)
    _choice("--dtype", dtype, DTYPES)
    if as_json and prompt is None:
        raise ModalloyError("--json prints the answer to one question; ask it with -p")
    given = {"image": image, "audio": audio, "video": video, "point": point, "media": media}
    files = _in_order(ctx.meta[InOrder.__name__], given)
    from modalloy import media as decoders
    from modalloy.merge import resolve_device
    from modalloy.model import load_model
    from modalloy.model.chat import user_message
    from modalloy.model.session import Session, typed_lines

    model = load_model(out, device=resolve_device(device), dtype=dtype)
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


@app.command("eval")
def evaluate(
    out: Annotated[
        Path | None, typer.Argument(help="omni folder, specialist, or a model of transformers", show_default=False)
    ] = None,
    task: Annotated[str | None, typer.Option(help="benchmark's name", show_default=False)] = None,
    data: DataFolder = None,
    run: Annotated[Path | None, typer.Option("-o", "--run", help="folder of the run", show_default=False)] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="only the first N questions")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with a run that was stopped")] = False,
    media_root: MediaRoot = None,
    variant: Variant = None,
    modalities: Modalities = None,
    batch_size: Annotated[int, typer.Option(min=1, help="questions that are answered together")] = 1,
    features: Annotated[Path | None, typer.Option(help="folder that keeps what encoders made of media")] = None,
    download: Annotated[bool, typer.Option("--download", help="fetch the benchmark's files from the hub")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the base's")] = "float32",
    base: Annotated[str | None, typer.Option(help="base of a specialist that records none")] = None,
    encoder: Annotated[str | None, typer.Option(help="encoder of a specialist that records none")] = None,
    isolated: Isolated = False,
    listed: Annotated[bool, typer.Option("--list", help="list the tasks")] = False,
    as_json: Json = False,
) -> None:
    """Ask a model the questions of a benchmark, and score the answers."""
    from modalloy.evals import BENCHMARKS, find_benchmark
    from modalloy.evals.benchmark import data_folder

    if listed:
        _list(BENCHMARKS, as_json)
        return
    if out is None or task is None or run is None:
        raise ModalloyError(
            "eval: which model, which task, and where to? write modalloy eval OUT --task T -o RUN; --list lists the tasks"
        )
    _choice("--device", device, DEVICES)
    _choice("--dtype", dtype, DTYPES)
    benchmark = find_benchmark(task)
    source = _source(data_folder(benchmark, data, download=download), media_root, variant, modalities)
    from modalloy import media
    from modalloy.evals.features import FeatureCache
    from modalloy.evals.runner import evaluate as run_on
    from modalloy.evals.runner import identify
    from modalloy.merge import resolve_device
    from modalloy.model import load_model

    options: dict[str, Any] = {"device": resolve_device(device), "dtype": dtype, "base": base, "encoder": encoder}
    with progress(task) as on_sample, _kept(run), media.isolated(isolated):
        finished = run_on(
            lambda: load_model(out, **options),
            identify(out, **options),
            benchmark,
            source,
            run,
            limit=limit,
            resume=resume,
            batch_size=batch_size,
            cache=FeatureCache(features),
            on_sample=on_sample,
        )
    _write_scores(finished, as_json)


@app.command()
def eval_score(
    run: Annotated[
        Path,
        typer.Argument(help="folder that `modalloy eval` wrote; with --task, a file of answers", show_default=False),
    ],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="HTML page of answers; with --task, folder of the run", show_default=False),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="benchmark that ModelCompose's scripts answered in the file", show_default=False)
    ] = None,
    data: DataFolder = None,
    media_root: MediaRoot = None,
    variant: Variant = None,
    modalities: Modalities = None,
    examples: Annotated[int, typer.Option(min=1, help="answers that the page shows")] = 200,
    beside: Annotated[
        Path | None, typer.Option(metavar="RUN", help="another run to show beside it on the page")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing page")] = False,
    as_json: Json = False,
) -> None:
    """Score the answers of a run again, without a model; with -o, make a page to look at them.

    With --task, make a run of a file of answers (JSON lines) that ModelCompose's own scripts wrote.
    """
    if task is not None:
        if out is None or beside is not None or overwrite:
            raise ModalloyError("--task: makes the folder of a run; give -o RUN, without --beside and --overwrite")
        _write_scores(_published(run, task, data, media_root, variant, modalities, out), as_json)
        return
    if data or media_root or variant or modalities:
        raise ModalloyError(
            "eval-score: a run knows its data; --data and the like belong to --task and a file of answers"
        )
    from modalloy.evals.run import load_run
    from modalloy.report.evals import page as page_of
    from modalloy.report.inspect import new_file

    found, other = load_run(run), None if beside is None else load_run(beside)
    if out is not None:
        with new_file(out, overwrite=overwrite) as write:
            write(page_of(found, examples=examples, other=other))
    elif other is not None:
        raise ModalloyError(
            "--beside: is shown on the page only; add -o PAGE, or compare runs with modalloy eval-compare"
        )
    _write_scores(found, as_json)


@app.command()
def eval_compare(
    a: Annotated[Path, typer.Argument(help="folder of a run", show_default=False)],
    b: Annotated[Path, typer.Argument(help="folder of another run of the same task and data", show_default=False)],
    as_json: Json = False,
) -> None:
    """Is run B really better than run A? Paired tests on the questions that both were asked; Markdown on stdout."""
    from modalloy.evals.compare import compare
    from modalloy.evals.run import load_run
    from modalloy.report.evals import comparison

    found = compare(load_run(a), load_run(b))
    print(json.dumps(found.to_dict()) if as_json else comparison(found), end="\n" if as_json else "")


@app.command()
def eval_doctor(
    task: Task,
    data: DataFolder = None,
    media_root: MediaRoot = None,
    variant: Variant = None,
    modalities: Modalities = None,
    quick: Annotated[bool, typer.Option("--quick", help="only see whether files exist; decode none")] = False,
    isolated: Isolated = False,
    as_json: Json = False,
) -> None:
    """Which media of a benchmark are missing or broken. Loads no model; exit code 1 if there are any, 0 if none."""
    from modalloy import media
    from modalloy.evals import find_benchmark
    from modalloy.evals.benchmark import data_folder
    from modalloy.evals.doctor import doctor

    benchmark = find_benchmark(task)
    source = _source(data_folder(benchmark, data), media_root, variant, modalities)
    with progress("media") as on_medium, media.isolated(isolated):
        found = doctor(benchmark, source, quick=quick, on_medium=on_medium)
    print(json.dumps(found.to_dict()) if as_json else found.text())
    if not found.ok:
        raise typer.Exit(1)


@app.command()
def search(
    recipe: RecipePath,
    probe: Annotated[Path, typer.Option(help="questions, one JSON object a line", show_default=False)],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="folder of the chosen recipe, log and page", show_default=False)
    ],
    vary: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUES", help="0.1:1.0:0.1 or 2,4,8, or a YAML file of them; may be repeated"),
    ] = None,
    objective: Annotated[str, typer.Option(help="consistency (no labels), labels, or agreement")] = "consistency",
    variant: Annotated[str, typer.Option(help="of consistency: sum, union or one-sided")] = "sum",
    match: Annotated[
        str, typer.Option(help="how consistency compares answers: normalised, exact, embedding or top1")
    ] = "normalised",
    embedder: Annotated[
        str, typer.Option(help="model of --match embedding: folder or hub id")
    ] = "sentence-transformers/all-MiniLM-L6-v2",
    aggregate: Annotated[
        str, typer.Option(help="of probes: probes (mean), senses (mean of each group's) or minimax (worst group)")
    ] = "probes",
    strategy: Annotated[str, typer.Option(help="auto, grid, coordinate, tpe or random")] = "auto",
    trials: Annotated[int, typer.Option(min=1, help="candidates that tpe or random may try")] = 30,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 32,
    batch_size: Annotated[int, typer.Option(min=1, help="questions that are answered together")] = 1,
    features: Annotated[Path | None, typer.Option(help="folder that keeps what encoders made of media")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the base's")] = "float32",
    resume: Annotated[bool, typer.Option("--resume", help="go on with a search that was stopped")] = False,
    allow_base_mismatch: Mismatch = False,
    as_json: Json = False,
) -> None:
    """Choose λ, k, α, weights or any parameter of a recipe by asking candidates questions, with few or no labels."""
    _choice("--device", device, DEVICES)
    _choice("--dtype", dtype, DTYPES)
    from modalloy.evals.features import FeatureCache
    from modalloy.merge import resolve_device
    from modalloy.report.search import text
    from modalloy.search import search as run

    with progress("search") as on_answer, _kept(out):
        found = run(
            recipe,
            probe,
            out,
            vary=vary or (),
            objective=cast(Any, objective),
            variant=cast(Any, variant),
            match=cast(Any, match),
            embedder=embedder,
            aggregate=cast(Any, aggregate),
            strategy=strategy,
            trials=trials,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            cache=FeatureCache(features),
            device=resolve_device(device),
            dtype=dtype,
            resume=resume,
            allow_base_mismatch=allow_base_mismatch,
            on_answer=on_answer,
        )
    print(json.dumps(found.to_dict()) if as_json else f"{text(found.to_dict())}\nwrote    {out}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="where the merged model goes")] = Path("build/demo"),
) -> None:
    """Merge the built-in specialists and ask the result about pictures, sounds, videos and shapes."""
    from modalloy.demo import demo as run

    with progress("merge") as on_job:
        run(out, on_job)


@contextmanager
def _kept(run: Path) -> Iterator[None]:
    """Says, on Ctrl-C, how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        if run.is_dir():
            print(f"stopped: {run} keeps the answers that are there; go on with --resume", file=sys.stderr)
        raise


def _published(
    file: Path,
    task: str,
    data: Path | None,
    media_root: list[str] | None,
    variant: str | None,
    modalities: str | None,
    out: Path,
) -> "Run":
    """The run made of a file of answers."""
    from modalloy.evals import find_benchmark
    from modalloy.evals.benchmark import data_folder
    from modalloy.evals.published import read_answers

    benchmark = find_benchmark(task)
    source = _source(data_folder(benchmark, data), media_root, variant, modalities)
    return read_answers(file, benchmark, source, out)


def _sanity(out: Path, device: str) -> "dict[str, Sanity]":
    """The text-only examination of a result, which its card then has."""
    from modalloy.evals.sanity import add_to_card, sanity
    from modalloy.merge import resolve_device

    with progress("sanity") as on_model:
        found = sanity(out, device=resolve_device(device), on_model=on_model)
    add_to_card(out, found)
    return found


def _in_order(order: list[str], given: dict[str, Any]) -> list[tuple[str, Path]]:
    """(modality, existing file) of every medium, in the order of the options."""
    from modalloy.media.limits import opened

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


def _source(
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


def _write_scores(run: "Run", as_json: bool) -> None:
    """Write a run's result.json, result.md and result.csv, and print one of them."""
    from modalloy.evals.run import result, write_text
    from modalloy.report.evals import csv, markdown

    scores = result(run)
    for name, text in (("json", json.dumps(scores, indent=1)), ("md", markdown(scores)), ("csv", csv(scores))):
        write_text(run.folder / f"result.{name}", text.rstrip("\n") + "\n")
    print(json.dumps(scores) if as_json else markdown(scores))


def _list(benchmarks: "dict[str, Benchmark]", as_json: bool) -> None:
    rows: dict[str, dict[str, Any]] = {
        name: {
            "summary": found.summary,
            "modalities": found.modalities,
            "variants": found.variants,
            "rules": list(found.rules),
            "files": found.files,
            "hub": found.hub,
        }
        for name, found in benchmarks.items()
    }
    if as_json:
        print(json.dumps(rows))
        return
    for name, row in rows.items():
        print(
            f"{name:18} {row['summary']}\n{'':18} shows {'+'.join(row['modalities']) or 'text only'}; --data: {row['files']}"
        )


def _choice(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ModalloyError(f"{option} {value}: not a {option.strip('-')}; known: {', '.join(known)}")


def _parse_size(option: str, text: str) -> int:
    from modalloy.recipe import parse_bytes

    try:
        return parse_bytes(int(text) if text.isdigit() else text)
    except ValueError as error:
        raise ModalloyError(f"{option}: {error}") from error


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Progress on stderr with rate and time left: a bar on a terminal, else a line every 30 s. Call it with (done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns: list[Any] = [TextColumn(label), BarColumn(), MofNCompleteColumn()]
    columns += [TextColumn("{task.fields[rate]}"), TimeRemainingColumn()]
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None, rate="")
        begun = printed = time.monotonic()
        before: int | None = None  # done when it began, by an earlier run

        def report(done: int, total: int) -> None:
            nonlocal before, printed
            now = time.monotonic()
            before = done - 1 if before is None else before
            rate = (done - before) / max(now - begun, 1e-9)
            bar.update(task, completed=done, total=total, rate=f"{rate:.2f}/s")
            if bar.disable and now - printed >= EVERY:
                printed = now
                left = timedelta(seconds=round((total - done) / rate)) if rate else "unknown"
                print(f"{label}: {done}/{total}, {rate:.2f}/s, {left} left", file=sys.stderr, flush=True)

        yield report


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 2."""
    try:
        app()
    except ModalloyError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

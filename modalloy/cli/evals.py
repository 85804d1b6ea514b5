"""Commands that ask benchmarks: eval, eval-score, eval-compare and eval-doctor."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modalloy.cli.options import (
    DEVICES,
    DTYPES,
    Context,
    DataFolder,
    Engine,
    Isolated,
    Json,
    MediaRoot,
    Modalities,
    Task,
    Variant,
    check_engine,
    choice,
    here,
    kept,
    source_of,
)
from modalloy.cli.progress import progress
from modalloy.errors import ModalloyError

if TYPE_CHECKING:
    from modalloy.evals.benchmark import Benchmark
    from modalloy.evals.log import Run


def evaluate(
    out: Annotated[Path | None, here("omni folder, specialist, or a model of transformers")] = None,
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
    engine: Engine = "torch",
    context: Context = None,
    base: Annotated[str | None, typer.Option(help="base of a specialist that records none")] = None,
    encoder: Annotated[str | None, typer.Option(help="encoder of a specialist that records none")] = None,
    isolated: Isolated = False,
    listed: Annotated[bool, typer.Option("--list", help="list the tasks")] = False,
    as_json: Json = False,
) -> Path | None:
    """Ask a model the questions of a benchmark, and score the answers."""
    from modalloy.evals import BENCHMARKS, find_benchmark
    from modalloy.evals.benchmark import data_folder

    if listed:
        _list(BENCHMARKS, as_json)
        return None
    if out is None or task is None or run is None:
        raise ModalloyError(
            "eval: which model, which task, and where to? write modalloy eval OUT --task T -o RUN; --list lists the tasks"
        )
    choice("--device", device, DEVICES)
    choice("--dtype", dtype, DTYPES)
    check_engine(engine, context, device=device, dtype=dtype)
    benchmark = find_benchmark(task)
    source = source_of(data_folder(benchmark, data, download=download), media_root, variant, modalities)
    from modalloy.evals.ask import evaluate as run_on
    from modalloy.evals.ask import identify
    from modalloy.evals.features import FeatureCache
    from modalloy.merging import resolve_device
    from modalloy.model.llama_cpp import load_by
    from modalloy.senses import media

    options: dict[str, Any] = {"device": resolve_device(device), "dtype": dtype, "base": base, "encoder": encoder}
    told = options if engine == "torch" else {"engine": engine, "context": context}
    with progress(task) as on_sample, kept(run), media.isolated(isolated):
        finished = run_on(
            lambda: load_by(engine, out, context=context, **options),
            identify(out, **told),
            benchmark,
            source,
            run,
            limit=limit,
            resume=resume,
            batch_size=batch_size,
            cache=FeatureCache(features),
            on_sample=on_sample,
        )
    return _write_scores(finished, as_json)


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
) -> Path:
    """Score the answers of a run again, without a model; with -o, make a page to look at them.

    With --task, make a run of a file of answers (JSON lines) that ModelCompose's own scripts wrote.
    """
    if task is not None:
        if out is None or beside is not None or overwrite:
            raise ModalloyError("--task: makes the folder of a run; give -o RUN, without --beside and --overwrite")
        return _write_scores(_published(run, task, data, media_root, variant, modalities, out), as_json)
    if data or media_root or variant or modalities:
        raise ModalloyError(
            "eval-score: a run knows its data; --data and the like belong to --task and a file of answers"
        )
    from modalloy.evals.log import load_run
    from modalloy.evals.page import page as page_of
    from modalloy.files import new_file

    found, other = load_run(run), None if beside is None else load_run(beside)
    if out is not None:
        with new_file(out, overwrite=overwrite) as write:
            write(page_of(found, examples=examples, other=other))
    elif other is not None:
        raise ModalloyError(
            "--beside: is shown on the page only; add -o PAGE, or compare runs with modalloy eval-compare"
        )
    return _write_scores(found, as_json)


def eval_compare(
    a: Annotated[Path, typer.Argument(help="folder of a run", show_default=False)],
    b: Annotated[Path, typer.Argument(help="folder of another run of the same task and data", show_default=False)],
    as_json: Json = False,
) -> None:
    """Is run B really better than run A? Paired tests on the questions that both were asked; Markdown on stdout."""
    from modalloy.evals.compare import compare
    from modalloy.evals.log import load_run
    from modalloy.evals.markdown import comparison

    found = compare(load_run(a), load_run(b))
    print(json.dumps(found.to_dict()) if as_json else comparison(found), end="\n" if as_json else "")


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
    from modalloy.evals import find_benchmark
    from modalloy.evals.benchmark import data_folder
    from modalloy.evals.doctor import doctor
    from modalloy.senses import media

    benchmark = find_benchmark(task)
    source = source_of(data_folder(benchmark, data), media_root, variant, modalities)
    with progress("media") as on_medium, media.isolated(isolated):
        found = doctor(benchmark, source, quick=quick, on_medium=on_medium)
    print(json.dumps(found.to_dict()) if as_json else found.text())
    if not found.ok:
        raise typer.Exit(1)


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
    source = source_of(data_folder(benchmark, data), media_root, variant, modalities)
    return read_answers(file, benchmark, source, out)


def _write_scores(run: "Run", as_json: bool) -> Path:
    """Write a run's result.json, result.md and result.csv, print one of them, and return the run's folder."""
    from modalloy.evals.log import write_text
    from modalloy.evals.markdown import csv, markdown
    from modalloy.evals.scores import result

    scores = result(run)
    for name, text in (("json", json.dumps(scores, indent=1)), ("md", markdown(scores)), ("csv", csv(scores))):
        write_text(run.folder / f"result.{name}", text.rstrip("\n") + "\n")
    print(json.dumps(scores) if as_json else markdown(scores))
    return run.folder


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

"""The commands that try a recipe's parameters: search chooses among them, sweep makes them all."""

import json
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from modalloy.cli.options import (
    DEVICES,
    DTYPES,
    Json,
    MaxMemory,
    Mismatch,
    RayAddress,
    RecipePath,
    Resume,
    Where,
    Workers,
    check_exists,
    choice,
    kept,
    parse_size,
)
from modalloy.cli.progress import progress
from modalloy.cli.terminal import say


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
    objective: Annotated[
        str,
        typer.Option(
            help="auto, labels, or without labels: consistency, kl, option_agreement or agreement (the last three ask the "
            "specialists)"
        ),
    ] = "auto",
    variant: Annotated[
        str | None,
        typer.Option(
            help="of consistency: sum, union or one-sided; of labels: accuracy or probability; of option_agreement: share or "
            "weighted; the first is the default"
        ),
    ] = None,
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
) -> Path:
    """Choose λ, k, α, weights or any parameter of a recipe by asking candidates questions, with few or no labels."""
    check_exists(recipe)
    choice("--device", device, DEVICES)
    choice("--dtype", dtype, DTYPES)
    from modalloy.evals.features import FeatureCache
    from modalloy.merging import resolve_device
    from modalloy.search import search as run
    from modalloy.search.page import text

    with progress("search") as on_answer, kept(out):
        found = run(
            recipe,
            probe,
            out,
            vary=vary or (),
            objective=cast(Any, objective),
            variant=variant,
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
    if as_json:
        print(json.dumps(found.to_dict()))
    else:
        print(text(found.to_dict()))
        say(f"wrote    {out}")
    return out


def sweep(
    recipe: RecipePath,
    out: Annotated[str, typer.Option("-o", "--out", help="folder for the results' folders", show_default=False)],
    given: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUES", help="0.1,0.2 or 0.1:1.0:0.1, or a YAML file; may be repeated"),
    ] = None,
    jobs: Workers = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    resume: Resume = False,
    max_memory: MaxMemory = None,
    engine: Where = "local",
    ray_address: RayAddress = None,
    allow_base_mismatch: Mismatch = False,
    as_json: Json = False,
) -> Path:
    """Merge once for every combination of values, from one pass over the inputs; each result is as `merge` makes it."""
    check_exists(recipe)
    choice("--device", device, DEVICES)
    limit = None if max_memory is None else parse_size("--max-memory", max_memory)
    from modalloy.search.sweep import sweep as run

    with progress("sweep") as on_job:
        report = run(
            recipe,
            out,
            given or (),
            jobs=jobs,
            device=device,
            max_memory=limit,
            resume=resume,
            engine=engine,
            ray_address=ray_address,
            allow_base_mismatch=allow_base_mismatch,
            on_job=on_job,
        )
    if as_json:
        print(json.dumps(report.to_dict()))
        return Path(out)
    for one in report.results:
        say(f"wrote    {one.out}: {one.verification.summary()}")
    print(f"sweep    {len(report.results)} results in {report.total_s:.1f} s, peak {report.peak_bytes / 1e9:.2f} GB")
    return Path(out)

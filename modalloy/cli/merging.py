"""Commands that plan, make and check a merge: merge, plan, inspect, verify, methods and demo."""

import json
from contextlib import ExitStack
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modalloy.cli.options import (
    DEVICES,
    Json,
    MaxMemory,
    Mismatch,
    OutFolder,
    RayAddress,
    RecipePath,
    Resume,
    Where,
    Workers,
    check_exists,
    choice,
    parse_size,
)
from modalloy.cli.progress import progress
from modalloy.cli.terminal import say
from modalloy.errors import ModalloyError

if TYPE_CHECKING:
    from modalloy.evals.check import Checked

RECEIVES = {
    "core": "exact, on small cores",
    "factored_core": "exact, on small cores",
    "left_core": "exact, on small left cores",
    "factors": "on their factors",
    "dense": "on full matrices, which give a full matrix",
}


def merge(
    recipe: RecipePath,
    out: Annotated[
        str, typer.Option("-o", "--out", help="folder to make, here or in an object store (s3://…)", show_default=False)
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only print the plan")] = False,
    jobs: Workers = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier result")] = False,
    resume: Resume = False,
    earlier: Annotated[
        Path | None, typer.Option("--from", help="an earlier result: recompute only what changed", show_default=False)
    ] = None,
    max_memory: MaxMemory = None,
    engine: Where = "local",
    ray_address: RayAddress = None,
    sanity: Annotated[
        bool, typer.Option("--sanity", help="check the result beside its base and parents; add it to the card")
    ] = False,
    push_to_hub: Annotated[str | None, typer.Option(metavar="REPO", help="upload the result as OWNER/NAME")] = None,
    private: Annotated[bool, typer.Option("--private", help="make that repository private")] = False,
    allow_base_mismatch: Mismatch = False,
    as_json: Json = False,
) -> Path | None:
    """Merge specialists into one model."""
    check_exists(recipe)
    from modalloy.merging import merge as run
    from modalloy.outputs.push import check_target, push, upload, uploaded_from
    from modalloy.storage.remote import is_remote

    choice("--device", device, DEVICES)
    limit = None if max_memory is None else parse_size("--max-memory", max_memory)
    if dry_run:
        plan(recipe, allow_base_mismatch, as_json)
        return None
    if sanity:
        from modalloy.evals.check import check_askable
        from modalloy.recipe import load_recipe

        check_askable(load_recipe(recipe))
    if push_to_hub is not None:
        check_target(push_to_hub)
    elif private:
        raise ModalloyError("--private: nothing is uploaded; add --push-to-hub REPO, or leave it out")
    elsewhere, folder = (
        (out, uploaded_from(out, resume=resume, overwrite=overwrite)) if is_remote(out) else (None, Path(out))
    )
    with progress("merge") as on_job:
        report = run(
            recipe,
            folder,
            jobs=jobs,
            device=device,
            overwrite=overwrite,
            resume=resume,
            earlier=earlier,
            max_memory=limit,
            engine=engine,
            ray_address=ray_address,
            allow_base_mismatch=allow_base_mismatch,
            on_job=on_job,
        )
    checked = checked_result(folder, device) if sanity else None
    url = None if push_to_hub is None else push(folder, push_to_hub, private=private)
    if elsewhere is not None:
        upload(folder, elsewhere)
    if as_json:
        more = {"check": checked.to_dict()} if checked else {}
        told = {"out": out} | ({} if url is None else {"pushed": url})
        print(json.dumps(report.to_dict() | more | told))
        return folder
    say(f"plan     {report.plan.summary()}")
    for notice in report.plan.notices:
        say(f"note     {notice}")
    for label, kin in report.kinship.items():
        say(
            f"related  {label} and {report.plan.target_label}: median cosine {kin.cosine:.4f}, relative distance {kin.distance:.4f}"
        )
    print(
        f"merge    {report.merge_s:.1f} s, peak {report.peak_bytes / 1e9:.2f} GB, {report.plan.write_bytes / 1e6:.1f} MB of weights"
    )
    if earlier is not None:
        say(f"reused   {report.n_reused} of {len(report.plan.jobs)} pieces of work from {earlier}")
    if report.budget.n_bytes is not None:
        print(
            f"memory   kept within what there is: {report.budget.n_workers} workers, as many weights at a time as fit"
        )
    if report.compression_error is not None and report.plan.recipe.output.requantize:
        print(
            f"FP8      worst relative error of a weight that is codes and scales again {report.compression_error:.4f}"
        )
    elif report.compression_error is not None:
        print(f"cut      to rank {report.plan.rank}, worst relative error of an update {report.compression_error:.3f}")
    say(f"verify   {report.verification.summary()}")
    if checked:
        say(f"check    {checked.verdict} (README.md has the table)")
    say(f"wrote    {out}")
    if url is not None:
        say(f"pushed   {url}")
    return folder


def plan(recipe: RecipePath, allow_base_mismatch: Mismatch = False, as_json: Json = False) -> None:
    """What a merge would do: the fate of every tensor, bytes read and written, memory. Reads headers only."""
    check_exists(recipe)
    from modalloy.machine.cores import default_workers
    from modalloy.planning import cost
    from modalloy.planning.planner import plan as run
    from modalloy.recipe import load_recipe

    planned = run(load_recipe(recipe), allow_base_mismatch=allow_base_mismatch)
    if as_json:
        print(json.dumps(planned.to_dict()))
        return
    for fate in planned.fates:
        say(f"{fate.source:12} {fate.fate:9} {fate.tensor}  ({fate.detail})")
    for found in planned.maps.values():
        print(f"\n{found.page()}")
    say()
    say(planned.summary())
    for notice in planned.notices:
        say(f"note     {notice}")
    workers = default_workers()
    disk, memory = cost.disk_bytes(planned), cost.peak_bytes(planned, workers)
    print(
        f"reads {cost.read_bytes(planned) / 1e6:.1f} MB, writes {planned.write_bytes / 1e6:.1f} MB ({disk / 1e6:.1f} MB of disk), "
        f"holds about {memory / 1e6:.0f} MB in memory with {workers} workers"
    )


def inspect(
    recipe: RecipePath,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="HTML page to write", show_default=False)] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="workers (default: one per core)")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing file")] = False,
    allow_base_mismatch: Mismatch = False,
    as_json: Json = False,
) -> Path | None:
    """Is this merge sane? Norms, spectra, subspace overlap and conflict of the updates, per layer. Merges nothing."""
    check_exists(recipe)
    from modalloy.files import new_file
    from modalloy.inspection.measure import inspect as run
    from modalloy.inspection.page import page, require_plotly
    from modalloy.inspection.text import text

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
        return out
    print(text(found, with_tables=out is None))
    if out is not None:
        say(f"wrote    {out}")
    return out


def verify(
    out: OutFolder,
    full: Annotated[
        bool, typer.Option("--full", help="recompute every tensor, not a sample of a large result")
    ] = False,
    signature: Annotated[
        bool, typer.Option("--signature", help="check the signature first; exit code 1 if it fails")
    ] = False,
    key: Annotated[Path | None, typer.Option(help="public key (PEM) of the signature", show_default=False)] = None,
    identity: Annotated[str | None, typer.Option(help="who signed with sigstore, such as an address")] = None,
    issuer: Annotated[str | None, typer.Option(metavar="URL", help="who vouches for that identity")] = None,
    as_json: Json = False,
) -> int:
    """Check a result: hashes, shapes, finite values, what its manifest says, and its tensors against recipe and inputs."""
    from modalloy.signing import SignatureError, verify_signature
    from modalloy.verify import verify as run

    if not signature and (key or identity or issuer):
        raise ModalloyError("--key, --identity and --issuer are of a signature; add --signature, or leave them out")
    try:
        signed = verify_signature(out, key=key, identity=identity, issuer=issuer) if signature else None
    except SignatureError as reason:
        say(json.dumps({"ok": False, "fault": str(reason)}) if as_json else f"fault    {reason}")
        return 1
    checked = run(out, full=full)
    if as_json:
        print(json.dumps(checked.to_dict() | ({} if signed is None else {"signature": signed.to_dict()})))
        return 0
    for line in [] if signed is None else signed.summary():
        say(line)
    say(checked.summary())
    return 0


def methods(as_json: Json = False) -> None:
    """Every merging method: parameters, defaults, paper, and the laws it keeps."""
    catalogue = (
        resources.files("modalloy") / "methods" / "catalogue.json"
    )  # made by docs/generate.py: torch takes seconds
    methods = json.loads(catalogue.read_text(encoding="utf-8"))
    if as_json:
        print(json.dumps(methods))
        return
    for name, method in methods.items():
        print(f"{name} ({method['paper']})\n  {method['summary']}")
        for parameter, default in method["parameters"].items():
            shown = method["auto_scale"] if parameter == "scale" else default
            print(f"  {parameter} ({shown}): {method['documentation'][parameter]}")
        print(f"  on low-rank updates: {RECEIVES[method['receives']]}; laws: {', '.join(method['laws'])}\n")


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="where the merged model goes")] = Path("build/demo"),
) -> Path:
    """Merge the built-in specialists and ask the result aloud about pictures, movements and shapes."""
    from modalloy.demo import demo as run

    with progress("merge") as on_job:
        run(out, on_job)
    return out


def check(
    out: OutFolder,
    thorough: Annotated[bool, typer.Option("--thorough", help="all probes, longer answers, every sample")] = False,
    card: Annotated[bool, typer.Option("--card", help="put the table into the result's README.md")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    as_json: Json = False,
) -> int:
    """What did merging do to the model? Result, base and parents on short probes; exit code 1 if something is clearly worse."""
    choice("--device", device, DEVICES)
    from modalloy.evals.check_card import text

    found = checked_result(out, device, thorough=thorough, card=card)
    say(json.dumps(found.to_dict()) if as_json else text(found))
    return 0 if found.ok else 1


def checked_result(out: Path, device: str, *, thorough: bool = False, card: bool = True) -> "Checked":
    """The check of a result, which its card then has."""
    from modalloy.evals.check import check as run
    from modalloy.evals.check_card import add_to_card
    from modalloy.merging import resolve_device

    with progress("check") as on_model:
        found = run(out, thorough=thorough, device=resolve_device(device), on_model=on_model)
    if card:
        add_to_card(out, found)
    return found

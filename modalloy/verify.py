"""Checking a result: hashes, shapes, finite values, and sampled layers merged again from the recipe."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modalloy import cost
from modalloy.checkpoints import Checkpoint, all_finite, file_sha256, read_json
from modalloy.delta import Delta, LowRank, compressed, norm
from modalloy.engines import local
from modalloy.errors import CheckpointError
from modalloy.linalg import BLOCK_ENTRIES
from modalloy.manifest import SOURCES, hashed_files, input_sha256, recorded_starts
from modalloy.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from modalloy.plan import Plan
    from modalloy.planner import Job

COMPUTED = 1e-5  # relative error of an update that was merged in float32
SUMMED = 1e-7  # and of its sum with the base


@dataclass(frozen=True)
class Verification:
    """What was checked. `worst_error` is the largest relative Frobenius error of a recomputed layer."""

    files: int
    tensors: int
    layers: int
    worst_error: float | None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self) | {"ok": True}

    def summary(self) -> str:
        """One line for people."""
        line = f"ok: {self.files} hashes, {self.tensors} shapes, finite"
        if self.worst_error is None:
            return f"{line}; {self.note}"
        return f"{line}; {self.layers} layers recomputed from the recipe, worst relative error {self.worst_error:.1e}"


def verify(out: str | Path) -> Verification:
    """Check the result in the folder `out` against its manifest and recipe.

    Raises:
        CheckpointError: a file is missing, changed or damaged, or a layer is not what its recipe gives.
    """
    from modalloy.differences import settled_plan
    from modalloy.plan import labels

    folder = Path(out)
    if not (folder / "manifest.json").is_file():
        raise CheckpointError(
            f"{folder}: has no manifest.json, so it is no result of modalloy merge; give the merged folder"
        )
    manifest = read_json(folder / "manifest.json")
    if not isinstance(manifest.get("outputs"), dict):
        raise CheckpointError(f"{folder / 'manifest.json'}: lists no outputs; merge again")
    if not (folder / SOURCES).is_file():
        return verify_folder(folder, None, manifest, note=f"layers not recomputed: no {SOURCES}")
    checked = verify_folder(folder, None, manifest)  # before anything in the folder is believed
    recipe = load_recipe(folder / "recipe.yaml")
    starts, models, fishers, encoders = _at_sources(folder / SOURCES, recipe)
    places = [*starts.values(), *models, *fishers, *(place and place.partition(":")[2] for place in encoders)]
    gone = [path for path in places if path is not None and not Path(path).exists()]
    if gone:
        return replace(checked, note=f"layers not recomputed: {gone[0]} is gone")
    entries = [
        entry.model_dump()
        | {"model": path, "parameters": entry.parameters.model_dump() | {"fisher": fisher}}
        | ({"encoder": entry.encoder_at(encoder)} if encoder else {})
        for entry, path, fisher, encoder in zip(recipe.models, models, fishers, encoders, strict=True)
    ]
    found = Recipe(**recipe.model_dump() | starts | {"models": entries})
    planned = settled_plan(found, allow_base_mismatch=True)
    planned.surveys = manifest.get("surveys", {})
    planned.compression = manifest.get("compression", {})
    inputs = manifest.get("inputs", {})
    for label, start in recorded_starts(planned).items():
        known = inputs.get(label, {})
        if any(key in known and known[key] != start.get(key) for key in ("header_sha256", "sha256")):
            place = starts["target" if label == "target" else "base_model"]
            raise CheckpointError(
                f"{place}: the {label} has changed since the merge (its sha256 is not the one in manifest.json); merge again"
            )
    # by the labels of the recipe as written: those of the local folders differ where it names hub models
    for label, specialist, fisher in zip(labels(recipe), planned.specialists, planned.fishers, strict=True):
        recorded = inputs.get(label, {}).get("sha256")
        if recorded != input_sha256(specialist, fisher):
            raise CheckpointError(
                f"{specialist.checkpoint.folder}: the {label} specialist has changed since the merge (its sha256 is "
                "not the one in manifest.json); merge again"
            )
    return verify_folder(folder, planned, manifest, rehash=False)


def verify_folder(
    folder: Path,
    planned: Plan | None,
    manifest: dict[str, Any],
    *,
    rehash: bool = True,
    note: str = "",
    budget: cost.Budget | None = None,
) -> Verification:
    """Check `folder`; without a plan no layer is recomputed. `rehash=False` trusts hashes that were just taken."""
    listed, present = manifest["outputs"], hashed_files(folder)
    for name in sorted(listed.keys() | set(present)):
        if name not in present:
            raise CheckpointError(f"{folder / name}: listed in manifest.json but missing; merge again")
        if name not in listed:
            raise CheckpointError(f"{folder / name}: not listed in manifest.json; remove it or merge again")
        if rehash and file_sha256(folder / name) != listed[name]:
            raise CheckpointError(
                f"{folder / name}: its sha256 is not the one in manifest.json; the file was changed: merge again"
            )
    weights = Checkpoint(folder, ("adapter_model", "model"))
    for ref in weights.refs.values():
        if rehash and not all_finite(weights.read(ref)):
            raise CheckpointError(f"{folder}: {ref.name} holds NaN or infinite values; merge again")
    if planned is None:
        return Verification(len(listed), len(weights.refs), 0, None, note)
    for job in planned.jobs:
        for spec in job.outputs:
            found = weights.refs.get(spec.name)
            if found is None or found.shape != spec.shape or found.dtype != spec.dtype:
                raise CheckpointError(
                    f"{folder}: {spec.name} should be {spec.shape} of {spec.dtype}, found {found}; merge again"
                )
    sample = cost.sample(planned)
    worst = 0.0
    errors = local.run(
        sample,
        lambda _: None,
        lambda job, _: _layer_error(weights, planned, job),
        *((local.default_workers(),) if budget is None else (budget.n_workers, budget.fits_verifying)),
    )
    with closing(errors):
        for job, (error, allowed) in errors:
            worst = max(worst, error)
            if not error <= allowed:
                raise CheckpointError(
                    f"{folder}: {job.slot} differs from what the recipe gives by {error:.1e} (allowed {allowed:.0e}); "
                    "merge again"
                )
    return Verification(len(listed), len(weights.refs), len(sample), worst)


def _at_sources(path: Path, recipe: Recipe) -> tuple[dict[str, str], list[str], list[str | None], list[str | None]]:
    """Where base and target (by the recipe's key), specialists, and those Fisher files and encoders that there are, were when
    the result was merged."""
    sources, n = read_json(path), len(recipe.models)
    labels = {"base_model": "base", "target": "target"}
    wanted = {key: label for key, label in labels.items() if getattr(recipe, key)}
    starts = {key: sources.get(label) for key, label in wanted.items()}
    models, fishers, encoders = (sources.get(key) for key in ("specialists", "fishers", "encoders"))
    if (
        isinstance(models, list)
        and isinstance(fishers, list)
        and isinstance(encoders, list)
        and len(models) == len(fishers) == len(encoders) == n
        and all(
            isinstance(place, str)
            for place in (*starts.values(), *models, *filter(None, fishers), *filter(None, encoders))
        )
    ):
        return {key: str(place) for key, place in starts.items()}, models, fishers, encoders
    raise CheckpointError(
        f"{path}: does not name a {' and a '.join(wanted.values())} and {n} specialists; merge again, or remove the file to "
        "check hashes only"
    )


def _layer_error(weights: Checkpoint, planned: Plan, job: Job) -> tuple[float, float]:
    """Relative Frobenius distance between a written layer and its recomputation, and how large rounding may make it."""
    from modalloy.merge import merged_delta, merges_by_rows

    literal, inputs = cost.is_recomputed_literally(planned, job), {ref: planned.read(ref) for ref in job.reads}
    again = partial(merged_delta, planned, job, inputs.__getitem__, literal=literal)
    written = [weights.read(weights.refs[spec.name]) for spec in job.outputs]
    if job.rows:
        written = [torch.cat([written[0][begin:end] for begin, end in job.rows])]
    if len(written) == 1:
        base = inputs[planned.start(job.slot)]
        if merges_by_rows(planned, job):
            return _weight_error(written[0], base, lambda rows: again(rows=rows))
        whole = again()
        return _weight_error(
            written[0],
            base,
            lambda rows: whole.up[rows] @ whole.down if isinstance(whole, LowRank) else whole[rows],
        )
    assert planned.rank is not None
    wanted = again()
    if job.slot in planned.compression or (isinstance(wanted, LowRank) and wanted.rank > planned.rank):
        wanted, _ = compressed(wanted, planned.rank)
    found = LowRank(written[1], written[0]).to(torch.float64)
    if isinstance(wanted, LowRank):
        distance, size = norm(found + -1.0 * wanted.to(torch.float64)), norm(wanted)
    else:
        distance, size = norm(found.dense() - wanted), norm(wanted)
    # Rounding each entry of both factors by itself costs 0.6 units of roundoff times this sum, at every size and spectrum;
    # it exceeds the size where the columns' products cancel each other.
    products = float((found.up.norm(dim=0) * found.down.norm(dim=1)).norm())
    return _ratio(distance, size), COMPUTED + _roundoff(written[0].dtype) * _ratio(products, size)


def _weight_error(written: Tensor, base: Tensor, update_of: Callable[[slice], Delta]) -> tuple[float, float]:
    """The same for a whole weight, by blocks of rows: against base plus update, rounded to the type that is written."""
    step = max(1, BLOCK_ENTRIES // written.shape[1])
    distance = size = changed = 0.0
    for start in range(0, len(written), step):
        rows = slice(start, start + step)
        update = update_of(rows)
        update = update.dense() if isinstance(update, LowRank) else update
        exact = base[rows].to(torch.float64) + update.to(torch.float64)
        rounded = exact.to(written.dtype).to(torch.float64)
        distance = math.hypot(distance, float((written[rows].to(torch.float64) - rounded).norm()))
        size = math.hypot(size, float(rounded.norm()))
        changed = math.hypot(changed, float(update.to(torch.float64).norm()))
    computed = SUMMED + COMPUTED * _ratio(changed, size)
    # a share of computed / roundoff lies so close to the middle of two neighbours that it is rounded to the other one
    return _ratio(distance, size), computed + (_roundoff(written.dtype) * computed) ** 0.5


def _roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of rounding one value."""
    return torch.finfo(dtype).eps / 2


def _ratio(distance: float, size: float) -> float:
    return distance / size if size else distance

"""Checking a result: its files, its manifest, and its tensors against what recipe and inputs promise."""

from __future__ import annotations

import functools
import json
import random
from collections import Counter
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modalloy._version import __version__
from modalloy.delta import LowRank
from modalloy.engines import local
from modalloy.errors import CheckpointError, MethodError, shown
from modalloy.linalg import all_finite
from modalloy.machine.cores import default_workers
from modalloy.outputs.manifest import (
    MANIFEST,
    check_described,
    check_recipe,
    differences,
    read_manifest,
    result_files,
    start_names,
)
from modalloy.outputs.sources import SOURCES, Sources, read_sources
from modalloy.planning import cost
from modalloy.promise import Promises
from modalloy.promise.across import promises_across
from modalloy.promise.promise import Promise
from modalloy.recipe import Recipe, load_recipe
from modalloy.recompute import (
    BLOCKS,
    SAMPLED,
    SMALL_BYTES,
    alike,
    codes_error,
    factors_error,
    is_survey,
    parts_of,
    same_bits,
    sampled_error,
    spread_over_places,
    survey_of,
    surveyed_groups,
    weight_error,
)
from modalloy.storage.folder import file_sha256, read_json, reading
from modalloy.storage.scaled import ScaledRef
from modalloy.storage.tensors import Checkpoint, TensorRef

if TYPE_CHECKING:
    from modalloy.planning.plan import Plan

KINDS = ("merged", "averaged", "kept", "carried")
EXACT_BYTES = 1 << 30  # up to which `verify OUT` compares all that must be an input bit for bit
CUT = (1e-3, 1e-5)  # relative and absolute error of what a cut to a rank is said to lose


@dataclass(frozen=True)
class Verification:
    """What was checked. `worst_error` is the largest relative Frobenius error of a recomputed tensor.

    `recomputed` and `of` count the result's tensors by what they must be (a merged pair of factors is one), `share` is the
    recomputed ones' share of the parameters.
    """

    files: int
    tensors: int
    layers: int  # merged ones that were recomputed
    worst_error: float | None
    note: str = ""
    recomputed: dict[str, int] = field(default_factory=dict)
    of: dict[str, int] = field(default_factory=dict)
    share: float = 0.0
    full: bool = False

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self) | {"ok": True}

    def summary(self) -> str:
        """One line for people."""
        parts = [f"ok: {self.files} hashes, {self.tensors} shapes, finite"]
        if self.of:
            counted = ", ".join(
                f"{self.recomputed.get(kind, 0)} of {self.of[kind]} {kind}" for kind in KINDS if kind in self.of
            )
            what = "" if self.worst_error is None else f", worst relative error {self.worst_error:.1e}"
            rest = "" if self.full or self.share == 1 else "; --full recomputes all"
            parts.append(
                f"{counted} tensors ({_percent(self.share)} of the parameters) recomputed from the recipe{what}{rest}"
            )
        return "; ".join([*parts, *([self.note] if self.note else [])])


def verify(out: str | Path, *, full: bool = False) -> Verification:
    """Check the result in the folder `out` against its manifest, its recipe and its inputs; `full` recomputes every tensor.

    Without `full`, of a large result only some tensors of each kind and each file are recomputed, drawn at random.

    Raises:
        CheckpointError: a file is missing, changed or damaged, the manifest does not say what recipe and inputs give, or a
            tensor is not what they give.
    """
    from modalloy.planning.differences import settled_plan

    folder = Path(out)
    manifest = read_manifest(folder)
    checked = verify_folder(folder, None, manifest)  # before anything in the folder is believed
    recipe = load_recipe(folder / "recipe.yaml")
    check_recipe(manifest, recipe, folder)
    with reading(folder / SOURCES):
        if not (folder / SOURCES).exists():
            return replace(checked, note=f"layers not recomputed: no {SOURCES}")
    places = read_sources(folder, recipe)
    if (gone := places.gone()) is not None:
        return replace(checked, note=f"layers not recomputed: {gone} is gone")
    planned = settled_plan(recipe_at(recipe, places), allow_base_mismatch=True)
    check_described(manifest, planned, recipe, places, folder)
    _check_config(folder, planned, start_names(recipe, places, manifest))
    found = verify_folder(folder, planned, manifest, rehash=False, full=full, draw=random.SystemRandom())
    other = f"merged by modalloy {manifest['modalloy']}" if manifest["modalloy"] != __version__ else ""
    return replace(found, note="; ".join(filter(None, (found.note, other))))


def verify_folder(
    folder: Path,
    planned: Plan | None,
    manifest: dict[str, Any],
    *,
    rehash: bool = True,
    note: str = "",
    budget: cost.Budget | None = None,
    full: bool = False,
    draw: random.Random | None = None,
) -> Verification:
    """Check `folder`; without a plan nothing is recomputed. `rehash=False` trusts hashes that were just taken.

    Without `full`, a sample of a large result is recomputed: what `draw` draws, else what is spread evenly.
    """
    listed, present = manifest["outputs"], result_files(folder)
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
        if rehash and not all(all_finite(weights.read(part)) for part in parts_of(ref, 1 << 20)):
            raise CheckpointError(f"{folder}: {ref.name} holds NaN or infinite values; merge again")
    if planned is None:
        return Verification(len(listed), len(weights.refs), 0, None, note)
    for job in planned.jobs:
        for spec in job.outputs:
            found = (weights.codes or weights.refs).get(spec.name)
            if found is None or found.shape != spec.shape or found.dtype != spec.dtype:
                raise CheckpointError(
                    f"{folder}: {spec.name} should be {spec.shape} of {spec.dtype}, found {found}; merge again"
                )
    check = _Check(folder, planned, weights, manifest)
    checked, n_entries, worst = check.run(full=full, draw=draw, budget=budget)
    counted, of = (Counter(str(promise.kind) for promise in some) for some in (checked, check.promised))
    return Verification(
        len(listed),
        len(weights.refs),
        counted["merged"],
        worst,
        note,
        {kind: counted[kind] for kind in of},
        dict(of),
        n_entries / (sum(map(entries_of, weights.refs.values())) or 1),
        full,
    )


class _Check:
    """A result's tensors beside what they must be."""

    def __init__(self, folder: Path, planned: Plan, weights: Checkpoint, manifest: dict[str, Any]) -> None:
        from modalloy.planning.models import labels, locate_specialist

        self.folder, self.planned, self.weights = folder, planned, weights
        self.surveys, self.compression = manifest.get("surveys", {}), manifest.get("compression", {})
        recipe = planned.recipe
        if planned.across is None:
            folders = [locate_specialist(entry.model, recipe.folder) for entry in recipe.models]
            promises = Promises(recipe, planned.target.folder, folders, labels(recipe))
            self.read, promised = promises.read, list(promises.all())
        else:
            self.read, promised = planned.inputs.read, list(promises_across(planned))
        self.double = recipe.dtype == "float64"
        self.promised = [found for promise in promised if (found := self._placed(promise)) is not None]
        names = {name for promise in self.promised for name in promise.names}
        if extra := sorted(weights.refs.keys() - names):
            raise CheckpointError(f"{folder}: holds {extra[0]}, which the recipe does not give; merge again")

    def run(
        self, *, full: bool, draw: random.Random | None, budget: cost.Budget | None
    ) -> tuple[list[Promise], int, float | None]:
        """Those that were recomputed, how many entries of them, and the largest relative error of one that is not exact."""
        self._check_surveys(full)
        is_small = sum(promise.n_bytes_with_start for promise in self.promised) <= SMALL_BYTES
        some = self.promised if full or is_small else self._sample(draw)
        in_part = not full and not is_small and draw is None
        self._check_cuts()
        worst: float | None = None
        n_entries = 0
        jobs = {job.name: job for job in self.planned.jobs} | {job.name: job for job in self.planned.merges()}
        results = local.in_order(
            some,
            lambda _: None,
            lambda promise, _: self._error(promise, in_part=in_part),
            default_workers() if budget is None else budget.n_workers,
            lambda promises: budget is None or budget.fits_verifying([jobs[promise.slot] for promise in promises]),
        )
        with closing(results):
            for _, (error, count) in results:
                worst = error if worst is None else worst if error is None else max(worst, error)
                n_entries += count
        return some, n_entries, worst

    def _placed(self, promise: Promise) -> Promise | None:
        """The promise with the names that are there: a pair of factors, or a weight of its own; None if none is needed."""
        refs = self.weights.refs
        if all(name in refs for name in promise.names):
            return promise
        if len(promise.names) == 2 and promise.slot in refs and self.planned.form.takes_full_updates:
            return replace(promise, names=(promise.slot,))
        if len(promise.names) == 2 and promise.is_exact and not any(name in refs for name in promise.names):
            return None  # an update that is zero
        missing = next(name for name in promise.names if name not in refs)
        raise CheckpointError(f"{self.folder}: {missing} is missing, which must be {promise.kind}; merge again")

    def _sample(self, draw: random.Random | None) -> list[Promise]:
        """Some of each kind and method, and of each file; drawn, or spread over layers."""
        promised = self.promised
        groups: dict[tuple[str, str], list[int]] = {}
        for index, promise in enumerate(promised):
            groups.setdefault((promise.kind, promise.method), []).append(index)
        chosen: set[int] = set()
        for group in groups.values():
            if draw is None:
                chosen |= set(spread_over_places(group, lambda index: promised[index].slot))
            else:
                chosen |= set(draw.sample(group, min(SAMPLED, len(group))))
        exact = [index for index, promise in enumerate(promised) if promise.kind in ("kept", "carried")]
        if draw is not None and sum(promised[index].n_bytes for index in exact) <= EXACT_BYTES:
            chosen.update(exact)
        file_of = [self.weights.refs[promise.names[0]].file for promise in promised]
        untouched = set(file_of) - {file_of[index] for index in chosen}
        chosen.update(map(file_of.index, untouched))
        return [promised[index] for index in sorted(chosen)]

    def _error(self, promise: Promise, *, in_part: bool) -> tuple[float | None, int]:
        """How far a tensor is from what it must be, None if it had to be so bit for bit; and how many entries were compared.

        Raises:
            CheckpointError: too far.
        """
        if promise.is_exact and len(promise.names) == 1 and not promise.rows:
            return None, self._check_bits(promise, in_part=in_part)
        refs = [self.weights.refs[name] for name in promise.names]
        read = functools.cache(self.read)
        stored, surveys, double, lost = promise.stored(refs[0]), self.surveys, self.double, None
        n_entries = entries_of(promise.start) if promise.rows else sum(map(entries_of, refs))
        n_entries //= 1 if promise.part is None else promise.part[1]  # of all experts
        try:
            some = None
            if in_part and len(refs) == 1 and not isinstance(stored, ScaledRef):
                some = sampled_error(promise, stored, self.weights.read, read, surveys, double=double)
            if some is not None:
                error, allowed, n_entries = some
            elif isinstance(stored, ScaledRef):
                error, allowed, lost = codes_error(promise, stored, self.weights.read, read, surveys, double=double)
            else:
                written = promise.within([self.weights.read(ref) for ref in refs])
                if len(written) == 1:
                    error, allowed = weight_error(promise, written[0], read, surveys, double=double)
                else:
                    error, allowed, lost = factors_error(promise, LowRank(*written[::-1]), read, surveys, double=double)
        except MethodError as reason:
            raise CheckpointError(f"{self.folder}: {promise.slot}: {reason}") from reason
        if not error <= allowed:
            raise CheckpointError(
                f"{self.folder}: {promise.slot} differs from what the recipe gives by {error:.1e} (allowed {allowed:.0e}); "
                "merge again"
            )
        if len(promise.names) == 2 or isinstance(stored, ScaledRef):
            self._check_cut(promise.slot, lost)
        return error, n_entries

    def _check_bits(self, promise: Promise, *, in_part: bool) -> int:
        written = self.weights.refs[promise.names[0]]
        same, count = same_bits(written, self.weights.read, promise.start, self.read, BLOCKS if in_part else None)
        if same:
            return count
        whose = "its specialist's" if promise.kind == "carried" else "the base's"
        raise CheckpointError(
            f"{self.folder}: {written.name} differs from what the recipe gives: it must be {whose} bit for bit; merge again"
        )

    def _check_surveys(self, full: bool) -> None:
        """What the manifest says of the whole model, by group of weights; with `full` it is counted again."""
        groups, told = surveyed_groups(self.promised), self.surveys
        if told.keys() != groups.keys():
            odd = next(iter(told.keys() ^ groups.keys()))
            raise self._odd(f"surveys: {odd[:200]}", "is there" if odd in told else "is missing")
        for group, promised in groups.items():
            if not is_survey(told[group], len(promised[0].updates)):
                raise self._odd(f"surveys: {group[:200]}", f"is {told[group]!r:.80}, which no model gives")
            if full:
                wanted = survey_of(promised, self.read, double=self.double)
                if not alike(wanted, told[group]):
                    raise self._odd(
                        f"surveys: {group[:200]}", f"is {told[group]!r:.80}, but the inputs give {wanted!r:.80}"
                    )

    def _check_cuts(self) -> None:
        coded = self.planned.recipe.output.requantize
        pairs = {promise.slot for promise in self.promised if len(promise.names) == 2 or coded}
        if odd := sorted(self.compression.keys() - pairs):
            raise self._odd(f"compression: {odd[0]}", "is there, but is no pair of factors, nor of codes and scales")

    def _check_cut(self, slot: str, lost: float | None) -> None:
        """What the manifest says that a cut to a rank lost."""
        told, (relative, absolute) = self.compression.get(slot, 0.0), CUT
        if abs(told - (lost or 0.0)) > absolute + relative * (lost or 0.0):
            raise self._odd(f"compression: {slot}", f"is {told:g}, but cutting it to its rank loses {lost or 0:g}")

    def _odd(self, place: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.folder / MANIFEST}: {place} {what}; merge again")


def entries_of(ref: TensorRef) -> int:
    """How many numbers a stored tensor holds."""
    return ref.n_bytes // ref.dtype.itemsize


def _percent(share: float) -> str:
    """Never 100 where something is left."""
    return "100 %" if share == 1 else f"{min(100 * share, 99.9):.3g} %"


def recipe_at(recipe: Recipe, places: Sources) -> Recipe:
    """The recipe with places on this machine in place of what it names."""
    from modalloy.planning.models import labels

    entries = [
        entry.model_dump()
        | {
            "model": str(model),
            "parameters": entry.parameters.model_dump() | {"fisher": None if fisher is None else str(fisher)},
        }
        | ({"encoder": entry.encoder_at(encoder)} if encoder else {})
        for entry, model, fisher, encoder in zip(
            recipe.models, places.models, places.fishers, places.encoders, strict=True
        )
    ]
    starts = {key: str(place) for key, place in places.starts.items()}
    output, index = recipe.output, recipe.tokenizer_index
    if recipe.tokenizer is not None:
        starts["tokenizer"] = starts["base_model"] if index is None else str(places.models[index])
    found = Recipe(**recipe.model_dump() | starts | {"models": entries})
    template = output.chat_template
    if template not in ("auto", "base") and "{" not in template:  # a label, which the place here may have changed
        of = dict(zip(labels(recipe), labels(found), strict=True)).get(template, template)
        found = found.model_copy(update={"output": output.model_copy(update={"chat_template": of})})
    return found


def _check_config(folder: Path, planned: Plan, names: dict[str, str]) -> None:
    """What says how the written tensors are loaded must be what the recipe gives: it scales them."""
    from modalloy.outputs import WRITERS

    writer = WRITERS[planned.form.name]
    path, wanted = folder / writer.config, writer.promised(planned, names[planned.target_label])
    found = {key: value for key, value in read_json(path).items() if writer.is_promised(key)}
    if different := differences(json.loads(json.dumps(wanted)), found):
        place, right, told = different
        raise CheckpointError(
            f"{path}: {place} is {shown(told)}, but recipe and inputs give {shown(right)}; merge again"
        )

"""The whole audit: open, compare headers, fit the common coefficients, judge every weight, say what is wrong."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from modalloy.auditing.beside import beside
from modalloy.auditing.claim import Claim
from modalloy.auditing.found import Audit, Finding
from modalloy.auditing.headers import HEAD, extra_head, headers
from modalloy.auditing.judge import SAME, SURE, Common, Judged, judge, moved_rows
from modalloy.auditing.opened import Opened, Slot, open_all
from modalloy.auditing.weight import Weight
from modalloy.auditing.words import NONE, coefficients, findings
from modalloy.builtin import PREFIX
from modalloy.errors import CheckpointError, RecipeError, cut
from modalloy.planning.models import locate_specialist
from modalloy.recipe import Recipe, load_recipe
from modalloy.recompute import SMALL_BYTES, spread
from modalloy.storage.folder import reading
from modalloy.storage.locate import is_hub_id, locate
from modalloy.storage.tensors import TensorRef

FITTED = 12  # weights from which the common coefficients are read
COMPARED = 4  # of these, on which rounder ones are compared
# relative distance of a coefficient from a simple one (rounding biases those of small updates), or one of two digits, that is
# tried in its stead
NEAR_SIMPLE, NEAR_ROUND = 0.03, 0.005
AS_WELL = 0.01  # by how much fewer of the entries may be the nearest value


def audit(
    merged: str | Path,
    *,
    base: str | Path,
    adapters: Sequence[str | Path] = (),
    models: Sequence[str | Path] = (),
    weights: Sequence[float] | None = None,
    recipe: str | Path | Recipe | None = None,
    full: bool = False,
    on_weight: Callable[[int, int], None] | None = None,
) -> Audit:
    """Is the model in the folder `merged` what it is said to be: base + Σ wᵢ δᵢ, or what a recipe gives, within rounding?

    It needs no manifest, and may be of any tool: a whole model, or an adapter. An adapter's update is sᵢ Bᵢ Aᵢ with its own
    α/r (α/√r of rsLoRA), a model's is its difference from the base. Coefficients that are not given are fitted by least
    squares. Everything is compared in float64, within the rounding of the type that is written.

    Args:
        merged: folder of the merged model, or its name on the hub.
        base: the base that it was merged from.
        adapters: LoRA adapters that were merged. A single one with no models must have the coefficient 1.
        models: whole models that were merged.
        weights: what each adapter, then each model, must be multiplied by.
        recipe: what it must be instead: a recipe, modalloy's or mergekit's. Its models are the sources.
        full: read every weight; else, of a large model, a sample that is spread over each kind of weight.
        on_weight: called with the number of weights done and of all.

    Raises:
        ModalloyError: an input is missing, damaged, quantised or fits not the others.
    """
    for one in (merged, base, *adapters, *models):
        _check_named(str(one))
    place, base_folder = (locate(str(one)) for one in (merged, base))
    chosen = load_recipe(recipe) if isinstance(recipe, (str, Path)) else recipe
    if chosen is not None and isinstance(recipe, (str, Path)) and (adapters or models or weights is not None):
        raise RecipeError("a recipe names its models and their weights; leave out the others, or the recipe")
    claim = None if chosen is None else Claim(chosen, base_folder.resolve())
    opened = _opened(place, base_folder, adapters, models, chosen)
    labels = [source.label for source in opened.sources]
    wanted = _wanted(opened, weights, chosen)
    every = list(opened.slots())
    some = every if full else sampled(every)
    common = Common(_common(opened, some, wanted))
    judged: list[Judged] = []
    for number, slot in enumerate(some):
        weight = Weight(slot, opened.read, opened.merged.read)
        judged.append(judge(weight, common, () if claim is None else claim.expected(slot)))
        if on_weight is not None:
            on_weight(number + 1, len(some))
    found = [
        *headers(opened),
        *_extra_head(opened),
        *beside(opened),
        *findings([*judged, *_resized(opened)], common.coefficients, wanted, claim is not None),
    ]
    return Audit(
        str(merged),
        str(base),
        tuple(labels),
        _claim(labels, wanted, chosen),
        len(every),
        len(some),
        full or len(some) == len(every),
        dict(Counter(str(one.kind) for one in judged)),
        coefficients(judged, common.coefficients),
        tuple(sorted(found, key=lambda finding: finding.level != "fault")),
        tuple(judged),
    )


def _check_named(name: str) -> None:
    """Refuse what is no folder here, and no name of the hub or of what is built in."""
    folder = name.partition("#")[0]
    if name.startswith(PREFIX) or is_hub_id(folder):
        return
    path = Path(folder).expanduser()
    with reading(path):
        if not path.exists():
            raise CheckpointError(f"{cut(name)}: no such folder; correct the path")


def _opened(
    place: Path, base: Path, adapters: Sequence[str | Path], models: Sequence[str | Path], recipe: Recipe | None
) -> Opened:
    """Everything opened; a recipe's models are adapters or models as their files tell."""
    if recipe is None or adapters or models:
        named = [*((str(one), False) for one in adapters), *((str(one), True) for one in models)]
        return open_all(place, base, [(locate_specialist(one, Path()), is_whole) for one, is_whole in named])
    folders = dict.fromkeys(locate_specialist(entry.model, recipe.folder).resolve() for entry in recipe.models)
    return open_all(place, base, [(folder, None) for folder in folders if not folder.samefile(base)])


def _wanted(opened: Opened, weights: Sequence[float] | None, recipe: Recipe | None) -> dict[str, float] | None:
    """The coefficients that are given, or that go without saying: of one adapter alone, 1."""
    labels = [source.label for source in opened.sources]
    if weights is not None:
        if len(weights) != len(labels):
            raise RecipeError(f"{len(weights)} weights for {len(labels)} adapters and models; give one each")
        if odd := [one for one in weights if not math.isfinite(one)]:
            raise RecipeError(f"the weight {odd[0]} is no number; give one")
        return dict(zip(labels, map(float, weights), strict=True))
    alone = len(opened.sources) == 1 and not opened.sources[0].is_whole
    return {labels[0]: 1.0} if alone and recipe is None else None


def sampled(slots: Sequence[Slot]) -> list[Slot]:
    """All of a small model; of a large one some of each kind of weight, spread evenly: the same each time."""
    if sum(slot.n_bytes for slot in slots) <= SMALL_BYTES:
        return list(slots)
    groups: dict[str, list[int]] = defaultdict(list)
    for index, slot in enumerate(slots):
        groups[slot.pattern].append(index)
    chosen = sorted(index for group in groups.values() for index in spread(group))
    return [slots[index] for index in chosen]


def _common(opened: Opened, slots: Sequence[Slot], wanted: dict[str, float] | None) -> dict[str, float]:
    """The coefficients that most weights have: medians of those of a sample, or rounder ones that explain it as well."""
    values: dict[str, list[tuple[float, float]]] = {source.label: [] for source in opened.sources}
    updated = [slot for slot in slots if slot.updates]
    tried: list[Slot] = []
    for slot in updated[:: max(1, -(-len(updated) // FITTED))]:
        weight = Weight(slot, opened.read, opened.merged.read)
        if not weight.is_finite or not weight.dtype.is_floating_point or weight.is_base():
            continue
        if (fit := weight.fit()) is None:
            continue
        tried.append(slot)
        for label, value in fit.coefficients.items():
            values[label].append((value, fit.errors[label]))
    medians = {label: _typical(some) for label, some in values.items() if some}
    if not medians:
        return dict(wanted or {})
    rounder = {label: _rounder(value, error, (wanted or {}).get(label)) for label, (value, error) in medians.items()}
    plain = {
        label: rounder[label] if abs(value - rounder[label]) <= SAME * abs(value) else value
        for label, (value, _) in medians.items()
    }
    seen = tried[:: max(1, len(tried) // COMPARED)]
    known = {label: value for label, value in (wanted or {}).items() if label in plain}
    scores = {}
    for index, candidate in enumerate((known, rounder, plain)):
        weights = (Weight(slot, opened.read, opened.merged.read) for slot in seen if candidate)
        scores[index] = sum(one.test(one.total(candidate)).score for one in weights) / len(seen) if candidate else -1.0
    best = max(scores.values())
    chosen = next(index for index, score in scores.items() if score >= best - AS_WELL)
    return (known, rounder, plain)[chosen]


def _typical(some: list[tuple[float, float]]) -> tuple[float, float]:
    """The median coefficient of those that are not 0, and its standard error; a source may be missing in some weights."""
    own = [(value, error) for value, error in some if abs(value) > max(NONE, SURE * error)] or some
    value, error = torch.tensor(own, dtype=torch.float64).median(0).values.tolist()
    return value, error


def _rounder(value: float, error: float, wanted: float | None) -> float:
    """A rounder number near a coefficient: the wanted one, a simple share, or two digits."""
    simple = [*([] if wanted is None else [wanted]), 0.0, 1.0, *(1 / n for n in range(2, 9))]
    for one in simple:
        if abs(one - value) <= max(NEAR_SIMPLE * abs(value), SURE * error):
            return one
    for one in (round(value, 1), round(value, 2)):
        if abs(one - value) <= max(NEAR_ROUND * abs(value), SURE * error):
            return one
    return value


def _resized(opened: Opened) -> list[Judged]:
    """Tables of another height than the base's, whose common rows are not the base's."""
    found = []
    for name in opened.reshaped:
        base, written = opened.base.refs[name], opened.found[name]
        is_table = base.shape[1:] == written.shape[1:] and len(base.shape) == 2 and written.dtype.is_floating_point
        if is_table and (rows := moved_rows(opened.read(base), opened.merged.read(written))):
            found.append(Judged(name, name, "unexplained", cause="rows", detail=rows))
    return found


def _extra_head(opened: Opened) -> list[Finding]:
    """A head that the base ties."""
    head = next((name for name in opened.extra if name.endswith(HEAD)), None)
    table = next((ref for name, ref in opened.found.items() if name.endswith("embed_tokens.weight")), None)
    if head is None or table is None or opened.adapter is not None:
        return []
    own: TensorRef = opened.merged.refs[head]
    same = own.shape == table.shape and torch.equal(opened.merged.read(own), opened.merged.read(table))
    found = extra_head(opened, same)
    return [] if found is None else [found]


def _claim(labels: Sequence[str], wanted: dict[str, float] | None, recipe: Recipe | None) -> str:
    """In words, what every weight should be."""
    if recipe is not None:
        return f"what the recipe gives by {recipe.merge_method}"
    if not labels:
        return "the base's"
    if wanted is not None:
        return "base + " + " + ".join(f"{value:g} × {label}" for label, value in wanted.items())
    return "the base's, or a sum, a mean or a TIES of the sources' updates"

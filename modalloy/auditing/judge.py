"""What one weight is: the base's, a source's, a sum, a mean, a TIES of the sources' updates, what a method gives, or unexplained.

Explanations are tried from the simplest on, each within the rounding of the written type; what none explains is said to be so.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from modalloy.auditing.picked import Stated, explained, possible, unit_of
from modalloy.auditing.trims import Trims
from modalloy.auditing.weight import TWICE, Expected, Fit, Test, Weight
from modalloy.specialists.specialist import StoredLora
from modalloy.storage.scaled import ScaledRef

Kind = Literal["base", "source", "sum", "mean", "slerp", "ties", "method", "untold", "unexplained"]
Cause = Literal["", "not_finite", "precision", "apart", "rows", "scales", "base_scaled"]
NEAR = 0.98  # share of entries that are the nearest value, from which another coefficient need not be tried
BETTER = 0.01  # by how much more of them another coefficient must give
BETTER_LEAST = 3  # and of how many
MOVED = 8  # entries that an update would change at least, where it is said to be missing
ALIKE = 0.02  # relative difference of two coefficients that count as one
SCALED = 2e-3  # from 1, of a factor of the base that is more than rounding
FACTOR = 16.0  # roundings of a factor that inner products in the written type give
SURE = 6.0  # standard errors
SAME = 1e-4  # of two coefficients that differ by an arithmetic's rounding
COARSE = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Judged:
    """What one weight was found to be.

    `coefficients` are those of the explanation, or the best fit of what is unexplained, with their standard `errors`.
    `worst` is the largest deviation over what rounding allows, `left` the deviation's norm over that of the change.
    `cause` says what is wrong beside the kind, `detail` more of it.
    """

    name: str
    pattern: str
    kind: Kind
    coefficients: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    worst: float = 0.0
    left: float = 0.0
    cause: Cause = ""
    detail: dict[str, Any] = field(default_factory=dict)
    moved: int = 0  # entries that the common sum would change, of a weight that is the base's
    has_updates: bool = False
    ranks: dict[str, int] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)


@dataclass
class Common:
    """What is tried on every weight: coefficients, and a TIES."""

    coefficients: dict[str, float] = field(default_factory=dict)
    trims: Trims = field(default_factory=Trims)


def judge(weight: Weight, common: Common, stated: Iterable[Stated] = ()) -> Judged:
    """What a weight is; `stated` are the changes that a recipe allows."""
    slot = weight.slot
    lora = {label: one for label, one in slot.updates.items() if isinstance(one, StoredLora)}
    about: dict[str, Any] = {
        "name": slot.name,
        "pattern": slot.pattern,
        "has_updates": bool(slot.updates),
        "ranks": {label: one.rank for label, one in lora.items()},
        "scales": {label: one.scale for label, one in lora.items()},
    }
    if not weight.is_finite:
        return Judged(**about, kind="unexplained", cause="not_finite")
    seen: list[Stated] = []
    for one in stated:
        seen.append(one)
        if _is_stated(weight, one):
            test = weight.test(one.change, one.dtype, one.whole)
            return Judged(**about, kind="base" if weight.is_base() else "method", worst=test.worst, left=test.left)
    if (one_of := next((one for one in seen if one.untold and possible(weight, one)), None)) is not None:
        return Judged(**about, kind="untold", detail={"why": one_of.untold})
    promised = [one.change for one in seen]
    if weight.is_base():
        wanted = promised or [weight.total(common.coefficients)]
        moved = min(map(weight.moved, wanted)) if weight.terms else 0
        coefficients = dict.fromkeys(weight.terms, 0.0)
        return Judged(**about, kind="base", coefficients=coefficients, moved=moved if moved >= MOVED else 0)
    if not weight.dtype.is_floating_point:
        return Judged(**about, kind="unexplained")
    if not weight.terms:
        return _without_updates(weight, about)
    return _sum(weight, common, about) or _other(weight, common, about, promised)


def _is_stated(weight: Weight, stated: Stated) -> bool:
    """Whether a weight is what a recipe gives, within rounding: of the sum, of entries at a method's cut, of factors."""
    if weight.is_base() and weight.moved(stated.change) < MOVED:
        return True
    test = weight.test(stated.change, stated.dtype, stated.whole)
    if test.holds or explained(weight, stated):
        return test.agree >= NEAR or _is_whole(weight, stated.change, test)
    return stated.by_factors and _has_factors(weight, stated)


def _is_whole(weight: Weight, expected: Expected, test: Test) -> bool:
    """Whether a change is there once, where single entries are too small to tell: no other multiple explains more of them."""
    fit = weight.fit({"it": expected})
    if fit is None or abs(fit.coefficients["it"] - 1) <= max(ALIKE, SURE * fit.errors["it"]):
        return True
    own = weight.test(_combined(fit.coefficients, {"it": expected}))
    entries = weight.n_rows * weight.columns
    return (own.agree - test.agree) * entries <= max(BETTER * entries, BETTER_LEAST)


def _has_factors(weight: Weight, stated: Stated) -> bool:
    """Whether a weight is a sum of base and updates with a recipe's factors, as near as a tool knows them.

    A tool that works in the written type rounds the inner products that give the factors; those of the models may be off by as
    much. What multiplies the base is 1 less a share, or a share of each, and not off but by its own rounding.
    """
    base = weight.base
    if base is None or weight.written is None:
        return False
    terms = {"base": lambda rows: base[rows].double(), **weight.terms}
    own, wanted = weight.fit(terms), weight.fit(terms, of=stated.change)
    if own is None or wanted is None:
        return False
    unit = max(unit_of(stated.dtype or weight.dtype), weight.unit)
    for name, value in own.coefficients.items():
        allowed = unit * (TWICE if name == "base" else FACTOR)
        if abs(value - wanted.coefficients[name]) > allowed + SURE * own.errors[name]:
            return False
    return weight.test(_combined(own.coefficients, terms), stated.dtype, whole=True).holds


def _sum(weight: Weight, common: Common, about: dict[str, Any]) -> Judged | None:
    """A sum of the updates: with the common coefficients, or with its own where these are better."""
    shared = {label: common.coefficients[label] for label in weight.terms if label in common.coefficients}
    known = weight.test(weight.total(shared)) if len(shared) == len(weight.terms) else None
    if known is not None and known.holds and known.agree >= NEAR:
        return _named(weight, shared, known, about)
    fit = weight.fit()
    own = None if fit is None else weight.test(weight.total(fit.coefficients))
    if known is not None and known.holds and (own is None or fit is None or _as_good(known, shared, own, fit)):
        return _named(weight, shared, known, about)
    if fit is not None and own is not None and own.holds:
        return _named(weight, fit.coefficients, own, about, fit)
    return None


def _as_good(known: Test, shared: dict[str, float], own: Test, fit: Fit) -> bool:
    """Whether coefficients that explain a weight need no others: these are no better, or the same but for rounding."""
    near = max(SAME, *(abs(value) * SAME for value in shared.values()))
    same = all(abs(shared[name] - value) <= near for name, value in fit.coefficients.items())
    return same or known.agree + BETTER >= own.agree


def _named(
    weight: Weight, coefficients: dict[str, float], test: Test, about: dict[str, Any], fit: Fit | None = None
) -> Judged:
    """A sum by the name of the special case that it is."""
    values = list(coefficients.values())
    kind: Kind = "sum"
    ones = [value for value in values if abs(value) > 1e-3]
    if len(ones) == 1 and abs(ones[0] - 1) < 1e-3:
        kind = "source"
    elif len(values) > 1 and all(abs(value * len(values) - 1) < ALIKE / 2 for value in values):
        kind = "mean"
    errors = {} if fit is None else fit.errors
    return Judged(**about, kind=kind, coefficients=coefficients, errors=errors, worst=test.worst, left=test.left)


def _without_updates(weight: Weight, about: dict[str, Any]) -> Judged:
    """A weight that no source updates, and that is not the base's."""

    def nothing(rows: slice) -> torch.Tensor:
        return torch.zeros_like(weight.change(rows))

    test = weight.test(nothing)
    if (cause := _coarse(weight, nothing)) is not None:
        return Judged(**about, kind="base", cause="precision", detail={"dtype": cause}, worst=test.worst, left=1.0)
    return _damaged(weight, about, test)


def _other(weight: Weight, common: Common, about: dict[str, Any], promised: Sequence[Expected]) -> Judged:
    """What is neither a promised change nor a sum of the updates."""
    fit = weight.fit()
    tried = [common.coefficients, *([fit.coefficients] if fit else [])]
    for coefficients in tried:
        total = weight.total(coefficients)
        if (cause := _coarse(weight, total)) is not None:
            test = weight.test(total)
            named = _named(weight, {label: coefficients.get(label, 0.0) for label in weight.terms}, test, about)
            return Judged(**vars(named) | {"cause": "precision", "detail": {"dtype": cause}})
    for expected in promised:
        if (cause := _coarse(weight, expected)) is not None:
            return Judged(**about, kind="method", cause="precision", detail={"dtype": cause})
    if (found := _apart(weight, about)) is not None:
        return found
    if (detail := common.trims.of(weight)) is not None:
        scaled = weight.test(detail.pop("change"))
        return Judged(**about, kind="ties", worst=scaled.worst, left=scaled.left, detail=detail)
    if (found := _base_scaled(weight, about)) is not None:
        return found
    test = weight.test(weight.total(fit.coefficients if fit else {}))
    return _damaged(weight, about, test, fit)


def _coarse(weight: Weight, expected: Expected) -> str | None:
    """The coarser type through which a weight went: all its values are of it, and it explains the deviation."""
    if weight.written is None:
        return None
    for dtype in COARSE:
        if torch.finfo(dtype).bits >= torch.finfo(weight.dtype).bits:
            continue
        written = weight.written
        if torch.equal(written.to(dtype).to(written.dtype), written) and weight.test(expected, dtype).holds:
            return str(dtype).removeprefix("torch.")
    return None


def _apart(weight: Weight, about: dict[str, Any]) -> Judged | None:
    """A and B merged each by itself: the product of the sums has Bᵢ Aⱼ of every two sources."""
    pairs: dict[str, StoredLora] = {
        label: one for label, one in weight.slot.updates.items() if isinstance(one, StoredLora)
    }
    if len(pairs) < 2 or len(pairs) < len(weight.terms) or len({one.rank for one in pairs.values()}) > 1:
        return None
    terms: dict[str, Expected] = {}
    for one, other in itertools.product(pairs, repeat=2):
        terms[f"{one}·{other}"] = weight.crossed(one, other)
    fit = weight.fit(terms)
    if fit is None or not weight.test(_combined(fit.coefficients, terms)).holds:
        return None
    own = {label: fit.coefficients[f"{label}·{label}"] for label in pairs}
    cross = {
        name: value for name, value in fit.coefficients.items() if name.partition("·")[0] != name.partition("·")[2]
    }
    if max(map(abs, cross.values())) < ALIKE * max(map(abs, own.values())):
        return None
    return Judged(**about, kind="unexplained", coefficients=own, cause="apart", detail={"cross": cross})


def _base_scaled(weight: Weight, about: dict[str, Any]) -> Judged | None:
    """Sources and base weighed with factors whose sum is not 1."""
    base = weight.base
    if base is None or weight.written is None:
        return None
    terms = {"base": lambda rows: base[rows].double(), **weight.terms}
    fit = weight.fit(terms)
    if fit is None or not weight.test(_combined(fit.coefficients, terms)).holds:
        return None
    coefficients = {label: fit.coefficients[label] for label in weight.terms}
    detail = {"factor": 1 + fit.coefficients["base"]}
    if (place := _on_the_arc(weight, fit.coefficients)) is not None:
        return Judged(**about, kind="slerp", coefficients=coefficients, detail={"t": place})
    if abs(fit.coefficients["base"]) < SCALED:
        return None
    return Judged(**about, kind="sum", coefficients=coefficients, cause="base_scaled", detail=detail)


def _on_the_arc(weight: Weight, coefficients: Mapping[str, float]) -> float | None:
    """t of a slerp between the base and the only source, if the factors of both are those of one."""
    (label, *others) = weight.terms
    if others or weight.base is None:
        return None
    inner = first = second = 0.0
    for rows in weight.blocks():
        base = weight.base[rows].double()
        model = base + weight.terms[label](rows)
        inner, first = inner + float((base * model).sum()), first + float(base.square().sum())
        second += float(model.square().sum())
    angle = math.acos(max(-1.0, min(1.0, inner / math.sqrt(first * second or 1.0))))
    factor, sine = coefficients[label], math.sin(angle)
    if sine < SAME or not 0 <= factor * sine <= 1:
        return None
    t = math.asin(factor * sine) / angle
    wanted = math.sin((1 - t) * angle) / sine
    own = 1 + coefficients["base"] - factor
    return t if 0 <= t <= 1 and abs(own - wanted) < SCALED else None


def _combined(coefficients: Mapping[str, float], terms: Mapping[str, Expected]) -> Expected:
    def expected(rows: slice) -> torch.Tensor:
        return torch.stack([coefficients[name] * terms[name](rows) for name in terms]).sum(0)

    return expected


def _damaged(weight: Weight, about: dict[str, Any], test: Test, fit: Fit | None = None) -> Judged:
    """Unexplained, with the cause where its rows or its codes tell one."""
    found = Judged(
        **about,
        kind="unexplained",
        coefficients=fit.coefficients if fit else {},
        errors=fit.errors if fit else {},
        worst=test.worst,
        left=test.left,
    )
    base = weight.slot.base
    if isinstance(base, ScaledRef) and weight.written is not None and _is_unscaled(weight, base):
        return Judged(**vars(found) | {"cause": "scales"})
    rows = {} if weight.written is None or weight.base is None else moved_rows(weight.base, weight.written)
    if rows and (rows["rows"] or not weight.terms):
        return Judged(**vars(found) | {"cause": "rows", "detail": rows})
    return found


def _is_unscaled(weight: Weight, base: ScaledRef) -> bool:
    """Whether a weight is proportional to the base's codes in their scales' stead: codes that were not multiplied."""
    assert weight.written is not None and weight.base is not None and base.codes is not None
    size = torch.finfo(base.codes.dtype).max
    written = weight.written.float()
    if float(written.abs().max()) > size or not torch.equal(written.to(base.codes.dtype).float(), written):
        return False
    same_sign = (written.sign() == weight.base.float().sign()).float().mean()
    return bool(same_sign > NEAR)


def moved_rows(base: torch.Tensor, written: torch.Tensor) -> dict[str, Any]:
    """How the rows of a table are the base's: by how many places most that differ are shifted, or how many were overwritten.

    Empty where the rows that both have are the same, or all are others.
    """
    base, height = base.to(written.dtype), min(len(base), len(written))
    if height < 4 or written.dim() != 2 or written.shape[1] < 2:
        return {}
    apart = (base[:height] != written[:height]).any(1).nonzero().flatten().tolist()
    places = {_key(row): index for index, row in enumerate(base)} if apart else {}
    offsets: Counter[int] = Counter()
    for index in apart:
        place = places.get(_key(written[index]))
        if place is not None:
            offsets[index - place] += 1
    if not offsets and not 0 < len(apart) < height:
        return {}
    shift, rows = offsets.most_common(1)[0] if offsets else (0, 0)
    return {"shift": shift, "rows": rows, "apart": len(apart), "of": len(written), "first": apart[0]}


def _key(row: torch.Tensor) -> bytes:
    return hashlib.blake2b(row.contiguous().view(torch.uint8).numpy().tobytes(), digest_size=8).digest()

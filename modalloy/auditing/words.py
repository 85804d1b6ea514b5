"""From what every weight is to what is wrong, in words: known faults of merging tools by their name."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

from modalloy.auditing.found import Coefficient, Finding
from modalloy.auditing.headers import listed
from modalloy.auditing.judge import ALIKE, SURE, Judged

MOST = 0.5  # share of weights from which something is said of the whole, not of single weights
FEW = 0.25  # share of weights with coefficients of their own up to which they stand out
SUMS = ("sum", "mean", "source")
UNTOLD = "cannot_tell"  # code of a finding
NONE = 1e-3  # of a coefficient that counts as 0


def coefficients(judged: Sequence[Judged], common: Mapping[str, float]) -> tuple[Coefficient, ...]:
    """What multiplies each source over the weights that are sums of updates."""
    found = []
    for label, value in common.items():
        own = [one.coefficients[label] for one in judged if one.kind in SUMS and label in one.coefficients]
        if own:
            found.append(Coefficient(label, value, min(own), max(own), len(own)))
    return tuple(found)


def findings(
    judged: Sequence[Judged], common: Mapping[str, float], wanted: Mapping[str, float] | None, has_recipe: bool
) -> list[Finding]:
    """What is wrong with the weights. `wanted`: the coefficients that they must have, if these are known."""
    found = list(_damage(judged))
    if has_recipe:
        found += _against_recipe(judged)
    else:
        found += _missing(judged, common, wanted)
        found += _standing_out(judged, common) if wanted is None else _against_wanted(judged, wanted)
    return [*found, *_unexplained(judged, is_open=wanted is None and not has_recipe), *_untold(judged)]


def _damage(judged: Sequence[Judged]) -> Iterator[Finding]:
    """Faults that the weights themselves tell, whatever was to be merged."""
    by: dict[str, list[Judged]] = defaultdict(list)
    for one in judged:
        if one.cause:
            by[one.cause].append(one)
    if some := by["not_finite"]:
        yield _fault("not_finite", f"{len(some)} weights hold NaN or infinite values: {_names(some)}", some)
    coarse: dict[str, list[Judged]] = defaultdict(list)
    for one in by["precision"]:
        coarse[one.detail["dtype"]].append(one)
    for dtype, some in coarse.items():
        yield _fault(
            "precision",
            f"{len(some)} weights went through {dtype}: their values are of that type only, though they are stored in a wider "
            f"one, and their lower digits are lost: {_names(some)}; merge again in the type that is written",
            some,
        )
    if some := by["apart"]:
        yield _fault(
            "merged_apart",
            f"{len(some)} weights hold products of one source's B with another's A: A and B were merged each by itself, and the "
            f"product of two sums is not the sum of the products ({_names(some)}); merge the products, as PEFT's "
            'combination_type "svd" or "cat" do, not "linear"',
            some,
        )
    if some := by["scales"]:
        yield _fault(
            "scales_lost",
            f"{len(some)} weights are the base's FP8 codes as plain numbers: their scales were lost ({_names(some)})",
            some,
        )
    for one in by["rows"]:
        shift, rows, apart, of = (one.detail[key] for key in ("shift", "rows", "apart", "of"))
        first = one.detail["first"]
        if shift:
            way = "down" if shift > 0 else "up"
            text = f"{rows} of its {of} rows are the base's rows shifted {way} by {abs(shift)}, from row {first} on"
            text += ": every such token has another's vector; take the tokenizer and the table of one model"
            yield _fault("rows_shifted", f"{one.name}: {text}", [one])
        elif rows:
            yield _fault(
                "rows_shifted", f"{one.name}: {rows} of its {of} rows hold the base's row of another place", [one]
            )
        else:
            text = f"{apart} of its {of} rows are not the base's, from row {first} on, and no source says so"
            yield _fault("rows_overwritten", f"{one.name}: {text}", [one])
    if some := by["base_scaled"]:
        factors = [one.detail["factor"] for one in some]
        yield _fault(
            "base_scaled",
            f"{len(some)} weights hold the base {_span(factors)} times: the factors of base and models do not sum to 1 "
            f"({_names(some)}); normalise them",
            some,
        )


def _missing(
    judged: Sequence[Judged], common: Mapping[str, float], wanted: Mapping[str, float] | None
) -> Iterator[Finding]:
    """Sources that did not reach some weights, or none."""
    expected = common if wanted is None else wanted
    updated = [one for one in judged if one.has_updates]
    for label in dict.fromkeys(label for one in updated for label in one.coefficients):
        own = [one for one in updated if label in one.coefficients and one.kind in ("base", *SUMS) and not one.cause]
        gone = [one for one in own if _is_absent(one, label)]
        reached = [one for one in own if one not in gone and one.kind != "base"]
        if not gone or (wanted is not None and abs(wanted.get(label, 0.0)) < NONE):
            continue
        if reached or abs(expected.get(label, 0.0)) > NONE:
            what = "was not applied at all" if not reached else f"is missing in {len(gone)} of the {len(own)} weights"
            yield _fault("not_applied", f"{label} {what} that it updates: {_names(gone)}", gone)


def _is_absent(one: Judged, label: str) -> bool:
    """Whether a source's update is not in a weight in which it would show."""
    if one.kind == "base":
        return one.moved > 0
    others = max((abs(value) for name, value in one.coefficients.items() if name != label), default=0.0)
    least = max(NONE, SURE * one.errors.get(label, 0.0))
    return others > NONE and bool(one.errors) and abs(one.coefficients[label]) < least


def _against_wanted(judged: Sequence[Judged], wanted: Mapping[str, float]) -> Iterator[Finding]:
    """Coefficients that are not those that were given, by what they are instead."""
    by: dict[tuple[str, str], list[tuple[Judged, float]]] = defaultdict(list)
    for one in judged:
        if one.kind not in SUMS or not one.has_updates:
            continue
        for label, value in one.coefficients.items():
            if _is_absent(one, label):
                continue
            if not _alike(value, wanted.get(label, 0.0), one.errors.get(label, 0.0)):
                by[label, relation(one, label, wanted.get(label, 0.0))].append((one, value))
    for (label, words), pairs in by.items():
        some, values = [one for one, _ in pairs], [value for _, value in pairs]
        what = f": {words}" if words else ""
        code = "scale" if words else "coefficient"
        count = f"{len(some)} of {sum(one.has_updates for one in judged)} weights"
        yield _fault(
            code,
            f"{label} is in {count} {_span(values)} times, not {wanted.get(label, 0.0):g}{what} ({_names(some)})",
            some,
        )


def relation(one: Judged, label: str, wanted: float) -> str:
    """What a wrong coefficient of an adapter comes from, "" if that is not known."""
    if label not in one.scales or not wanted:
        return ""
    ratio, rank, scale = one.coefficients[label] / wanted, one.ranks[label], one.scales[label]
    error = one.errors.get(label, 0.0) / abs(wanted)
    root = math.sqrt(rank)
    known = [
        (root, f"√r for r = {rank}, as rsLoRA's α/√r where the adapter's config says α/r"),
        (1 / root, f"1/√r for r = {rank}, as α/r where the adapter's config says rsLoRA's α/√r"),
        (scale, f"its scale {scale:g} (α/r or α/√r) was applied twice"),
        (1 / scale, f"its scale {scale:g} (α/r or α/√r) was left out"),
        (2.0, "it was added twice"),
        (-1.0, "it was subtracted"),
        (float(rank), f"r = {rank}: α was not divided by r"),
        (1.0 / rank, f"1/r for r = {rank}: α was divided by r twice"),
    ]
    words = [text for value, text in known if abs(value - 1) > ALIKE and _alike(ratio, value, error)]
    return ", or ".join(words[:3])


def _standing_out(judged: Sequence[Judged], common: Mapping[str, float]) -> Iterator[Finding]:
    """Weights whose coefficients are not the common ones, where none were given."""
    sums = [one for one in judged if one.kind in SUMS and one.has_updates and one.coefficients]
    odd = []
    for one in sums:
        far = [
            label
            for label, value in one.coefficients.items()
            if label in common
            and not _is_absent(one, label)
            and not _alike(value, common[label], one.errors.get(label, 0))
        ]
        if far:
            odd.append(one)
    if not odd:
        return
    text = "; ".join(
        f"{label} {_span([one.coefficients[label] for one in odd if label in one.coefficients])}, else {value:.4g}"
        for label, value in common.items()
    )
    if len(odd) > FEW * len(sums):
        yield Finding(
            "note", "coefficients_vary", f"coefficients are not the same in all weights ({text})", _tuple(odd)
        )
        return
    words = Counter(relation(one, label, common[label]) for one in odd for label in one.coefficients if label in common)
    words.pop("", None)
    why = f": {words.most_common(1)[0][0]}" if words else ""
    yield _fault(
        "coefficient",
        f"{len(odd)} of {len(sums)} weights stand out by their coefficients ({text}){why}: {_names(odd)}",
        odd,
    )


def _against_recipe(judged: Sequence[Judged]) -> Iterator[Finding]:
    """Weights that are something else than the recipe gives."""
    by: dict[str, list[Judged]] = defaultdict(list)
    for one in judged:
        if (one.kind in (*SUMS, "slerp", "ties") and one.has_updates and not one.cause) or one.moved:
            by[one.kind].append(one)
    for kind, some in by.items():
        if kind == "ties":
            what = f"a TIES of the updates with density {some[0].detail['density']:g}"
        elif kind == "base":
            what = "the base's"
        else:
            labels = dict.fromkeys(label for one in some for label in one.coefficients)
            spans = (
                f"{_span([one.coefficients[label] for one in some if label in one.coefficients])} × {label}"
                for label in labels
            )
            what = f"base + {' + '.join(spans)}"
        yield _fault(
            "not_the_recipe", f"{len(some)} weights are {what}, not what the recipe gives: {_names(some)}", some
        )


def _unexplained(judged: Sequence[Judged], is_open: bool) -> Iterator[Finding]:
    """Weights that nothing explains; where most are, it is the base that is another, or, if `is_open`, the method.

    `is_open`: nobody said what the weights must be, so that they may be right by a method that is not looked for.
    """
    some = [one for one in judged if one.kind == "unexplained" and not one.cause]
    if not some:
        return
    bare = [one for one in judged if not one.has_updates]
    strange = [one for one in bare if one.kind == "unexplained" and not one.cause]
    if len(strange) > MOST * len(bare) and len(strange) > 1:
        yield _fault(
            "another_base",
            f"{len(strange)} of the {len(bare)} weights that no source updates are not the base's, as of a model that was merged "
            f"from another base: {_names(strange)}; give that base, or the source that changed them",
            strange,
        )
        some = [one for one in some if one.has_updates]
    of_sums = sum(one.kind in (*SUMS, "slerp") and one.has_updates for one in judged)
    if is_open and of_sums < len([one for one in some if one.has_updates]):
        some, other = [one for one in some if not one.has_updates], [one for one in some if one.has_updates]
        if other:
            yield Finding(
                "note",
                UNTOLD,
                f"{len(other)} weights are no sum, mean, slerp or TIES of base and sources: of their change "
                f"{_percent([one.left for one in other])} remains after the best sum, so that they are another method's, or wrong: "
                f"{_names(other)}; give --method or --recipe",
                _tuple(other),
            )
    if some:
        left = [one.left for one in some]
        yield _fault(
            "unexplained",
            f"{len(some)} weights are no sum, mean or TIES of base and sources: of their change {_percent(left)} remains after "
            f"the best sum: {_names(some)}",
            some,
        )


def _untold(judged: Sequence[Judged]) -> Iterator[Finding]:
    """Weights of which it cannot be worked out what the recipe gives, by the reason."""
    by: dict[str, list[Judged]] = defaultdict(list)
    for one in judged:
        if one.kind == "untold":
            by[one.detail["why"]].append(one)
    for why, some in by.items():
        yield Finding("note", UNTOLD, f"{len(some)} weights cannot be told: {why}: {_names(some)}", _tuple(some))


def _alike(value: float, wanted: float, error: float) -> bool:
    return abs(value - wanted) <= max(ALIKE * abs(wanted), SURE * error, NONE)


def _fault(code: str, message: str, some: Sequence[Judged]) -> Finding:
    return Finding("fault", code, message, _tuple(some))


def _tuple(some: Sequence[Judged]) -> tuple[str, ...]:
    return tuple(one.name for one in some)


def _names(some: Sequence[Judged]) -> str:
    return listed([one.name for one in some])


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.3g}" if _alike(high, low, 0.0) else f"{low:.3g} to {high:.3g}"


def _percent(shares: Sequence[float]) -> str:
    low, high = min(shares), max(shares)
    return f"{high:.1%}" if high - low < 1e-3 else f"{low:.1%} to {high:.1%}"

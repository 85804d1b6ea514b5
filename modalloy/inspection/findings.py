"""What a person should know of a merge, in words."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence

from modalloy.inspection.figures import DENSE_LIMIT, Finding, SpecialistFacts, WeightFigures, norms_of

DOMINANT_RATIO = 5.0  # A and B weigh updates by their squared norm, so 5 times the norm is 25 times the say
DUPLICATE_COSINE = 0.99  # independent runs from one base are nearly orthogonal; this is one run, or a copy of it
OPPOSED_COSINE = -0.5  # two updates of equal norm then cancel half of their energy or more when they are added
LOST_ENERGY = 0.5  # the merge then drops more of a specialist than it keeps
UNEVEN_RATIO = (
    10.0  # layers of one kind share shape, initialisation and learning rate; a run rarely spreads them so far
)
UNEVEN_MIN_LAYERS = 3  # a median of fewer layers says nothing about an outlier


def findings(
    specialists: Sequence[SpecialistFacts], slots: Sequence[WeightFigures], *, projects: bool, balance: str = "none"
) -> list[Finding]:
    """What a person should know before trusting the merge, warnings first.

    `projects`: the method keeps k directions only; `balance`: what of the updates it brings to one norm first, if it does.
    """
    found = [*_unused(specialists, slots), *_uneven(slots), *_conflicts(slots)]
    for one in specialists:
        others = max((other.norm for other in specialists if other is not one), default=0.0)
        if others and one.norm > DOMINANT_RATIO * others and balance != "updates":
            decides = "the shared subspaces and the sum" if balance == "none" else "the sum"
            remedy = "lower its weight, raise the others'" + (", or set balance: updates" if projects else "")
            found.append(
                Finding(
                    "warning",
                    "dominates",
                    f"{one.label}: its update is {one.norm / others:.1f} times as large as the next ({one.norm:.3g} against "
                    f"{others:.3g}, over all weights), so that it decides {decides}; {remedy}",
                    (one.label,),
                )
            )
    if projects:
        found += _projection(specialists, slots)
    if omitted := [slot.name for slot in slots if slot.k is None]:
        found.append(
            Finding(
                "note",
                "spectra_omitted",
                f"spectra, overlaps and energies of {_count(omitted, slots)} were not computed: dense and larger than "
                f"{DENSE_LIMIT}; norms, cosines and signs were",
                slots=tuple(omitted),
            )
        )
    return sorted(found, key=lambda finding: finding.level != "warning")


def _unused(specialists: Sequence[SpecialistFacts], slots: Sequence[WeightFigures]) -> list[Finding]:
    """Updates that are zero or absent: they count in λ = 1/n all the same."""
    found, norms = [], norms_of(slots)
    for label in (one.label for one in specialists):
        if zero := [name for name, norm in norms[label].items() if norm == 0]:
            text = f"{label}: its update of {_count(zero, slots)} is zero: untrained (B = 0), or its weight is 0"
            found.append(Finding("warning", "zero_update", text, (label,), tuple(zero)))
        if absent := [slot.name for slot in slots if slot.name not in norms[label]]:
            text = f"{label}: has no update of {_count(absent, slots)} that others update; it counts there as zero"
            found.append(Finding("note", "no_update", text, (label,), tuple(absent)))
    return found


def _uneven(slots: Sequence[WeightFigures]) -> list[Finding]:
    """Layers whose update is far from the usual size of their kind."""
    found = []
    kinds: dict[str, list[WeightFigures]] = defaultdict(list)
    for slot in slots:
        kinds[slot.module].append(slot)
    for label, norms in norms_of(slots).items():
        ratios: dict[str, float] = {}
        for kind in kinds.values():
            sizes = {slot.name: norms[slot.name] for slot in kind if norms.get(slot.name)}
            if len(sizes) >= UNEVEN_MIN_LAYERS:
                usual = statistics.median(sizes.values())
                ratios |= {name: max(size / usual, usual / size) for name, size in sizes.items()}
        if far := sorted((name for name in ratios if ratios[name] > UNEVEN_RATIO), key=lambda name: -ratios[name]):
            text = (
                f"{label}: its update of {_count(far, slots)} is more than {UNEVEN_RATIO:g} times larger or smaller than the "
                f"median of its kind, at worst {ratios[far[0]]:.0f} times ({far[0]}); was it trained to the end?"
            )
            found.append(Finding("warning", "uneven_layers", text, (label,), tuple(far)))
    return found


def _conflicts(slots: Sequence[WeightFigures]) -> list[Finding]:
    """Pairs that are copies of each other, or that point in opposite directions."""
    cosines: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for slot in slots:
        for pair in slot.pairs:
            if pair.cosine is not None:
                cosines[pair.specialists][slot.name] = pair.cosine
    found = []
    for labels, by_slot in cosines.items():
        both = " and ".join(labels)
        if same := sorted((n for n, c in by_slot.items() if c > DUPLICATE_COSINE), key=lambda n: -by_slot[n]):
            text = (
                f"{both}: their updates of {_count(same, slots)} are nearly the same (cosine above {DUPLICATE_COSINE:g}), "
                "so that they count twice; is one a copy of the other?"
            )
            found.append(Finding("warning", "near_duplicate", text, labels, tuple(same)))
        if opposed := sorted((n for n, c in by_slot.items() if c < OPPOSED_COSINE), key=lambda n: by_slot[n]):
            text = (
                f"{both}: their updates of {_count(opposed, slots)} point in opposite directions (cosine below "
                f"{OPPOSED_COSINE:g}, at worst {by_slot[opposed[0]]:.2f}); added, they cancel each other"
            )
            found.append(Finding("warning", "opposed", text, labels, tuple(opposed)))
    return found


def _projection(specialists: Sequence[SpecialistFacts], slots: Sequence[WeightFigures]) -> list[Finding]:
    """What SSAM's k does to each specialist."""
    found = []
    for label in (one.label for one in specialists):
        kept = {s.name: u.kept for s in slots for u in s.updates if u.specialist == label and u.kept is not None}
        if lost := sorted((name for name in kept if kept[name] < LOST_ENERGY), key=lambda name: kept[name]):
            text = (
                f"{label}: k keeps less than {LOST_ENERGY:.0%} of its energy in {_count(lost, slots)}, at worst "
                f"{kept[lost[0]]:.0%} ({lost[0]}); raise rank, or its weight"
            )
            found.append(Finding("warning", "k_loses", text, (label,), tuple(lost)))
    if all_kept := [s.name for s in slots if s.k is not None and _holds_all(s)]:
        text = (
            f"k is at least the sum of the ranks in {_count(all_kept, slots)}: nothing is projected away there, and ssam only "
            "adds and scales"
        )
        found.append(Finding("note", "k_keeps_all", text, slots=tuple(all_kept)))
    return found


def _holds_all(slot: WeightFigures) -> bool:
    ranks = [update.rank for update in slot.updates]
    stacked = sum(rank for rank in ranks if rank is not None) if None not in ranks else max(slot.shape)
    return slot.k is not None and slot.k >= min(stacked, max(slot.shape))


def _count(names: Sequence[str], slots: Sequence[WeightFigures]) -> str:
    return f"{len(names)} of {len(slots)} weights"

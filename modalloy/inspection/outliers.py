"""Updates that are unlike the rest of their own model: a scan before merging.

It finds what is concentrated: one weight, or one direction of a few weights, that holds most of an update; an update that is in
embeddings or head alone; a model whose update is far smaller than the others'. Such is what an edit of single facts, a broken
training run, or a clumsy backdoor looks like. A backdoor that is spread over all weights, or was made to survive merging, looks
like any training: that nothing is found does not exclude it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from modalloy.inspection.figures import Finding, SpecialistFacts, WeightFigures, norms_of
from modalloy.planning.kinds import is_of_tokens
from modalloy.planning.plan import Plan
from modalloy.storage.tensors import TensorRef

HALF = 0.5  # of an update's energy, in one weight
LEAST_WEIGHTS = 8  # fewer hold large shares each
FAINT_RATIO = 5.0  # times smaller than the next: 1/25 of its energy
SHARP, BLUNT = 0.9, 0.5  # shares of a weight's energy in its first direction: of one that stands out, of the median
FEW = 0.25  # of a model's weights, that may stand out


def outliers(specialists: Sequence[SpecialistFacts], slots: Sequence[WeightFigures]) -> list[Finding]:
    """What is concentrated in single weights or directions, and models that are far smaller than the rest."""
    found, norms = [], norms_of(slots)
    for one in specialists:
        energies = {name: norm**2 for name, norm in norms[one.label].items() if norm}
        total = sum(energies.values())
        if len(energies) >= LEAST_WEIGHTS:
            name = max(energies, key=lambda weight: energies[weight])
            if energies[name] > HALF * total:
                found.append(
                    Finding(
                        "warning",
                        "single_weight",
                        f"{one.label}: {energies[name] / total:.0%} of its update's energy is in one weight of {len(energies)} "
                        f"({name}), as of an edit and not of a training; look at where it comes from",
                        (one.label,),
                        (name,),
                    )
                )
        found += _sharp(one.label, slots)
    return [*found, *_faint(specialists)]


def only_tokens(planned: Plan, slots: Sequence[WeightFigures], read: Callable[[TensorRef], Tensor]) -> list[Finding]:
    """Models that change embeddings or head and no weight that is merged."""
    found, norms = [], norms_of(slots)
    for model in planned.models:
        if any(norms[model.label].values()):
            continue
        if changed := sorted(
            name for name in model.tuned if is_of_tokens(name) and _differs(name, model.tuned, planned, read)
        ):
            text = (
                f"{model.label}: its update is in embeddings or head only ({', '.join(changed)}), which a merge keeps as the "
                "base has them: nothing of it is merged"
            )
            found.append(Finding("warning", "only_tokens", text, (model.label,), tuple(changed)))
    return found


def _differs(name: str, tuned: Mapping[str, TensorRef], planned: Plan, read: Callable[[TensorRef], Tensor]) -> bool:
    """Whether a tuned table is not the base's."""
    own, base = tuned[name], planned.target.refs.get(name)
    return base is None or own.shape != base.shape or not bool((read(own) == read(base)).all())


def _sharp(label: str, slots: Sequence[WeightFigures]) -> list[Finding]:
    """Few weights of which one direction holds nearly all, where most are broad."""
    shares = {
        slot.name: 1 / update.stable_rank
        for slot in slots
        for update in slot.updates
        if update.specialist == label and update.stable_rank
    }
    if len(shares) < LEAST_WEIGHTS or statistics.median(shares.values()) > BLUNT:
        return []
    sharp = sorted((name for name, share in shares.items() if share > SHARP), key=lambda name: -shares[name])
    if not sharp or len(sharp) > FEW * len(shares):
        return []
    text = (
        f"{label}: in {len(sharp)} of {len(shares)} weights one direction holds more than {SHARP:.0%} of its update (at worst "
        f"{shares[sharp[0]]:.0%}, {sharp[0]}), against {statistics.median(shares.values()):.0%} in most, as of an edit of single "
        "facts"
    )
    return [Finding("warning", "single_direction", text, (label,), tuple(sharp))]


def _faint(specialists: Sequence[SpecialistFacts]) -> list[Finding]:
    """A model whose update is far smaller than every other's, and not zero."""
    found = []
    for one in specialists:
        others = min((other.norm for other in specialists if other is not one and other.norm), default=0.0)
        if len(specialists) > 2 and 0 < one.norm * FAINT_RATIO < others:
            text = (
                f"{one.label}: its update is {others / one.norm:.1f} times smaller than the next ({one.norm:.3g} against "
                f"{others:.3g}, over all weights): the merge has little of it; raise its weight"
            )
            found.append(Finding("note", "faint", text, (one.label,)))
    return found

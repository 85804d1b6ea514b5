"""Which method, λ and k the figures speak for, why, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence

from modalloy.inspection.figures import Advice, WeightFigures, median

SHARED, APART = 0.3, 0.05  # cosines between which nothing was measured
KEPT = 0.9  # of a specialist's energy


def advise(slots: Sequence[WeightFigures]) -> Advice | None:
    """Advice for updates of these figures; None where there is but one specialist, or nothing could be compared.

    The medians are over all weights and pairs. Updates of cosine ≥ 0.3 share what they hold: a sum counts it once for each
    specialist (on the built-in specialists, of cosine 0.98, task arithmetic loses 13.9 points to SSAM; `docs/results/senses.md`).
    Updates of |cosine| ≤ 0.05 have nothing in common: λ = 1/n leaves each of them 1/n of what it learned. (An earlier set of
    specialists, of cosine 0: at λ = 1/n a skill fell from an AUC of 0.82 to 0.73; summed, single senses lost 5 points.)
    """
    cosine = median(pair.cosine for slot in slots for pair in slot.pairs)
    if cosine is None:
        return None
    n = max(len(slot.updates) for slot in slots)
    kept = median(update.kept for slot in slots for update in slot.updates)
    told = f"the median cosine of two updates is {cosine:+.2f}"
    if cosine >= SHARED:
        method, scale = "average, ssam or ties", f"λ = 1/{n}"
        why = (
            f"{told}, so that what is added up (task_arithmetic, wudi, tsv with λ = 1) counts what they share {n} times"
        )
    elif abs(cosine) <= APART:
        method, scale = "ssam, average or tsv", f"λ between 1/{n} and 1, to be searched"
        why = (
            f"{told}: they are as good as orthogonal, so that λ = 1/{n} leaves each 1/{n} of what it learned, and a larger λ "
            "more of it, and more of what is noise to the others"
        )
    else:
        method, scale = "ssam, ties or average", f"λ from 1/{n} upwards"
        why = f"{told}, between those that were measured here"
    if kept is None:
        return Advice(method, scale, "k as it is", (why, "what k keeps was not computed"))
    rank = "k as it is" if kept >= KEPT else "a larger k"
    return Advice(method, scale, rank, (why, f"k keeps {kept:.0%} of an update's energy in the median"))

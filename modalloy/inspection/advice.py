"""Which method, λ and k the figures speak for, why, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence

from modalloy.inspection.figures import Advice, WeightFigures, median

SHARED = 0.3  # cosine from which updates hold much the same
KEPT = 0.9  # of a specialist's energy


def advise(slots: Sequence[WeightFigures]) -> Advice | None:
    """Advice for updates of these figures; None where there is but one specialist, or nothing could be compared.

    The medians are over all weights and pairs. Updates of cosine ≥ 0.3 share what they hold: a sum counts it once for each
    specialist (on the built-in specialists, of cosine 0.98, task arithmetic loses 13.9 points to SSAM; `docs/results/senses.md`).
    Below, λ = 1/n thins what each learned: of twelve pairs of specialists of cosine 0.02 to 0.41 that were trained to tell
    (`docs/results/factorial.md`), averaging was behind TSV in four of the six that were trained long and behind SSAM with norms
    matched in two, and ahead of neither anywhere; of the six trained briefly no method was ahead of it.
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
    else:
        method, scale = "tsv, or ssam with match: norm", "λ at the method's default"
        why = (
            f"{told}, so that an average (λ = 1/{n}) thins what each learned: these two were ahead of it where specialists had "
            "trained long, and behind it nowhere"
        )
    if kept is None:
        return Advice(method, scale, "k as it is", (why, "what k keeps was not computed"))
    rank = "k as it is" if kept >= KEPT else "a larger k"
    return Advice(method, scale, rank, (why, f"k keeps {kept:.0%} of an update's energy in the median"))

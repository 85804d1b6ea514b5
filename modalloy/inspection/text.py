"""An inspection as tables for a terminal."""

import statistics
from collections.abc import Iterable

from modalloy.inspection.figures import Inspection, median
from modalloy.report.text import aligned, printable_lines

Table = tuple[list[str], list[list[str]]]


def tables(inspection: Inspection) -> list[Table]:
    """Medians over the layers for every kind of weight: one table of the updates, one of the pairs."""
    updates, pairs = [], []
    for module, name in inspection.modules.items():
        slots = [slot for slot in inspection.slots if slot.module == module]
        ks = sorted({slot.k for slot in slots if slot.k is not None})
        k = "–" if not ks else f"{ks[0]}" if len(ks) == 1 else f"{ks[0]}–{ks[-1]}"
        for one in inspection.specialists:
            own = [u for slot in slots for u in slot.updates if u.specialist == one.label]
            if own:
                norms = [u.norm for u in own]
                columns = [_median([u.stable_rank for u in own]), _median([u.effective_rank for u in own])]
                kept = _median([u.kept for u in own], ".1%")
                size = f"{statistics.median(norms):.3g} ({min(norms):.3g}–{max(norms):.3g})"
                updates.append([name, one.label, str(len(own)), size, *columns, k, kept])
        for labels in dict.fromkeys(pair.specialists for slot in slots for pair in slot.pairs):
            both = [pair for slot in slots for pair in slot.pairs if pair.specialists == labels]
            overlaps = [
                f"{_median([p.left_overlap for p in both], '.2f')} ({_median([p.left_chance for p in both], '.2f')})",
                f"{_median([p.right_overlap for p in both], '.2f')} ({_median([p.right_chance for p in both], '.2f')})",
            ]
            signs = _median([p.sign_conflict for p in both], ".1%")
            pairs.append([name, " · ".join(labels), _median([p.cosine for p in both], "+.3f"), *overlaps, signs])
    result: list[Table] = [
        (["weight", "specialist", "layers", "norm (range)", "stable rank", "effective rank", "k", "kept at k"], updates)
    ]
    if pairs:
        head = ["weight", "pair", "cosine", "left overlap (chance)", "right overlap (chance)", "sign conflict"]
        result.append((head, pairs))
    return result


def text(inspection: Inspection, *, with_tables: bool = True) -> str:
    """The inspection as lines for a terminal: tables of medians over the layers, the findings, the verdict."""
    lines = []
    for head, rows in tables(inspection) if with_tables else []:
        lines += [*aligned([head, *rows]), ""]
    lines += [f"{finding.level:8} {finding.message}" for finding in inspection.findings]
    advice = inspection.advice
    lines += [f"advice   {advice.line}"] if advice else []
    return printable_lines([*lines, f"verdict  {inspection.verdict}"])


def _median(values: Iterable[float | None], form: str = ".3g") -> str:
    middle = median(values)
    return "–" if middle is None else format(middle, form)

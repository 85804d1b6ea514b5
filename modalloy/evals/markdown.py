"""A run's scores, and a comparison of two, as Markdown and CSV."""

import csv as csv_module
import io
from collections.abc import Sequence
from typing import Any

from modalloy.evals.compare import Comparison, Paired, points
from modalloy.report.escape import csv_cell, markdown_text
from modalloy.report.text import printable

BASELINES = {
    "majority": "always the most frequent answer",
    "majority_by_kind": "the most frequent answer of each kind of question",
    "first_option": "always the first option",
    "chance": "chance",
}


def markdown(result: dict[str, Any]) -> str:
    """The scores of a run (`modalloy.evals.log.result`) as Markdown: by rule, blind answers, counts, groups."""
    what = " · ".join(
        str(part) for part in (result["task"], result["variant"], modalities_text(result["modalities"])) if part
    )
    parts = [f"# {markdown_text(what)}", counts(result), _rows(*score_table(result))]
    parts.append("Blind answers: " + "; ".join(f"{name} {percent(acc)}" for name, acc in baselines_of(result)) + ".")
    for key, (head, rows) in group_tables(result).items():
        parts.append(f"## {markdown_text(key)}\n\n{_rows(head, rows)}")
    return "\n\n".join(parts) + "\n"


def csv(result: dict[str, Any]) -> str:
    """The scores of a run as CSV: one row per rule and group, the whole first (its `group` and `value` are empty)."""
    names = ("task", "variant", "modalities", "rule", "group", "value", "n", "acc", "ci95_low", "ci95_high")
    text = io.StringIO()
    writer = csv_module.writer(text, lineterminator="\n")
    writer.writerow((*names, "ci95_clustered_low", "ci95_clustered_high"))
    run = (result["task"], result["variant"] or "", modalities_text(result["modalities"]))
    for rule, scores in result["protocol"].items():
        cells = [("", "", {**scores, "n": result["n"]})]
        cells += [(key, value, cell) for key, values in scores["groups"].items() for value, cell in values.items()]
        for key, value, cell in cells:
            intervals = (*cell["ci95"], *(cell["ci95_clustered"] or ("", "")))
            texts = map(csv_cell, (*run, rule, key, value))
            writer.writerow((*texts, cell["n"], cell["acc"], *intervals))
    return text.getvalue()


def comparison(found: Comparison) -> str:
    """A comparison as Markdown that also reads well in a terminal: by rule and by group, each with its verdict."""
    lines = [f"# {markdown_text(found.task)}: A against B", ""]
    lines += [f"- {name}: {markdown_text(printable(run))}" for name, run in (("A", found.a), ("B", found.b))]
    if found.modalities[0] != found.modalities[1]:
        shown = [modalities_text(modalities) or "all" for modalities in found.modalities]
        lines.append(markdown_text(f"- A was shown {shown[0]}, B {shown[1]}"))
    lines.append(f"- {found.n:,} questions that both were asked")
    for name, number in zip("AB", found.left_out, strict=True):
        if number:
            lines.append(f"- left out: {number:,} questions that only {name} was asked")
    for name, number in zip("AB", found.unanswered, strict=True):
        if number:
            lines.append(
                f"- {name} could not be asked {number:,} of them (media, length, memory), or has no answer; these count as wrong"
            )
    head = ["", "n", "A", "B", "B − A", "95 %", "only A", "only B", "p", "verdict"]
    for rule, whole in found.rules.items():
        rows = [_paired("all", whole)]
        for key, values in found.groups[rule].items():
            rows += [_paired(f"{key}: {value}", one) for value, one in values.items()]
        lines += ["", f"## {markdown_text(rule)}", "", f"{whole.verdict}.", "", _rows(head, rows)]
    if any(any(keys.values()) for keys in found.groups.values()):
        lines += ["", "p: exact McNemar test; of groups, raised (Holm) for the number of groups of that kind."]
    if clusters := next(iter(found.rules.values())).n_clusters:
        lines += ["", f"95 %: bootstrap that draws the {clusters:,} clusters, and what is in them."]
    return "\n".join(lines) + "\n"


def _paired(name: str, one: Paired) -> list[str]:
    winner = "B" if one.difference > 0 else "A"
    low, high = one.ci95
    return [
        name,
        str(one.n),
        percent(one.acc_a),
        percent(one.acc_b),
        points(one.difference),
        f"{points(low)} to {points(high)}",
        str(one.only_a),
        str(one.only_b),
        f"{one.p_adjusted:.3f}",
        f"{winner} is better" if one.real else "cannot be told apart",
    ]


def _rows(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns are aligned."""
    cells = [[markdown_text(cell) for cell in row] for row in (head, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def interval_text(bounds: Sequence[float] | None) -> str:
    return "–" if bounds is None else f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f}"


def modalities_text(modalities: Sequence[str] | None) -> str:
    return "+".join(modalities or ())


def counts(result: dict[str, Any]) -> str:
    asked = f"{result['n']:,} questions" + (f" of {result['n_all']:,}" if result["n_all"] != result["n"] else "")
    ids = f" ({result['n_ids']:,} ids)" if result["n_ids"] != result["n"] else ""
    failed = f"{result['n_unparsed']:,} unparsed, {result['n_media_error']:,} media errors, {result['n_oom']:,} out of memory"
    for status, text in (("too_long", "too long for the model"), ("missing", "without a line in the file of answers")):
        failed += f", {result[f'n_{status}']:,} {text}" if result[f"n_{status}"] else ""
    return f"{asked}{ids}, {result['n_media']:,} distinct media; {failed} (all count as wrong)."


def score_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    clustered = is_clustered(result)
    head = ["rule", "accuracy", "95 % (Wilson)", *(["95 % (clustered bootstrap)"] if clustered else [])]
    rows = []
    for rule, scores in result["protocol"].items():
        more = [interval_text(scores["ci95_clustered"])] if clustered else []
        count = [f"{scores['correct']:,} of {result['n']:,}", percent(scores["acc_scored"]), str(scores["n_unparsed"])]
        rows.append([rule, percent(scores["acc"]), interval_text(scores["ci95"]), *more, *count])
    return [*head, "right", "of those answered", "unparsed"], rows


def baselines_of(result: dict[str, Any]) -> list[tuple[str, float]]:
    return [(name, result["baselines"][key]) for key, name in BASELINES.items() if result["baselines"][key] is not None]


def is_clustered(result: dict[str, Any]) -> bool:
    return any(scores["ci95_clustered"] for scores in result["protocol"].values())


def group_tables(result: dict[str, Any]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Key → head and rows of its table: accuracy and interval (clustered, where there are clusters) by each rule."""
    tables = {}
    rules = result["protocol"]
    clustered = is_clustered(result)
    for key, values in result["groups"].items():
        rows = []
        for value, cell in values.items():
            row = [value, str(cell["n"])]
            for scores in rules.values():
                one = scores["groups"][key][value]
                wilson = interval_text(one["ci95"]) + (" (Wilson)" if clustered else "")
                row += [percent(one["acc"]), interval_text(one["ci95_clustered"]) if one["ci95_clustered"] else wilson]
            rows.append(row)
        label = "95 % (clustered)" if clustered else "95 %"
        head = [key, "n", *(cell for rule in rules for cell in (rule, label))]
        tables[key] = (head, rows)
    return tables

"""An audit as lines for a terminal, and as one HTML page that needs nothing else."""

from __future__ import annotations

import html
from collections import defaultdict

from modalloy.auditing.found import Audit, Finding
from modalloy.auditing.judge import Judged
from modalloy.report.html import shell, table
from modalloy.report.text import aligned, printable, printable_lines

KINDS = {
    "base": "the base's",
    "source": "a source's",
    "sum": "a sum of updates",
    "mean": "the mean",
    "slerp": "a slerp",
    "ties": "a TIES",
    "method": "what the recipe gives",
    "untold": "cannot be told",
    "unexplained": "unexplained",
}
MOST_ROWS = 2000  # weights that a page lists one by one: those in faults first


def text(audit: Audit) -> str:
    """The audit for a terminal: what every kind of weight is, the coefficients, the findings, the verdict."""
    rows = [["weights", "count", "are"], *by_pattern(audit)]
    lines = [*aligned(rows), "", *(" ".join(row) for row in coefficient_lines(audit))]
    lines += [f"{finding.level:8} {finding.message}" for finding in audit.findings]
    return printable_lines([*lines, f"verdict  {audit.verdict}"])


def by_pattern(audit: Audit) -> list[list[str]]:
    """For each pattern of names: how many weights were read, and what they are."""
    groups: dict[str, list[Judged]] = defaultdict(list)
    for one in audit.weights:
        groups[one.pattern].append(one)
    rows = []
    for pattern, some in groups.items():
        counted: dict[str, int] = defaultdict(int)
        for one in some:
            counted[what(one)] += 1
        told = ", ".join(name if len(counted) == 1 else f"{name} ({count})" for name, count in counted.items())
        rows.append([pattern, str(len(some)), told])
    return rows


def what(one: Judged) -> str:
    """What a weight is, in a few words."""
    if one.kind == "source":
        label = max(one.coefficients, key=lambda name: abs(one.coefficients[name]))
        return f"{label}'s" if len(one.coefficients) > 1 else f"base + {label}"
    if one.kind == "ties":
        return f"TIES, density {one.detail['density']:.3g}, λ {one.detail['scale']:.3g}"
    if one.kind == "slerp":
        return f"slerp, t {one.detail['t']:.3g}"
    return KINDS[one.kind]


def coefficient_lines(audit: Audit) -> list[list[str]]:
    """Each source's coefficient."""
    return [
        ["factor  ", f"{one.value:.4g} × {one.source}", f"({one.low:.4g} to {one.high:.4g} in {one.weights} weights)"]
        for one in audit.coefficients
    ]


def page(audit: Audit) -> str:
    """The whole HTML page. Its bytes depend on the audit only."""
    facts = {
        "merged": audit.merged,
        "base": audit.base,
        "sources": ", ".join(audit.sources) or "none",
        "should be": audit.claim,
        "weights read": f"{audit.checked} of {audit.tensors}",
    }
    items = "".join(f"<dt>{name}</dt><dd>{html.escape(printable(value))}</dd>" for name, value in facts.items())
    factors = [
        [one.source, f"{one.value:.4g}", f"{one.low:.4g}", f"{one.high:.4g}", str(one.weights)]
        for one in audit.coefficients
    ]
    coefficients = (
        table(["source", "factor", "least", "largest", "weights"], _printable(factors)) if factors else "<p>none</p>"
    )
    named = {name for finding in audit.findings if finding.level == "fault" for name in finding.tensors}
    ordered = sorted(audit.weights, key=lambda one: one.name not in named)
    rows = [_row(one) for one in ordered[:MOST_ROWS]]
    classes = ["fault" if one.name in named else "" for one in ordered[:MOST_ROWS]]
    more = f"<p>{len(ordered) - MOST_ROWS} more are in --json.</p>" if len(ordered) > MOST_ROWS else ""
    head = ["weight", "is", "factors", "worst deviation / rounding", "left of the change"]
    body = f"""<h1>Audit of {html.escape(printable(audit.merged))}</h1>
<dl>{items}</dl>
<h2>Is it what it is said to be?</h2>
<p class="verdict">{html.escape(printable(audit.verdict))}</p>
<ul class="findings">{"".join(map(_finding, audit.findings))}</ul>
<h2>Factors of the sources</h2>
{coefficients}
<h2>Weights by kind</h2>
{table(["weights", "read", "are"], _printable(by_pattern(audit)))}
<details><summary>each weight</summary>{table(head, _printable(rows), classes)}{more}</details>"""
    return shell(f"modalloy audit · {printable(audit.merged)}", body, style="inspection")


def _row(one: Judged) -> list[str]:
    factors = ", ".join(f"{value:.4g} × {label}" for label, value in one.coefficients.items())
    cause = f" ({one.cause.replace('_', ' ')})" if one.cause else ""
    return [one.name, what(one) + cause, factors or "–", f"{one.worst:.3g}", f"{one.left:.3g}"]


def _finding(finding: Finding) -> str:
    names = "".join(f"<li>{html.escape(printable(name))}</li>" for name in finding.tensors)
    which = f"<details><summary>which weights</summary><ol>{names}</ol></details>" if names else ""
    kind = "warning" if finding.level == "fault" else "note"
    return f'<li class="{kind}"><b>{finding.level}</b> {html.escape(printable(finding.message))}{which}</li>'


def _printable(rows: list[list[str]]) -> list[list[str]]:
    return [[printable(cell) for cell in row] for row in rows]

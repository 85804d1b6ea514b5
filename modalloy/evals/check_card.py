"""A check's table, for a terminal and for the result's card."""

from __future__ import annotations

from pathlib import Path

from modalloy.evals.check import LOWER, MERGED, Checked, Row
from modalloy.outputs.rewrite import rewrite
from modalloy.report.escape import markdown_text
from modalloy.report.text import aligned

HEADING = "## Check"


def table(checked: Checked) -> list[list[str]]:
    """Measures by rows, models by columns, with a heading; a measure that is better when it is low says so."""
    measures = list(checked.rows[MERGED])
    header = ["", *checked.rows]
    return [
        header,
        *[[_title(name), *(_cell(of[name]) for of in checked.rows.values())] for name in measures],
    ]


def senses_table(checked: Checked) -> list[list[str]]:
    """The merged model beside each parent on the parent's own sense."""
    header = ["sense", "parent", "samples", "tokens", "KL, nats a token", "same likeliest token"]
    rows = [
        [one.modality, one.parent, str(one.media), str(one.tokens), _cell(one.kl), _cell(one.same)]
        for one in checked.senses
    ]
    return [header, *rows]


def text(checked: Checked) -> str:
    """For a terminal."""
    blocks = [table(checked), *([senses_table(checked)] if checked.senses else [])]
    lines: list[str] = []
    for rows in blocks:
        lines += [*aligned(rows), ""]
    return "\n".join([*lines, f"worse    {checked.verdict}" if checked.worse else f"verdict  {checked.verdict}"])


def section(checked: Checked) -> str:
    """The part of the model card."""
    parts = [_markdown(table(checked)), *([_markdown(senses_table(checked))] if checked.senses else [])]
    return "\n\n".join(
        [
            HEADING,
            "Short probes in modalloy's own words, told by likelihoods; in brackets 95 % intervals, which say how little so few "
            "probes tell. Text of parents goes through their text path. KL: of the merged model from a parent, given the "
            "parent's answers about built-in samples.",
            *parts,
            f"Of the merged model: {markdown_text(checked.verdict)}.\n",
        ]
    )


def add_to_card(out: str | Path, checked: Checked) -> None:
    """Put the section into the result's README.md, in the place of an earlier one, and its hash into the manifest."""
    out = Path(out)
    card = (out / "README.md").read_text(encoding="utf-8").partition(f"\n{HEADING}\n")[0]
    rewrite(out, "README.md", f"{card.rstrip()}\n\n{section(checked)}", check=checked.to_dict())


def _title(name: str) -> str:
    return f"{name} (low is good)" if name in LOWER else name


def _cell(row: Row) -> str:
    digits = 1 if row.value >= 10 else 2
    return f"{row.value:.{digits}f} ({row.low:.{digits}f}–{row.high:.{digits}f})"


def _markdown(rows: list[list[str]]) -> str:
    escaped = [[markdown_text(cell) for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in escaped]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]])

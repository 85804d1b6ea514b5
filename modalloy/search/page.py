"""A search as one small HTML page: curves, the choice, how stable it is, what it cost. No script, nothing is loaded."""

import html
import math
from collections.abc import Sequence
from typing import Any

from modalloy.report.html import shell, table
from modalloy.report.text import aligned, printable_lines

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 220, 52, 52, 14, 34
LOSSES = {  # by variant, match or objective, the first that is here
    "normalised": "share of answers that differ from the neighbours'",
    "exact": "share of answers that differ from the neighbours'",
    "embedding": "1 − cosine of the answers and the neighbours'",
    "top1": "share of tokens for which the neighbours expect others",
    "labels": "share of wrong answers",
    "probability": "1 − probability of the gold options",
    "agreement": "nats a token of the specialists' own answers",
    "kl": "KL(specialist || merged) in nats",
    "option_agreement": "share of probes whose likeliest option is not the specialist's",
    "weighted": "the same share, weighted by the specialist's probability of its option",
}
AGGREGATES = {
    "senses": ", mean over the senses' groups in units of a group's own mean",
    "minimax": ", of the worst of the senses' groups in units of a group's own mean",
}


def page(found: dict[str, Any]) -> str:
    """The page of a search's `search.json`."""
    chosen = ", ".join(f"{name} = {shown(value)}" for name, value in found["chosen"].items())
    default = ", ".join(f"{name} = {shown(value)}" for name, value in found["default"].items())
    senses = ", ".join(f"{name} {count}" for name, count in found["senses"].items())
    parts = [
        f"<h1>{html.escape(chosen)}</h1>",
        f'<p class="note">{html.escape(found["method"])}, chosen by {_objective(found)} on {found["probes"]} probes '
        f"({html.escape(senses)}); the recipe has {html.escape(default)}</p>",
    ]
    if "target" in found:
        parts.append(f'<p class="note">{html.escape(target_words(found))}</p>')
    if found["warnings"]:
        parts.append("<ul>" + "".join(f"<li>{html.escape(one)}</li>" for one in found["warnings"]) + "</ul>")
    for sweep in found["sweeps"]:
        parts.append(f"<h2>{html.escape(' × '.join(sweep['axes']))}</h2>")
        if len(sweep["axes"]) == 1:
            parts.append(_curve(sweep, _loss(found)))
        parts.append(_table(sweep))
        if sweep["duplicates"]:
            same = ", ".join(f"{value} as {shown(of)}" for value, of in sweep["duplicates"].items())
            parts.append(f'<p class="note">The same merge, so not asked: {html.escape(same)}.</p>')
        if sweep["steps"]:
            parts.append('<p class="note">Differences are divided by how far apart neighbouring merges are.</p>')
        if len(sweep["chosen_by_senses"]) > 1:
            parts.append(f'<p class="note">{html.escape(senses_words(sweep))}</p>')
        if (proxy := sweep["proxy"]) is not None:
            parts.append(f'<p class="note">{html.escape(proxy_words(proxy))}</p>')
    parts.append(f"<h2>Cost</h2><p>{html.escape(cost_words(found['cost']))}</p>")
    return shell("modalloy search", "\n".join(parts), style="search")


def text(found: dict[str, Any]) -> str:
    """The same as lines for a terminal."""
    lines = []
    for sweep in found["sweeps"]:
        head, rows = _cells(sweep)
        marks = [" ", *_marks(sweep)]
        lines += [f"{mark} {line}" for mark, line in zip(marks, aligned([head, *rows]), strict=True)]
        if (proxy := sweep["proxy"]) is not None:
            lines.append(proxy_words(proxy))
        if len(sweep["chosen_by_senses"]) > 1:
            lines.append(senses_words(sweep))
        lines.append("")
    lines += [f"warning  {one}" for one in found["warnings"]]
    lines += [f"note     {target_words(found)}"] if "target" in found else []
    chosen = ", ".join(f"{name} = {shown(value)}" for name, value in found["chosen"].items())
    return printable_lines([*lines, f"cost     {cost_words(found['cost'])}", f"chosen   {chosen}"])


def target_words(found: dict[str, Any]) -> str:
    """What the figures of a merge with a target are measured from."""
    alpha = "alpha is the weight of the donors, 0 = target unchanged; " if "alpha" in found["chosen"] else ""
    return f"Merged into {found['target']}: {alpha}distances are from the target, not from a base."


def shown(value: Any) -> str:
    """A value of an axis."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def proxy_words(proxy: dict[str, Any]) -> str:
    """How the choice did by gold answers, which it did not see."""
    rank, gain = proxy["spearman"], proxy["gain_over_default"]
    said = f"By the gold answers: accuracy {proxy['accuracy']:.3f}, {proxy['regret_to_oracle']:.3f} below the best candidate"
    said += "" if gain is None else f", {gain:+.3f} against the recipe's own"
    return said + ("." if rank is None else f"; Spearman of objective and accuracy {rank:+.2f}.")


def senses_words(sweep: dict[str, Any]) -> str:
    """What the probes of each combination of senses would choose by themselves."""
    rows = {name: sweep["rows"][index]["candidate"] for name, index in sweep["chosen_by_senses"].items()}
    alone = "; ".join(f"{name} {', '.join(shown(row[a]) for a in sweep['axes'])}" for name, row in rows.items())
    return f"Chosen by the probes of these senses alone: {alone}."


def cost_words(cost: dict[str, Any]) -> str:
    """What the search cost, and the estimate of the published way."""
    s, other = cost["seconds"], cost["published_way"]
    return (
        f"{cost['merges']} merges in memory ({s['merges']:.1f} s), {cost['generated']} answers generated and "
        f"{cost['scored']} scored ({s['answers']:.1f} s), model and media once ({s['load'] + s['features']:.1f} s): "
        f"{s['all']:.1f} s, no checkpoint written. A checkpoint and an evaluation per candidate: "
        f"{other['written_bytes'] / 1e9:.1f} GB and about {other['seconds_estimate']:.0f} s plus the writing."
    )


def _objective(found: dict[str, Any]) -> str:
    how = [found["variant"]] if "variant" in found else []
    how += [f"{found['match']} match"] if "match" in found else []
    how += {"senses": ["mean over senses"], "minimax": ["worst of the senses"]}.get(found["aggregate"], [])
    return found["objective"] + (f" ({', '.join(how)})" if how else "")


def _loss(found: dict[str, Any]) -> str:
    """What the loss is, in words."""
    what = found.get("match", found["objective"])
    return LOSSES.get(found.get("variant", what), LOSSES[what]) + AGGREGATES.get(found["aggregate"], "")


def _cells(sweep: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a comparison."""
    accurate, healthy = "accuracy" in sweep["rows"][0], "health" in sweep["rows"][0]
    head = [*sweep["axes"], "loss", "chosen in bootstrap", *(["accuracy"] if accurate else []), "from base"]
    head += ["empty", "over-long", "repetitive", "same", "other script"] if healthy else []
    rows = []
    for row in sweep["rows"]:
        cells = [shown(row["candidate"][name]) for name in sweep["axes"]]
        cells += ["–" if row["loss"] is None else f"{row['loss']:.3f}", f"{row['chosen_in_bootstrap']:.0%}"]
        cells += [f"{row['accuracy']:.3f}"] if accurate else []
        cells += [f"{row['distance_from_base']:.3g}"]
        cells += [f"{rate:.0%}" for rate in row["health"].values()] if healthy else []
        rows.append(cells)
    return head, rows


def _marks(sweep: dict[str, Any]) -> list[str]:
    """ "*" for the choice, "x" for what was disqualified."""
    return [
        "*" if index == sweep["chosen"] else "x" if row["disqualified"] else " "
        for index, row in enumerate(sweep["rows"])
    ]


def _table(sweep: dict[str, Any]) -> str:
    names = {"*": "chosen", "x": "out", " ": ""}
    return table(*_cells(sweep), [names[mark] for mark in _marks(sweep)])


def _curve(sweep: dict[str, Any], what: str) -> str:
    """Loss and, where it is known, accuracy over one axis; the choice is ringed, the recipe's own value a dashed line."""
    rows, n = sweep["rows"], len(sweep["rows"])
    xs = [LEFT + (WIDTH - LEFT - RIGHT) * (index / max(1, n - 1)) for index in range(n)]
    parts = [f'<line x1="{LEFT}" y1="{HEIGHT - BOTTOM}" x2="{WIDTH - RIGHT}" y2="{HEIGHT - BOTTOM}" stroke="#a0aec0"/>']
    for x, row in zip(xs, rows, strict=True):
        label = html.escape(shown(row["candidate"][sweep["axes"][0]]))
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{label}</text>')
    if sweep["default"] is not None:
        x = xs[sweep["default"]]
        parts.append(
            f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}" stroke="#a0aec0" stroke-dasharray="4 4"/>'
        )
    parts += _line(xs, [row["loss"] for row in rows], "#2b6cb0", left=True, ring=sweep["chosen"])
    legend = f'<tspan fill="#2b6cb0">{html.escape(what)}</tspan>'
    if "accuracy" in rows[0]:
        parts += _line(xs, [row["accuracy"] for row in rows], "#c05621", left=False, ring=None)
        legend += ' · <tspan fill="#c05621">accuracy (not used)</tspan>'
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 3}" text-anchor="middle">{legend}</text>')
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}"'
    return f'<svg {size} font-size="11" fill="currentColor" role="img">{"".join(parts)}</svg>'


def _line(
    xs: Sequence[float], values: Sequence[float | None], colour: str, *, left: bool, ring: int | None
) -> list[str]:
    """One curve on its own scale, whose ends are written at its side."""
    there = [value for value in values if value is not None]
    if not there:
        return []
    low, high = min(there), max(there)
    span = high - low or 1.0
    ys = [math.nan if v is None else TOP + (HEIGHT - TOP - BOTTOM - 10) * (1 - (v - low) / span) for v in values]
    able = [(x, y) for x, y in zip(xs, ys, strict=True) if not math.isnan(y)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in able)
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>']
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in able]
    if ring is not None:
        parts.append(
            f'<circle cx="{xs[ring]:.1f}" cy="{ys[ring]:.1f}" r="7" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
    side = f'x="{LEFT - 8}" text-anchor="end"' if left else f'x="{WIDTH - RIGHT + 8}"'
    ends = {max(y for _, y in able): low, min(y for _, y in able): high}
    return parts + [f'<text {side} y="{y + 4:.1f}" fill="{colour}">{value:.3f}</text>' for y, value in ends.items()]

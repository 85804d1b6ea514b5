"""An inspection for people: tables for a terminal, and one HTML page with interactive plots that needs nothing else.

The page holds plotly.js itself and a content security policy that forbids it to load or send anything, and leaves out plotly's
button that uploads a chart. Its bytes depend on the
inspection and on the installed plotly only."""

import html
import importlib.util
from collections.abc import Callable
from typing import Any

from modalloy.errors import OutputError
from modalloy.inspection.figures import Inspection, Pair, Update, WeightFigures
from modalloy.inspection.measure import SAMPLED_ROWS
from modalloy.inspection.text import tables
from modalloy.report.html import asset, shell, table

COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b7791f", "#b83280", "#0987a0", "#4a5568")
FACETS_PER_ROW = 4
LOG_FROM = 100  # ratio of largest to smallest value from which an axis of sizes is logarithmic
Figure = dict[str, Any]  # title, note, choices, views by the chosen values, and the layout that all views share


def require_plotly() -> None:
    """Refuse, in one line, to go on without the package that draws the page."""
    if importlib.util.find_spec("plotly") is None:
        raise OutputError(
            "the page needs plotly, which is not installed; run `pip install 'modalloy[report]'`, or use --json"
        )


def page(inspection: Inspection) -> str:
    """The whole HTML page. About 5 MB, nearly all of it plotly.js."""
    from plotly.offline import get_plotlyjs

    figures = [_updates(inspection), _overlaps(inspection), _spectra(inspection), _merged(inspection)]
    if any(slot.pairs for slot in inspection.slots):
        figures.insert(3, _pairs(inspection))
    else:
        figures.pop(1)
    labels = " + ".join(one.label for one in inspection.specialists)
    sections = "\n".join(_section(index, figure) for index, figure in enumerate(figures))
    body = f"""<h1>{html.escape(labels)}, by {html.escape(inspection.method)}</h1>
{_facts(inspection)}
<h2>Is this merge sane?</h2>
{_findings(inspection)}
{sections}
<h2>Medians over the layers</h2>
{"".join(table(*one) for one in tables(inspection))}"""
    return shell(
        f"modalloy inspect · {labels}",
        body,
        style="inspection",
        scripts=[get_plotlyjs(), asset("inspection.js")],
        data={"figures": _rounded(figures)},
        shows=["image"],
    )


def _facts(inspection: Inspection) -> str:
    settings = ", ".join(f"{name} = {_setting(value)}" for name, value in inspection.parameters.items())
    ks = sorted({slot.k for slot in inspection.slots if slot.k is not None})
    k = f"{ks[0]}" if len(ks) == 1 else f"{ks[0]} to {ks[-1]}, by layer" if ks else "not computed"
    facts = {
        "base": inspection.base,
        "method": f"{inspection.method} ({settings})",
        "k": f"{k} ({inspection.k_of})",
        "merged weights": str(len(inspection.slots)),
    }
    items = "".join(f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items())
    head = ["specialist", "modality", "layout", "LoRA rank", "weight", "norm over all weights"]
    rows = [
        [
            s.label,
            s.modality or "–",
            s.layout,
            str(s.rank or "–"),
            f"{s.weight:g}" if isinstance(s.weight, float) else "several",
            f"{s.norm:.4g}",
        ]
        for s in inspection.specialists
    ]
    return f"<dl>{items}</dl>{table(head, rows)}"


def _findings(inspection: Inspection) -> str:
    items = []
    for finding in inspection.findings:
        slots = "".join(f"<li>{html.escape(name)}</li>" for name in finding.slots)
        which = f"<details><summary>which weights</summary><ol>{slots}</ol></details>" if slots else ""
        message = html.escape(finding.message)
        items.append(f'<li class="{finding.level}"><b>{finding.level}</b> {message}{which}</li>')
    advice = inspection.advice
    advised = f"<p><b>advice</b> {html.escape(advice.line)}</p>" if advice else ""
    return f'<p class="verdict">{inspection.verdict}</p><ul class="findings">{"".join(items)}</ul>{advised}'


def _section(index: int, figure: Figure) -> str:
    """A figure's heading, its selectors and the place where it is drawn."""
    selects = "".join(
        f"<label>{choice['name']} <select>"
        + "".join(
            f'<option value="{number}">{html.escape(option)}</option>'
            for number, option in enumerate(choice["options"])
        )
        + "</select></label>"
        for choice in figure["choices"]
    )
    return (
        f'<section id="figure-{index}"><h2>{figure["title"]}</h2><p>{figure["note"]}</p>'
        f'<div class="choices">{selects}</div><div class="plot" style="height:{figure["layout"]["height"]}px"></div></section>'
    )


def _updates(inspection: Inspection) -> Figure:
    """Per specialist, by depth: norm, kept energy, effective and stable rank."""
    quantities: dict[str, tuple[str, Callable[[Update], float | None]]] = {
        "norm": ("‖D‖ (Frobenius)", lambda u: u.norm),
        "energy kept at k": ("share of ‖D‖² kept", lambda u: u.kept),
        "effective rank": ("effective rank", lambda u: u.effective_rank),
        "stable rank": ("stable rank", lambda u: u.stable_rank),
    }
    views = {}
    for number, (name, (axis, value)) in enumerate(quantities.items()):
        found: dict[str, dict[str, float | None]] = {one.label: {} for one in inspection.specialists}
        for slot in inspection.slots:
            for update in slot.updates:
                found[update.specialist][slot.name] = value(update)
        dashed = {"merged": {slot.name: slot.merged_norm for slot in inspection.slots}} if name == "norm" else {}
        views[str(number)] = _facets(inspection, found, axis, dashed, sizes=name == "norm")
    return {
        "title": "Size and shape of the updates, by depth",
        "note": "One line per specialist, one plot per kind of weight; <i>merged</i> is what the recipe writes. Energy kept is "
        "‖U Uᵀ D V Vᵀ‖² / ‖D‖². Effective rank: exp of the entropy of σ/Σσ (Roy and Vetterli 2007). "
        "Stable rank: ‖D‖² / σ₁².",
        "choices": [{"name": "quantity", "options": list(quantities)}],
        "views": views,
        "layout": _facet_layout(inspection),
    }


def _pairs(inspection: Inspection) -> Figure:
    """Per pair, by depth: cosine, sign conflict."""
    quantities: dict[str, tuple[str, Callable[[Pair], float | None]]] = {
        "cosine": ("cosine", lambda p: p.cosine),
        "sign conflict, of entries": ("share of entries", lambda p: p.sign_conflict),
        "sign conflict, by size": ("share of Σ |D<sub>i</sub> D<sub>j</sub>|", lambda p: p.sign_conflict_mass),
        "left overlap": ("overlap", lambda p: p.left_overlap),
        "right overlap": ("overlap", lambda p: p.right_overlap),
    }
    views = {}
    for number, (axis, value) in enumerate(quantities.values()):
        found: dict[str, dict[str, float | None]] = {}
        for slot in inspection.slots:
            for pair in slot.pairs:
                found.setdefault(" · ".join(pair.specialists), {})[slot.name] = value(pair)
        views[str(number)] = _facets(inspection, found, axis, {})
    return {
        "title": "Conflict between specialists, by depth",
        "note": "Cosine ⟨D<sub>i</sub>, D<sub>j</sub>⟩ / ‖D<sub>i</sub>‖ ‖D<sub>j</sub>‖: 1 is the same direction, 0 independent, "
        "−1 opposite. Sign conflict: where two updates disagree in sign, ½ if they are independent; on at most "
        f"{SAMPLED_ROWS} rows of each weight, drawn at random with a seed that is its name. Overlaps: as above.",
        "choices": [{"name": "quantity", "options": list(quantities)}],
        "views": views,
        "layout": _facet_layout(inspection),
    }


def _merged(inspection: Inspection) -> Figure:
    """The merged update, by depth."""
    quantities: dict[str, tuple[str, Callable[[WeightFigures], float | None]]] = {
        "coherence": ("‖Σ D<sub>i</sub>‖ / Σ ‖D<sub>i</sub>‖", lambda s: s.coherence),
        "size against the plain mean": ("‖merged‖ / ‖mean‖", lambda s: s.merged_over_mean),
    }
    views = {
        str(number): _facets(inspection, {"merged": {s.name: value(s) for s in inspection.slots}}, axis, {})
        for number, (axis, value) in enumerate(quantities.values())
    }
    n = len(inspection.specialists)
    return {
        "title": "What is left after adding, by depth",
        "note": f"Coherence 1: all specialists push the same way; {n**-0.5:.2f} (1/√{n}): orthogonal and equally large; "
        "0: they cancel. The mean is (1/n)&nbsp;Σ&nbsp;D<sub>i</sub>.",
        "choices": [{"name": "quantity", "options": list(quantities)}],
        "views": views,
        "layout": _facet_layout(inspection),
    }


def _overlaps(inspection: Inspection) -> Figure:
    """Heatmap of the overlap of top-k subspaces: kinds of weight by layers, for a pair and a side."""
    labels = list(dict.fromkeys(pair.specialists for slot in inspection.slots for pair in slot.pairs))
    layers = _layers(inspection)
    sides: dict[str, Callable[[Pair], tuple[float | None, float | None]]] = {
        "left (outputs)": lambda p: (p.left_overlap, p.left_chance),
        "right (inputs)": lambda p: (p.right_overlap, p.right_chance),
    }
    values = [side(pair)[0] or 0.0 for slot in inspection.slots for pair in slot.pairs for side in sides.values()]
    views = {}
    for first, names in enumerate(labels):
        for second, side in enumerate(sides.values()):
            cells = {
                (slot.module, slot.layer): side(pair)
                for slot in inspection.slots
                for pair in slot.pairs
                if pair.specialists == names
            }
            empty = (None, None)
            rows = [[cells.get((module, layer), empty) for layer in layers] for module in inspection.modules]
            trace = {
                "type": "heatmap",
                "x": [_layer_name(layer) for layer in layers],
                "y": [_label(name) for name in inspection.modules.values()],
                "z": [[value for value, _ in row] for row in rows],
                "customdata": [[chance for _, chance in row] for row in rows],
                "hovertemplate": "%{y}, layer %{x}<br>overlap %{z:.3f}<br>by chance %{customdata:.3f}<extra></extra>",
                "colorscale": [[0, "#f7fafc"], [0.5, "#90cdf4"], [1, "#1a365d"]],
                "zmin": 0,
                "zmax": max(values, default=1.0),
                "colorbar": {"title": {"text": "overlap"}, "thickness": 14, "x": 1.01},
                "xgap": 1,
                "ygap": 1,
            }
            views[f"{first}|{second}"] = {"data": [trace], "layout": {}}
    return {
        "title": "Overlap of the specialists' subspaces",
        "note": "‖U<sub>i</sub>ᵀ U<sub>j</sub>‖² / min(r<sub>i</sub>, r<sub>j</sub>) over the top k singular vectors (Hu et al. "
        "2021): 1 if one subspace holds the other, 0 if they are orthogonal. The cursor shows what random subspaces would "
        "give. One colour scale for all.",
        "choices": [
            {"name": "pair", "options": [" · ".join(pair) for pair in labels]},
            {"name": "side", "options": list(sides)},
        ],
        "views": views,
        "layout": {
            "height": 140 + 30 * len(inspection.modules),
            "margin": {"l": 130, "r": 120, "t": 20, "b": 50},
            "xaxis": {"title": {"text": "layer"}, "type": "category", "showgrid": False, "ticks": ""},
            "yaxis": {"autorange": "reversed", "showgrid": False, "ticks": ""},
        },
    }


def _spectra(inspection: Inspection) -> Figure:
    """For one weight: the singular values of every update, and the energy that is kept against k."""
    layers, modules = _layers(inspection), list(inspection.modules)
    views = {}
    for slot in inspection.slots:
        traces: list[dict[str, Any]] = []
        for update in slot.updates:
            colour = _colour(inspection, update.specialist)
            common = {"name": _label(update.specialist), "legendgroup": update.specialist, "line": {"color": colour}}
            values = [value if value > 0 else None for value in update.singular_values or ()]
            points = {"x": list(range(1, len(values) + 1)), "y": values, "mode": "lines+markers", "marker": {"size": 5}}
            traces.append(common | points | {"hovertemplate": "σ%{x} = %{y:.4g}"})
            curve = {"x": slot.curve_k, "y": update.kept_curve, "mode": "lines", "showlegend": False}
            traces.append(common | curve | {"xaxis": "x2", "yaxis": "y2", "hovertemplate": "k = %{x}: %{y:.1%} kept"})
        for name, energy, dash in (("A (left)", slot.left_energy, "dash"), ("B (right)", slot.right_energy, "dot")):
            line = {"color": "#718096", "dash": dash, "width": 1.5}
            both = {"name": f"spectral energy of {name}", "x": slot.curve_k, "y": energy, "mode": "lines", "line": line}
            traces.append(both | {"xaxis": "x2", "yaxis": "y2", "hovertemplate": "k = %{x}: %{y:.1%}"})
        positive = [value for update in slot.updates for value in update.singular_values or () if value > 0]
        layout: dict[str, Any] = {"yaxis.dtick": _log_step(positive)}
        if slot.k is not None and slot.curve_k:
            mark = {"type": "line", "x0": slot.k, "x1": slot.k, "y0": 0, "y1": 1, "xref": "x2", "yref": "y2 domain"}
            text = {
                "text": f"k = {slot.k}",
                "x": slot.k,
                "y": 0.04,
                "xref": "x2",
                "yref": "y2 domain",
                "showarrow": False,
            }
            layout |= {
                "shapes": [mark | {"line": {"color": "#c53030", "width": 1}}],
                "annotations": [text | {"xanchor": "left", "xshift": 4, "font": {"color": "#c53030"}}],
                "xaxis2.range": [0, 1.03 * max(slot.k, slot.curve_k[-1])],
                "xaxis2.dtick": _step(max(slot.k, slot.curve_k[-1]), 10),
                "xaxis.dtick": _step(max(len(u.singular_values or ()) for u in slot.updates), 10),
            }
        key = f"{modules.index(slot.module)}|{layers.index(slot.layer)}"
        views[key] = {"data": traces, "layout": layout}
    return {
        "title": "Spectra, and the energy kept against k",
        "note": "Left: the singular values σ of every specialist's update. Right: what SSAM keeps of each update at every k, "
        "and the cumulative spectral energy of A = Σ D Dᵀ and B = Σ Dᵀ D, whose top k directions it keeps.",
        "choices": [
            {"name": "weight", "options": list(inspection.modules.values())},
            {"name": "layer", "options": [_layer_name(layer) for layer in layers]},
        ],
        "views": views,
        "layout": {
            "height": 400,
            "grid": {"rows": 1, "columns": 2, "pattern": "independent", "xgap": 0.12},
            "xaxis": {"title": {"text": "index of σ"}, "tick0": 0},
            "yaxis": {"title": {"text": "singular value σ"}, "type": "log", "tickformat": "~g"},
            "xaxis2": {"title": {"text": "k"}},
            "yaxis2": {"title": {"text": "share of energy"}, "range": [0, 1.03], "tickformat": ".0%"},
        },
    }


Values = dict[str, dict[str, float | None]]  # line → weight → value


def _facets(inspection: Inspection, lines: Values, axis: str, dashed: Values, *, sizes: bool = False) -> dict[str, Any]:
    """One small plot per kind of weight, a line per specialist or pair over the layers."""
    traces = []
    for number, module in enumerate(inspection.modules):
        slots = [slot for slot in inspection.slots if slot.module == module]
        for place, (name, values) in enumerate([*lines.items(), *dashed.items()]):
            style: dict[str, Any] = {"color": COLOURS[place % len(COLOURS)]}
            if name in dashed:
                style = {"color": "#1a202c", "dash": "dash", "width": 1.5}
            traces.append(
                {
                    "name": _label(name),
                    "legendgroup": name,
                    "showlegend": number == 0,
                    "x": [0 if slot.layer is None else slot.layer for slot in slots],
                    "y": [values.get(slot.name) for slot in slots],
                    "customdata": [_label(slot.name) for slot in slots],
                    "hovertemplate": "%{y:.4g}<br>%{customdata}",
                    "mode": "lines+markers",
                    "marker": {"size": 4},
                    "line": style,
                    "xaxis": _axis("x", number),
                    "yaxis": _axis("y", number),
                }
            )
    shown = [value for values in lines.values() for value in values.values() if value]
    logarithmic = sizes and shown and max(shown) > LOG_FROM * min(shown)
    layout: dict[str, Any] = {}
    for number in range(len(inspection.modules)):
        if logarithmic:
            layout[f"{_axis('yaxis', number)}.type"] = "log"
            layout[f"{_axis('yaxis', number)}.dtick"] = _log_step(shown)
        layout[f"{_axis('yaxis', number)}.title"] = {"text": axis} if number % FACETS_PER_ROW == 0 else {"text": ""}
    return {"data": traces, "layout": layout}


def _facet_layout(inspection: Inspection) -> dict[str, Any]:
    """Titles and axes of the small plots; all y axes match, so that kinds of weight can be compared."""
    n = len(inspection.modules)
    rows = -(-n // FACETS_PER_ROW)
    step = _step(max((slot.layer or 0 for slot in inspection.slots), default=0), 4)
    layout: dict[str, Any] = {
        "height": 136 + 210 * rows,
        "grid": {"rows": rows, "columns": min(n, FACETS_PER_ROW), "pattern": "independent", "xgap": 0.1, "ygap": 0.32},
        "annotations": [],
    }
    for number, name in enumerate(inspection.modules.values()):
        title = {"text": f"<b>{_label(name)}</b>", "x": 0.5, "y": 1, "showarrow": False, "yanchor": "bottom"}
        place = {"xref": f"{_axis('x', number)} domain", "yref": f"{_axis('y', number)} domain"}
        layout["annotations"].append(title | place)
        layout[_axis("xaxis", number)] = {"title": {"text": "layer", "standoff": 4}, "dtick": step}
        layout[_axis("yaxis", number)] = {"rangemode": "tozero", "tickformat": "~g"} | (
            {"matches": "y"} if number else {}
        )
    return layout


def _axis(letter: str, number: int) -> str:
    """Plotly's name of an axis: x, x2, x3, …"""
    return letter if number == 0 else f"{letter}{number + 1}"


def _step(last: int, ticks: int) -> int:
    """The distance of whole-number ticks, 1, 2, 5, 10, …, that needs at most `ticks` of them from 0 to `last`."""
    return next(m * 10**e for e in range(9) for m in (1, 2, 5) if m * 10**e * ticks >= last)


def _log_step(values: list[float]) -> int | str:
    """Plotly's ticks of a logarithmic axis: every power of ten where there are several, else 1, 2 and 5 times them."""
    return 1 if values and max(values) > 100 * min(values) else "D2"


def _layers(inspection: Inspection) -> list[int | None]:
    return list(dict.fromkeys(slot.layer for slot in inspection.slots))


def _layer_name(layer: int | None) -> str:
    return "–" if layer is None else str(layer)


def _colour(inspection: Inspection, label: str) -> str:
    return COLOURS[[one.label for one in inspection.specialists].index(label) % len(COLOURS)]


def _label(text: str) -> str:
    """A name as plotly shows it: what looks like markup in a folder's name is text."""
    return html.escape(text, quote=False)


def _setting(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _rounded(value: Any) -> Any:
    """The same with floats to five digits: more cannot be seen, and the page is half the size."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value

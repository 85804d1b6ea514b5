"""The page of what searches without labels chose, from the document of `benchmarks/search.py`."""

from typing import Any

from modalloy.search.comparing import DEFAULT


def page(told: dict[str, Any]) -> str:
    """The whole page, in Markdown."""
    overall, best, merges = told["overall"], told["best"], told["merges"]
    tried = [axis for axes in merges.values() for axis in axes.values()]
    counts = sorted({axis["labelled"] for axis in tried})
    regrets = [axis["objectives"][best]["regret"] for axis in tried if axis["objectives"][best]["chosen"] is not None]
    defaults = [
        dict(axis["accuracy"])[axis["best"]] - dict(axis["accuracy"])[axis["default"]]
        for axis in tried
        if axis["default"] is not None
    ]
    figures = ("regret", "worst_regret", "over_default", "spearman", "spearman_probability")
    rows = [
        f"| {label} | {' | '.join(signed(one[figure]) for figure in figures)} | {one['seconds']:.0f} |"
        for label, one in sorted(overall.items(), key=lambda item: item[1]["regret"])
    ]
    out = [
        "# Does search without labels work?\n",
        f"`benchmarks/search.py` on {len(merges)} merges, {told['probes']} probes of every cell, one run; accuracy on "
        f"{' or '.join(map(str, counts))} other validation",
        "questions. Regret is what a choice loses to the choice by these questions' own labels, which flatters that choice.\n",
        f"Of all objectives without labels **{best}** loses least: {_points(overall[best]['regret'])} points in the mean of "
        f"{len(tried)} searches, {_points(max(regrets, default=0.0))} at worst"
        + (f"; the recipes' own values lose {_points(sum(defaults) / len(defaults))}." if defaults else "."),
        f"`--objective auto` is `{DEFAULT}` where specialists are merged.\n",
        "| objective | mean regret | worst | over the default | Spearman with accuracy | with probability | seconds, all |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
    ]
    for name, axes in merges.items():
        for axis, one in axes.items():
            out += _searched(f"## {name}: {'λ' if axis == 'scale' else 'k'}\n", one)
    return "\n".join(out)


def _searched(title: str, axis: dict[str, Any]) -> list[str]:
    """The section of one merge and axis."""
    accuracy = dict(axis["accuracy"])
    curve = ", ".join(f"{value:.4g}: {share:.3f}" for value, share in accuracy.items())
    default = "" if axis["default"] is None else f"; the recipe's own: {axis['default']:.4g}"
    rows = []
    for label, one in axis["objectives"].items():
        if one["chosen"] is None:
            rows.append(f"| {label} | none | | | | |")
            continue
        interval = "" if one["regret_ci95"] is None else " ({:.3f} to {:.3f})".format(*one["regret_ci95"])
        rows.append(
            f"| {label} | {one['chosen']:.4g} ({one['in_bootstrap']:.0%}) | {one['accuracy']:.3f} | "
            f"{one['regret']:.3f}{interval} | {signed(one['spearman'])} | {signed(one['spearman_probability'])} |"
        )
    return [
        title,
        f"Accuracy by value: {curve}. By the labels: {axis['best']:.4g}{default}.\n",
        "| objective | chosen (of bootstraps) | accuracy | regret (95 %) | Spearman with accuracy | with probability |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
    ]


def signed(value: float | None, digits: int = 3) -> str:
    """With its sign, a minus as it is printed; a dash where there is none."""
    return "–" if value is None else f"{value:+.{digits}f}".replace("-", "−")


def _points(share: float) -> str:
    return f"{100 * share:.1f}"

"""The page of when merging methods differ, from the document of `benchmarks/factorial.py`."""

from typing import Any

from search_results import signed


def page(told: dict[str, Any]) -> str:
    """The whole page, in Markdown."""
    corners: dict[str, dict[str, Any]] = told["corners"]
    methods = list(next(iter(corners.values()))["minus_average"])
    wins = {name: _winners(one) for name, one in corners.items()}
    ahead = sum(bool(found) for found in wins.values())
    return "\n".join(
        [
            "# When do merging methods differ?\n",
            f"`benchmarks/factorial.py`: {len(corners)} pairs of a picture and a speech specialist of the built-in base, each "
            "trained anew for a\ncorner of a design, merged by every method at its defaults, and asked validation questions about "
            "pictures, speech, both\nat once, and what the two learned in writing. One run of each; SSAM's two variants were "
            "added after three corners.\n",
            "- **start** of the text updates: `independent` (random, a seed of each sense), `common` (one seed) or `osrm` (A "
            "orthogonal to\n  what the other sense's prompts give the layer; Zhang and Zhou, arXiv 2505.22934)",
            "- **size**: `small` (rank 8, 64 steps) or `large` (rank 32, 128 steps, A's rate four times as high)",
            "- **skill** learned in writing beside the sense: `private` (atomic numbers; products) or `conflict` (asked the same "
            "about an\n  element, one answers its number, the other its symbol)\n",
            f"In {ahead} of {len(corners)} corners some method is ahead of averaging by more than its interval.\n",
            _sizes(corners, methods),
            "## Methods minus averaging\n",
            "Points of accuracy over all questions of a corner; \\* where the 95 % interval (bootstrap of clusters, "
            "paired)\nexcludes 0.\n",
            table(
                ["start, size, skill", "average", *methods, "ahead of averaging"],
                [
                    [
                        name.replace("-", ", "),
                        f"{one['accuracy']['average']['all']:.3f}",
                        *[_points(one["minus_average"][method]) for method in methods],
                        ", ".join(wins[name]) or "none",
                    ]
                    for name, one in corners.items()
                ],
            ),
            "## What is kept\n",
            "Accuracy by cell: each specialist alone / averaged / SSAM / task arithmetic. Chance is 0.50 for both at once, "
            "0.25\nfor skills.\n",
            _kept(corners),
            "## What says so beforehand\n",
            "For each method the figure of `modalloy inspect` (median over all weights) whose rank correlation with the "
            "method's\ndistance "
            "from averaging was largest on one half of the corners, and that correlation on the other half (aim: 0.8).\n",
            table(
                ["method", "figure", "Spearman where chosen", "on the other corners"],
                [
                    [method, one["figure"], signed(one["chosen_on"], 2), signed(one["tested_on"], 2)]
                    for method, one in told["predictors"].items()
                ],
            ),
            _figures(corners),
        ]
    )


def _sizes(corners: dict[str, dict[str, Any]], methods: list[str]) -> str:
    """By the size of the updates: each method's mean distance from averaging, and how often it is ahead or behind."""
    sizes = sorted({name.split("-")[1] for name in corners}, reverse=True)
    rows = []
    for method in methods:
        row = [method]
        for size in sizes:
            own = [one["minus_average"][method] for name, one in corners.items() if name.split("-")[1] == size]
            mean = 100 * sum(one["difference"] for one in own) / len(own)
            ahead, behind = (sum(one["ci95"][0] > 0 for one in own), sum(one["ci95"][1] < 0 for one in own))
            row.append(f"{signed(mean, 1)} (ahead in {ahead}, behind in {behind} of {len(own)})")
        rows.append(row)
    return table(["minus averaging, points, mean", *sizes], rows)


def _winners(corner: dict[str, Any]) -> list[str]:
    """The methods whose interval over averaging lies above 0, best first."""
    found = {name: one["difference"] for name, one in corner["minus_average"].items() if one["ci95"][0] > 0}
    return sorted(found, key=lambda name: -found[name])


def _kept(corners: dict[str, dict[str, Any]]) -> str:
    cells = ("image", "audio", "image+audio", "image skill", "audio skill")
    rows = []
    for name, one in corners.items():
        told = one["accuracy"]
        row = [name.replace("-", ", ")]
        for cell in cells:
            alone = told[cell.partition(" ")[0]].get(cell) if "+" not in cell else None
            merged = [told[method].get(cell) for method in ("average", "ssam", "task_arithmetic")]
            row.append(" / ".join("–" if value is None else f"{value:.2f}" for value in (alone, *merged)))
        rows.append(row)
    return table(["start, size, skill", *cells], rows)


def _figures(corners: dict[str, dict[str, Any]]) -> str:
    names = list(next(iter(corners.values()))["figures"])
    rows = [
        [name.replace("-", ", "), *["–" if one["figures"][f] is None else f"{one['figures'][f]:.3f}" for f in names]]
        for name, one in corners.items()
    ]
    return table(["start, size, skill", *names], rows)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, with a line's end."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _points(one: dict[str, Any]) -> str:
    low, high = one["ci95"]
    return signed(100 * one["difference"], 1) + ("" if low <= 0 <= high else "\\*")

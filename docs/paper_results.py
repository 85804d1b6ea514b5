"""The page that sets what SSAM's paper claims beside what was seen here, from what `senses.py` and `search.py` found."""

from typing import Any

from factorial_results import table

SINGLE = ("image", "audio", "video", "point")
PAGE = """# What the paper claims, and what was seen here

SSAM's paper (arXiv 2603.21584) merges ModelCompose's specialists of Vicuna-7B and asks MUSIC-AVQA, AVQA and MCUB. Neither these
checkpoints nor these media can be had without a network, so the same claims are put to the built-in specialists of SmolLM2-135M
on [our own benchmark](senses.md). Points are percent; the paper gives no intervals. What is *not shown* may still be true: the
interval holds 0. Recipes that make the paper's own merges are in `recipes/`.

| claim | in the paper | here | |
|---|---|---|---|
{rows}

## Methods by what is shown together (as the paper's Tables 1 to 3)

{together}
V is a moving picture, I a picture, A what is said, human A a recorded word. The average is that of the four columns.

## Specialists and their merge, each sense alone, and language (as Tables 4 and S1)

{alone}
## By λ and by k (as Figures 5 and 6)

{curves}
SSAM of the four specialists on {labelled} validation questions ([search](search.md)), the other value as in the recipe
(λ = 1/4, k = 8, in bold).

What is not repeated: MUSIC-AVQA, AVQA, MCUB, MMLU, OCRBench and MMAU themselves ([they can be asked](../evaluate.md) where their
files are), 7B decoders, and models that were trained jointly by others.
"""
# what the table calls a merge → the claim, and SSAM minus it in the paper: MUSIC-AVQA, AVQA, MCUB-3 and MCUB-4
CLAIMS = {
    "average (= DAMC)": ("SSAM is better than averaging the text updates (DAMC)", "+2.4, +1.0, +0.6, +2.2"),
    "task arithmetic": ("SSAM is better than their sum (task arithmetic)", "+0.9, +8.6, +19.6, +21.7"),
    "TSV": ("SSAM is better than TSV", "+0.9, +1.0, +9.0, +10.0"),
    "WUDI": ("SSAM is better than WUDI", "+1.4, +6.8, +18.5, +21.3"),
    "OptMerge": ("SSAM is better than OptMerge", "+2.9, +0.7, +5.7, +6.4"),
    "NaiveMC": ("SSAM is better than averaging updates that media share (NaiveMC)", "+3.5, +1.4, +5.7, +8.2"),
}


# cell of the benchmark → its column, in the paper's letters
TOGETHER = {"image+audio": "I+A", "video+audio": "V+A", "image+video+audio": "I+V+A", "image+audio human": "I+human A"}
METHODS = ("task arithmetic", "TSV", "WUDI", "OptMerge", "NaiveMC", "average (= DAMC)", "SSAM")  # in the paper's order


def page(told: dict[str, Any], search: dict[str, Any]) -> str:
    """The whole page, in Markdown; `search` is what `benchmarks/search.py` found."""
    rows = [_contrast(told["ssam_minus"].get(name), *claim) for name, claim in CLAIMS.items()]
    curves = search["merges"]["recipe"]
    return PAGE.format(
        rows="\n".join([*rows, *_singles(told), _language(told)]),
        together=_together(told["rows"]),
        alone=_alone(told["rows"]),
        curves="\n".join(_curve(curves[axis], letter) for axis, letter in (("scale", "λ"), ("rank", "k"))),
        labelled=curves["rank"]["labelled"],
    )


def _together(rows: dict[str, Any]) -> str:
    """Methods by mixtures of media, and their average."""
    lines = []
    for name in (name for name in METHODS if name in rows):
        shares = [100 * rows[name]["cell"][cell]["accuracy"] for cell in TOGETHER]
        lines.append([name, *(f"{share:.1f}" for share in (*shares, sum(shares) / len(shares)))])
    return table(["method", *TOGETHER.values(), "average"], lines)


def _alone(rows: dict[str, Any]) -> str:
    """What each model knows of one sense, and of language."""
    lines = []
    for name in ("base", *(f"{sense} specialist" for sense in SINGLE), "SSAM"):
        found = (rows[name]["cell"].get(cell) for cell in (*SINGLE, "text"))
        lines.append([name, *("–" if one is None else f"{100 * one['accuracy']:.1f}" for one in found)])
    return table(["model", *SINGLE, "language"], lines)


def _curve(axis: dict[str, Any], letter: str) -> str:
    """Accuracy by one of its values."""
    values = [f"**{value:.4g}**" if value == axis["default"] else f"{value:.4g}" for value, _ in axis["accuracy"]]
    return table([letter, *values], [["accuracy", *(f"{100 * share:.1f}" for _, share in axis["accuracy"])]])


def _contrast(one: dict[str, Any] | None, claim: str, paper: str) -> str:
    if one is None:
        return f"| {claim} | {paper} | not asked | – |"
    low, high = (100 * bound for bound in one["ci95"])
    seen = "not shown" if not one["real"] else "seen" if one["difference"] > 0 else "**the opposite**"
    return f"| {claim} | {paper} | {100 * one['difference']:+.1f} ({low:+.1f} to {high:+.1f}) | {seen} |"


def _singles(told: dict[str, Any]) -> list[str]:
    """The merged model against each specialist at what it is made for."""
    rows, ours = [], told["rows"]["SSAM"]["cell"]
    paper = {"image": "+2.2, +0.8", "audio": "+13.9, +20.0", "video": "+5.5, +1.4", "point": "–"}
    for cell in SINGLE:
        alone = told["rows"].get(f"{cell} specialist", {}).get("cell", {}).get(cell)
        if alone is None or cell not in ours:
            continue
        change = 100 * (ours[cell]["accuracy"] - alone["accuracy"])
        apart = ours[cell]["ci95"][0] > alone["ci95"][1] or ours[cell]["ci95"][1] < alone["ci95"][0]
        verdict = "not shown" if not apart else "seen" if change > 0 else "**the opposite**"
        rows.append(
            f"| the merge is better than the {cell} specialist at its own sense | {paper[cell]} | {change:+.1f} | {verdict} |"
        )
    return rows


def _language(told: dict[str, Any]) -> str:
    """What is left of the language model's knowledge."""
    ours = told["rows"]["SSAM"]["cell"]["text"]
    others = [row["cell"]["text"]["accuracy"] for name, row in told["rows"].items() if name.endswith("specialist")]
    best, worst = 100 * max(others, default=0.0), 100 * min(others, default=0.0)
    return (
        f"| language is kept (MMLU; here capitals) | 51.8 beside 42.6 to 50.5 | {100 * ours['accuracy']:.1f} beside {worst:.1f} to "
        f"{best:.1f} | {'seen' if 100 * ours['accuracy'] >= worst else '**not seen**'} |"
    )

"""The page of whether merging across architectures works, from the document of `benchmarks/across.py`."""

from typing import Any

CELLS = {"image": "pictures", "text": "capitals", "elements": "elements"}
PAGE = """# Does merging across architectures work?

A pair that runs here (`benchmarks/across.py`): the built-in image specialist, whose text and picture tokens have weights of their
own, written exactly as a CogVLM with fused attention and duplicated experts; and plain Llamas of the same base, mapped into it by
`target:`. The donor `elements` was fine-tuned for minutes on the chemical elements (`benchmarks/elements.py`), of which the target
knows nothing; it is asked in words that it was not trained on. \\* is real by McNemar's test, corrected for the table, and by the
paired interval. All of it is one decoder, converted, and one seed.

{check}
## By α, `linear`

{curves}
{methods}{search}"""


def page(told: dict[str, Any]) -> str:
    """The whole page, in Markdown; parts that were not run are left out."""
    methods = told.get("methods")
    return PAGE.format(
        check=_check(told["check"]) if "check" in told else "",
        curves="\n".join(_curves(one) for one in told["curves"]),
        methods=_methods(methods, told["curves"][-1]["alone"]) if methods else "",
        search=_search({donor: one for group in told["search"] for donor, one in group.items()})
        if "search" in told
        else "",
    )


def _check(one: dict[str, Any]) -> str:
    same = "all" if one["same_logits"] else "NOT all"
    return (
        f"The conversion gives the specialist's logits within {one['logits']:.1e} of their largest. Of a merge that was "
        f"written to files, {one['equal']} of {one['tensors']} tensors, and {same} logits, are those of the same merge in memory.\n"
    )


def _curves(table: dict[str, Any]) -> str:
    """One table: the target alone, and each donor at each α."""
    alone = table["alone"]
    donors = [name for name in table if name != "alone"]
    alphas = list(table[donors[0]])
    head = f"| {' / '.join(CELLS[cell] for cell in alone)} | target alone | {' | '.join(f'α = {alpha}' for alpha in alphas)} |"
    rows = [
        f"| {donor} | {_shares(alone, {})} | {' | '.join(_shares(alone, table[donor][alpha]) for alpha in alphas)} |"
        for donor in donors
    ]
    return "\n".join([head, f"|---|---|{'---|' * len(alphas)}", *rows, ""])


def _methods(found: dict[str, Any], alone: dict[str, float]) -> str:
    """Methods that merge the updates of the base, at their defaults."""
    rows = [f"| {name} | {' | '.join(_changed(one, cell) for cell in alone)} |" for name, one in found.items()]
    head = [f"| the donor's update by | {' | '.join(CELLS[cell] for cell in alone)} |", f"|---|{'---|' * len(alone)}"]
    target = f"| target alone | {' | '.join(f'{value:.2f}' for value in alone.values())} |"
    return "\n".join(["## By method, with the base\n", _gains(found, alone), *head, target, *rows, "", ""])


def _search(found: dict[str, Any]) -> str:
    """What AdaMMS's consistency chose without labels, by donor."""
    out = [
        "## α without labels (`modalloy search --objective consistency`)\n",
        "Accuracy is the mean of pictures and, where they are asked for, elements.\n",
        "| donor | α chosen | of bootstraps | accuracy | best α |",
        "|---|---|---|---|---|",
    ]
    for donor, one in found.items():
        of = {float(alpha): value for alpha, value in one["accuracy"].items()}
        chosen, best = one["chosen"], one["best"]
        out.append(
            f"| {donor} | {chosen:g} | {one['in_bootstrap']:.0%} | {of[chosen]:.2f} | {best:g}: {of[best]:.2f} |"
        )
    return "\n".join([*out, ""])


def _gains(found: dict[str, Any], alone: dict[str, float]) -> str:
    """Which methods bring something real, and which of these lose nothing that shows."""
    real = {
        name: [one[f"{cell} over target"]["difference"] > 0 for cell in alone if one[f"{cell} over target"]["real"]]
        for name, one in found.items()
    }
    gained = [name for name, signs in real.items() if any(signs)]
    free = [name for name in gained if all(real[name])]
    return (
        f"Of {len(found)} methods {len(gained)} bring a real gain; without a real loss in another column do so: "
        f"{', '.join(free) or 'none'}.\n"
    )


def _shares(alone: dict[str, float], one: dict[str, Any]) -> str:
    """ "0.65 / 0.93* / 0.22"."""
    cells = ((one.get(cell, alone[cell]), one.get(f"{cell} over target")) for cell in alone)
    return " / ".join(f"{share:.2f}{'*' if pair is not None and pair['real'] else ''}" for share, pair in cells)


def _changed(one: dict[str, Any], cell: str) -> str:
    pair = one[f"{cell} over target"]
    low, high = (100 * bound for bound in pair["ci95"])
    return f"{one[cell]:.2f}{'*' if pair['real'] else ''} ({low:+.0f} to {high:+.0f})"

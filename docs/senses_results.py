"""The page of whether merging works, from the document of `benchmarks/senses.py`."""

from collections.abc import Iterable
from typing import Any

CELLS = {  # cell of the benchmark → what the page calls it
    "image": "picture",
    "audio": "speech",
    "video": "motion",
    "point": "shape",
    "image+audio": "picture, asked aloud: yes or no",
    "video+audio": "moving picture, asked aloud: what, what kind, how",
    "image+video+audio": "picture and video, asked aloud: which",
    "image+audio human": "picture and a recorded human word",
    "text": "capitals, written",
}
SINGLE = ("image", "audio", "video", "point")
ALOUD = "image+audio"
OURS = "SSAM"
JOINT = "joint training"
OTHERS = ("Iso-C", "NaiveMC", JOINT)  # of which a run may lack some
PAGE = """# Does merging work?

`benchmarks/senses.py` asks {total} questions of the built-in specialists, of their merges, and of models beside them. Pictures
are by artists and speech is of a voice that no training file comes from; no specialist ever saw two media in one prompt.
Questions that are asked aloud come in groups in which whoever follows one sense alone is right no more often than by guessing.
Options are scored by likelihood; intervals are 95 % bootstraps of concepts and, within them, files.

{header}
{rows}

*Best blind answer*: the best of chance, the most frequent answer, and that of each kind of question. A specialist is asked what
needs no other sense than its own. *Joint training*: one update for all tokens, which starts where the specialists' did and is
trained on the four senses in turn, for as many steps as theirs together (`single_path.py --modality all --steps 1300`).{missing}

## What was aimed at

| aim | seen | met |
|---|---|---|
{aims}

## SSAM against the others

Over all {n} questions about media, in points, paired. *Primary* contrasts were named in advance; Holm's correction is within
each of the two groups. A star: interval and McNemar's corrected test both say that there is a difference.

| SSAM minus | | accuracy | p (Holm) | probability of the right option |
|---|---|---|---|---|
{contrasts}

<details><summary>By kind of question</summary>

{kinds}

</details>

Answering took {hours:.1f} hours of two processes on {cores} cores, a thread each.
"""


def page(told: dict[str, Any]) -> str:
    """The whole page, in Markdown."""
    cells = [cell for cell in CELLS if cell in told["cells"]]
    rows = [
        f"| {label} | {_joined(format(told['cells'][cell][key], '.3g') for cell in cells)} |"
        for label, key in (("questions", "n"), ("distinct media", "media"), ("best blind answer", "blind"))
    ]
    for name, found in told["rows"].items():
        rows.append(f"| {name} | {' | '.join(_share(found['cell'].get(cell)) for cell in cells)} |")
    return PAGE.format(
        total=sum(one["n"] for one in told["cells"].values()),
        header=f"| | {_joined(CELLS[cell] for cell in cells)} |\n|---|{'---|' * len(cells)}",
        rows="\n".join(rows),
        missing="".join(f"\nNot asked: *{name}*." for name in OTHERS if name not in told["rows"]),
        aims="\n".join(_aims(told)),
        n=max(one["n"] for one in told["ssam_minus"].values()),
        contrasts="\n".join(_contrasts(told)),
        kinds="\n".join(_kinds(told)),
        cores=told["machine"]["cores"],
        hours=sum(told["seconds"].values()) / 3600,
    )


def _aims(told: dict[str, Any]) -> list[str]:
    """What the benchmark was built to find out, and what it found; aims whose models were not asked are named as such."""
    rows, ours = told["rows"], told["rows"][OURS]["cell"]
    lines = []
    if ALOUD in ours:
        found = ours[ALOUD]["accuracy"]
        lines.append(
            f"| asked aloud about a picture: SSAM ≥ 0.80 where each sense alone has 0.50 | {found:.3f} | {_met(found >= 0.8)} |"
        )
    for cell in SINGLE:
        alone = rows.get(f"{cell} specialist", {}).get("cell", {}).get(cell)
        if alone and cell in ours:
            less = 100 * (ours[cell]["accuracy"] - alone["accuracy"])
            lines.append(
                f"| {CELLS[cell]}: SSAM ≥ the specialist − 2 points | {less:+.1f} points | {_met(less >= -2)} |"
            )
    for name, one in told["ssam_minus"].items():
        if one["primary"]:
            half = 50 * (one["ci95"][1] - one["ci95"][0])
            lines.append(
                f"| SSAM against {name}: an interval of ± 2 points or less | ± {half:.1f} | {_met(half <= 2)} |"
            )
    joint = told["ssam_minus"].get(JOINT)
    if joint is None:
        lines.append("| SSAM ≥ joint training − 3 points | not asked | – |")
    else:
        less = 100 * joint["difference"]
        lines.append(f"| SSAM ≥ joint training − 3 points | {less:+.1f} points | {_met(less >= -3)} |")
    return lines


def _contrasts(told: dict[str, Any]) -> list[str]:
    """SSAM minus every other merge, the primary contrasts first."""
    out = []
    for name, one in sorted(told["ssam_minus"].items(), key=lambda item: not item[1]["primary"]):
        cells = [
            name,
            "primary" if one["primary"] else "",
            _points(one["difference"], one["ci95"]) + ("*" if one["real"] else ""),
            f"{one['p_holm']:.3f}",
            _points(one["probability"], one["probability_ci95"], digits=2),
        ]
        out.append(f"| {_joined(cells)} |")
    return out


def _kinds(told: dict[str, Any]) -> list[str]:
    names = list(told["rows"])
    kinds = dict.fromkeys(kind for found in told["rows"].values() for kind in found["kind"])
    out = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for kind in kinds:
        shown = (told["rows"][name]["kind"].get(kind) for name in names)
        out.append(f"| {kind} | {_joined(map(_accuracy, shown))} |")
    return out


def _joined(cells: Iterable[str]) -> str:
    return " | ".join(cells)


def _accuracy(one: dict[str, Any] | None) -> str:
    return "–" if one is None else f"{one['accuracy']:.2f}"


def _met(value: bool) -> str:
    return "yes" if value else "**no**"


def _share(one: dict[str, Any] | None) -> str:
    return "–" if one is None else f"{one['accuracy']:.3f} ({one['ci95'][0]:.2f}–{one['ci95'][1]:.2f})"


def _points(value: float, interval: tuple[float, float], digits: int = 1) -> str:
    whole, low, high = (f"{100 * one:+.{digits}f}" for one in (value, *interval))
    return f"{whole} ({low} to {high})"

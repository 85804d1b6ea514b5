"""Do we get what the SSAM paper got? Its tables, with our runs beside the published numbers.

    python benchmarks/paper.py RUNS

RUNS is filled as `recipes/paper/README.md` says: RUNS/MERGE/ROW/… are folders of `modalloy eval`, MERGE is three, four,
alone or rank. Everything is computed from their logs by each task's headline rule, in the paper's units, with 95 %
bootstrap intervals by clip; `*`: not all questions were asked, or media could not be read. Prints Markdown.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from measuring import table

from modalloy.errors import ModalloyError
from modalloy.evals.benchmark import by_group
from modalloy.evals.log import Run, load_run
from modalloy.evals.modelcompose import SENSES
from modalloy.evals.statistics import bootstrap_interval

PUBLISHED = Path(__file__).parents[1] / "recipes" / "paper" / "published.json"
UNITS = {"ocrbench": 1000.0, "ocrbench_llava": 1000.0}  # right answers of 1,000; all else is percent
Cells = dict[str, tuple[float, str]]  # name → accuracy, and how it is printed


def cells(run: Run) -> Iterator[tuple[str, tuple[float, str]]]:
    """The cells that a run fills, by their names in published.json."""
    task, shown = run.meta["task"], run.meta["modalities"]
    samples = [entry.sample for entry in run.entries]
    parts = {task: list(range(len(samples)))}
    if task in ("music_avqa", "avqa"):
        parts = {f"{task} {'+'.join(one for one in SENSES if shown is None or one in shown)}": parts[task]}
    elif shown is not None:
        parts = {f"{task} {'+'.join(shown)}": parts[task]}
    elif task == "mcub3":
        parts |= {f"{task} {subset}": indices for (_, subset), indices in by_group(samples).items()}
    unit = UNITS.get(task, 100.0)
    right = [unit * verdict.correct for verdict in run.verdicts(next(iter(run.benchmark.rules)))]
    whole = len(samples) == run.meta["n_samples"] and all(entry.status == "ok" for entry in run.entries)
    for name, indices in parts.items():
        values = [right[index] for index in indices]
        low, high = bootstrap_interval(values, [samples[index].cluster for index in indices])
        mean = sum(values) / len(values)
        yield name, (mean, f"{mean:.2f} ({low:.1f} to {high:.1f}){'' if whole else '*'}")


def read(root: Path) -> dict[tuple[str, str], Cells]:
    """(merge, row) → what its runs found."""
    found: dict[tuple[str, str], Cells] = {}
    for path in sorted(root.glob("*/*/*/run.json")):
        merge, row = path.parts[-4:-2]
        for name, cell in cells(load_run(path.parent)):
            if name in found.setdefault((merge, row), {}):
                raise ModalloyError(
                    f"{path.parent}: is another run of '{name}' beside {merge}/{row}'s; keep one of them"
                )
            found[merge, row][name] = cell
    if not found:
        raise ModalloyError(f"{root}: holds no runs; fill it as recipes/paper/README.md says")
    return found


def beside(rows: dict[str, dict[str, float]], ours: dict[tuple[str, str], Cells]) -> str:
    """One table: each published row, and below it our runs of its recipes."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row if name != "average"))
    averaged = [name for name in columns if name != "mcub4"] if any("average" in row for row in rows.values()) else []
    head = columns + ["average"] * bool(averaged)
    lines = []
    for title, row in rows.items():
        lines.append([title, *(f"{row[name]:g}" if name in row else "–" for name in head)])
        for (merge, name), found in ours.items():
            if name.removesuffix("-factors") == title.lower().replace(" ", "-") and found.keys() & set(columns):
                line = [found[column][1] if column in found else "–" for column in columns]
                if averaged:
                    full = found.keys() >= set(averaged)
                    line.append(f"{sum(found[one][0] for one in averaged) / len(averaged):.2f}" if full else "–")
                lines.append([f"· {merge}/{name}", *line])
    return table(["", *head], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    try:
        ours = read(parser.parse_args().runs)
    except ModalloyError as error:
        sys.exit(f"error: {error}")
    tables = json.loads(PUBLISHED.read_text(encoding="utf-8"))["tables"]
    for title, rows in tables.items():
        print(f"## {title}\n\n{beside(rows, ours)}\n")
    known = {name for rows in tables.values() for row in rows.values() for name in row}
    others = [
        (f"{'/'.join(who)} {name}", cell[1])
        for who, found in ours.items()
        for name, cell in found.items()
        if name not in known
    ]
    print("\n".join(f"not in the paper: {name}: {text}" for name, text in others))


if __name__ == "__main__":
    main()

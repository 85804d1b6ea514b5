"""Does merging work? Held-out accuracy of the specialists and of every merge of them, by sense.

    python benchmarks/senses.py --data DIR [--run FILE]

Every answer is one line of the run file; a run that was stopped goes on where it was. Tables come from that file only.
Options are scored by likelihood. Intervals are 95 % bootstraps that resample concepts and, within them, files; those of
differences are paired. Prints Markdown for people and one JSON document as its last line.
"""

import argparse
import functools
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modalloy import builtin, merge
from modalloy.evals import senses
from modalloy.evals.senses import Question
from modalloy.model import ChatModel, load_model

RECIPES = Path(__file__).parents[1] / "recipes"
METHODS = {
    "average (= DAMC)": "senses-average",
    "task arithmetic": "senses-task-arithmetic",
    "SSAM (k = 8)": "senses-ssam",
}
OURS = "SSAM (k = 8)"
TOGETHER = (("image", "audio", "video"), ("image", "audio", "point"), ("image", "audio", "video", "point"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by `make data`")
    parser.add_argument("--run", type=Path, default=Path("build/senses-four-run.jsonl"), help="log of answers")
    args = parser.parse_args()
    clips = senses.load(args.data)
    cells = {modality: senses.single_questions(clips, modality) for modality in builtin.specialists()}
    cells["image+audio"] = senses.paired_questions(clips)
    for modalities in TOGETHER:
        cells["+".join(modalities)] = senses.joint_questions(clips, modalities)
    answers = ask_all(cells, args.run)
    print_tables(cells, answers)
    print(json.dumps(document(cells, answers)))


def models(cells: dict[str, list[Question]]) -> dict[str, tuple[Callable[[], ChatModel], list[str]]]:
    """Every row of the table: how to load it, and the cells that it can be asked."""
    rows: dict[str, tuple[Callable[[], ChatModel], list[str]]] = {}
    for modality in builtin.specialists():
        rows[f"{modality} specialist"] = (
            functools.partial(load_model, builtin.specialist(modality)),
            [cell for cell in cells if modality in cell.split("+")],
        )
    for name, recipe in METHODS.items():
        rows[name] = (functools.partial(merged, recipe), list(cells))
    return rows


def merged(recipe: str) -> ChatModel:
    out = Path("build") / recipe
    merge(RECIPES / f"{recipe}.yaml", out, overwrite=True)
    return load_model(out)


def ask_all(cells: dict[str, list[Question]], run: Path) -> dict[str, dict[str, bool]]:
    """Right or wrong by model and question id."""
    answers: dict[str, dict[str, bool]] = {}
    run.parent.mkdir(parents=True, exist_ok=True)
    if run.is_file():
        for line in run.read_text().splitlines():
            entry = json.loads(line)
            answers.setdefault(entry["model"], {})[entry["id"]] = entry["correct"]
    examiner = senses.Examiner()
    for name, (load, asked) in models(cells).items():
        done = answers.setdefault(name, {})
        todo = [question for cell in asked for question in cells[cell] if question.id not in done]
        if not todo:
            continue
        chat = load()
        with run.open("a") as log:
            for index, question in enumerate(todo, 1):
                done[question.id] = examiner.correct(chat, question)
                log.write(json.dumps({"model": name, "id": question.id, "correct": done[question.id]}) + "\n")
                if index % 50 == 0 or index == len(todo):
                    log.flush()
                    print(f"{name}: {index}/{len(todo)}", file=sys.stderr)
        del chat
        gc.collect()
    return answers


def accuracy(questions: list[Question], right: dict[str, bool]) -> tuple[float, float, float]:
    """Mean and its interval."""
    values = [float(right[question.id]) for question in questions]
    return sum(values) / len(values), *senses.clustered_interval(values, questions)


def document(cells: dict[str, list[Question]], answers: dict[str, dict[str, bool]]) -> dict[str, dict[str, Any]]:
    """Everything as one JSON object."""
    result: dict[str, dict[str, Any]] = {
        "chance": {},
        "majority": {},
        "n": {},
        "media": {},
        "accuracy": {},
        "ssam_minus": {},
    }
    for cell, questions in cells.items():
        result["chance"][cell] = senses.chance(questions)
        result["majority"][cell] = senses.majority(questions)
        result["n"][cell] = len(questions)
        result["media"][cell] = len({clip.path for question in questions for clip in question.clips})
        for name, right in answers.items():
            if questions[0].id in right:
                result["accuracy"].setdefault(name, {})[cell] = accuracy(questions, right)
        for name in METHODS:
            if name != OURS:
                result["ssam_minus"].setdefault(name, {})[cell] = difference(questions, answers, name)
    return result


def difference(
    questions: list[Question], answers: dict[str, dict[str, bool]], other: str
) -> tuple[float, float, float]:
    """SSAM's accuracy minus another method's on the same questions, with its paired interval."""
    values = [float(answers[OURS][q.id]) - float(answers[other][q.id]) for q in questions]
    return sum(values) / len(values), *senses.clustered_interval(values, questions)


def print_tables(cells: dict[str, list[Question]], answers: dict[str, dict[str, bool]]) -> None:
    """Accuracy by model and cell, differences to SSAM, and the kinds of questions."""
    print("| | " + " | ".join(cells) + " |")
    print("|---" * (len(cells) + 1) + "|")
    for cell_row, values in (
        ("questions", [str(len(questions)) for questions in cells.values()]),
        ("distinct media", [str(len({c.path for q in questions for c in q.clips})) for questions in cells.values()]),
        ("chance", [f"{senses.chance(questions):.3f}" for questions in cells.values()]),
        ("majority", [f"{senses.majority(questions):.3f}" for questions in cells.values()]),
    ):
        print(f"| {cell_row} | " + " | ".join(values) + " |")
    for name, right in answers.items():
        row = []
        for questions in cells.values():
            if questions[0].id in right:
                mean, low, high = accuracy(questions, right)
                row.append(f"{mean:.3f} ({low:.2f}–{high:.2f})")
            else:
                row.append("–")
        print(f"| {name} | " + " | ".join(row) + " |")
    for name in METHODS:
        if name != OURS:
            shown = [difference(questions, answers, name) for questions in cells.values()]
            print(
                f"| SSAM − {name} | "
                + " | ".join(f"{d:+.3f} ({low:+.2f} to {high:+.2f})" for d, low, high in shown)
                + " |"
            )
    print("\n| cell | kind | tier | n | chance | " + " | ".join(answers) + " |")
    print("|---" * (len(answers) + 5) + "|")
    for cell, questions in cells.items():
        for kind in dict.fromkeys(question.kind for question in questions):
            for tier in ("new source", "new file"):
                group = [q for q in questions if (q.kind, q.tier) == (kind, tier)]
                if not group:
                    continue
                shares = [
                    f"{sum(right[q.id] for q in group) / len(group):.2f}" if group[0].id in right else "–"
                    for right in answers.values()
                ]
                print(
                    f"| {cell} | {kind} | {tier} | {len(group)} | {senses.chance(group):.2f} | "
                    + " | ".join(shares)
                    + " |"
                )


if __name__ == "__main__":
    main()

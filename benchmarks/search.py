"""Can λ and k be chosen without labels? What `modalloy search` offers, on the built-in four-way merge, against labelled accuracy.

    python benchmarks/search.py --data DIR [--probes N] [--labelled N] [--out DIR] [--embedder MODEL]

Questions are of the `senses` benchmark's validation set (about files that the specialists were trained on; the merge saw
none). N of every cell are the probes, whose answers no label is read for, except by the objective `labels`; N others of every
cell measure each candidate's accuracy, options scored by likelihood. λ and k are varied one at a time, the other as in the
recipe; then consistency chooses both together, and the recipe is left in DIR. The log makes a stopped run go on.

Per axis and objective: the choice, its accuracy on the labelled questions, what it loses to the best candidate (regret) and
gains over the default, and Spearman's correlation of objective and accuracy over the candidates that could be chosen. Prints
Markdown for people and one JSON document as its last line.
"""

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

from measuring import machine, table

from modalloy.evals.benchmark import Sample, Source
from modalloy.evals.features import FeatureCache
from modalloy.evals.senses import samples
from modalloy.search import search
from modalloy.search.found import Found, Sweep
from modalloy.search.objective import grouped, spearman

RECIPE = Path(__file__).parent.parent / "recipes" / "senses-ssam.yaml"
AXES = ("scale=0.125:1.0:0.125", "rank=1,2,4,8,16,32")
OBJECTIVES: dict[str, dict[str, Any]] = {
    "consistency, sum": {"variant": "sum"},
    "consistency, union": {"variant": "union"},
    "consistency, one-sided": {"variant": "one-sided"},
    "consistency, sum, exact": {"variant": "sum", "match": "exact"},
    "consistency, sum, embedding": {"match": "embedding"},
    "consistency, sum, top1": {"match": "top1"},
    "consistency, sum, mean over senses": {"aggregate": "senses"},
    "consistency, sum, worst of the senses": {"aggregate": "minimax"},
    "agreement": {"objective": "agreement"},
    "agreement, mean over senses": {"objective": "agreement", "aggregate": "senses"},
    "agreement, worst of the senses": {"objective": "agreement", "aggregate": "minimax"},
    "labels (of the probes)": {"objective": "labels"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by `make data`")
    parser.add_argument("--out", type=Path, default=Path("build/search"), help="folder of the probes and the search")
    parser.add_argument("--probes", type=int, default=6, help="of every cell")
    parser.add_argument("--labelled", type=int, default=20, help="others of every cell")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--embedder", default="builtin:smollm2-135m-instruct", help="of the embedding match")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    probes, labelled = write_probes(args.data, args.out, args.probes, args.labelled)
    cache, folder = FeatureCache(args.out / "features"), args.out / "found"

    def run(file: Path, vary: list[str], **options: Any) -> Found:
        begin = time.perf_counter()

        def report(done: int, total: int) -> None:
            if done % 64 < 8:
                print(f"{vary}: {done} answers, {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)

        return search(
            args.recipe,
            file,
            folder,
            vary=vary,
            max_new_tokens=12,
            batch_size=8,
            cache=cache,
            embedder=args.embedder,
            resume=True,
            on_answer=report,
            **options,
        )

    document: dict[str, Any] = {"machine": machine()}
    for axis in AXES:
        name = axis.partition("=")[0]
        (truth,) = run(labelled, [axis], objective="labels").sweeps
        found = {label: run(probes, [axis], **options) for label, options in OBJECTIVES.items()}
        rows, document[name] = compared(name, truth, {label: one.sweeps[0] for label, one in found.items()})
        print(table(["", "chosen", "in bootstrap", "accuracy", "regret", "over default", "Spearman"], rows) + "\n")
        document[name]["cost"] = {label: one.cost for label, one in found.items()}
    both = run(probes, list(AXES))
    print(f"Together by consistency: {both.chosen}; " + "; ".join(both.warnings))
    document["together"] = {"chosen": both.chosen, "cost": both.cost, "warnings": both.warnings}
    print(json.dumps(document, allow_nan=False))


def write_probes(data: Path, out: Path, n: int, n_labelled: int) -> tuple[Path, Path]:
    """Files of n probes and n_labelled other questions of every cell about media."""
    questions = [one for one in samples(Source(data, variant="validation")) if one.media]
    files: list[list[Sample]] = [[], []]
    for own in grouped([one.group["cell"] for one in questions]).values():
        drawn = random.Random(0).sample(own, min(len(own), n + n_labelled))
        files[0] += [questions[index] for index in drawn[:n]]
        files[1] += [questions[index] for index in drawn[n:]]
    paths = out / "probe.jsonl", out / "labelled.jsonl"
    for path, chosen in zip(paths, files, strict=True):
        rows = {
            json.dumps(
                {
                    "text": one.text,
                    "media": [[modality, str(Path(file).resolve())] for modality, file in one.media],
                    "choices": list(one.choices),
                    "gold": list(one.golds),
                }
            ): None
            for one in chosen
        }
        path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return paths


def compared(name: str, truth: Sweep, found: dict[str, Sweep]) -> tuple[list[list[str]], dict[str, Any]]:
    """Rows of the table, and the same for machines: every objective against the labelled accuracy."""
    accuracy = dict(zip([one[name] for one in truth.candidates], truth.accuracy or [], strict=True))
    default = None if truth.default is None else truth.candidates[truth.default[0]][name]
    best = max(accuracy.values())
    document: dict[str, Any] = {"accuracy": accuracy, "default": default, "objectives": {}}
    rows = [["best candidate", shown(max(accuracy, key=lambda v: accuracy[v])), "", f"{best:.3f}", "", "", ""]]
    if default is not None:
        rows.append(
            ["default", shown(default), "", f"{accuracy[default]:.3f}", f"{best - accuracy[default]:.3f}", "", ""]
        )
    for label, sweep in found.items():
        values = [one[name] for one in sweep.candidates]
        able = [index for index, loss in enumerate(sweep.losses) if not math.isnan(loss)]
        rank = spearman([-sweep.losses[i] for i in able], [accuracy[values[i]] for i in able]) if able else None
        losses = {v: None if math.isnan(loss) else loss for v, loss in zip(values, sweep.losses, strict=True)}
        if sweep.chosen is None:
            rows.append([label, "none", "", "", "", "", "–"])
            document["objectives"][label] = {"losses": losses, "chosen": None}
            continue
        chosen, share = values[sweep.chosen], sweep.stability[sweep.chosen]
        gain = None if default is None else accuracy[chosen] - accuracy[default]
        rows.append(
            [label, shown(chosen), f"{share:.0%}", f"{accuracy[chosen]:.3f}", f"{best - accuracy[chosen]:.3f}"]
            + ["–" if one is None else f"{one:+.3f}" for one in (gain, rank)]
        )
        document["objectives"][label] = {
            "losses": losses,
            "chosen": chosen,
            "in_bootstrap": share,
            "accuracy": accuracy[chosen],
            "regret": best - accuracy[chosen],
            "over_default": gain,
            "spearman": rank,
        }
    return rows, document


def shown(value: float) -> str:
    return f"{value:g}"


if __name__ == "__main__":
    main()

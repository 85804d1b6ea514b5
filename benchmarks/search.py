"""Can λ and k be chosen without labels? What `modalloy search` offers, on several merges, against labelled accuracy.

    python benchmarks/elements.py --rank 8 --out build/references/elements-lora
    python benchmarks/search.py --data DIR [--merges NAME …] [--objectives NAME …] [--probes N] [--labelled N]

Merges: the recipe; "unequal norms", the first specialist's update counted four times; "with a skill", a LoRA that learned the
chemical elements added to the first specialist's text update; "without one", all specialists but the last; "two of them",
the first two alone. Questions are of the `senses` benchmark's validation set. N of every cell are the probes, whose answers no
label is read for, except by the objective `labels`; N others of every cell, and of the elements where a specialist learned
them, measure each candidate, options scored by likelihood. λ and k are varied one at a time, the other as in the recipe. The
logs in --out make a stopped run go on.

Per merge, axis and objective: the choice, its accuracy on the labelled questions, its regret (what it loses to the choice by
these labels, with a 95 % bootstrap of clusters, paired; that choice saw its own questions, so regrets are too large rather than
too small), what it gains over the recipe's own value, and Spearman's correlation of the objective with accuracy, and with the
mean probability of the right option, over the candidates that could be chosen. Then the same over all merges and axes, and
the best objective that reads no labels. Prints Markdown for people and one JSON document as its last line.
"""

import argparse
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import elements
import numpy as np
import torch
from measuring import machine, table
from safetensors.torch import load_file, save_file

from modalloy.errors import ModalloyError
from modalloy.evals.benchmark import Sample, Source
from modalloy.evals.features import FeatureCache
from modalloy.evals.senses import samples
from modalloy.evals.statistics import bootstrap_interval
from modalloy.planning.planner import plan
from modalloy.recipe import Recipe, load_recipe
from modalloy.search import search
from modalloy.search.found import Found, Sweep
from modalloy.search.objective import grouped, spearman
from modalloy.search.space import Axis, applied, default_axes, start
from modalloy.specialists.layouts import open_specialist

RECIPE = Path(__file__).parent.parent / "recipes" / "senses-ssam.yaml"
MERGES = ("recipe", "unequal norms", "with a skill", "without one", "two of them")
AXES = ("scale", "rank")
STEPS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)  # of λ, in units of the recipe's own
OBJECTIVES: dict[str, dict[str, Any]] = {
    "consistency, sum": {"objective": "consistency"},
    "consistency, union": {"objective": "consistency", "variant": "union"},
    "consistency, one-sided": {"objective": "consistency", "variant": "one-sided"},
    "consistency, by meaning": {"objective": "consistency", "match": "embedding"},
    "consistency, by expected tokens": {"objective": "consistency", "match": "top1"},
    "agreement": {"objective": "agreement"},
    "agreement, worst of the senses": {"objective": "agreement", "aggregate": "minimax"},
    "kl": {"objective": "kl"},
    "kl, mean over senses": {"objective": "kl", "aggregate": "senses"},
    "kl, worst of the senses": {"objective": "kl", "aggregate": "minimax"},
    "option_agreement": {"objective": "option_agreement"},
    "option_agreement, weighted": {"objective": "option_agreement", "variant": "weighted"},
    "labels of the probes": {"objective": "labels"},
    "labels of the probes, probability": {"objective": "labels", "variant": "probability"},
}
FIGURES = ("regret", "over_default", "spearman", "spearman_probability")


@dataclass(frozen=True)
class Questions:
    """The files that a search is asked with, and what the labelled questions depend on, in their order."""

    probes: Path
    labelled: Path
    clusters: list[tuple[str, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by `make data`")
    parser.add_argument("--out", type=Path, default=Path("build/search"), help="folder of probes, models and searches")
    parser.add_argument("--merges", nargs="+", choices=MERGES, default=MERGES, metavar="NAME", help=", ".join(MERGES))
    parser.add_argument("--axes", nargs="+", choices=AXES, default=AXES, metavar="NAME", help="scale (λ), rank (k)")
    parser.add_argument("--objectives", nargs="+", choices=list(OBJECTIVES), default=list(OBJECTIVES), metavar="NAME")
    parser.add_argument("--probes", type=int, default=10, help="of every cell")
    parser.add_argument("--labelled", type=int, default=40, help="others of every cell")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--elements", type=Path, default=Path("build/references/elements-lora"), help="of elements.py")
    parser.add_argument("--embedder", default="builtin:smollm2-135m-instruct", help="of the match by meaning")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    given = load_recipe(args.recipe)
    recipes = {name: merge_of(name, given, args.elements, args.out) for name in args.merges}
    cache = FeatureCache(args.out / "features")
    document: dict[str, Any] = {"machine": machine(), "probes": args.probes, "labelled": args.labelled, "merges": {}}
    for name, recipe in recipes.items():
        document["merges"][name] = of_merge(name, recipe, args, cache)
    document["overall"] = overall(document["merges"])
    labels_free = {label: one for label, one in document["overall"].items() if not label.startswith("labels")}
    document["best"] = min(labels_free, key=lambda label: labels_free[label]["regret"]) if labels_free else None
    rows = [[label, *(signed(one[figure]) for figure in FIGURES), f"{one['seconds']:.0f}"] for label, one in
            document["overall"].items()]  # fmt: skip
    print("## All merges and axes\n")
    print(table(["", "mean regret", "over default", "Spearman", "Spearman, probability", "seconds"], rows) + "\n")
    print(f"Least mean regret without labels: {document['best']}\n")
    print(json.dumps(document, allow_nan=False))


def merge_of(name: str, recipe: Recipe, lora: Path, out: Path) -> Recipe:
    """The recipe of one of MERGES."""
    planned = plan(recipe)
    first = planned.specialists[0]
    if name == "unequal norms":
        return applied(recipe, {f"weight.{first.label}": 4.0})
    content = recipe.model_dump()
    if name == "with a skill":
        if not lora.is_dir():
            raise ModalloyError(
                f"{lora}: no such folder; make it with benchmarks/elements.py --rank, or leave the merge out"
            )
        content["models"][0]["model"] = str(skilled(first.folder, lora, out / "skilled").resolve())
    if name == "without one":
        content["models"] = content["models"][:-1]
    if name == "two of them":
        content["models"] = content["models"][:2]
    return Recipe(**content, folder=recipe.folder)


def skilled(specialist: Path, lora: Path, out: Path) -> Path:
    """A copy of a specialist in ModelCompose's layout whose text update is its own and a LoRA's together.

    The factors stand side by side; those of its own tokens are filled up with zeros to the same rank. One that is there is
    kept: to a search's log a file that was written again is another.
    """
    if (out / "config.json").is_file():
        return out
    skill, own = open_specialist(lora, label="skill"), load_file(specialist / "adapter_model.safetensors")
    config = json.loads((specialist / "config.json").read_text())
    rank, scale = config["lora_r"], config["lora_alpha"] / config["lora_r"]
    added = max(update.rank for update in skill.text_lora.values())
    tensors = {}
    for name, tensor in own.items():
        stem, _, side = name.partition(".lora_")
        if side:
            axis = 0 if side.startswith("A") else 1
            shape = [added if index == axis else size for index, size in enumerate(tensor.shape)]
            more = torch.zeros(shape)
            if side.endswith(".default.weight"):
                update = skill.text_lora[f"{stem}.weight"]
                more = (
                    skill.read(update.a).float() if axis == 0 else skill.read(update.b).float() * update.scale / scale
                )
            tensor = torch.cat([tensor.float(), more], axis)
        tensors[name] = tensor.contiguous()
    out.mkdir(parents=True, exist_ok=True)
    for file in specialist.glob("*.jinja"):
        shutil.copyfile(file, out / file.name)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    changed = {"lora_r": rank + added, "lora_alpha": config["lora_alpha"] * (rank + added) / rank}
    (out / "config.json").write_text(json.dumps(config | changed, indent=2))
    return out


def of_merge(name: str, recipe: Recipe, args: argparse.Namespace, cache: FeatureCache) -> dict[str, Any]:
    """Every objective on both axes of a merge."""
    folder, planned = args.out / name.replace(" ", "-"), plan(recipe)
    senses = {str(specialist.modality) for specialist in planned.specialists}
    questions = write_questions(args.data, folder, senses, args.probes, args.labelled, skill=name == "with a skill")

    def run(file: Path, axis: Axis, **options: Any) -> Found:
        begin = time.perf_counter()

        def report(done: int, total: int) -> None:
            if done % 64 < 8:
                print(
                    f"{name}, {axis.name}: {done} answers, {time.perf_counter() - begin:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )

        vary = [f"{axis.name}={','.join(map(repr, axis.values))}"]
        given = {"max_new_tokens": 12, "batch_size": 8, "embedder": args.embedder, "resume": True, "strategy": "grid"}
        return search(recipe, file, folder / "found", vary=vary, cache=cache, on_answer=report, **given | options)

    own = start(planned, [Axis("scale", ())])["scale"]
    ranks = next(axis for axis in default_axes(planned) if axis.name == "rank")
    axes = {"scale": Axis("scale", tuple(own * step for step in STEPS)), "rank": ranks}
    document = {}
    for axis in (axes[one] for one in args.axes):
        truth, share = (
            run(questions.labelled, axis, objective="labels", variant=variant).sweeps[0]
            for variant in ("accuracy", "probability")
        )
        found = {label: run(questions.probes, axis, **OBJECTIVES[label]) for label in args.objectives}
        document[axis.name] = compared(axis.name, truth, share, found, questions.clusters)
        print(f"## {name}: {axis.name}\n")
        print(table(["", "chosen", "in bootstrap", "accuracy", "regret", "over default", "Spearman", "Spearman, probability",
                     "seconds"], rows_of(document[axis.name])) + "\n")  # fmt: skip
    return document


def write_questions(data: Path, folder: Path, senses: set[str], n: int, n_labelled: int, *, skill: bool) -> Questions:
    """Files of n probes and n_labelled other questions of every cell about media that these senses take."""
    asked = [one for one in samples(Source(data, variant="validation")) if one.media]
    asked = [one for one in asked if {modality for modality, _ in one.media} <= senses]
    rows = {row(one): one for one in asked}  # a question once
    files: list[dict[str, Sample]] = [{}, {}]
    for own in grouped([one.group["cell"] for one in rows.values()]).values():
        drawn = random.Random(0).sample(own, min(len(own), n + n_labelled))
        for file, places in zip(files, (drawn[:n], drawn[n:]), strict=True):
            file |= {list(rows)[place]: list(rows.values())[place] for place in places}
    if skill:
        files[1] |= {row(one): one for one in random.Random(0).sample(elements.samples(), n_labelled)}
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "probe.jsonl", folder / "labelled.jsonl"
    for path, chosen in zip(paths, files, strict=True):
        path.write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return Questions(*paths, [one.cluster for one in files[1].values()])


def row(sample: Sample) -> str:
    """A question as a line of a file of probes."""
    media = [[modality, str(Path(file).resolve())] for modality, file in sample.media]
    return json.dumps({"text": sample.text, "media": media, "choices": sample.choices, "gold": sample.golds})


def compared(
    name: str, truth: Sweep, share: Sweep, found: dict[str, Found], clusters: Sequence[tuple[str, ...]]
) -> dict[str, Any]:
    """Every objective against what the labelled questions say of each candidate."""
    assert truth.accuracy is not None and truth.chosen is not None
    values = [one[name] for one in truth.candidates]
    accuracy, probability = dict(zip(values, truth.accuracy, strict=True)), dict(zip(values, share.losses, strict=True))
    best, default = truth.chosen, truth.home
    document: dict[str, Any] = {
        "labelled": truth.loss.shape[1],
        "accuracy": list(accuracy.items()),
        "probability": [[value, None if math.isnan(loss) else 1 - loss] for value, loss in probability.items()],
        "best": values[best],
        "default": None if default is None else values[default],
        "objectives": {},
    }
    for label, one in found.items():
        sweep = one.sweeps[0]
        own = [candidate[name] for candidate in sweep.candidates]
        able = [index for index, loss in enumerate(sweep.losses) if not math.isnan(loss)]
        told: dict[str, Any] = {
            "losses": [
                [value, None if math.isnan(loss) else loss] for value, loss in zip(own, sweep.losses, strict=True)
            ],
            "chosen": None,
            "cost": one.cost,
        }
        document["objectives"][label] = told
        if sweep.chosen is None:
            continue
        chosen = own[sweep.chosen]
        lost = truth.loss[values.index(chosen)] - truth.loss[best]  # 1 where only the best is right
        shares = [-probability[own[index]] for index in able]
        told |= {
            "chosen": chosen,
            "in_bootstrap": sweep.stability[sweep.chosen],
            "accuracy": accuracy[chosen],
            "regret": truth.accuracy[best] - accuracy[chosen],
            "regret_ci95": None if np.isnan(lost).any() else bootstrap_interval(lost.tolist(), clusters),
            "over_default": None if default is None else accuracy[chosen] - truth.accuracy[default],
            "spearman": spearman([-sweep.losses[i] for i in able], [accuracy[own[i]] for i in able]),
            "spearman_probability": None
            if any(map(math.isnan, shares))
            else spearman([-sweep.losses[i] for i in able], shares),
        }
    return document


def rows_of(document: dict[str, Any]) -> list[list[str]]:
    """The rows of a table of one merge and axis."""
    accuracy = dict(document["accuracy"])
    best, default = document["best"], document["default"]
    rows = [["choice by these labels", f"{best:g}", "", f"{accuracy[best]:.3f}", *[""] * 5]]
    if default is not None:
        lost = accuracy[best] - accuracy[default]
        rows.append(["default", f"{default:g}", "", f"{accuracy[default]:.3f}", f"{lost:.3f}", *[""] * 4])
    for label, one in document["objectives"].items():
        seconds = f"{one['cost']['seconds']['all']:.0f}"
        if one["chosen"] is None:
            rows.append([label, "none", *[""] * 6, seconds])
            continue
        interval = "" if one["regret_ci95"] is None else " ({:.3f} to {:.3f})".format(*one["regret_ci95"])
        rows.append([label, f"{one['chosen']:g}", f"{one['in_bootstrap']:.0%}", f"{one['accuracy']:.3f}",
                     f"{one['regret']:.3f}{interval}", *(signed(one[figure]) for figure in FIGURES[1:]), seconds])  # fmt: skip
    return rows


def overall(merges: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of every objective the means over merges and axes, the worst regret, and the seconds of all its searches.

    An objective that can choose nothing keeps the recipe's own value, whose regret then counts.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for axes in merges.values():
        for axis in axes.values():
            accuracy = dict(axis["accuracy"])
            for label, one in axis["objectives"].items():
                kept = {} if one["chosen"] is not None else dict.fromkeys(FIGURES)
                if one["chosen"] is None and axis["default"] is not None:
                    kept |= {"regret": accuracy[axis["best"]] - accuracy[axis["default"]], "over_default": 0.0}
                found.setdefault(label, []).append(one | kept)
    told = {}
    for label, ones in found.items():
        means = {figure: [one[figure] for one in ones if one[figure] is not None] for figure in FIGURES}
        told[label] = {
            **{figure: sum(own) / len(own) if own else None for figure, own in means.items()},
            "worst_regret": max(means["regret"]),
            "seconds": sum(one["cost"]["seconds"]["all"] for one in ones),
        }
    return told


def signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"


if __name__ == "__main__":
    main()

"""What does a merge across architectures give? A CogVLM and Llamas of one ancestor, merged by mapping, per α and per method.

    python benchmarks/across.py --data DIR [--references DIR] [--elements DIR] [--only PART …]

The built-in image specialist is written as a CogVLM (`experts.py`): its text tokens and its picture tokens use weights of their
own. Donors are Llamas that were fine-tuned on other data or otherwise: the single-path models of
`examples/specialists/single_path.py` (in DIR; without them their rows are left out), and the text paths of the other built-in
specialists. What a donor senses with is not merged, so nothing it hears can come along: the questions are those about pictures
and the capitals of the `senses` benchmark, and the target alone (α = 0) is what a merge must beat. One more donor knows what
the target does not, the chemical elements (`elements.py`); it is asked about these too.

Parts: `check` (the conversion, and one merge through files against the same in memory), `curves` (accuracy per donor and α),
`methods` (those that merge updates, with the base), `search` (α by AdaMMS's consistency of answers to validation questions,
without labels), `reverse` (a LLaVA as the target, the CogVLM as the donor). Every candidate is computed by the function that
`modalloy merge` writes files with, and set in memory; its answers are a run in --out, so a stopped benchmark goes on where it
was. Intervals are 95 % bootstraps of concepts and, within them, files; differences to the target are paired, and * marks
those that McNemar's test, corrected for all candidates of a table, and the interval both call real. Prints Markdown for
people and one JSON document as its last line.
"""

import argparse
import functools
import gc
import json
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import elements
import experts
import torch
from measuring import machine, table
from torch import Tensor

from modalloy import builtin, merge
from modalloy.compute import compute, survey
from modalloy.evals import find_benchmark
from modalloy.evals.ask import evaluate
from modalloy.evals.benchmark import Benchmark, Sample, Source
from modalloy.evals.compare import Paired, compare
from modalloy.evals.features import FeatureCache
from modalloy.evals.log import Run, load_run
from modalloy.evals.scores import result
from modalloy.evals.statistics import holm
from modalloy.model import ChatModel, load_model
from modalloy.model.chat import user_message
from modalloy.model.load import Stored
from modalloy.planning.plan import Plan
from modalloy.planning.planner import plan
from modalloy.recipe import Output, Recipe, SpecialistEntry
from modalloy.search import search
from modalloy.search.objective import spearman
from modalloy.storage.folder import read_json
from modalloy.storage.locate import open_base

CELLS = ("image", "text")
PICTURES = 200  # of the questions about one picture, drawn with one seed
SKILL = "elements"  # a donor, and the questions about what it alone knows
ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 1.0)
PARTS = ("check", "curves", "methods", "search", "reverse")
# methods that merge updates of the base, at their defaults but for ssam's k: a full matrix does not tell that its update has
# rank 8. The average is α = 0.5, and so is ssam where k is as large as the ranks together
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "task arithmetic": ("task_arithmetic", {}),
    "TIES": ("ties", {}),
    "DARE-TIES": ("dare_ties", {}),
    "MetaGPT": ("metagpt", {}),
    "SSAM, k = 8": ("ssam", {"rank": 8}),
    "TSV": ("tsv", {}),
    "OptMerge": ("optmerge", {}),
    "Iso-C": ("iso_c", {}),
    "WUDI": ("wudi", {}),
    "KnOTS": ("knots", {}),
}
SEARCHED = ALPHAS[:-1]  # AdaMMS's, with 0
CHECKED = 0.3  # the α of the merge that goes through files
BATCH = 8


@dataclass(frozen=True)
class Bench:
    """The folders of one benchmark, and the one model that is in memory."""

    data: Path
    out: Path
    references: Path
    elements: Path
    cache: FeatureCache
    chats: dict[Path, ChatModel]

    def target(self, name: str) -> Path:
        """Folder of a converted model, made when it is first wanted: "cogvlm", or a donor's name."""
        if name == SKILL:
            return self.elements
        folder = self.out / "models" / name.replace(" ", "-")
        if not folder.is_dir():
            source = builtin.specialist("image") if name == "cogvlm" else self.sources()[name]
            (experts.write_cogvlm if name == "cogvlm" else experts.write_llava)(source, folder)
        return folder

    def sources(self) -> dict[str, Path]:
        """The donors' specialists, by what the table calls them."""
        single = {f"{m} single-path": self.references / m for m in builtin.specialists()}
        found = {name: folder for name, folder in single.items() if folder.is_dir()}
        return found | {f"{m} text path": builtin.specialist(m) for m in builtin.specialists() if m != "image"}

    def chat(self, folder: Path) -> ChatModel:
        """The model of a target, whose weights candidates then replace."""
        if folder not in self.chats:
            self.chats.clear()
            gc.collect()
            self.chats[folder] = experts.load(folder)
        return self.chats[folder]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by `make data`")
    parser.add_argument("--out", type=Path, default=Path("build/across"), help="folder of converted models and runs")
    parser.add_argument("--references", type=Path, default=Path("build/references/same"), help="single-path models")
    parser.add_argument("--elements", type=Path, default=Path("build/references/elements"), help="of elements.py")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--donors", nargs="+", metavar="NAME", help="only these; methods take the first")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help="only these"
    )
    args = parser.parse_args()
    bench = Bench(args.data, args.out, args.references, args.elements, FeatureCache(args.out / "features"), {})
    groups = [list(bench.sources()), [SKILL] if args.elements.is_dir() else []]  # a table each
    groups = [[one for one in group if not args.donors or one in args.donors] for group in groups]
    groups = [group for group in groups if group]
    document: dict[str, Any] = {"machine": machine()}
    for part in args.only:
        begin = time.perf_counter()
        if part == "check":
            document[part] = check(bench, groups[0][0])
        elif part == "curves":
            document[part] = [curves(bench, "cogvlm", group) for group in groups]
        elif part == "methods":
            document[part] = methods(bench, "cogvlm", groups[-1][0], args.methods)
        elif part == "search":
            document[part] = [searches(bench, "cogvlm", group) for group in groups]
        elif "image single-path" in bench.sources():
            document[part] = curves(bench, "image single-path", ["cogvlm"])
        print(f"{part}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    print(json.dumps(document, allow_nan=False))


def recipe_of(bench: Bench, target: str, donors: Sequence[str], method: str = "linear", **parameters: Any) -> Recipe:
    """The recipe of a merge of converted models."""
    return Recipe(
        base_model="" if method == "linear" else builtin.BASE,
        target=str(bench.target(target).resolve()),
        merge_method=method,
        parameters=parameters,
        models=tuple(SpecialistEntry(model=str(bench.target(donor).resolve())) for donor in donors),
        output=Output(form="full"),
    )


def merged(planned: Plan) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a merge would write, one by one."""
    read, surveys = planned.inputs.read, survey(planned.merges(), planned.inputs.read)
    for job in planned.jobs:
        computed = compute(job, read, surveys=surveys)
        for spec, tensor in zip(job.outputs, computed.tensors, strict=True):
            yield spec.name, tensor


def asked(bench: Bench, name: str, recipe: Recipe) -> Run:
    """The run of a candidate, finished if it was not. With the skilled donor it is asked about the elements too."""
    skilled = recipe.models[0].model == str(bench.elements.resolve())
    name += " with elements" if skilled else ""
    folder, start = bench.out / "runs" / "".join(c if c.isalnum() else "-" for c in name), time.perf_counter()
    if (folder / "done").is_file():
        return load_run(folder)
    planned = plan(recipe)

    def load() -> ChatModel:
        chat = bench.chat(planned.target.folder)
        experts.set_weights(chat, merged(planned), read_json(planned.target.folder / "config.json"))
        print(f"{name}: merged in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        return chat

    benchmark = find_benchmark("senses")
    few = replace(benchmark, samples=functools.partial(of_cells, benchmark, skilled=skilled))
    identity: dict[str, Any] = {"path": name, "fingerprint": planned.fingerprint, "recipe": None, "options": {}}
    source = Source(bench.data, variant="test", modalities=("image",))
    run = evaluate(load, identity, few, source, folder, resume=True, batch_size=BATCH, cache=bench.cache)
    (folder / "done").touch()
    print(f"{name}: {shown(run)}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return run


def of_cells(benchmark: Benchmark, source: Source, *, skilled: bool) -> list[Sample]:
    """PICTURES questions about one picture, and those of text."""
    found = {cell: [one for one in benchmark.samples(source) if one.group["cell"] == cell] for cell in CELLS}
    drawn = random.Random(0).sample(found["image"], min(PICTURES, len(found["image"])))
    return [*drawn, *found["text"], *(elements.samples() if skilled else [])]


def curves(bench: Bench, target: str, donors: Sequence[str]) -> dict[str, Any]:
    """Accuracy of the target alone, and per donor and α."""
    alone = asked(bench, f"{target} alone", recipe_of(bench, target, donors[:1], alpha=0.0))
    runs = {
        (donor, alpha): asked(bench, f"{donor} into {target} {alpha:g}", recipe_of(bench, target, [donor], alpha=alpha))
        for donor in donors
        for alpha in ALPHAS
    }
    found = against(alone, runs)
    print(f"{target} alone: {', '.join(interval(alone, cell) for cell in accuracies(alone))}\n")
    rows = [[donor, *(marked(runs[donor, alpha], found[donor, alpha]) for alpha in ALPHAS)] for donor in donors]
    print(table([" / ".join(accuracies(alone)), *(f"α = {alpha:g}" for alpha in ALPHAS)], rows) + "\n")
    return {"alone": accuracies(alone)} | {
        donor: {f"{alpha:g}": accuracies(runs[donor, alpha]) | figures(found[donor, alpha]) for alpha in ALPHAS}
        for donor in donors
    }


def methods(bench: Bench, target: str, donor: str, names: Sequence[str]) -> dict[str, Any]:
    """Accuracy of the methods that merge updates, the target's and the donor's, each from the base that both started from."""
    alone = asked(bench, f"{target} alone", recipe_of(bench, target, [donor], alpha=0.0))
    runs = {
        name: asked(bench, f"{donor} into {target} {name}", recipe_of(bench, target, [donor], method, **parameters))
        for name in names
        for method, parameters in [METHODS[name]]
    }
    found = against(alone, runs)
    cells = accuracies(alone)
    rows = [[name, *(difference(found[name][cell]) for cell in cells)] for name in names]
    print(table([f"{donor} into {target}", *cells], rows) + "\n")
    return {name: accuracies(runs[name]) | figures(found[name]) for name in names}


def searches(bench: Bench, target: str, donors: Sequence[str]) -> dict[str, Any]:
    """What AdaMMS's consistency of answers chooses without labels, against the accuracy that the curves have."""
    probes = write_probes(bench, skilled=SKILL in donors)
    alone = asked(bench, f"{target} alone", recipe_of(bench, target, donors[:1], alpha=0.0))
    rows, document = [], {}
    for donor in donors:
        recipe = recipe_of(bench, target, [donor], alpha=ALPHAS[0])
        found = search(
            recipe,
            probes,
            bench.out / "search" / donor.replace(" ", "-"),
            max_new_tokens=12,
            batch_size=BATCH,
            cache=bench.cache,
            resume=True,
            load=functools.partial(served, bench),
        )
        (sweep,) = found.sweeps
        accuracy = {0.0: worth(alone)}
        for alpha in SEARCHED:
            run = asked(bench, f"{donor} into {target} {alpha:g}", recipe_of(bench, target, [donor], alpha=alpha))
            accuracy[alpha] = worth(run)
        losses = {
            candidate["alpha"]: loss
            for candidate, loss in zip(sweep.candidates, sweep.losses, strict=True)
            if not math.isnan(loss)
        }
        chosen, best = found.chosen["alpha"], max(accuracy, key=lambda alpha: (accuracy[alpha], -alpha))
        rank = spearman([-loss for loss in losses.values()], [accuracy[alpha] for alpha in losses])
        share = 0.0 if sweep.chosen is None else sweep.stability[sweep.chosen]
        rows.append(
            [
                donor,
                f"{chosen:g} ({share:.0%})",
                f"{accuracy[chosen]:.2f}",
                f"{best:g}: {accuracy[best]:.2f}",
                *(
                    f"{100 * (accuracy[chosen] - other):+.0f}"
                    for other in (accuracy[best], accuracy[0.1], accuracy[0.0])
                ),
                "–" if rank is None else f"{rank:+.2f}",
            ]
        )
        document[donor] = {"chosen": chosen, "in_bootstrap": share, "losses": losses, "accuracy": accuracy}
        document[donor] |= {"best": best, "spearman": rank, "cost": found.cost, "warnings": found.warnings}
    header = [
        "donor",
        "α chosen (in bootstrap)",
        "accuracy",
        "best α",
        "over best",
        "over 0.1",
        "over target",
        "Spearman",
    ]
    print(table(header, rows) + "\n")
    return document


def served(bench: Bench, planned: Plan, tensors: dict[str, Stored]) -> ChatModel:
    """The model in memory with a candidate's tensors, for `search`."""
    chat, config = bench.chat(planned.target.folder), read_json(planned.target.folder / "config.json")
    experts.set_weights(chat, ((name, stored[...]) for name, stored in tensors.items()), config)
    return chat


def worth(run: Run) -> float:
    """Accuracy about pictures; where the elements are asked for too, the mean of both."""
    found = [accuracy for cell, accuracy in accuracies(run).items() if cell != "text"]
    return sum(found) / len(found)


def write_probes(bench: Bench, *, skilled: bool) -> Path:
    """The questions about one picture of the validation set, without answers or choices; with the skilled donor, questions about
    a third of the elements too."""
    asked_there = find_benchmark("senses").samples(Source(bench.data, variant="validation", modalities=("image",)))
    rows = {
        json.dumps({"text": one.text, "media": [[m, str(Path(file).resolve())] for m, file in one.media]}): None
        for one in asked_there
        if one.group["cell"] == "image"
    }
    if skilled:
        rows |= {json.dumps({"text": elements.TESTED.format(name)}): None for name in elements.NAMES[::3]}
    path = bench.out / f"probe{'-elements' if skilled else ''}.jsonl"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def against(alone: Run, runs: dict[Any, Run]) -> dict[Any, dict[str, Paired]]:
    """Every run's difference to the target alone, by cell, its p corrected for all these runs and cells."""
    compared = {key: compare(alone, run).groups["likelihood"]["cell"] for key, run in runs.items()}
    places = [(key, cell) for key in runs for cell in compared[key]]
    adjusted = holm([compared[key][cell].p for key, cell in places])
    for (key, cell), p in zip(places, adjusted, strict=True):
        compared[key][cell] = replace(compared[key][cell], p_adjusted=p)
    return compared


def accuracies(run: Run) -> dict[str, Any]:
    """Accuracy by cell."""
    found = result(run)["groups"]["cell"]
    return {cell: found[cell]["acc"] for cell in (*CELLS, SKILL) if cell in found}


def shown(run: Run) -> str:
    """ "0.65 / 0.93"."""
    return " / ".join(f"{accuracy:.2f}" for accuracy in accuracies(run).values())


def marked(run: Run, pairs: dict[str, Paired]) -> str:
    """The same, with * where the difference to the target is real."""
    return " / ".join(f"{acc:.2f}{'*' if pairs[cell].real else ''}" for cell, acc in accuracies(run).items())


def interval(run: Run, cell: str) -> str:
    """A cell's accuracy with its interval."""
    found = result(run)["groups"]["cell"][cell]
    low, high = found["ci95_clustered"] or found["ci95"]
    return f"{cell} {found['acc']:.2f} ({low:.2f}–{high:.2f})"


def difference(pair: Paired) -> str:
    """A run's accuracy, and by how many points it differs from the target alone."""
    low, high = pair.ci95
    real = "*" if pair.real else ""
    return f"{pair.acc_b:.2f} ({100 * pair.difference:+.0f}{real}, {100 * low:+.0f} to {100 * high:+.0f})"


def figures(pairs: dict[str, Paired]) -> dict[str, Any]:
    """Differences for machines."""
    return {
        f"{cell} over target": {
            "difference": pair.difference,
            "ci95": pair.ci95,
            "p_adjusted": pair.p_adjusted,
            "real": pair.real,
        }
        for cell, pair in pairs.items()
    }


def check(bench: Bench, donor: str) -> dict[str, Any]:
    """The conversion there and back against the specialist itself, and a merge through files against the same in memory."""
    question = user_message("What is this?", [("image", str(builtin.SAMPLES / "dog.webp"))])
    seen, answers = [], []
    for load in (lambda: load_model(builtin.specialist("image")), lambda: experts.load(bench.target("cogvlm"))):
        chat = load()
        seen.append(logits(chat, question))
        answers.append(chat.chat(question))
        del chat
    apart = float((seen[0] - seen[1]).abs().max() / seen[0].abs().max())
    recipe = recipe_of(bench, "cogvlm", [donor], alpha=CHECKED)
    report = merge(recipe, bench.out / "merged", overwrite=True)
    written = open_base(report.out)
    equal = [name for name, tensor in merged(plan(recipe)) if torch.equal(tensor, written.read(written.refs[name]))]
    reloaded = logits(experts.load(report.out), question)
    chat = bench.chat(bench.target("cogvlm"))
    experts.set_weights(chat, merged(plan(recipe)), read_json(report.out / "config.json"))
    same = torch.equal(reloaded, logits(chat, question))
    print(
        f"conversion: logits within {apart:.1e} of their largest, answers {answers[0]!r} and {answers[1]!r}; merge of {donor} "
        f"at α = {CHECKED} in {report.merge_s:.1f} s: {report.verification.layers} layers recomputed, {len(equal)} of "
        f"{len(written.refs)} tensors and {'all' if same else 'NOT all'} logits of the folder are those in memory\n"
    )
    return {"logits": apart, "answers": answers, "tensors": len(written.refs), "equal": len(equal), "same_logits": same}


@torch.no_grad()
def logits(chat: ChatModel, question: list[dict[str, Any]]) -> Tensor:
    """What the model gives after every token of a question."""
    inputs = chat.processor.apply_chat_template(question, tokenize=True, add_generation_prompt=True)
    found: Tensor = chat.model(**inputs).logits
    return found


if __name__ == "__main__":
    main()

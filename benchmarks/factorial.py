"""When do merging methods differ, and what says so beforehand? Pairs of specialists, trained anew in every corner of a design.

    python benchmarks/factorial.py --data DIR --stage-1 DIR [--corners NAME …]

Twelve corners. Where the updates start: at random from a seed of each sense (`independent`) or of both (`common`), or with A
orthogonal to what the other sense's prompts give the layer (`osrm`; Zhang and Zhou, "Unraveling LoRA interference", arXiv
2505.22934). Their size: rank 8 and 64 steps (`small`), or rank 32, twice the steps and four times A's
rate (`large`). What each learns in writing beside its sense (`private`: atomic numbers, products; `conflict`: both are asked the
same about an element, one answers its number, the other its symbol).

In every corner a picture and a speech specialist are merged by every method at its defaults, and by SSAM at a fourth of its
rank and with norms matched (`match: norm`), and asked validation questions. The figures of `inspect` that are to tell a
method's distance from averaging beforehand are chosen on one half of the corners (`CHOOSING`) and tested on the other. Corners
that are done are kept in --work and not run again.
Prints Markdown for people and one JSON document as its last line.
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from elements import NAMES
from measuring import machine, table
from safetensors.torch import load_file
from scipy.stats import spearmanr
from torch import Tensor, nn

from modalloy import builtin, merge
from modalloy.evals import corpus, senses
from modalloy.evals.ask import answers
from modalloy.evals.benchmark import Sample, Source
from modalloy.evals.features import FeatureCache
from modalloy.evals.statistics import bootstrap_interval
from modalloy.inspection.figures import Inspection, median
from modalloy.inspection.measure import inspect
from modalloy.model import load_model
from modalloy.model.routing import TEXT
from modalloy.recipe import Output, Recipe, SpecialistEntry

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "specialists"))
import train
from trainer import Trainer

SENSES = ("image", "audio")
STARTS, SIZES, SKILLS = (
    ("independent", "common", "osrm"),
    ("small", "large"),
    ("private", "conflict"),
)
RANK = {"small": 8, "large": 32}
STEPS = {"small": 64, "large": 128}
# the method and its parameters; `rank` in shares of the specialists' own
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("average", "ssam", "task_arithmetic", "ties", "tsv", "wudi")},
    "ssam, k = r/4": ("ssam", {"rank": 0.25}),
    "ssam, norms matched": ("ssam", {"match": "norm"}),
}
OTHERS = [name for name in METHODS if name != "average"]
ASKED = {"image": 60, "audio": 60, "image+audio": 80}  # validation questions of each cell
FACTS = 40  # questions of each skill
SKILLED = 3  # every third batch teaches the skill
SEED = 0
SYMBOLS: list[str] = re.findall(
    r"\w+",
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Y Zr Nb Mo Tc Ru Rh "
    "Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr "
    "Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og",
)
NUMBERS = {f"What is the atomic number of {name}?": str(number) for number, name in enumerate(NAMES, 1)}
PRODUCTS = {f"What is {a} times {b}?": str(a * b) for a in range(2, 14) for b in range(a, 14)}
FACTS_OF = {
    ("private", "image"): NUMBERS,
    ("private", "audio"): PRODUCTS,
    ("conflict", "image"): {f"What stands for {name}?": str(number) for number, name in enumerate(NAMES, 1)},
    ("conflict", "audio"): {f"What stands for {n}?": symbol for n, symbol in zip(NAMES, SYMBOLS, strict=True)},
}


@dataclass(frozen=True)
class Corner:
    """One setting of the three factors."""

    start: str
    size: str
    skill: str

    @property
    def name(self) -> str:
        return f"{self.start}-{self.size}-{self.skill}"


CORNERS = [Corner(*chosen) for chosen in product(STARTS, SIZES, SKILLS)]
CHOOSING = {  # every other corner, like the white fields of a chessboard
    c.name for c in CORNERS if (STARTS.index(c.start) + SIZES.index(c.size) + SKILLS.index(c.skill)) % 2 == 0
}


class Skilled(Trainer):
    """Stage 2 of a specialist, every third batch of which teaches facts in writing to the text update alone."""

    facts: dict[str, str]
    rate_of_a = 1.0

    def parameters(self, stage: int) -> list[dict[str, Any]]:
        """As the trainer's, with A's rate apart."""
        found = []
        down = {
            id(getattr(linear, f"down_{owner}")) for linear in self.model.linears.values() for owner in linear.scales
        }
        for group in super().parameters(stage):
            for chosen in (False, True):
                params = [p for p in group["params"] if (id(p) in down) == chosen]
                found.append({"params": params, "lr": group["lr"] * (self.rate_of_a if chosen else 1.0)})
        return found

    def batches(self, stage: int, done: int) -> Iterator[Any]:
        """Lessons, and in every third place a batch of facts."""
        lessons, draw, count = super().batches(stage, 0), random.Random(SEED), 0
        while True:
            count += 1
            facts = count % SKILLED == 0
            batch = draw.sample(sorted(self.facts.items()), 3 * self.args.batch) if facts else next(lessons)
            if count > done:
                yield batch

    def loss(self, batch: Any) -> Tensor:
        """Mean cross-entropy of the answers' tokens, in nats."""
        if not isinstance(batch[0], tuple):
            return super().loss(batch)
        said = [([{"role": "user", "content": question}], answer) for question, answer in batch]
        return self.cross_entropy(said, lambda ids, owner: self.model.embed(ids, owner, {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by `make data`")
    parser.add_argument("--stage-1", type=Path, required=True, help="train.py's work folders: features and projectors")
    parser.add_argument(
        "--work", type=Path, default=Path("build/factorial"), help="specialists and answers of each corner"
    )
    parser.add_argument("--corners", nargs="+", choices=[corner.name for corner in CORNERS], help="run only these")
    parser.add_argument("--steps", type=float, default=1.0, help="share of the steps, to try the program")
    args = parser.parse_args()
    for corner in CORNERS:
        place = args.work / f"{corner.name}.json"
        if not place.is_file() and (args.corners is None or corner.name in args.corners):
            found = run(corner, args)
            place.write_text(json.dumps(found))
            print(f"{corner.name}: {found['accuracy']}", file=sys.stderr, flush=True)
    places = {corner.name: args.work / f"{corner.name}.json" for corner in CORNERS}
    done = {name: json.loads(place.read_text()) for name, place in places.items() if place.is_file()}
    document = {"machine": machine(), "corners": done, **predicted(done)}
    print(report(document))
    print(json.dumps(document, allow_nan=False))


def run(corner: Corner, args: argparse.Namespace) -> dict[str, Any]:
    """Train a corner's specialists, measure them, merge them by every method and ask the results."""
    folder = args.work / corner.name
    for modality in SENSES:
        if not (folder / modality / "config.json").is_file():
            specialist(corner, modality, args, folder / modality)
    entries = tuple(SpecialistEntry(model=str((folder / m).resolve()), modality=m) for m in SENSES)
    recipe = Recipe(
        base_model=builtin.BASE, merge_method="ssam", models=entries, output=Output(form="omni", dtype="float32")
    )
    questions, features = asked(corner, args.data), FeatureCache()
    accuracy = {}
    for modality in SENSES:
        alone = [q for q in questions if own(q, modality)]
        asking = partial(rights, folder / modality, alone, features)
        accuracy[modality] = grouped(alone, kept(folder / f"{modality}.json", asking))

    def of_merge(function: str, parameters: dict[str, Any]) -> list[bool]:
        rank = {"rank": int(parameters["rank"] * RANK[corner.size])} if "rank" in parameters else {}
        chosen = {"merge_method": function, "parameters": parameters | rank}
        merge(recipe.model_copy(update=chosen), folder / "merged", overwrite=True)
        return rights(folder / "merged", questions, features)

    merged = {
        method: kept(folder / f"{method.replace('/', ' of ')}.json", partial(of_merge, *chosen))
        for method, chosen in METHODS.items()
    }
    accuracy |= {method: grouped(questions, one) for method, one in merged.items()}
    return {"figures": figures(inspect(recipe)), "accuracy": accuracy, "minus_average": differences(questions, merged)}


def specialist(corner: Corner, modality: str, args: argparse.Namespace, out: Path) -> None:
    """Train one specialist of a corner."""
    torch.manual_seed(SEED)
    clips, work = corpus.load(args.data), args.stage_1 / modality
    rank = RANK[corner.size]
    model, processor = train.build([modality], clips, rank=rank)
    own = argparse.Namespace(
        modality=modality, work=work, views=train.VIEWS[modality], seed=SEED, batch=8, align=600, lr=(5e-4, 2e-4)
    )
    chosen = train.training_clips(clips, modality)
    trainer = Skilled(model, processor, train.cached_features(model, processor, chosen, own), chosen, own)
    model.projectors[modality].load_state_dict(load_file(work / "aligned.safetensors"))
    trainer.blind = train.blind_projectors(trainer)
    begin(corner, modality, model, args)
    trainer.facts = FACTS_OF[corner.skill, modality]
    trainer.rate_of_a = 4.0 if corner.size == "large" else 1.0
    own.work = out.with_name(f"{modality}-work")
    own.work.mkdir(parents=True, exist_ok=True)
    own.steps, own.save_every = (0, max(2, round(STEPS[corner.size] * args.steps))), 40
    trainer.train(2)
    train.save_specialist(model, modality, out)


@torch.no_grad()
def begin(corner: Corner, modality: str, model: Any, args: argparse.Namespace) -> None:
    """Where the text update starts; the modality's own starts at random, as in `train.py`."""
    directions = least_used(modality, args.data, args.stage_1) if corner.start == "osrm" else {}
    generator = torch.Generator().manual_seed(SEED)
    for name, linear in model.linears.items():
        down = getattr(linear, f"down_{TEXT}").data
        if corner.start == "common":
            down.copy_((torch.rand(down.shape, generator=generator) * 2 - 1) / down.shape[1] ** 0.5)
        elif corner.start == "osrm":
            least = directions[name][: len(down)]
            down.copy_((least * down.norm() / least.norm()).to(down.dtype))


@cache
@torch.no_grad()
def least_used(modality: str, data: Path, stage_1: Path) -> dict[str, Tensor]:
    """Of every linear layer the 32 directions (32, in), float64, that 64 prompts of the other sense use least, orthonormal."""
    (other,) = (one for one in SENSES if one != modality)
    clips = corpus.load(data)
    model, processor = train.build([other], clips)
    model.projectors[other].load_state_dict(load_file(stage_1 / other / "aligned.safetensors"))
    own = argparse.Namespace(modality=other, work=stage_1 / other, views=train.VIEWS[other], seed=SEED, batch=8)
    chosen = train.training_clips(clips, other)
    trainer = Trainer(model, processor, train.cached_features(model, processor, chosen, own), chosen, own)
    sums: dict[str, Tensor] = {}

    def adding(name: str) -> Any:
        def add(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            rows = given[0].flatten(0, -2).double()
            sums[name] = sums.get(name, torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)) + rows.T @ rows

        return add

    hooks = [linear.register_forward_pre_hook(adding(name)) for name, linear in model.linears.items()]
    batches = trainer.batches(2, 0)
    for _ in range(8):
        trainer.loss(next(batches))
    for hook in hooks:
        hook.remove()
    return {
        name: torch.linalg.eigh(total).eigenvectors[:, : max(RANK.values())].T.clone() for name, total in sums.items()
    }


def asked(corner: Corner, data: Path) -> list[Sample]:
    """Validation questions about media, and of each skill whether its right answer is told from three others."""
    every = senses.samples(Source(data, variant="validation", modalities=SENSES))
    found = [q for cell, count in ASKED.items() for q in [q for q in every if q.group["cell"] == cell][:count]]
    for modality in SENSES:
        facts, draw = FACTS_OF[corner.skill, modality], random.Random(SEED)
        for text in draw.sample(sorted(facts), FACTS):
            others = draw.sample(sorted(set(facts.values()) - {facts[text]}), 3)
            options = tuple(draw.sample([facts[text], *others], 4))
            found.append(
                Sample(
                    id=f"{modality} skill {text}",
                    text=text,
                    golds=(facts[text],),
                    choices=options,
                    options=options,
                    group={"cell": f"{modality} skill"},
                    cluster=(text,),
                )
            )
    return found


def own(question: Sample, modality: str) -> bool:
    """Whether a specialist alone can be asked: its own sense, and what it learned in writing."""
    return question.group["cell"] in (modality, f"{modality} skill")


def rights(model: Path, questions: Sequence[Sample], features: FeatureCache) -> list[bool]:
    """Whether each question is answered rightly, by likelihood."""
    entries = [e for batch in answers(load_model(model), list(enumerate(questions)), 0, 8, features) for e in batch]
    entries.sort(key=lambda entry: entry.index)
    return [senses.by_likelihood(entry.sample, entry.answer).correct for entry in entries]


def kept(place: Path, asking: Callable[[], list[bool]]) -> list[bool]:
    """What `asking` gives, from the file that an earlier run wrote if there is one."""
    if not place.is_file():
        place.write_text(json.dumps(asking()))
    found: list[bool] = json.loads(place.read_text())
    return found


def grouped(questions: Sequence[Sample], right: Sequence[bool]) -> dict[str, float]:
    """Accuracy by cell, and the mean over cells."""
    cells: dict[str, list[bool]] = {}
    for question, one in zip(questions, right, strict=True):
        cells.setdefault(question.group["cell"], []).append(one)
    found = {cell: sum(values) / len(values) for cell, values in cells.items()}
    return found | {"all": sum(found.values()) / len(found)}


def differences(questions: Sequence[Sample], right: dict[str, list[bool]]) -> dict[str, Any]:
    """Every method minus averaging on the same questions, with paired clustered intervals."""
    clusters = [question.cluster for question in questions]
    found = {}
    for method in OTHERS:
        values = [float(a) - float(b) for a, b in zip(right[method], right["average"], strict=True)]
        found[method] = {"difference": sum(values) / len(values), "ci95": bootstrap_interval(values, clusters)}
    return found


def figures(found: Inspection) -> dict[str, float | None]:
    """The medians of `inspect`'s figures over all weights."""
    pairs = [pair for slot in found.slots for pair in slot.pairs]
    updates = [(slot.k, update) for slot in found.slots for update in slot.updates]
    norms = [specialist.norm for specialist in found.specialists]
    return {
        "cosine": median(pair.cosine for pair in pairs),
        "input overlap": median(pair.right_overlap for pair in pairs),
        "output overlap": median(pair.left_overlap for pair in pairs),
        "stable rank / k": median(u.stable_rank / k if u.stable_rank and k else None for k, u in updates),
        "norm ratio": max(norms) / min(norms),
        "norm": median(norms),
        "sign conflict": median(pair.sign_conflict for pair in pairs),
    }


def predicted(corners: dict[str, Any]) -> dict[str, Any]:
    """For each method the figure whose rank correlation with its distance from averaging is largest on the choosing corners,
    and that correlation on the others."""
    found = {}
    for method in OTHERS if len(corners) >= 8 else ():
        rho = {}
        for figure in next(iter(corners.values()))["figures"]:
            for chosen in (True, False):
                own = [one for name, one in corners.items() if (name in CHOOSING) == chosen]
                pairs = [(one["figures"][figure], one["minus_average"][method]["difference"]) for one in own]
                value = float(spearmanr(*zip(*pairs, strict=True)).statistic)
                rho[figure, chosen] = value if value == value else 0.0
        best = max((figure for figure, chosen in rho if chosen), key=lambda figure: abs(rho[figure, True]))
        found[method] = {"figure": best, "chosen_on": rho[best, True], "tested_on": rho[best, False]}
    return {"predictors": found}


def report(document: dict[str, Any]) -> str:
    """Tables of the corners: each method minus averaging, in points, and the figures."""
    rows, names = [], OTHERS
    for name, one in document["corners"].items():
        told = one["minus_average"]
        cells = [
            f"{100 * told[m]['difference']:+.1f}{'*' if not told[m]['ci95'][0] <= 0 <= told[m]['ci95'][1] else ''}"
            for m in names
        ]
        numbers = ["–" if value is None else f"{value:.2f}" for value in one["figures"].values()]
        rows.append([name, f"{one['accuracy']['average']['all']:.2f}", *cells, *numbers])
    head = ["corner", "average", *names]
    return table([*head, *next(iter(document["corners"].values()), {"figures": {}})["figures"]], rows)


if __name__ == "__main__":
    main()

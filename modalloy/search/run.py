"""search(recipe, probe, out): serve candidates, ask them the probes, choose, and write a recipe that is ready to merge."""

import itertools
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from modalloy.errors import MediaError, ModalloyError, RecipeError, nearest, shown
from modalloy.evals.benchmark import LETTERS, Answer, Sample
from modalloy.evals.features import FeatureCache
from modalloy.evals.run import is_text
from modalloy.evals.runner import answers
from modalloy.evals.scoring import normalized_match, parse_letter
from modalloy.planning.differences import settled_plan
from modalloy.planning.kinship import check_kinship
from modalloy.planning.plan import Plan
from modalloy.recipe import Recipe, load_recipe
from modalloy.search.candidates import Server, distance
from modalloy.search.embedding import EMBEDDER, Embedder
from modalloy.search.folder import check_out, write
from modalloy.search.found import Found, Sweep
from modalloy.search.objective import (
    Aggregate,
    Health,
    Match,
    Point,
    Table,
    Variant,
    compared,
    degenerate,
    grouped,
    health,
    inconsistency,
    scripts,
)
from modalloy.search.probes import read_probes
from modalloy.search.space import Axis, Changes, default_axes, parse_axes, start
from modalloy.search.target import LoadedTarget, Loader, PlacedTarget, serve_target, target_senses
from modalloy.search.trials import Trials

Objective = Literal["consistency", "labels", "agreement"]
OBJECTIVES = get_args(Objective)
STRATEGIES = ("auto", "grid", "coordinate", "tpe", "random")
PASSES = 2  # over the axes, coordinate by coordinate
TARGET = "target"  # in the log: the model of α = 0
SAME = 1e-4  # relative distance below which two merges are one
FACTORS = ("alpha", "scale")  # of the whole update: their steps are known, and would be blurred by tensors of few bits
ALIKE = 0.01  # steps between neighbours that differ by less count as even
Line = dict[str, Any]


def search(
    recipe: Recipe | str | Path,
    probe: str | Path,
    out: str | Path,
    *,
    vary: Iterable[str] = (),
    objective: Objective = "consistency",
    variant: Variant = "sum",
    match: Match = "normalised",
    embedder: str = EMBEDDER,
    aggregate: Aggregate = "probes",
    strategy: str = "auto",
    trials: int = 30,
    max_new_tokens: int = 32,
    batch_size: int = 1,
    cache: FeatureCache | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    resume: bool = False,
    allow_base_mismatch: bool = False,
    load: Loader | None = None,
    on_answer: Callable[[int, int], None] = lambda done, total: None,
) -> Found:
    """The recipe with the parameters that `objective` prefers, in `out`/recipe.yaml, with log, figures and a page.

    Args:
        recipe: a Recipe of `form: omni` or with a `target`, or the path of its YAML file.
        probe: file of probes (see `read_probes`).
        out: folder of recipe.yaml, trials.jsonl, search.json and index.html.
        vary: axes as `NAME=VALUES` (see `parse_axes`); without any, λ and k of ssam, or α of linear.
        objective: "consistency" chooses the candidate whose answers differ least from its neighbours' (AdaMMS 3.3), with
            no labels; "labels" the most accurate; "agreement" the one to which the specialists' own answers to probes of
            one sense are likeliest (mean nats a token, teacher-forced).
        variant: of consistency, see `objective.inconsistency`.
        match: how consistency compares answers: "normalised" or "exact" (see `objective.compared`), "embedding" (1 − cosine
            of the embeddings of the answers), or "top1", for which nothing but the recipe's own answers is generated: the
            share of their tokens before which neighbours expect another next one, teacher-forced.
        embedder: folder or hub id of the model of `match="embedding"`, see `embedding.Embedder`.
        aggregate: of the losses of probes, see `objective.totals`.
        strategy: "grid" of all combinations; "coordinate": one axis after the other, the others held; "tpe" or "random":
            samplers of Optuna. "auto" is grid for one axis, else coordinate.
        trials: candidates that a sampler may try.
        max_new_tokens: of an answer; one that is as long counts as over-long.
        cache: encoder features shared with other runs.
        resume: go on with the log in `out`.
        load: makes a model of a plan and all tensors of its checkpoint by name, for a target whose architecture modalloy
            does not run (see `target.LoadedTarget`).
        on_answer: called with (answers there are, answers that are expected at most).

    Raises:
        ModalloyError: the recipe, the probes, an axis or the folder is not fit for it.
    """
    out = Path(out)
    check_out(out, [Path(probe)] if isinstance(recipe, Recipe) else [Path(recipe), Path(probe)])
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    _check_recipe(recipe, load)
    probes = read_probes(Path(probe))
    planned = settled_plan(recipe, allow_base_mismatch=allow_base_mismatch)
    axes = parse_axes(vary, recipe) or default_axes(planned)
    _check_known(objective, strategy, variant, match, aggregate)
    strategy = _strategy(strategy, axes, objective, variant, aggregate)
    _check_probes(probes, planned, objective, load)
    if planned.across is not None and not allow_base_mismatch:
        check_kinship(planned)  # as the merge will
    by_meaning = objective == "consistency" and match == "embedding"
    meaning = Embedder(embedder, device) if by_meaning else None
    lengths = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "dtype": dtype, "device": device}
    with Trials(out, {"inputs": planned.fingerprint, **lengths}, resume=resume) as log:
        asking = _Asking(
            planned, axes, probes, log, cache or FeatureCache(), lengths, allow_base_mismatch, load, on_answer
        )
        compare = _Compare(asking, objective, variant, match, aggregate, meaning)
        if strategy == "coordinate":
            chosen, sweeps, settled = _by_coordinate(compare, axes)
        else:
            chosen, sweep = _whole(compare, axes, strategy, trials)
            sweeps, settled = [sweep], True
        settings = {
            "method": recipe.merge_method,
            **({} if recipe.target is None else {"target": planned.target_name}),
            "objective": objective,
            **({"variant": variant, "match": match} if objective == "consistency" else {}),
            **({"embedder": embedder} if by_meaning else {}),
            "aggregate": aggregate,
            "strategy": strategy,
            "probes": len(probes),
            "senses": {name: len(own) for name, own in grouped([p.group["senses"] for p in probes]).items()},
            "axes": {axis.name: list(axis.values) for axis in axes},
        }
        found = Found(out, chosen, start(planned, axes), sweeps, settled, settings, asking.cost())
    write(found, recipe)
    return found


class _Asking:
    """Answers of candidates to the probes: from the log, else from the one model in memory."""

    def __init__(
        self,
        planned: Plan,
        axes: list[Axis],
        probes: list[Sample],
        log: Trials,
        cache: FeatureCache,
        lengths: dict[str, Any],
        allow_base_mismatch: bool,
        load: Loader | None,
        on_answer: Callable[[int, int], None],
    ) -> None:
        self.planned, self.probes, self.log, self.cache, self.lengths = planned, probes, log, cache, lengths
        self.allow_base_mismatch, self.load, self.on_answer = allow_base_mismatch, load, on_answer
        self.home = start(planned, axes)
        self.expected = 0
        self.used: dict[str, Line] = {}  # lines of the log that this search wanted
        self.serving = ""

    @cached_property
    def server(self) -> Server | PlacedTarget | LoadedTarget:
        """Loaded when there is something to ask, and every medium encoded once."""
        begin = time.perf_counter()
        options = {"device": self.lengths["device"], "dtype": self.lengths["dtype"]}
        options["allow_base_mismatch"] = self.allow_base_mismatch
        across = self.planned.recipe.target is not None
        found = serve_target(self.planned, self.load, **options) if across else Server(self.planned, **options)
        loaded = time.perf_counter()
        for modality, path in dict.fromkeys(medium for probe in self.probes for medium in probe.media):
            self.cache.features(found.chat, modality, path)
        seconds = {"load_s": loaded - begin, "features_s": time.perf_counter() - loaded}
        if across:
            size = self.planned.write_bytes
        else:
            size = sum(one.numel() * one.element_size() for one in found.chat.model.parameters())
        self.log.add("loaded", seconds | {"checkpoint_bytes": size})
        return found

    def sketch(self, changes: Changes) -> list[float]:
        """Numbers that stand for a candidate's merge."""
        key = f"served {self._key(changes)}"
        if key not in self.log.lines:
            self._serve(changes)
        self.used[key] = self.log.lines[key]
        found: list[float] = self.used[key]["sketch"]
        return found

    def ask(self, changes: Changes, asked: Sequence[Sample], *, predict: bool = False) -> list[Line]:
        """Lines of a candidate's answers: generated, or likelihoods of a sample's options where it has some, or with
        `predict` the likeliest token at every place of its option."""
        # the target itself is a parent too, and asked once
        is_target = self.planned.recipe.target is not None and not any(self.sketch(changes))
        name = TARGET if is_target else self._key(changes)
        return self._lines(name, lambda: self._serve(changes), asked, predict)

    @cached_property
    def parents(self) -> dict[str, Line]:
        """The answer of the specialist of its sense to every probe of one sense, by the probe's id; or of the target to all."""
        found: dict[str, Line] = {}
        if self.planned.recipe.target is not None:
            lines = self._lines(TARGET, lambda: self._serve_parent(0), self.probes)
            return {probe.id: line for probe, line in zip(self.probes, lines, strict=True)}
        for index, specialist in enumerate(self.planned.specialists):
            own = [probe for probe in self.probes if {m for m, _ in probe.media} == {specialist.modality}]
            if own:
                name = f"parent {specialist.modality}"
                lines = self._lines(name, lambda at=index: self._serve_parent(at), own)  # type: ignore[misc]
                found |= {probe.id: line for probe, line in zip(own, lines, strict=True)}
        return found

    def _lines(
        self, name: str, serve: Callable[[], None], asked: Sequence[Sample], predict: bool = False
    ) -> list[Line]:
        mark = " · top1" if predict else ""
        keys = [f"{name} · {probe.id} · {json.dumps(probe.options)}{mark}" for probe in asked]
        todo = [(index, probe) for index, probe in enumerate(asked) if keys[index] not in self.log.lines]
        if todo:
            serve()
            size, limit = self.lengths["batch_size"], self.lengths["max_new_tokens"]
            for entries in answers(self.server.chat, todo, limit, size, self.cache, predict=predict):
                for entry in entries:
                    if entry.status != "ok":
                        kind = MediaError if entry.status == "media_error" else ModalloyError
                        raise kind(
                            f"{entry.error}; use a smaller --batch-size" if entry.status == "oom" else entry.error
                        )
                    line: Line = {"model": name, "probe": entry.sample.id, "text": entry.answer.text}
                    line |= {"likelihoods": list(entry.answer.likelihoods), "n_out": entry.new_tokens}
                    line |= {"predicted": list(entry.answer.predicted)} if predict else {}
                    self.log.add(keys[entry.index], line | {"seconds": round(entry.seconds, 4)})
                self._progress()
        self.used |= {key: self.log.lines[key] for key in keys}
        self._progress()
        return [self.log.lines[key] for key in keys]

    def _serve(self, changes: Changes) -> None:
        key = f"served {self._key(changes)}"
        if self.serving == key:
            return
        server, begin = self.server, time.perf_counter()
        sketch = server.serve(changes)
        self.serving = key
        if key not in self.log.lines:
            self.log.add(key, {"sketch": sketch, "seconds": round(time.perf_counter() - begin, 4)})

    def _serve_parent(self, index: int) -> None:
        self.server.serve_parent(index)
        self.serving = f"parent {index}"

    def _key(self, changes: Changes) -> str:
        """A candidate's name in the log: what of it is not as in the recipe."""
        return json.dumps({n: v for n, v in changes.items() if v != self.home[n]}, sort_keys=True)

    def _progress(self) -> None:
        done = sum("probe" in line for line in self.log.lines.values())
        self.on_answer(done, max(done, self.expected))

    def cost(self) -> dict[str, Any]:
        """Merges, answers and seconds of this search, and an estimate of the published way: every candidate written as a
        full checkpoint, loaded, and asked with its encoders run again (from the times measured here; writing not counted)."""
        loaded = self.log.lines["loaded"]
        served = [line for key, line in self.used.items() if key.startswith("served ")]
        asked = [line for line in self.used.values() if "probe" in line]
        models = {line["model"] for line in asked if not line["model"].startswith("parent ")}
        of_candidates = sum(line["seconds"] for line in asked if not line["model"].startswith("parent "))
        each = loaded["load_s"] + loaded["features_s"] + of_candidates / max(1, len(models))
        serving_s, answers_s = (sum(line["seconds"] for line in lines) for lines in (served, asked))
        return {
            "merges": len(served),
            "candidates_asked": len(models),
            "generated": sum(line["n_out"] > 0 for line in asked),
            "scored": sum(line["n_out"] == 0 for line in asked),
            "seconds": {
                "load": round(loaded["load_s"], 2),
                "features": round(loaded["features_s"], 2),
                "merges": round(serving_s, 2),
                "answers": round(answers_s, 2),
                "all": round(loaded["load_s"] + loaded["features_s"] + serving_s + answers_s, 2),
            },
            "written_checkpoints": 0,
            "published_way": {
                "written_bytes": len(served) * loaded["checkpoint_bytes"],
                "answers": len(served) * len(self.probes),
                "seconds_estimate": round(len(served) * each + serving_s, 2),
            },
        }


@dataclass
class _Compare:
    """Makes tables of losses of candidates."""

    asking: _Asking
    objective: Objective
    variant: Variant
    match: Match
    aggregate: Aggregate
    embedder: Embedder | None

    def axis(self, axis: Axis, others: Changes) -> Sweep:
        """The values of one axis, the others held. Of merges that are the same, the lowest value stands for all."""
        home = start(self.asking.planned, [axis])[axis.name]
        kept: list[Any] = []
        sketches: list[list[float]] = []
        duplicates: dict[str, Any] = {}
        for value in axis.values:
            changes = others | {axis.name: value}
            sketch = self.asking.sketch(changes)
            if axis.ordered and sketches and _is_same(sketch, sketches[-1]):
                duplicates[json.dumps(value)] = kept[-1]
                home = kept[-1] if value == home else home
                continue
            kept.append(value)
            sketches.append(sketch)
            self._lines(changes)
        default = (kept.index(home),) if home in kept else None
        steps: list[float] = []
        if self.objective == "consistency" and axis.name in FACTORS:
            steps = [high - low for low, high in itertools.pairwise(kept)]
        elif self.objective == "consistency":
            steps = [distance(*pair) for pair in itertools.pairwise(sketches)]
        uneven = len(steps) > 1 and max(steps) - min(steps) > ALIKE * max(steps)
        candidates = [others | {axis.name: value} for value in kept]
        return self._sweep(
            [axis], candidates, [(index,) for index in range(len(kept))], default, duplicates, steps if uneven else None
        )

    def points(self, axes: list[Axis], points: list[Point]) -> Sweep:
        """Points of the grid that the axes span."""
        home = start(self.asking.planned, axes)
        places = [axis.values.index(home[axis.name]) if home[axis.name] in axis.values else -1 for axis in axes]
        default = tuple(places) if tuple(places) in points else None
        return self._sweep(axes, [self.at(axes, point) for point in points], points, default, {}, None)

    def at(self, axes: list[Axis], point: Point) -> Changes:
        """The candidate at a point."""
        return {axis.name: axis.values[place] for axis, place in zip(axes, point, strict=True)}

    def loss(self, changes: Changes) -> float:
        """Mean loss of one candidate by itself."""
        return float(np.mean(self._losses([self._lines(changes)], None)))

    def _lines(self, changes: Changes) -> list[Line]:
        return self.asking.ask(changes, self._asked, predict=self._predicts)

    @property
    def _predicts(self) -> bool:
        return self.objective == "consistency" and self.match == "top1"

    @cached_property
    def _asked(self) -> list[Sample]:
        """The probes as they are put to a candidate."""
        probes = self.asking.probes
        if self._predicts:
            own = self.asking.ask(self.asking.home, probes)
            return [replace(probe, options=(line["text"],)) for probe, line in zip(probes, own, strict=True)]
        if self.objective == "consistency":
            return probes
        if self.objective == "labels":
            return [replace(probe, options=probe.choices) for probe in probes]
        said = {key: line["text"] for key, line in self.asking.parents.items() if line["text"]}
        if not said:
            raise ModalloyError("the specialists answer none of the probes of one sense with a word; ask them others")
        return [replace(probe, options=(said[probe.id],)) for probe in probes if probe.id in said]

    def _losses(self, lines: list[list[Line]], steps: list[float] | None) -> Table:
        asked = self._asked
        if self.objective == "consistency":
            pairs = itertools.pairwise(lines)
            changed = [[self._difference(*one) for one in zip(asked, *pair, strict=True)] for pair in pairs]
            return inconsistency(np.reshape(changed, (len(lines) - 1, len(asked))), self.variant, steps)
        if self.objective == "labels":
            return np.array([[1.0 - is_right(p, line) for line, p in zip(own, asked, strict=True)] for own in lines])
        sizes = [self.asking.parents[probe.id]["n_out"] for probe in asked]
        return np.array([[-line["likelihoods"][0] / n for line, n in zip(own, sizes, strict=True)] for own in lines])

    def _difference(self, probe: Sample, one: Line, other: Line) -> float:
        """How much two answers to a probe differ."""
        if self._predicts:
            return float(np.mean(np.not_equal(one["predicted"], other["predicted"])))
        if self.embedder is not None:
            return self.embedder.difference(one["text"], other["text"])
        return float(compared(one["text"], probe, self.match) != compared(other["text"], probe, self.match))

    def _sweep(
        self,
        axes: list[Axis],
        candidates: list[Changes],
        points: list[Point],
        default: Point | None,
        duplicates: dict[str, Any],
        steps: list[float] | None,
    ) -> Sweep:
        lines, asked = [self._lines(changes) for changes in candidates], self._asked
        states: list[Health] = []
        out: list[str] = []
        accuracy = None
        if self.objective != "agreement" and not self._predicts:
            said = self.asking.parents if self.objective == "consistency" else {}
            texts = [text for probe in asked for text in (probe.text, *probe.choices)]
            known = scripts([*texts, *(line["text"] for line in said.values())])
            limit = self.asking.lengths["max_new_tokens"]
            by_parent = grouped([line["model"] for line in said.values()])
            spoken = [[list(said.values())[index] for index in own] for own in by_parent.values()]
            states = [_health(own, asked, limit, known) for own in lines]
            out = degenerate(states, [_health(own, asked, limit, known) for own in spoken])
            if all(probe.golds for probe in asked):
                right = [[is_right(p, line) for line, p in zip(own, asked, strict=True)] for own in lines]
                accuracy = [sum(own) / len(own) for own in right]
        sketches = [self.asking.sketch(changes) for changes in candidates]
        return Sweep(
            axes,
            candidates,
            points,
            self._losses(lines, steps),
            default,
            duplicates,
            steps,
            health=states,
            disqualified=out,
            accuracy=accuracy,
            groups=[probe.group["senses"] for probe in asked],
            aggregate=self.aggregate,
            sizes=[distance(sketch, [0.0] * len(sketch)) for sketch in sketches],
        )


def _by_coordinate(compare: _Compare, axes: list[Axis]) -> tuple[Changes, list[Sweep], bool]:
    """One axis after the other, the others held, until nothing changes or PASSES are over; and whether nothing did."""
    current = start(compare.asking.planned, axes)
    sweeps: dict[str, Sweep] = {}
    for _ in range(PASSES):
        before = dict(current)
        compare.asking.expected += sum(len(axis.values) for axis in axes) * len(compare.asking.probes)
        for axis in axes:
            sweeps[axis.name] = compare.axis(axis, {n: v for n, v in current.items() if n != axis.name})
            if (index := sweeps[axis.name].chosen) is not None:
                current[axis.name] = sweeps[axis.name].candidates[index][axis.name]
        if current == before:
            break
    return current, list(sweeps.values()), current == before


def _whole(compare: _Compare, axes: list[Axis], strategy: str, trials: int) -> tuple[Changes, Sweep]:
    """All combinations, or those that a sampler of Optuna tries."""
    asking = compare.asking
    if len(axes) == 1 and strategy == "grid":
        asking.expected = len(axes[0].values) * len(asking.probes)
        sweep = compare.axis(axes[0], {})
    else:
        points: list[Point] = list(itertools.product(*(range(len(axis.values)) for axis in axes)))
        asking.expected = len(points) * len(asking.probes)
        if strategy != "grid":
            asking.expected = min(trials, len(points)) * len(asking.probes)
            points = _sampled(lambda point: compare.loss(compare.at(axes, point)), axes, strategy, trials)
        sweep = compare.points(axes, points)
    chosen = start(asking.planned, axes) if sweep.chosen is None else sweep.candidates[sweep.chosen]
    return chosen, sweep


def _sampled(loss: Callable[[Point], float], axes: list[Axis], strategy: str, trials: int) -> list[Point]:
    """The points that a sampler of Optuna tries, sorted; its seed is 0."""
    optuna = _optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    samplers = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
    study = optuna.create_study(sampler=samplers[strategy](seed=0))
    tried: dict[Point, float] = {}
    for _ in range(trials):
        trial = study.ask()
        point = tuple(trial.suggest_int(axis.name, 0, len(axis.values) - 1) for axis in axes)
        if point not in tried:
            tried[point] = loss(point)
        study.tell(trial, tried[point])
    return sorted(tried)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ModalloyError(
            "--strategy tpe and random need Optuna, which is not installed; run `pip install 'modalloy[search]'`, or use "
            "--strategy coordinate"
        ) from error
    return optuna


def is_right(probe: Sample, line: Line) -> bool:
    """Whether an answer is a gold one: by its likeliest option, the option that its text names, or its words."""
    if not probe.choices:
        return normalized_match(probe, Answer(line["text"])).correct
    letter = _predicted(probe, line)
    if letter is None:
        return False
    named = probe.choices[LETTERS.index(letter)]
    return named in probe.golds or (letter in probe.golds and not is_text(probe))


def _predicted(probe: Sample, line: Line) -> str | None:
    """The letter of the option that an answer means."""
    if not line["likelihoods"]:
        return parse_letter(line["text"], probe.choices)
    return LETTERS[max(range(len(line["likelihoods"])), key=lambda index: (line["likelihoods"][index], -index))]


def _health(lines: list[Line], asked: Sequence[Sample], limit: int, known: set[str]) -> Health:
    choices = {probe.id: probe for probe in asked}
    texts = []
    for line in lines:
        letter = _predicted(choices[line["probe"]], line) if line["likelihoods"] else None
        texts.append(line["text"] if letter is None else choices[line["probe"]].choices[LETTERS.index(letter)])
    return health(texts, [line["n_out"] >= limit for line in lines], known)


def _is_same(a: list[float], b: list[float]) -> bool:
    zero = [0.0] * len(a)
    return distance(a, b) <= SAME * max(distance(a, zero), distance(b, zero))


def _check_known(objective: str, strategy: str, variant: str, match: str, aggregate: str) -> None:
    for option, value, known in (
        ("--objective", objective, OBJECTIVES),
        ("--strategy", strategy, STRATEGIES),
        ("--variant", variant, get_args(Variant)),
        ("--match", match, get_args(Match)),
        ("--aggregate", aggregate, get_args(Aggregate)),
    ):
        if value not in known:
            raise ModalloyError(f"{option} {value}: there is none of that name; {nearest(value, known)}")


def _strategy(given: str, axes: list[Axis], objective: str, variant: str, aggregate: str) -> str:
    """The strategy that is meant; refused where the objective cannot follow it."""
    strategy = ("grid" if len(axes) == 1 else "coordinate") if given == "auto" else given
    if strategy in ("tpe", "random"):
        _optuna()
        if aggregate != "probes":
            raise ModalloyError(
                f"--aggregate {aggregate}: compares a candidate with all others, and --strategy {strategy} sees one at a "
                "time; use --strategy grid or coordinate"
            )
    if objective != "consistency":
        return strategy
    if strategy in ("tpe", "random") or (strategy == "grid" and len(axes) > 1):
        raise ModalloyError(
            f"--strategy {strategy}: consistency compares neighbours along one axis; use --strategy coordinate, or another "
            "objective"
        )
    least = 2 if variant == "one-sided" else 3
    for axis in axes:
        if not axis.ordered:
            raise RecipeError(
                f"--vary {axis.name}: consistency compares neighbouring values, and {shown(axis.values[0])} is no number; use "
                "--objective labels or agreement"
            )
        if len(axis.values) < least:
            raise RecipeError(
                f"--vary {axis.name}: consistency needs at least {least} values, for the ends lack a neighbour; give more"
            )
    return strategy


def _check_recipe(recipe: Recipe, load: Loader | None) -> None:
    if recipe.target is None and load is not None:
        raise RecipeError("load=… makes models of recipes with a target, and this one has none; leave it out")
    if recipe.target is None and not recipe.form.carries_senses:
        raise RecipeError(
            f"output.form '{recipe.output.form}': a search asks the merged model about media, so it needs the encoders; "
            "write form: omni (the chosen parameters hold for any form)"
        )


def _check_probes(probes: list[Sample], planned: Plan, objective: str, load: Loader | None) -> None:
    across = planned.recipe.target is not None
    able = target_senses(planned, load) if across else [specialist.modality for specialist in planned.specialists]
    for probe in probes:
        for modality, _ in probe.media:
            if able is not None and modality not in able:
                takes = ", ".join(map(str, able)) or "text only"
                raise ModalloyError(
                    f"the probe {shown(probe.text)} shows {modality}, and the recipe's model takes {takes}; remove the probe"
                )
        if objective == "labels" and not probe.golds:
            raise ModalloyError(
                f"the probe {shown(probe.text)} has no gold answer, which --objective labels needs; add it"
            )
        if objective == "labels" and probe.choices and not is_text(probe):
            known = LETTERS[: len(probe.choices)]
            if not set(probe.golds) & set(known):
                raise ModalloyError(
                    f"the probe {shown(probe.text)}: its gold {shown(probe.golds[0])} is none of its choices; correct it"
                )
    if objective == "agreement" and not across and not any(len({m for m, _ in probe.media}) == 1 for probe in probes):
        raise ModalloyError(
            "no probe shows one sense alone, which --objective agreement asks the specialists about; add some"
        )

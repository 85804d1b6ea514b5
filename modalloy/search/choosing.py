"""search(recipe, probe, out): serve candidates, ask them the probes, choose, and write a recipe that is ready to merge."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import get_args

from modalloy.errors import ModalloyError, RecipeError, nearest, shown
from modalloy.evals.benchmark import LETTERS, Sample
from modalloy.evals.features import FeatureCache
from modalloy.evals.scores import golds_are_options
from modalloy.planning.differences import settled_plan
from modalloy.planning.kinship import check_kinship
from modalloy.planning.plan import Plan
from modalloy.recipe import Recipe, load_recipe
from modalloy.search.asking import Asking
from modalloy.search.comparing import OBJECTIVES, Compare, Objective
from modalloy.search.embedding import EMBEDDER, Embedder
from modalloy.search.folder import check_out, write
from modalloy.search.found import Found
from modalloy.search.objective import (
    Aggregate,
    Match,
    Variant,
    grouped,
)
from modalloy.search.probes import read_probes
from modalloy.search.space import default_axes, parse_axes, start
from modalloy.search.strategies import STRATEGIES, by_coordinate, chosen_strategy, whole
from modalloy.search.target import Loader, target_senses
from modalloy.search.trials import Trials


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
    strategy = chosen_strategy(strategy, axes, objective, variant, aggregate)
    _check_probes(probes, planned, objective, load)
    if not allow_base_mismatch:
        check_kinship(planned)  # as the merge will
    by_meaning = objective == "consistency" and match == "embedding"
    meaning = Embedder(embedder, device) if by_meaning else None
    lengths = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "dtype": dtype, "device": device}
    with Trials(out, {"inputs": planned.fingerprint, **lengths}, resume=resume) as log:
        asking = Asking(
            planned, axes, probes, log, cache or FeatureCache(), lengths, allow_base_mismatch, load, on_answer
        )
        compare = Compare(asking, objective, variant, match, aggregate, meaning)
        if strategy == "coordinate":
            chosen, sweeps, settled = by_coordinate(compare, axes)
        else:
            chosen, sweep = whole(compare, axes, strategy, trials)
            sweeps, settled = [sweep], True
        settings = {
            "method": recipe.merge_method,
            **({"target": planned.target_name} if recipe.is_across else {}),
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


def _check_recipe(recipe: Recipe, load: Loader | None) -> None:
    if not recipe.is_across and load is not None:
        raise RecipeError("load=… makes models of recipes with a target, and this one has none; leave it out")
    if not recipe.is_across and not recipe.form.carries_senses:
        raise RecipeError(
            f"output.form '{recipe.output.form}': a search asks the merged model about media, so it needs the encoders; "
            "write form: omni (the chosen parameters hold for any form)"
        )


def _check_probes(probes: list[Sample], planned: Plan, objective: str, load: Loader | None) -> None:
    across = planned.recipe.is_across
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
        if objective == "labels" and probe.choices and not golds_are_options(probe):
            known = LETTERS[: len(probe.choices)]
            if not set(probe.golds) & set(known):
                raise ModalloyError(
                    f"the probe {shown(probe.text)}: its gold {shown(probe.golds[0])} is none of its choices; correct it"
                )
    if objective == "agreement" and not across and not any(len({m for m, _ in probe.media}) == 1 for probe in probes):
        raise ModalloyError(
            "no probe shows one sense alone, which --objective agreement asks the specialists about; add some"
        )

"""search(recipe, probe, out): serve candidates, ask them the probes, choose, and write a recipe that is ready to merge."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from modalloy.errors import ModalloyError, RecipeError, nearest, shown
from modalloy.evals.benchmark import LETTERS, Sample
from modalloy.evals.scores import golds_are_options
from modalloy.planning.differences import settled_plan
from modalloy.planning.kinship import check_kinship
from modalloy.planning.plan import Plan
from modalloy.recipe import Recipe, load_recipe
from modalloy.search.asking import Asking, shows_only
from modalloy.search.comparing import DEFAULT, OBJECTIVES, OF_SPECIALISTS, Compare
from modalloy.search.embedding import Embedder
from modalloy.search.folder import check_out, write
from modalloy.search.found import Found
from modalloy.search.objective import VARIANTS, Aggregate, Match, grouped
from modalloy.search.probes import read_probes
from modalloy.search.settings import Settings
from modalloy.search.space import default_axes, parse_axes, start
from modalloy.search.strategies import STRATEGIES, by_coordinate, chosen_strategy, whole
from modalloy.search.target import Loader, target_senses
from modalloy.search.trials import Trials


def search(
    recipe: Recipe | str | Path, probe: str | Path, out: str | Path, settings: Settings | None = None, **options: Any
) -> Found:
    """The recipe with the parameters that the objective prefers, in `out`/recipe.yaml, with log, figures and a page.

    Args:
        recipe: a Recipe of `form: omni` or with a `target`, or the path of its YAML file.
        probe: file of probes (see `read_probes`).
        out: folder of recipe.yaml, trials.jsonl, search.json and index.html.
        settings: see `Settings`.
        options: single settings, by their names.

    Raises:
        ModalloyError: the recipe, the probes, an axis or the folder is not fit for it.
    """
    given = replace(settings or Settings(), **options)
    out = Path(out)
    check_out(out, [Path(probe)] if isinstance(recipe, Recipe) else [Path(recipe), Path(probe)])
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    _check_recipe(recipe, given.load)
    probes = read_probes(Path(probe))
    planned = settled_plan(recipe, allow_base_mismatch=given.allow_base_mismatch)
    axes = parse_axes(given.vary, recipe) or default_axes(planned)
    given = _settled(given, recipe)
    given = replace(given, strategy=chosen_strategy(given, axes))
    _check_probes(probes, planned, given)
    if not given.allow_base_mismatch:
        check_kinship(planned)  # as the merge will
    embedder = Embedder(given.embedder, given.device) if given.compares_meaning else None
    with Trials(out, {"inputs": planned.fingerprint, **given.lengths}, resume=given.resume) as log:
        compare = Compare(Asking(planned, axes, probes, log, given), given, embedder)
        if given.strategy == "coordinate":
            chosen, sweeps, settled = by_coordinate(compare, axes)
        else:
            chosen, sweep = whole(compare, axes, given.strategy, given.trials)
            sweeps, settled = [sweep], True
        told = {
            "method": recipe.merge_method,
            **({"target": planned.target_name} if recipe.is_across else {}),
            "objective": given.objective,
            **({"variant": given.variant} if given.variant else {}),
            **({"match": given.match} if given.objective == "consistency" else {}),
            **({"embedder": given.embedder} if given.compares_meaning else {}),
            "aggregate": given.aggregate,
            "strategy": given.strategy,
            "probes": len(probes),
            **({"left_out": compare.left_out} if compare.left_out else {}),
            "senses": {name: len(own) for name, own in grouped([p.group["senses"] for p in probes]).items()},
            "axes": {axis.name: list(axis.values) for axis in axes},
        }
        found = Found(out, chosen, start(planned, axes), sweeps, settled, told, compare.asking.cost())
    write(found, recipe)
    return found


def _settled(given: Settings, recipe: Recipe) -> Settings:
    """The settings with objective and variant chosen where they are open, all of known names."""
    objective = given.objective
    if objective == "auto":
        objective = "consistency" if recipe.is_across else DEFAULT
    variants = VARIANTS.get(objective, ())
    if given.variant is not None and objective in OBJECTIVES and not variants:
        raise ModalloyError(f"--variant {given.variant}: --objective {objective} has none; leave it out")
    given = replace(given, objective=objective, variant=given.variant or next(iter(variants), None))
    for option, value, known in (
        ("--objective", objective, OBJECTIVES),
        ("--strategy", given.strategy, STRATEGIES),
        *((("--variant", given.variant, variants),) if given.variant else ()),
        ("--match", given.match, get_args(Match)),
        ("--aggregate", given.aggregate, get_args(Aggregate)),
    ):
        if value not in known:
            raise ModalloyError(f"{option} {value}: there is none of that name; {nearest(value, known)}")
    if given.match != Settings.match and objective != "consistency":
        raise ModalloyError(
            f"--match {given.match}: is how consistency compares answers, and this is --objective {objective}; leave it out, "
            "or use --objective consistency"
        )
    return given


def _check_recipe(recipe: Recipe, load: Loader | None) -> None:
    if not recipe.is_across and load is not None:
        raise RecipeError("load=… makes models of recipes with a target, and this one has none; leave it out")
    if not recipe.is_across and not recipe.form.carries_senses:
        raise RecipeError(
            f"output.form '{recipe.output.form}': a search asks the merged model about media, so it needs the encoders; "
            "write form: omni (the chosen parameters hold for any form)"
        )


def _check_probes(probes: list[Sample], planned: Plan, given: Settings) -> None:
    across = planned.recipe.is_across
    able = target_senses(planned, given.load) if across else [specialist.modality for specialist in planned.specialists]
    for probe in probes:
        for modality, _ in probe.media:
            if able is not None and modality not in able:
                takes = ", ".join(map(str, able)) or "text only"
                raise ModalloyError(
                    f"the probe {shown(probe.text)} shows {modality}, and the recipe's model takes {takes}; remove the probe"
                )
        if given.objective == "labels" and not probe.golds:
            raise ModalloyError(
                f"the probe {shown(probe.text)} has no gold answer, which --objective labels needs; add it"
            )
        if given.objective == "labels" and given.variant == "probability" and not probe.choices:
            raise ModalloyError(
                f"the probe {shown(probe.text)} has no choices, whose probability --variant probability measures; add them, or "
                "use --variant accuracy"
            )
        if given.objective == "labels" and probe.choices and not golds_are_options(probe):
            known = LETTERS[: len(probe.choices)]
            if not set(probe.golds) & set(known):
                raise ModalloyError(
                    f"the probe {shown(probe.text)}: its gold {shown(probe.golds[0])} is none of its choices; correct it"
                )
    own = [probe for probe in probes if any(shows_only(probe, one) for one in able or ())]
    if given.objective in OF_SPECIALISTS and not across and not own:
        raise ModalloyError(
            f"no probe shows one sense alone, which --objective {given.objective} asks the specialists about; add some, or use "
            "--objective consistency"
        )
    if given.objective in ("kl", "option_agreement"):
        _check_options(own, given.objective, across=across)


def _check_options(own: list[Sample], objective: str, *, across: bool) -> None:
    """Refuse probes of one sense whose options cannot be compared."""
    if across:
        raise ModalloyError(
            f"--objective {objective}: compares candidates with specialists that answer the probes, and a recipe with a "
            "target has donors, which do not; use consistency or labels"
        )
    for probe in own:
        if len(probe.choices) == 1:
            raise ModalloyError(
                f"the probe {shown(probe.text)} has one choice, which leaves --objective {objective} nothing to compare; give "
                "two or more"
            )
        if objective == "option_agreement" and not probe.choices:
            raise ModalloyError(
                f"the probe {shown(probe.text)} has no choices, which --objective option_agreement compares; add them, or use "
                "--objective kl"
            )

"""plan(recipe): opens every input's headers, checks that they fit, and lists every tensor's fate and every job."""

from collections.abc import Collection, Mapping, Sequence

from modalloy.errors import CheckpointError, RecipeError, nearest, shown
from modalloy.families.union import Vocabulary, common_vocabulary
from modalloy.methods import METHODS
from modalloy.planning.checks import (
    check_all_accounted,
    check_base,
    check_fishers_are_used,
    check_patterns,
    check_shapes,
    place,
)
from modalloy.planning.jobs import Planner
from modalloy.planning.jobs_across import AcrossPlanner
from modalloy.planning.kinds import Kind, check_numbers, kinds
from modalloy.planning.mapped import Across, open_donors
from modalloy.planning.models import absent_models, labels, locate_specialist
from modalloy.planning.native import check_one_base, choose_own
from modalloy.planning.plan import Plan
from modalloy.planning.senses import NativeSense, Sense, choose_senses, number_senses
from modalloy.recipe import Recipe
from modalloy.specialists.companions import notices
from modalloy.specialists.layouts import LAYOUTS, NATIVE, open_specialist
from modalloy.specialists.native import is_native
from modalloy.specialists.specialist import Specialist
from modalloy.specialists.templates import common_template, own_template
from modalloy.storage.config import config_size, read_config
from modalloy.storage.locate import locate, open_base
from modalloy.storage.tensors import Checkpoint


def plan(recipe: Recipe, *, allow_base_mismatch: bool = False, idle: Collection[str] = ()) -> Plan:
    """The plan of `recipe`: opens every input's headers, checks that they fit, and lists every tensor's fate.

    Every merge is one into a target: the base itself, or a model of another architecture.

    Args:
        recipe: what to merge.
        allow_base_mismatch: plan models that record another base than the recipe's.
        idle: labels of models whose updates are known to be zero, which do not count (see `modalloy.planning.differences`).

    Raises:
        CheckpointError: an input is missing, damaged, or does not fit the target.
        RecipeError: the recipe asks for something that these inputs cannot give.
    """
    target = open_base(locate(recipe.start, recipe.folder))
    base: Checkpoint | None = target
    across: Across | None = None
    if recipe.is_across:
        places = [
            (label, locate(entry.model, recipe.folder))
            for label, entry in zip(labels(recipe), recipe.models, strict=True)
        ]
        further = locate(recipe.base_model, recipe.folder) if recipe.base_model else None
        models, across = open_donors(recipe, target, places, further, allow=allow_base_mismatch)
        base = across.base
    else:
        models = _open_specialists(recipe, target)
    recipe = recipe.resolved(has_whole=any(model.is_whole for model in models))
    absent = absent_models(recipe, models, base, idle)
    for label, start in dict(zip(recipe.starts, (target, base), strict=False)).items():
        if start is not None:
            check_numbers(label, start.folder, read_config(start.folder), start.refs)
    _check_models(recipe, models, target, allow_base_mismatch)
    of_target = kinds(read_config(target.folder), target.refs)
    vocabulary: Vocabulary | None = None
    if recipe.has_own_vocabulary:
        vocabulary, target = _common_vocabulary(recipe, target, of_target, models)
        base = target
    for model in models if across is None else ():
        check_shapes(model, target)
    if recipe.form.carries_senses:
        number_senses(recipe, models)
        choose_own(recipe, models)
    planner: Planner | AcrossPlanner
    if across is not None:
        planner = AcrossPlanner(recipe, target, models, across, absent)
    else:
        planner = Planner(recipe, target, models, of_target, absent)
    form = recipe.form
    result = Plan(
        recipe,
        target,
        base,
        models,
        planner.parameters,
        planner.all_jobs(),
        planner.fates(),
        planner.rank,
        planner.fishers,
        _senses(recipe, models, target) if form.carries_senses else {},
        _template(recipe, models),
        across=across,
        kinds=planner.kinds,
        absent=planner.reasons,
        idle=tuple(idle),
        must_be_equal=planner.must_be_equal(),
        notices=notices(target.folder, models, vocabulary is None) if form.is_model and across is None else [],
        vocabulary=vocabulary,
    )
    check_all_accounted(result)
    used = any(job.method and METHODS[job.method].takes("fishers") for job in result.jobs)
    check_fishers_are_used(recipe, given=any(result.fishers), used=used)
    check_patterns(recipe, result)
    return result


def _open_specialists(recipe: Recipe, target: Checkpoint) -> list[Specialist]:
    """The recipe's models, which have the target's architecture, or have it in them."""
    layouts = LAYOUTS if is_native(target.folder) else NATIVE
    return [
        open_specialist(
            locate_specialist(entry.model, recipe.folder),
            modality=entry.modality,
            label=label,
            ignore=recipe.ignore,
            layouts=layouts,
        )
        for entry, label in zip(recipe.models, labels(recipe), strict=True)
    ]


def _check_models(recipe: Recipe, models: Sequence[Specialist], target: Checkpoint, allow: bool) -> None:
    """Refuse models that hold no weights, and those of the target's architecture that do not fit it."""
    if not allow:
        check_one_base([model for model in models if model.native is not None])
    config = read_config(target.folder)
    for model in models:
        if model.is_whole:
            name = model.label if recipe.is_across else f"{model.label} specialist"
            refs = model.checkpoint.refs if recipe.is_across else model.tuned
            check_numbers(name, model.checkpoint.folder, model.config, refs)
        if not recipe.is_across:
            check_base(model, recipe, target.folder, allow)
            place(model, target, config)


def _common_vocabulary(
    recipe: Recipe, target: Checkpoint, of_target: Mapping[str, Kind], models: Sequence[Specialist]
) -> tuple[Vocabulary, Checkpoint]:
    """The vocabulary of a result that has other tokens than its base, and the base with tables of its rows."""
    if not recipe.form.is_whole:
        raise RecipeError(
            f"output.form '{recipe.output.form}' has the base's vocabulary; write form: full, or leave vocabulary: union out"
        )
    rows = [name for name, kind in of_target.items() if kind == "embedding"]
    for model in models:
        if updated := next((name for name in rows if name in model.text_lora), None):
            raise CheckpointError(
                f"{model.label} specialist: {model.text_lora[updated].a.name} updates rows of the base's vocabulary, not of the "
                "result's; merge the adapter into its base first"
            )
    sources = [(model.label, model.checkpoint.folder, model.tuned) for model in models]
    return common_vocabulary(target, read_config(target.folder), rows, sources, recipe.tokenizer_index)


def _senses(recipe: Recipe, models: list[Specialist], target: Checkpoint) -> dict[str, Sense | NativeSense]:
    """Encoder and projector of each modality."""
    width = config_size(read_config(target.folder), "hidden_size", target.folder)
    return choose_senses(recipe, models, width)


def _template(recipe: Recipe, models: list[Specialist]) -> str | None:
    """The chat template that the models share, for a result that has one."""
    chosen = recipe.output.chat_template
    if "{" in chosen:
        return chosen
    if recipe.is_across or not recipe.form.is_model or chosen == "base":
        return None
    if chosen == "auto":
        return common_template(models)
    known = {model.label: model for model in models}
    if chosen not in known:
        raise RecipeError(
            f"output.chat_template: no specialist is called {shown(chosen)}; {nearest(chosen, ['base', *known])}"
        )
    template = own_template(known[chosen].checkpoint.folder)
    if template is None:
        raise RecipeError(f"output.chat_template: the {chosen} specialist has no chat template; write base, or another")
    return template

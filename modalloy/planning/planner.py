"""plan(recipe): opens every input's headers, checks that they fit, and lists every tensor's fate and every job."""

from collections.abc import Collection

from modalloy.errors import RecipeError
from modalloy.methods import METHODS
from modalloy.planning.checks import (
    check_all_accounted,
    check_base,
    check_fishers_are_used,
    check_patterns,
    check_shapes,
)
from modalloy.planning.jobs import Planner
from modalloy.planning.jobs_across import AcrossPlanner
from modalloy.planning.kinds import check_numbers, kinds
from modalloy.planning.mapped import open_donors
from modalloy.planning.models import absent_models, labels, locate_specialist
from modalloy.planning.plan import Plan
from modalloy.planning.senses import choose_senses
from modalloy.recipe import Recipe
from modalloy.specialists.companions import notices
from modalloy.specialists.layouts import open_specialist
from modalloy.specialists.templates import common_template
from modalloy.storage.config import config_size, read_config
from modalloy.storage.locate import locate, open_base
from modalloy.storage.tensors import Checkpoint, WeightFile


def plan(recipe: Recipe, *, allow_base_mismatch: bool = False, idle: Collection[str] = ()) -> Plan:
    """The plan of `recipe`: opens every input's headers, checks that they fit, and lists every tensor's fate.

    `idle`: labels of models whose updates are known to be zero, which do not count (see `modalloy.planning.differences`).

    Raises:
        CheckpointError: an input is missing, damaged, or does not fit the base.
        RecipeError: the recipe asks for something that these inputs cannot give.
    """
    base_folder = locate(recipe.start, recipe.folder)
    base = open_base(base_folder)
    if recipe.target is not None:
        return _plan_across(recipe, base, allow_base_mismatch, idle)
    base_config = read_config(base_folder)
    check_numbers("base", base_folder, base_config, base.refs)
    specialists = [
        open_specialist(
            locate_specialist(entry.model, recipe.folder), modality=entry.modality, label=label, ignore=recipe.ignore
        )
        for entry, label in zip(recipe.models, labels(recipe), strict=True)
    ]
    absent = absent_models(recipe, specialists, base_folder, idle)
    for specialist in specialists:
        if specialist.is_whole:
            check_numbers(
                f"{specialist.label} specialist", specialist.checkpoint.folder, specialist.config, specialist.full
            )
        check_base(specialist, recipe, base_config, allow_base_mismatch)
        check_shapes(specialist, base, base_config)
    form, compress = recipe.form, recipe.output.compress_rank
    found = kinds(base_config, base.refs)
    planner = Planner(recipe, base, specialists, found, absent)
    if not form.takes_full_updates and compress is None:
        for specialist in planner.counted:
            changed = (name for name in planner.merged if name in specialist.full)
            if whole := next((specialist.full[name] for name in changed), None):
                holds = "is a full model" if specialist.is_whole else f"holds {whole.name} whole"
                raise RecipeError(
                    f"output.form '{form.name}' needs low-rank specialists, but '{specialist.label}' {holds}; write form: full, "
                    "or output.compress_rank: k to approximate what is merged"
                )
    width = config_size(base_config, "hidden_size", base_folder) if form.carries_senses else 0
    senses = choose_senses(recipe, specialists, width) if form.carries_senses else {}
    template = None if not form.is_model or recipe.output.chat_template == "base" else common_template(specialists)
    jobs = planner.full_jobs() if form.is_whole else planner.adapter_jobs()
    result = Plan(
        recipe,
        base,
        base,
        specialists,
        planner.parameters,
        jobs,
        planner.fates(),
        planner.rank,
        planner.fishers,
        senses,
        template,
        kinds=found,
        absent=planner.reasons,
        idle=tuple(idle),
        must_be_equal=planner.must_be_equal(),
        notices=notices(base_folder, specialists) if form.is_model else [],
    )
    check_all_accounted(result)
    used = any(job.method and METHODS[job.method].takes("fishers") for job in jobs)
    check_fishers_are_used(recipe, given=any(result.fishers), used=used)
    check_patterns(recipe, result)
    return result


def _plan_across(recipe: Recipe, target: Checkpoint, allow_base_mismatch: bool, idle: Collection[str]) -> Plan:
    """The plan of a merge of donors into a target of another architecture."""
    places = [
        (label, locate(entry.model, recipe.folder)) for label, entry in zip(labels(recipe), recipe.models, strict=True)
    ]
    base = locate(recipe.base_model, recipe.folder) if recipe.base_model else None
    donors, across = open_donors(recipe, target, places, base, allow=allow_base_mismatch)
    absent = absent_models(recipe, donors, base, idle)
    check_numbers("target", target.folder, read_config(target.folder), target.refs)
    if across.base is not None:
        check_numbers("base", across.base.folder, read_config(across.base.folder), across.base.refs)
    for donor in donors:
        if donor.is_whole:
            check_numbers(donor.label, donor.checkpoint.folder, donor.config, donor.checkpoint.refs)
    planner = AcrossPlanner(recipe, target, donors, across, absent)
    unread: list[WeightFile | None] = [None] * len(donors)
    parameters, jobs, fates = planner.parameters, planner.jobs, planner.fates()
    result = Plan(
        recipe,
        target,
        across.base,
        donors,
        parameters,
        jobs,
        fates,
        None,
        unread,
        across=across,
        absent=planner.reasons,
        idle=tuple(idle),
    )
    check_all_accounted(result)
    check_patterns(recipe, result)
    return result

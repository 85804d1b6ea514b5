"""Do the inputs fit together? Every check reads headers and configs only, and refuses with one line."""

import fnmatch
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modalloy.errors import CheckpointError, RecipeError, nearest, shown
from modalloy.planning.kinds import PLURALS, Kind, is_of_tokens
from modalloy.planning.native import check_native
from modalloy.recipe import Recipe
from modalloy.settings import filters
from modalloy.specialists.full import place_in_base
from modalloy.specialists.native import place_native
from modalloy.specialists.specialist import Specialist
from modalloy.storage.config import read_config
from modalloy.storage.locate import is_portable
from modalloy.storage.tensors import Checkpoint

if TYPE_CHECKING:
    from modalloy.planning.plan import Plan


def check_base(specialist: Specialist, recipe: Recipe, base_folder: Path, allow: bool) -> None:
    """Refuse a specialist whose own record of its base contradicts the recipe's."""
    if specialist.native is not None:
        check_native(specialist, base_folder, allow)
    if allow:
        return
    remedy = "use the right base, or say --allow-base-mismatch"
    recorded, wanted = specialist.base_name, recipe.base_model
    # a longer path may be one inside a repository, or a place on its author's machine
    names = [name for name in (recorded, wanted) if name and name.count("/") < 2]
    portable = [name for name in names if is_portable(name, recipe.folder)]
    if recorded and len(portable) == 2 and recorded.split("@")[0].lower() != wanted.split("@")[0].lower():
        raise CheckpointError(
            f"{specialist.label} specialist was trained from '{recorded}', the recipe's base_model is '{wanted}'; {remedy}"
        )
    base_config = read_config(base_folder)
    keys = ["hidden_size", "intermediate_size", "num_hidden_layers"]
    if not recipe.has_own_vocabulary and not any(is_of_tokens(name) for name in specialist.checkpoint.refs):
        keys.append("vocab_size")  # else `check_shapes` compares the embeddings, and `ignore:` can leave them out
    for key in keys:
        own, base = specialist.config.get(key), base_config.get(key)
        if own is not None and base is not None and own != base:
            raise CheckpointError(
                f"{specialist.label} specialist was trained from a base with {key} {shown(own)}, '{wanted}' has "
                f"{shown(base)}; {remedy}"
            )


def place(specialist: Specialist, base: Checkpoint, base_config: dict[str, Any]) -> None:
    """Give every update and tuned tensor of a specialist the base's name of it."""
    if specialist.native is not None:
        place_native(specialist, base, base_config)
    else:
        place_in_base(specialist, base, base_config)


def check_shapes(specialist: Specialist, base: Checkpoint) -> None:
    """Every update must fit the base weight of its name, and every tensor that was tuned whole must have the base's shape."""
    strange = [slot for slot in specialist.text_lora if slot not in base.refs]
    if strange and len(strange) == len(specialist.text_lora):
        ref = specialist.text_lora[strange[0]].a
        alike = max(base.refs, key=lambda name: _common_end(name, strange[0]))
        raise CheckpointError(
            f"{specialist.label} specialist: none of its {len(strange)} updates names a weight of the base {base.folder.name}: "
            f"{ref.name} would be one of {strange[0]}, and the nearest name there is {alike} ({ref.file}); if it was trained "
            "from this base, rename its tensors as the base's are called, else use the base it was trained from"
        )
    for updates in (specialist.text_lora, specialist.modality_lora):
        for slot, factors in updates.items():
            if slot not in base.refs:
                raise CheckpointError(
                    f"{specialist.label} specialist: {factors.a.name} updates {slot}, which the base {base.folder.name} does not "
                    f"have ({factors.a.file}); use the base it was trained from"
                )
            if base.refs[slot].shape != factors.shape:
                raise CheckpointError(
                    f"{specialist.label} specialist: {factors.a.name} updates a {' × '.join(map(str, factors.shape))} weight, "
                    f"but {slot} of the base is {' × '.join(map(str, base.refs[slot].shape))} ({factors.a.file}); "
                    "use the base it was trained from"
                )
    tuned = specialist.tuned | specialist.frozen
    for name, ref in tuned.items():
        if base.refs[name].dtype.is_floating_point and not ref.dtype.is_floating_point:
            raise CheckpointError(
                f"{specialist.label} specialist: {ref.name} holds {ref.dtype}, no weights ({ref.file}), where the base has "
                f"{base.refs[name].dtype}; use the model before it was quantised, or list the tensor under `ignore:`"
            )
    misfits = [(ref, base.refs[name]) for name, ref in tuned.items() if ref.shape != base.refs[name].shape]
    resized = [pair for pair in misfits if is_of_tokens(pair[1].name) and pair[0].shape[1:] == pair[1].shape[1:]]
    for own, wanted in resized:
        raise CheckpointError(
            f"{specialist.label} specialist: its vocabulary has {own.shape[0]} tokens, the base's has {wanted.shape[0]} "
            f"({own.name} in {own.file}); use the base it was trained from, write vocabulary: union for the tokens of all, or list "
            f"{' and '.join(ref.name for ref, _ in resized)} under `ignore:` to keep the base's"
        )
    for own, wanted in misfits:
        raise CheckpointError(
            f"{specialist.label} specialist: {own.name} is {own.shape}, the base's is {wanted.shape} ({own.file}); "
            "use the base it was trained from"
        )


def _common_end(one: str, other: str) -> int:
    """How many characters two names have in common at their ends."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def check_rows_are_ruled(specialists: Sequence[Specialist], name: str, kind: Kind) -> None:
    """Refuse what a specialist trained apart from linear weights (embeddings, a head, a router); for what no rule speaks of.

    A full model holds a copy of everything, trained or not: there the base's is kept, and the merge says what differed.
    """
    for specialist in specialists:
        rule = f'modules: {{"{name}": {{policy: average}}}}'
        if name in specialist.text_lora:
            factors, pattern = specialist.text_lora[name], name.removesuffix(".weight")
            raise CheckpointError(
                f"{specialist.label} specialist: {factors.a.name} updates {name}, but {PLURALS[kind]} are kept as the base has "
                f"them; list '*{pattern}.*' under `ignore:` to do without, or merge it by a rule: {rule}, or a merge_method there"
            )
        if name in specialist.tuned and not specialist.is_whole:
            ref = specialist.tuned[name]
            raise CheckpointError(
                f"{specialist.label} specialist: {ref.name} was trained ({ref.file}), but {PLURALS[kind]} are kept as the base "
                f"has them; write {rule} to merge it, or policy: keep to do without"
            )


def check_complete(
    recipe: Recipe, specialists: Sequence[Specialist], slots: Iterable[str], owner: Callable[[str], str]
) -> None:
    """Every specialist must update every merged weight, unless the recipe says that a missing one counts as zero.

    `owner` names one that updates a weight, for the message.
    """
    if recipe.missing == "zero":
        return
    wanted = list(slots)
    for specialist in specialists:
        if lacking := [slot for slot in wanted if slot not in specialist.text_lora and slot not in specialist.tuned]:
            raise CheckpointError(
                f"{specialist.label} specialist: has no update of {lacking[0]} ({len(lacking)} weights in all), the "
                f"{owner(lacking[0])} has; say `missing: zero` in the recipe to count it as zero, or keep these weights under "
                "`modules:`"
            )


def check_fishers_are_used(recipe: Recipe, *, given: bool, used: bool) -> None:
    """A Fisher file that nothing reads is a mistake."""
    if given and not used:
        raise RecipeError(
            f"parameters.fisher: {recipe.merge_method} does not weigh by Fisher information; write merge_method: fisher, "
            "or remove the file"
        )


def check_all_accounted(planned: "Plan") -> None:
    """Every tensor of every input has exactly one fate."""
    listed = Counter((fate.source, fate.tensor) for fate in planned.fates)
    inputs = {(label, name) for label, model in planned.starts for name in model.refs}
    inputs |= {(s.label, name) for s in planned.specialists for name in s.checkpoint.refs}
    twice = {key for key, count in listed.items() if count > 1}
    if wrong := sorted((listed.keys() ^ inputs) | twice):
        raise RuntimeError(
            f"the plan does not give one fate to each tensor, for example {wrong[:3]}; please report this"
        )


def _settings(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Every value that may be chosen by filters, and where it is written."""
    for name, value in recipe.parameters.items():
        yield f"parameters.{name}", value
    for index, entry in enumerate(recipe.models):
        for name, value in ({"weight": entry.parameters.weight} | entry.parameters.of_method).items():
            yield f"models.{index}.parameters.{name}", value
    for pattern, rule in recipe.modules.items():
        for name, value in rule.parameters.items():
            yield f"modules.{pattern}.parameters.{name}", value


def check_patterns(recipe: Recipe, planned: "Plan") -> None:
    """A pattern that matches nothing is a mistake in writing."""
    others = [checkpoint for checkpoint in planned.checkpoints() if checkpoint is not planned.target]
    theirs = [name for checkpoint in others for name in checkpoint.refs]
    for key, patterns, names in (
        ("modules", recipe.modules, list(planned.target.refs)),
        ("ignore", recipe.ignore, theirs),
    ):
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                raise RecipeError(f"{key}: no tensor matches '{pattern}'; {nearest(pattern, names[:1000])[:200]}")
    for place, value in _settings(recipe):
        for pattern in filters(value):
            if not any(pattern in name for name in planned.target.refs):
                raise RecipeError(
                    f"{place}: the filter {shown(pattern)} is in no tensor's name; write a part of one, such as mlp or self_attn"
                )
    merged = [job.name for job in planned.written() if job.method or job.pieces]
    averaged = merged + [job.name for job in planned.written() if job.kind == "average"]
    for pattern, rule in recipe.modules.items():
        reached = averaged if rule.merge_method is None else merged  # λ reaches norms and biases too
        if rule.policy is None and not fnmatch.filter(reached, pattern):
            raise RecipeError(
                f"modules: '{pattern}' names a method or its parameters, but no weight that it matches is merged by one; write "
                "policy: keep or average"
            )
        if rule.policy == "average" and not fnmatch.filter(averaged, pattern):
            raise RecipeError(
                f"modules: '{pattern}' is to be averaged, but no other model has what it matches; remove the rule"
            )

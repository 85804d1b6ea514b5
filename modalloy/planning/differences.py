"""What only the data show of a merge's inputs: models that change nothing, and changes of what the recipe keeps.

A plan is made from headers. Before a merge, its inputs are compared with the base block by block; a comparison ends at
the first block that differs, so that it reads little of models that were trained, and all of what is the same.
"""

import re
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from modalloy.errors import CheckpointError, RecipeError
from modalloy.linalg import BLOCK_ENTRIES
from modalloy.methods import METHODS
from modalloy.planning.kinds import OF_ROWS, PLURALS
from modalloy.planning.plan import Plan
from modalloy.planning.planner import plan
from modalloy.recipe import Recipe
from modalloy.specialists.specialist import Specialist
from modalloy.storage.tensors import TensorRef
from modalloy.storage.views import first_rows


def settled_plan(recipe: Recipe, *, allow_base_mismatch: bool = False) -> Plan:
    """The plan of `recipe` once its inputs were compared (see `settle`)."""
    planned = plan(recipe, allow_base_mismatch=allow_base_mismatch)
    return settle(planned, allow_base_mismatch=allow_base_mismatch)


def settle(planned: Plan, *, allow_base_mismatch: bool = False) -> Plan:
    """The plan once its inputs were compared: models that change nothing do not count where others do.

    `unchanged` lists them where none does: the result is the base then, and says so. `trained` lists which models changed
    what is kept as the base has it.

    Raises:
        ModalloyError: as `plan` does; and a model changed what no method merges and no rule speaks of.
    """
    recipe = planned.recipe
    if planned.base is not None:
        counted = [one for one in planned.counted if one in planned.specialists]
        idle = tuple(one.label for one in counted if not _updates(planned, one))
        if idle and len(idle) == len(counted):
            planned = replace(planned, unchanged=idle)
        elif idle and not METHODS[recipe.merge_method].lets_base_count(recipe.parameters):
            planned = plan(recipe, allow_base_mismatch=allow_base_mismatch, idle=idle)
    if planned.across is None:
        _check_frozen(planned)
        _check_unmerged(planned)
        kept = (job.name for job in planned.jobs if job.kind == "keep" and job.name in planned.target.refs)
        names = kept if recipe.form.is_whole else iter(planned.target.refs.keys() - planned.changed())
        planned = replace(planned, trained={name: who for name in names if (who := _who_changed(planned, name))})
    return planned


def _check_frozen(planned: Plan) -> None:
    """Refuse an adapter whose own model is not the base: the difference would be lost."""
    for model in planned.counted:
        for name, ref in model.frozen.items():
            if planned.kinds[name] not in OF_ROWS and _differs(planned, planned.target.refs[name], ref):
                raise CheckpointError(
                    f"{model.label} specialist: {ref.name} differs from the base's, though the adapter beside it is its update "
                    f"({ref.file}); use the base it was trained from, or merge the adapter into the model first"
                )


def _check_unmerged(planned: Plan) -> None:
    """Refuse a change of what the method cannot merge, and no rule speaks of."""
    for name in planned.must_be_equal:
        if who := _who_changed(planned, name):
            ref, kind = planned.target.refs[name], planned.kinds[name]
            pattern = re.sub(r"\.\d+\.", ".*.", name)
            shape = " × ".join(map(str, ref.shape))
            if not ref.dtype.is_floating_point:
                what, remedy = f"{ref.dtype}, no weights", "policy: keep leaves the base's"
            else:
                sums = ", ".join(other for other, method in METHODS.items() if method.is_sum)
                what = f"one of the {PLURALS[kind]}, {shape}, which {planned.recipe.merge_method} does not merge"
                remedy = (
                    f"policy: keep leaves the base's, policy: average takes the mean; {sums} merge tensors of any shape"
                )
            raise RecipeError(
                f'{", ".join(who)} changed {name} ({what}); write modules: {{"{pattern}": {{policy: …}}}}: {remedy}'
            )


def _who_changed(planned: Plan, name: str) -> list[str]:
    """The labels of the models that count and have another value of a tensor than the base."""
    base = planned.target.refs[name]
    return [
        one.label
        for one in planned.counted
        if name in one.text_lora
        or ((copy := one.tuned.get(name) or one.frozen.get(name)) is not None and _differs(planned, base, copy))
        or (name in one.shorter and _differs(planned, first_rows(base, one.shorter[name].shape[0]), one.shorter[name]))
    ]


def _updates(planned: Plan, model: Specialist) -> bool:
    """Whether a model changes anything that could be merged, averaged or kept."""
    for factors in sorted(model.text_lora.values(), key=lambda factors: factors.b.n_bytes):
        if _has_entries(planned, factors.b) and _has_entries(planned, factors.a):
            return True
    tuned = sorted(model.tuned.items(), key=lambda item: item[1].n_bytes)
    starts = {} if planned.across is None else planned.across.starts | planned.across.vectors
    return any(
        _differs(planned, start, ref)
        for name, ref in tuned
        if (start := starts.get(name) or planned.target.refs.get(name))
    )


def _has_entries(planned: Plan, ref: TensorRef) -> bool:
    """Whether any entry of a tensor is other than zero."""
    return any(bool(block.any()) for block in _blocks(planned, ref))


def _differs(planned: Plan, one: TensorRef, other: TensorRef) -> bool:
    """Whether two tensors of one shape differ in any entry; their types may differ."""
    return any(
        not torch.equal(a.to(wide), b.to(wide))
        for a, b in zip(_blocks(planned, one), _blocks(planned, other), strict=True)
        for wide in [torch.promote_types(a.dtype, b.dtype)]
    )


def _blocks(planned: Plan, ref: TensorRef) -> Iterator[Tensor]:
    """The data of a tensor, flat, in blocks; what is not stored in one piece is read whole."""
    count = ref.n_bytes // ref.dtype.itemsize
    if ref.begin < 0:
        yield from planned.inputs.read(ref).reshape(-1).split(BLOCK_ENTRIES)
        return
    for start in range(0, count, BLOCK_ENTRIES):
        length = min(BLOCK_ENTRIES, count - start)
        yield planned.inputs.read(replace(ref, shape=(length,), begin=ref.begin + start * ref.dtype.itemsize))

"""Updates of fused experts, as PEFT stores those of `target_parameters`: E low-rank updates in two matrices.

A is (E · rank, in), the rows of one expert after those of another; B is (out, rank · E), expert e in columns e, e + E, …
A module whose parameters are targeted is wrapped once for each, the first innermost: `experts.base_layer.lora_A`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modalloy.errors import CheckpointError
from modalloy.senses.stored import Stored, class_model, stored_parameters
from modalloy.specialists.peft import alphas_of, ranks_of, scale_of
from modalloy.specialists.specialist import Specialist, StoredLora, put_update
from modalloy.specialists.spelling import canonical
from modalloy.storage.tensors import Checkpoint
from modalloy.storage.views import rows_of_tensor, spaced_columns, stretch, transposed

WRAPPED = ".base_layer"


@dataclass(frozen=True)
class StackedLora(StoredLora):
    """The updates of E matrices of one tensor: each scale · B_e A_e, or its transpose where experts are stored as (in, out)."""

    experts: int = 1
    turned: bool = False
    parameter: str = ""  # by the class's own name
    place: int = 0  # among the parameters of its module

    @property
    def rank(self) -> int:
        """Of each expert's update."""
        return self.a.shape[0] // self.experts

    @property
    def shape(self) -> tuple[int, ...]:
        """(experts, ·, ·), as the weight is stored."""
        sides = (self.b.shape[0], self.a.shape[1])
        return (self.experts, *(reversed(sides) if self.turned else sides))

    def one(self, index: int) -> StoredLora:
        """The update of one expert, as its matrix is stored."""
        source, rows = stretch(self.a, ((index * self.rank, (index + 1) * self.rank),))
        a, b = rows_of_tensor(self.a.name, source, rows), spaced_columns(self.b, index, self.experts)
        return StoredLora(transposed(b), transposed(a), self.scale) if self.turned else StoredLora(a, b, self.scale)


def place_stacked(specialist: Specialist, base: Checkpoint, base_config: dict[str, Any]) -> None:
    """Enter an adapter's updates of fused experts under the base's tensors: one for all experts, or one for each of their matrices.

    Raises:
        CheckpointError: an update fits no parameter of the base, or which of its sides is which cannot be told.
    """
    if not specialist.stacked:
        return
    path = specialist.folder / "adapter_config.json"
    model = class_model(base_config, base.folder)
    stored = stored_parameters(model, base.refs)
    parameters = [_parameter(specialist, stem, model) for stem in specialist.stacked]
    ranks = ranks_of(specialist.config, parameters, path)
    alphas = alphas_of(specialist.config, parameters, path)
    for pair, parameter, rank, alpha in zip(specialist.stacked.values(), parameters, ranks, alphas, strict=True):
        module, _, leaf = parameter.rpartition(".")
        owner = model.get_submodule(module)
        shape = tuple(getattr(owner, leaf).shape)
        whose = f"{specialist.label} specialist: {pair.a.name}"
        if len(shape) != 3 or pair.a.shape[0] != shape[0] * rank or pair.b.shape[1] != pair.a.shape[0]:
            raise CheckpointError(
                f"{whose} has {pair.a.shape[0]} rows, {path} implies {shape[0]} experts of rank {rank:g} in {parameter}; the "
                "two files, or adapter and base, do not belong together"
            )
        turned = _is_turned(whose, parameter, shape, pair)
        place = [name for name, _ in owner.named_parameters(recurse=False)].index(leaf)
        scale = scale_of(specialist.config, rank, alpha)
        whole = StackedLora(pair.a, pair.b, scale, shape[0], turned, parameter, place)
        for slot, update in _in_files(whole, stored.get(parameter), shape, base, whose):
            put_update(specialist, slot, update)
    specialist.stacked = {}


def _parameter(specialist: Specialist, stem: str, model: Any) -> str:
    """The own name of the parameter that the factors of `stem` update: wrappers stand for the targets in their order."""
    plain, depth = stem.replace(WRAPPED, ""), stem.count(WRAPPED)
    wanted = canonical(f"{plain}.")
    named = [name for name, _ in model.named_modules() if name == plain or canonical(f"{name}.") == wanted]
    targets = specialist.config["target_parameters"]
    for module in named:
        leaves = [
            leaf
            for leaf, _ in model.get_submodule(module).named_parameters(recurse=False)
            if any(f".{plain}.{leaf}".endswith(f".{target}") for target in targets)
        ]
        if depth < len(leaves):
            return f"{module}.{leaves[-1 - depth]}"
    raise CheckpointError(
        f"{specialist.label} specialist: {specialist.stacked[stem].a.name} updates none of the parameters "
        f"{', '.join(map(str, targets))} that a {type(model).__name__} has in {plain}; use the base it was trained from"
    )


def _is_turned(whose: str, parameter: str, shape: Sequence[int], pair: StoredLora) -> bool:
    """Whether the class's matrices are the transposes of B A: which they are differs between classes and versions of PEFT."""
    _, first, second = shape
    sides = (pair.b.shape[0], pair.a.shape[1])
    if first == second:
        raise CheckpointError(
            f"{whose}: the experts of {parameter} are square ({first} × {second}), and versions of PEFT differ in which side is "
            "which; merge the adapter into the model with the PEFT that trained it"
        )
    if sides == (first, second):
        return False
    if sides == (second, first):
        return True
    raise CheckpointError(
        f"{whose} and its lora_B update {sides[0]} × {sides[1]} matrices, but the experts of {parameter} are {first} × {second}; "
        "use the base it was trained from"
    )


def _in_files(
    whole: StackedLora, stored: Stored | None, shape: Sequence[int], base: Checkpoint, whose: str
) -> Iterator[tuple[str, StoredLora]]:
    """The updates of a parameter by the base's tensors."""
    count, first, second = shape
    if stored is not None and stored.name is not None and base.refs[stored.name].shape == (count, first, second):
        yield stored.name, whole
    elif stored is not None and stored.name is not None and base.refs[stored.name].shape == (count, second, first):
        yield (
            stored.name,
            StackedLora(whole.a, whole.b, whole.scale, count, not whole.turned, whole.parameter, whole.place),
        )
    elif stored is not None and stored.parts:
        of_each = 1 + max(part for _, part in stored.parts)
        for expert in range(count):
            done, update = 0, whole.one(expert)
            for part in range(of_each):
                slot = stored.parts.get((expert, part))
                if slot is None:
                    raise CheckpointError(
                        f"{whose}: the base has no part {part} of expert {expert} of {whole.parameter}; download the base again"
                    )
                end = done + base.refs[slot].shape[0]
                yield slot, StoredLora(update.a, rows_of_tensor(update.b.name, update.b, ((done, end),)), update.scale)
                done = end
            if done != first:
                raise CheckpointError(
                    f"{whose}: the base stores {done} rows of expert {expert} of {whole.parameter}, its config says {first}; "
                    "download the base again"
                )
    else:
        raise CheckpointError(
            f"{whose} updates {whole.parameter}, which the base {base.folder.name} stores in a form that is not known here; "
            "merge the adapter into the model with PEFT"
        )


def nested_stems(updates: Iterable[Mapping[str, StoredLora]]) -> dict[str, str]:
    """PEFT's name of the module that wraps each updated parameter of experts, by the base's tensor."""
    found = {slot: one for table in updates for slot, one in stacked_updates(table).items()}
    modules: dict[str, list[tuple[int, str]]] = {}
    for slot, one in found.items():
        modules.setdefault(one.parameter.rpartition(".")[0], []).append((one.place, slot))
    return {
        slot: module + WRAPPED * (len(places) - 1 - index)
        for module, places in modules.items()
        for index, (_, slot) in enumerate(sorted(places))
    }


def stacked_updates(table: Mapping[str, StoredLora]) -> dict[str, StackedLora]:
    """Those of an adapter's updates that are of all experts of a tensor."""
    return {slot: one for slot, one in table.items() if isinstance(one, StackedLora)}

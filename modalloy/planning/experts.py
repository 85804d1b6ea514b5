"""Fused experts: several linear weights in one tensor (experts, ·, ·), each merged by the method as the weight that it is.

transformers' own classes store an expert as (out, in), some published files as (in, out). Most methods do not mind; those
that tell the sides apart are given (out, in), where config and name say which is which.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from modalloy.errors import RecipeError
from modalloy.methods import METHODS
from modalloy.planning.job import Job
from modalloy.specialists.specialist import StoredLora
from modalloy.specialists.stacked import StackedLora
from modalloy.storage.tensors import TensorRef
from modalloy.storage.views import transposed

Sides = Literal["out, in", "in, out"]
READS_WIDTH = (
    "gate_up",
    "gate",
    "up",
    "w1",
    "w3",
)  # by the beginning of the parameter's name: it takes the model's width
GIVES_WIDTH = ("down", "w2")
ANYWAY = ("dare_linear", "dare_ties")  # which drop entries by chance


def sides_of(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> Sides | None:
    """Which way a fused expert is stored, None where names and sizes do not tell."""
    text = config.get("text_config") if isinstance(config.get("text_config"), Mapping) else config
    assert isinstance(text, Mapping)
    width, (_, first, second) = text.get("hidden_size"), shape
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    if width not in (first, second) or first == second:
        return None
    if leaf.startswith(GIVES_WIDTH):
        return "out, in" if first == width else "in, out"
    if leaf.startswith(READS_WIDTH):
        return "out, in" if second == width else "in, out"
    return None


def expert_job(whole: Job, config: Mapping[str, Any]) -> Job:
    """The job of a fused tensor, or of the factors of its update, from that of the tensor as one weight: a piece for each expert.

    Raises:
        RecipeError: the method tells the sides of a weight apart, and which is which cannot be told.
    """
    assert whole.start is not None
    count, rows, columns = whole.start.shape
    turned = False
    if METHODS[whole.method].tells_sides(whole.parameters) and whole.method not in ANYWAY:
        sides = sides_of(whole.name, whole.start.shape, config)
        if sides is None:
            raise RecipeError(
                f"{whole.name}: {whole.method} tells a weight's inputs from its outputs, and neither name nor config say which "
                f'is which in {" × ".join(map(str, whole.start.shape))}; write modules: {{"{whole.name}": {{merge_method: '
                "task_arithmetic}}, or policy: keep"
            )
        turned = sides == "in, out"
    shape = (columns, rows) if turned else (rows, columns)
    outputs = tuple(replace(spec, shape=shape) for spec in whole.outputs)
    if len(outputs) == 2:
        rank = whole.outputs[0].shape[0] // count
        sizes = ((rank, shape[1]), (shape[0], rank))
        outputs = tuple(replace(spec, shape=size) for spec, size in zip(whole.outputs, sizes, strict=True))

    def matrix(ref: TensorRef, index: int) -> TensorRef:
        own = ref.one(index)
        return transposed(own) if turned else own

    def update(model: StoredLora | TensorRef | None, index: int) -> StoredLora | TensorRef | None:
        if isinstance(model, StackedLora):
            return replace(model, turned=model.turned != turned).one(index)
        assert not isinstance(model, StoredLora)
        return None if model is None else matrix(model, index)

    pieces = tuple(
        replace(
            whole,
            name=f"{whole.name}[{index}]",
            outputs=outputs,
            start=matrix(whole.start, index),
            models=tuple(update(model, index) for model in whole.models),
            fishers=tuple(matrix(ref, index) for ref in whole.fishers),
            rows=((index * rows, (index + 1) * rows),),
        )
        for index in range(count)
    )
    return Job("fuse", whole.name, whole.outputs, pieces=pieces, method="")

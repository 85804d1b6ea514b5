"""Merging methods: one paper, one file, one line in METHODS.

A method is a function from one matrix per specialist to the merged update; its keyword parameters are its schema.
`receives` says what it is called with when the specialists are low-rank:

- "core": small matrices C_i with D_i = Q_B C_i Q_Aᵀ. For methods with f({P D_i Qᵀ}) = P f({D_i}) Qᵀ, which are then exact.
- "factors": the `LowRank` updates themselves, for what is linear in every update.

When they are dense, every method gets the dense matrices.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from modalloy.delta import Delta, LowRank, lift
from modalloy.errors import MethodError, RecipeError, nearest
from modalloy.methods.average import average
from modalloy.methods.damc import damc
from modalloy.methods.ssam import ssam
from modalloy.methods.task_arithmetic import task_arithmetic

DENSE_RANK = 128  # `rank: auto` when no specialist is low-rank (the paper's k)


@dataclass(frozen=True)
class Method:
    """A merging function, what it is called with, its paper, and what `scale: auto` means: λ = 1/n or λ = 1."""

    function: Callable[..., Any]
    receives: Literal["core", "factors"]
    paper: str
    mean_scale: bool
    laws: tuple[str, ...]

    @property
    def parameters(self) -> dict[str, Any]:
        """Name → default of every parameter that a recipe may set; "auto" where the caller works it out."""
        keywords = inspect.signature(self.function).parameters.values()
        empty = inspect.Parameter.empty
        return {
            p.name: "auto" if p.default is empty else p.default
            for p in keywords
            if p.kind is p.KEYWORD_ONLY and p.name != "shape"
        }

    @property
    def summary(self) -> str:
        """First line of the function's docstring."""
        return (inspect.getdoc(self.function) or "").split("\n")[0]


LINEAR_LAWS = ("identity at n=1", "permutation", "scaling", "rotation", "transpose", "gauge", "rank ≤ Σ r_i")

METHODS = {
    "average": Method(average, "factors", "arXiv 2203.05482", True, LINEAR_LAWS),
    "damc": Method(damc, "factors", "arXiv 2402.12750", True, LINEAR_LAWS),
    "ssam": Method(
        ssam,
        "core",
        "arXiv 2603.21584",
        True,
        ("permutation", "scaling", "rotation", "transpose", "gauge", "rank ≤ k", "rank ≤ Σ r_i"),
    ),
    "task_arithmetic": Method(task_arithmetic, "factors", "arXiv 2212.04089", False, LINEAR_LAWS),
}


def merge_deltas(
    deltas: Sequence[Delta], method: str = "ssam", *, weights: Sequence[float] | None = None, **parameters: Any
) -> Delta:
    """The merged update of one linear layer: LowRank from LowRank, dense from dense (or mixed).

    Args:
        deltas: one update (out, in) per specialist, each a `LowRank` or a dense tensor, alpha/r folded in.
        method: a name in METHODS.
        weights: one factor per specialist, applied first of all; never renormalised.
        parameters: the method's own, for example `rank=128, scale=0.25`; what is left out is "auto".

    Raises:
        MethodError: shapes differ, values are not finite, or a parameter is out of range.
        RecipeError: no such method or parameter.
    """
    check_method(method, parameters)
    if not deltas:
        raise MethodError("nothing to merge: give at least one update")
    shape = (int(deltas[0].shape[0]), int(deltas[0].shape[1]))
    for index, delta in enumerate(deltas):
        if tuple(delta.shape) != shape:
            raise MethodError(f"update {index} is {tuple(delta.shape)} but update 0 is {shape}; all must be alike")
    if weights is not None:
        if len(weights) != len(deltas):
            raise MethodError(f"{len(weights)} weights for {len(deltas)} updates; give one each")
        deltas = [delta if weight == 1 else weight * delta for delta, weight in zip(deltas, weights, strict=True)]
    ranks = [delta.rank for delta in deltas if isinstance(delta, LowRank)]
    chosen = resolve(method, parameters, n=len(deltas), lora_rank=max(ranks, default=None))
    return apply(method, list(deltas), chosen, shape)


def apply(method: str, deltas: list[Delta], parameters: dict[str, Any], shape: tuple[int, int]) -> Delta:
    """Run a method with resolved parameters. Cores are float64; the result is float32, or float64 if an input is."""
    import torch

    entry = METHODS[method]
    dtype = torch.float32
    for delta in deltas:
        dtype = torch.promote_types(dtype, delta.up.dtype if isinstance(delta, LowRank) else delta.dtype)
    factored = [delta for delta in deltas if isinstance(delta, LowRank)]
    if len(factored) == len(deltas):
        if entry.receives == "core":
            cores, restore = lift(factored)
            return restore(entry.function(cores, **parameters, shape=shape), dtype)
        merged = entry.function([delta.to(dtype) for delta in factored], **parameters, shape=shape)
        for factor in (merged.up, merged.down):
            _require_finite(factor)
        return merged
    dense: list[Tensor] = [
        delta.to(dtype).dense() if isinstance(delta, LowRank) else delta.to(dtype) for delta in deltas
    ]
    for matrix in dense:
        _require_finite(matrix)
    result = entry.function(dense, **parameters, shape=shape)
    return (result.dense() if isinstance(result, LowRank) else result).to(dtype)


def check_method(method: str, parameters: dict[str, Any]) -> None:
    """Refuse an unknown method or parameter, and values out of range."""
    if method not in METHODS:
        raise RecipeError(f"unknown merge method '{method}'; {nearest(method, METHODS)}")
    known = METHODS[method].parameters
    for name, value in parameters.items():
        if name not in known:
            raise RecipeError(f"method '{method}' has no parameter '{name}'; {nearest(name, known)}")
        if value == "auto" and known[name] == "auto":
            continue
        if name == "rank":
            parse_rank(value)
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
            raise RecipeError(
                f"{name}: {value!r} is not a finite number; write for example 0.25 (in YAML 1.0e-3, not 1e-3)"
            )


def parse_rank(value: Any) -> int | float:
    """A rank as a recipe writes it: a whole number from 1, or {energy: f} with 0 < f < 1, which gives f."""
    if isinstance(value, dict) and list(value) == ["energy"]:
        fraction = value["energy"]
        if isinstance(fraction, (int, float)) and not isinstance(fraction, bool) and 0 < fraction < 1:
            return float(fraction)
        raise RecipeError(f"rank: energy {fraction!r} is not between 0 and 1; for example {{energy: 0.95}}")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise RecipeError(f"rank: {value!r} is not a whole number of at least 1, nor {{energy: 0.95}}")
    return value


def resolve(method: str, parameters: dict[str, Any], *, n: int, lora_rank: int | None) -> dict[str, Any]:
    """Every parameter of a method with "auto" worked out for `n` specialists, the largest LoRA rank being `lora_rank`."""
    check_method(method, parameters)
    entry = METHODS[method]
    chosen = entry.parameters | parameters
    if chosen.get("scale") == "auto":
        chosen["scale"] = 1 / n if entry.mean_scale else 1.0
    if "rank" in chosen:
        automatic = max(lora_rank, 1) if lora_rank is not None else DENSE_RANK
        chosen["rank"] = automatic if chosen["rank"] == "auto" else parse_rank(chosen["rank"])
    return chosen


def _require_finite(matrix: Tensor) -> None:
    import torch

    if not bool(torch.isfinite(matrix).all()):
        raise MethodError("an update holds NaN or infinite values; the file is damaged or its training diverged")

"""Merging methods: one paper, one file, one line in METHODS.

A method is a function from one matrix per specialist to the merged update; its keyword parameters are its schema.
`receives` says what it is called with when the specialists are low-rank:

- "core": small matrices C_i with D_i = Q_B C_i Q_Aᵀ. For methods with f({P D_i Qᵀ}) = P f({D_i}) Qᵀ, which are then exact.
- "factored_core": the same C_i as `LowRank`, for methods that gain by it.
- "left_core": matrices L_i (p, in) with D_i = Q_B L_i. For methods with f({P D_i}) = P f({D_i}).
- "factors": the `LowRank` updates themselves, for what is linear in every update, or defined on the factors.
- "dense": the full matrices, for what works on single entries. Such a method returns a full matrix.

When they are dense, every method gets the dense matrices.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from modalloy.delta import Delta, LowRank, lift, lift_left
from modalloy.errors import MethodError, RecipeError, nearest, shown
from modalloy.linalg import require_finite
from modalloy.methods.average import average
from modalloy.methods.consensus import consensus
from modalloy.methods.core_space import core_space
from modalloy.methods.damc import damc
from modalloy.methods.dare import dare_linear, dare_ties, survey_dare_ties
from modalloy.methods.factorwise import factorwise
from modalloy.methods.fisher import fisher
from modalloy.methods.iso import iso_c, iso_cts
from modalloy.methods.knots import knots
from modalloy.methods.linear import linear
from modalloy.methods.metagpt import metagpt, survey_metagpt
from modalloy.methods.optmerge import optmerge
from modalloy.methods.parameters import Rank, check_value, documentation, is_whole, parse_rank, schema
from modalloy.methods.ssam import ssam
from modalloy.methods.swudi import swudi
from modalloy.methods.task_arithmetic import task_arithmetic
from modalloy.methods.ties import survey_ties, ties
from modalloy.methods.tsv import tsv
from modalloy.methods.wudi import wudi

DENSE_RANK = 128  # `rank: auto` when no specialist is low-rank (the paper's k)
Receives = Literal["core", "factored_core", "left_core", "factors", "dense"]


@dataclass(frozen=True)
class Method:
    """A merging function, what it is called with, its paper, and what `scale: auto` means: λ = 1/n or λ = 1."""

    function: Callable[..., Any]
    receives: Receives
    paper: str
    mean_scale: bool
    laws: tuple[str, ...]
    dense_when: tuple[str, str] | None = None  # the parameter and its value that need the full matrices
    scale_when: tuple[str, str, float] | None = None  # a parameter, its value, and what `scale: auto` means there
    one_rank: bool = False  # takes only LoRA factors, all of one rank, which its result has too
    survey: Callable[..., dict[str, Any]] | None = None  # whole-model numbers that it needs first (see `survey_model`)
    survey_when: tuple[str, str] | None = None  # the parameter and its value that need them (None: always)
    copies: bool = False  # holds a second copy of every update
    copies_unless: tuple[str, str] | None = None  # a parameter and its value; with any other it holds such copies
    rowwise: bool = False  # every row of the result depends on that row of the updates only

    def gets(self, parameters: dict[str, Any]) -> Receives:
        """What it is called with under these parameters."""
        if self.dense_when is not None and parameters.get(self.dense_when[0]) == self.dense_when[1]:
            return "dense"
        return self.receives

    @property
    def needs_factors(self) -> bool:
        """Whether it merges low-rank updates only: what it does with factors has no counterpart on full matrices."""
        return self.receives == "factors" and not self.rowwise

    @property
    def is_sum(self) -> bool:
        """Whether the merged update is one factor times the sum of the updates, so that their shape does not matter."""
        return self.receives == "factors" and self.rowwise and self.survey is None

    def sum_factor(self, parameters: dict[str, Any], n: int) -> float:
        """What multiplies the sum of `n` updates under these parameters, of a method that is a sum."""
        return parameters["scale"] if "scale" in parameters else parameters["alpha"] / n

    def needs_survey(self, parameters: dict[str, Any]) -> bool:
        """Whether it must see the whole model first."""
        when = self.survey_when
        return self.survey is not None and (when is None or parameters[when[0]] == when[1])

    def copies_updates(self, parameters: dict[str, Any]) -> bool:
        """Whether it holds a second copy of every update under these parameters."""
        unless = self.copies_unless
        return self.copies or (unless is not None and parameters[unless[0]] != unless[1])

    def automatic_scale(self, n: int, parameters: dict[str, Any]) -> float:
        """λ under `scale: auto` for n specialists and these parameters."""
        if self.scale_when is not None and parameters.get(self.scale_when[0]) == self.scale_when[1]:
            return self.scale_when[2]
        return 1 / n if self.mean_scale else 1.0

    @property
    def auto_scale(self) -> str:
        """What `scale: auto` means, in words; "" without such a parameter."""
        if "scale" not in self.parameters:
            return ""
        special = "; {2:g} with {0}: {1}".format(*self.scale_when) if self.scale_when is not None else ""
        return ("1/n" if self.mean_scale else "1") + special

    @property
    def parameters(self) -> dict[str, Any]:
        """Name → default of every parameter that a recipe may set; "auto" where the caller works it out."""
        return {name: default for name, (_, default) in schema(self.function).items()}

    def is_whole(self, name: str) -> bool:
        """Whether a parameter is a whole number."""
        annotation, _ = schema(self.function)[name]
        return is_whole(annotation)

    @property
    def takes_k(self) -> bool:
        """Whether its `rank` is that of the merged update, whose "auto" is the specialists' largest LoRA rank."""
        return "rank" in self.parameters and schema(self.function)["rank"][0] is Rank

    @property
    def documentation(self) -> dict[str, str]:
        """Name → meaning of every parameter."""
        return {name: text for name, text in documentation(self.function).items() if name in self.parameters}

    @property
    def summary(self) -> str:
        """First line of the function's docstring."""
        return (inspect.getdoc(self.function) or "").split("\n")[0]

    def takes(self, name: str) -> bool:
        """Whether the function asks for `name`, a parameter or something given (`slot`, `fishers`, `whole`)."""
        return name in inspect.signature(self.function).parameters


ROTATION_LAWS = ("permutation", "scaling", "left rotation", "rotation", "transpose", "gauge", "factored = dense")
ENTRY_LAWS = ("permutation", "scaling", "transpose", "gauge", "factored = dense")  # of what treats all entries alike
MASK_LAWS = ("scaling", "gauge", "factored = dense")  # a mask belongs to one specialist and one place
LINEAR_LAWS = ("identity at n=1", *ROTATION_LAWS, "rank ≤ Σ r_i")
FLAT_LAWS = LINEAR_LAWS[1:]  # a given spectrum, or a given share, is no identity
GLOBAL = ("threshold", "global")
ROW_LAWS = tuple(law for law in LINEAR_LAWS if law != "transpose")  # rows and columns of D_i play different parts


METHODS = {
    "average": Method(average, "factors", "arXiv 2203.05482", True, LINEAR_LAWS, rowwise=True),
    "consensus": Method(consensus, "dense", "arXiv 2405.07813", False, ENTRY_LAWS, rowwise=True),
    "core_space": Method(
        core_space,
        "factors",
        "arXiv 2509.17786",
        False,
        ("permutation", "scaling", "left rotation", "rotation", "transpose", "rank ≤ Σ r_i"),
    ),
    "damc": Method(damc, "factors", "arXiv 2402.12750", True, LINEAR_LAWS, rowwise=True),
    "dare_linear": Method(dare_linear, "dense", "arXiv 2311.03099", False, MASK_LAWS),
    "dare_ties": Method(
        dare_ties,
        "dense",
        "arXiv 2311.03099",
        False,
        MASK_LAWS,
        survey=survey_dare_ties,
        survey_when=GLOBAL,
        copies=True,
    ),
    "factorwise": Method(
        factorwise,
        "factors",
        "arXiv 2402.12750",
        False,
        tuple(law for law in LINEAR_LAWS if law not in ("gauge", "factored = dense")),
        one_rank=True,
    ),
    "fisher": Method(fisher, "dense", "arXiv 2111.09832", False, ("identity at n=1", *ENTRY_LAWS)),
    "iso_c": Method(iso_c, "core", "arXiv 2502.04959", False, FLAT_LAWS),
    "iso_cts": Method(iso_cts, "core", "arXiv 2502.04959", False, ROW_LAWS[1:]),
    "knots": Method(
        knots,
        "left_core",
        "arXiv 2410.19735",
        False,
        ("permutation", "scaling", "left rotation", "gauge", "factored = dense", "rank ≤ Σ r_i"),
    ),
    "linear": Method(linear, "factors", "arXiv 2503.23733", False, FLAT_LAWS, rowwise=True),
    "metagpt": Method(metagpt, "factors", "arXiv 2406.11385", False, LINEAR_LAWS, survey=survey_metagpt, rowwise=True),
    "optmerge": Method(
        optmerge,
        "core",
        "arXiv 2505.19892",
        False,
        ROW_LAWS,
        dense_when=("variant", "full"),
        scale_when=("variant", "full", 0.1),
    ),
    "ssam": Method(
        ssam,
        "factored_core",
        "arXiv 2603.21584",
        True,
        (*ROTATION_LAWS, "rank ≤ k", "rank ≤ Σ r_i"),
        scale_when=("match", "norm", 1.0),
        copies_unless=("balance", "none"),
    ),
    "swudi": Method(swudi, "core", "arXiv 2606.07289", False, ROW_LAWS),
    "task_arithmetic": Method(task_arithmetic, "factors", "arXiv 2212.04089", False, LINEAR_LAWS, rowwise=True),
    "ties": Method(ties, "dense", "arXiv 2306.01708", False, ENTRY_LAWS, survey=survey_ties, survey_when=GLOBAL),
    "tsv": Method(tsv, "core", "arXiv 2412.00081", False, LINEAR_LAWS),
    "wudi": Method(wudi, "core", "arXiv 2503.08099", False, ROW_LAWS, dense_when=("solver", "adam")),
}


def merge_deltas(
    deltas: Sequence[Delta],
    method: str = "ssam",
    *,
    weights: Sequence[float] | None = None,
    slot: str = "",
    fishers: Sequence[Tensor] | None = None,
    **parameters: Any,
) -> Delta:
    """The merged update of one linear layer: LowRank from LowRank, dense from dense (or mixed).

    Methods that work on single entries (`modalloy methods` says which) give a dense update from anything.

    Args:
        deltas: one update (out, in) per specialist, each a `LowRank` or a dense tensor, alpha/r folded in.
        method: a name in METHODS.
        weights: one factor per specialist, applied first of all; never renormalised.
        slot: name of the weight; random choices are keyed by it.
        fishers: one Fisher matrix (out, in) per specialist, for the methods that weigh by them.
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
    whole = survey_model(method, lambda: [(slot, list(deltas))], chosen)
    merged = apply(method, list(deltas), chosen, shape, slot=slot, fishers=fishers, whole=whole)
    return merged.dense() if isinstance(merged, LowRank) and len(ranks) < len(deltas) else merged


def apply(
    method: str,
    deltas: list[Delta],
    parameters: dict[str, Any],
    shape: tuple[int, int],
    *,
    slot: str = "",
    fishers: Sequence[Tensor] | None = None,
    whole: dict[str, Any] | None = None,
) -> Delta:
    """Run a method with resolved parameters. Cores are float64; the result is float32, or float64 if an input is.

    It is low-rank if all updates are, or if the method gives a low-rank result for full matrices too.
    """
    entry = METHODS[method]
    given = {"shape": shape, "slot": slot, "fishers": fishers, "whole": whole}
    arguments = parameters | {name: value for name, value in given.items() if entry.takes(name)}
    if entry.takes("fishers"):
        _check_fishers(method, fishers, len(deltas), shape)
    dtype = _common_dtype(deltas)
    factored = [delta for delta in deltas if isinstance(delta, LowRank)]
    gets = entry.gets(parameters)
    if len(factored) == len(deltas) and gets != "dense":
        if gets == "factors":
            merged = entry.function([delta.to(dtype) for delta in factored], **arguments)
            for factor in (merged.up, merged.down):
                require_finite(factor)
            return merged
        if gets == "left_core":
            matrices, restore = lift_left(factored)
            return restore(entry.function(matrices, **arguments), dtype)
        cores, restore = lift(factored)
        small = [core.dense() for core in cores] if gets == "core" else cores
        return restore(entry.function(small, **arguments), dtype)
    result: Delta = entry.function(dense_matrices(deltas), **arguments)
    return result.to(dtype)


def dense_matrices(deltas: list[Delta]) -> list[Tensor]:
    """Every update as a finite full matrix, in float32 or in the wider type of the widest."""
    dtype = _common_dtype(deltas)
    matrices = [delta.to(dtype).dense() if isinstance(delta, LowRank) else delta.to(dtype) for delta in deltas]
    for matrix in matrices:
        require_finite(matrix)
    return matrices


def survey_model(
    method: str, model: Callable[[], Iterable[tuple[str, list[Delta]]]], parameters: dict[str, Any]
) -> dict[str, Any] | None:
    """The whole-model numbers that a method needs before its first layer (a global threshold), None if it needs none.

    Args:
        method: a name in METHODS.
        model: gives the slot and the updates of every merged weight, always one update per specialist in the same
            order (zeros where it has none); called several times.
        parameters: resolved parameters.
    """
    entry = METHODS[method]
    if entry.survey is None or not entry.needs_survey(parameters):
        return None
    if entry.gets(parameters) == "dense":
        return entry.survey(lambda: ((slot, dense_matrices(deltas)) for slot, deltas in model()), **parameters)
    return entry.survey(model, **parameters)


def check_method(method: str, parameters: dict[str, Any], *, gradients: bool = False) -> None:
    """Refuse an unknown method or parameter, and values out of range. With `gradients`, a list of numbers over depth is a value."""
    if method not in METHODS:
        raise RecipeError(f"unknown merge method '{method}'; {nearest(method, METHODS)}")
    known = schema(METHODS[method].function)
    for name, value in parameters.items():
        if name not in known:
            raise RecipeError(f"method '{method}' has no parameter '{name}'; {nearest(name, known)}")
        if gradients and isinstance(value, list) and not value:
            raise RecipeError(f"{name}: an empty list; give one value, or one or more over the depth of the model")
        several = gradients and isinstance(value, list)
        for single in value if several else [value]:
            check_value(name, single, *known[name])
            if several and (isinstance(single, bool) or not isinstance(single, (int, float))):
                raise RecipeError(
                    f"{name}: {shown(single)} cannot be in a list over the depth; it must hold numbers only"
                )


def resolve(method: str, parameters: dict[str, Any], *, n: int, lora_rank: int | None) -> dict[str, Any]:
    """Every parameter of a method with "auto" worked out for `n` specialists, the largest LoRA rank being `lora_rank`."""
    check_method(method, parameters)
    entry = METHODS[method]
    chosen = entry.parameters | parameters
    if chosen.get("scale") == "auto":
        chosen["scale"] = entry.automatic_scale(n, chosen)
    if entry.takes_k:
        automatic = max(lora_rank, 1) if lora_rank is not None else DENSE_RANK
        chosen["rank"] = automatic if chosen["rank"] == "auto" else parse_rank(chosen["rank"])
    return chosen


def _common_dtype(deltas: Sequence[Delta]) -> torch.dtype:
    dtype = torch.float32
    for delta in deltas:
        dtype = torch.promote_types(dtype, delta.up.dtype if isinstance(delta, LowRank) else delta.dtype)
    return dtype


def _check_fishers(method: str, fishers: Sequence[Tensor] | None, n: int, shape: tuple[int, int]) -> None:
    if fishers is None or len(fishers) != n:
        raise MethodError(f"method '{method}' weighs by Fisher matrices: give one per specialist ({n}) as fishers=")
    for index, matrix in enumerate(fishers):
        if tuple(matrix.shape) != shape:
            raise MethodError(
                f"Fisher matrix {index} is {tuple(matrix.shape)}, the weight is {shape}; they must be alike"
            )
        if not bool(torch.isfinite(matrix).all()) or bool((matrix < 0).any()):
            raise MethodError(f"Fisher matrix {index} holds negative, NaN or infinite values; compute it again")

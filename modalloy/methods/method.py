"""What a merging method says of itself: what it receives, keeps and costs."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from modalloy.methods.parameters import Rank, arguments, documentation, is_whole, schema

Receives = Literal["core", "factored_core", "left_core", "factors", "dense"]
Condition = Callable[[dict[str, Any]], bool]  # of a method's parameters
MeanFactor = Callable[[dict[str, Any], Sequence[float]], float]  # of a method's parameters and the models' weights

ROTATION_LAWS = ("permutation", "scaling", "left rotation", "rotation", "transpose", "gauge", "factored = dense")
ENTRY_LAWS = ("permutation", "scaling", "transpose", "gauge", "factored = dense")  # of what treats all entries alike
MASK_LAWS = ("scaling", "gauge", "factored = dense")  # a mask belongs to one specialist and one place
WEIGHT_LAWS = (
    "permutation",
    "transpose",
    "gauge",
    "factored = dense",
)  # the base does not turn or grow with the updates
LINEAR_LAWS = ("identity at n=1", *ROTATION_LAWS, "rank ≤ Σ r_i")
FLAT_LAWS = LINEAR_LAWS[1:]  # a given spectrum, or a given share, is no identity
ROW_LAWS = tuple(law for law in LINEAR_LAWS if law != "transpose")  # rows and columns of D_i play different parts


def never(parameters: dict[str, Any]) -> bool:
    """Whatever the parameters: no."""
    return False


def always(parameters: dict[str, Any]) -> bool:
    """Whatever the parameters: yes."""
    return True


def is_global(parameters: dict[str, Any]) -> bool:
    """Whether a threshold is that of the whole model."""
    return bool(parameters["threshold"] == "global")


def around_zero(parameters: dict[str, Any]) -> bool:
    """Whether the weights themselves are the points that are merged, not what they differ from the base by."""
    return bool(parameters.get("origin") == "zero")


def no_conflict(parameters: dict[str, Any]) -> str:
    """Whatever the parameters: they fit each other."""
    return ""


@dataclass(frozen=True)
class Method:
    """A merging function, what it is called with, its paper, and what `scale: auto` means: λ = 1/n or λ = 1."""

    function: Callable[..., Any]
    receives: Receives
    paper: str
    laws: tuple[str, ...]
    mean_scale: bool = False
    dense: Condition = never  # whether it needs the full matrices
    scale_when: tuple[str, str, float] | None = None  # a parameter, its value, and what `scale: auto` means there
    one_rank: bool = False  # takes only LoRA factors, all of one rank, which its result has too
    survey: Callable[..., dict[str, Any]] | None = None  # whole-model numbers that it needs first (see `survey_model`)
    surveys: Condition = always  # whether it needs them, if it has a survey
    copies_updates: Condition = never  # whether it holds a second copy of every update
    rowwise: bool = False  # every row of the result depends on that row of the updates only
    base: Condition = never  # whether it receives the base's weight; it gets full matrices then
    models: tuple[int, int | None] = (1, None)  # how many models it merges, at least and at most
    counts_base: Condition = never  # whether a copy of the base among the models is one of them
    combines: bool = False  # a sum of updates and base whose factors come from inner products: nothing is decomposed
    sides: Condition = never  # whether it tells rows from columns where its laws do not say so
    mean: MeanFactor | None = None  # what multiplies the mean of norms and biases, where that is neither λ nor α
    keeps_vectors: bool = False  # whether norms and biases stay the base's
    picks: bool = False  # takes single entries of its core, of which other rounding may take others
    conflict: Callable[[dict[str, Any]], str] = no_conflict  # one line on parameters that do not fit each other

    def gets(self, parameters: dict[str, Any]) -> Receives:
        """What it is called with under these parameters."""
        return "dense" if self.dense(parameters) or self.base(parameters) else self.receives

    def on_cores(self, parameters: dict[str, Any]) -> bool:
        """Whether of low-rank updates it is called with cores, so that it reads no factors itself."""
        return self.gets(parameters) in ("core", "factored_core")

    def tells_sides(self, parameters: dict[str, Any]) -> bool:
        """Whether the merge of transposed updates is another than the transposed merge."""
        return "transpose" not in self.laws or self.sides(parameters)

    def lets_base_count(self, parameters: dict[str, Any]) -> bool:
        """Whether a copy of the base among the models is one of those merged, under parameters as a recipe has them."""
        return self.counts_base(self.parameters | parameters)

    def wrong_number(self, n: int) -> str | None:
        """Why it cannot merge `n` models, None if it can."""
        least, most = self.models
        if least <= n and (most is None or n <= most):
            return None
        wanted = f"{'exactly' if least == most else 'at least'} {least} model{'s' if least > 1 else ''}"
        return f"merges {wanted} beside the base, but {n} count{'s' if n == 1 else ''}"

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
        return self.survey is not None and self.surveys(parameters)

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
        """Whether the function asks for `name`, a parameter or something given (`slot`, `fishers`, `whole`,
        `base`, `weights`)."""
        return name in arguments(self.function)

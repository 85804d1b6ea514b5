"""NuSLERP (mergekit, Goddard et al., EMNLP 2024): between two models along the arc between their updates, or weights."""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from modalloy.errors import MethodError
from modalloy.methods.method import FLAT_LAWS, Method, around_zero
from modalloy.methods.parameters import Switch
from modalloy.methods.sphere import arc, combined, products

STRAIGHT = 1 - 1e-12  # |cos θ| above which rounding cannot tell the angle from 0 or π
Origin = Literal["base", "zero"]


def nuslerp(
    deltas: list[Tensor],
    *,
    nuslerp_flatten: Switch = True,
    nuslerp_row_wise: Switch = False,
    origin: Origin = "base",
    weights: Sequence[float],
    shape: tuple[int, int],
    base: Tensor | None = None,
) -> Tensor:
    """sin((1 − t)θ)/sin θ · D_1 + sin(tθ)/sin θ · D_2 with t = w_2/(w_1 + w_2) and θ the angle between the two updates.

    With `origin: zero` the same of the weights W_0 + D_i, less W_0. Where θ is 0 or π it is (1 − t) D_1 + t D_2. Norms and
    biases: the mean, by the weights over their sum.

    Args:
        deltas: the updates (out, in) of two models.
        nuslerp_flatten: whether a weight is one vector; else each of its rows is one, that of an output.
        nuslerp_row_wise: without nuslerp_flatten, whether the vectors are the columns W[:, j], those of an input, as
            mergekit's key of this name takes them.
        origin: where the vectors begin: at the "base", as mergekit's with base_model, or at "zero", as without.
        weights: w_i, of the models.
        shape: of the original weight; unused.
        base: W_0 (out, in), for origin "zero".

    Cost: two passes over the entries; memory one matrix beside the inputs.
    """
    total = sum(weights)
    if abs(total) <= 1e-6 * max(map(abs, weights)):
        raise MethodError("nuslerp: the weights sum to 0, which is no place between two models; give others")
    t = weights[1] / total
    if nuslerp_row_wise and not nuslerp_flatten:
        turned = None if base is None else base.T
        return _between([delta.T for delta in deltas], t, turned, rowwise=True).T.contiguous()
    return _between(deltas, t, base, rowwise=not nuslerp_flatten)


def _between(deltas: list[Tensor], t: float, base: Tensor | None, *, rowwise: bool) -> Tensor:
    return combined(deltas, arc(products(deltas, base, rowwise=rowwise), t, STRAIGHT), base)


def mean_by_weight(parameters: dict[str, Any], weights: Sequence[float]) -> float:
    """What makes the mean of w_i δ_i one by weights that sum to 1; such weights as sum to 0 are the method's to refuse."""
    total = sum(weights)
    return len(weights) / total if total else 1.0


def _by_rows(parameters: dict[str, Any]) -> bool:
    return parameters.get("nuslerp_flatten") is False


METHOD = Method(
    nuslerp,
    "core",
    "arXiv 2403.13257",
    FLAT_LAWS,
    dense=_by_rows,
    base=around_zero,
    models=(2, 2),
    counts_base=around_zero,
    combines=True,
    sides=_by_rows,
    mean=mean_by_weight,
)

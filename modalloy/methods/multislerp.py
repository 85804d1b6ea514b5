"""Multi-SLERP (Goddard, goddard.blog, 2025; in mergekit): a weighted mean of directions, at the mean length."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modalloy.errors import MethodError
from modalloy.methods.method import LINEAR_LAWS, Method, around_zero
from modalloy.methods.nuslerp import Origin, mean_by_weight
from modalloy.methods.parameters import Positive, Switch
from modalloy.methods.sphere import combined, lengths, products

CANCELLED = 1e-7  # a mean of directions this short is one of rounding


def multislerp(
    deltas: list[Tensor],
    *,
    normalize_weights: Switch = True,
    eps: Positive = 1e-8,
    origin: Origin = "base",
    weights: Sequence[float],
    shape: tuple[int, int],
    base: Tensor | None = None,
) -> Tensor:
    """(Σ w_i ‖D_i‖) m/‖m‖ with m = Σ w_i D_i/‖D_i‖: the updates' mean direction at their mean length.

    With `origin: zero` the same of the weights W_0 + D_i, less W_0. The published step in the tangent space at m/‖m‖ adds
    nothing: the weighted sum of the directions' parts orthogonal to it is zero. Where two opposite directions cancel it is
    w_1 D_1 + w_2 D_2; more that cancel have no mean. Norms and biases: the mean, by the weights over their sum.

    Args:
        deltas: one update (out, in) per model.
        normalize_weights: whether the weights are divided by their sum.
        eps: the length up to which a point, or the mean of the directions, is taken for zero.
        origin: where the vectors begin: at the "base", as mergekit's with base_model, or at "zero", as without.
        weights: w_i, of the models.
        shape: of the original weight; unused.
        base: W_0 (out, in), for origin "zero".

    Cost: two passes over the entries; memory one matrix beside the inputs.
    """
    if len(deltas) == 1:
        return deltas[0].clone()
    w = torch.tensor(weights, dtype=torch.float64, device=deltas[0].device)
    if normalize_weights:
        if abs(float(w.sum())) <= 1e-6 * float(w.abs().max()):
            raise MethodError("multislerp: the weights sum to 0; give others, or normalize_weights: false")
        w = w / w.sum()
    gram = products(deltas, base)[0]
    norms = lengths(gram)
    shares = w / norms.clamp(min=eps)  # of the points in m
    size = float((shares @ gram @ shares).clamp(min=0).sqrt())
    if size >= max(eps, CANCELLED * float(w.abs().max())):
        shares = shares * (w @ norms) / size
    elif len(deltas) == 2 or float(norms.max()) <= eps:
        shares = w
    else:
        raise MethodError("multislerp: the models' directions cancel, so that they have no mean; give other weights")
    return combined(deltas, shares[None], base)


def _mean(parameters: dict[str, Any], weights: Sequence[float]) -> float:
    return mean_by_weight(parameters, weights) if parameters["normalize_weights"] else float(len(weights))


METHOD = Method(
    multislerp,
    "core",
    "goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    LINEAR_LAWS,
    base=around_zero,
    counts_base=around_zero,
    combines=True,
    mean=_mean,
)

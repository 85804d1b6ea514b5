"""Uniform averaging (model soups, Wortsman et al., arXiv 2203.05482)."""

from modalloy.delta import Delta
from modalloy.methods.method import LINEAR_LAWS, Method
from modalloy.methods.parameters import Number


def average(deltas: list[Delta], *, scale: Number, shape: tuple[int, int]) -> Delta:
    """λ Σ D_i with λ = 1/n by default: the mean of the weights.

    Args:
        deltas: one update (out, in) per specialist, scaling folded in.
        scale: λ, 1/n by default.
        shape: of the original weight; unused.
    """
    return scale * sum(deltas[1:], deltas[0])


METHOD = Method(average, "factors", "arXiv 2203.05482", LINEAR_LAWS, mean_scale=True, rowwise=True)

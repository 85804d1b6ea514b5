"""Slerp (Shoemake, SIGGRAPH 1985): from the base to one model along the arc between their weights."""

from torch import Tensor

from modalloy.methods.method import WEIGHT_LAWS, Method, always
from modalloy.methods.parameters import UnitInterval
from modalloy.methods.sphere import arc, combined, products

STRAIGHT = 0.9995  # |cos θ| above which arc and chord are one to mergekit too


def slerp(deltas: list[Tensor], *, t: UnitInterval = 0.5, base: Tensor, shape: tuple[int, int]) -> Tensor:
    """W = sin((1 − t)θ)/sin θ · W_0 + sin(tθ)/sin θ · W_1 less W_0, where θ is the angle between base and model.

    Each weight is one vector, as in mergekit; where the two are nearly parallel or opposite, |cos θ| > 0.9995, it is
    (1 − t) W_0 + t W_1. Most fine-tunes are that near to their base. Norms and biases: (1 − t) base + t model.

    Args:
        deltas: the update W_1 − W_0 (out, in) of one model.
        t: the place between base (0) and model (1); a list goes over the depth.
        base: W_0 (out, in).
        shape: of the original weight; unused.

    Cost: two passes over the entries; memory one matrix beside the inputs.
    """
    points = [None, *deltas]
    return combined(points, arc(products(points, base), t, STRAIGHT), base)


METHOD = Method(
    slerp,
    "dense",
    "doi:10.1145/325334.325242",
    WEIGHT_LAWS,
    base=always,
    models=(1, 1),
    combines=True,
    mean=lambda parameters, _: float(parameters["t"]),
)

"""Linear interpolation between the base and the donors (AdaMMS, Chen et al., CVPR 2025, arXiv 2503.23733)."""

from modalloy.delta import Delta
from modalloy.methods.method import FLAT_LAWS, Method
from modalloy.methods.parameters import UnitInterval


def linear(deltas: list[Delta], *, alpha: UnitInterval = 0.5, shape: tuple[int, int]) -> Delta:
    """(α/n) Σ D_i: (1 − α) W_0 + α times the mean of the donors. Low-rank updates stay exact.

    For one donor this is AdaMMS's (1 − α) W_0 + α W_1; several donors share α alike, so that the result stays between
    the base and their average, and copies of one donor count as one.

    Args:
        deltas: one update (out, in) per donor, scaling folded in.
        alpha: α, the weight of the donors: 0 is the base unchanged, 1 the mean of the donors. The paper chooses it by
            search, from 0.1 to 0.5.
        shape: of the original weight; unused.
    """
    return (alpha / len(deltas)) * sum(deltas[1:], deltas[0])


METHOD = Method(linear, "factors", "arXiv 2503.23733", FLAT_LAWS, rowwise=True)

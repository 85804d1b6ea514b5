"""NearSwap (alchemonaut, QuartetAnemoi-70B, 2024; in mergekit): the model's entries where they are near, else a bounded step."""

from torch import Tensor

from modalloy.methods.method import WEIGHT_LAWS, Method
from modalloy.methods.parameters import NotNegative


def nearswap(deltas: list[Tensor], *, t: NotNegative = 1e-4, shape: tuple[int, int]) -> Tensor:
    """min(1, t/|D|) D, entry by entry: the model's entry where it is within t of the base's, else a step of t towards it.

    Norms and biases stay the base's, since a mean of theirs is bounded by nothing.

    Args:
        deltas: the update (out, in) of one model.
        t: the most that an entry moves, in units of the weights.
        shape: of the original weight; unused.
    """
    return deltas[0].clamp(-t, t)


METHOD = Method(
    nearswap,
    "dense",
    "huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    WEIGHT_LAWS,
    rowwise=True,
    models=(1, 1),
    keeps_vectors=True,
)

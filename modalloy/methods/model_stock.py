"""Model Stock (Jang et al., ECCV 2024, arXiv 2403.19522): as far towards the mean as the angle between the models says."""

from typing import Any

import torch
from torch import Tensor

from modalloy.methods.method import FLAT_LAWS, Method
from modalloy.methods.parameters import Switch
from modalloy.methods.sphere import combined, cosines, products

SINGULAR = 1e-6  # a denominator this near to 0 gives no share


def model_stock(deltas: list[Tensor], *, filter_wise: Switch = False, shape: tuple[int, int]) -> Tensor:
    """t times the mean of the updates, t = n cos θ/(1 + (n − 1) cos θ), cos θ the mean cosine of two updates (eq. 3 of the paper).

    Where the denominator is 0, as of opposite updates, t is 0. Norms and biases: the mean.

    Args:
        deltas: one update (out, in) per model, of at least two.
        filter_wise: whether every row, that of an output, has an angle and t of its own; else the weight has one.
        shape: of the original weight; unused.

    Cost: two passes over the entries; memory one matrix beside the inputs.
    """
    n = len(deltas)
    found = cosines(products(deltas, rowwise=filter_wise))
    above = torch.triu_indices(n, n, 1, device=found.device)
    cosine = found[:, above[0], above[1]].mean(1, keepdim=True)
    denominator = 1 + (n - 1) * cosine
    share = torch.where(denominator.abs() < SINGULAR, 0, cosine / denominator)  # t/n
    return combined(deltas, share.expand(-1, n))


def _by_rows(parameters: dict[str, Any]) -> bool:
    return bool(parameters.get("filter_wise"))


METHOD = Method(
    model_stock,
    "core",
    "arXiv 2403.19522",
    FLAT_LAWS,
    dense=_by_rows,
    models=(2, None),
    combines=True,
    sides=_by_rows,
)

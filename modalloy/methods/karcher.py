"""Karcher mean of the models' weights on a sphere (Karcher, CPAM 1977; of merges: arXiv 2603.04972)."""

import math

import torch
from torch import Tensor

from modalloy.methods.method import WEIGHT_LAWS, Method, always
from modalloy.methods.parameters import Count, Positive
from modalloy.methods.sphere import combined, lengths, products

OPPOSITE = 1e-9  # sin θ at which the way from a mean to a point is none


def karcher(
    deltas: list[Tensor], *, max_iter: Count = 10, tol: Positive = 1e-5, base: Tensor, shape: tuple[int, int]
) -> Tensor:
    """The point of the unit sphere whose squared angles to all W_i/‖W_i‖ sum to the least, times their mean length, less W_0.

    From the mean direction m, steps along Σ θ_i/sin θ_i (u_i − cos θ_i m)/n until one is shorter than `tol`. Each weight is
    one vector, and all models count alike. A base among the models is one of them.

    Args:
        deltas: the update W_i − W_0 (out, in) of every model.
        max_iter: the most steps.
        tol: the length of a step (radians) that ends them, and of a weight that is left out.
        base: W_0 (out, in).
        shape: of the original weight; unused.

    Cost: two passes over the entries, the steps on numbers; memory one matrix beside the inputs.
    """
    if len(deltas) == 1:
        return deltas[0].clone()
    gram = products(deltas, base)[0]
    norms = lengths(gram)
    counts = norms > tol
    scale = torch.where(counts, 1 / norms, 0)  # of a point that does not count nothing is taken
    angles = gram * scale[:, None] * scale  # cosines of the directions u_i; what follows is in shares of these
    share = counts.to(torch.float64) / max(1, int(counts.sum()))
    mean, size = share, _size(share, angles)
    mean = mean / size if size >= tol else _unit(counts)
    for _ in range(max_iter):
        cosine = (angles @ mean).clamp(-1, 1)
        theta, sine = cosine.acos(), (1 - cosine.square()).sqrt()
        moves = (theta >= tol) & (sine > OPPOSITE)
        pull = torch.where(moves, share * theta / sine.clamp(min=OPPOSITE), 0)
        step = pull - (pull * cosine).sum() * mean
        size = _size(step, angles)
        if size < tol:
            break
        mean = math.cos(size) * mean + math.sin(size) / size * step
        mean = mean / _size(mean, angles)
    return combined(deltas, (norms.mean() * mean * scale)[None], base)


def _size(shares: Tensor, angles: Tensor) -> float:
    return float((shares @ angles @ shares).clamp(min=0).sqrt())


def _unit(counts: Tensor) -> Tensor:
    """The first point that counts, if any does."""
    found = torch.zeros(counts.shape, dtype=torch.float64, device=counts.device)
    found[int(counts.to(torch.int8).argmax())] = 1
    return found * counts


METHOD = Method(
    karcher,
    "dense",
    "arXiv 2603.04972",
    ("identity at n=1", *WEIGHT_LAWS),
    base=always,
    counts_base=always,
    combines=True,
)

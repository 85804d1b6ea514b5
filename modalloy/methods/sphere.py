"""What the methods that go over spheres share: inner products of updates or weights, arcs, and sums with given factors.

Their results are sums of the models with factors that depend on inner products only. So one pass gives the products, in
float64, and one the sum; no copy of a model is made.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from modalloy.linalg import row_blocks

ROUNDED = 1e-14  # a sum of factors this near to 1 is 1: no multiple of the base is added


def products(deltas: Sequence[Tensor | None], base: Tensor | None = None, *, rowwise: bool = False) -> Tensor:
    """⟨P_i, P_j⟩ of P_i = D_i, or W_0 + D_i where `base` is given: (1, n, n) of whole matrices, else (out, n, n) of rows.

    Args:
        deltas: one matrix (out, in) per point; None is one of zeros, the base itself.
        base: W_0 (out, in).
        rowwise: whether every row is a vector of its own.
    """
    first = next(delta for delta in deltas if delta is not None)
    count, shape = len(deltas), (first.shape[0] if rowwise else 1, len(deltas), len(deltas))
    found = torch.zeros(shape, dtype=torch.float64, device=first.device)
    for rows, points in _blocks(deltas, base):
        if rowwise:
            found[rows] = torch.einsum("nrc,mrc->rnm", points, points)
        else:
            flat = points.view(count, -1)
            found[0] += flat @ flat.T
    return found


def combined(deltas: Sequence[Tensor | None], factors: Tensor, base: Tensor | None = None) -> Tensor:
    """Σ c_i P_i, or Σ c_i P_i − W_0 where `base` is given: the update that makes it the merged weight.

    Args:
        deltas: as of `products`.
        factors: c (1, n), or (out, n) of rows, float64.
        base: W_0.
    """
    first = next(delta for delta in deltas if delta is not None)
    merged = torch.empty_like(first)
    for rows in row_blocks(first.shape):
        c = factors[rows] if len(factors) > 1 else factors
        total = torch.zeros(merged[rows].shape, dtype=torch.float64, device=first.device)
        for index, delta in enumerate(deltas):
            if delta is not None:
                total += c[:, index, None] * delta[rows]
        if base is not None:
            beyond = c.sum(1, keepdim=True) - 1
            total += torch.where(beyond.abs() < ROUNDED, 0, beyond) * base[rows]
        merged[rows] = total
    return merged


def lengths(gram: Tensor) -> Tensor:
    """‖P_i‖ (…, n) from the inner products (…, n, n)."""
    return gram.diagonal(dim1=-2, dim2=-1).sqrt()


def cosines(gram: Tensor) -> Tensor:
    """cos(P_i, P_j) (…, n, n) from the inner products; 0 of a point that is zero."""
    norms = lengths(gram)
    inverse = torch.where(norms > 0, 1 / norms, 0)
    return (gram * inverse[..., :, None] * inverse[..., None, :]).clamp(-1, 1)


def arc(gram: Tensor, t: float, straight: float) -> Tensor:
    """The factors (…, 2) of two points, t of the way from the first to the second on the arc between their directions.

    Slerp (Shoemake, SIGGRAPH 1985): sin((1 − t)θ)/sin θ and sin(tθ)/sin θ. Where |cos θ| > `straight`: 1 − t and t.
    """
    cosine = cosines(gram)[..., 0, 1]
    on_a_line = cosine.abs() > straight
    angle = torch.where(on_a_line, 0.5 * torch.pi, cosine.acos())
    shares = [torch.where(on_a_line, share, (share * angle).sin() / angle.sin()) for share in (1 - t, t)]
    return torch.stack(shares, -1)


def _blocks(deltas: Sequence[Tensor | None], base: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Rows of all points, (n, rows, in) in float64."""
    first = next(delta for delta in deltas if delta is not None)
    for rows in row_blocks(first.shape):
        points = torch.zeros((len(deltas), *first[rows].shape), dtype=torch.float64, device=first.device)
        for point, delta in zip(points, deltas, strict=True):
            if base is not None:
                point += base[rows]
            if delta is not None:
                point += delta[rows]
        yield rows, points

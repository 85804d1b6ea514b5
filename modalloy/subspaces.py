"""The subspaces that large dense updates share, by an iteration that only multiplies with the updates.

A block Davidson iteration finds the leading eigenvectors of A = Σ D_i D_iᵀ, which is never formed. Inside the span of Q
Rayleigh–Ritz gives the best there are; their residuals are what is missing, and are added to Q. Where the machine
multiplies a shorter type faster, copies of the updates in it draft the start and serve for what is added, which is small:
what A makes of the start is worked out in the updates' own type, so that the result is as good.
"""

import math
from typing import Any

import torch
from torch import Tensor

from modalloy.linalg import Basis, eigenpairs, frobenius, gram, row_blocks, top_eigenvectors

EXACT_SIZE = 1024  # up to this many rows an eigendecomposition is cheaper than an iteration
OVERSAMPLING, EXTRA = 2, 8  # size of the first block, in ranks, and columns more
MARGIN = 8  # for so many columns of the rank one is watched beyond it, and two are kept of a start that is good already
# of the projected updates, relative; up to twice as much where rounding stops the iteration; errors are below 3 times what is told
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-10}
ENOUGH = 0.5  # of the tolerance may be left in directions to which nothing is added
WIDEST = 4  # columns of the span, in first blocks; then as many as that lead go on
MAX_STEPS = 30
DRAFT_PASSES = 3  # multiplications of the start by A, in the shorter type
HIDDEN = 5.0  # roundings of the shorter type that a singular value must exceed for drafts to show it
STALLED = 0.5  # of the error before: what is missing is then lost in the shorter type's rounding
LEAST = 1e-25  # a norm below which products would leave the type's range
RANGE = 1e-12, 1e15  # of norms whose squares float32 holds
TINY = 1e-300  # in place of a distance that is zero
NOISE = 1e-3  # random entries that the start holds, in the updates' mean: no column is zero, none is there twice


def top_subspaces(matrices: list[Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """Orthonormal U (m, k) and V (n, k) of D_i (m, n): leading eigenvectors of Σ D_i D_iᵀ and of Σ D_iᵀ D_i, in their type.

    k is the rank, or all of a side. Up to `EXACT_SIZE` rows, and where an iteration would not converge, by an
    eigendecomposition in float64, O(m² n + m³). Above by iteration, O(m n · rank) a step, whose result is taken only once
    its residuals say that the relative error of the projected updates, U Uᵀ D_i or D_i V Vᵀ, is about `TOLERANCE`.
    """
    transposed = [D.T for D in matrices]
    if not any(_is_large(D, rank) for D in (matrices[0], transposed[0])):
        return _decomposed(matrices, rank), _decomposed(transposed, rank)
    size = _size(matrices)
    drafts = _drafts(matrices, size)
    U = _top(matrices, rank, size, drafts)
    drafts = [D.T for D in drafts]  # by this list alone, so that they are gone once it is cleared
    return U, _top(transposed, rank, size, drafts)


def approximate_range(matrix: Tensor, rank: int) -> Tensor:
    """Orthonormal columns (m, rank) that span nearly as much of D (m, n) as its leading singular vectors do.

    Exact up to `EXACT_SIZE` rows. Above, a randomised range finder with two power iterations (Halko, Martinsson and Tropp,
    arXiv 0909.4061, algorithm 4.4), whose seed is fixed; made for matrices whose spectrum hardly falls. O(m n · rank).
    """
    if matrix.shape[0] <= EXACT_SIZE:
        return _decomposed([matrix], rank)
    Q = Basis(matrix @ _random(matrix.shape[1], OVERSAMPLING * rank, matrix)).q_in(matrix.dtype)
    for _ in range(2):
        Q = Basis(matrix @ (matrix.T @ Q)).q_in(matrix.dtype)
    return Q @ top_eigenvectors(gram(matrix.T @ Q), rank).to(matrix.dtype)


def _is_large(matrix: Tensor, rank: int) -> bool:
    """Whether the subspace on its rows' side is iterated."""
    return len(matrix) > EXACT_SIZE and OVERSAMPLING * rank < len(matrix) / 4


def _decomposed(matrices: list[Tensor], rank: int) -> Tensor:
    return top_eigenvectors(gram(*(D.T for D in matrices)), rank).to(matrices[0].dtype)


def _random(rows: int, columns: int, like: Tensor) -> Tensor:
    """Normal entries of one seed, so that the bytes of what follows are always the same."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(like)


def _shorter(matrix: Tensor) -> torch.dtype | None:
    """The type that the machine multiplies several times faster than the matrix' own, if there is one."""
    if matrix.dtype == torch.float64:
        return torch.float32
    if matrix.is_cuda:
        return torch.bfloat16 if torch.cuda.get_device_capability(matrix.device) >= (8, 0) else None
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch does not tell
    return torch.bfloat16 if matrix.is_cpu and capabilities.get("amx_bf16") else None


def _size(matrices: list[Tensor]) -> float:
    """About √Σ ‖D_i‖², which scales the products: in the matrices' own type, where their squares stay within its range."""
    size = math.hypot(*(float(D.norm()) for D in matrices))
    return size if RANGE[0] < size < RANGE[1] else math.hypot(*(frobenius(D) for D in matrices))


def _drafts(matrices: list[Tensor], size: float) -> list[Tensor]:
    """Copies of D_i / size in the shorter type; none if there is no such type, or nothing to copy."""
    shorter = _shorter(matrices[0])
    if shorter is None or not size:
        return []
    copies = [torch.empty_like(D, dtype=shorter) for D in matrices]
    for D, copy in zip(matrices, copies, strict=True):
        for rows in row_blocks(D.shape):
            copy[rows] = D[rows] / size
    return copies


def _top(matrices: list[Tensor], rank: int, size: float, drafts: list[Tensor]) -> Tensor:
    """The leading eigenvectors (m, rank) of Σ D_i D_iᵀ."""
    if not _is_large(matrices[0], rank):
        return _decomposed(matrices, rank)
    found = _iterated(matrices, rank, size, drafts)
    if found is not None:
        return found
    drafts.clear()  # a Gram takes their place; the other side's spectrum does not fall faster
    return _decomposed(matrices, rank)


def _kept(rank: int) -> int:
    """Columns that are kept of a subspace when its `rank` leading ones are known to a few digits."""
    return rank + max(EXTRA, 2 * (rank // MARGIN))


def _iterated(matrices: list[Tensor], rank: int, size: float, drafts: list[Tensor]) -> Tensor | None:
    """`_top` by iteration; None if the spectrum falls too slowly for it to be worth it, or cannot be told apart at the cut."""
    m, tolerance = len(matrices[0]), TOLERANCE[matrices[0].dtype]
    if not size:
        return torch.eye(m, rank, dtype=matrices[0].dtype, device=matrices[0].device)
    if size < LEAST:
        return None
    X = _start(matrices, OVERSAMPLING * rank + EXTRA, size)
    if drafts:
        drafted = _drafted(drafts, X, rank)
        X, drafts = (X, []) if drafted is None else (drafted, drafts)
    span, before, base = Span(matrices, size, rank, X), math.inf, math.inf
    for step in range(MAX_STEPS):
        if span.width <= rank:
            return None
        error = span.error()
        if error <= tolerance:
            return span.leading[:, :rank]
        stalled = error > STALLED * before
        if stalled and error <= 2 * tolerance:
            return span.leading[:, :rank]
        if span.is_drafted and (stalled or span.width > WIDEST * X.shape[1]):
            span, before = Span(matrices, size, rank, span.leading), math.inf
            continue
        if drafts and before == math.inf:  # the span is not drafted
            drafts, base = ([] if error > STALLED * base else drafts), error
        slow = not drafts and step > 2 and error * (error / before) ** (MAX_STEPS - step) > tolerance
        missing = span.missing(tolerance)
        if slow or span.is_tied(tolerance) or not missing.shape[1]:
            return None
        before = error
        if drafts:
            span.add(drafts, 1.0, missing)
            continue
        if span.width + missing.shape[1] > WIDEST * X.shape[1]:
            span.shrink(X.shape[1])
        span.add(matrices, size, missing)
    return None


def _start(matrices: list[Tensor], width: int, size: float) -> Tensor:
    """Columns (m, width): sums of the updates' columns, every so many of one with random signs, and a little noise.

    All that the updates lead to is in them. (What the other side's vectors lead to is not all: vectors that only other updates
    have would be missing, and nothing would tell.)
    """
    m, n = matrices[0].shape
    X = _random(m, width, matrices[0]) * (NOISE * size / (len(matrices) * m * n) ** 0.5)
    parts = X.split(-(-width // len(matrices)), 1)
    signs = iter(_random(len(matrices) * n, 1, torch.empty(0)).sign().flatten().tolist())
    for index, D in enumerate(matrices):
        columns = parts[index % len(parts)]
        for block in D.split(columns.shape[1], 1):
            columns[:, : block.shape[1]].add_(block, alpha=next(signs))
    return X


def _drafted(drafts: list[Tensor], X: Tensor, rank: int) -> Tensor | None:
    """A start (m, kept) by products in the shorter type; None where its rounding hides the last of the leading vectors."""
    for left in reversed(range(DRAFT_PASSES)):
        span = Span(drafts, 1.0, rank, X)
        theta, W = eigenpairs(span.H)
        X = span.AQ @ W[:, : None if left else _kept(rank)].to(X.dtype)
    hidden = (HIDDEN * torch.finfo(drafts[0].dtype).eps) ** 2 / len(X)  # rounding has about eps / √m in every direction
    return X if len(theta) > rank and float(theta[rank - 1]) > hidden else None


class Span:
    """The span of orthonormal Q (m, p), what A = Σ D_i D_iᵀ / size² makes of Q, and QᵀAQ in float64. trace A is 1."""

    def __init__(self, matrices: list[Tensor], size: float, rank: int, X: Tensor) -> None:
        self.Q = Basis(X).q_in(X.dtype)
        self.AQ, self.H = _products(matrices, size, self.Q)
        self.rank, self.start, self.eps, self.drafted_eps = rank, self.width, torch.finfo(X.dtype).eps, 0.0

    @property
    def width(self) -> int:
        """p, the columns of Q."""
        return self.Q.shape[1]

    @property
    def is_drafted(self) -> bool:
        """Whether what A makes of the columns after the start is known to a shorter type's rounding."""
        return self.drafted_eps > 0

    def add(self, matrices: list[Tensor], size: float, columns: Tensor) -> None:
        """Widen the span by orthonormal columns (m, b) that are orthogonal to Q."""
        products, H = _products(matrices, size, columns)
        across = (self.AQ.T @ columns).to(H.dtype)  # by what is known of Q; what is known of the columns may be a draft
        self.H = torch.cat([torch.cat([self.H, across], 1), torch.cat([across.T, H], 1)])
        self.Q, self.AQ = torch.cat([self.Q, columns], 1), torch.cat([self.AQ, products], 1)
        if matrices[0].dtype != columns.dtype:
            self.drafted_eps = torch.finfo(matrices[0].dtype).eps / 2

    def shrink(self, width: int) -> None:
        """Keep the leading approximate eigenvectors only."""
        theta, W = eigenpairs(self.H)
        W = W[:, :width].to(self.Q.dtype)
        self.Q, self.AQ, self.H = self.Q @ W, self.AQ @ W, theta[:width].diag()

    def error(self) -> float:
        """An estimate of the relative error of the updates if they are projected onto the leading `rank` columns.

        Two errors are told. What leaves the span: a residual r_j over the distance of θ_j from what is outside, which lies
        below the last Ritz value that the start gave. What is exchanged inside it at the cut, between the vectors j ≤ k and
        k + 1: the coupling of the two, by their residuals and by rounding, over θ_j − θ_{k+1}; where these are nearly equal
        only float64 can tell them apart. Products in the shorter type are off by its rounding, in proportion to the share s_j
        that the columns they are known for have in a vector.
        """
        k, m, start = self.rank, len(self.Q), self.start
        theta, W = eigenpairs(self.H)
        theta, W = theta.clamp(min=0), W[:, : min(_kept(k), start)]
        self.leading, images = self.Q @ W.to(self.Q.dtype), self.AQ @ W.to(self.Q.dtype)
        self.residuals = images - self.Q @ (self.Q.T @ images)
        lengths = torch.linalg.norm(self.residuals.to(torch.float64), dim=0)
        # of products with D, whose mean squared singular value is 1 / m
        rounding = self.eps * (theta[:k] * (theta[:k] + 1 / m)).sqrt()
        self.unresolved = self._exchanged(rounding, theta)
        if self.is_drafted:
            s, largest = torch.linalg.norm(W[start:], dim=0), self.H.diagonal()[start:].max().sqrt()
            off = self.drafted_eps * (largest + m**-0.5)  # of Dᵀ N
            lengths += s * (off * theta[start - 1].sqrt() + self.drafted_eps * largest**2)
            rounding += s[:k] * s[k] * off * largest
        distances = theta[: W.shape[1]] - theta[start - 1]
        self.sines = (lengths / distances.clamp(min=TINY)).clamp(max=1)
        self.energies = theta[: W.shape[1]] / theta[:k].sum()
        self.outside = _lost(self.sines[:k], theta[:k])
        return max(self.outside, self._exchanged(lengths[:k] * self.sines[k] + rounding, theta))

    def _exchanged(self, coupling: Tensor, theta: Tensor) -> float:
        """The error of what is exchanged at the cut by a coupling (k,) of the leading vectors with the next one."""
        k = self.rank
        return _lost(coupling / (theta[:k] - theta[k]).clamp(min=TINY), theta[:k])

    def is_tied(self, tolerance: float) -> bool:
        """Whether all that is left of the error is rounding at the cut."""
        return self.outside <= tolerance < self.unresolved

    def missing(self, tolerance: float) -> Tensor:
        """Orthonormal columns (m, b), orthogonal to Q, that the leading vectors lack most of their error's directions by."""
        large = self.sines**2 * self.energies > (ENOUGH * tolerance) ** 2 / self.rank
        large[self.rank + max(1, self.rank // MARGIN) :] = False  # of those beyond the cut, the next ones matter
        X = self.residuals[:, large]
        for _ in range(2):  # the second time takes out what rounding left
            X = Basis(X - self.Q @ (self.Q.T @ X)).q_in(X.dtype)
        return X


def _products(matrices: list[Tensor], size: float, X: Tensor) -> tuple[Tensor, Tensor]:
    """A X in the type of X and XᵀAX in float64, of products in the matrices' type."""
    short, H = X.to(matrices[0].dtype), X.new_zeros(X.shape[1], X.shape[1], dtype=torch.float64)
    AX = torch.zeros_like(X)
    for D in matrices:
        Y = D.T @ short
        if size != 1:
            Y /= size  # first, so that no product leaves the type's range
        H += gram(Y) if Y.dtype == X.dtype else Y.to(X.dtype).T @ Y.to(X.dtype)
        AX += D @ Y
    return AX / size, H


def _lost(sines: Tensor, energies: Tensor) -> float:
    """Relative error of updates whose directions, of these shares of their energy, are off by these sines."""
    return float((sines.clamp(max=1) ** 2 * energies).sum() / energies.sum()) ** 0.5

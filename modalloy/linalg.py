"""The only place that decomposes a matrix. Grams and cores are float64: a Gram squares the condition number."""

from collections.abc import Callable

import torch
from torch import Tensor

from modalloy.errors import MethodError

RANK_TOLERANCE = 1e-6  # singular values below this share of the largest are rounding of float32 inputs, taken as zero
WELL_SEPARATED = 0.1  # sine of that angle from which on combinations of the columns lose little to rounding in float32
BLOCK_ROWS = 4096  # rows of a tall factor that are held in float64 at once
EXACT_SIZE = 1024  # up to this many rows an eigendecomposition is cheaper than an iteration
OVERSAMPLING = 2  # size of the iterated block, in ranks
MAX_ITERATIONS = 30
SUBSPACE_TOLERANCE = 3e-6  # of the projected updates, relative
MIN_PIVOT = (
    1e-7  # squared sine of the smallest angle between a column and those before it that Cholesky is trusted with
)


def require_finite(values: Tensor) -> None:
    """Refuse NaN and infinity: both show in the extremes, which are many times faster than `isfinite`."""
    if values.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(values))).all()):
        raise MethodError("an update holds NaN or infinite values; the file is damaged or its training diverged")


def gram(*matrices: Tensor) -> Tensor:
    """Σ XᵀX (n, n) in float64 over matrices X (m, n). Only the upper block triangle is multiplied: 5/8 of the work. O(m n²)."""
    n = matrices[0].shape[1]
    out = torch.zeros(n, n, dtype=torch.float64, device=matrices[0].device)
    step = -(-n // 4) or 1
    for rows in (block for matrix in matrices for block in matrix.split(BLOCK_ROWS)):
        across = rows.T.contiguous().to(torch.float64)  # (n, rows): both operands are then read along their rows
        for start in range(0, n, step):
            out[: start + step, start : start + step].addmm_(across[: start + step], across[start : start + step].T)
    return out.triu() + out.triu(1).T


def top_eigenvectors(symmetric: Tensor, rank: int) -> Tensor:
    """Orthonormal eigenvectors (n, rank) of the largest eigenvalues of a symmetric float64 matrix (n, n). O(n³)."""
    return torch.linalg.eigh(symmetric).eigenvectors.flip(1)[:, :rank]


def leading_eigenvectors(symmetric: Tensor, cut: float) -> Tensor:
    """Orthonormal eigenvectors (n, k) of the eigenvalues above `cut` times the largest, which come first. O(n³)."""
    values, vectors = torch.linalg.eigh(symmetric)
    return vectors[:, values > cut * values[-1:].clamp(min=0).sum()].flip(1)


def left_singular_vectors(matrix: Tensor, cut: float) -> Tensor:
    """Left singular vectors (m, k) of the singular values above `cut` times the largest, in order. O(m n · min(m, n))."""
    U, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, values > cut * values[:1].sum()]


def top_subspace(matrices: list[Tensor], rank: int) -> Tensor:
    """The `rank` leading eigenvectors (m, rank) of A = Σ D_i D_iᵀ, in the matrices' type; at most m of them.

    Exact, by an eigendecomposition of A in float64, up to `EXACT_SIZE` rows or where the iteration would not converge.
    Above, by subspace iteration with Rayleigh–Ritz: A is never formed, and the result is taken only once its residuals
    bound its error. O(m² n + m³), or O(m n · rank) an iteration.
    """
    m, dtype = matrices[0].shape[0], matrices[0].dtype
    rank = min(rank, m)
    found = None
    if m > EXACT_SIZE and OVERSAMPLING * rank < m / 4:
        found = _iterated_subspace(matrices, rank)
    if found is None:
        found = top_eigenvectors(gram(*(matrix.T for matrix in matrices)), rank)
    return found.to(dtype)


def _iterated_subspace(matrices: list[Tensor], rank: int) -> Tensor | None:
    """`top_subspace` by iteration, None if it converges too slowly (no gap in the spectrum) to be worth it."""
    m, device = matrices[0].shape[0], matrices[0].device
    energy = sum(float(matrix.norm()) ** 2 for matrix in matrices)
    if not energy:
        return torch.eye(m, rank, device=device)
    generator = torch.Generator().manual_seed(0)  # any start converges; one seed, so that the bytes are the same
    X = torch.randn(m, OVERSAMPLING * rank, generator=generator).to(device, matrices[0].dtype)
    error = 0.0
    for step in range(1, MAX_ITERATIONS + 1):
        X = Basis(X).q_in(X.dtype)
        H = torch.zeros(X.shape[1], X.shape[1], dtype=torch.float64, device=device)
        AX = torch.zeros_like(X)
        for D in matrices:
            Y = D.T @ X  # (n, b)
            H += gram(Y)
            AX.addmm_(D, Y)
        theta, W = torch.linalg.eigh(H)  # Rayleigh–Ritz: the best approximations inside the span of X
        theta, W = theta.flip(0), W.flip(1).to(X.dtype)
        X, AX = X @ W, AX @ W
        top = theta[:rank]
        residual = torch.linalg.norm((AX[:, :rank] - X[:, :rank] * top.to(X.dtype)).to(torch.float64), dim=0)
        distance = (top - theta[-1]).clamp(
            min=1e-300
        )  # what is missed lies outside the span: below the last Ritz value
        before, error = error, float(((residual / distance) ** 2 * top).sum() / energy) ** 0.5
        settled = (
            float((residual**2 / distance).max()) <= float(top[-1] - theta[rank]) or float(top[-1]) < 1e-12 * energy
        )
        if error <= SUBSPACE_TOLERANCE and settled:
            return X[:, :rank]
        if step > 2 and error * (error / before) ** (MAX_ITERATIONS - step) > SUBSPACE_TOLERANCE:
            return None
        X = AX / theta.clamp(min=float(theta[0]) * 1e-12).to(X.dtype)
    return None


def energy_rank(symmetric: Tensor, fraction: float) -> int:
    """How many of the largest eigenvalues of a positive semidefinite matrix make up `fraction` of their sum."""
    values = torch.linalg.eigvalsh(symmetric).clamp(min=0).flip(0)
    if not len(values):
        return 0
    reached = values.cumsum(0) >= fraction * values.sum() * (1 - 1e-12)
    return int(reached.to(torch.int8).argmax()) + 1


def singular_triples(
    matrix: Tensor, k: int | None = None, *, largest: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors U (m, r), values s (r) in descending order and V (n, r) of a matrix (m, n), all float64.

    At most k triples, and only values above RANK_TOLERANCE times the largest (or times `largest`, where the matrix is
    a remainder of something that large), so r = 0 for a zero matrix. The Gram of the shorter side finds the subspace,
    a thin SVD inside it the triples: half the time of one SVD where r is small. O(mn·min(m, n)).
    """
    if matrix.shape[0] < matrix.shape[1]:
        V, s, U = singular_triples(matrix.T, k, largest=largest)
        return U, s, V
    X = matrix.to(torch.float64)
    squares, vectors = torch.linalg.eigh(gram(X))
    reference = squares[-1:].sum() if largest is None else largest**2
    rank = int((squares > RANK_TOLERANCE**2 * reference).sum())
    within = vectors.flip(1)[:, : rank if k is None else min(k, rank)]
    U, s, rotation = torch.linalg.svd(X @ within, full_matrices=False)
    return U, s, within @ rotation.T


def polar(matrix: Tensor) -> Tensor:
    """The partial isometry U Vᵀ (m, n) of X = U S Vᵀ over its non-zero singular values: X (XᵀX)^(+1/2), in float64.

    Unlike a polar factor with orthonormal columns it is unique for every X, also one of low rank. O(mn·min(m, n)).
    """
    if matrix.shape[0] < matrix.shape[1]:
        return polar(matrix.T).T
    X = matrix.to(torch.float64)
    return X @ spectral_function(gram(X), lambda squares: inverse(squares).sqrt())


def spectral_function(symmetric: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """V diag(f(λ)) Vᵀ (n, n) of a positive semidefinite V diag(λ) Vᵀ; f gets all λ ≥ 0 in ascending order. O(n³)."""
    values, vectors = torch.linalg.eigh(symmetric)
    return (vectors * function(values.clamp(min=0))) @ vectors.T


def inverse(squares: Tensor) -> Tensor:
    """1/λ of squared singular values in ascending order, 0 where λ counts as zero: a pseudo-inverse of a spectrum."""
    return torch.where(squares > RANK_TOLERANCE**2 * squares[-1:], 1 / squares, 0.0)


class Basis:
    """An orthonormal basis Q (m, p) of the columns of a tall X = Q @ triangle, p ≤ min(m, n), all in float64.

    Q is not formed: `times(c)` gives Q @ c. With columns scaled to unit length, X̂ᵀX̂ = L Lᵀ gives Q = X̂ L⁻ᵀ, at a tenth
    of the cost of a QR of the tall matrix. Where a pivot of L says that the columns are close to dependent, a
    Householder QR is taken instead; where X is not tall, Q is the identity.
    """

    def __init__(self, columns: Tensor) -> None:
        m, n = columns.shape
        squares = gram(columns) if m > n else None
        require_finite(columns if squares is None else squares.diagonal())
        self.q: Tensor | None = None
        if squares is None:
            self.triangle = columns.to(torch.float64)
            return
        lengths = squares.diagonal().sqrt()
        self.kept = lengths > 0
        self.columns = columns if bool(self.kept.all()) else columns[:, self.kept]
        lengths, squares = lengths[self.kept], squares[self.kept][:, self.kept]
        self.triangle = torch.zeros(len(lengths), n, dtype=torch.float64, device=columns.device)
        lower, failed = torch.linalg.cholesky_ex(squares / lengths.outer(lengths))
        if not int(failed) and (not len(lengths) or float(lower.diagonal().min()) ** 2 > MIN_PIVOT):
            self.triangle[:, self.kept] = lower.T * lengths
            self.lower, self.lengths = lower, lengths
            self.well_separated = not len(lengths) or float(lower.diagonal().min()) > WELL_SEPARATED
            return
        self.q, upper = torch.linalg.qr(self.columns.to(torch.float64) / lengths)
        self.triangle = self.triangle[: len(upper)]
        self.triangle[:, self.kept] = upper * lengths

    def times(self, coefficients: Tensor, dtype: torch.dtype) -> Tensor:
        """Q @ coefficients: (m, k) in `dtype` from (p, k) in float64."""
        if self.q is not None:
            return (self.q @ coefficients).to(dtype)
        if not hasattr(self, "lower"):
            return coefficients.to(dtype)
        weights = torch.linalg.solve_triangular(self.lower.T, coefficients, upper=True) / self.lengths[:, None]
        if self.well_separated and self.columns.dtype == dtype:
            return self.columns @ weights.to(dtype)
        # (k, p) @ (p, rows): several times faster than its transpose where the columns are stored one after the other
        across = weights.T.contiguous()
        parts = [(across @ rows.T.to(torch.float64)).to(dtype) for rows in self.columns.split(BLOCK_ROWS)]
        return torch.cat(parts, 1).T

    def q_in(self, dtype: torch.dtype) -> Tensor:
        """Q itself (m, p)."""
        p = self.triangle.shape[0]
        return self.times(torch.eye(p, dtype=torch.float64, device=self.triangle.device), dtype)

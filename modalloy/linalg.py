"""The only place that decomposes a matrix. Grams and cores are float64: a Gram squares the condition number."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from modalloy.errors import MethodError

MAX_INVERSE = (
    3e3  # norm of L⁻¹ up to which Q = X̂ L⁻ᵀ is orthonormal to 1e-8: rounding in the Gram grows with its square
)
PROBES = 32  # random vectors that a norm is estimated from
MAX_WEIGHTS = (
    10.0  # a combination Xw of unit columns in float32 loses 6e-8 · ‖w‖ / ‖Xw‖ (times √n at worst) to rounding
)
RANK_TOLERANCE = 1e-6  # singular values below this share of the largest are rounding of float32 inputs, taken as zero
BLOCK_ENTRIES = 1 << 18  # of a full weight that are worked on at once: temporaries stay small and near the processor
FACTOR_ROWS = 128  # of a product of factors at once, at least: for fewer, packing its columns takes as long
BLOCK_ROWS = 2048  # of a matrix that are held in another type at once
TALL_ROWS = 512  # the same of tall factors on a processor: so many stay in its cache
GRAM_COLUMNS = 128  # of a matrix whose Gram is multiplied at once
ALIASED = 128  # columns of multiples of so many float64 numbers share few places in a processor's cache
SMALL_EIGH = 192  # rows up to which an eigendecomposition in float64 is taken at once
MIN_GAP = 1e-5  # of the eigenvalues at the cut, in the largest: what float32 can tell apart
SPAN_TOLERANCE = 1e-9  # of a span of eigenvectors: the sines of its angles, root mean square
MAX_ITERATIONS = 30


def all_finite(values: Tensor) -> bool:
    """Whether no entry is NaN or infinite: both show in the sum and in the extremes, many times faster than by `isfinite`."""
    if not values.is_floating_point() or not values.numel():
        return True
    values = values.float() if values.element_size() == 1 else values
    if math.isfinite(float(values.sum())):
        return True
    return all(math.isfinite(float(extreme)) for extreme in torch.aminmax(values))  # a sum may leave the type's range


def holds(dtype: torch.dtype, *tensors: Tensor) -> bool:
    """Whether a type has every value that the tensors' types have."""
    return all(torch.promote_types(one.dtype, dtype) == dtype for one in tensors)


def require_finite(values: Tensor) -> None:
    """Refuse NaN and infinity."""
    if not all_finite(values):
        raise MethodError("an update holds NaN or infinite values; the file is damaged or its training diverged")


def row_blocks(shape: Sequence[int], least: int = 1) -> list[slice]:
    """Consecutive blocks of rows, of about BLOCK_ENTRIES and at least so many rows; a single number is one row."""
    n_rows, *rest = shape or (1,)
    step = max(least, BLOCK_ENTRIES // max(1, math.prod(rest)))
    return [slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]


def frobenius(matrix: Tensor) -> float:
    """Frobenius norm, summed in float64: squares of small or large float32 values would leave its range."""
    return math.hypot(*(float(rows.to(torch.float64).norm()) for rows in matrix.split(BLOCK_ROWS)))


def gram(*matrices: Tensor) -> Tensor:
    """Σ XᵀX (n, n) in float64 over matrices X (m, n). O(m n²)."""
    blocks = (block for matrix in matrices for block in blocks_beside([matrix], torch.float64))
    return symmetric_product(((rows, rows) for rows in blocks), matrices[0].shape[1], matrices[0].device)


def blocks_beside(parts: Sequence[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """Matrices (m, n_i) of any type side by side, (m, Σ n_i), in `dtype`, by blocks of rows: to be read, each until the next."""
    first, m, widths = parts[0], len(parts[0]), [part.shape[1] for part in parts]
    n_rows = TALL_ROWS if first.is_cpu else BLOCK_ROWS
    if len(parts) == 1 and first.dtype == dtype:
        yield from first.split(n_rows)
        return
    size = min(m, n_rows), sum(widths)
    memory = torch.empty(size[::-1] if _by_columns(first) else size, dtype=dtype, device=first.device)
    for rows in zip(*(part.split(n_rows) for part in parts), strict=True):
        block = (memory.T if _by_columns(first) else memory)[: len(rows[0])]
        for own, part in zip(block.split(widths, 1), rows, strict=True):
            own.copy_(part)
        yield block


def _by_columns(matrix: Tensor) -> bool:
    """Whether its columns are stored one after the other."""
    return matrix.stride(0) == 1


def symmetric_product(pairs: Iterable[tuple[Tensor, Tensor]], n: int, device: torch.device) -> Tensor:
    """Σ XᵀY (n, n) of float64 X, Y (m, n), which is known to be symmetric: little more than its upper triangle is multiplied.

    Narrower X and Y stand for such whose other columns are zero.
    """
    out = torch.zeros(n, n, dtype=torch.float64, device=device)
    for X, Y in pairs:
        width = X.shape[1]
        for start in range(0, width, GRAM_COLUMNS):
            end = min(start + GRAM_COLUMNS, width)
            out[start:end, start:width].addmm_(X[:, start:end].T, Y[:, start:])
    for start in range(0, n, GRAM_COLUMNS):
        end = start + GRAM_COLUMNS
        on_diagonal = out[start:end, start:end]
        on_diagonal.copy_((on_diagonal + on_diagonal.T) / 2)
        out[end:, start:end] = out[start:end, end:].T
    return out


def filled(matrix: Tensor) -> int:
    """How many leading columns hold all that is not zero."""
    places = matrix.any(0).nonzero()
    return int(places[-1]) + 1 if len(places) else 0


def top_eigenvectors(symmetric: Tensor, rank: int) -> Tensor:
    """Orthonormal columns (n, rank) that span the eigenvectors of the largest eigenvalues of a float64 matrix; see `Spectrum`."""
    return Spectrum(symmetric).top(rank)


class Spectrum:
    """The leading eigenvectors of a symmetric positive semidefinite float64 matrix A (n, n), decomposed once. O(n³)."""

    def __init__(self, symmetric: Tensor) -> None:
        self.A = symmetric

    def top(self, rank: int) -> Tensor:
        """Orthonormal columns (n, rank) that span the eigenvectors of the largest eigenvalues, to 1e-9 or better.

        Each column is one of the eigenvectors where more than a third of them are asked for.
        """
        found = self._corrected(rank) if len(self.A) >= SMALL_EIGH and 0 < rank <= len(self.A) / 3 else None
        return self._in_double[:, :rank] if found is None else found

    @cached_property
    def _in_double(self) -> Tensor:
        return eigenpairs(self.A)[1]

    @cached_property
    def _in_single(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues over the trace, and eigenvectors, in float32, the largest first."""
        return eigenpairs((self.A / self.A.trace()).to(torch.float32))

    def _corrected(self, rank: int) -> Tensor | None:
        """Those of float32, corrected by float64 residuals; None if the eigenvalues at the cut are too close for that.

        To first order the span of X lacks Y S, of the other eigenvectors Y, with S_ij = y_iᵀ (A x_j − X Xᵀ A x_j) / (λ_j − λ_i):
        a Newton step, whose size is the error before it. A step in float32 leaves the part of the error to which Y and λ are
        known; the steps end where the last one says that nothing is missing.
        """
        size = self.A.trace()
        if not float(size) > 0:
            return None
        values, vectors = self._in_single
        if not float(values[rank - 1] - values[rank]) > MIN_GAP * float(values[0]):
            return None
        X, Y, gaps = vectors[:, :rank].to(torch.float64), vectors[:, rank:], values[:rank] - values[rank:, None]
        before = 1e-2 * rank**0.5
        for step in range(MAX_ITERATIONS):
            AX = self.A @ X
            missing = Y.T @ ((AX - X @ (X.T @ AX)) / size).to(torch.float32) / gaps
            error = float(missing.norm())
            if step and error <= SPAN_TOLERANCE * rank**0.5:
                return X
            if not error < before / 10:
                break
            X, before = X + Y @ missing, error
            X = torch.linalg.solve_triangular(torch.linalg.cholesky(X.T @ X).T, X, upper=True, left=False)
        return None


def eigenpairs(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,), the largest first, and orthonormal eigenvectors (n, n) of a positive semidefinite matrix. O(n³).

    By an SVD where the eigensolver gives up: MKL's does in float32, on one matrix of low rank in twenty that is zero in half
    of its rows.
    """
    try:
        values, vectors = torch.linalg.eigh(symmetric)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # which torch exports, but not to mypy
        vectors, values, _ = torch.linalg.svd(symmetric)
        return values, vectors
    return values.flip(0), vectors.flip(1)


def leading_eigenvectors(symmetric: Tensor, cut: float) -> Tensor:
    """Orthonormal eigenvectors (n, k) of the eigenvalues above `cut` times the largest, which come first. O(n³)."""
    values, vectors = eigenpairs(symmetric)
    return vectors[:, values > cut * values[:1].clamp(min=0).sum()]


def left_singular_vectors(matrix: Tensor, cut: float) -> Tensor:
    """Left singular vectors (m, k) of the singular values above `cut` times the largest, in order. O(m n · min(m, n))."""
    U, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, values > cut * values[:1].sum()]


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
    squares, vectors = eigenpairs(gram(X))
    reference = squares[:1].sum() if largest is None else largest**2
    rank = int((squares > RANK_TOLERANCE**2 * reference).sum())
    within = vectors[:, : rank if k is None else min(k, rank)]
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
    values, vectors = (found.flip(-1) for found in eigenpairs(symmetric))
    return (vectors * function(values.clamp(min=0))) @ vectors.T


def inverse(squares: Tensor) -> Tensor:
    """1/λ of squared singular values in ascending order, 0 where λ counts as zero: a pseudo-inverse of a spectrum."""
    return torch.where(squares > RANK_TOLERANCE**2 * squares[-1:], 1 / squares, 0.0)


def _cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """L of L Lᵀ (n, n), and LAPACK's report.

    Columns of multiples of 128 numbers take each other's places in the cache, which makes it up to 2.6 times slower; these
    are made longer.
    """
    n = len(matrix)
    padded = matrix if n % ALIASED else torch.block_diag(matrix, torch.eye(8, dtype=matrix.dtype, device=matrix.device))
    lower, failed = torch.linalg.cholesky_ex(padded)
    return lower[:n, :n], failed


def _inverse_norm(lower: Tensor) -> float:
    """The Frobenius norm of L⁻¹, from what it makes of `PROBES` random vectors: rarely off by more than a third. O(n²)."""
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(len(lower), PROBES, generator=generator, dtype=torch.float64).to(lower.device)
    return float(torch.linalg.solve_triangular(lower, probes, upper=False).norm()) / PROBES**0.5


class Basis:
    """An orthonormal basis Q (m, p) of the columns of a tall X = Q @ triangle, p ≤ min(m, n), all in float64.

    X is matrices (m, n_i) of any type, side by side. Neither it nor Q is formed: `times(c)` gives Q @ c. With columns scaled
    to unit length, X̂ᵀX̂ = L Lᵀ gives Q = X̂ L⁻ᵀ, at a tenth of the cost of a QR of the tall matrix. Where L⁻¹ is large, which
    says that the columns are close to dependent, a Householder QR is taken instead; where X is not tall, Q is the identity.
    """

    def __init__(self, *parts: Tensor) -> None:
        m, n = len(parts[0]), sum(part.shape[1] for part in parts)
        self.parts = list(parts)
        self.q: Tensor | None = None
        self.lower: Tensor | None = None
        if m <= n:
            self.triangle = torch.cat([part.to(torch.float64) for part in parts], 1)
            require_finite(self.triangle)
            return
        squares = symmetric_product(((rows, rows) for rows in blocks_beside(parts, torch.float64)), n, parts[0].device)
        require_finite(squares.diagonal())
        lengths = squares.diagonal().sqrt()
        some = lengths > 0
        kept: Tensor | slice = slice(None) if bool(some.all()) else some
        if isinstance(kept, Tensor):
            self.parts = [
                part[:, own] for part, own in zip(parts, kept.split([part.shape[1] for part in parts]), strict=True)
            ]
        self.lengths, squares = lengths[kept], squares[kept][:, kept]
        lower, failed = _cholesky(squares.div_(self.lengths).div_(self.lengths[:, None]))
        if not int(failed) and _inverse_norm(lower) <= MAX_INVERSE:
            self.lower, upper = lower, lower.T
        else:
            self.q, upper = torch.linalg.qr(
                torch.cat([part.to(torch.float64) for part in self.parts], 1) / self.lengths
            )
        self.triangle = torch.zeros(len(upper), n, dtype=torch.float64, device=upper.device)
        self.triangle[:, kept] = upper * self.lengths

    def times(self, coefficients: Tensor, dtype: torch.dtype) -> Tensor:
        """Q @ coefficients: (m, k) in `dtype` from (p, k) in float64."""
        if self.q is not None:
            return (self.q @ coefficients).to(dtype)
        if self.lower is None:
            return coefficients.to(dtype)
        weights = torch.linalg.solve_triangular(self.lower.T, coefficients, upper=True)  # of the columns at unit length
        well_separated = float(weights.norm()) <= MAX_WEIGHTS * float(coefficients.norm())
        weights /= self.lengths[:, None]  # of a column that is next to nothing, beyond the range of float32
        range_of = torch.finfo(dtype)
        fits = range_of.tiny / range_of.eps < float(weights.norm()) < range_of.max
        weights = weights.to(dtype if well_separated and fits and holds(dtype, *self.parts) else torch.float64)
        blocks = blocks_beside(self.parts, weights.dtype)
        if _by_columns(self.parts[0]):  # (k, p) @ (p, rows): several times faster than its transpose
            across = weights.T.contiguous()
            return torch.cat([(across @ block.T).to(dtype) for block in blocks], 1).T
        return torch.cat([(block @ weights).to(dtype) for block in blocks])

    def q_in(self, dtype: torch.dtype) -> Tensor:
        """Q itself (m, p)."""
        p = self.triangle.shape[0]
        return self.times(torch.eye(p, dtype=torch.float64, device=self.triangle.device), dtype)

"""The subspaces that large dense updates share, by an iteration that only multiplies with the updates.

A block Davidson iteration finds the leading eigenvectors of A = Σ D_i D_iᵀ, which is never formed. Inside the span of Q
Rayleigh–Ritz gives the best there are; their residuals are what is missing, and are added to Q. Where the machine
multiplies a shorter type faster, copies of the updates in it draft the span and serve for what is added, which is small:
what A makes of the leading vectors is worked out in the updates' own type, so that the result is as good.
"""

import math
from typing import Any

import torch
from torch import Tensor

from modalloy.linalg import Basis, eigenpairs, frobenius, gram, row_blocks, top_eigenvectors

EXACT_SIZE = 1024  # up to this many rows an eigendecomposition is cheaper than an iteration
LARGEST_RANK = 1 / 12  # of the rows: an iteration multiplies and orthogonalises more than a decomposition beyond that
OVERSAMPLING = 2  # columns of the first block, in ranks
COLUMNS = 64  # a processor multiplies fewer in hardly less time
EXTRA = 8  # columns beyond the rank whose products are worked out in the updates' own type, at least
MARGIN = 8  # for so many columns of the rank one is watched beyond it
# of the projected updates, relative; up to twice as much where rounding stops it, which is what `verify` allows
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-10}
ENOUGH = 0.5  # of the tolerance may be left in directions to which nothing is added
WIDEST = 4  # columns of the span, in first blocks; then as many as that lead go on
FLAT = 0.65  # of the Ritz value at the cut, that of the start's last column
DRAFT_COST = 0.25  # of multiplying a column in the shorter type
MAX_STEPS = 30
DRAFT_PASSES = 2  # multiplications of the start by A, in the shorter type, before its span is widened
HIDDEN = 5.0  # roundings of the shorter type that a singular value must exceed for drafts to show it
STALLED = 0.5  # of the error before: what is missing is then lost in the shorter type's rounding
STUCK = 0.9  # and in rounding of their own type, which is that of columns which have no size of their own
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
    probes = torch.randn(matrix.shape[1], 2 * rank, generator=torch.Generator().manual_seed(0)).to(matrix)
    Q = Basis(matrix @ probes).q_in(matrix.dtype)
    for _ in range(2):
        Q = Basis(matrix @ (matrix.T @ Q)).q_in(matrix.dtype)
    return Q @ top_eigenvectors(gram(matrix.T @ Q), rank).to(matrix.dtype)


def _is_large(matrix: Tensor, rank: int) -> bool:
    """Whether the subspace on its rows' side is iterated."""
    return len(matrix) > EXACT_SIZE and rank < LARGEST_RANK * len(matrix)


def _decomposed(matrices: list[Tensor], rank: int) -> Tensor:
    return top_eigenvectors(gram(*(D.T for D in matrices)), rank).to(matrices[0].dtype)


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
    flat = (D.flatten() for D in matrices)
    size = sum(float(torch.dot(values, values)) for values in flat) ** 0.5
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
    drafts.clear()  # a Gram takes their place
    return _decomposed(matrices, rank)


def _iterated(matrices: list[Tensor], rank: int, size: float, drafts: list[Tensor]) -> Tensor | None:
    """`_top` by iteration; None if the spectrum falls too slowly for it to be worth it, or cannot be told apart at the cut."""
    m, dtype = len(matrices[0]), matrices[0].dtype
    tolerance = TOLERANCE[dtype]
    if not size:
        return torch.eye(m, rank, dtype=dtype, device=matrices[0].device)
    if size < LEAST:
        return None
    own, draft = Updates(matrices, size, dtype), Updates(drafts, 1.0, dtype) if drafts else None
    width = min(m, COLUMNS * math.ceil(OVERSAMPLING * rank / COLUMNS))
    span = _powered(draft or own, rank, width, DRAFT_PASSES if draft else 1)
    if span.is_flat():
        return None
    if draft is not None and not _sharpened(span, draft, own):
        span, draft = _powered(own, rank, width, 1), None
    before = base = math.inf
    for step in range(MAX_STEPS):
        if span.width <= rank or own.cost + (0 if draft is None else draft.cost * DRAFT_COST) > m:
            return None
        error = span.error()
        stalled = error > (STUCK if draft is None else STALLED) * before
        if error <= tolerance or (stalled and error <= 2 * tolerance and (draft is not None or base < math.inf)):
            return span.leading[:, :rank]
        is_wide = span.width > WIDEST * width
        if stalled or (is_wide and draft is not None):
            if error > STALLED * base:
                if draft is None:
                    return None
                draft = None
            if draft is not None:
                span.sharpen(own)
            else:
                span.shrink(width)
                span = Span(own, rank, span.Q)
            before, base = math.inf, error
            continue
        slow = draft is None and step > 2 and error * (error / before) ** (MAX_STEPS - step) > tolerance
        missing = span.missing(tolerance)
        if slow or span.is_tied(tolerance) or not missing.shape[1]:
            return None
        before = error
        if is_wide:
            span.shrink(width)
        span.add(draft or own, missing)
    return None


def _kept(rank: int) -> int:
    """Columns that are watched: the `rank` leading ones and those next to the cut."""
    return rank + max(EXTRA, rank // MARGIN)


def _refined(rank: int) -> int:
    """Columns to whose residuals something is added; of vectors beyond them some may stay outside the span."""
    return rank + max(1, rank // MARGIN)


def _powered(A: "Updates", rank: int, width: int, passes: int) -> "Span":
    """The span of A^passes times a start, by Ritz vectors: each column has a size of its own, and rounding in proportion."""
    span = Span(A, rank, A.start(width))
    for _ in range(passes):
        _, W = span.ritz()
        # small columns are sums of large ones, whose rounding would hide what a shorter type's has not hidden before
        wide = W.dtype if A.dtype == span.Q.dtype else span.Q.dtype
        span = Span(A, rank, (span.AQ.to(wide) @ W.to(wide)).to(span.Q.dtype))
    return span


def _sharpened(span: "Span", draft: "Updates", own: "Updates") -> bool:
    """Widen and sharpen a span of products in the shorter type; false where its rounding hides the last of the leading vectors."""
    if span.width <= span.rank:
        return False
    span.error()
    span.add(draft, span.missing(0.0))
    # rounding has about eps / √m in every direction
    hidden = (HIDDEN * torch.finfo(draft.dtype).eps) ** 2 / len(span.Q)
    if float(span.ritz()[0][span.rank - 1]) <= hidden:
        return False
    span.sharpen(own)
    return True


class Updates:
    """A = Σ D_i D_iᵀ / size², by products with D_i (m, n) alone; size² about Σ ‖D_i‖², so that the trace of A is 1."""

    def __init__(self, matrices: list[Tensor], size: float, wide: torch.dtype) -> None:
        self.matrices, self.size, self.dtype, self.wide = matrices, size, matrices[0].dtype, wide
        self.cost = 0  # columns that were multiplied by A; a Gram is as many as it has

    def start(self, width: int) -> Tensor:
        """Columns (m, width) in the type `wide`: random sums of each update's columns, every so many of one, and a little noise.

        All that the updates lead to is in them. (What the other side's vectors lead to is not all: vectors that only other
        updates have would be missing, and nothing would tell.)
        """
        m, n = self.matrices[0].shape
        generator = torch.Generator().manual_seed(0)  # so that the bytes of what follows are always the same
        X = torch.randn(m, width, generator=generator).to(self.matrices[0].device, self.wide)
        X *= NOISE / (len(self.matrices) * m) ** 0.5
        parts = X.split(-(-width // len(self.matrices)), 1)
        for index, D in enumerate(self.matrices):
            columns = parts[index % len(parts)]
            weights = torch.randn(n, columns.shape[1], generator=generator)
            columns += _times(D, weights.to(D)).to(self.wide) / self.size
        return X

    def products(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """A X in the type of X and XᵀAX in float64, of products in the updates' type."""
        short, H = X.to(self.dtype), X.new_zeros(X.shape[1], X.shape[1], dtype=torch.float64)
        AX: Tensor | None = None
        self.cost += X.shape[1]
        for D in self.matrices:
            Y = _times(D.T, short)
            if self.size != 1:
                Y /= self.size  # first, so that no product leaves the type's range
            inner = Y.to(X.dtype)
            H += gram(inner) if Y.dtype == X.dtype else inner.T @ inner
            outer = _times(D, Y)
            AX = outer.to(X.dtype) if AX is None else AX.add_(outer)
        assert AX is not None
        return AX / self.size, H


def _times(D: Tensor, X: Tensor) -> Tensor:
    """D @ X, which takes longer where D is the transpose of what is stored."""
    return D @ X if D.is_contiguous() else (X.T.contiguous() @ D.T).T


class Span:
    """The span of orthonormal Q (m, p), what A = Σ D_i D_iᵀ / size² makes of Q, and QᵀAQ in float64. trace A is 1.

    Of the first `known` columns that is worked out in the columns' own type, of those after them in a shorter one.
    """

    def __init__(self, A: Updates, rank: int, X: Tensor) -> None:
        self.Q = Basis(X).q_in(X.dtype)
        self.AQ, self.H = A.products(self.Q)
        self.rank, self.start, self.eps = rank, self.width, torch.finfo(X.dtype).eps
        self.known, self.drafted_eps = 0, 0.0
        self._ritz: tuple[Tensor, tuple[Tensor, Tensor]] | None = None
        self._note(A)

    def _note(self, A: Updates) -> None:
        """The products with the last columns are by A."""
        if A.dtype == self.Q.dtype:
            self.known = self.width
        else:
            self.drafted_eps = torch.finfo(A.dtype).eps

    @property
    def width(self) -> int:
        """p, the columns of Q."""
        return self.Q.shape[1]

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Ritz values (p,), the largest first, and the vectors' coefficients (p, p) in Q: decomposed once for each H."""
        if self._ritz is None or self._ritz[0] is not self.H:
            self._ritz = self.H, eigenpairs(self.H)
        return self._ritz[1]

    def is_flat(self) -> bool:
        """Whether the last Ritz value is so near to the one at the cut that a step would gain next to nothing."""
        theta, _ = self.ritz()
        return self.width > self.rank and float(theta[-1]) > FLAT * float(theta[self.rank - 1])

    def add(self, A: Updates, columns: Tensor) -> None:
        """Widen the span by orthonormal columns (m, b) that are orthogonal to Q; by the shorter type's A, if there is one."""
        products, H = A.products(columns)
        across = (self.AQ.T @ columns).to(H.dtype)  # by what is known of Q; what is known of the columns may be a draft
        self.H = _bordered(self.H, across, H)
        self.Q, self.AQ = torch.cat([self.Q, columns], 1), torch.cat([self.AQ, products], 1)
        self._note(A)

    def shrink(self, width: int) -> None:
        """Keep the leading approximate eigenvectors only."""
        theta, W = self.ritz()
        W = W[:, :width].to(self.Q.dtype)
        self.Q, self.AQ, self.H = self.Q @ W, self.AQ @ W, theta[:width].diag()

    def sharpen(self, A: Updates) -> None:
        """Work out what A makes of the leading vectors anew, in their own type."""
        self.shrink(self.start)
        self.known = min(_kept(self.rank), self.width)
        Q, rest = self.Q[:, : self.known], self.Q[:, self.known :]
        products, H = A.products(Q)
        across = (products.T @ rest).to(H.dtype)
        self.AQ[:, : self.known] = products
        self.H = _bordered(H, across, self.H[self.known :, self.known :])

    def error(self) -> float:
        """An estimate of the relative error of the updates if they are projected onto the leading `rank` columns.

        Two errors are told. What leaves the span: a residual r_j over the distance of θ_j from what is outside, of which there
        may be something from the first vector on that is not refined. What is exchanged inside it at the cut, between the
        vectors j ≤ k and k + 1: the coupling of the two, by their residuals and by rounding, over θ_j − θ_{k+1}; where these
        are nearly equal only float64 can tell them apart. Rounding is that of what the columns of Q were multiplied to, so that
        columns of a size of their own, as Ritz vectors are, are needed where the spectrum is steep.
        """
        k, m, start = self.rank, len(self.Q), self.start
        theta, W = self.ritz()
        theta, W = theta.clamp(min=0), W[:, : min(_kept(k), start)]
        self.leading, images = self.Q @ W.to(self.Q.dtype), self.AQ @ W.to(self.Q.dtype)
        self.residuals = images - self.Q @ (self.Q.T @ images)
        lengths = torch.linalg.norm(self.residuals.to(torch.float64), dim=0)
        self.unresolved = self._exchanged(self.eps * (theta[:k] * (theta[:k] + 1 / m)).sqrt(), theta)
        # rounding of products with D, whose mean squared singular value is 1 / m
        sizes = self.H.diagonal().clamp(min=0)
        squares = W**2 * (sizes * (sizes + 1 / m))[:, None]
        rounding = self.eps * squares[: self.known].sum(0).sqrt()
        drafted = self.drafted_eps * squares[self.known :].sum(0).sqrt()
        # where columns that are known to rounding begin
        inside = self.known if k < self.known < self.width else start - 1
        self.sines = _over(lengths, theta, start - 1)
        self.sines[:k] = _over(lengths, theta, min(start - 1, _refined(k)))[:k]
        self.sines += _over(drafted, theta, inside)
        lengths += drafted
        self.energies = theta[: W.shape[1]] / theta[:k].sum()
        # a vector that is in the span by chance shows the share of what it stands for that any of so many columns would
        shown = torch.where(self.sines[:k] < 1, 1.0, start / m)
        self.outside = _lost(self.sines[:k], theta[:k] / shown, theta[:k])
        coupling = lengths * self.sines[k] + rounding + drafted * torch.linalg.norm(W[self.known :, k])
        return max(self.outside, self._exchanged(coupling[:k], theta))

    def _exchanged(self, coupling: Tensor, theta: Tensor) -> float:
        """The error of what is exchanged at the cut by a coupling (k,) of the leading vectors with the next one."""
        k = self.rank
        return _lost(_over(coupling, theta, k), theta[:k], theta[:k])

    def is_tied(self, tolerance: float) -> bool:
        """Whether all that is left of the error is rounding at the cut."""
        return self.outside <= tolerance < self.unresolved

    def missing(self, tolerance: float) -> Tensor:
        """Orthonormal columns (m, b), orthogonal to Q, that the leading vectors lack most of their error's directions by."""
        large = self.sines**2 * self.energies > (ENOUGH * tolerance) ** 2 / self.rank
        large[_refined(self.rank) :] = False  # of those beyond the cut, the next ones matter
        X = self.residuals[:, large]
        for _ in range(2):  # the second time takes out what rounding left
            X = Basis(X - self.Q @ (self.Q.T @ X)).q_in(X.dtype)
        return X


def _bordered(leading: Tensor, across: Tensor, rest: Tensor) -> Tensor:
    """The symmetric matrix of these blocks."""
    return torch.cat([torch.cat([leading, across], 1), torch.cat([across.T, rest], 1)])


def _over(lengths: Tensor, theta: Tensor, outside: int) -> Tensor:
    """Sines of what couples leading vectors with those from `outside` on."""
    return (lengths / (theta[: len(lengths)] - theta[outside]).clamp(min=TINY)).clamp(max=1)


def _lost(sines: Tensor, energies: Tensor, theta: Tensor) -> float:
    """Relative error of updates of Ritz values `theta`, whose directions of these energies are off by these sines."""
    return float((sines.clamp(max=1) ** 2 * energies).sum() / theta.sum()) ** 0.5

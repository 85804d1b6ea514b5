"""Subspaces and bases against float64 decompositions, on spectra and columns that are made to mislead them."""

import pytest
import torch
from torch import Tensor

from modalloy import linalg, subspaces
from modalloy.delta import LowRank, Scaled, lift, norm, second_moment, sharing
from modalloy.linalg import Basis, Spectrum, gram, top_eigenvectors
from modalloy.subspaces import top_subspaces

M, N, K = 240, 260, 16
TAIL = torch.arange(1, M + 1, dtype=torch.float64)
SPECTRA = {
    "1/j": 1 / TAIL,
    "1/√j": TAIL**-0.5,
    "geometric": 0.9**TAIL,
    "steep": 0.5**TAIL,
    "gap": torch.where(TAIL <= K, 10.0, 0.1),
    "small at the cut": torch.where(TAIL < K, 10.0, torch.where(TAIL == K, 0.2, 0.1)),
    "nearly tied at the cut": torch.where(TAIL <= K, 1 + 1e-5 * (K - TAIL), torch.where(TAIL == K + 1, 1 - 1e-5, 0.01)),
    "flat": 1 - 1e-3 * TAIL / M,
    "rank 3": torch.where(TAIL <= 3, 1 / TAIL, 0.0),
    "zero": 0 * TAIL,
}


def with_spectrum(values: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    left, right = (
        torch.linalg.qr(torch.randn(size, M, generator=generator, dtype=torch.float64))[0] for size in (M, N)
    )
    return (left * values) @ right.T


@pytest.fixture(params=[None, torch.bfloat16], ids=["one type", "drafted"])
def drafted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices are iterated, too, with drafts or without, whatever this machine multiplies fast."""
    shorter = request.param
    monkeypatch.setattr(subspaces, "EXACT_SIZE", 0)
    monkeypatch.setattr(
        subspaces, "_shorter", lambda D: torch.float32 if shorter and D.dtype == torch.float64 else shorter
    )


def lost(found: Tensor, wanted: Tensor, matrices: list[Tensor]) -> float:
    """The distance between projections of the matrices' columns onto two subspaces, in the norm of the second."""
    for U in (found, wanted):
        assert (U.T @ U - torch.eye(U.shape[1], dtype=U.dtype)).norm() < 1e-5
    matrix = torch.cat(matrices, 1)
    projected = wanted @ (wanted.T @ matrix)
    return float((found @ (found.T @ matrix) - projected).norm() / projected.norm().clamp(min=1e-300))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_top_subspaces_project_as_the_exact_ones_do(
    spectrum: str, scale: float, dtype: torch.dtype, drafted: None
) -> None:
    stored = (scale * with_spectrum(SPECTRA[spectrum])).to(dtype)
    matrix = stored.to(torch.float64) / scale
    for found, one in zip(top_subspaces([stored], K), (matrix, matrix.T), strict=True):
        wanted = top_eigenvectors(one @ one.T, K)
        assert lost(found.to(torch.float64), wanted, [one]) <= (1e-5 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("shape", [(240, 260), (240, 30), (260, 200), (300, 9)])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_top_subspaces_of_several_updates(shape: tuple[int, int], count: int, drafted: None) -> None:
    """Updates of several sizes, some of which are low-rank, or zero in most rows and columns."""
    generator = torch.Generator().manual_seed(count)
    updates = []
    for index in range(count):
        left, right = (torch.randn(size, 3 + 20 * index, generator=generator) for size in shape)
        update = (left * (1 + torch.arange(left.shape[1])) ** -1.5) @ right.T * 10.0**-index
        update[:: index + 1] = 0
        updates.append(update)
    doubled = [update.to(torch.float64) for update in updates]
    for found, ones in zip(top_subspaces(updates, K), (doubled, [one.T for one in doubled]), strict=True):
        wanted = top_eigenvectors(gram(*(one.T for one in ones)), K)
        assert lost(found.to(torch.float64), wanted, ones) <= 1e-5


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_directions_that_the_other_side_does_not_lead_to(scale: float, drafted: None) -> None:
    """Four updates share an output direction; the largest input direction is the fifth's, which has another output."""
    U, V = (torch.linalg.qr(torch.randn(size, 5, generator=torch.Generator().manual_seed(0)))[0] for size in (240, 260))
    updates = [scale * size * U[:, :1] @ V[:, i : i + 1].T for i, size in enumerate((1.0, 0.98, 0.96, 0.94))]
    updates.append(scale * 1.2 * U[:, 1:2] @ V[:, 4:].T)
    found = top_subspaces(updates, 1)
    for one, wanted in zip(found, (U[:, :1], V[:, 4:]), strict=True):
        assert abs(float((one * wanted).sum())) > 1 - 1e-5


def test_more_updates_than_columns_to_start_from(drafted: None) -> None:
    """The last of twelve is the largest."""
    generator = torch.Generator().manual_seed(0)
    updates = [torch.randn(240, 260, generator=generator) * 1e-3 for _ in range(12)]
    updates[-1][7, 9] += 1.0
    U, V = top_subspaces(updates, 1)
    assert abs(float(U[7])) > 0.99 and abs(float(V[9])) > 0.99


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(("size", "apart"), [(8, 0.03), (16, 0.05), (32, 0.03)])
def test_many_vectors_next_to_the_cut(size: int, apart: float, rank: int, drafted: None) -> None:
    """More than are refined, so that some of them stay partly outside the span."""
    ones, next_to = torch.ones(rank, dtype=torch.float64), torch.full((size,), 1 - apart, dtype=torch.float64)
    squares = torch.cat([ones, next_to, 0.85 * 30 / (30 + TAIL)])[:M]
    update = with_spectrum(squares.sqrt()).float()
    matrix = update.to(torch.float64)
    for found, one in zip(top_subspaces([update], rank), (matrix, matrix.T), strict=True):
        assert lost(found.to(torch.float64), top_eigenvectors(one @ one.T, rank), [one]) <= 1e-5


@pytest.mark.parametrize("entries", [1, 4, 20])
def test_updates_of_a_few_entries(entries: int, drafted: None) -> None:
    """Fewer dimensions than are asked for, and residuals that are next to nothing."""
    generator = torch.Generator().manual_seed(0)
    places = (torch.randperm(size, generator=generator)[:entries] for size in (M, N))
    update = torch.zeros(M, N)
    update[tuple(places)] = torch.randn(entries, generator=generator)
    matrix = update.to(torch.float64)
    for found, one in zip(top_subspaces([update], K), (matrix, matrix.T), strict=True):
        assert lost(found.to(torch.float64), top_eigenvectors(one @ one.T, K), [one]) <= 1e-5


@pytest.mark.parametrize("spectrum", ["1/j", "1/√j", "geometric", "gap", "rank 3"])
def test_falling_spectra_are_iterated(spectrum: str, drafted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the tests above would only compare the exact way with itself."""
    monkeypatch.setattr(subspaces, "_decomposed", None)
    assert len(top_subspaces([with_spectrum(SPECTRA[spectrum]).float()], K)) == 2


@pytest.mark.parametrize("spectrum", ["1/j", "1/√j", "geometric"])
def test_what_is_left_of_an_iteration_is_within_its_bound(
    spectrum: str, drafted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Near its end, where second-order terms are small, and while float32's own rounding is not all that is left."""
    matrix = with_spectrum(SPECTRA[spectrum]).float()
    wanted = top_eigenvectors(gram(matrix.T), K)
    compared = []
    error = subspaces.Span.error

    def observed(span: subspaces.Span) -> float:
        bound = error(span)
        if len(span.Q) == M and span.Q.shape[1] > K and 3e-6 < bound < 2e-3:
            compared.append(lost(span.leading[:, :K].to(torch.float64), wanted, [matrix.to(torch.float64)]) / bound)
        return bound

    monkeypatch.setattr(subspaces.Span, "error", observed)
    monkeypatch.setattr(subspaces, "COLUMNS", 8)  # a block of 64 is a quarter of this matrix
    monkeypatch.setattr(subspaces, "OVERSAMPLING", 1.75)
    top_subspaces([matrix], K)
    assert compared and max(compared) < 1.5


@pytest.mark.parametrize("seed", range(3))
def test_a_few_large_values_and_many_small_ones(seed: int, drafted: None) -> None:
    """Of which the leading ones are smaller than float32's rounding of the large ones, squared."""
    generator = torch.Generator().manual_seed(seed)
    size, rank, updates = 1100, 8, []
    for index in range(2):
        left, right = (
            torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0] for _ in range(2)
        )
        values = 1.1e-4 / (1 + 2 * torch.arange(size, dtype=torch.float64) + index)
        values[:2] = 1 - 0.1 * index
        values[4:] *= 0.8
        updates.append(((left * values) @ right.T).float())
    doubled = [update.to(torch.float64) for update in updates]
    for found, ones in zip(top_subspaces(updates, rank), (doubled, [one.T for one in doubled]), strict=True):
        wanted = top_eigenvectors(gram(*(one.T for one in ones)), rank)
        assert lost(found.to(torch.float64), wanted, ones) <= 1e-5


@pytest.mark.parametrize("pivot", [0.5, 0.3, 0.11, 1e-3])
@pytest.mark.parametrize("n", [16, 64, 256])
def test_basis_of_columns_that_are_dependent_only_together(n: int, pivot: float) -> None:
    """Kahan's matrix: no column is close to those before it, yet its condition grows exponentially with their number."""
    sine = pivot ** (1 / (n - 1))
    ones = torch.triu(torch.ones(n, n, dtype=torch.float64), 1)
    kahan = (sine ** torch.arange(n))[:, None] * (torch.eye(n, dtype=torch.float64) - (1 - sine**2) ** 0.5 * ones)
    tall = torch.randn(400, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    columns = (torch.linalg.qr(tall)[0] @ kahan).float()
    basis = Basis(columns)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-8)):
        q = basis.q_in(dtype).to(torch.float64)
        assert (q.T @ q - torch.eye(n, dtype=torch.float64)).norm() < tolerance * n**0.5
        assert (q @ basis.triangle - columns.double()).norm() < tolerance * columns.norm()


@pytest.mark.parametrize("spread", [0, 4, 18])
def test_basis_of_badly_scaled_columns_in_float32(spread: int) -> None:
    tall = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tall[:, 1::2] = 0.9 * tall[:, ::2] + 0.2 * tall[:, 1::2]
    basis = Basis((tall * torch.logspace(-spread, spread, 64, dtype=torch.float64)).float())
    exact = basis.q_in(torch.float64)
    assert 0 < (basis.q_in(torch.float32).to(torch.float64) - exact).norm() < 2e-6 * exact.norm()


def test_basis_of_a_column_that_is_next_to_nothing() -> None:
    """Its length's inverse is beyond float32."""
    tall = torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
    tall[:, 2] *= 1e-41
    q = Basis(tall).q_in(torch.float32)
    assert (q.T @ q - torch.eye(5)).norm() < 1e-5


@pytest.mark.parametrize("size", [1, 63, 64, 65, 130, 257])
def test_a_gram_is_that_of_float64(size: int) -> None:
    tall = torch.randn(5000, size, generator=torch.Generator().manual_seed(0))
    wanted = tall.double().T @ tall.double()
    assert torch.allclose(gram(tall), wanted, rtol=1e-12, atol=1e-9)
    assert torch.equal(gram(tall), gram(tall).T)


def test_a_second_moment_of_factors_with_zero_columns() -> None:
    draw = torch.Generator().manual_seed(0)
    updates = []
    for rows, columns in [(5, 0), (0, 7), (130, 300), (300, 129), (200, 130)]:
        update = LowRank(torch.zeros(300, 9, dtype=torch.float64), torch.zeros(9, 300, dtype=torch.float64))
        update.up[:rows] = torch.randn(rows, 9, generator=draw, dtype=torch.float64)
        update.down[:, :columns] = torch.randn(9, columns, generator=draw, dtype=torch.float64)
        updates.append(update)
    expected = sum(update.dense().T @ update.dense() for update in updates)
    assert torch.allclose(second_moment(updates), expected, rtol=1e-12, atol=1e-10)


def symmetric(values: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix of these eigenvalues, and its eigenvectors."""
    generator = torch.Generator().manual_seed(1)
    vectors = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))[0]
    return (vectors * values) @ vectors.T, vectors


@pytest.mark.parametrize("scale", [1e-40, 1.0, 1e40])
@pytest.mark.parametrize("spectrum", ["random", *SPECTRA])
def test_a_span_found_in_float32_is_corrected_to_that_of_float64(spectrum: str, scale: float) -> None:
    """`with_spectrum` has singular values; here they are eigenvalues, and K of 400 is asked for."""
    n = 400
    fill = torch.zeros(n - M, dtype=torch.float64)
    values = (
        torch.linspace(2, 1, n, dtype=torch.float64) if spectrum == "random" else torch.cat([SPECTRA[spectrum], fill])
    )
    values = values.sort(descending=True).values * scale
    A, vectors = symmetric(values)
    found = Spectrum(A).top(K)
    assert found.shape == (n, K) and found.dtype == torch.float64
    assert (found.T @ found - torch.eye(K, dtype=torch.float64)).norm() < 1e-12
    assert float((found.T @ A @ found).trace()) >= float(values[:K].sum()) * (1 - 1e-9)
    gap = float((values[K - 1] - values[K]) / (values[0] or 1))
    if gap > 1e-4:
        assert (found - vectors[:, :K] @ (vectors[:, :K].T @ found)).norm() < 1e-8


def test_the_correction_is_taken_where_there_is_a_gap_and_not_where_there_is_none() -> None:
    """Otherwise the test above would compare float64 with itself."""
    n = 400
    spread, _ = symmetric(torch.linspace(2, 1, n, dtype=torch.float64))
    assert Spectrum(spread)._corrected(K) is not None
    tied = torch.linspace(2, 1, n, dtype=torch.float64)
    tied[K] = tied[K - 1]
    assert Spectrum(symmetric(tied)[0])._corrected(K) is None
    assert Spectrum(torch.zeros(n, n, dtype=torch.float64))._corrected(K) is None


@pytest.mark.parametrize("apart", [1.0, 1e-3, 1e-7, 0.0])
def test_the_norm_of_factors_is_exact_whatever_cancels(apart: float) -> None:
    generator = torch.Generator().manual_seed(0)
    up, down, other = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((300, 8), (8, 200), (8, 200))
    )
    wanted = apart * float((up @ other).norm())
    found = norm(LowRank(up, down + apart * other) + -1.0 * LowRank(up, down))
    assert abs(found - wanted) <= 1e-6 * wanted + 1e-12 * float((up @ down).norm())


def test_an_eigensolver_that_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    A, vectors = symmetric(torch.cat([torch.ones(5).double() + torch.arange(5), torch.zeros(250).double()]))

    def gives_up(_: Tensor) -> None:
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", gives_up)
    found = top_eigenvectors(A, 3)
    wanted = vectors[:, [4, 3, 2]]
    assert (found @ (found.T @ wanted) - wanted).norm() < 1e-8
    assert (
        linalg.spectral_function(A, torch.sqrt) - (vectors * (A @ vectors).norm(dim=0).sqrt()) @ vectors.T
    ).norm() < 1e-6


@pytest.mark.parametrize("seed", range(20))
def test_low_rank_where_half_of_the_rows_are_zero(seed: int) -> None:
    """MKL's float32 eigensolver gives up on one of these where it has one thread."""
    columns = torch.randn(260, 3 + seed, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    columns *= (1 + torch.arange(3 + seed)) ** -1.5
    columns[1::2] = 0
    rank = min(16, 3 + seed)
    found = top_eigenvectors(columns @ columns.T, rank)
    left = torch.linalg.svd(columns, full_matrices=False)[0][:, :rank]
    assert (found @ (found.T @ columns) - left @ (left.T @ columns)).norm() < 1e-8 * columns.norm()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("n_rows", [40, 512, 1300])
def test_a_basis_of_matrices_side_by_side_is_that_of_one(n_rows: int, transposed: bool) -> None:
    """Of any types, one of no columns and one with a column of zeros among them, stored by rows or by columns."""
    generator = torch.Generator().manual_seed(0)
    types = (torch.float16, torch.bfloat16, torch.float32, torch.float16)
    parts = [
        torch.randn(n_rows, n, generator=generator).to(dtype) for n, dtype in zip((8, 0, 5, 16), types, strict=True)
    ]
    parts[2][:, 3] = 0
    whole = torch.cat([part.double() for part in parts], 1)
    if transposed:
        parts = [part.T.contiguous().T for part in parts]
    basis = Basis(*parts)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        q = basis.q_in(dtype).double()
        assert q.shape == (n_rows, 28)
        assert (q.T @ q - torch.eye(28, dtype=torch.float64)).norm() < tolerance
        assert (q @ basis.triangle - whole).norm() < tolerance * whole.norm()


def test_updates_as_they_are_stored_have_the_cores_of_those_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(n_rows: int, n_columns: int) -> torch.Tensor:
        return torch.randn(n_rows, n_columns, generator=generator).half()

    stored = [Scaled(LowRank(draw(90, 6), draw(6, 70)), scale) for scale in (0.3, 1.0, -2.0)]
    cores, restore = lift(stored)
    for core, one in zip(cores, stored, strict=True):
        wanted = one.to(torch.float64).dense()
        assert (restore(core, torch.float64).dense() - wanted).norm() < 1e-12 * wanted.norm()


def test_what_is_shared_of_stored_updates_tells_their_scales_apart() -> None:
    update = LowRank(torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).half(), torch.eye(4, 40).half())
    with sharing():
        (one,), _ = lift([Scaled(update, 1.0)])
        (again,), _ = lift([Scaled(update, 1.0)])
        (double,), _ = lift([Scaled(update, 2.0)])
    assert again is one
    assert torch.equal(double.dense(), 2 * one.dense())

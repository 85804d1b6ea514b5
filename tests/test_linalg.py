"""Subspaces and bases against float64 decompositions, on spectra and columns that are made to mislead them."""

import pytest
import torch
from torch import Tensor

from modalloy import linalg
from modalloy.delta import LowRank, norm
from modalloy.linalg import Basis, Spectrum, gram, top_eigenvectors, top_subspace

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_top_subspace_projects_as_the_exact_one_does(
    spectrum: str, scale: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linalg, "EXACT_SIZE", 0)
    stored = (scale * with_spectrum(SPECTRA[spectrum])).to(dtype)
    found = top_subspace([stored], K).to(torch.float64)
    matrix = stored.to(torch.float64) / scale
    wanted = top_eigenvectors(matrix @ matrix.T, K)
    assert (found.T @ found - torch.eye(K, dtype=torch.float64)).norm() < 1e-5
    projected = wanted @ (wanted.T @ matrix)
    distance = (found @ (found.T @ matrix) - projected).norm()
    assert distance <= (1e-5 if dtype == torch.float32 else 1e-9) * projected.norm()


@pytest.mark.parametrize("spectrum", ["1/j", "geometric", "gap"])
def test_falling_spectra_are_iterated(spectrum: str) -> None:
    """Otherwise the test above would only compare the exact way with itself."""
    assert linalg._iterated_subspace([with_spectrum(SPECTRA[spectrum]).float()], K) is not None


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


@pytest.mark.parametrize("size", [1, 63, 64, 65, 130, 257])
def test_a_gram_is_that_of_float64(size: int) -> None:
    tall = torch.randn(5000, size, generator=torch.Generator().manual_seed(0))
    wanted = tall.double().T @ tall.double()
    assert torch.allclose(gram(tall), wanted, rtol=1e-12, atol=1e-9)
    assert torch.equal(gram(tall), gram(tall).T)


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

"""Subspaces and bases against float64 decompositions, on spectra and columns that are made to mislead them."""

import pytest
import torch
from torch import Tensor

from modalloy import linalg
from modalloy.linalg import Basis, top_eigenvectors, top_subspace

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

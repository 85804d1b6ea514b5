"""Methods as laws: agreement with a float64 NumPy reference, invariances, and every awkward input that is defined."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modalloy import LowRank, merge_deltas
from modalloy.errors import MethodError, RecipeError
from modalloy.linalg import Basis
from modalloy.methods import METHODS, resolve

OUT, IN = 60, 44
ON_FACTORS = {"core_space"}  # defined on the factors of low-rank updates only


def draw(
    ranks: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32, shape: tuple[int, int] = (OUT, IN)
) -> list[LowRank]:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    return [
        LowRank(
            torch.randn(rows, rank, generator=generator, dtype=torch.float64).to(dtype),
            torch.randn(rank, columns, generator=generator, dtype=torch.float64).to(dtype),
        )
        for rank in ranks
    ]


def dense(delta: LowRank | Tensor) -> Tensor:
    return (delta.up.double() @ delta.down.double()) if isinstance(delta, LowRank) else delta.double()


def relative(found: LowRank | Tensor, wanted: Tensor | np.ndarray) -> float:
    """Frobenius distance, relative to the wanted matrix unless that is zero."""
    wanted = torch.as_tensor(wanted)
    return float((dense(found) - wanted).norm() / (wanted.norm() or 1.0))


def extras(method: str, n: int, shape: tuple[int, int] = (OUT, IN)) -> dict[str, list[Tensor]]:
    """What a method is given beside the updates and its parameters: Fisher matrices, some of whose entries are 0."""
    if not METHODS[method].takes("fishers"):
        return {}
    generator = torch.Generator().manual_seed(7)
    return {"fishers": [torch.randn(*shape, generator=generator, dtype=torch.float64).clamp(min=0) for _ in range(n)]}


def expected(method: str, deltas: list[LowRank], **parameters: Any) -> np.ndarray:
    chosen = resolve(method, parameters, n=len(deltas), lora_rank=max(d.rank for d in deltas))
    matrices: list[Any] = [dense(delta).numpy() for delta in deltas]
    if method in ON_FACTORS:
        matrices = [(delta.up.double().numpy(), delta.down.double().numpy()) for delta in deltas]
    given = {name: [matrix.numpy() for matrix in value] for name, value in extras(method, len(deltas)).items()}
    return getattr(reference, method)(matrices, **given, **chosen)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize(
    "ranks",
    [(6, 6, 6), (3, 9, 1), (5,), (30, 30), (50, 50)],
    ids=["equal ranks", "unequal ranks", "one specialist", "stacked rank above in", "rank above in and out"],
)
def test_low_rank_and_dense_agree_with_the_reference(method: str, ranks: tuple[int, ...]) -> None:
    deltas = draw(ranks)
    wanted, given = expected(method, deltas), extras(method, len(deltas))
    low_rank = merge_deltas(deltas, method, **given)
    if METHODS[method].receives == "dense":
        assert isinstance(low_rank, Tensor) and low_rank.dtype == torch.float32
    else:
        assert isinstance(low_rank, LowRank) and low_rank.up.dtype == torch.float32
    assert relative(low_rank, wanted) < 2e-5
    given |= resolve(method, {}, n=len(deltas), lora_rank=max(ranks))
    if method in ON_FACTORS:
        with pytest.raises(MethodError, match="full matrix"):
            merge_deltas([deltas[0].dense(), *deltas[1:]], method, **given)
        return
    full = merge_deltas([delta.dense() for delta in deltas], method, **given)
    assert isinstance(full, Tensor) and full.dtype == torch.float32
    assert relative(full, wanted) < 2e-5


def test_ssam_with_factors_that_span_1e4_in_opposite_order() -> None:
    scales = torch.logspace(0, 4, 32, dtype=torch.float64)
    (plain,) = draw((32,), dtype=torch.float64, shape=(256, 200))
    delta = LowRank((plain.up * scales).float(), (plain.down * scales.flip(0)[:, None]).float())
    assert relative(merge_deltas([delta], "ssam", rank=16), expected("ssam", [delta], rank=16)) < 2e-5


@pytest.mark.parametrize("gap", [1e-3, 1e-5, 1e-7, 0.0], ids=lambda gap: f"columns {gap:g} apart")
def test_ssam_with_nearly_dependent_factors(gap: float) -> None:
    first, noise = draw((5, 5), seed=4)
    twin = LowRank(first.up + gap * noise.up, first.down + gap * noise.down)
    deltas = [first, twin, *draw((3,), seed=5)]
    assert relative(merge_deltas(deltas, "ssam", rank=4), expected("ssam", deltas, rank=4)) < 2e-5


def test_zero_updates_are_defined() -> None:
    real, other = draw((4, 4))
    zero = LowRank(torch.zeros(OUT, 4), other.down)  # a LoRA that was never trained
    empty = LowRank(torch.zeros(OUT, 0), torch.zeros(0, IN))
    for method in METHODS:
        assert dense(merge_deltas([zero, zero], method, **extras(method, 2))).norm() == 0
        assert dense(merge_deltas([empty], method, **extras(method, 1))).norm() == 0
        for nothing in (zero, empty):
            found = merge_deltas([real, nothing], method, **extras(method, 2))
            assert relative(found, expected(method, [real, nothing])) < 2e-5


def test_rank_above_the_stacked_rank_is_the_scaled_sum() -> None:
    deltas = draw((4, 5))
    merged = merge_deltas(deltas, "ssam", rank=500)
    assert isinstance(merged, LowRank) and merged.rank == 9
    assert relative(merged, 0.5 * sum(dense(delta) for delta in deltas)) < 1e-6


def test_energy_rank_keeps_at_least_that_share() -> None:
    deltas = draw((6, 6))
    ranks = [merge_deltas(deltas, "ssam", rank={"energy": share}).rank for share in (0.3, 0.6, 0.9, 0.9999999)]
    assert ranks == sorted(ranks) and ranks[0] < ranks[-1] == 12
    matrices = [dense(delta) for delta in deltas]
    spectra = [
        torch.linalg.eigvalsh(gram).flip(0) for gram in (sum(d @ d.T for d in matrices), sum(d.T @ d for d in matrices))
    ]
    needed = max(int((s.cumsum(0) < 0.6 * s.sum()).sum()) + 1 for s in spectra)
    assert ranks[1] == needed


def test_weights_come_first_and_are_not_renormalised() -> None:
    deltas = draw((4, 4))
    weighted = merge_deltas(deltas, "ssam", weights=[3.0, 0.5], rank=4)
    by_hand = merge_deltas([3.0 * deltas[0], 0.5 * deltas[1]], "ssam", rank=4)
    assert relative(weighted, dense(by_hand)) < 1e-6
    assert (
        relative(merge_deltas(deltas, "damc", weights=[3.0, 0.5]), 1.5 * dense(deltas[0]) + 0.25 * dense(deltas[1]))
        < 1e-6
    )


def test_mixed_low_rank_and_dense_give_dense() -> None:
    first, second = draw((4, 4))
    merged = merge_deltas([first, second.dense()], "ssam", rank=4)
    assert isinstance(merged, Tensor)
    assert relative(merged, expected("ssam", [first, second], rank=4)) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_stored_precision_is_widened(dtype: torch.dtype) -> None:
    deltas = draw((4, 4), dtype=dtype)
    merged = merge_deltas(deltas, "ssam", rank=4)
    assert isinstance(merged, LowRank)
    assert merged.up.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative(merged, expected("ssam", deltas, rank=4)) < (1e-12 if dtype == torch.float64 else 2e-5)


# The laws. Each is a function of the merge f, true or not; METHODS[name].laws says which it keeps.

K = 3  # below every rank that is drawn, so that truncation shows
P = torch.linalg.qr(torch.randn(OUT, OUT, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
Q = torch.linalg.qr(torch.randn(IN, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))[0]


def law_holds(law: str, method: str, deltas: list[LowRank]) -> bool:
    given: dict[str, Any] = {"rank": K} if "rank" in METHODS[method].parameters else {}
    others = extras(method, len(deltas))

    def f(updates: list[LowRank], change: Callable[[list[Tensor]], list[Tensor]] = lambda matrices: matrices) -> Tensor:
        """The merge. `change` does to what else is given (one matrix per specialist) what was done to the updates."""
        changed = {name: change(matrices)[: len(updates)] for name, matrices in others.items()}
        return dense(merge_deltas(updates, method, **given, **changed))

    merged = f(deltas)
    if law == "identity at n=1":
        return relative(f(deltas[:1]), dense(deltas[0])) < 1e-9
    if law == "permutation":
        return relative(f(deltas[::-1], lambda matrices: matrices[::-1]), merged) < 1e-9
    if law == "scaling":
        return relative(f([2.5 * delta for delta in deltas]), 2.5 * merged) < 1e-9
    if law == "rotation":
        return relative(f([LowRank(P @ d.up, d.down @ Q.T) for d in deltas]), P @ merged @ Q.T) < 1e-9
    if law == "left rotation":
        return relative(f([LowRank(P @ d.up, d.down) for d in deltas]), P @ merged) < 1e-9
    if law == "factored = dense":
        try:
            full = merge_deltas([dense(d) for d in deltas], method, **given, **others)
        except MethodError:
            return False
        return relative(full, merged) < 1e-9
    if law == "transpose":
        turned = [LowRank(d.down.T, d.up.T) for d in deltas]
        return relative(f(turned, lambda matrices: [matrix.T for matrix in matrices]), merged.T) < 1e-9
    if law == "gauge":
        changed = []
        for delta in deltas:
            g = torch.eye(delta.rank, dtype=torch.float64) + 0.3
            changed.append(LowRank(delta.up @ g, torch.linalg.solve(g, delta.down)))
        return relative(f(changed), merged) < 1e-9
    if law == "rank ≤ k":
        return int(torch.linalg.matrix_rank(merged)) <= K
    assert law == "rank ≤ Σ r_i"
    return int(torch.linalg.matrix_rank(merged)) <= sum(d.rank for d in deltas)


LAWS = (
    "identity at n=1",
    "permutation",
    "scaling",
    "left rotation",
    "rotation",
    "transpose",
    "gauge",
    "rank ≤ k",
    "rank ≤ Σ r_i",
    "factored = dense",
)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("method", sorted(METHODS))
def test_laws_kept_and_broken(method: str, law: str) -> None:
    assert law_holds(law, method, draw((4, 6, 5), dtype=torch.float64)) == (law in METHODS[method].laws)


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    k=st.integers(1, 30),
    rows=st.integers(1, 25),
    columns=st.integers(1, 25),
    seed=st.integers(0, 10_000),
)
def test_ssam_is_bounded_and_idempotent(ranks: list[int], k: int, rows: int, columns: int, seed: int) -> None:
    deltas = draw(tuple(ranks), seed=seed, dtype=torch.float64, shape=(rows, columns))
    merged = merge_deltas(deltas, "ssam", rank=k, scale=1.0)
    assert isinstance(merged, LowRank) and merged.rank <= min(k, rows, columns, sum(ranks))
    total = sum((dense(delta) for delta in deltas), torch.zeros(rows, columns, dtype=torch.float64))
    assert dense(merged).norm() <= total.norm() * (1 + 1e-9) + 1e-12
    again = merge_deltas([merged], "ssam", rank=k, scale=1.0)
    assert (dense(again) - dense(merged)).norm() <= 1e-9 * max(1.0, float(dense(merged).norm()))


def test_ssam_subspaces_leave_out_cross_terms() -> None:
    """Two opposite updates and a small third: Σ D_i sees only the third, A and B see what the specialists really use."""
    big, small = draw((1, 1), dtype=torch.float64)
    deltas = [10 * big, -10 * big, small]
    assert dense(merge_deltas(deltas, "ssam", rank=1, scale=1.0)).norm() < 0.5 * dense(small).norm()


@pytest.mark.parametrize(
    ("columns", "path"),
    [
        (torch.randn(300, 20, generator=torch.Generator().manual_seed(0)), "cholesky"),
        (torch.randn(300, 5, generator=torch.Generator().manual_seed(0)).repeat(1, 2), "qr"),
        (torch.randn(20, 300, generator=torch.Generator().manual_seed(0)), "identity"),
        (torch.zeros(300, 3), "empty"),
    ],
    ids=["independent", "dependent", "wide", "zero"],
)
def test_basis_is_orthonormal_and_spans(columns: Tensor, path: str) -> None:
    basis = Basis(columns)
    p = basis.triangle.shape[0]
    q = basis.times(torch.eye(p, dtype=torch.float64), torch.float64)
    assert torch.allclose(q.T @ q, torch.eye(p, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(q @ basis.triangle, columns.double(), atol=1e-6)
    assert {"cholesky": p == 20, "qr": p == 10, "identity": p == 20, "empty": p == 0}[path]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_values_that_are_not_finite_are_refused(method: str, value: float) -> None:
    first, second = draw((3, 3))
    second.down[1, 2] = value
    with pytest.raises(MethodError, match="NaN or infinite"):
        merge_deltas([first, second], method, **extras(method, 2))
    with pytest.raises(MethodError, match="NaN or infinite"):
        merge_deltas([first.dense(), second.dense()], method, **extras(method, 2))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "sam"}, RecipeError, r"unknown merge method 'sam'; did you mean 'ssam'\?"),
        ({"rnak": 3}, RecipeError, r"no parameter 'rnak'; did you mean 'rank'\?"),
        ({"rank": 0}, RecipeError, "rank: 0 is not a whole number"),
        ({"rank": -4}, RecipeError, "rank: -4 is not"),
        ({"rank": 2.5}, RecipeError, "rank: 2.5 is not"),
        ({"rank": {"energy": 1.5}}, RecipeError, "energy 1.5 is not between"),
        ({"scale": math.nan}, RecipeError, "scale: nan is not a finite number"),
        ({"weights": [1.0]}, MethodError, "1 weights for 2 updates"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        merge_deltas(draw((3, 3)), **arguments)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(MethodError, match="update 1 is"):
        merge_deltas([*draw((3,)), *draw((3,), shape=(OUT, IN + 1))])
    with pytest.raises(MethodError, match="do not fit"):
        LowRank(torch.zeros(4, 3), torch.zeros(2, 5))
    with pytest.raises(MethodError, match="nothing to merge"):
        merge_deltas([])

"""Methods as laws: agreement with a float64 NumPy reference, invariances, and every awkward input that is defined."""

import math
from collections.abc import Callable, Sequence
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
from modalloy.methods import METHODS
from modalloy.methods.apply import resolve
from modalloy.methods.wudi import Interference

OUT, IN = 60, 44
ON_FACTORS = {"core_space", "do_merging", "factorwise"}  # defined on the factors of low-rank updates only


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


def extras(method: str, n: int, shape: tuple[int, int] = (OUT, IN)) -> dict[str, Any]:
    """What a method is given beside the updates and its parameters: Fisher matrices, some of whose entries are 0, the base."""
    generator = torch.Generator().manual_seed(7)
    if METHODS[method].takes("base"):
        return {"base": torch.randn(*shape, generator=generator, dtype=torch.float64)}
    if not METHODS[method].takes("fishers"):
        return {}
    return {"fishers": [torch.randn(*shape, generator=generator, dtype=torch.float64).clamp(min=0) for _ in range(n)]}


def suited(method: str, models: Sequence[Any]) -> list[Any]:
    """As many models as the method merges: the last of them, or the last again."""
    least, most = METHODS[method].models
    return [*models[-(most or len(models)) :], *[models[-1]] * (least - len(models))]


def alike(method: str, ranks: tuple[int, ...]) -> tuple[int, ...]:
    """The ranks, as many as the method merges, or as many times the largest for a method that needs one rank."""
    return (max(ranks),) * len(ranks) if METHODS[method].one_rank else tuple(suited(method, ranks))


def expected(method: str, deltas: list[LowRank], **parameters: Any) -> np.ndarray:
    chosen = resolve(method, parameters, n=len(deltas), lora_rank=max(d.rank for d in deltas))
    matrices: list[Any] = [dense(delta).numpy() for delta in deltas]
    if method in ON_FACTORS:
        matrices = [(delta.up.double().numpy(), delta.down.double().numpy()) for delta in deltas]
    given = {
        name: value.numpy() if isinstance(value, Tensor) else [matrix.numpy() for matrix in value]
        for name, value in extras(method, len(deltas)).items()
    }
    return getattr(reference, method)(matrices, **given, **chosen)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize(
    "ranks",
    [(6, 6, 6), (3, 9, 1), (5,), (30, 30), (50, 50)],
    ids=["equal ranks", "unequal ranks", "one specialist", "stacked rank above in", "rank above in and out"],
)
def test_low_rank_and_dense_agree_with_the_reference(method: str, ranks: tuple[int, ...]) -> None:
    deltas = draw(alike(method, ranks))
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
    blank = LowRank(torch.zeros(OUT, 4), torch.zeros(4, IN))
    for method in METHODS:
        given = extras(method, 2)
        assert dense(merge_deltas(suited(method, [zero, zero]), method, **given)).norm() == 0
        assert dense(merge_deltas(suited(method, [empty]), method, **extras(method, 1))).norm() == 0
        for nothing, same in ((zero, zero), (empty, blank)):
            found = merge_deltas(suited(method, [real, nothing]), method, **given)
            assert relative(found, expected(method, suited(method, [real, same]))) < 2e-5


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


def law_holds(law: str, method: str, deltas: list[LowRank], **parameters: Any) -> bool:
    given: dict[str, Any] = parameters | ({"rank": K} if "rank ≤ k" in METHODS[method].laws else {})
    given |= {"epsilon": 0.5} if method in ("ram", "ramplus_tl") else {}  # a size that some entries are below
    others = extras(method, len(deltas))

    def f(updates: list[LowRank], change: Callable[[list[Tensor]], list[Tensor]] = lambda matrices: matrices) -> Tensor:
        """The merge. `change` does to what else is given (one matrix per specialist, or the base) what was done to the updates."""
        changed = {
            name: change([value])[0] if isinstance(value, Tensor) else change(value)[: len(updates)]
            for name, value in others.items()
        }
        return dense(merge_deltas(updates, method, **given, **changed))

    merged = f(deltas)
    if law == "identity at n=1":
        if METHODS[method].models[0] > 1:
            return False
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
        for index, delta in enumerate(deltas):
            g = torch.eye(delta.rank, dtype=torch.float64) + 0.3 * (index + 1)
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
    assert law_holds(law, method, draw(alike(method, (4, 6, 5)), dtype=torch.float64)) == (law in METHODS[method].laws)


VARIANTS = [
    {"balance": balance, "match": match}
    for balance in ("none", "subspace", "updates")
    for match in ("none", "norm")
    if (balance, match) != ("none", "none")
]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_ssams_variants_keep_its_laws(variant: dict[str, Any], law: str) -> None:
    deltas = uneven(draw((4, 6, 5), dtype=torch.float64))
    assert law_holds(law, "ssam", deltas, **variant) == (law in METHODS["ssam"].laws)


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


def uneven(deltas: list[LowRank]) -> list[LowRank]:
    """The first much larger than the others, so that evening out norms shows."""
    return [10 * deltas[0], *deltas[1:]]


@pytest.mark.parametrize("rank", [3, 8, 500, {"energy": 0.6}], ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("ranks", [(4, 6, 5), (6,), (30, 30), (4, 0, 5)], ids=str)
def test_ssams_variants_agree_with_the_reference(ranks: tuple[int, ...], variant: dict[str, Any], rank: Any) -> None:
    deltas = uneven(draw(ranks))
    for scale in ("auto", -0.7):
        parameters = {"rank": rank, "scale": scale, **variant}
        wanted = expected("ssam", deltas, **parameters)
        low_rank, full = merge_deltas(deltas, **parameters), merge_deltas([d.dense() for d in deltas], **parameters)
        assert relative(low_rank, wanted) < 2e-5 and relative(full, wanted) < 2e-5
        assert isinstance(low_rank, LowRank) and isinstance(full, Tensor)


def test_ssam_as_published_has_not_moved() -> None:
    merged = merge_deltas(draw((4, 6, 5), dtype=torch.float64), "ssam", rank=K)
    assert float(dense(merged).sum()) == pytest.approx(-6.043414531630588, rel=1e-11)
    assert float(dense(merged).norm()) == pytest.approx(27.798299624600805, rel=1e-12)
    assert METHODS["ssam"].parameters == {"rank": "auto", "scale": "auto", "balance": "none", "match": "none"}


def test_a_balanced_subspace_does_not_depend_on_any_updates_size() -> None:
    broad, narrow = orthogonal((4, 1))
    both = [100 * broad, narrow]
    assert (dense(merge_deltas(both, rank=1)) @ dense(narrow).T).norm() < 1e-9  # the small one is lost
    assert relative(merge_deltas(both, rank=1, scale=1.0, balance="subspace"), dense(narrow)) < 1e-9
    deltas = draw((4, 6, 5), dtype=torch.float64)
    kept = {c: merge_deltas([c * deltas[0], *deltas[1:]], rank=K, scale=1.0, balance="subspace") for c in (0.0, 1, 50)}
    only, even, large = (dense(kept[c]) for c in (0.0, 1, 50))
    assert int(torch.linalg.matrix_rank(torch.cat([even, large], 1), rtol=1e-9)) == K  # one U
    assert int(torch.linalg.matrix_rank(torch.cat([even, only], 1), rtol=1e-9)) > K


def test_balanced_updates_depend_on_the_mean_norm_only() -> None:
    deltas = draw((4, 6, 5), dtype=torch.float64)
    norms = torch.stack([dense(delta).norm() for delta in deltas])
    factors = torch.tensor([0.1, 7.0, 30.0], dtype=torch.float64)
    mixed = [float(c) * delta for c, delta in zip(factors, deltas, strict=True)]
    for match in ("none", "norm"):
        given = {"rank": K, "balance": "updates", "match": match}
        wanted = (norms * factors).mean() / norms.mean() * dense(merge_deltas(deltas, **given))
        assert relative(merge_deltas(mixed, **given), wanted) < 1e-9
        turned = merge_deltas(deltas, weights=[-2.0, 2.0, 2.0], **given)  # of a weight, the sign is left
        assert relative(turned, 2 * dense(merge_deltas([-1.0 * deltas[0], *deltas[1:]], **given))) < 1e-9
    even = [(1 / float(norm)) * delta for norm, delta in zip(norms, deltas, strict=True)]
    for balance in ("subspace", "updates"):  # nothing to balance
        assert relative(merge_deltas(even, rank=K, balance=balance), dense(merge_deltas(even, rank=K))) < 1e-9


@pytest.mark.parametrize("balance", ["none", "subspace", "updates"])
def test_norm_matching_gives_the_mean_norm(balance: str) -> None:
    deltas = uneven(draw((4, 6, 5), dtype=torch.float64))
    mean = sum(float(dense(delta).norm()) for delta in deltas) / 3
    given: dict[str, Any] = {"balance": balance, "match": "norm"}
    assert resolve("ssam", given, n=3, lora_rank=6)["scale"] == 1
    for rank, scale in ((1, 1.0), (K, 0.25), (500, -2.0), ({"energy": 0.5}, 1.0)):
        merged = dense(merge_deltas(deltas, rank=rank, scale=scale, **given))
        assert float(merged.norm()) == pytest.approx(abs(scale) * mean, rel=1e-9)
        plain = dense(merge_deltas(deltas, rank=rank, scale=scale, balance=balance))
        assert float((merged * plain).sum()) == pytest.approx(float(merged.norm() * plain.norm()), rel=1e-9)
    assert relative(merge_deltas(deltas[:1], **given), dense(deltas[0])) < 1e-9  # one specialist, k = its rank
    assert relative(merge_deltas(deltas[:1] * 3, **given), dense(deltas[0])) < 1e-9
    assert dense(merge_deltas(deltas, scale=0.0, **given)).norm() == 0


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_ssams_variants_of_zero_updates(variant: dict[str, Any]) -> None:
    first, second = uneven(draw((4, 4)))
    empty, untrained = LowRank(torch.zeros(OUT, 0), torch.zeros(0, IN)), 0.0 * second
    for zeros in ([untrained], [untrained, untrained], [empty], [empty, untrained]):
        assert dense(merge_deltas(zeros, **variant)).norm() == 0
        assert dense(merge_deltas([zero.dense() for zero in zeros], **variant)).norm() == 0
        mixed = merge_deltas([first, second, *zeros], scale=1.0, **variant)  # they do not count in the mean norm
        assert relative(mixed, dense(merge_deltas([first, second], scale=1.0, **variant))) < 2e-5
    opposed = [first, second, -1.0 * first, LowRank(second.up, -second.down)]
    for deltas in (opposed, [delta.dense() for delta in opposed]):
        assert dense(merge_deltas(deltas, **variant)).norm() <= 1e-5 * dense(first).norm()  # rounding is not blown up


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
    given, deltas = extras(method, 2), suited(method, [first, second])
    with pytest.raises(MethodError, match="NaN or infinite"):
        merge_deltas(deltas, method, **given)
    with pytest.raises(MethodError, match="NaN or infinite"):
        merge_deltas([delta.dense() for delta in deltas], method, **given)


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


# What the papers and the algebra promise of single methods.


def orthogonal(ranks: tuple[int, ...], seed: int = 0) -> list[LowRank]:
    """Updates whose rows and columns are orthogonal to those of all others."""
    generator = torch.Generator().manual_seed(seed)
    sides = [
        torch.linalg.qr(torch.randn(size, sum(ranks), generator=generator, dtype=torch.float64))[0]
        for size in (OUT, IN)
    ]
    values = torch.rand(sum(ranks), generator=generator, dtype=torch.float64) + 0.5
    parts = zip(*(side.split(ranks, 1) for side in (sides[0] * values, sides[1])), strict=True)
    return [LowRank(up, down.T) for up, down in parts]


def test_linear_is_between_the_base_and_the_mean_of_the_donors() -> None:
    first, second = draw((4, 4), dtype=torch.float64)
    assert relative(merge_deltas([first], "linear", alpha=0.1), 0.1 * dense(first)) < 1e-12
    assert relative(merge_deltas([first] * 3, "linear", alpha=0.1), 0.1 * dense(first)) < 1e-12
    assert dense(merge_deltas([first, second], "linear", alpha=0.0)).norm() == 0
    assert relative(merge_deltas([first, second], "linear", alpha=1.0), (dense(first) + dense(second)) / 2) < 1e-12
    with pytest.raises(RecipeError, match=r"alpha: 1\.5 is out of range; it must be less than or equal to 1"):
        merge_deltas([first], "linear", alpha=1.5)


def test_tsv_has_the_updates_singular_values() -> None:
    deltas = draw((4, 6, 5), dtype=torch.float64)
    for components, kept in (("auto", (4, 6, 5)), (2, (2, 2, 2))):
        found = torch.linalg.svdvals(dense(merge_deltas(deltas, "tsv", rank=components)))[: sum(kept)]
        wanted = torch.cat([torch.linalg.svdvals(dense(d))[:k] for d, k in zip(deltas, kept, strict=True)])
        assert torch.allclose(found, wanted.sort(descending=True).values, rtol=1e-9)


@pytest.mark.parametrize("method", ["tsv", "wudi"])
def test_orthogonal_updates_are_summed(method: str) -> None:
    deltas = orthogonal((4, 6, 5))
    assert relative(merge_deltas(deltas, method), sum(dense(delta) for delta in deltas)) < 1e-9


@pytest.mark.parametrize("method", ["tsv", "wudi", "iso_c", "iso_cts", "swudi"])
def test_copies_are_defined(method: str) -> None:
    """Singular vectors and modes then coincide; the answer may not hang on how rounding breaks the tie."""
    (delta,) = draw((5,))
    for copies in ([delta] * 3, [delta, 1.3 * delta, 0.1 * delta]):
        wanted = expected(method, copies)
        assert relative(merge_deltas(copies, method), wanted) < 2e-5
        assert relative(merge_deltas([copy.dense() for copy in copies], method), wanted) < 2e-5
    if method in ("tsv", "wudi"):  # as the average, not the sum
        assert relative(merge_deltas([delta] * 3, method), dense(delta)) < 1e-6


def test_iso_flattens_the_spectrum() -> None:
    deltas = draw((4, 6, 5), dtype=torch.float64)
    total = torch.linalg.svdvals(sum(dense(delta) for delta in deltas)).sum()
    for method in ("iso_c", "iso_cts"):
        values = torch.linalg.svdvals(dense(merge_deltas(deltas, method, mean_over="support")))
        assert torch.allclose(values[:15], values[0], rtol=1e-9) and values[15] < 1e-9 * values[0]
        ratio = dense(merge_deltas(deltas, method, mean_over="all")) * IN / 15
        assert relative(ratio, dense(merge_deltas(deltas, method, mean_over="support"))) < 1e-9
    nuclear = torch.linalg.svdvals(dense(merge_deltas(deltas, "iso_c", mean_over="support"))).sum()
    assert torch.isclose(nuclear, total, rtol=1e-9)
    assert (
        relative(merge_deltas(deltas, "iso_cts", common=1.0), dense(merge_deltas(deltas, "iso_c"))) < 1e-9
    )  # the common space is then all of Iso-C's


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("tsv", {"rank": 2}),
        ("iso_c", {"mean_over": "support"}),
        ("iso_cts", {"mean_over": "support", "common": 0.3}),
        ("iso_cts", {"common": 0.0}),
        ("wudi", {"solver": "adam", "lr": 1e-2, "iterations": 40}),
        ("swudi", {"time": 4.0, "keep": 0.2}),
        ("swudi", {"time": 0.5, "keep": 1.0}),
        ("swudi", {"variant": "aswudi"}),
        ("optmerge", {"lr": 0.03, "momentum": 0.5, "iterations": 25}),
        ("optmerge", {"variant": "full"}),
        ("optmerge", {"variant": "full", "lr": 1e-2, "iterations": 40}),
        ("slerp", {"t": 0.9}),
        ("nuslerp", {"origin": "zero"}),
        ("nuslerp", {"nuslerp_flatten": False}),
        ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
        ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True, "origin": "zero"}),
        ("multislerp", {"origin": "zero"}),
        ("multislerp", {"normalize_weights": False}),
        ("karcher", {"max_iter": 1}),
        ("karcher", {"tol": 0.2}),
        ("nearswap", {"t": 3.0}),
        ("nearswap", {"t": 0}),
        ("model_stock", {"filter_wise": True}),
        ("dc_merge", {"rank": 3, "smoothing": "linear", "density": 0.05}),
        ("dc_merge", {"smoothing": "linear", "rho": 1.5, "density": 0.05, "scale": 0.7}),
        ("dc_merge", {"smoothing": "none", "density": 0.2}),
        ("factorwise", {"mode": "mean"}),
        ("factorwise", {"mode": "ties", "adapter_scale": 0.5}),
        ("factorwise", {"mode": "ties", "density": 1.0}),
        ("factorwise", {"mode": "tsv"}),
        ("factorwise", {"mode": "wudi"}),
        ("factorwise", {"mode": "optmerge", "adapter_scale": 1.0, "scale": 0.3}),
    ],
    ids=str,
)
@pytest.mark.parametrize("ranks", [(8, 8, 8), (8,), (30, 30)], ids=str)
def test_other_parameters_agree_with_the_reference(
    method: str, parameters: dict[str, Any], ranks: tuple[int, ...]
) -> None:
    deltas = draw(alike(method, ranks))
    wanted = expected(method, deltas, **parameters)
    given = parameters | extras(method, len(deltas))
    assert relative(merge_deltas(deltas, method, **given), wanted) < 2e-5
    if not METHODS[method].one_rank:
        found = merge_deltas([delta.dense() for delta in deltas], method, **given)
        assert isinstance(found, Tensor) and relative(found, wanted) < 2e-5


def interference(x: Tensor, deltas: list[LowRank]) -> float:
    """WUDI's loss, written out."""
    matrices = [dense(delta) for delta in deltas]
    return sum(float(((x - d) @ d.T).square().sum() / d.square().sum()) for d in matrices)


def test_wudi_minimises_the_interference() -> None:
    deltas = draw((4, 6, 5), dtype=torch.float64)
    total = sum(dense(delta) for delta in deltas)
    exact = dense(merge_deltas(deltas, "wudi"))
    least = interference(exact, deltas)
    assert least < 0.9 * interference(total, deltas)
    for seed in range(5):
        step = torch.randn(OUT, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert interference(exact + 1e-3 * step, deltas) > least
    losses = [
        interference(dense(merge_deltas(deltas, "wudi", solver="adam", lr=1e-3, iterations=n)), deltas)
        for n in (1, 10, 100)
    ]
    assert interference(total, deltas) > losses[0] > losses[1] > losses[2] > least
    long = merge_deltas(deltas, "swudi", time=1e9, keep=1.0)
    assert relative(long, exact) < 1e-9


def test_one_specialist_is_left_alone_by_adam() -> None:
    (delta,) = draw((6,))
    for method, parameters in (("wudi", {"solver": "adam"}), ("optmerge", {"variant": "full", "scale": 1.0})):
        found = merge_deltas([delta], method, **parameters)
        assert isinstance(found, Tensor) and torch.equal(found, delta.dense())


def test_the_curvatures_trace_is_the_number_of_updates() -> None:
    deltas = [dense(delta) for delta in draw((4, 6, 5), dtype=torch.float64)]
    for updates, trace in ((deltas, 3), ([*deltas, 0 * deltas[0]], 3), ([0 * deltas[0]], 0)):
        problem = Interference(sum(updates), updates, updates, updates)
        assert math.isclose(float(problem.curvature.trace()), trace, rel_tol=1e-12)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40)], ids=["tall", "wide"])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_descents_are_torchs(shape: tuple[int, int], kind: str) -> None:
    """The closed form and the Gram trick against torch.optim on the loss itself."""
    deltas = [dense(delta) for delta in draw((3, 4), dtype=torch.float64, shape=shape)]
    k = min(shape) // 2
    truncated = [torch.as_tensor(reference.best(d.numpy(), k)) for d in deltas]
    mean = (deltas[0] + deltas[1]) / 2
    if kind == "sgd":
        x, targets = mean.clone(), truncated
        given: dict[str, Any] = {"lr": 0.01, "momentum": 0.9}
        optimizer: torch.optim.Optimizer = torch.optim.SGD([x.requires_grad_()], **given)
    else:
        x = deltas[0] + deltas[1]
        targets = [mean + torch.as_tensor(reference.best((d - mean).numpy(), k)) for d in deltas]
        given = {"lr": 0.01}
        optimizer = torch.optim.Adam([x.requires_grad_()], **given)
    for _ in range(30):
        optimizer.zero_grad()
        loss = sum(
            ((x - g) @ p.T).square().sum() / d.square().sum()
            for g, p, d in zip(targets, truncated, deltas, strict=True)
        )
        assert isinstance(loss, Tensor)
        loss.backward()
        optimizer.step()
    variant = {"sgd": "lora", "adam": "full"}[kind]
    found = merge_deltas(deltas, "optmerge", variant=variant, iterations=30, scale=1.0, **given)
    assert relative(found, x.detach()) < 1e-9


def test_optmerge_does_300_iterations_at_once() -> None:
    deltas = draw((6, 6, 6), dtype=torch.float64)
    assert relative(merge_deltas(deltas, "optmerge"), expected("optmerge", deltas)) < 1e-12
    assert relative(merge_deltas(deltas, "optmerge", lr=0.1), expected("optmerge", deltas, lr=0.1)) < 1e-10
    assert resolve("optmerge", {}, n=3, lora_rank=6)["scale"] == 1
    assert resolve("optmerge", {"variant": "full"}, n=3, lora_rank=6)["scale"] == 0.1
    with pytest.raises(MethodError, match=r"lr 5 makes the descent diverge .* take less than"):
        merge_deltas(deltas, "optmerge", lr=5.0)


def test_factorwise_refuses() -> None:
    first, second, third = draw((3, 3, 4))
    with pytest.raises(MethodError, match="needs LoRA updates of one rank, but these have 3, 4"):
        merge_deltas([first, third], "factorwise")
    for deltas in ([first.dense()], [first, second.dense()]):
        with pytest.raises(MethodError, match="a full matrix has none"):
            merge_deltas(deltas, "factorwise")
    second.down[0, 0] = math.nan
    for mode in ("ties", "tsv", "wudi", "optmerge"):
        with pytest.raises(MethodError, match="NaN or infinite"):
            merge_deltas([first, second], "factorwise", mode=mode)


def test_factorwise_depends_on_the_adapters_scale_only_beyond_sums() -> None:
    deltas = draw((4, 4), dtype=torch.float64)

    def change(mode: str) -> float:
        two, one = (merge_deltas(deltas, "factorwise", mode=mode, adapter_scale=s) for s in (2.0, 1.0))
        return relative(two, dense(one))

    assert change("sum") < 1e-12 and change("mean") < 1e-12 and change("ties") > 1e-3

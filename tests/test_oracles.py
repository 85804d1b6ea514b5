"""Agreement with other implementations on the same tensors. Every intended difference is a test of its own."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from mergekit.merge_methods.api import merge_state_dicts
from peft import LoraConfig, get_peft_model
from peft.utils import merge_utils
from test_methods import dense, draw, relative
from torch import Tensor

from modalloy import LowRank, merge_deltas
from modalloy.errors import MethodError
from modalloy.methods.dare import drop
from modalloy.methods.della import prune

ROWS, COLUMNS = 60, 44
DENSITY = 0.2  # of 60 · 44 entries a whole number: they truncate it, we round it


@pytest.fixture
def base() -> Tensor:
    return torch.randn(ROWS, COLUMNS, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def deltas() -> list[Tensor]:
    return [dense(delta) for delta in draw((4, 6, 5), shape=(ROWS, COLUMNS))]


def mergekit(method: str, base: Tensor, deltas: list[Tensor], **parameters: Any) -> Tensor:
    """What mergekit adds to the base. `normalize` is its division by the weights, which are 1 here."""
    models = {"base": {"w": base}} | {f"model{i}": {"w": base + delta} for i, delta in enumerate(deltas)}
    given = {name: value for name, value in {"weight": 1.0, **parameters}.items() if value is not None}
    merged = merge_state_dicts(models, method, base="base", parameters=given)
    return merged["w"] - base


@pytest.fixture
def our_masks(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, int], None]:
    """Makes torch.bernoulli, from which both peers draw their masks, give ours for specialists 0, 1, 2, … in turn."""

    def use(density: float, seed: int) -> None:
        specialists: Iterator[int] = iter(range(100))

        def bernoulli(probabilities: Tensor, **_: Any) -> Tensor:
            assert float(probabilities.min()) == float(probabilities.max()) == pytest.approx(density)
            mask = drop(torch.ones_like(probabilities), density, seed, next(specialists), "w") != 0
            return mask.to(probabilities.dtype)

        monkeypatch.setattr(torch, "bernoulli", bernoulli)

    return use


# mergekit


@pytest.mark.parametrize(("combine", "normalize"), [("mean", True), ("sum", False)])
def test_ties_is_mergekits(base: Tensor, deltas: list[Tensor], combine: str, normalize: bool) -> None:
    theirs = mergekit("ties", base, deltas, density=DENSITY, normalize=normalize)
    assert relative(merge_deltas(deltas, "ties", density=DENSITY, combine=combine), theirs) < 1e-12


def test_entries_that_cancel_are_positive_in_mergekit_and_follow_the_majority_here() -> None:
    deltas = [torch.tensor([[5.0, -1.0, -2.0]]), torch.tensor([[-5.0, -1.0, -2.0]])]
    theirs = mergekit("ties", torch.zeros(1, 3), deltas, density=1.0, normalize=True)
    assert theirs.tolist() == [[5.0, -1.0, -2.0]]
    assert merge_deltas(deltas, "ties", density=1.0).tolist() == [[-5.0, -1.0, -2.0]]


def test_mergekit_truncates_the_number_of_entries_kept_where_we_round() -> None:
    (delta,) = draw((1,), shape=(3, 3))
    for density, theirs, ours in ((0.5, 4, 4), (0.53, 4, 5), (0.01, 1, 1)):
        kept = mergekit("ties", torch.zeros(3, 3), [delta.dense()], density=density)
        assert int((kept != 0).sum()) == theirs
        assert int((dense(merge_deltas([delta], "ties", density=density)) != 0).sum()) == ours


def test_task_arithmetic_is_mergekits(base: Tensor, deltas: list[Tensor]) -> None:
    theirs = mergekit("task_arithmetic", base, deltas, **{"lambda": 0.7, "normalize": False})
    assert relative(merge_deltas(deltas, "task_arithmetic", scale=0.7), theirs) < 1e-12


def test_dare_is_mergekits_given_the_masks_and_the_scale(
    base: Tensor, deltas: list[Tensor], our_masks: Callable[[float, int], None]
) -> None:
    """mergekit rescales what is left to the L1 norm of the update, or not at all; the paper by 1 / density."""
    our_masks(0.8, 42)
    theirs = mergekit("dare_linear", base, deltas, density=0.8, rescale=False, normalize=False)
    assert relative(merge_deltas(deltas, "dare_linear", density=0.8, seed=42, scale=0.8, slot="w"), theirs) < 1e-6


def test_dare_ties_is_mergekits_when_nothing_is_trimmed(
    base: Tensor, deltas: list[Tensor], our_masks: Callable[[float, int], None]
) -> None:
    """mergekit's dare_ties elects signs of the dropped updates without trimming them."""
    our_masks(0.8, 42)
    theirs = mergekit("dare_ties", base, deltas, density=0.8, rescale=False, normalize=True)
    ours = merge_deltas(deltas, "dare_ties", density=0.8, seed=42, trim_density=1.0, scale=0.8, slot="w")
    assert relative(ours, theirs) < 1e-6


def on_weights(method: str, base: Tensor | None, models: list[Tensor], start: Tensor, **parameters: Any) -> Tensor:
    """What mergekit makes of the models, less `start`; without `base`, they have none."""
    given = {"base": {"w": base}} if base is not None else {}
    given |= {f"model{i}": {"w": model} for i, model in enumerate(models)}
    name = None if base is None else "base"
    return merge_state_dicts(given, method, base=name, parameters=parameters)["w"] - start


def unweighted(method: str, base: Tensor, deltas: list[Tensor], **parameters: Any) -> Tensor:
    """What mergekit adds to the base by a method that takes no weights."""
    return on_weights(method, base, [base + delta for delta in deltas], base, **parameters)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("size", [1.0, 1e-3], ids=["an angle", "nearly parallel"])
def test_slerp_is_mergekits(base: Tensor, deltas: list[Tensor], t: float, size: float) -> None:
    update = size * deltas[0]
    theirs = unweighted("slerp", base, [update], t=t)
    assert (dense(merge_deltas([update], "slerp", t=t, base=base)) - theirs).norm() < 1e-12 * base.norm()
    chord = (theirs - t * update).norm() < 1e-12 * base.norm()
    assert chord == (size < 1 or t in (0.0, 1.0))


def test_slerp_between_opposite_weights_is_mergekits(base: Tensor) -> None:
    theirs = unweighted("slerp", base, [-3 * base], t=0.25)
    assert relative(merge_deltas([-3 * base], "slerp", t=0.25, base=base), theirs) < 1e-12


@pytest.mark.parametrize("with_base", [True, False], ids=["updates", "weights"])
@pytest.mark.parametrize(("flatten", "row_wise"), [(True, False), (True, True), (False, False), (False, True)])
def test_nuslerp_is_mergekits(
    base: Tensor, deltas: list[Tensor], with_base: bool, flatten: bool, row_wise: bool
) -> None:
    options = {"nuslerp_flatten": flatten, "nuslerp_row_wise": row_wise}
    models = [base + delta for delta in deltas[:2]]
    theirs = on_weights("nuslerp", base if with_base else None, models, base, weight=[0.3, 0.9], **options)
    origin = "base" if with_base else "zero"
    ours = merge_deltas(deltas[:2], "nuslerp", weights=[0.3, 0.9], origin=origin, base=base, **options)
    assert relative(ours, theirs) < 1e-12


def test_nuslerp_of_opposite_updates_is_on_their_line_here_and_anywhere_in_mergekit(base: Tensor) -> None:
    """Where the angle is π but for rounding, mergekit goes over the side where the rounding is, made as long as the updates."""
    (update,) = (dense(delta) for delta in draw((4,), shape=(ROWS, COLUMNS)))
    opposite = -update * (1 + 1e-7 * torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)).double())
    theirs = on_weights("nuslerp", base, [base + update, base + opposite], base, weight=[1.0, 0.5])
    ours = merge_deltas([update, opposite], "nuslerp", weights=[1.0, 0.5])
    line = (2 * update + opposite) / 3
    assert relative(ours, line) < 1e-6 and relative(theirs, line) > 1


def test_weights_that_sum_to_0_are_the_middle_in_mergekit_and_refused_here(base: Tensor, deltas: list[Tensor]) -> None:
    models = [base + delta for delta in deltas[:2]]
    theirs = on_weights("nuslerp", base, models, base, weight=[1.0, -1.0])
    assert relative(merge_deltas(deltas[:2], "nuslerp"), theirs) < 1e-12
    for method in ("nuslerp", "multislerp"):
        with pytest.raises(MethodError, match="the weights sum to 0"):
            merge_deltas(deltas[:2], method, weights=[1.0, -1.0])


@pytest.mark.parametrize("with_base", [True, False], ids=["updates", "weights"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_multislerp_is_mergekits(base: Tensor, deltas: list[Tensor], with_base: bool, normalize: bool, n: int) -> None:
    """To ε/‖D‖: mergekit adds ε to every length, here it is the least."""
    models, weights = [base + delta for delta in deltas[:n]], [0.5, 2.0, 1.1][:n]
    theirs = on_weights(
        "multislerp", base if with_base else None, models, base, weight=weights, normalize_weights=normalize
    )
    ours = merge_deltas(
        deltas[:n],
        "multislerp",
        weights=weights,
        normalize_weights=normalize,
        origin="base" if with_base else "zero",
        base=base,
    )
    assert relative(ours, theirs) < 1e-9


def test_opposite_directions_are_mergekits_and_more_that_cancel_are_refused_by_both(base: Tensor) -> None:
    (update,) = (dense(delta) for delta in draw((4,), shape=(ROWS, COLUMNS)))
    pair = [update, -3 * update]
    theirs = on_weights("multislerp", torch.zeros_like(base), pair, torch.zeros_like(base), weight=1.0)
    assert relative(merge_deltas(pair, "multislerp"), theirs) < 1e-12
    four = [*pair, 2 * update, -update]
    with pytest.raises(ValueError, match="zero"):
        on_weights("multislerp", torch.zeros_like(base), four, torch.zeros_like(base), weight=1.0)
    with pytest.raises(MethodError, match="cancel"):
        merge_deltas(four, "multislerp")


@pytest.mark.parametrize("options", [{}, {"max_iter": 1}, {"tol": 0.1}], ids=str)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_karcher_is_mergekits(base: Tensor, deltas: list[Tensor], options: dict[str, Any], n: int) -> None:
    models = [base + delta for delta in deltas[:n]]
    theirs = on_weights("karcher", None, models, base, **options)
    assert relative(merge_deltas(deltas[:n], "karcher", base=base, **options), theirs) < 1e-12
    both = on_weights("karcher", base, models, base, **options)  # the base counts to mergekit, once it is there
    assert relative(merge_deltas([0 * base, *deltas[:n]], "karcher", base=base, **options), both) < 1e-12


@pytest.mark.parametrize("t", [0.0, 0.3, 2.0, 100.0])
def test_nearswap_is_mergekits(base: Tensor, deltas: list[Tensor], t: float) -> None:
    theirs = unweighted("nearswap", base, deltas[:1], t=t)
    assert (dense(merge_deltas(deltas[:1], "nearswap", t=t)) - theirs).norm() < 1e-12 * base.norm()


def test_mergekit_shortens_nearswaps_of_less_than_a_millionth() -> None:
    """It divides by at least 1e-6, so that where t is less, what is nearer than that moves less than t."""
    update, nothing = torch.tensor([[4e-7, 1e-7]], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    assert unweighted("nearswap", nothing, [update], t=2e-7)[0].tolist() == pytest.approx([0.8e-7, 0.2e-7])
    assert merge_deltas([update], "nearswap", t=2e-7)[0].tolist() == [2e-7, 1e-7]


@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_arcee_fusion_is_mergekits(base: Tensor, deltas: list[Tensor], size: float) -> None:
    update = size * deltas[0]
    theirs = unweighted("arcee_fusion", base, [update])
    ours = dense(merge_deltas([update], "arcee_fusion", base=base))
    assert (ours - theirs).norm() < 1e-12 * base.norm() and 0 < int((ours != 0).sum()) < 0.2 * ours.numel()


def test_quartiles_of_large_weights_are_mergekits_on_a_sample_and_exact_here() -> None:
    """Of more than a million entries mergekit sorts a million that it draws, so that two merges are not the same."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1100, 1000, generator=generator)
    update = 0.1 * torch.randn(1100, 1000, generator=generator)
    theirs = [int((unweighted("arcee_fusion", base, [update]) != 0).sum()) for _ in range(2)]
    ours = [dense(merge_deltas([update], "arcee_fusion", base=base)) for _ in range(2)]
    assert torch.equal(ours[0], ours[1]) and theirs[0] != theirs[1]
    assert int((ours[0] != 0).sum()) == pytest.approx(theirs[0], rel=0.01)


@pytest.mark.parametrize("filter_wise", [False, True])
@pytest.mark.parametrize("n", [2, 3])
def test_model_stock_is_mergekits(base: Tensor, deltas: list[Tensor], filter_wise: bool, n: int) -> None:
    alike = [delta + 2 * deltas[0] for delta in deltas[:n]]
    theirs = unweighted("model_stock", base, alike, filter_wise=filter_wise)
    assert relative(merge_deltas(alike, "model_stock", filter_wise=filter_wise), theirs) < 1e-12


def test_small_updates_have_no_angle_in_mergekit_and_theirs_here(base: Tensor, deltas: list[Tensor]) -> None:
    """It divides by at least 1e-6, so that the share falls with the size of small updates; the paper's does not."""
    alike = [1e-5 / float(delta.norm()) * (delta + 2 * deltas[0]) for delta in deltas[:2]]
    large = merge_deltas([1e6 * delta for delta in alike], "model_stock")
    assert relative(merge_deltas(alike, "model_stock"), dense(1e-6 * large)) < 1e-12
    assert unweighted("model_stock", base, alike).norm() < 0.01 * dense(1e-6 * large).norm()


@pytest.fixture
def our_della_masks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes torch.bernoulli give the masks of these updates, where they are drawn with DELLA's probabilities."""

    def use(deltas: list[Tensor], density: float, epsilon: float) -> None:
        specialists: Iterator[tuple[int, Tensor]] = iter(enumerate(deltas))

        def bernoulli(probabilities: Tensor, **_: Any) -> Tensor:
            index, delta = next(specialists)
            ranks = delta.abs().argsort(1).argsort(1) / (COLUMNS - 1)
            torch.testing.assert_close(probabilities.double(), density - epsilon + 2 * epsilon * ranks.double())
            return (prune(delta, density, epsilon, "none", 42, index, "w") != 0).to(probabilities.dtype)

        monkeypatch.setattr(torch, "bernoulli", bernoulli)

    return use


@pytest.mark.parametrize(
    ("method", "theirs", "ours"),
    [
        ("della_linear", {}, {}),  # rescale: true and normalize: false are its defaults
        ("della_linear", {"rescale": False, "lambda": 0.7}, {"rescale": "none", "scale": 0.7}),
        ("della_linear", {"normalize": True}, {"scale": 1 / 3}),
        ("della", {}, {}),  # rescale: true and normalize: true
        ("della", {"rescale": False, "normalize": False}, {"rescale": "none", "combine": "sum"}),
    ],
    ids=str,
)
def test_della_is_mergekits_given_the_masks(
    base: Tensor,
    deltas: list[Tensor],
    our_della_masks: Callable[..., None],
    method: str,
    theirs: dict[str, Any],
    ours: dict[str, Any],
) -> None:
    given = {"density": 0.6, "epsilon": 0.2}
    our_della_masks(deltas, **given)
    wanted = mergekit(method, base, deltas, **given, **theirs)
    assert relative(merge_deltas(deltas, method, slot="w", **given, **ours), wanted) < 1e-6  # they prune in float32


def test_della_of_one_input_is_not_a_number_in_mergekit(deltas: list[Tensor]) -> None:
    """Its ranks of a row are divided by one less than the row has; here such an entry is kept with the mean probability."""
    column = [delta[:, :1] for delta in deltas]
    with pytest.raises(RuntimeError, match="p_in >= 0"):
        mergekit("della_linear", torch.zeros_like(column[0]), column, density=0.6, epsilon=0.2)
    ours = merge_deltas(column, "della_linear", density=0.6, epsilon=0.2, rescale="probability", slot="w")
    assert torch.equal(dense(ours), dense(merge_deltas(column, "dare_linear", density=0.6, slot="w")))


@pytest.mark.parametrize(("density", "gamma"), [(0.9, 0.01), (0.2, 0.05), (0.95, 0.3), (1.0, 0.1)])
@pytest.mark.parametrize(
    ("method", "theirs", "ours"),
    [
        ("breadcrumbs", {}, {}),
        ("breadcrumbs", {"rescale": True, "lambda": 0.3}, {"rescale": "norm", "scale": 0.3}),
        ("breadcrumbs", {"normalize": True}, {"scale": 1 / 3}),
        ("breadcrumbs_ties", {}, {}),
        ("breadcrumbs_ties", {"normalize": True, "rescale": True}, {"combine": "mean", "rescale": "norm"}),
    ],
    ids=str,
)
def test_breadcrumbs_are_mergekits(
    base: Tensor,
    deltas: list[Tensor],
    method: str,
    theirs: dict[str, Any],
    ours: dict[str, Any],
    density: float,
    gamma: float,
) -> None:
    wanted = mergekit(method, base, deltas, density=density, gamma=gamma, **theirs)
    assert relative(merge_deltas(deltas, method, density=density, gamma=gamma, **ours), wanted) < 1e-12


def test_mergekit_leaves_out_one_of_equal_entries_where_we_keep_all() -> None:
    delta = torch.tensor([[5.0, 4.0, 4.0, 3.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0]])
    theirs = mergekit("breadcrumbs", torch.zeros(1, 10), [delta], density=0.5, gamma=0.2)
    assert sorted(theirs[0].abs().tolist()) == [0, 0, 0, 0, 0, 2, 2, 2, 3, 4]
    ours = merge_deltas([delta], "breadcrumbs", density=0.5, gamma=0.2)
    assert ours.tolist() == [[0, 4, 4, 3, 2, 2, 2, 0, 0, 0]]


@pytest.mark.parametrize("select_topk", [1.0, 0.5, 0.1])
def test_sce_is_mergekits(base: Tensor, deltas: list[Tensor], select_topk: float) -> None:
    theirs = mergekit("sce", base, deltas, select_topk=select_topk, weight=None)
    assert relative(merge_deltas(deltas, "sce", select_topk=select_topk), theirs) < 1e-12


def test_sce_weighs_small_updates_alike_in_mergekit_and_by_their_squares_here(deltas: list[Tensor]) -> None:
    """It takes a sum of mean squares below 1e-6 for zero, which those of LoRAs often are; sizes do not count here."""
    zero, small = (
        torch.zeros_like(deltas[0]),
        [1e-5 * size * delta for size, delta in zip((1, 2, 4), deltas, strict=True)],
    )
    theirs = mergekit("sce", zero, small, weight=None)
    alike = merge_deltas(small, "ties", density=1.0)  # the mean of the entries that agree
    assert relative(alike, theirs) < 1e-9
    ours = dense(merge_deltas(small, "sce"))
    assert relative(ours, theirs) > 0.1
    assert relative(1e5 * ours, merge_deltas([1e5 * delta for delta in small], "sce")) < 1e-12


def test_entries_that_cancel_are_positive_in_mergekits_sce_and_left_out_here() -> None:
    deltas = [torch.tensor([[5.0, -1.0]]), torch.tensor([[-5.0, -1.0]])]
    assert mergekit("sce", torch.zeros(1, 2), deltas, weight=None).tolist() == [[5.0, -1.0]]
    assert merge_deltas(deltas, "sce").tolist() == [[0.0, -1.0]]


@pytest.mark.parametrize("epsilon", [1e-5, 0.5, 2.0])
def test_ram_is_mergekits(base: Tensor, deltas: list[Tensor], epsilon: float) -> None:
    theirs = mergekit("ram", base, deltas, epsilon=epsilon, weight=None)
    assert relative(merge_deltas(deltas, "ram", epsilon=epsilon), theirs) < 1e-12
    for r, alpha in ((0.1, 0.2), (0.5, 100.0)):
        theirs = mergekit("ramplus_tl", base, deltas, epsilon=epsilon, r=r, alpha=alpha, weight=None)
        assert relative(merge_deltas(deltas, "ramplus_tl", epsilon=epsilon, r=r, alpha=alpha), theirs) < 1e-6


# PEFT: its functions on full matrices. On adapters it merges the factors, which is another operation.

ONES = torch.ones(3, dtype=torch.float64)


def test_ties_is_pefts(deltas: list[Tensor]) -> None:
    theirs = merge_utils.ties(deltas, ONES, DENSITY)
    assert relative(merge_deltas(deltas, "ties", density=DENSITY), theirs) < 1e-14


def test_weights_come_before_the_election_here_and_after_it_in_peft(deltas: list[Tensor]) -> None:
    weights = [2.0, 0.1, 1.0]
    theirs = merge_utils.ties(deltas, torch.tensor(weights, dtype=torch.float64), DENSITY)
    ours = merge_deltas(deltas, "ties", weights=weights, density=DENSITY)
    assert relative(ours, theirs) > 0.1
    weighted = [weight * delta for weight, delta in zip(weights, deltas, strict=True)]
    assert relative(ours, merge_utils.ties(weighted, ONES, DENSITY)) < 1e-14


def test_task_arithmetic_is_pefts(deltas: list[Tensor]) -> None:
    weights = [0.5, 2.0, -1.0]
    theirs = merge_utils.task_arithmetic(deltas, torch.tensor(weights, dtype=torch.float64))
    assert relative(merge_deltas(deltas, "task_arithmetic", weights=weights), theirs) < 1e-14


def test_trimming_is_pefts_magnitude_prune(deltas: list[Tensor]) -> None:
    """Of one specialist TIES is the trimming; PEFT sums trimmed updates without an election."""
    trimmed = [dense(merge_deltas([delta], "ties", density=DENSITY)) for delta in deltas]
    theirs = merge_utils.magnitude_prune(deltas, ONES, DENSITY)
    assert relative(torch.stack(trimmed).sum(0), theirs) < 1e-14


def test_dare_is_pefts_given_the_masks(deltas: list[Tensor], our_masks: Callable[[float, int], None]) -> None:
    our_masks(0.3, 7)
    theirs = merge_utils.dare_linear(deltas, ONES, 0.3)
    assert relative(merge_deltas(deltas, "dare_linear", density=0.3, seed=7, slot="w"), theirs) < 1e-14
    our_masks(0.3, 7)
    theirs = merge_utils.dare_ties(deltas, ONES, 0.3)  # without trimming
    ours = merge_deltas(deltas, "dare_ties", density=0.3, seed=7, trim_density=1.0, slot="w")
    assert relative(ours, theirs) < 1e-14


@pytest.mark.parametrize("alpha", [4, 8], ids=lambda alpha: f"alpha {alpha}")
def test_task_arithmetic_cut_to_a_rank_is_pefts_svd_merge(alpha: int) -> None:
    rank, names = 4, ["first", "second"]
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(COLUMNS, ROWS, bias=False)), config, names[0])
    model.add_adapter(names[1], config)
    layer = model.base_model.model[0]
    factors = [(layer.lora_B[name].weight.detach(), layer.lora_A[name].weight.detach()) for name in names]
    deltas = [alpha / rank * LowRank(up, down) for up, down in factors]
    model.add_weighted_adapter(names, [0.7, 1.5], "merged", combination_type="svd", svd_rank=rank)
    theirs = layer.get_delta_weight("merged").detach()
    merged = dense(merge_deltas(deltas, "task_arithmetic", weights=[0.7, 1.5]))
    U, S, V = torch.linalg.svd(merged)
    assert relative(theirs, U[:, :rank] @ S[:rank].diag() @ V[:rank]) < 1e-5

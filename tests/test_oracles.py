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

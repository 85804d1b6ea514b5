"""Methods that drop entries by size or by chance: DELLA, Breadcrumbs, SCE, RAM; what they promise beyond the laws."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import SLOTS
from safetensors.torch import load_file
from test_method_properties import matrices, merged_twice, numpy, text_updates
from test_methods import dense, draw, relative
from torch import Tensor

import modalloy
from modalloy import merge_deltas
from modalloy.errors import RecipeError
from modalloy.linalg import BLOCK_ENTRIES
from modalloy.methods.dare import TILE_ROWS, drop
from modalloy.methods.della import prune, ranks_of


def of(method: str, deltas: list[Tensor], **parameters: Any) -> Tensor:
    return dense(merge_deltas(deltas, method, **parameters))


# What is asked for agrees with the reference


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("della_linear", {"density": 0.3, "epsilon": 0.2, "rescale": "probability", "seed": 7}),
        ("della_linear", {"density": 1.0, "epsilon": 0.9}),
        ("della", {"density": 0.5, "epsilon": 0.0, "rescale": "none", "combine": "sum", "scale": 0.3}),
        ("della", {"rescale": "probability", "combine": "max"}),
        ("breadcrumbs", {"density": 0.3, "gamma": 0.2, "scale": -0.7}),
        ("breadcrumbs", {"density": 0.97, "gamma": 0.5, "rescale": "norm"}),
        ("breadcrumbs", {"density": 1.0, "gamma": 0.5}),
        ("breadcrumbs", {"density": 0.001, "gamma": 0.9}),
        ("breadcrumbs_ties", {"density": 0.4, "gamma": 0.1, "rescale": "norm", "combine": "mean"}),
        ("breadcrumbs_ties", {"density": 0.4, "gamma": 0.0, "combine": "max", "scale": 0.3}),
        ("sce", {"select_topk": 0.1}),
        ("sce", {"select_topk": 0.0001, "scale": 0.3}),
        ("ram", {"epsilon": 0.7, "scale": 0.3}),
        ("ram", {"epsilon": 0.0}),
        ("ramplus_tl", {"epsilon": 1.2, "r": 0.5, "alpha": 3.0}),
        ("ramplus_tl", {"epsilon": 2.0}),
    ],
    ids=str,
)
@pytest.mark.parametrize("n", [1, 2, 4], ids="{} specialists".format)
def test_parameters_agree_with_the_reference(method: str, parameters: dict[str, Any], n: int) -> None:
    deltas = matrices(2 * TILE_ROWS + 3, 21, n=n)
    given = DEFAULTS[method] | parameters
    assert relative(of(method, deltas, **parameters), getattr(reference, method)(numpy(deltas), **given)) < 1e-12


DEFAULTS: dict[str, dict[str, Any]] = {
    "della_linear": {"density": 0.8, "epsilon": 0.15, "rescale": "norm", "seed": 42, "scale": 1.0},
    "della": {"density": 0.8, "epsilon": 0.15, "rescale": "norm", "seed": 42, "combine": "mean", "scale": 1.0},
    "breadcrumbs": {"density": 0.9, "gamma": 0.01, "rescale": "none", "scale": 1.0},
    "breadcrumbs_ties": {"density": 0.9, "gamma": 0.01, "rescale": "none", "combine": "sum", "scale": 1.0},
    "sce": {"select_topk": 1.0, "scale": 1.0},
    "ram": {"epsilon": 1e-5, "scale": 1.0},
    "ramplus_tl": {"r": 0.1, "alpha": 0.2, "epsilon": 1e-5, "scale": 1.0},
}


@pytest.mark.parametrize("method", DEFAULTS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1), (0, 4), (3, 0)], ids=str)
def test_tiny_tensors(method: str, shape: tuple[int, int]) -> None:
    deltas = matrices(*shape, n=2, dtype=torch.float32)
    merged = of(method, deltas)
    assert merged.shape == shape
    assert relative(merged, getattr(reference, method)(numpy(deltas), **DEFAULTS[method])) < 1e-6


@pytest.mark.parametrize("method", DEFAULTS)
def test_blocks_of_rows_do_not_show(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    deltas = matrices(300, 17)
    whole = of(method, deltas)
    monkeypatch.setattr("modalloy.linalg.BLOCK_ENTRIES", 50)
    assert BLOCK_ENTRIES > 300 * 17
    assert relative(of(method, deltas), whole) < 1e-14


# DELLA


def test_della_without_epsilon_is_dare() -> None:
    deltas = matrices(200, 30)
    given = {"density": 0.4, "seed": 5, "slot": "w"}
    found = of("della_linear", deltas, epsilon=0.0, rescale="probability", **given)
    assert relative(found, of("dare_linear", deltas, **given)) < 1e-15
    left = prune(deltas[1], 0.4, 0.0, "none", 5, 1, "w")
    assert torch.equal(left != 0, drop(deltas[1], 0.4, 5, 1, "w") != 0)


def test_ranks_are_those_of_a_row_and_ties_go_by_place() -> None:
    assert ranks_of(torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 0.5]])).tolist() == [[2, 0, 1], [1, 2, 0]]


def test_large_entries_of_a_row_are_kept_more_often() -> None:
    rows, columns = 4000, 40
    (delta,) = matrices(rows, columns, n=1)
    delta *= torch.logspace(-3, 3, rows, dtype=torch.float64)[:, None]  # a row's size does not count
    kept = (prune(delta, 0.5, 0.4, "none", 42, 0, "w") != 0).double()
    ranks = ranks_of(delta.abs())
    for rank in range(columns):
        chance = 0.1 + 0.8 * rank / (columns - 1)
        share = float(kept[ranks == rank].mean())
        assert abs(share - chance) < 5 * np.sqrt(chance * (1 - chance) / rows)


def test_della_rescales_to_the_norm_or_to_the_mean_over_seeds() -> None:
    (delta,) = matrices(20, 15, n=1)
    for seed in range(5):
        left = prune(delta, 0.3, 0.2, "norm", seed, 0, "w")
        assert float(left.abs().sum()) == pytest.approx(float(delta.abs().sum()), rel=1e-12)
    seeds, given = 400, {"density": 0.5, "epsilon": 0.3, "rescale": "probability"}
    mean = sum(of("della_linear", [delta], seed=seed, **given) for seed in range(seeds)) / seeds
    chances = 0.2 + 0.6 * ranks_of(delta.abs()) / 14
    deviation = (delta.square() * (1 - chances) / chances / seeds).sqrt()
    assert float(((mean - delta) / deviation).abs().max()) < 5


def test_della_that_drops_nothing_is_what_it_prepares() -> None:
    deltas = matrices(30, 20)
    assert relative(of("della_linear", deltas, density=1.0), sum(deltas)) < 1e-15
    assert torch.equal(of("della", deltas, density=1.0), of("ties", deltas, density=1.0))


# Breadcrumbs


def test_breadcrumbs_leave_out_both_ends() -> None:
    delta = torch.tensor([[1.0, -2.0, 3.0, -4.0, 5.0, -6.0, 7.0, -8.0, 9.0, -10.0]])
    for density, gamma, kept in ((0.5, 0.2, (4, 8)), (0.9, 0.3, (1, 9)), (0.3, 0.0, (8, 10)), (1.0, 0.3, (1, 10))):
        merged = of("breadcrumbs", [delta], density=density, gamma=gamma)
        inside = (delta.abs() >= kept[0]) & (delta.abs() <= kept[1])
        assert torch.equal(merged, (delta * inside).double()), (density, gamma)


def test_entries_equal_to_the_ends_stay() -> None:
    delta = torch.tensor([[9.0, 9.0, 2.0, -2.0, 2.0, 1.0, 1.0, 1.0, 0.0, 0.0]])
    assert of("breadcrumbs", [delta], density=0.3, gamma=0.1).tolist() == [[9.0, 9.0, 2.0, -2.0, 2.0, 0, 0, 0, 0, 0]]
    assert of("breadcrumbs", [delta], density=0.4, gamma=0.2).tolist() == [[0, 0, 2.0, -2.0, 2.0, 1, 1, 1, 0, 0]]


def test_breadcrumbs_that_leave_all_are_what_they_prepare() -> None:
    deltas = matrices(30, 20)
    assert relative(of("breadcrumbs", deltas, density=1.0), sum(deltas)) < 1e-15
    ties = of("ties", deltas, density=1.0, combine="sum")
    assert torch.equal(of("breadcrumbs_ties", deltas, density=1.0), ties)
    trimmed = of("ties", deltas, density=0.3, combine="mean")
    assert torch.equal(of("breadcrumbs_ties", deltas, density=0.3, gamma=0.0, combine="mean"), trimmed)


# SCE


def test_sce_weighs_by_squares_and_erases_the_minority() -> None:
    first, second = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[1.0, -3.0, 0.0]])
    merged = of("sce", [first, second])  # squares 5 and 10
    assert torch.allclose(merged, torch.tensor([[(2 * 5 + 1 * 10) / 15, -3.0, 0.0]], dtype=torch.float64))
    assert of("sce", [first, -first]).tolist() == [[0.0, 0.0, 0.0]]


def test_sce_selects_where_the_updates_differ() -> None:
    first, second = torch.tensor([[5.0, 1.0, 2.0, 0.0]]), torch.tensor([[5.0, 4.0, 3.0, 0.0]])
    merged = of("sce", [first, second], select_topk=0.5)
    assert torch.allclose(merged, torch.tensor([[0.0, (1 * 1 + 4 * 16) / 17, 0.0, 0.0]], dtype=torch.float64))
    for alike in ([first], [first, first], [0.1 * first] * 3):
        assert not of("sce", alike, select_topk=0.99).any()
        assert relative(of("sce", alike), alike[0]) < 1e-6


# RAM


def test_ram_averages_what_is_shared_and_keeps_what_is_not() -> None:
    first, second = torch.tensor([[4.0, 1.0, 0.0, 0.01]]), torch.tensor([[2.0, 0.0, 0.0, 3.0]])
    assert of("ram", [first, second], epsilon=0.1).tolist() == [[3.0, 1.0, 0.0, 3.0]]
    plus = of("ramplus_tl", [first, second], epsilon=0.1, r=0.5, alpha=0.4)  # one shared, one alone: ρ = 1
    assert torch.allclose(plus, torch.tensor([[3.0, 1.2, 0.0, 3.6]], dtype=torch.float64))
    for n in (1, 2, 5):
        assert relative(of("ram", [first] * n, epsilon=0.0), first) < 1e-6
    assert not of("ram", [first, second], epsilon=10.0).any()


# Parameters


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        ("della", {"density": 0.9}, r"^epsilon: 0.15 is out of range for density: 0.9; .*write epsilon below 0.1$"),
        ("della_linear", {"density": 0.1, "epsilon": 0.1}, r"density ± epsilon, .* write epsilon below 0.1$"),
        ("della", {"epsilon": -0.1}, "epsilon: -0.1 is out of range; it must be greater than or equal to 0"),
        ("della", {"rescale": "l1"}, "rescale: 'l1' is none of its values"),
        ("breadcrumbs", {"gamma": 1.0}, "gamma: 1.0 is out of range; it must be less than 1"),
        ("breadcrumbs_ties", {"density": 0.0}, "density: 0.0 is out of range"),
        ("breadcrumbs", {"epsilon": 0.1}, "method 'breadcrumbs' has no parameter 'epsilon'"),
        ("sce", {"select_topk": 0.0}, "select_topk: 0.0 is out of range"),
        ("ram", {"epsilon": -1e-5}, "epsilon: -1e-05 is out of range"),
        ("ramplus_tl", {"alpha": "x"}, "alpha: 'x' is not a finite number"),
        ("do_merging", {"iterations": 0}, "iterations: 0 is out of range"),
        ("do_merging", {"penalty": 0.0}, "penalty: 0.0 is out of range"),
        ("dc_merge", {"rho": 0.5}, "rho: 0.5 is out of range"),
        ("dc_merge", {"smoothing": "avg"}, "smoothing: 'avg' is none of its values"),
        ("dc_merge", {"density": 2.0}, "density: 2.0 is out of range"),
    ],
    ids=str,
)
def test_parameters_out_of_range_are_refused(method: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        merge_deltas(draw((3, 3)), method, **parameters)
    assert "\n" not in str(error.value)


def test_parameters_that_do_not_fit_are_refused_before_anything_is_written(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = write_recipe(merge_method="della", parameters={"density": [0.5, 0.9]}, output={"form": "full"})
    with pytest.raises(RecipeError, match=r"epsilon: 0.15 is out of range for density: 0.9"):
        modalloy.merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Whole merges


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("della", {"density": 0.6}),
        ("della_linear", {"rescale": "probability"}),
        ("breadcrumbs", {}),
        ("breadcrumbs_ties", {"gamma": 0.1}),
        ("sce", {"select_topk": 0.3}),
        ("ram", {"epsilon": 1e-3}),
        ("ramplus_tl", {"epsilon": 1e-3}),
    ],
    ids=str,
)
def test_a_merged_model_is_what_the_reference_gives(
    method: str,
    parameters: dict[str, Any],
    write_recipe: Callable[..., Path],
    specialists: dict[str, Path],
    base: Path,
    tmp_path: Path,
) -> None:
    recipe = write_recipe(merge_method=method, parameters=parameters, output={"form": "full"})
    original, merged = load_file(base / "model.safetensors"), merged_twice(recipe, tmp_path)
    updates = text_updates(specialists)
    for stem in SLOTS:
        slot = f"{stem}.weight"
        given = DEFAULTS[method] | parameters | ({"slot": slot} if method.startswith("della") else {})
        wanted = getattr(reference, method)(numpy([dense(delta) for delta in updates[stem]]), **given)
        assert relative(merged[slot].double() - original[slot].double(), wanted) < 1e-6

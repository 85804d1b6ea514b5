"""What single methods promise beyond the laws: elected signs, masks that depend on their place only, lossless bases."""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import SLOTS
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_methods import dense, draw, expected, extras, relative
from torch import Tensor

import modalloy
from modalloy import LowRank, merge_deltas
from modalloy.errors import MethodError, RecipeError
from modalloy.linalg import BLOCK_ENTRIES
from modalloy.methods import METHODS
from modalloy.methods.apply import apply, resolve, survey_model
from modalloy.methods.dare import TILE_ROWS, drop, keep_mask
from modalloy.methods.entries import magnitude_cuts
from modalloy.verify import verify


def matrices(*shape: int, n: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(n)]


def numpy(values: list[Tensor]) -> list[np.ndarray]:
    return [value.double().numpy() for value in values]


# The k-th largest magnitude


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(
        st.one_of(st.integers(-3, 3).map(float), st.floats(width=32, allow_nan=False, allow_infinity=False)),
        min_size=1,
        max_size=40,
    ),
    density=st.floats(0.01, 1.0),
    cut_at=st.integers(0, 40),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, torch.float64])] * 2),
)
def test_the_cut_is_the_kth_largest(
    values: list[float], density: float, cut_at: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    whole = torch.tensor(values, dtype=torch.float64)
    layers = [
        [part.reshape(1, -1).to(dtype)] for part, dtype in zip((whole[:cut_at], whole[cut_at:]), dtypes, strict=True)
    ]
    k = max(1, round(density * len(values)))
    assert magnitude_cuts(lambda: layers, density) == [sorted(map(abs, values), reverse=True)[k - 1]]


def test_the_cut_over_many_blocks_and_specialists() -> None:
    first, second = matrices(BLOCK_ENTRIES // 500, 1203, n=2, dtype=torch.float32)
    second *= 1e-6
    for found, matrix in zip(magnitude_cuts(lambda: [[first, second]], 0.013), (first, second), strict=True):
        assert int((matrix.abs() >= found).sum()) == round(0.013 * matrix.numel())


# TIES


@pytest.mark.parametrize("combine", ["mean", "sum", "max"])
@pytest.mark.parametrize("density", [0.05, 0.6, 1.0])
def test_ties_keeps_to_the_elected_sign(combine: str, density: float) -> None:
    deltas = matrices(40, 30, n=4)
    merged = dense(merge_deltas(deltas, "ties", density=density, combine=combine))
    assert relative(merged, reference.ties(numpy(deltas), density, combine, 1.0)) < 1e-14
    cuts = [d.abs().flatten().sort(descending=True).values[round(density * d.numel()) - 1] for d in deltas]
    trimmed = torch.stack([d * (d.abs() >= cut) for d, cut in zip(deltas, cuts, strict=True)])
    elected = trimmed.sum(0).sign()
    assert bool((elected == merged.sign()).all()) and bool((merged != 0).any())
    if combine != "sum":
        assert bool((merged.abs() <= trimmed.abs().amax(0) * (1 + 1e-15)).all())
    assert torch.equal(dense(merge_deltas([-d for d in deltas], "ties", density=density, combine=combine)), -merged)


def test_ties_of_one_specialist_is_its_largest_entries() -> None:
    (delta,) = matrices(30, 20, n=1)
    merged = dense(merge_deltas([delta], "ties", density=0.1, scale=2.0))
    assert int((merged != 0).sum()) == 60
    assert torch.equal(merged[merged != 0], 2 * delta[merged != 0])
    assert delta[merged == 0].abs().max() < delta[merged != 0].abs().min()


def test_ties_keeps_entries_that_equal_the_threshold() -> None:
    delta = torch.tensor([[3.0, -2.0, 2.0, 2.0, 1.0]])
    assert merge_deltas([delta], "ties", density=0.4).tolist() == [[3.0, -2.0, 2.0, 2.0, 0.0]]


@pytest.mark.parametrize("method", ["ties", "dare_ties", "dare_linear"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (0, 4), (3, 0)], ids=str)
def test_tiny_tensors_keep_at_least_one_entry(method: str, shape: tuple[int, int]) -> None:
    deltas = matrices(*shape, n=2, dtype=torch.float32)
    given = {"density": 0.01} if method == "ties" else {"density": 1.0}
    merged = dense(merge_deltas(deltas, method, **given))
    assert merged.shape == shape
    if merged.numel():
        assert int((merged != 0).sum()) >= 1


def test_entries_that_cancel_take_the_sign_of_most() -> None:
    first = torch.tensor([[5.0, 1.0, 2.0, -1.0]])
    second = torch.tensor([[-5.0, 1.0, 2.0, -1.0]])
    assert merge_deltas([first, second], "ties", density=1.0).tolist() == [[5.0, 1.0, 2.0, -1.0]]
    assert merge_deltas([-first, -second], "ties", density=1.0).tolist() == [[-5.0, -1.0, -2.0, 1.0]]
    balanced = [first[:, [0, 1, 3]], second[:, [0, 1, 3]]]  # no sign is that of most: the entry is dropped
    assert merge_deltas(balanced, "ties", density=1.0).tolist() == [[0.0, 1.0, -1.0]]


def over_the_model(method: str, layers: list[list[Tensor]], **parameters: Any) -> list[Tensor]:
    """Every weight of a model merged with what is counted over all of them, in reverse order."""
    chosen = resolve(method, parameters, n=len(layers[0]), lora_rank=None)
    slots = [f"layer.{index}" for index in range(len(layers))]
    whole = survey_model(method, lambda: zip(slots, [list(layer) for layer in layers], strict=True), chosen)
    jobs = list(zip(slots, layers, strict=True))[::-1]
    return [
        dense(apply(method, list(deltas), chosen, tuple(deltas[0].shape), slot=slot, whole=whole))
        for slot, deltas in jobs
    ][::-1]


def three_layers() -> list[list[Tensor]]:
    """Layers of different size and scale; the first has an entry that cancels, and fewer positive signs than the rest."""
    layers = [matrices(6, 5, seed=1), [0.3 * d for d in matrices(20, 8, seed=2)], matrices(7, 9, seed=3)]
    layers[0] = [-d.abs() for d in layers[0]]
    layers[1] = [d.abs() for d in layers[1]]
    layers[0][0][0, 0], layers[0][1][0, 0], layers[0][2][0, 0] = 9.0, -9.0, 0.0
    return layers


def test_global_ties_is_ties_of_the_flattened_model() -> None:
    layers = three_layers()
    merged = over_the_model("ties", layers, threshold="global", density=0.3)
    wanted = reference.ties_model([numpy(layer) for layer in layers], 0.3, "mean", 1.0)
    for found, right in zip(merged, wanted, strict=True):
        assert relative(found, right) < 1e-14
    assert merged[0][0, 0] == 9.0 and over_the_model("ties", layers, density=0.3)[0][0, 0] == -9.0
    assert relative(over_the_model("ties", layers, density=0.3)[1], wanted[1]) > 0.1


def test_global_dare_ties_trims_what_dare_leaves() -> None:
    layers = three_layers()
    merged = over_the_model("dare_ties", layers, threshold="global", trim_density=0.3, density=0.7, seed=5)
    left = [reference.dare(numpy(layer), 0.7, 5, f"layer.{index}") for index, layer in enumerate(layers)]
    for found, right in zip(merged, reference.ties_model(left, 0.3, "mean", 1.0), strict=True):
        assert relative(found, right) < 1e-14


# DARE

GOLDEN_MASK = "5bc20ecdfd56e600619369ba966a2092ef1528153a11a5d8248ed83e4cdb1106"


def test_masks_are_those_of_the_reference_in_any_order_and_thread() -> None:
    shape, tiles = (3 * TILE_ROWS + 5, 11), 4
    wanted = reference.dare_mask(shape, 0.3, 9, 1, "a.weight")
    with ThreadPoolExecutor(4) as pool:
        jobs = {
            tile: pool.submit(keep_mask, (min(TILE_ROWS, shape[0] - tile * TILE_ROWS), 11), 0.3, 9, 1, "a.weight", tile)
            for tile in reversed(range(tiles))
        }
        parts = [jobs[tile].result() for tile in range(tiles)]
    assert np.array_equal(np.concatenate(parts), wanted)
    assert np.array_equal(keep_mask((TILE_ROWS, 11), 0.3, 9, 1, "a.weight", 2), wanted[2 * TILE_ROWS : 3 * TILE_ROWS])
    assert torch.equal(drop(torch.ones(shape), 0.3, 9, 1, "a.weight") != 0, torch.from_numpy(wanted))


def test_masks_are_the_same_everywhere() -> None:
    """The bits themselves: another NumPy or byte order must not give another merge."""
    mask = keep_mask((128, 64), 0.5, 42, 0, "model.layers.0.mlp.up_proj.weight", 0)
    assert hashlib.sha256(np.packbits(mask).tobytes()).hexdigest() == GOLDEN_MASK


def test_masks_differ_by_seed_specialist_slot_and_tile() -> None:
    shape = (TILE_ROWS, 40)
    places = [(1, 0, "a", 0), (2, 0, "a", 0), (1, 1, "a", 0), (1, 0, "b", 0), (1, 0, "a", 1)]
    masks = [keep_mask(shape, 0.5, *place) for place in places]
    n = masks[0].size
    for index, first in enumerate(masks):
        for second in masks[:index]:
            assert abs(int((first == second).sum()) - n / 2) < 5 * np.sqrt(n / 4)


@pytest.mark.parametrize("density", [0.01, 0.3, 0.8])
def test_the_share_that_is_kept(density: float) -> None:
    n = 2 * TILE_ROWS * 500
    (delta,) = matrices(2 * TILE_ROWS, 500, n=1)
    left = drop(delta, density, 42, 0, "w")
    assert abs(int((left != 0).sum()) - density * n) < 5 * np.sqrt(n * density * (1 - density))
    assert torch.equal(left[left != 0], (delta / density)[left != 0])


def test_the_mean_over_seeds_is_the_sum_of_the_updates() -> None:
    deltas, seeds, density = matrices(20, 15, n=2), 200, 0.5
    mean = sum(dense(merge_deltas(deltas, "dare_linear", density=density, seed=seed)) for seed in range(seeds)) / seeds
    deviation = (sum(d.square() for d in deltas) * (1 - density) / density / seeds).sqrt()
    assert float(((mean - sum(deltas)) / deviation).abs().max()) < 5


def test_dare_that_drops_nothing_is_what_it_prepares() -> None:
    deltas = matrices(30, 20)
    assert relative(merge_deltas(deltas, "dare_linear", density=1.0), sum(deltas)) < 1e-15
    found = merge_deltas(deltas, "dare_ties", density=1.0, trim_density=0.3)
    assert torch.equal(dense(found), dense(merge_deltas(deltas, "ties", density=0.3)))


def test_slots_have_their_own_masks() -> None:
    deltas = matrices(30, 20)
    first, again, other = (merge_deltas(deltas, "dare_linear", slot=slot) for slot in ("a", "a", "b"))
    assert torch.equal(dense(first), dense(again)) and not torch.equal(dense(first), dense(other))


# Consensus


def test_an_entry_that_all_share_survives_below_one_over_the_others() -> None:
    delta = torch.ones(2, 3)
    for n in (2, 3, 4):
        for mask_scale, kept in ((0.999 / (n - 1), n), (1.001 / (n - 1), 0)):
            assert bool((merge_deltas([delta] * n, "consensus", mask_scale=mask_scale) == kept).all())


def test_consensus_removes_selfish_entries() -> None:
    first, second = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 3.0]])
    assert merge_deltas([first, second], "consensus").tolist() == [[0.0, 2.0, 0.0]]
    assert merge_deltas([first, second], "consensus", agreement=1).tolist() == [[2.0, 2.0, 3.0]]
    assert merge_deltas([first], "consensus", agreement=1).tolist() == first.tolist()
    for nothing in (merge_deltas([first], "consensus"), merge_deltas([first, second], "consensus", agreement=3)):
        assert not nothing.any()


def test_consensus_keeps_less_for_larger_parameters() -> None:
    deltas = matrices(40, 30, n=4)
    kept = [
        [dense(merge_deltas(deltas, "consensus", mask_scale=m, agreement=k)) != 0 for m in (0.1, 0.4, 0.8)]
        for k in (1, 2, 3)
    ]
    for k in range(3):
        for m in range(3):
            assert m == 2 or bool((kept[k][m + 1] <= kept[k][m]).all())
            assert k == 2 or bool((kept[k + 1][m] <= kept[k][m]).all())
    assert kept[0][0].sum() > kept[1][1].sum() > kept[2][2].sum() > 0


# Fisher


def test_fisher_stays_between_the_updates_and_averages_where_nothing_is_known() -> None:
    deltas, fishers = matrices(40, 30), extras("fisher", 3, (40, 30))["fishers"]
    merged = dense(merge_deltas(deltas, "fisher", fishers=fishers))
    stacked = torch.stack(deltas)
    assert bool((merged <= stacked.amax(0) + 1e-15).all()) and bool((merged >= stacked.amin(0) - 1e-15).all())
    unknown = torch.stack(fishers).amax(0) == 0
    assert 0 < int(unknown.sum()) < unknown.numel()
    torch.testing.assert_close(merged[unknown], stacked.mean(0)[unknown], rtol=1e-14, atol=1e-15)
    same = merge_deltas(deltas, "fisher", fishers=[fishers[0]] * 3)
    assert relative(same, stacked.mean(0)) < 1e-14
    known = (fishers[0] > 0.1) & (fishers[1] == 0) & (fishers[2] == 0)
    assert bool(known.any())
    torch.testing.assert_close(merged[known], deltas[0][known], rtol=1e-4, atol=1e-4)


def test_the_size_of_a_fisher_matrix_counts_unless_it_is_normalised() -> None:
    deltas = matrices(40, 30)
    fishers = [f.clamp(min=1e-3) for f in extras("fisher", 3, (40, 30))["fishers"]]
    louder = [1000 * fishers[0], *fishers[1:]]
    for normalize, same in (("none", False), ("l2", True)):
        found, wanted = (
            dense(merge_deltas(deltas, "fisher", fishers=f, normalize=normalize)) for f in (louder, fishers)
        )
        assert (relative(found, wanted) < 1e-12) == same
    found = merge_deltas(deltas, "fisher", fishers=fishers, normalize="l2", floor=0.5, scale=0.7)
    assert relative(found, reference.fisher(numpy(deltas), numpy(fishers), 0.5, "l2", 0.7)) < 1e-14


@pytest.mark.parametrize(
    ("fishers", "message"),
    [
        (None, "give one per specialist"),
        ([torch.ones(4, 3)], "give one per specialist"),
        ([torch.ones(4, 3), torch.ones(3, 4)], "Fisher matrix 1 is"),
        ([torch.ones(4, 3), -torch.ones(4, 3)], "negative"),
    ],
    ids=["none", "too few", "shape", "negative"],
)
def test_wrong_fisher_matrices_are_refused(fishers: list[Tensor] | None, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        merge_deltas(matrices(4, 3, n=2), "fisher", fishers=fishers)


# KnOTS and Core Space


def test_knots_coordinates_lose_nothing() -> None:
    (delta,) = draw((7,), dtype=torch.float64)
    assert relative(merge_deltas([delta], "knots", density=1.0), dense(delta)) < 1e-12
    agreeing = [c * delta for c in (0.5, 1.0, 3.0)]  # equal signs in every coordinate, so that nothing is dropped
    for updates in (agreeing, [dense(d) for d in agreeing]):
        assert relative(merge_deltas(updates, "knots", density=1.0, combine="sum"), 4.5 * dense(delta)) < 1e-12


def test_knots_does_not_depend_on_the_size_of_the_updates() -> None:
    deltas = draw((4, 6), dtype=torch.float64)
    small = merge_deltas([1e-9 * d for d in deltas], "knots")
    assert isinstance(small, LowRank) and small.rank == 10
    assert relative(small, 1e-9 * dense(merge_deltas(deltas, "knots"))) < 1e-9


def test_knots_ignores_the_rounding_noise_of_dense_updates() -> None:
    deltas = draw((4, 6))
    full = merge_deltas([d.dense() for d in deltas], "knots")
    assert relative(full, dense(merge_deltas(deltas, "knots"))) < 2e-5
    assert int((torch.linalg.svdvals(dense(full)) > 1e-5).sum()) == 10


def test_core_space_with_a_linear_method_is_that_method() -> None:
    deltas = draw((3, 9, 5), dtype=torch.float64)
    found = merge_deltas(deltas, "core_space", inner="task_arithmetic", scale=0.3)
    assert isinstance(found, LowRank) and found.rank == 17
    assert relative(found, 0.3 * sum(dense(d) for d in deltas)) < 1e-12


@pytest.mark.parametrize("combine", ["mean", "sum", "max"])
def test_core_space_and_knots_pass_their_parameters_on(combine: str) -> None:
    deltas = draw((3, 9, 5), dtype=torch.float64)
    for method in ("core_space", "knots"):
        given: list[Any] = [dense(d).numpy() for d in deltas]
        others = {}
        if method == "core_space":
            given, others = [(d.up.numpy(), d.down.numpy()) for d in deltas], {"inner": "ties"}
        wanted = getattr(reference, method)(given, **others, density=0.35, combine=combine, scale=0.8)
        assert relative(merge_deltas(deltas, method, density=0.35, combine=combine, scale=0.8), wanted) < 1e-9


def test_core_space_with_factors_that_span_1e4_in_opposite_order() -> None:
    scales = torch.logspace(0, 4, 8, dtype=torch.float64)
    (plain,) = draw((8,), dtype=torch.float64)
    delta = LowRank(plain.up * scales, plain.down * scales.flip(0)[:, None])
    assert relative(merge_deltas([delta, plain], "core_space", inner="task_arithmetic"), dense(delta + plain)) < 1e-9


# Parameters


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        ("ties", {"density": 0.0}, "density: 0.0 is out of range; it must be greater than 0"),
        ("ties", {"density": 1.5}, "density: 1.5 is out of range; it must be less than or equal to 1"),
        ("ties", {"threshold": "globl"}, "did you mean 'global'"),
        ("ties", {"combine": "median"}, "combine: 'median' is none of its values"),
        ("dare_linear", {"seed": -1}, "seed: -1 is out of range"),
        ("dare_ties", {"trim": 0.2}, "no parameter 'trim'; did you mean 'trim_density'"),
        ("consensus", {"agreement": 0}, "agreement: 0 is out of range"),
        ("consensus", {"mask_scale": -0.1}, "mask_scale: -0.1 is out of range"),
        ("fisher", {"floor": 0.0}, "floor: 0.0 is out of range; it must be greater than 0"),
        ("core_space", {"inner": "tis"}, "did you mean 'ties'"),
        ("slerp", {"t": 1.5}, "t: 1.5 is out of range; it must be less than or equal to 1"),
        ("nearswap", {"t": -1}, "t: -1 is out of range"),
        ("nuslerp", {"nuslerp_flatten": 1}, "nuslerp_flatten: 1 is neither true nor false"),
        ("nuslerp", {"origin": "null"}, "origin: 'null' is none of its values"),
        ("multislerp", {"eps": 0.0}, "eps: 0.0 is out of range; it must be greater than 0"),
        ("karcher", {"max_iter": 0}, "max_iter: 0 is out of range"),
        ("karcher", {"tol": -1e-5}, "tol: -1e-05 is out of range"),
        ("model_stock", {"filter_wise": "yes"}, "filter_wise: 'yes' is neither true nor false"),
        ("arcee_fusion", {"t": 0.5}, "method 'arcee_fusion' has no parameter 't'"),
    ],
    ids=str,
)
def test_parameters_out_of_range_are_refused(method: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        merge_deltas(draw((3, 3)), method, **parameters)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_parameter_is_documented(method: str) -> None:
    entry = METHODS[method]
    assert entry.documentation.keys() == entry.parameters.keys() and all(entry.documentation.values())


# Methods that work on the weights themselves


@pytest.mark.parametrize("method", ["slerp", "karcher", "arcee_fusion", "nuslerp", "multislerp"])
def test_a_base_that_is_missing_or_of_another_shape_is_refused(method: str) -> None:
    deltas = matrices(4, 3, n=METHODS[method].models[0])
    chosen = {"origin": "zero"} if method in ("nuslerp", "multislerp") else {}
    with pytest.raises(
        MethodError, match=rf"'{method}' works on the weights themselves: give the base's \(4, 3\) as base="
    ):
        merge_deltas(deltas, method, **chosen)
    with pytest.raises(MethodError, match=r"the base's weight is \(3, 4\), the updates are \(4, 3\)"):
        merge_deltas(deltas, method, base=torch.ones(3, 4), **chosen)
    with pytest.raises(MethodError, match="NaN or infinite"):
        merge_deltas(deltas, method, base=torch.full((4, 3), float("nan")), **chosen)


@pytest.mark.parametrize(
    ("method", "n", "message"),
    [
        ("slerp", 2, "slerp merges exactly 1 model beside the base, but 2 count"),
        ("nearswap", 3, "nearswap merges exactly 1 model beside the base, but 3 count"),
        ("arcee_fusion", 2, "arcee_fusion merges exactly 1 model"),
        ("nuslerp", 1, "nuslerp merges exactly 2 models beside the base, but 1 counts"),
        ("nuslerp", 3, "nuslerp merges exactly 2 models"),
        ("model_stock", 1, "model_stock merges at least 2 models beside the base, but 1 counts"),
    ],
)
def test_another_number_of_models_is_refused(method: str, n: int, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        merge_deltas(matrices(4, 3, n=n), method, base=torch.ones(4, 3))


def test_slerp_goes_from_the_base_to_the_model_at_lengths_between() -> None:
    base, model = matrices(40, 30, n=2)
    found = [base + dense(merge_deltas([model - base], "slerp", t=t, base=base)) for t in (0.0, 0.25, 0.5, 1.0)]
    assert torch.equal(found[0], base) and relative(found[3], model) < 1e-14
    total = torch.acos((base * model).sum() / base.norm() / model.norm())
    of_one_length = model / model.norm() * base.norm()
    for t in (0.25, 0.5):
        point = base + dense(merge_deltas([of_one_length - base], "slerp", t=t, base=base))
        assert float(point.norm()) == pytest.approx(float(base.norm()), rel=1e-12)
        assert float(torch.acos((base * point).sum() / base.norm() ** 2)) == pytest.approx(t * float(total), rel=1e-12)


def test_karcher_of_two_is_the_middle_of_their_arc_and_the_pulls_of_more_cancel() -> None:
    base, one, two, three = matrices(40, 30, n=4)
    points = [base + 0.5 * one, base + 0.8 * two, base - 0.7 * three]
    middle = base + dense(merge_deltas([p - base for p in points[:2]], "karcher", base=base))
    halves = [p / p.norm() for p in points[:2]]
    direction = (halves[0] + halves[1]) / (halves[0] + halves[1]).norm()
    assert relative(middle, (points[0].norm() + points[1].norm()) / 2 * direction) < 1e-12
    mean = base + dense(merge_deltas([p - base for p in points], "karcher", base=base, tol=1e-10, max_iter=100))
    unit = mean / mean.norm()
    pulls = []
    for point in points:
        theta = torch.acos((unit * point).sum() / point.norm())
        pulls.append(theta / theta.sin() * (point / point.norm() - theta.cos() * unit))
    assert float(sum(pulls).norm()) < 1e-8 < 0.1 < float(pulls[0].norm())
    assert float(mean.norm()) == pytest.approx(sum(float(p.norm()) for p in points) / 3, rel=1e-12)


def test_nearswap_moves_no_entry_by_more_than_t() -> None:
    (delta,) = matrices(40, 30, n=1)
    moved = dense(merge_deltas([delta], "nearswap", t=0.5))
    near = delta.abs() <= 0.5
    assert torch.equal(moved[near], delta[near]) and bool((moved[~near].abs() == 0.5).all())
    assert bool((moved.sign() == delta.sign()).all()) and 0 < int(near.sum()) < near.numel()


def test_arcee_fusion_takes_the_entries_of_rows_that_diverge() -> None:
    base, change = matrices(40, 30, n=2)
    change[:25] *= 1e-3
    taken = dense(merge_deltas([change], "arcee_fusion", base=base))
    assert not taken[:25].any() and taken.any() and torch.equal(taken[taken != 0], change[taken != 0])


def test_model_stocks_share_is_that_of_the_paper() -> None:
    """Of updates of one length and one angle between any two, t = n cos θ/(1 + (n − 1) cos θ) is nearest to the centre."""
    shared, *own = matrices(40, 30, n=4)
    basis = torch.linalg.qr(torch.stack([shared, *own]).reshape(4, -1).T).Q.T.reshape(4, 40, 30)
    deltas = [
        basis[0] + 2 * one for one in basis[1:]
    ]  # cos θ = 1/5 of any two: t = 3/7, which is the shared part's share
    merged = dense(merge_deltas(deltas, "model_stock"))
    assert relative(merged, (3 / 7) * sum(deltas) / 3) < 1e-12
    assert relative(merge_deltas(deltas[:1] * 3, "model_stock"), deltas[0]) < 1e-12
    assert dense(merge_deltas([deltas[0], -deltas[0]], "model_stock")).norm() == 0


def test_nuslerps_vectors_are_rows_or_columns() -> None:
    base, one, two = matrices(40, 30, n=3)
    rows = [merge_deltas([one[i : i + 1], two[i : i + 1]], "nuslerp", weights=[2.0, 1.0]) for i in range(40)]
    found = merge_deltas([one, two], "nuslerp", weights=[2.0, 1.0], nuslerp_flatten=False)
    assert relative(found, torch.cat(rows)) < 1e-12
    turned = {"nuslerp_flatten": False, "nuslerp_row_wise": True, "origin": "zero"}
    found = merge_deltas([one, two], "nuslerp", base=base, **turned)
    wanted = merge_deltas([one.T, two.T], "nuslerp", base=base.T, nuslerp_flatten=False, origin="zero")
    assert relative(found, dense(wanted).T) < 1e-12


def test_a_weight_on_one_side_only_is_that_model() -> None:
    deltas = draw((4, 6), dtype=torch.float64)
    for method in ("nuslerp", "multislerp"):
        for side, weights in enumerate(([2.0, 0.0], [0.0, 0.7])):
            found = merge_deltas(deltas, method, weights=weights)
            assert isinstance(found, LowRank) and relative(found, dense(deltas[side])) < 1e-12


# Whole merges


def text_updates(specialists: dict[str, Path]) -> dict[str, list[LowRank]]:
    """The updates of every linear weight of the tiny specialists, in float64."""
    files = [load_file(path / "adapter_model.safetensors") for path in specialists.values()]
    return {
        stem: [
            LowRank(2 * f[f"{stem}.lora_B.default.weight"].double(), f[f"{stem}.lora_A.default.weight"].double())
            for f in files
        ]
        for stem in SLOTS
    }


def after_dare(layers: list[list[np.ndarray]]) -> list[list[np.ndarray]]:
    return [reference.dare(layer, 0.8, 42, f"{stem}.weight") for stem, layer in zip(SLOTS, layers, strict=True)]


def merged_twice(recipe: Path, folder: Path) -> dict[str, Tensor]:
    """The weights of a full merge, the same bytes by one worker and by three, and verified as a whole."""
    for jobs in (1, 3):
        modalloy.merge(recipe, folder / f"jobs{jobs}", jobs=jobs)
    weights = [folder / f"jobs{jobs}" / "model.safetensors" for jobs in (1, 3)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert verify(folder / "jobs1").share == 1
    return load_file(weights[0])


@pytest.mark.parametrize(
    ("method", "parameters", "wanted"),
    [
        ("metagpt", {"scale": 0.5}, lambda layers: reference.metagpt_model(layers, 0.5)),
        ("ties", {}, lambda layers: [reference.ties(layer, 0.2, "mean", 1.0) for layer in layers]),
        (
            "ties",
            {"threshold": "global", "density": 0.3},
            lambda layers: reference.ties_model(layers, 0.3, "mean", 1.0),
        ),
        ("dare_linear", {}, lambda layers: [np.sum(layer, axis=0) for layer in after_dare(layers)]),
        (
            "dare_ties",
            {"threshold": "global", "trim_density": 0.3},
            lambda layers: reference.ties_model(after_dare(layers), 0.3, "mean", 1.0),
        ),
        ("consensus", {}, lambda layers: [reference.consensus(layer, 2, 0.4, 1.0) for layer in layers]),
    ],
    ids=["metagpt", "ties", "global ties", "dare_linear", "global dare_ties", "consensus"],
)
def test_a_merged_model_is_what_the_reference_gives(
    method: str,
    parameters: dict[str, Any],
    wanted: Callable[[list[list[np.ndarray]]], list[np.ndarray]],
    write_recipe: Callable[..., Path],
    specialists: dict[str, Path],
    base: Path,
    tmp_path: Path,
) -> None:
    recipe = write_recipe(merge_method=method, parameters=parameters, output={"form": "full"})
    original, merged = load_file(base / "model.safetensors"), merged_twice(recipe, tmp_path)
    layers = [numpy([dense(delta) for delta in deltas]) for deltas in text_updates(specialists).values()]
    for stem, right in zip(SLOTS, wanted(layers), strict=True):
        assert relative(merged[f"{stem}.weight"].double() - original[f"{stem}.weight"].double(), right) < 1e-6


@pytest.mark.parametrize("method", ["knots", "core_space"])
def test_low_rank_results_fit_an_adapter(
    method: str, write_recipe: Callable[..., Path], specialists: dict[str, Path], tmp_path: Path
) -> None:
    modalloy.merge(write_recipe(merge_method=method), tmp_path / "out")
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for stem, deltas in text_updates(specialists).items():
        up, down = (written[f"base_model.model.{stem}.lora_{side}.weight"].double() for side in "BA")
        assert relative(LowRank(up, down), expected(method, deltas)) < 2e-5


def test_fisher_matrices_are_read_from_files(
    write_recipe: Callable[..., Path], specialists: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    models, fishers = [], []
    for seed, (modality, path) in enumerate(specialists.items()):
        (tmp_path / modality).mkdir()
        file = tmp_path / modality / "fisher.safetensors"
        fishers.append({f"{stem}.weight": matrices(*SLOTS[stem], n=1, seed=seed)[0].square() for stem in SLOTS})
        save_file(fishers[-1], file)
        models.append({"model": str(path), "modality": modality, "parameters": {"fisher": str(file)}})
    recipe = write_recipe(models=models, merge_method="fisher", output={"form": "full"})
    modalloy.merge(recipe, tmp_path / "out")
    original, merged = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    for stem, deltas in text_updates(specialists).items():
        slot = f"{stem}.weight"
        given = numpy([fisher[slot] for fisher in fishers])
        wanted = reference.fisher(numpy([dense(delta) for delta in deltas]), given, 1e-6, "none", 1.0)
        assert relative(merged[slot].double() - original[slot].double(), wanted) < 1e-6

"""Methods that merge directions apart from sizes: DO-Merging and DC-Merge; what they promise beyond the laws."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_method_properties import text_updates
from test_methods import dense, draw, expected, orthogonal, relative
from torch import Tensor

import modalloy
from modalloy import LowRank, merge_deltas
from modalloy.errors import MethodError, RecipeError
from modalloy.methods.dc_merge import smoothed
from modalloy.methods.do_merging import orthogonalized
from modalloy.verify import verify

# DO-Merging


@pytest.mark.parametrize(
    "parameters", [{}, {"iterations": 7, "penalty": 0.1}, {"penalty": 30.0, "scale": -0.7}, {"iterations": 1}], ids=str
)
@pytest.mark.parametrize("ranks", [(4, 6, 5), (6,), (30, 30), (4, 0, 5)], ids=str)
def test_do_merging_agrees_with_the_reference(ranks: tuple[int, ...], parameters: dict[str, Any]) -> None:
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        deltas = draw(ranks, dtype=dtype)
        merged = merge_deltas(deltas, "do_merging", **parameters)
        assert isinstance(merged, LowRank) and merged.rank == sum(ranks)
        assert relative(merged, expected("do_merging", deltas, **parameters)) < tolerance


def loss(factors: list[Tensor], start: list[Tensor], penalty: float) -> float:
    """What the descent lowers, at the scale of the first factors' rows."""
    size = float(torch.cat(start).square().sum(1).mean())
    overlap = sum(float((one @ other.T).square().sum()) for one in factors for other in factors if one is not other)
    moved = sum(float((one - old).square().sum()) for one, old in zip(factors, start, strict=True))
    return overlap / size**2 + penalty * moved / size


@pytest.mark.parametrize("penalty", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("kind", ["random", "copies", "uneven"])
def test_every_step_of_the_descent_lowers_the_loss(kind: str, penalty: float) -> None:
    start = [delta.down for delta in draw((4, 6, 5), dtype=torch.float64)]
    if kind == "copies":
        start = [start[0], 1.1 * start[0], start[0].flip(0)]
    if kind == "uneven":
        start = [100 * start[0], start[1], 0.01 * start[2]]
    losses = [loss(start, start, penalty)]
    losses += [loss(orthogonalized(start, steps, penalty), start, penalty) for steps in (1, 2, 3, 5, 10, 50, 100, 300)]
    assert losses[1] < losses[0] and all(after <= before * (1 + 1e-12) for before, after in pairwise(losses))


def test_a_large_penalty_leaves_the_factors_and_a_small_one_parts_them() -> None:
    start = [delta.down for delta in draw((4, 6), dtype=torch.float64)]
    held = orthogonalized(start, 1000, 1e6)
    assert all(relative(one, old) < 1e-4 for one, old in zip(held, start, strict=True))
    parted = orthogonalized(start, 5000, 1e-6)

    def angle(factors: list[Tensor]) -> float:
        bases = [torch.linalg.qr(one.T)[0] for one in factors]
        return float((bases[0].T @ bases[1]).norm())

    assert angle(parted) < 1e-3 < 0.1 < angle(start)


def test_orthogonal_loras_of_one_size_are_averaged() -> None:
    deltas = orthogonal((4, 6, 5))
    magnitudes = [dense(delta).norm(dim=0) for delta in deltas]
    mean = sum(magnitudes) / 3
    wanted = sum(dense(delta) / size for delta, size in zip(deltas, magnitudes, strict=True)) * mean / 3
    assert relative(merge_deltas(deltas, "do_merging"), wanted) < 1e-9


def test_a_large_lora_does_not_turn_the_direction() -> None:
    """The merged direction depends on an update's size only through the orthogonalisation, off here."""
    first, second = draw((4, 4), dtype=torch.float64)
    given: dict[str, Any] = {"penalty": 1e9}
    even, uneven = (dense(merge_deltas([size * first, second], "do_merging", **given)) for size in (1.0, 50.0))
    cosines = torch.nn.functional.cosine_similarity(even, uneven, dim=0)
    assert float(cosines.min()) > 1 - 1e-9
    assert float((uneven.norm(dim=0) / even.norm(dim=0)).min()) > 5


def test_columns_without_an_update_are_left() -> None:
    first, second = draw((4, 4), dtype=torch.float64)
    first.down[:, 3] = 0
    second.down[:, 3] = 0
    second.down[:, 5] = 0
    merged = dense(merge_deltas([first, second], "do_merging", penalty=1e9))
    assert not merged[:, 3].any() and bool(torch.isfinite(merged).all())
    assert relative(merged[:, 5:6], dense(first)[:, 5:6] / 4) < 1e-6  # half the magnitude, half the direction


def test_do_merging_refuses_full_matrices() -> None:
    first, second = draw((3, 3))
    for deltas in ([first.dense()], [first, second.dense()]):
        with pytest.raises(MethodError, match=r"a full matrix has none; use another method, for example tsv"):
            merge_deltas(deltas, "do_merging")


# DC-Merge


def test_smoothing_keeps_the_sum() -> None:
    values = torch.tensor([8.0, 4.0, 3.0, 1.0], dtype=torch.float64)
    assert smoothed(values, "none", 5.0) is values
    assert torch.equal(smoothed(values, "mean", 5.0), torch.full((4,), 4.0, dtype=torch.float64))
    for rho, ratio in ((5.0, 5.0), (100.0, 8.0), (1.0, 1.0)):
        found = smoothed(values, "linear", rho)
        assert float(found.sum()) == pytest.approx(16) and float(found[0] / found[-1]) == pytest.approx(ratio)
        assert torch.allclose(found.diff(), found.diff()[0])


def test_orthogonal_updates_are_flattened_and_summed() -> None:
    deltas = orthogonal((4, 6, 5))
    flat = torch.zeros_like(dense(deltas[0]))
    for delta in deltas:
        u, s, vh = torch.linalg.svd(dense(delta), full_matrices=False)
        flat += s.sum() / delta.rank * u[:, : delta.rank] @ vh[: delta.rank]
    assert relative(merge_deltas(deltas, "dc_merge"), flat) < 1e-9
    found = merge_deltas(deltas, "dc_merge", smoothing="none", density=1.0)
    assert relative(found, sum(dense(delta) for delta in deltas)) < 1e-9


def test_dc_merge_in_the_authors_own_setting() -> None:
    """Eight LoRAs of rank 16: "auto" keeps the 16 entries that their 0.001 of 128² truncates to."""
    deltas = draw((16,) * 8, dtype=torch.float64, shape=(200, 180))
    assert int(0.001 * 128**2) == 16
    wanted = expected("dc_merge", deltas, density=16 / 128**2)
    assert relative(merge_deltas(deltas, "dc_merge"), wanted) < 1e-9


@pytest.mark.parametrize("ranks", [(6, 6), (16, 16, 16), (2, 9)], ids=str)
def test_every_update_keeps_as_many_entries_as_directions(ranks: tuple[int, ...]) -> None:
    deltas = draw(ranks, dtype=torch.float64)
    merged = dense(merge_deltas(deltas, "dc_merge"))
    assert int(torch.linalg.matrix_rank(merged)) >= max(ranks) // 2
    thin = dense(merge_deltas(deltas, "dc_merge", density=0.001))
    assert int(torch.linalg.matrix_rank(thin)) <= len(ranks) * max(1, round(0.001 * sum(ranks) ** 2))


# Whole merges


@pytest.mark.parametrize("form", ["adapter", "full"])
@pytest.mark.parametrize(
    ("method", "parameters"),
    [("do_merging", {"iterations": 20}), ("dc_merge", {}), ("dc_merge", {"smoothing": "linear"})],
    ids=str,
)
def test_a_merge_is_what_the_reference_gives(
    method: str,
    parameters: dict[str, Any],
    form: str,
    write_recipe: Callable[..., Path],
    specialists: dict[str, Path],
    base: Path,
    tmp_path: Path,
) -> None:
    recipe = write_recipe(merge_method=method, parameters=parameters, output={"form": form})
    modalloy.merge(recipe, tmp_path / "out")
    assert verify(tmp_path / "out").share == 1
    file = "adapter_model.safetensors" if form == "adapter" else "model.safetensors"
    original, written = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / file)
    for stem, deltas in text_updates(specialists).items():
        if form == "adapter":
            up, down = (written[f"base_model.model.{stem}.lora_{side}.weight"].double() for side in "BA")
            found: Tensor = up @ down
        else:
            found = written[f"{stem}.weight"].double() - original[f"{stem}.weight"].double()
        wanted: np.ndarray = expected(method, deltas, **parameters)
        assert relative(found, wanted) < 2e-5


def test_do_merging_refuses_a_target(tmp_path: Path) -> None:
    text = "target: t\nbase_model: b\nmerge_method: do_merging\nmodels: [{model: m}]\noutput: {form: full}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match="do_merging merges LoRA factors, but a target is a whole model"):
        modalloy.load_recipe(tmp_path / "recipe.yaml")

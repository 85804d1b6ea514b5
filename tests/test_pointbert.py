"""PointBERT: the authors' features from weights in their layout, their keys at full size, and what clouds are turned into."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published_pointbert import FILE, FULL, published_shapes, write_pointbert

from modalloy.errors import CheckpointError, MediaError, RecipeError
from modalloy.senses.encoders.pointbert import PointBert, farthest_points, nearest_points

GOLDEN = Path(__file__).parent / "golden"
GROUPING = {"heads": 2, "groups": 8, "group_size": 6, "points": 64}


def cloud(seed: int, points: int = 64) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.uniform(-1, 1, (points, 3)), rng.random((points, 3))], 1).astype(np.float32)


@pytest.fixture(scope="module")
def location(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pointbert(tmp_path_factory.mktemp("pointbert"))


def load(location: Path, **settings: Any) -> PointBert:
    encoder = PointBert(**{**PointBert.settings(location), **GROUPING, **settings})
    encoder.load_state_dict(PointBert.weights(location))
    return encoder.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def encoder(location: Path) -> PointBert:
    return load(location)


def test_features_are_those_of_the_published_code(encoder: PointBert) -> None:
    """Golden: PointTransformer of THUNLP-MT/ModelCompose 7846997 (modelcompose/model/multimodal_encoder/pointbert), use_max_pool
    false, eval mode, float32, its torch.randint replaced by zeros so that sampling begins at point 0; weights and sizes by
    `published_pointbert`, grouping as above. PointLLM cb72f4e gives the same bits. (At full size, 8192 points, weights
    by the same rule, the largest difference was 2.0e-6.)"""
    golden = torch.from_numpy(np.load(GOLDEN / "pointbert.npz")["features"])
    features = encoder(torch.stack([encoder.preprocess(cloud(seed)) for seed in (1, 2)]))
    assert features.shape == (2, encoder.n_tokens, encoder.dim) == golden.shape
    torch.testing.assert_close(features, golden, atol=1e-5, rtol=0)


def test_every_published_tensor_of_the_full_size_has_its_place() -> None:
    """The list: state_dict() of the same class, built by the authors' code with PointTransformer_8192point_2layer.yaml and
    point_dims 6, the blocks folded into {i}."""
    listed = json.loads((GOLDEN / "pointbert_keys.json").read_text())
    published = {
        key.replace("{i}", str(i)): tuple(shape)
        for key, shape in listed["tensors"].items()
        for i in range(listed["layers"] if "{i}" in key else 1)
    }
    assert published == published_shapes(**FULL)
    with torch.device("meta"):
        encoder = PointBert()
    assert (encoder.dim, encoder.n_tokens, encoder.points) == (384, 513, 8192)
    ours = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    assert {key.replace("blocks.blocks.", "blocks."): shape for key, shape in published.items()} == ours


def test_sizes_come_from_the_tensors(tmp_path: Path) -> None:
    path = write_pointbert(tmp_path, dim=12, layers=3, group_dim=8, point_dims=3)
    sizes = {"dim": 12, "layers": 3, "group_dim": 8, "point_dims": 3}
    assert PointBert.settings(path) == PointBert.settings(tmp_path) == sizes
    encoder = load(path, heads=3)
    assert encoder(encoder.preprocess(cloud(1))[None]).shape == (1, 9, 12)


def test_the_training_checkpoint_holds_the_same_encoder(location: Path, tmp_path: Path) -> None:
    path = write_pointbert(tmp_path, as_trained=True)
    saved = torch.load(path)
    saved["state_dict"] |= {"module.logit_scale": torch.ones(()), "module.open_clip_model.visual.proj": torch.ones(2)}
    torch.save({**saved, "epoch": 39, "args": argparse.Namespace(lr=1e-3)}, path)
    flat, trained = PointBert.weights(location), PointBert.weights(path)
    assert flat.keys() == trained.keys() and all(torch.equal(flat[name], trained[name]) for name in flat)


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    path = write_pointbert(tmp_path)
    tensors = torch.load(path)
    for extra in ("cls_head_finetune.0.weight", "module.point_encoder.cls_token", "module.logit_scale"):
        torch.save({**tensors, extra: torch.ones(1)}, path)
        with pytest.raises(CheckpointError, match=rf"{FILE}: holds {extra}, which PointBERT does not have"):
            PointBert.weights(path)
    torch.save({name: tensor for name, tensor in tensors.items() if name != "cls_token"}, path)
    with pytest.raises(CheckpointError, match=r"no PointBERT \('cls_token' is missing"):
        PointBert.settings(path)
    torch.save({"model": tensors}, path)
    with pytest.raises(CheckpointError, match="does not hold the tensors of a PointBERT"):
        PointBert.weights(path)
    torch.save({**tensors, "path": Path()}, path)
    with pytest.raises(CheckpointError, match="could run code"):
        PointBert.weights(path)
    with pytest.raises(CheckpointError, match=r"point_bert\.pt: no such file"):
        PointBert.settings(tmp_path / "point_bert.pt")


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"heads": 5}, "24 features"), ({"points": 4}, "groups of 6"), ({"point_dims": 4}, "points of 4 numbers")],
)
def test_impossible_settings_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        PointBert(**{"dim": 24, "layers": 1, **GROUPING, **settings})


def test_a_cloud_depends_on_nothing_but_its_points(encoder: PointBert) -> None:
    clouds = torch.from_numpy(np.stack([cloud(1), cloud(2)]))
    features = encoder(clouds)
    torch.testing.assert_close(encoder(clouds[1:]), features[1:], atol=1e-5, rtol=0)
    shuffled = torch.cat([clouds[:, :1], clouds[:, 1:].flip(1)], 1)  # the first point begins the choice of centres
    torch.testing.assert_close(encoder(shuffled), features, atol=1e-5, rtol=0)
    moved = clouds + torch.tensor([1e3, 0, 0, 0, 0, 0])
    assert not torch.allclose(encoder(moved), features, atol=1e-3)  # places are absolute without pc_norm


def test_a_random_start_is_opt_in(location: Path, encoder: PointBert) -> None:
    clouds = torch.from_numpy(cloud(1)[None])
    published = load(location, random_start=True)
    torch.manual_seed(0)
    answers = [published(clouds) for _ in range(4)]
    assert not all(torch.equal(answers[0], answer) for answer in answers)
    assert torch.equal(encoder(clouds), encoder(clouds))


def test_groups_are_chosen_in_float32_whatever_the_weights(location: Path) -> None:
    encoder = load(location)
    clouds = torch.from_numpy(cloud(1)[None]) + 100  # bfloat16 could not tell these points apart
    exact = encoder(clouds)
    rough = encoder.bfloat16()(clouds)
    assert rough.dtype == torch.bfloat16 and (rough.float() - exact).abs().mean() < 0.1


def test_farthest_and_nearest_points_by_definition() -> None:
    xyz = torch.from_numpy(np.stack([cloud(1)[:, :3], cloud(2)[:, :3]]))
    chosen = farthest_points(xyz, 20, torch.tensor([0, 7]))
    assert chosen[:, 0].tolist() == [0, 7]
    for points, indices in zip(xyz.double(), chosen.tolist(), strict=True):
        for step in range(1, len(indices)):
            distance = torch.cdist(points, points[indices[:step]]).amin(1)
            assert indices[step] == int(distance.argmax())
    near = nearest_points(xyz, xyz[:, :5], 6)
    expected = torch.cdist(xyz[:, :5].double(), xyz.double()).topk(6, largest=False).indices
    assert torch.equal(near.sort().values, expected.sort().values)


def test_more_centres_than_places_repeat_the_first() -> None:
    xyz = torch.zeros(1, 4, 3)
    xyz[0, 2] = 1
    assert farthest_points(xyz, 4, torch.tensor([1])).tolist() == [[1, 2, 0, 0]]


def test_clouds_are_brought_to_one_size_by_a_fixed_rule(encoder: PointBert, tmp_path: Path) -> None:
    exact, large, small = cloud(1), cloud(2, 1000), cloud(3, 24)
    assert np.array_equal(encoder.preprocess(exact), exact)
    drawn = encoder.preprocess(large).numpy()
    rows = [int(np.flatnonzero((large == row).all(1))[0]) for row in drawn]
    assert len(set(rows)) == 64 and rows == sorted(rows) and max(rows) > 900
    assert np.array_equal(encoder.preprocess(large), drawn)
    assert np.array_equal(encoder.preprocess(small), np.resize(small, (64, 6)))
    np.save(tmp_path / "cloud.npy", large[:, :3])
    bare = encoder.preprocess(tmp_path / "cloud.npy").numpy()
    assert np.array_equal(bare[:, :3], drawn[:, :3]) and not bare[:, 3:].any()


def test_pc_norm_is_opt_in(location: Path, encoder: PointBert) -> None:
    scaled = load(location, pc_norm=True)
    far = cloud(1) * np.float32([5, 5, 5, 1, 1, 1]) + np.float32([9, 0, 0, 0, 0, 0])
    xyz = scaled.preprocess(far)[:, :3]
    assert abs(float(xyz.norm(dim=1).max()) - 1) < 1e-6 and float(xyz.mean(0).abs().max()) < 1e-6
    torch.testing.assert_close(scaled.preprocess(far), scaled.preprocess(cloud(1)), atol=1e-5, rtol=0)
    assert np.array_equal(encoder.preprocess(far), far)
    with pytest.raises(MediaError, match="a single place"):
        scaled.preprocess(np.ones((5, 3)))


@pytest.mark.parametrize("bad", [np.zeros((5, 4)), np.zeros(6), np.zeros((0, 3)), np.full((5, 3), np.nan)])
def test_unusable_arrays_are_refused(encoder: PointBert, bad: np.ndarray) -> None:
    with pytest.raises(MediaError, match="not a usable point cloud: it"):
        encoder.preprocess(bad)

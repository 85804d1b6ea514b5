"""LanguageBind's video encoder against the authors' code, the key list of the full size, and the published transform.

`golden/languagebind.npz`: weights of `write_languagebind` with seed 0 in the LanguageBindVideo that ModelCompose runs
(THUNLP-MT/ModelCompose 7846997, transformers 4.31), flattened as its `encode_modal_inputs` does; and every 73rd pixel
of what its `get_video_transform` (torchvision 0.15.2, pytorchvideo 0.1.5; no flip) makes of three videos.
`golden/languagebind_keys.json`: the state dict of the same class in full size on the meta device; {i} is every layer.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from published_clip import published_shapes, striped
from published_languagebind import languagebind_shapes, write_languagebind

from modalloy.errors import CheckpointError, MediaError
from modalloy.senses.encoders import load_encoder
from modalloy.senses.encoders.languagebind import LanguageBindVideo

GOLDEN = Path(__file__).parent / "golden"
TEXT = {"projection": 768, "text_width": 768, "text_layers": 12, "vocabulary": 49408, "text_positions": 77}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_languagebind(tmp_path_factory.mktemp("published") / "LanguageBind_Video_merge")


@pytest.fixture(scope="module")
def full_size() -> LanguageBindVideo:
    with torch.device("meta"):
        return LanguageBindVideo()


@torch.no_grad()
def test_features_are_those_of_the_authors_code(folder: Path) -> None:
    encoder = load_encoder("languagebind", folder)
    videos = torch.from_numpy(striped(6, 28, 28, 3)).permute(0, 3, 1, 2).unflatten(0, (2, 3)) / 128 - 1
    expected = torch.from_numpy(np.load(GOLDEN / "languagebind.npz")["features"])
    assert expected.shape == (2, encoder.n_tokens, encoder.dim)
    assert (encoder(videos) - expected).abs().max() <= 1e-5
    assert (encoder(videos[1:]) - expected[1:]).abs().max() <= 1e-5  # a video knows nothing of the others


def test_the_full_size_has_the_published_keys_and_shapes(full_size: LanguageBindVideo) -> None:
    published = published_shapes(GOLDEN / "languagebind_keys.json")
    assert published == languagebind_shapes(1024, 4096, 24, 257, 14, 8, **TEXT)  # what `write_languagebind` makes small
    kept = {name: shape for name, shape in published.items() if name.startswith("vision_model.")}
    assert {name: tuple(tensor.shape) for name, tensor in full_size.state_dict().items()} == kept
    assert (full_size.dim, full_size.n_tokens, list(full_size.buffers())) == (1024, 2056, [])


@pytest.mark.parametrize(
    ("name", "shape"), [("wide", (13, 229, 402, 3)), ("tall", (5, 301, 233, 3)), ("square", (8, 100, 100, 3))]
)
def test_videos_are_prepared_by_the_published_transform(
    full_size: LanguageBindVideo, name: str, shape: tuple[int, ...]
) -> None:
    pixels = full_size.preprocess(striped(*shape))
    assert (pixels.shape, pixels.dtype) == ((8, 3, 224, 224), torch.float32)
    np.testing.assert_allclose(pixels[..., ::73, ::73], np.load(GOLDEN / "languagebind.npz")[name], rtol=0, atol=1e-6)


def test_videos_are_mirrored_only_on_request(full_size: LanguageBindVideo) -> None:
    with torch.device("meta"):
        flipping = LanguageBindVideo(num_hidden_layers=1, random_flip=True)
    video = striped(8, 30, 40, 3)
    straight = full_size.preprocess(video)
    torch.manual_seed(0)
    mirrored = [torch.equal(flipping.preprocess(video), straight.flip(-1)) for _ in range(16)]
    torch.manual_seed(0)
    assert mirrored == [bool(torch.rand(()) < 0.5) for _ in range(16)] and 0 < sum(mirrored) < 16


@pytest.mark.parametrize("shape", [(8, 30, 40), (8, 30, 40, 4), (0, 30, 40, 3)])
def test_frames_of_another_shape_are_refused(full_size: LanguageBindVideo, shape: tuple[int, ...]) -> None:
    with pytest.raises(MediaError, match=r"a video of shape \(.*\) and type uint8; give uint8 frames \(frames, height"):
        full_size.preprocess(np.zeros(shape, np.uint8))
    with pytest.raises(MediaError, match=r"type float64; give uint8 frames"):
        full_size.preprocess(np.zeros((8, 30, 40, 3)))
    with pytest.raises(MediaError, match=r"frames of 202 by 2 pixels cannot be resized \(limit 100 to 1\); crop them"):
        full_size.preprocess(np.zeros((8, 202, 2, 3), np.uint8))


@pytest.mark.parametrize("change", [{"add_time_attn": False}, {"num_frames": 1}])
def test_a_tower_without_time_is_refused(folder: Path, tmp_path: Path, change: dict[str, int]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"config\.json: has no attention over several frames; give a folder like"
    ):
        LanguageBindVideo.settings(tmp_path)


def test_a_file_is_sampled_as_its_frames_are(full_size: LanguageBindVideo, tmp_path: Path) -> None:
    frames = striped(11, 48, 64, 3)
    first, *others = (Image.fromarray(frame) for frame in frames)
    first.save(tmp_path / "clip.webp", save_all=True, append_images=others, lossless=True)
    assert torch.equal(full_size.preprocess(tmp_path / "clip.webp"), full_size.preprocess(frames))
    assert torch.equal(full_size.preprocess(frames), full_size.preprocess(frames[[0, 1, 2, 4, 5, 7, 8, 10]]))

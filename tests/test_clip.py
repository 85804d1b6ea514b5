"""CLIP's picture encoder against OpenAI's own code, the published key list, and LLaVA's preparation of pictures.

`golden/clip.npz`: weights of `write_clip` with seed 0 in `clip.model.VisionTransformer` of openai/CLIP (d05afc4; q, k and v
of a layer stacked into its `in_proj`), the output of its second-last block without the class token; and every 37th
pixel of what `process_images` of THUNLP-MT/ModelCompose (7846997) with transformers 4.31 makes of two pictures.
`golden/clip_keys.json`: the state dict of the full-size CLIPModel on the meta device; {i} stands for every layer.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from published_clip import clip_shapes, published_shapes, striped, write_clip
from safetensors.torch import save_file

from modalloy.errors import CheckpointError, MediaError
from modalloy.senses.encoders import load_encoder
from modalloy.senses.encoders.clip import Clip

GOLDEN = Path(__file__).parent / "golden"
TEXT = {"projection": 768, "text_width": 768, "text_layers": 12, "vocabulary": 49408, "text_positions": 77}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("published") / "clip")


@pytest.fixture(scope="module")
def full_size() -> Clip:
    with torch.device("meta"):
        return Clip()


def pictures() -> torch.Tensor:
    return torch.from_numpy(striped(2, 42, 42, 3)).permute(0, 3, 1, 2) / 128 - 1


@torch.no_grad()
def test_features_are_those_of_openais_code(folder: Path) -> None:
    encoder = load_encoder("clip", folder)
    expected = torch.from_numpy(np.load(GOLDEN / "clip.npz")["features"])
    assert expected.shape == (2, encoder.n_tokens, encoder.dim)
    assert (encoder(pictures()) - expected).abs().max() <= 1e-5


@torch.no_grad()
def test_the_last_layer_never_runs(folder: Path) -> None:
    encoder = load_encoder("clip", folder)
    expected = encoder(pictures())
    for unused in (encoder.vision_model.encoder["layers"][-1], encoder.vision_model.post_layernorm):
        for parameter in unused.parameters():
            parameter.fill_(torch.nan)
    assert torch.equal(encoder(pictures()), expected)


def test_the_full_size_has_the_published_keys_and_shapes(full_size: Clip) -> None:
    published = published_shapes(GOLDEN / "clip_keys.json")
    assert published == clip_shapes(1024, 4096, 24, 577, 14, **TEXT)  # what `write_clip` makes small
    kept = {name: shape for name, shape in published.items() if name.startswith("vision_model.")}
    del kept["vision_model.embeddings.position_ids"]
    assert {name: tuple(tensor.shape) for name, tensor in full_size.state_dict().items()} == kept
    assert (full_size.dim, full_size.n_tokens, list(full_size.buffers())) == (1024, 576, [])


@pytest.mark.parametrize(("name", "shape"), [("wide", (301, 500, 3)), ("tall", (420, 77, 3))])
def test_pictures_are_prepared_as_by_llava(full_size: Clip, name: str, shape: tuple[int, ...]) -> None:
    pixels = full_size.preprocess(Image.fromarray(striped(*shape)))
    assert (pixels.shape, pixels.dtype) == ((3, 336, 336), torch.float32)
    np.testing.assert_allclose(pixels[:, ::37, ::37], np.load(GOLDEN / "clip.npz")[name], rtol=0, atol=1e-6)


def test_a_square_is_prepared_as_by_transformers(full_size: Clip, tmp_path: Path) -> None:
    from transformers import CLIPImageProcessorPil

    picture = Image.fromarray(striped(400, 400, 3))
    picture.save(tmp_path / "square.png")
    size = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    expected = CLIPImageProcessorPil(**size)(picture, return_tensors="pt").pixel_values[0]
    assert torch.equal(full_size.preprocess(tmp_path / "square.png"), expected)


def test_a_picture_too_long_to_pad_is_refused(full_size: Clip) -> None:
    with pytest.raises(MediaError, match=r"30000 pixels long cannot be padded to a square \(limit 20000\); crop it"):
        full_size.preprocess(Image.new("RGB", (30000, 1)))


def test_settings_are_those_of_the_files(folder: Path, tmp_path: Path) -> None:
    assert Clip.settings(folder)["image_size"] == 42
    config = json.loads((folder / "config.json").read_text())
    del config["vision_config_dict"]["hidden_size"]  # counts before vision_config, and what it lacks is ViT-B/32's
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Clip.settings(tmp_path)["hidden_size"] == 768
    tower = {"model_type": "clip_vision_model", "image_size": 28, "layer_norm_eps": 1e-6}
    (tmp_path / "config.json").write_text(json.dumps(tower))
    settings = Clip.settings(tmp_path)
    assert (settings["image_size"], settings["layer_norm_eps"], settings["num_hidden_layers"]) == (28, 1e-6, 12)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "config.json",
            {"model_type": "siglip"},
            r"config\.json: model_type is 'siglip', not CLIP's; give a folder like",
        ),
        ("config.json", {"vision_config_dict": {"patch_size": "14"}}, r"patch_size is '14'; download the file again"),
        ("preprocessor_config.json", {"resample": 2}, r"resample is 2, and only 3 is supported"),
        (
            "preprocessor_config.json",
            {"crop_size": {"height": 42, "width": 40}},
            r"crop_size is .*only 42 is supported",
        ),
        ("preprocessor_config.json", {"do_center_crop": False}, r"do_center_crop is False, and only True is supported"),
    ],
)
def test_files_of_another_model_are_refused(
    folder: Path, tmp_path: Path, file: str, change: dict, message: str
) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        content = json.loads((folder / name).read_text())
        (tmp_path / name).write_text(json.dumps(content | change if name == file else content))
    with pytest.raises(CheckpointError, match=message):
        Clip.settings(tmp_path)


def test_tensors_are_found_in_either_kind_of_file(folder: Path, tmp_path: Path) -> None:
    weights = Clip.weights(folder)
    save_file(weights, tmp_path / "model.safetensors")  # the vision tower alone
    again = Clip.weights(tmp_path)
    assert again.keys() == weights.keys() and all(torch.equal(again[name], weights[name]) for name in weights)
    save_file({**weights, "vision_proj.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: vision_proj\.weight is no tensor of CLIP"):
        Clip.weights(tmp_path)
    with pytest.raises(CheckpointError, match=r"no location of the published files; name a folder or hub id"):
        Clip.weights(None)

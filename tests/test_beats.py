"""BEATs: the authors' features from weights in their layout, their keys at full size, and what sounds are turned into."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from published_beats import CFG, FILE, beats_shapes, noise, qformer_tensors, write_beats

from modalloy.errors import CheckpointError, MediaError, RecipeError
from modalloy.senses.encoders.beats import Beats, relative_bucket
from modalloy.senses.projectors.qformer import QFormer

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> torch.Tensor:
    return torch.from_numpy(np.load(GOLDEN / "beats.npz")[name])


def load(location: Path) -> Beats:
    encoder = Beats(**Beats.settings(location))
    encoder.load_state_dict(Beats.weights(location))
    return encoder.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Beats:
    return load(write_beats(tmp_path_factory.mktemp("beats"), seed=1))


@pytest.fixture(scope="module")
def full() -> Beats:
    with torch.device("meta"):
        return Beats()


def test_features_are_those_of_the_published_code(encoder: Beats) -> None:
    """Golden: BEATs of THUNLP-MT/ModelCompose 7846997 (modelcompose/model/multimodal_encoder/beats), its extract_features_new
    with a padding mask of zeros, eval mode, float32; weights and sizes by `published_beats`, seed 1. microsoft/unilm
    768a3c8 (beats) gives the same bits."""
    spectra = np.random.default_rng(5).standard_normal((2, 1024, 128)).astype(np.float32)
    features = encoder(torch.from_numpy(spectra))
    assert features.shape == (2, encoder.n_tokens, encoder.dim) == (2, 512, 24)
    torch.testing.assert_close(features[:, ::101], golden("features"), atol=1e-5, rtol=0)
    torch.testing.assert_close(features.mean(1), golden("mean"), atol=1e-5, rtol=0)


def test_a_sound_becomes_the_published_tokens(encoder: Beats, tmp_path: Path) -> None:
    """Golden: two seconds of noise in a WAV file through BeatsAudioProcessor, BEATs and VideoLlamaAudioQformer of ModelCompose
    7846997, with torchaudio 2.11's fbank; weights by `published_beats`, seeds 1 and 2."""
    soundfile.write(tmp_path / "noise.wav", noise(2.0), 16_000, subtype="FLOAT")
    tensors = qformer_tensors(seed=2)
    projector = QFormer(**QFormer.settings({name: tensor.shape for name, tensor in tensors.items()})).eval()
    projector.load_state_dict({QFormer.own_name(name): tensor for name, tensor in tensors.items()})
    with torch.no_grad():
        tokens = projector(encoder(encoder.preprocess(tmp_path / "noise.wav")[None]))
    assert tokens.shape[1] == projector.n_tokens(encoder.n_tokens)
    torch.testing.assert_close(tokens[0], golden("tokens"), atol=1e-5, rtol=0)


def test_log_mel_frames_are_torchaudios(full: Beats) -> None:
    """Golden: torchaudio 2.11, compliance.kaldi.fbank(waveform · 2¹⁵, num_mel_bins=128, sample_frequency=16000, frame_length=25,
    frame_shift=10) in float64, normalised as published: every 14th frame, every other band of one second of noise."""
    frames = full.preprocess(noise(1.0))
    assert frames.shape == (1024, 128) and frames.dtype == torch.float32
    torch.testing.assert_close(frames[:98:14, ::2], golden("fbank"), atol=1e-5, rtol=0)
    assert not frames[98:].any() and frames[:98].all()


def test_every_published_tensor_of_the_full_size_has_its_place(full: Beats) -> None:
    """The list: state_dict() of microsoft/unilm's BEATs 768a3c8 with the published file's cfg, layers folded into {i}."""
    listed = json.loads((GOLDEN / "beats_keys.json").read_text())
    published = {
        key.replace("{i}", str(i)): tuple(shape)
        for key, shape in listed["tensors"].items()
        for i in range(listed["layers"] if "{i}" in key else 1)
    }
    assert published == beats_shapes(CFG) and len(published) == 250
    assert (full.dim, full.n_tokens) == (768, 512)
    shared = [key for key in published if "relative_attention_bias" in key]
    ours = {key: published[key] for key in published.keys() - {*shared}}
    ours["encoder.pos_conv.0.weight"] = ours.pop("encoder.pos_conv.0.weight_v")
    del ours["encoder.pos_conv.0.weight_g"]
    ours["encoder.relative_attention_bias.weight"] = published[shared[0]]
    assert ours == {name: tuple(tensor.shape) for name, tensor in full.state_dict().items()}
    assert not list(full.buffers())


def test_the_files_own_cfg_is_the_default(full: Beats, tmp_path: Path) -> None:
    torch.save({"cfg": CFG, "model": {}}, tmp_path / FILE)
    settings = Beats.settings(tmp_path)
    assert Beats.settings(tmp_path / FILE) == settings
    with torch.device("meta"):
        assert {k: v.shape for k, v in Beats(**settings).state_dict().items()} == {
            k: v.shape for k, v in full.state_dict().items()
        }
    left_out = {"activation_fn", "conv_bias", "layer_norm_first", "encoder_layers", "num_buckets"}
    torch.save({"cfg": {k: v for k, v in CFG.items() if k not in left_out}, "model": {}}, tmp_path / FILE)
    assert settings == {**Beats.settings(tmp_path), "layers": 12, "buckets": 320}


def test_the_norm_of_the_convolution_is_folded_and_the_classifier_left_out(tmp_path: Path) -> None:
    path = write_beats(tmp_path)
    stored = torch.load(path)
    direction, length = (stored["model"][f"encoder.pos_conv.0.weight_{part}"] for part in "vg")
    plain = {name: tensor.clone() for name, tensor in Beats.weights(path).items()}  # of a file that is written anew
    folded = plain["encoder.pos_conv.0.weight"]
    torch.testing.assert_close(folded.norm(dim=(0, 1)), length.flatten())
    cosine = torch.nn.functional.cosine_similarity(folded.flatten(0, 1), direction.flatten(0, 1), dim=0)
    torch.testing.assert_close(cosine, torch.ones(16))
    stored["model"] |= {"predictor.weight": torch.ones(527, 24), "predictor.bias": torch.ones(527)}
    torch.save(stored, path)
    fine_tuned = Beats.weights(path)
    assert all(torch.equal(fine_tuned[name], plain[name]) for name in fine_tuned.keys() | plain.keys())


LAYER_1 = "encoder.layers.1.self_attn.relative_attention_bias.weight"


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("model", {"mask_emb": torch.ones(24)}, f"holds mask_emb, which BEATs does not have; give {FILE}"),
        ("model", {"encoder.layers.2.fc1.bias": torch.ones(40)}, r"holds encoder\.layers\.2\.fc1\.bias"),
        ("model", {LAYER_1: torch.ones(32, 3)}, f"{LAYER_1} is not that of the other layers"),
        ("model", {"encoder.pos_conv.0.weight_v": torch.zeros(24, 6, 16)}, r"pos_conv\.0\.weight has no finite values"),
        ("model", {"step": 3}, "step is no tensor"),
        ("cfg", {"deep_norm": False}, "its cfg has deep_norm = False, not True"),
        ("cfg", {"activation_fn": "relu"}, "its cfg has activation_fn = relu, not gelu"),
        ("cfg", {"max_distance": None}, "its cfg does not record max_distance"),
        ("cfg", {"encoder_layers": 0}, "its cfg has encoder_layers = 0"),
        ("cfg", {"embed_dim": "16"}, "its cfg has embed_dim = '16'"),
        ("model", None, "does not hold a BEATs' cfg and model"),
        ("extra", Path(), "could run code"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, part: str, changes: Any, message: str) -> None:
    path = write_beats(tmp_path)
    stored = torch.load(path)
    changed = {**stored[part], **changes} if isinstance(changes, dict) else changes
    if part == "cfg":
        changed = {name: value for name, value in changed.items() if value is not None}
    torch.save({**stored, part: changed}, path)
    with pytest.raises(CheckpointError, match=rf"{FILE}: .*{message}"):
        Beats.weights(path)


def test_what_is_not_there_or_impossible_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"give the path of {FILE} as its `encoder:`"):
        Beats.settings(None)
    with pytest.raises(CheckpointError, match=rf"{FILE}: no such file"):
        Beats.settings(tmp_path)
    for name in ("heads", "groups"):
        with pytest.raises(RecipeError, match=f"768 features cannot be split among 7 {name}"):
            Beats(**{name: 7})
    with pytest.raises(RecipeError, match="a patch of 129 does not fit into 128 mel bands"):
        Beats(patch=129)
    with pytest.raises(RecipeError, match="320 buckets cannot cover distances up to 80"):
        Beats(max_distance=80)


def test_only_the_first_1024_frames_of_a_sound_count(full: Beats) -> None:
    sound = np.random.default_rng(0).standard_normal(200_000)
    frames = full.preprocess(sound)
    assert torch.equal(frames, full.preprocess(sound[: 1023 * 160 + 400])) and frames[-1].any()
    assert not full.preprocess(sound[: 1023 * 160 + 399])[-1].any()
    assert torch.equal(full.preprocess(sound[:400])[:1], frames[:1])


@pytest.mark.parametrize(
    ("sound", "message"),
    [
        (np.zeros(0), r"the waveform: has 0 samples at 16 kHz; give a sound of at least 400 \(25 ms\)"),
        (np.zeros(399), "has 399 samples"),
        (np.full(400, np.nan), "holds NaN or infinite samples"),
        (np.zeros((2, 400)), r"is float64 of shape \(2, 400\); give a mono waveform"),
        (np.zeros(400, np.int16), "is int16 of shape"),
    ],
)
def test_sounds_without_a_frame_are_refused(full: Beats, sound: np.ndarray, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        full.preprocess(sound)


def test_a_file_too_short_is_named(full: Beats, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "click.wav", np.zeros(10, np.float32), 16_000)
    with pytest.raises(MediaError, match=r"click\.wav: has 10 samples"):
        full.preprocess(tmp_path / "click.wav")


def test_a_sound_depends_on_nothing_but_itself(encoder: Beats) -> None:
    sounds = torch.stack([encoder.preprocess(noise(seconds)) for seconds in (0.5, 1.0)])
    torch.testing.assert_close(encoder(sounds)[1:], encoder(sounds[1:]), atol=1e-5, rtol=0)


def test_offsets_share_buckets_the_more_the_farther_they_are() -> None:
    offsets = torch.tensor([0, 1, 79, 80, 120, 799, 800, 5000])
    assert relative_bucket(-offsets, 320, 800).tolist() == [0, 1, 79, 80, 94, 159, 159, 159]
    assert torch.equal(relative_bucket(offsets[1:], 320, 800), relative_bucket(-offsets[1:], 320, 800) + 160)

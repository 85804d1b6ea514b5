"""The contract of encoders, for every registered one and for a fifth modality that another package brings."""

import importlib.metadata
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import conftest
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import modalloy
from modalloy.errors import CheckpointError, MediaError, RecipeError
from modalloy.evals.motion import move
from modalloy.senses import encoders
from modalloy.senses.encoders import ENCODERS, PUBLISHED, build, encoder_class, load_encoder, modalities
from modalloy.senses.encoders.efficientnet_lite0_motion import LEAST
from modalloy.senses.encoders.whisper_speech import EDGE

EXAMPLE = Path(__file__).parents[1] / "examples/fifth_modality"
TOY = "motion-spectrum"
NAMES = [*sorted(ENCODERS), TOY]
BUILTIN = [name for name in NAMES if name.startswith("builtin:") or name == TOY]  # whose weights are at hand


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the example's package were installed."""
    point = importlib.metadata.EntryPoint(TOY, "motion_spectrum:MotionSpectrum", "modalloy.encoders")
    monkeypatch.setattr(encoders, "_entry_points", lambda: (point,))
    monkeypatch.syspath_prepend(EXAMPLE)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Two files of each modality, of different sizes."""
    folder = tmp_path_factory.mktemp("media")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 60, 80, 3), np.uint8)
    for index, (width, length) in enumerate([(80, 60), (30, 40)]):
        pictures = [Image.fromarray(frame[:length, :width]) for frame in pixels]
        arrays = {"point": rng.normal(size=(length, 3)), "motion": rng.normal(size=(6 * length, 6))}
        pictures[0].save(folder / f"{index}.png")
        pictures[0].save(folder / f"{index}.gif", save_all=True, append_images=pictures[1 : 3 - index])
        soundfile.write(folder / f"{index}.wav", rng.uniform(-1, 1, 200 * length), 16_000)
        for modality, array in arrays.items():
            np.save(folder / f"{modality}{index}.npy", array.astype(np.float32))
    names = {"image": "{}.png", "audio": "{}.wav", "video": "{}.gif", "point": "point{}.npy", "motion": "motion{}.npy"}
    return {modality: [folder / name.format(index) for index in (0, 1)] for modality, name in names.items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_contract_needs_no_weights(name: str, media: dict[str, list[Path]], tmp_path: Path) -> None:
    encoder = build(name, {}, meta=True)
    assert encoder.modality in modalities() and not encoder.training
    assert all(tensor.is_meta and not tensor.requires_grad for tensor in encoder.state_dict(keep_vars=True).values())
    assert {key for key, _ in encoder.named_buffers()} <= encoder.state_dict().keys()
    keywords = list(inspect.signature(type(encoder)).parameters.values())
    assert all(keyword.kind is keyword.KEYWORD_ONLY for keyword in keywords)
    json.dumps({keyword.name: keyword.default for keyword in keywords})

    first, second = (encoder.preprocess(path) for path in media[encoder.modality])
    assert first.shape == second.shape and first.dtype == torch.float32 and first.device.type == "cpu"
    assert torch.equal(encoder.preprocess(str(media[encoder.modality][0])), first) and not torch.equal(first, second)
    assert encoder(torch.stack([first, second]).to("meta")).shape == (2, encoder.n_tokens, encoder.dim)

    junk = tmp_path / f"junk{media[encoder.modality][0].suffix}"
    junk.write_bytes(b"not a medium")
    for path in (junk, junk.with_stem("missing")):
        with pytest.raises(MediaError, match=rf"^[^\n]*{path.name}: [^\n]*$"):
            encoder.preprocess(path)


@pytest.mark.parametrize("name", BUILTIN)
def test_features_depend_on_their_medium_alone(name: str, media: dict[str, list[Path]]) -> None:
    encoder = load_encoder(name)
    first, second = (encoder.preprocess(path) for path in media[encoder.modality])
    both = encoder(torch.stack([first, second]))
    assert both.shape == (2, encoder.n_tokens, encoder.dim) and bool(torch.isfinite(both).all())
    torch.testing.assert_close(encoder(second[None])[0], both[1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(both[0], both[1], atol=1e-2)


def test_the_ear_for_speech_hears_no_silence_around_it_and_no_level() -> None:
    encoder = build("builtin:whisper-tiny.en-speech", {}, meta=True)
    word = np.random.default_rng(0).uniform(-1, 1, 8000).astype(np.float32)
    word[[0, -1]] = 1.0  # heard to the ends
    alone = np.pad(word, EDGE)
    frames = encoder.preprocess(alone)
    assert torch.equal(encoder.preprocess(np.pad(alone, (9000, 20000))), frames)
    torch.testing.assert_close(encoder.preprocess(0.25 * alone), frames)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros(16_000, np.float32), r"^the sound: silent; nothing is said in it$"),
        (
            np.ones(6 * 16_000, np.float32),
            r"^the sound: 6\.0 s of speech; this model hears 5 s at once: say less, or cut it$",
        ),
    ],
)
def test_silence_and_long_speech_are_refused(samples: np.ndarray, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        build("builtin:whisper-tiny.en-speech", {}, meta=True).preprocess(samples)


def test_a_name_in_a_refusal_cannot_act_on_a_terminal(tmp_path: Path) -> None:
    path = tmp_path / "a\x1b[2Jb.wav"
    soundfile.write(path, np.zeros(16_000), 16_000)
    with pytest.raises(MediaError, match="silent") as raised:
        build("builtin:whisper-tiny.en-speech", {}, meta=True).preprocess(path)
    assert "\x1b" not in str(raised.value)


def test_motion_to_the_left_and_to_the_right_are_told_apart() -> None:
    encoder = load_encoder("builtin:efficientnet-lite0-motion")
    still = np.full((64, 64, 3), 255, np.uint8)
    still[16:48, 16:48] = (200, 30, 30)
    seen = {one: encoder(encoder.preprocess(move(still, one, seed=3))[None])[0] for one in ("left", "right")}
    places = torch.arange(64, dtype=torch.float32) % 8  # columns of the 8 × 8 places
    paths = {}
    for one, features in seen.items():
        assert torch.equal(features[0, 1472:], features[3, 1472:])  # all of a video's features tell all of its motion
        changes = features[0, 1472 + 8 * 64 : -7].reshape(7, 64)
        middle = (changes * places).sum(1) / changes.sum(1)
        paths[one] = float(middle[-1] - middle[0])
    assert paths["left"] < 0 < paths["right"]


def test_a_video_that_stands_still_is_told_as_no_change() -> None:
    encoder = load_encoder("builtin:efficientnet-lite0-motion")
    features = encoder(encoder.preprocess(np.full((4, 64, 64, 3), 200, np.uint8))[None])[0]
    assert features.isfinite().all() and torch.equal(features[:, -7:], torch.full((4, 7), LEAST).log())
    assert not features[:, -7 - 7 * 64 : -7].any()


def test_published_encoders_open_bare_locations() -> None:
    assert PUBLISHED.items() <= {encoder_class(name).modality: name for name in PUBLISHED.values()}.items()


@pytest.mark.parametrize("name", sorted(PUBLISHED.values()))
def test_published_encoders_want_their_files(name: str, tmp_path: Path) -> None:
    for location in (None, tmp_path, tmp_path / "missing.pt"):
        with pytest.raises(CheckpointError):
            load_encoder(name, location)


def test_an_unknown_encoder_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"no encoder 'builtin:whisper'; did you mean 'builtin:whisper-tiny\.en'"):
        load_encoder("builtin:whisper")


def test_a_fifth_modality_goes_the_whole_way(
    tmp_path: Path,
    specialists: dict[str, Path],
    write_recipe: Callable[..., Path],
    media: dict[str, list[Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(conftest.ENCODERS, "motion", (TOY, build(TOY, {}).dim))
    motion = conftest.write_compose(tmp_path / "motion-damc", "motion", seed=3)
    models = [{"model": str(path), "modality": name} for name, path in (specialists | {"motion": motion}).items()]
    recipe = write_recipe(models=models, output={"form": "omni"})
    modalloy.merge(recipe, tmp_path / "omni")
    chat = modalloy.load_model(tmp_path / "omni")
    assert chat.modalities == ("image", "audio", "motion")
    image, recording = media["image"][0], media["motion"][0]
    answers = [chat.ask("what is this ?", image=image, motion=path) for path in (recording, np.load(recording))]
    assert answers[0] == answers[1]
    with pytest.raises(MediaError, match=r"a recording has the shape \(samples, 6\), not \(60, 3\)"):
        chat.ask("what is this ?", motion=media["point"][0])

    monkeypatch.setattr(encoders, "_entry_points", lambda: ())
    with pytest.raises(RecipeError, match="unknown modality 'motion'; known: image, audio, video, point"):
        modalloy.load_recipe(recipe)
    with pytest.raises(CheckpointError, match=f"no encoder '{TOY}'"):
        modalloy.load_model(tmp_path / "omni")


@pytest.mark.parametrize(
    ("recording", "message"),
    [
        (np.zeros((0, 6)), r"not \(0, 6\)"),
        (np.zeros(6), r"not \(6,\)"),
        (np.full((5, 6), np.nan), "other values than finite"),
        (np.full((5, 6), "a"), "other values than finite"),
    ],
)
def test_the_toy_refuses_what_is_no_recording(recording: np.ndarray, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        build(TOY, {}).preprocess(recording)


def test_the_toy_hears_the_rate_of_a_motion() -> None:
    encoder: Any = build(TOY, {"seconds": 2, "bands": 5})
    swing = np.zeros((75, 6))
    swing[:, 1] = np.sin(2 * np.pi * 3 * np.arange(75) / 50)
    features = encoder(encoder.preprocess(swing)[None]).unflatten(-1, (6, 6))  # (1, 2 seconds, 6 bands, 6 channels)
    assert encoder.dim == 36 and features.shape == (1, 2, 6, 6)
    assert features[0, 0].argmax() == 3 * 6 + 1  # 3 Hz, the second channel
    torch.testing.assert_close(features[0, 0, 3, 1], torch.tensor(1.5).log())

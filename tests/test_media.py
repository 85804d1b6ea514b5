"""Reading pictures and sounds: what comes out, in every format, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from modalloy.encoders import ENCODERS, build, load_encoder
from modalloy.errors import CheckpointError, MediaError
from modalloy.media import load_audio, load_image

TIME = np.arange(44_100) / 44_100
TONE = np.stack([np.sin(2 * np.pi * 440 * TIME), np.zeros_like(TIME)], 1).astype(np.float32) * 0.5


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_sounds_are_mono_16_khz(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"tone.{suffix}"
    soundfile.write(path, TONE, 44_100)
    samples = load_audio(path)
    assert samples.dtype == np.float32 and abs(len(samples) - 16_000) < 1200  # mp3 pads
    spectrum = np.abs(np.fft.rfft(samples))
    assert abs(np.argmax(spectrum) * 16_000 / len(samples) - 440) < 5
    assert abs(samples.max() - 0.25) < 0.05  # the mean of a tone of 0.5 and silence


def test_the_sound_track_of_an_mp4(tmp_path: Path) -> None:
    import av

    path = tmp_path / "tone.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44_100, layout="stereo")
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(TONE.T), format="fltp", layout="stereo")
        frame.sample_rate = 44_100
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    samples = load_audio(path)
    assert abs(np.argmax(np.abs(np.fft.rfft(samples))) * 16_000 / len(samples) - 440) < 5


def test_pictures_are_upright_rgb_on_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (8, 4), (255, 0, 0, 0))
    clear.putpixel((0, 0), (0, 0, 255, 255))
    clear.save(tmp_path / "clear.png")
    image = load_image(tmp_path / "clear.png")
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (0, 0, 255) and image.getpixel((5, 2)) == (255, 255, 255)
    turned = Image.new("RGB", (8, 4), "red")
    exif = turned.getexif()
    exif[0x0112] = 6  # turn by 90°
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (4, 8)


@pytest.mark.parametrize(
    "content",
    [b"", b"not a medium", b"RIFF\x00\x00\x00\x00WAVE", b"\x89PNG\r\n\x1a\n"],
    ids=["empty", "text", "wav", "png"],
)
def test_damaged_media_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.bin"
    path.write_bytes(content)
    with pytest.raises(MediaError, match=r"broken\.bin: not a readable image"):
        load_image(path)
    with pytest.raises(
        MediaError, match=r"broken\.bin: (not a readable sound|the sound has no samples|the file has no sound)"
    ):
        load_audio(path)
    with pytest.raises(MediaError, match="no such file"):
        load_audio(tmp_path / "missing.wav")


def test_sounds_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    samples = TONE.copy()
    samples[100] = np.nan
    soundfile.write(tmp_path / "nan.wav", samples, 44_100, subtype="FLOAT")
    with pytest.raises(MediaError, match="NaN"):
        load_audio(tmp_path / "nan.wav")


@pytest.mark.parametrize("location", sorted(ENCODERS))
def test_encoders_keep_their_contract(location: str, tmp_path: Path) -> None:
    import torch

    encoder = load_encoder(location)
    image, sound = tmp_path / "picture.png", tmp_path / "tone.wav"
    Image.fromarray(np.arange(40 * 30 * 3, dtype=np.uint8).reshape(40, 30, 3)).save(image)
    soundfile.write(sound, TONE, 44_100)
    medium = encoder.preprocess(image if encoder.modality == "image" else sound)
    features = encoder(medium[None])
    assert features.shape == (1, encoder.n_tokens, encoder.dim) and bool(torch.isfinite(features).all())
    assert encoder.n_tokens <= 16 and torch.equal(
        build(location, {}, meta=True).preprocess(image if encoder.modality == "image" else sound), medium
    )
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    both = encoder(torch.stack([torch.zeros_like(medium), medium]))
    torch.testing.assert_close(both[1], features[0], atol=1e-4, rtol=1e-4)  # a medium does not depend on its batch


def test_short_sounds_repeat_to_fill_the_window() -> None:
    import torch

    whisper = load_encoder("builtin:whisper-tiny.en")
    half = TONE[:, 0][:: 44_100 // 16_000][:8000]
    torch.testing.assert_close(whisper.preprocess(half), whisper.preprocess(np.tile(half, 4)))


def test_an_unknown_encoder_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"no encoder 'builtin:whisper'; did you mean 'builtin:whisper-tiny\.en'"):
        load_encoder("builtin:whisper")

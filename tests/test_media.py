"""Reading pictures, sounds and videos: what comes out, in every format, and what is refused."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from modalloy.errors import MediaError
from modalloy.senses.encoders import load_encoder
from modalloy.senses.media import limits, load_audio, load_image, load_video

TIME = np.arange(44_100) / 44_100
TONE = np.stack([np.sin(2 * np.pi * 440 * TIME), np.zeros_like(TIME)], 1).astype(np.float32) * 0.5


def write_video(
    path: Path,
    shades: list[int],
    *,
    codec: str = "libx264",
    times: list[int] | None = None,
    rotation: int = 0,
    sound: bool = False,
    **options: str,
) -> Path:
    """A video of grey frames (48, 64), one per shade, with a white top left quarter; 10 per second, or at `times` / 100 s."""
    import av

    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=10, options={"threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        speaker = container.add_stream("aac", rate=44_100, layout="stereo") if sound else None
        container.start_encoding()
        if speaker is not None:
            heard = av.AudioFrame.from_ndarray(np.ascontiguousarray(TONE.T), format="fltp", layout="stereo")
            heard.sample_rate = 44_100
            for packet in [*speaker.encode(heard), *speaker.encode(None)]:
                container.mux(packet)
        for index, shade in enumerate(shades):
            pixels = np.full((48, 64, 3), shade, dtype=np.uint8)
            pixels[:24, :32] = 255
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, 100)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    return path


def shades_of(frames: np.ndarray) -> list[int]:
    return [int(shade) for shade in frames[:, -4, -4, 0]]


def write_animation(path: Path, shades: list[int], **options: Any) -> Path:
    first, *rest = [Image.new("RGB", (12, 10), (shade, shade, shade)) for shade in shades]
    first.save(path, save_all=True, append_images=rest, duration=100, **options)
    return path


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_sounds_are_mono_16_khz(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"tone.{suffix}"
    soundfile.write(path, TONE, 44_100)
    samples = load_audio(path)
    assert samples.dtype == np.float32 and abs(len(samples) - 16_000) < 1200  # mp3 pads
    spectrum = np.abs(np.fft.rfft(samples))
    assert abs(np.argmax(spectrum) * 16_000 / len(samples) - 440) < 5
    assert abs(samples.max() - 0.25) < 0.05  # the mean of a tone of 0.5 and silence


def test_every_channel_counts_the_same(tmp_path: Path) -> None:
    three = np.array([[0.75, 0.0, 0.0], [0.25, 0.5, -0.75], [-1.0, -1.0, -1.0]])
    soundfile.write(tmp_path / "three.wav", three, 16_000, subtype="FLOAT")
    assert load_audio(tmp_path / "three.wav").tolist() == [0.25, 0.0, -1.0]


@pytest.mark.parametrize("suffix", ["m4a", "mp4"])
def test_sound_without_a_picture(tmp_path: Path, suffix: str) -> None:
    import av

    path = tmp_path / f"tone.{suffix}"
    with av.open(str(path), "w", format="ipod" if suffix == "m4a" else None) as container:
        stream = container.add_stream("aac", rate=44_100, layout="stereo")
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(TONE.T), format="fltp", layout="stereo")
        frame.sample_rate = 44_100
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    samples = load_audio(path)
    assert abs(np.argmax(np.abs(np.fft.rfft(samples))) * 16_000 / len(samples) - 440) < 5
    with pytest.raises(MediaError, match=r"tone\..*: the file has no video; give a file with one"):
        load_video(path, 2)


def test_an_mp3_without_an_index_is_read_to_its_end(tmp_path: Path) -> None:
    """libsndfile takes such a file for as long as its first frames' bit rate says, here for much too short."""
    import av

    path, loud = tmp_path / "tone.mp3", np.random.default_rng(0).standard_normal(32_000) * 0.3
    samples = np.concatenate([loud, np.zeros(160_000)]).astype(np.float32)
    with av.open(str(path), "w", container_options={"write_xing": "0"}) as container:
        stream = container.add_stream("libmp3lame", rate=16_000, layout="mono")
        stream.codec_context.flags |= av.codec.context.Flags.qscale  # a bit rate that varies
        for start in range(0, len(samples), 576):
            frame = av.AudioFrame.from_ndarray(samples[None, start : start + 576], format="fltp", layout="mono")
            frame.sample_rate = 16_000
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert soundfile.info(path).frames < 100_000
    assert 192_000 <= len(load_audio(path)) < 195_000


def test_pictures_are_upright_rgb_on_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (8, 4), (255, 0, 0, 0))
    clear.putpixel((0, 0), (0, 0, 255, 255))
    clear.save(tmp_path / "clear.png")
    image = load_image(tmp_path / "clear.png")
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (0, 0, 255) and image.getpixel((5, 2)) == (255, 255, 255)
    palette = Image.new("P", (8, 4), 1)
    palette.putpalette([0, 0, 255, 255, 0, 0])
    palette.putpixel((0, 0), 0)
    palette.save(tmp_path / "palette.png", transparency=1)
    assert np.array_equal(load_image(tmp_path / "palette.png"), image)
    turned = Image.new("RGB", (8, 4), "red")
    exif = turned.getexif()
    exif[0x0112] = 6  # turn by 90°
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (4, 8)
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=100)
    assert np.abs(np.asarray(load_image(tmp_path / "print.jpg"), float) - [255, 0, 0]).max() < 4
    Image.fromarray(np.full((2, 2), 0.5, dtype=np.float32)).save(tmp_path / "depth.tiff")
    with pytest.raises(MediaError, match="its pixels are 32-bit numbers of unknown range"):
        load_image(tmp_path / "depth.tiff")


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {}),
        ("a.avi", "mpeg4", {}),
        ("a.webm", "libvpx", {}),
        ("live.webm", "libvpx", {"live": "1"}),  # no count and no duration
    ],
)
def test_frames_are_evenly_spaced(tmp_path: Path, name: str, codec: str, options: dict[str, str]) -> None:
    path = write_video(tmp_path / name, [20 * i for i in range(11)], codec=codec, **options)
    frames = load_video(path, 4)
    assert frames.shape == (4, 48, 64, 3) and frames.dtype == np.uint8
    np.testing.assert_allclose(shades_of(frames), [0, 60, 120, 200], atol=8)  # frames 0, 3.3, 6.7 and 10
    assert frames[:, :20, :28].min() > 220  # the white quarter


def test_frames_are_counted_not_times(tmp_path: Path) -> None:
    path = write_video(tmp_path / "vfr.mp4", [0, 60, 120, 180, 240], times=[0, 1, 2, 3, 500])
    np.testing.assert_allclose(shades_of(load_video(path, 3)), [0, 120, 240], atol=6)


def test_a_short_video_repeats_frames(tmp_path: Path) -> None:
    one = load_video(write_video(tmp_path / "one.mp4", [120]), 3)
    assert one.shape == (3, 48, 64, 3) and (one == one[0]).all()
    np.testing.assert_allclose(
        shades_of(load_video(write_video(tmp_path / "two.mp4", [0, 200]), 4)), [0, 0, 0, 200], atol=6
    )


@pytest.mark.parametrize(
    ("rotation", "shape", "corner"),
    [(90, (64, 48), (-1, 0)), (180, (48, 64), (-1, -1)), (270, (64, 48), (0, -1))],
)
def test_rotated_videos_are_upright(
    tmp_path: Path, rotation: int, shape: tuple[int, int], corner: tuple[int, int]
) -> None:
    """A rotation is counterclockwise; the white quarter starts top left, and a mirror moves it to the other side."""
    path = write_video(tmp_path / "turned.mp4", [0], rotation=rotation)
    frame = load_video(path, 1)[0]
    assert frame.shape[:2] == shape and frame[corner].min() > 220 and frame[::-1, ::-1][corner].max() < 40
    content = path.read_bytes()
    at = content.index(b"tkhd") + 44  # the track's display matrix, big-endian
    matrix = np.frombuffer(content[at : at + 36], ">i4").reshape(3, 3).copy()
    matrix[:, 0] *= -1  # mirrored left to right
    path.write_bytes(content[:at] + matrix.tobytes() + content[at + 36 :])
    assert np.array_equal(load_video(path, 1)[0], frame[:, ::-1])
    matrix[:2, :2] = 0xB504  # √½: turned by 45°
    path.write_bytes(content[:at] + matrix.tobytes() + content[at + 36 :])
    with pytest.raises(MediaError, match=r"turned\.mp4: the video is turned by an angle that is not a right one"):
        load_video(path, 1)


def test_picture_and_sound_of_one_file(tmp_path: Path) -> None:
    path = write_video(tmp_path / "both.mp4", [0, 200], sound=True)
    np.testing.assert_allclose(shades_of(load_video(path, 2)), [0, 200], atol=6)
    samples = load_audio(path)
    assert abs(np.argmax(np.abs(np.fft.rfft(samples))) * 16_000 / len(samples) - 440) < 5


@pytest.mark.parametrize(
    ("name", "options"), [("a.gif", {}), ("a.png", {}), ("a.webp", {"lossless": True}), ("b.png", {"default_image": 1})]
)
def test_animations_are_videos(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    """A PNG's default image is what programs that cannot animate show; it is no frame."""
    shades = [250, 0, 40, 80, 120] if options.get("default_image") else [0, 40, 80, 120]
    frames = load_video(write_animation(tmp_path / name, shades, **options), 3)
    assert frames.shape == (3, 10, 12, 3) and shades_of(frames) == [0, 40, 120]


def test_a_still_image_is_a_video_of_one_frame(tmp_path: Path) -> None:
    still = Image.new("RGB", (12, 10), (10, 20, 30))
    still.save(tmp_path / "still.bmp")
    frames = load_video(tmp_path / "still.bmp", 2)
    assert frames.shape == (2, 10, 12, 3) and np.array_equal(frames[1], still)


def test_files_cut_short_are_refused(tmp_path: Path) -> None:
    def shortened(path: Path, keep: float) -> Path:
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
        return path

    shades = list(range(0, 250, 5))
    with pytest.raises(MediaError, match=r"late\.mp4: (not a readable video|the file has no video)"):
        load_video(shortened(write_video(tmp_path / "late.mp4", shades), 0.9), 4)  # its index is at the end
    with pytest.raises(MediaError, match=r"early\.mp4: (not a readable video|the file is damaged or cut short)"):
        load_video(shortened(write_video(tmp_path / "early.mp4", shades, movflags="faststart"), 0.9), 4)
    for name in ("a.webp", "a.png"):
        with pytest.raises(MediaError, match=rf"{name}: not a readable image"):
            load_video(shortened(write_animation(tmp_path / name, shades), 0.9), 4)
    Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / "a.jpg")
    with pytest.raises(
        MediaError, match=r"a\.jpg: not a readable image \(its data is damaged, or ends before the picture does"
    ):
        load_image(shortened(tmp_path / "a.jpg", 0.5))
    soundfile.write(tmp_path / "a.flac", TONE, 44_100)
    with pytest.raises(MediaError, match=r"a\.flac: (not a whole sound|the sound ends after)"):
        load_audio(shortened(tmp_path / "a.flac", 0.5))


@pytest.mark.parametrize(
    "content",
    [b"", b"not a medium", b"RIFF\x00\x00\x00\x00WAVE", b"\x89PNG\r\n\x1a\n", b"#EXTM3U\n#EXTINF:1,\nother.mp4\n"],
    ids=["empty", "text", "wav", "png", "playlist"],
)
def test_damaged_media_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.bin"
    path.write_bytes(content)
    write_video(tmp_path / "other.mp4", [0], sound=True)
    with pytest.raises(MediaError, match=r"broken\.bin: not a readable image"):
        load_image(path)
    with pytest.raises(
        MediaError, match=r"broken\.bin: (not a readable sound|the sound has no samples|the file has no sound)"
    ):
        load_audio(path)
    with pytest.raises(MediaError, match=r"broken\.bin: (not a readable video|the file has no video)"):
        load_video(path, 2)


@pytest.mark.parametrize("load", [load_image, load_audio, lambda path: load_video(path, 2)])
def test_folders_and_missing_files_are_refused(load: Callable[[Path], object], tmp_path: Path) -> None:
    for path, found in ((tmp_path, "is a folder, not a file"), (tmp_path / "missing", "no such file")):
        with pytest.raises(MediaError, match=f"{found}; check the path"):
            load(path)


def test_nothing_inside_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"no\.avi: the video has no frames; give a file that is not empty"):
        load_video(write_video(tmp_path / "no.avi", [], codec="mpeg4"), 2)
    soundfile.write(tmp_path / "no.wav", TONE[:0], 44_100)
    with pytest.raises(MediaError, match=r"no\.wav: the sound has no samples; give a file that is not empty"):
        load_audio(tmp_path / "no.wav")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_sounds_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    samples = TONE.copy()
    samples[100] = value
    soundfile.write(tmp_path / "nan.wav", samples, 44_100, subtype="FLOAT")
    with pytest.raises(MediaError, match="NaN"):
        load_audio(tmp_path / "nan.wav")


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = write_video(tmp_path / "a.mp4", [0] * 12, sound=True)
    picture, animation = tmp_path / "a.png", write_animation(tmp_path / "a.gif", [0, 1, 2])
    Image.new("1", (10_000, 5001)).save(picture)  # a megapixel takes 120 bytes
    for load, limit in ((load_image, 50_000_000), (lambda path: load_video(path, 1), 16_777_216)):
        with pytest.raises(
            MediaError, match=rf"a\.png: has 10000 × 5001 pixels, more than the limit of {limit}; give a smaller"
        ):
            load(picture)
    soundfile.write(tmp_path / "long.wav", np.zeros(3601, np.int16), 1)
    with pytest.raises(MediaError, match=r"long\.wav: lasts 3601 s, more than the limit of 3600 s; give a shorter"):
        load_audio(tmp_path / "long.wav")
    monkeypatch.setattr(limits, "MAX_SECONDS", 1)
    for load in (load_audio, lambda path: load_video(path, 1)):
        with pytest.raises(MediaError, match=r"a\.mp4: lasts 1 s, more than the limit of 1 s"):
            load(video)
    monkeypatch.setattr(limits, "MAX_SECONDS", 3600)
    monkeypatch.setattr(limits, "MAX_FRAMES", 2)
    for path in (video, animation):
        with pytest.raises(MediaError, match=r"a\.(mp4|gif): has more frames than the limit of 2; give a shorter"):
            load_video(path, 1)
    monkeypatch.setattr(limits, "MAX_FRAME_PIXELS", 3000)
    with pytest.raises(MediaError, match=r"a\.mp4: has 64 × 48 pixels, more than the limit of 3000"):
        load_video(video, 1)
    monkeypatch.setattr(limits, "MAX_FILE_BYTES", 100)
    monkeypatch.setattr(limits, "MAX_PICTURE_BYTES", 100)
    for load in (load_image, load_audio, lambda path: load_video(path, 1)):
        with pytest.raises(MediaError, match=r"a\.mp4: has \d+ bytes, more than the limit of 100; give a smaller file"):
            load(video)


def test_a_video_is_what_it_shows_and_how_it_changes() -> None:
    import torch

    encoder = load_encoder("builtin:efficientnet-lite0-video")
    still = np.tile(np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8), (8, 1, 1, 1))
    seen, change = encoder(encoder.preprocess(still)[None]).chunk(2, -1)
    assert float(change.abs().max()) < 1e-4 < float(seen.abs().max())
    backwards = still.copy()
    backwards[1::2] = 255
    there, back = (encoder(encoder.preprocess(frames)[None]).chunk(2, -1) for frames in (backwards, backwards[::-1]))
    torch.testing.assert_close(there[0], back[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(there[1], -back[1], atol=1e-4, rtol=1e-4)


def test_depth_maps_see_the_near_side() -> None:
    from modalloy.senses.encoders.depth_views import depth_maps

    wall = np.stack(np.meshgrid(np.linspace(-1, 1, 60), np.linspace(-1, 1, 60), [0.0]), -1).reshape(-1, 3)
    ball = np.array([[0.0, 0.0, 1.0]])  # before the wall as seen from the front, behind it as seen from behind
    front, behind = depth_maps(np.concatenate([wall, ball]), ((0, 0), (180, 0)))
    assert front.shape == (96, 96) and float(front[0, 0]) == 1.0  # nothing there
    assert float(front[47:49, 47:49].mean()) < float(front[30, 30]) - 0.1 < 1.0
    assert float(behind[47:49, 47:49].mean()) == pytest.approx(float(behind[30, 30]), abs=0.01)
    moved, _ = depth_maps(np.concatenate([wall, ball]) * 7 + 3, ((0, 0), (180, 0)))
    assert float((moved - front).abs().mean()) < 0.01  # neither place nor size matters


def test_a_sound_shorter_than_a_sample_of_the_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.wav"
    soundfile.write(path, np.full(1600, 0.1), 67_000_000)
    with pytest.raises(MediaError, match=r"1600 samples at 67000000 Hz, less than one at 16000 Hz"):
        load_audio(path)


def test_short_sounds_repeat_to_fill_the_window() -> None:
    import torch

    whisper = load_encoder("builtin:whisper-tiny.en")
    half = TONE[:, 0][:: 44_100 // 16_000][:8000]
    torch.testing.assert_close(whisper.preprocess(half), whisper.preprocess(np.tile(half, 4)))

"""Damaged media of every kind: a MediaError that names the file, or a well-formed array of bounded size; nothing else.

Each example mutates a small valid file: bytes changed, parts cut out, repeated, or taken from a file of another kind.
"""

import functools
import io
import struct
import tempfile
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from modalloy.errors import MediaError
from modalloy.senses.media import load_audio, load_image, load_points, load_video

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 16, 3), np.uint8)
TONE = (0.3 * np.sin(np.arange(1600) / 5)).astype(np.float32)
CLOUD = RNG.random((9, 6)).astype(np.float32)


def picture(form: str, mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(file, form, **options)
    return file.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture("JPEG", exif=exif)


def animation(form: str, **options: Any) -> bytes:
    file, frames = io.BytesIO(), [Image.fromarray(np.roll(PIXELS, index, 1)) for index in range(4)]
    frames[0].save(file, form, save_all=True, append_images=frames[1:], duration=100, **options)
    return file.getvalue()


def sound(form: str, subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, TONE, 8000, format=form, subtype=subtype)
    return file.getvalue()


def law() -> bytes:
    """A WAV that is read as it stands, with three channels."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((3, 2, 8000, 0, "NONE", ""))
        out.writeframes((TONE * 30_000).astype("<i2").repeat(3).tobytes())
    return file.getvalue()


def video(form: str, codec: str, pixels: str = "yuv420p") -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 16, 16, pixels
        for index in range(5):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 50 * index, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def track(form: str, codec: str, rate: int = 48_000) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        for start in range(0, 9600, stream.codec_context.frame_size or 1024):
            size = min(stream.codec_context.frame_size or 1024, 9600 - start)
            samples = np.resize(TONE, (1, size))
            if stream.codec_context.format.name != "fltp":
                samples = (samples * 30_000).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(samples, format=stream.codec_context.format.name, layout="mono")
            frame.sample_rate, frame.pts = rate, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def saved(save: Callable[..., None], *arrays: np.ndarray, **named: np.ndarray) -> bytes:
    file = io.BytesIO()
    save(file, *arrays, **named)
    return file.getvalue()


def ply(form: str) -> bytes:
    names = [*"xyz", "red", "green", "blue"]
    header = [f"format {form} 1.0", "element vertex 9", *(f"property float {name}" for name in names), "end_header"]
    text = "\n".join(["ply", *header, ""]).encode()
    if form == "ascii":
        return text + "".join(" ".join(map(str, row)) + "\n" for row in CLOUD.tolist()).encode()
    return text + CLOUD.astype("<f4" if "little" in form else ">f4").tobytes()


PICTURES = {
    "png": lambda: picture("PNG"),
    "palette.png": lambda: picture("PNG", "P", transparency=3),
    "16.png": lambda: picture("PNG", "I;16"),
    "text.png": lambda: picture("PNG", icc_profile=b"a" * 200, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0"),
    "jpeg": turned,
    "progressive.jpeg": lambda: picture("JPEG", progressive=True, quality=30),
    "cmyk.jpeg": lambda: picture("JPEG", "CMYK"),
    "webp": lambda: picture("WEBP"),
    "lossless.webp": lambda: picture("WEBP", "RGBA", lossless=True),
    "gif": lambda: picture("GIF"),
    "bmp": lambda: picture("BMP"),
    "grey.bmp": lambda: picture("BMP", "L"),
    "tiff": lambda: picture("TIFF"),
    "lzw.tiff": lambda: picture("TIFF", compression="tiff_lzw"),
    "jpeg.tiff": lambda: picture("TIFF", compression="jpeg"),
    "ppm": lambda: picture("PPM"),
}
SOUNDS = {
    "wav": lambda: sound("WAV"),
    "float.wav": lambda: sound("WAV", "FLOAT"),
    "adpcm.wav": lambda: sound("WAV", "IMA_ADPCM"),
    "three.wav": law,
    "flac": lambda: sound("FLAC"),
    "ogg": lambda: sound("OGG"),
    "aiff": lambda: sound("AIFF"),
    "mp3": lambda: sound("MP3"),
    "m4a": lambda: track("ipod", "aac"),
    "aac": lambda: track("adts", "aac"),
    "opus": lambda: track("ogg", "libopus"),
    "ac3.ts": lambda: track("mpegts", "ac3"),
}
VIDEOS = {
    "h264.mp4": lambda: video("mp4", "libx264"),
    "mpeg4.avi": lambda: video("avi", "mpeg4"),
    "vp8.webm": lambda: video("webm", "libvpx"),
    "mjpeg.mov": lambda: video("mov", "mjpeg", "yuvj420p"),
    "mpeg2.ts": lambda: video("mpegts", "mpeg2video"),
    "gif": lambda: animation("GIF"),
    "apng": lambda: animation("PNG"),
    "webp": lambda: animation("WEBP", lossless=True),
}
POINTS = {
    "npy": lambda: saved(np.save, CLOUD),
    "fortran.npy": lambda: saved(np.save, np.asfortranarray(CLOUD, ">f8")),
    "npz": lambda: saved(np.savez, points=CLOUD[:, :3], colors=CLOUD[:, 3:]),
    "packed.npz": lambda: saved(np.savez_compressed, CLOUD),
    "ascii.ply": lambda: ply("ascii"),
    "little.ply": lambda: ply("binary_little_endian"),
    "big.ply": lambda: ply("binary_big_endian"),
}


@functools.cache
def whole(kind: str, name: str) -> bytes:
    content: bytes = {"image": PICTURES, "audio": SOUNDS, "video": VIDEOS, "point": POINTS}[kind][name]()
    return content


@st.composite
def damaged(draw: st.DrawFn, kind: str, names: list[str]) -> bytes:
    content = bytearray(whole(kind, draw(st.sampled_from(names))))
    # headers are where it matters
    place = st.one_of(st.integers(0, min(64, len(content) - 1)), st.integers(0, len(content) - 1))
    for _ in range(draw(st.integers(1, 4))):
        begin = min(draw(place), len(content))
        match draw(st.sampled_from(["byte", "byte", "number", "cut", "drop", "repeat", "splice"])):
            case "byte":
                content[begin : begin + 1] = bytes([draw(st.integers(0, 255))])
            case "number":
                large = draw(st.sampled_from([0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 100_000_000]))
                content[begin : begin + 4] = struct.pack(draw(st.sampled_from("<>")) + "I", large)
            case "cut":
                del content[begin:]
            case "drop":
                del content[begin : begin + draw(st.integers(1, 20))]
            case "repeat":
                content[begin:begin] = content[begin : begin + draw(st.integers(1, 200))]
            case "splice":
                content[:begin] = whole(kind, draw(st.sampled_from(names)))[:begin]
    return bytes(content)


def attempt(content: bytes, load: Callable[[Path], Any]) -> np.ndarray | None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "medium.bin"
        path.write_bytes(content)
        try:
            return np.asarray(load(path))
        except MediaError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error) and len(str(error)) < 1000
            return None


@examples(300)
@given(damaged("image", list(PICTURES)))
def test_a_damaged_picture_is_an_error_or_a_picture(content: bytes) -> None:
    found = attempt(content, load_image)
    assert found is None or (found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3)
    assert found is None or found.size < 3 * 50_000_000


@examples(200)
@given(damaged("audio", list(SOUNDS)))
def test_a_damaged_sound_is_an_error_or_a_sound(content: bytes) -> None:
    found = attempt(content, load_audio)
    assert found is None or (found.dtype == np.float32 and found.ndim == 1 and bool(np.isfinite(found).all()))
    assert found is None or 0 < found.size <= 3600 * 16_000


@examples(200)
@given(damaged("video", list(VIDEOS)))
def test_a_damaged_video_is_an_error_or_frames(content: bytes) -> None:
    found = attempt(content, lambda path: load_video(path, 3))
    assert found is None or (found.dtype == np.uint8 and found.shape[0] == 3 and found.shape[3] == 3)


@examples(300)
@given(damaged("point", list(POINTS)))
def test_a_damaged_point_cloud_is_an_error_or_points(content: bytes) -> None:
    found = attempt(content, load_points)
    assert found is None or (found.dtype == np.float32 and found.ndim == 2 and found.shape[1] in (3, 6))
    assert found is None or bool(np.isfinite(found).all())


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, name)
        for kind, files in (("image", PICTURES), ("audio", SOUNDS), ("video", VIDEOS), ("point", POINTS))
        for name in files
    ],
)
def test_the_whole_files_are_read(kind: str, name: str) -> None:
    load = {"image": load_image, "audio": load_audio, "video": lambda path: load_video(path, 3), "point": load_points}
    assert attempt(whole(kind, name), load[kind]) is not None

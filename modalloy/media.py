"""Reading media files into arrays. Every failure is one MediaError line that names the file; nothing is ever substituted."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from modalloy.errors import MediaError

if TYPE_CHECKING:
    from PIL.Image import Image


def load_image(path: str | Path) -> "Image":
    """RGB image, turned upright by its EXIF tag; transparency is laid over white. The first frame of an animation."""
    from PIL import Image, ImageOps

    _require_file(path)
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip to white
                image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                white.alpha_composite(image)
                image = white
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MediaError(f"{path}: not a readable image ({error}); give a PNG, JPEG, WebP, GIF or BMP file") from error


def load_audio(path: str | Path, sampling_rate: int = 16_000) -> np.ndarray:
    """Mono float32 waveform (samples,) in [-1, 1] at `sampling_rate` Hz; channels are averaged.

    wav, flac, ogg and mp3 are decoded by libsndfile; anything else (m4a, the sound track of a video) by FFmpeg.
    """
    import soundfile
    import soxr

    _require_file(path)
    try:
        samples, rate = soundfile.read(str(path), dtype="float32", always_2d=True)  # (samples, channels)
    except (soundfile.LibsndfileError, TypeError):  # TypeError: headerless formats, known by the file's ending
        samples, rate = _decode_with_ffmpeg(path)
    if samples.size == 0:
        raise MediaError(f"{path}: the sound has no samples; give a file that is not empty")
    if not np.isfinite(samples).all():
        raise MediaError(f"{path}: the sound holds NaN or infinite samples; re-encode the file")
    mono = samples.mean(axis=1)
    return mono if rate == sampling_rate else soxr.resample(mono, rate, sampling_rate).astype(np.float32)


def load_video(path: str | Path, n_frames: int) -> np.ndarray:
    """Stand-in: `n_frames` RGB frames (n_frames, height, width, 3) uint8 at even steps of an animated picture."""
    from PIL import Image

    with Image.open(path) as file:
        frames = []
        for number in np.linspace(0, file.n_frames - 1, n_frames).astype(int):
            file.seek(int(number))
            frames.append(np.asarray(file.convert("RGB")))
    return np.stack(frames)


def load_points(path: str | Path) -> np.ndarray:
    """Stand-in: points (n, 3) float32."""
    return np.load(path).astype(np.float32)


def _decode_with_ffmpeg(path: str | Path) -> tuple[np.ndarray, int]:
    import av

    try:
        with av.open(str(path), metadata_errors="replace") as container:
            if not container.streams.audio:
                raise MediaError(f"{path}: the file has no sound track; give a file with one")
            stream = container.streams.audio[0]
            to_float = av.AudioResampler(format="fltp")
            frames = [out.to_ndarray() for frame in container.decode(stream) for out in to_float.resample(frame)]
            rate = stream.rate
    except av.FFmpegError as error:
        raise MediaError(f"{path}: not a readable sound ({error}); give a WAV, FLAC, OGG, MP3 or M4A file") from error
    if not frames:
        raise MediaError(f"{path}: the sound has no samples; give a file that is not empty")
    return np.concatenate(frames, axis=1).T, rate


def _require_file(path: str | Path) -> None:
    if not Path(path).is_file():
        raise MediaError(f"{path}: no such file; check the path")

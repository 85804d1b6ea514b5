"""Reading media files into arrays. Every failure is one MediaError line that names the file; nothing is ever substituted."""

import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from modalloy.errors import MediaError
from modalloy.ply import PlyFile

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


MAX_POINTS = 10_000_000
MAX_POINT_FILE_BYTES = 1 << 30  # of a file, and of all that an .npz unpacks to
NPZ_POINTS, NPZ_COLOURS = ("points", "xyz"), ("colors", "rgb")
PLY_COLOURS = (("red", "green", "blue"), ("diffuse_red", "diffuse_green", "diffuse_blue"), ("r", "g", "b"))
UNREADABLE_POINTS = (  # what NumPy is seen to raise on damaged files, beside ValueError
    *(OSError, ValueError, EOFError, LookupError, TypeError, RuntimeError, SyntaxError, MemoryError, OverflowError),
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError),
)


def load_points(path: str | Path) -> np.ndarray:
    """Point cloud as float32 (points, 3): x, y, z; or, where the file has colours, (points, 6): also red, green, blue in 0..1.

    .npy: one array of 3 or 6 columns. .npz: one such array under any name, or `points` (or `xyz`) with `colors` (or
    `rgb`), and nothing else. .ply, ASCII or binary: the vertices' x, y, z and red, green, blue; their alpha, normals and
    further properties, faces and other elements are left unread. Colours stored as whole numbers, or that reach 2 and
    more, count as 0..255. At most MAX_POINTS points and MAX_POINT_FILE_BYTES; nothing is unpickled. Raises MediaError.
    """
    _require_file(path)
    read = {".npy": _read_npy, ".npz": _read_npz, ".ply": _read_ply}.get(Path(path).suffix.lower())
    if read is None:
        raise MediaError(f"{path}: not a kind of point cloud that is read; give a .npy, .npz or .ply file")
    try:
        _check_size(Path(path).stat().st_size)
        return _cloud(*read(Path(path)))
    except UNREADABLE_POINTS as error:
        raise MediaError(f"{path}: not a usable point cloud: {error}") from error


def check_points(points: np.ndarray) -> np.ndarray:
    """A point cloud in memory, (points, 3) or (points, 6), as `load_points` would read it from a .npy file."""
    try:
        return _cloud(*_columns(points))
    except ValueError as error:
        raise MediaError(f"not a usable point cloud: {error}") from error


@np.errstate(over="ignore", invalid="ignore")  # what float32 cannot hold becomes infinite, and is refused
def _cloud(xyz: np.ndarray, colours: np.ndarray | None) -> np.ndarray:
    if xyz.ndim != 2 or xyz.shape[1] != 3:
        raise ValueError(f"its points have the shape {xyz.shape}; give (points, 3)")
    _check_count(len(xyz))
    if colours is not None and colours.shape != xyz.shape:
        raise ValueError(f"its points are {xyz.shape}, its colours {colours.shape}; give one red, green, blue a point")
    parts = [xyz] if colours is None else [xyz, colours]
    if odd := [part.dtype for part in parts if part.dtype.kind not in "iuf"]:
        raise ValueError(f"it holds values of type {odd[0]}; store them as floating point or whole numbers")
    parts = [part.astype(np.float32, order="C") for part in parts]
    if not all(np.isfinite(part).all() for part in parts):
        raise ValueError("it holds NaN or infinite values; remove these points")
    if colours is not None:
        parts[1] = _unit_colours(parts[1], whole=colours.dtype.kind in "iu")
    return np.concatenate(parts, axis=1)


def _unit_colours(colours: np.ndarray, whole: bool) -> np.ndarray:
    """Colours in 0..1, past it only by rounding. A largest value between 1 and 2 fits neither scale."""
    scaled = colours / 255 if whole or colours.max() >= 2 else colours
    if scaled.min() < -1e-3 or scaled.max() > 1 + 1e-3:
        raise ValueError(
            f"its colours run from {colours.min():.4g} to {colours.max():.4g}; scale them to 0..1 or to 0..255"
        )
    return scaled


def _check_count(count: int) -> None:
    if count == 0:
        raise ValueError("it has no points; give a cloud that is not empty")
    if count > MAX_POINTS:
        raise ValueError(f"it has {count:,} points, at most {MAX_POINTS:,} are read; give a thinner cloud")


def _check_size(size: int) -> None:
    if size > MAX_POINT_FILE_BYTES:
        raise ValueError(f"it has {size:,} bytes, at most {MAX_POINT_FILE_BYTES:,} are read; give a thinner cloud")


def _columns(points: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    if points.ndim != 2 or points.shape[1] not in (3, 6):
        raise ValueError(f"its shape is {points.shape}; give (points, 3) or (points, 6): x, y, z, red, green, blue")
    return points[:, :3], points[:, 3:] if points.shape[1] == 6 else None


def _read_npy(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    return _columns(np.lib.format.open_memmap(path, mode="r"))  # whose header is held against the file's size first


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    with zipfile.ZipFile(path) as archive:
        _check_size(sum(entry.file_size for entry in archive.infolist()))
        names = sorted(name.removesuffix(".npy") for name in archive.namelist())
        arrays = {}
        for name in names if len(names) < 3 else ():
            with archive.open(f"{name}.npy") as file:
                arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
    if len(arrays) == 1:
        return _columns(arrays.popitem()[1])
    xyz = [name for name in names if name in NPZ_POINTS]
    colours = [name for name in names if name in NPZ_COLOURS]
    if len(names) != 2 or not len(xyz) == len(colours) == 1:
        listed = ", ".join(names) or "none"
        raise ValueError(f"its arrays are: {listed}; keep one, or points (or xyz) with colors (or rgb)")
    return arrays[xyz[0]], arrays[colours[0]]


@np.errstate(invalid="ignore")
def _read_ply(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    file = PlyFile(path)
    _check_count(file.vertices.length)
    names = file.vertices.properties
    colours = next((triple for triple in PLY_COLOURS if names.keys() & set(triple)), ())
    if missing := [name for name in (*"xyz", *colours) if name not in names]:
        raise ValueError(f"its vertices have {', '.join(names) or 'nothing'}, but no {missing[0]}; export it again")
    values = file.read()
    return np.stack([values[name] for name in "xyz"], 1), np.stack([values[c] for c in colours], 1) if colours else None

"""Reading media files into arrays. Every failure is one MediaError line that names the file; nothing is ever substituted.

The limits below are generous, for a user's own files. A program that reads strangers' files assigns smaller ones.
"""

import os
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modalloy.errors import MediaError, cut
from modalloy.ply import PlyFile

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_FILE_BYTES = 8_000_000_000
MAX_PIXELS = 100_000_000  # of a picture, or of one frame of a video
MAX_SECONDS = 3600  # of a sound or a video
MAX_FRAMES = 500_000
MAX_POINTS = 10_000_000
MAX_POINT_FILE_BYTES = 1_000_000_000  # of the file of a point cloud, and of all that an .npz unpacks to

# what Pillow raises at damaged files, besides its own errors
DAMAGE = (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, struct.error)
ANIMATED = ("GIF", "PNG", "WEBP")  # the formats whose further pictures are frames, not pages, layers or previews

# the modality that a file's ending tells; an animated picture is an image unless its user says otherwise
ENDINGS = {
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"), "image"),
    **dict.fromkeys((".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac"), "audio"),
    **dict.fromkeys((".mp4", ".webm", ".mov", ".mkv", ".avi"), "video"),
    **dict.fromkeys((".npy", ".npz", ".ply"), "point"),
}
# what NumPy raises at damaged point clouds
POINT_DAMAGE = (*DAMAGE, RuntimeError, MemoryError, OverflowError, zipfile.BadZipFile, zlib.error, tokenize.TokenError)
NPZ_POINTS, NPZ_COLOURS = ("points", "xyz"), ("colors", "rgb")
PLY_COLOURS = (("red", "green", "blue"), ("diffuse_red", "diffuse_green", "diffuse_blue"), ("r", "g", "b"))


def load_image(path: str | Path) -> "Image":
    """RGB image, turned upright by its EXIF tag; transparency is laid over white. The first frame of an animation."""
    with _picture(path) as image:
        return _upright_rgb(image)


def load_audio(path: str | Path, sampling_rate: int = 16_000) -> np.ndarray:
    """Mono float32 waveform (samples,) in [-1, 1] at `sampling_rate` Hz; channels are averaged.

    wav, flac, ogg and their like are decoded by libsndfile; mp3, m4a, the sound track of a video and the rest by FFmpeg.
    """
    import soundfile
    import soxr

    _check_file(path)
    try:
        with soundfile.SoundFile(str(path)) as sound:
            # libsndfile guesses the length of an mp3 without an index from its first frames, and reads no further
            mono, rate = _decode_sound(path) if sound.format == "MP3" else _read_sound(path, sound)
    except (soundfile.LibsndfileError, TypeError):  # TypeError: headerless formats, known by the file's ending
        mono, rate = _decode_sound(path)
    if mono.size == 0:
        raise MediaError(f"{path}: the sound has no samples; give a file that is not empty")
    if not np.isfinite(mono).all():
        raise MediaError(f"{path}: the sound holds NaN or infinite samples; re-encode the file")
    return mono if rate == sampling_rate else soxr.resample(mono, rate, sampling_rate).astype(np.float32)


def load_video(path: str | Path, n_frames: int) -> np.ndarray:
    """Frames uint8 (n_frames, height, width, 3): RGB, upright, evenly spaced from the first to the last.

    They are the frames `np.linspace(0, n - 1, n_frames)`, rounded down, of the n that can be decoded: frames are
    counted, not times, and a short video repeats some. FFmpeg decodes videos, Pillow animated GIF, WebP and PNG;
    a still image is a video of one frame. A file that is cut short is refused where that shows: where a packet is
    incomplete, or cannot be decoded.
    """
    try:
        with _picture(path) as image:
            if image.format != "MPEG":  # which Pillow only recognises
                return _animation(image, n_frames)
    except MediaError as error:
        from PIL import UnidentifiedImageError

        if not isinstance(error.__cause__, UnidentifiedImageError):
            raise
    frames, count = _decode_video(path, n_frames)
    if len(frames) < n_frames:  # the container told another number of frames than it holds, or none
        frames, count = _decode_video(path, n_frames, count)
    return np.stack(frames)


def video_frames(video: Any, n_frames: int) -> np.ndarray:
    """The frames that `load_video` gives, of a file or of uint8 frames in memory (any number, height, width, 3)."""
    if isinstance(video, (str, Path)):
        return load_video(video, n_frames)
    frames = np.asarray(video)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise MediaError(
            f"a video of shape {frames.shape} and type {frames.dtype}; give uint8 frames (frames, height, width, 3)"
        )
    return frames[_spaced(len(frames), n_frames)]


def _check_file(path: str | Path) -> None:
    if not os.path.isfile(path):  # unlike Path's, False for any name that no file can have
        raise MediaError(f"{cut(str(path))}: no such file; check the path")
    size = Path(path).stat().st_size
    if size > MAX_FILE_BYTES:
        raise MediaError(f"{path}: has {size} bytes, more than the limit of {MAX_FILE_BYTES}; give a smaller file")


def _check_pixels(path: str | Path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise MediaError(
            f"{path}: has {width} × {height} pixels, more than the limit of {MAX_PIXELS}; give a smaller picture"
        )


def _check_seconds(path: str | Path, seconds: float) -> None:
    if seconds > MAX_SECONDS:
        raise MediaError(f"{path}: lasts {seconds:.0f} s, more than the limit of {MAX_SECONDS} s; give a shorter part")


def _check_frames(path: str | Path, count: int) -> None:
    if count > MAX_FRAMES:
        raise MediaError(f"{path}: has more frames than the limit of {MAX_FRAMES}; give a shorter part")


@contextmanager
def _picture(path: str | Path) -> Iterator["Image"]:
    """The file as Pillow opens it, before pixels are decoded; what fails inside the block is a MediaError too."""
    from PIL import Image

    _check_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is ours
            with Image.open(path) as image:
                _check_pixels(path, *image.size)
                yield image
    except (*DAMAGE, Image.DecompressionBombError) as error:
        raise MediaError(f"{path}: not a readable image ({error}); give a PNG, JPEG, WebP, GIF or BMP file") from error


def _upright_rgb(picture: "Image") -> "Image":
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(picture)
    if image.mode.startswith("I;16") or (image.mode == "I" and picture.format in ("PNG", "PPM")):
        # 16 bits of grey, which convert() would clip to white
        image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit numbers of unknown range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        image = white
    return image.convert("RGB")


def _animation(image: Any, n_frames: int) -> np.ndarray:
    count = image.n_frames if image.format in ANIMATED else 1
    _check_frames(image.filename, count)
    first = int(getattr(image, "default_image", False))  # a PNG's picture for programs that cannot animate
    frames: dict[int, np.ndarray] = {}
    wanted = _spaced(count - first, n_frames)
    for index in wanted:
        if index not in frames:
            image.seek(first + index)
            frames[index] = np.asarray(_upright_rgb(image))
    return np.stack([frames[index] for index in wanted])


def _spaced(count: int, n_frames: int) -> list[int]:
    return [int(index) for index in np.linspace(0, count - 1, n_frames).astype(int)]


def _read_sound(path: str | Path, sound: Any) -> tuple[np.ndarray, int]:
    """Mono samples and their rate, read in blocks: all channels of a long sound would not fit in memory."""
    import soundfile

    _check_seconds(path, sound.frames / sound.samplerate)
    mono, done = np.empty(sound.frames, dtype=np.float32), 0
    try:
        while len(block := sound.read(1 << 20, dtype="float32", always_2d=True)):  # (samples, channels)
            mono[done : done + len(block)] = block.mean(axis=1)
            done += len(block)
    except soundfile.LibsndfileError as error:
        raise MediaError(f"{path}: the sound is damaged ({error}); re-encode the file") from error
    if done < len(mono):
        raise MediaError(f"{path}: the sound ends after {done} of {len(mono)} samples; it is cut short, get it again")
    return mono, sound.samplerate


@contextmanager
def _container(path: str | Path, kind: str, advice: str) -> Iterator[Any]:
    """The file as FFmpeg opens it; what it cannot decode inside the block is a MediaError too."""
    import av

    _check_file(path)
    try:
        # an open file and no protocol: neither the name nor a playlist inside can lead to another file or the network
        with (
            open(path, "rb") as file,
            av.open(file, metadata_errors="replace", options={"protocol_whitelist": "none"}) as container,
        ):
            if container.duration is not None:
                _check_seconds(path, container.duration / av.time_base)
            yield container
    except (av.FFmpegError, OSError, ValueError) as error:
        raise MediaError(f"{path}: not a readable {kind} ({error}); give {advice}") from error


def _decode_sound(path: str | Path) -> tuple[np.ndarray, int]:
    """Mono samples and their rate, of the first sound track."""
    import av

    chunks, samples = [np.empty(0, np.float32)], 0
    with _container(path, "sound", "a WAV, FLAC, OGG, MP3 or M4A file") as container:
        if not container.streams.audio:
            raise MediaError(f"{path}: the file has no sound track; give a file with one")
        stream = container.streams.audio[0]
        _check_decoder(path, stream)
        rate: int = stream.rate
        to_float = av.AudioResampler(format="fltp")
        for packet in container.demux(stream):
            _check_packet(path, packet)
            for frame in packet.decode():
                for out in to_float.resample(frame):
                    chunks.append(out.to_ndarray().mean(axis=0))
                    samples, rate = samples + out.samples, out.sample_rate
                    _check_seconds(path, samples / rate)
    return np.concatenate(chunks), rate


def _decode_video(path: str | Path, n_frames: int, count: int | None = None) -> tuple[list[np.ndarray], int]:
    """The wanted frames of a video of `count` frames (None: as many as its container tells), and the exact count.

    Only wanted frames are converted and kept. The list is empty where `count` turns out to be wrong.
    """
    with _container(path, "video", "an MP4, WebM, MOV, MKV or AVI file") as container:
        import av

        cover = av.stream.Disposition.attached_pic
        streams = [stream for stream in container.streams.video if not stream.disposition & cover]
        if not streams:
            raise MediaError(f"{path}: the file has no video; give a file with one")
        stream = streams[0]
        _check_decoder(path, stream)
        stream.thread_type = "AUTO"
        _check_pixels(path, stream.codec_context.width, stream.codec_context.height)
        expected = stream.frames if count is None else count
        wanted = _spaced(expected, n_frames) if expected else []
        frames: dict[int, np.ndarray] = {}
        found = 0
        for packet in container.demux(stream):
            _check_packet(path, packet)
            for frame in packet.decode():
                _check_pixels(path, frame.width, frame.height)
                if found in wanted:
                    frames[found] = _upright_frame(path, frame)
                found += 1
                _check_frames(path, found)
    if not found:
        raise MediaError(f"{path}: the video has no frames; give a file that is not empty")
    if len({frame.shape for frame in frames.values()}) > 1:
        raise MediaError(f"{path}: the frames change their size; re-encode the file")
    return [frames[index] for index in wanted] if found == expected else [], found


def _check_decoder(path: str | Path, stream: Any) -> None:
    if stream.codec_context is None:
        raise MediaError(f"{path}: its {stream.type} is in a format that FFmpeg cannot decode; re-encode the file")


def _check_packet(path: str | Path, packet: Any) -> None:
    if packet.is_corrupt:
        raise MediaError(f"{path}: the file is damaged or cut short; get it again")


def _upright_frame(path: str | Path, frame: Any) -> np.ndarray:
    """Pixels (height, width, 3) turned and mirrored as the display matrix says.

    The matrix takes the pixel (x, y) to (a x + c y, b x + d y), in 16.16 fixed point.
    """
    pixels: np.ndarray = frame.to_ndarray(format="rgb24")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if not ((a and d and not (b or c)) or (b and c and not (a or d))):
        raise MediaError(f"{path}: the video is turned by an angle that is not a right one; re-encode it upright")
    if b:
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    return pixels[:: 1 if d > 0 else -1, :: 1 if a > 0 else -1]


def load_points(path: str | Path) -> np.ndarray:
    """Point cloud as float32 (points, 3): x, y, z; or, where the file has colours, (points, 6): also red, green, blue in 0..1.

    .npy: one array of 3 or 6 columns. .npz: one such array under any name, or `points` (or `xyz`) with `colors` (or
    `rgb`), and nothing else. .ply, ASCII or binary: the vertices' x, y, z and red, green, blue; their alpha, normals and
    further properties, faces and other elements are left unread. Colours stored as whole numbers, or that reach 2 and
    more, count as 0..255. At most MAX_POINTS points and MAX_POINT_FILE_BYTES; nothing is unpickled. Raises MediaError.
    """
    _check_file(path)
    read = {".npy": _read_npy, ".npz": _read_npz, ".ply": _read_ply}.get(Path(path).suffix.lower())
    if read is None:
        raise MediaError(f"{path}: not a kind of point cloud that is read; give a .npy, .npz or .ply file")
    try:
        _check_size(Path(path).stat().st_size)
        return _cloud(*read(Path(path)))
    except POINT_DAMAGE as error:
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

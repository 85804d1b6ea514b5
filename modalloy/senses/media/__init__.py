"""Reading media files into arrays. Every failure is one MediaError line that names the file; nothing is ever substituted.

A file's content decides what decodes it, among the few decoders listed in `pictures`, `streams` and `points`: none starts a
program, or opens another file. `limits` says how large a medium may be. Inside `isolated()`, files are decoded in a child
process.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modalloy.errors import MediaError
from modalloy.senses.media.child import in_child, is_isolated, isolated
from modalloy.senses.media.pictures import NoPictureError, read_animation, read_picture, spaced
from modalloy.senses.media.points import check_points, read_points
from modalloy.senses.media.streams import read_sound, read_video

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "ENDINGS",
    "check_points",
    "isolated",
    "load_audio",
    "load_image",
    "load_points",
    "load_video",
    "video_frames",
]

# the modality that a file's ending tells; an animated picture is an image unless its user says otherwise
ENDINGS = {
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"), "image"),
    **dict.fromkeys((".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac"), "audio"),
    **dict.fromkeys((".mp4", ".webm", ".mov", ".mkv", ".avi"), "video"),
    **dict.fromkeys((".npy", ".npz", ".ply"), "point"),
}


def load_image(path: str | Path) -> "Image":
    """RGB image, turned upright by its EXIF tag; transparency is laid over white. The first frame of an animation."""
    if is_isolated():
        from PIL import Image

        return Image.fromarray(in_child("image", path))
    return read_picture(path)


def load_audio(path: str | Path, sampling_rate: int = 16_000) -> np.ndarray:
    """Mono float32 waveform (samples,) in [-1, 1] at `sampling_rate` Hz; channels are averaged.

    WAV, FLAC, Ogg and their like are decoded by libsndfile; MP3, M4A, the sound track of a video and the rest by FFmpeg.
    """
    return in_child("audio", path, sampling_rate) if is_isolated() else read_sound(path, sampling_rate)


def load_video(path: str | Path, n_frames: int) -> np.ndarray:
    """Frames uint8 (n_frames, height, width, 3): RGB, upright, evenly spaced from the first to the last.

    They are the frames `np.linspace(0, n - 1, n_frames)`, rounded down, of the n that can be decoded: frames are
    counted, not times, and a short video repeats some. FFmpeg decodes videos, Pillow animated GIF, WebP and PNG;
    a still image is a video of one frame. A file that is cut short is refused where that shows: where a packet is
    incomplete, or cannot be decoded.
    """
    if is_isolated():
        return in_child("video", path, n_frames)
    try:
        return read_animation(path, n_frames)
    except NoPictureError:
        return read_video(path, n_frames)


def video_frames(video: Any, n_frames: int) -> np.ndarray:
    """The frames that `load_video` gives, of a file or of uint8 frames in memory (any number, height, width, 3)."""
    if isinstance(video, (str, Path)):
        return load_video(video, n_frames)
    frames = np.asarray(video)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise MediaError(
            f"a video of shape {frames.shape} and type {frames.dtype}; give uint8 frames (frames, height, width, 3)"
        )
    return frames[spaced(len(frames), n_frames)]


def load_points(path: str | Path) -> np.ndarray:
    """Point cloud as float32 (points, 3): x, y, z; or, where the file has colours, (points, 6): also red, green, blue in 0..1.

    .npy: one array of 3 or 6 columns. .npz: one such array under any name, or `points` (or `xyz`) with `colors` (or
    `rgb`), and nothing else. .ply, ASCII or binary: the vertices' x, y, z and red, green, blue; their alpha, normals and
    further properties, faces and other elements are left unread. Colours stored as whole numbers, or that reach 2 and
    more, count as 0..255. At most MAX_POINTS points and MAX_POINT_FILE_BYTES; nothing is unpickled. Raises MediaError.
    """
    return in_child("point", path) if is_isolated() else read_points(path)

"""What a medium may be: its limits, how its file is opened, and how a decoder's failure is told.

The limits are generous, for a user's own files: a medium at a limit takes about 1 GB. A program that reads strangers' files
assigns smaller ones, or decodes in a child process (`modalloy.senses.media.child`).
"""

import os
import stat
import struct
import tokenize
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from zipfile import BadZipFile

from modalloy.errors import MediaError, plain

MAX_FILE_BYTES = 8_000_000_000
MAX_PICTURE_BYTES = 250_000_000
MAX_PIXELS = 50_000_000  # of a picture
MAX_WEBP_PIXELS = 40_000_000  # whose decoder holds the picture three times
MAX_SIDE = 65_535  # pixels of a picture in a row or a column
MAX_SCANS = 1000  # of a JPEG, each of which goes over the whole picture
MAX_FRAME_PIXELS = 16_777_216  # of one frame of a video or an animation
MAX_ANIMATION_PIXELS = 500_000_000  # of all frames of an animated picture: 240 frames of 1080p
MAX_VIDEO_PIXELS = 20_000_000_000  # of all frames of a video: five minutes of 1080p at 30 frames a second
MAX_SECONDS = 3600  # of a sound or a video
MAX_FRAMES = 500_000
MAX_SAMPLES = 172_800_000  # of a sound, per channel: an hour at 48 kHz
MAX_CHANNELS = 32
MAX_POINTS = 10_000_000
MAX_POINT_FILE_BYTES = 500_000_000  # of the file of a point cloud, and of all that an .npz unpacks to

# what decoders raise at damaged files, besides errors of their own; caught around their calls only
DAMAGE: tuple[type[Exception], ...] = (
    *(OSError, EOFError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError),
    *(RuntimeError, MemoryError, BufferError, SyntaxError, struct.error, zlib.error, tokenize.TokenError, BadZipFile),
)


@contextmanager
def opened(path: str | Path, limit: int | None = None) -> Iterator[BinaryIO]:
    """A regular file of at most `limit` bytes (None: MAX_FILE_BYTES), opened for reading; no pipe, device or folder."""
    limit = MAX_FILE_BYTES if limit is None else limit
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
            raise MediaError(f"{plain(path)}: is {kind}, not a file; check the path")
        if status.st_size > limit:
            raise MediaError(
                f"{plain(path)}: has {status.st_size} bytes, more than the limit of {limit}; give a smaller file"
            )
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MediaError(f"{plain(path)}: no such file; check the path") from error
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = error.strerror if isinstance(error, OSError) else error
        raise MediaError(f"{plain(path)}: cannot be opened ({reason}); check the path") from error
    with file:
        yield file


@contextmanager
def decoding(path: str | Path, kind: str, remedy: str, *more: type[Exception]) -> Iterator[None]:
    """Around a decoder's calls: what it raises at a damaged file (DAMAGE, and `more`) is a MediaError that names the file."""
    try:
        yield
    except (*DAMAGE, *more) as error:
        raise MediaError(f"{plain(path)}: not a {kind} ({reason(error)}); {remedy}") from error


def reason(error: Exception) -> str:
    """What a decoder says, in one short line."""
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    return plain(error) or type(error).__name__


def check_pixels(path: str | Path, width: int, height: int, limit: int | None = None) -> None:
    """Refuse a picture of more than `limit` pixels (None: MAX_PIXELS), or with a side of more than MAX_SIDE."""
    limit = MAX_PIXELS if limit is None else limit
    if width * height > limit:
        raise MediaError(
            f"{plain(path)}: has {width} × {height} pixels, more than the limit of {limit}; give a smaller picture"
        )
    if max(width, height) > MAX_SIDE:
        raise MediaError(
            f"{plain(path)}: has {width} × {height} pixels, more than {MAX_SIDE} on a side; give a smaller picture"
        )


def check_frames(path: str | Path, count: int, pixels: int, limit: int) -> None:
    """Refuse more than MAX_FRAMES frames, or frames that have more than `limit` pixels in all."""
    if count > MAX_FRAMES:
        raise MediaError(f"{plain(path)}: has more frames than the limit of {MAX_FRAMES}; give a shorter part")
    if pixels > limit:
        raise MediaError(
            f"{plain(path)}: its frames have more than {limit} pixels in all; give a shorter part, or smaller frames"
        )


def check_seconds(path: str | Path, seconds: float) -> None:
    """Refuse what lasts longer than MAX_SECONDS."""
    if seconds > MAX_SECONDS:
        raise MediaError(
            f"{plain(path)}: lasts {seconds:.0f} s, more than the limit of {MAX_SECONDS} s; give a shorter part"
        )


def check_samples(path: str | Path, samples: int, channels: int) -> None:
    """Refuse a sound of more than MAX_SAMPLES samples, or of more than MAX_CHANNELS channels."""
    if samples > MAX_SAMPLES:
        raise MediaError(f"{plain(path)}: has more than {MAX_SAMPLES} samples; give a shorter part, or a lower rate")
    if channels > MAX_CHANNELS:
        raise MediaError(f"{plain(path)}: has {channels} channels, more than {MAX_CHANNELS}; mix them down")

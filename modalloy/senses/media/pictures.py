"""Pictures and animations, decoded by Pillow: only by decoders of its own that start no program and open no other file."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from modalloy.errors import MediaError, plain
from modalloy.senses.media import limits
from modalloy.senses.media.jpeg import check_scans
from modalloy.senses.media.limits import decoding, opened
from modalloy.senses.media.png import check_rows

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
ANIMATED = ("GIF", "PNG", "WEBP")  # the formats whose further pictures are frames, not pages, layers or previews
KIND, REMEDY = "readable image", "give a PNG, JPEG, WebP, GIF, BMP or TIFF file"
TILE_WIDTH, TILE_LENGTH = 322, 323  # tags of a TIFF
SCAN = b"\xff\xda"  # begins a scan of a JPEG, and stands nowhere inside one
CHECKS = {"PNG": check_rows, "JPEG": check_scans, "MPO": check_scans}  # of formats that Pillow would fill up


class NoPictureError(MediaError):
    """The file is of none of the formats."""


def read_picture(path: str | Path) -> "Image":
    """RGB image, upright, on white: see `modalloy.senses.media.load_image`."""
    with _picture(path) as image:
        from PIL import ImageOps

        limit = limits.MAX_WEBP_PIXELS if image.format == "WEBP" else limits.MAX_PIXELS
        limits.check_pixels(path, image.width, image.height, limit)
        _check_whole(path, image)
        with decoding(path, KIND, REMEDY):
            ImageOps.exif_transpose(image, in_place=True)  # decodes
            return _rgb(image, image.format)


def read_animation(path: str | Path, n_frames: int) -> np.ndarray:
    """Frames uint8 (n_frames, height, width, 3) of an animated picture; a still one is one frame.

    Raises:
        NoPictureError: it is none.
        MediaError: it cannot be read, or is too large.
    """
    with _picture(path) as image:
        from PIL import ImageOps

        limits.check_pixels(path, image.width, image.height, limits.MAX_FRAME_PIXELS)
        with decoding(path, KIND, REMEDY):
            count: int = image.n_frames if image.format in ANIMATED else 1
        pixels = image.width * image.height
        limits.check_frames(path, count, count * pixels, limits.MAX_ANIMATION_PIXELS)
        _check_whole(path, image)
        first = int(getattr(image, "default_image", False))  # a PNG's picture for programs that cannot animate
        wanted = [first + index for index in spaced(count - first, n_frames)]
        result: np.ndarray | None = None
        total = 0
        for index in range(max(wanted) + 1):
            with decoding(path, KIND, REMEDY):
                image.seek(index)
            limits.check_pixels(path, image.width, image.height, limits.MAX_FRAME_PIXELS)
            total += image.width * image.height
            limits.check_frames(path, index, total, limits.MAX_ANIMATION_PIXELS)
            if index in wanted:
                with decoding(path, KIND, REMEDY):
                    frame = np.asarray(_rgb(ImageOps.exif_transpose(image), image.format))
                result = np.empty((n_frames, *frame.shape), np.uint8) if result is None else result
                if frame.shape != result.shape[1:]:
                    raise MediaError(f"{plain(path)}: the frames change their size; write it again")
                result[[place for place, one in enumerate(wanted) if one == index]] = frame
    assert result is not None
    return result


def spaced(count: int, n_frames: int) -> list[int]:
    """`n_frames` places among `count`, evenly spaced from the first to the last."""
    return [int(index) for index in np.linspace(0, count - 1, n_frames).astype(int)]


@contextmanager
def _picture(path: str | Path) -> Iterator[Any]:
    """The file as Pillow opens it, before pixels are decoded."""
    from PIL import Image

    with opened(path, limits.MAX_PICTURE_BYTES) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the limits are ours, and damage is an error
        _check_scans(path, file)
        try:
            with _recognised(path, file) as image:
                _check_tiles(path, image)
                yield image
        except Image.DecompressionBombError as error:
            raise MediaError(
                f"{plain(path)}: has more pixels than the limit of {limits.MAX_PIXELS}; give a smaller picture"
            ) from error


def _recognised(path: str | Path, file: BinaryIO) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with decoding(path, KIND, REMEDY):
            return Image.open(file, formats=FORMATS)
    except MediaError as error:
        if isinstance(error.__cause__, UnidentifiedImageError):
            raise NoPictureError(f"{plain(path)}: not a {KIND} (of an unknown format); {REMEDY}") from error
        raise


def _check_scans(path: str | Path, file: BinaryIO) -> None:
    """Refuse a JPEG of many scans: each takes a few bytes, and time for the whole picture."""
    if file.read(2) == b"\xff\xd8":
        scans = 0
        while block := file.read(1 << 24):
            scans += block.count(SCAN)
        if scans > limits.MAX_SCANS:
            raise MediaError(f"{plain(path)}: has {scans} scans, more than {limits.MAX_SCANS}; write it again")
    file.seek(0)


def _check_tiles(path: str | Path, image: Any) -> None:
    """Refuse a TIFF whose tiles are larger than a picture may be: each is unpacked whole."""
    if image.format == "TIFF":
        with decoding(path, KIND, REMEDY):
            width, height = int(image.tag_v2.get(TILE_WIDTH, 0)), int(image.tag_v2.get(TILE_LENGTH, 0))
        limits.check_pixels(path, width, height)


def _check_whole(path: str | Path, image: Any) -> None:
    """Refuse a picture that ends early, which Pillow would fill up. The file stands where it stood."""
    if check := CHECKS.get(image.format):
        place = image.fp.tell()
        with decoding(path, KIND, REMEDY):
            check(image.fp)
        image.fp.seek(place)


def _rgb(image: "Image", file_format: str | None) -> "Image":
    """A decoded picture as RGB; transparency is laid over white."""
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM")):
        # 16 bits of grey, which convert() would clip to white
        image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit numbers of unknown range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        image = white
    return image.convert("RGB")

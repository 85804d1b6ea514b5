"""The media that a page holds: only files of the run's own folders, and only what decodes as what it should be."""

import base64
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from modalloy.errors import MediaError
from modalloy.evals.files import OUTSIDE, leads_out, read_bytes
from modalloy.senses import media

MAX_MEDIUM_BYTES = 300_000  # of one medium's file that is embedded
MAX_MEDIA_BYTES = 20_000_000  # of all of them
SHOWN_POINTS = 2048
# what browsers play or draw, by the file's ending
TYPES = {
    **{".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"},
    **{".gif": "image/gif", ".bmp": "image/bmp"},
    **{".wav": "audio/wav", ".flac": "audio/flac", ".mp3": "audio/mpeg", ".ogg": "audio/ogg", ".m4a": "audio/mp4"},
    **{".mp4": "video/mp4", ".webm": "video/webm"},
}
DECODERS: dict[str, Callable[[str], Any]] = {
    "image": media.load_image,
    "audio": media.load_audio,
    "video": partial(media.load_video, n_frames=1),
}


class Shelf:
    """The media that the page holds, each once; and why others are not there.

    `folders` are where media may lie (None: anywhere). A file is embedded only if it is what its ending says: it is
    decoded first.
    """

    def __init__(self, folders: Sequence[str] | None = None) -> None:
        self.folders = folders
        self.items: list[dict[str, Any]] = []
        self.places: dict[tuple[str, str], int] = {}
        self.missing: dict[tuple[str, str], str] = {}
        self.bytes = 0

    def place(self, modality: str, path: str) -> int | None:
        """Where in `items` the medium is; None if it is among the `missing`."""
        key = (modality, path)
        if key not in self.places and key not in self.missing:
            try:
                item = self._item(modality, path)
            except MediaError as error:
                self.missing[key] = " ".join(str(error).removeprefix(f"{path}: ").split())
            else:
                self.places[key] = len(self.items)
                self.items.append(item)
        return self.places.get(key)

    def _item(self, modality: str, path: str) -> dict[str, Any]:
        if self.folders is not None and leads_out(path, self.folders):
            raise MediaError(OUTSIDE)
        if not os.path.isfile(path):
            raise MediaError("no such file")
        ending = Path(path).suffix.lower()
        if media.ENDINGS.get(ending) == "point":
            raw, item = _cloud(path)
            return item | {"data": self._base64(raw)}
        if ending not in TYPES:
            raise MediaError(f"browsers do not show {ending or 'files without an ending'}")
        size = os.path.getsize(path)
        if size > MAX_MEDIUM_BYTES:
            raise MediaError(f"{size / 1000:,.0f} kB, more than the {MAX_MEDIUM_BYTES // 1000} kB that are embedded")
        raw = read_bytes(Path(path), MAX_MEDIUM_BYTES)
        DECODERS[TYPES[ending].partition("/")[0]](path)
        return {"type": TYPES[ending], "data": self._base64(raw)}

    def _base64(self, raw: bytes) -> str:
        if self.bytes + len(raw) > MAX_MEDIA_BYTES:
            raise MediaError(f"the page's {MAX_MEDIA_BYTES // 1_000_000} MB of media are full")
        self.bytes += len(raw)
        return base64.b64encode(raw).decode()


def _cloud(path: str) -> tuple[bytes, dict[str, Any]]:
    """At most SHOWN_POINTS points, evenly spaced over the file: x, y, z as int16, then red, green, blue as uint8 if there are."""
    cloud = media.load_points(path)
    cloud = cloud[np.linspace(0, len(cloud) - 1, min(len(cloud), SHOWN_POINTS)).astype(int)]
    xyz = cloud[:, :3] - (cloud[:, :3].min(0) + cloud[:, :3].max(0)) / 2
    size = float(np.linalg.norm(xyz, axis=1).max()) or 1.0
    raw = np.round(xyz / size * 32767).astype("<i2").tobytes()
    coloured = cloud.shape[1] == 6 and bool(np.ptp(cloud[:, 3:], axis=0).any())
    if coloured:
        raw += np.round(cloud[:, 3:].clip(0, 1) * 255).astype(np.uint8).tobytes()
    return raw, {"type": "points", "n": len(cloud), "coloured": coloured}

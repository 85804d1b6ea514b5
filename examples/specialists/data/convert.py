"""Turns one source file into one file of the data set. Nothing here knows about packages or concepts.

Images: RGB, 224 px, on a white square, WebP. Sounds: 16 kHz, mono, at most 8 s, peak 0.8, FLAC. Videos: 16 frames,
128 px, animated WebP. Point clouds: (2048, 3) float16 on the mesh's surface, NumPy.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import meshes
import numpy as np
import resvg_py
import soundfile
import tinysoundfont
from numpy.typing import NDArray
from PIL import Image
from scipy.signal import resample_poly

IMAGE_PX = 224
VIDEO_PX = 128
VIDEO_FRAMES = 16
VIDEO_FRAME_MS = 100
SAMPLE_RATE = 16000
SOUND_SECONDS = 8
SOUND_PEAK = 0.8
POINTS = 2048

_SYNTH_RATE = 44100
_SYNTH_CHORD = (60, 64, 67)  # C major, one note after the other
_SYNTH_NOTE_SAMPLES = 30000
_SYNTH_VELOCITY = 110


def image_file(path: Path) -> bytes:
    """WebP of a picture or of a rendered SVG."""
    if path.suffix == ".svg":
        png = bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=IMAGE_PX, skip_system_fonts=True))
        picture: Image.Image = Image.open(io.BytesIO(png))
    else:
        picture = Image.open(path)
    buffer = io.BytesIO()
    on_white_square(picture, IMAGE_PX).save(buffer, format="WEBP", quality=90)
    return buffer.getvalue()


def on_white_square(picture: Image.Image, side_px: int) -> Image.Image:
    """The picture, shrunk to fit if need be (never enlarged), in the middle of a white RGB square."""
    layer = picture.convert("RGBA")
    layer.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (side_px, side_px), "white")
    square.alpha_composite(layer, ((side_px - layer.width) // 2, (side_px - layer.height) // 2))
    return square.convert("RGB")


def video_file(path: Path) -> bytes:
    """Animated WebP of frames taken at even steps from an animated picture, its first and last included."""
    with Image.open(path) as animation:
        frame_count = getattr(animation, "n_frames", 1)
        if frame_count < 2:
            raise ValueError("not an animation: it has a single frame")
        frames = []
        for number in np.linspace(0, frame_count - 1, VIDEO_FRAMES).astype(int):
            animation.seek(int(number))
            frames.append(on_white_square(animation, VIDEO_PX))
    buffer = io.BytesIO()
    frames[0].save(buffer, format="WEBP", save_all=True, append_images=frames[1:], duration=VIDEO_FRAME_MS, quality=80)
    return buffer.getvalue()


def sound_file(path: Path) -> bytes:
    """FLAC of the first seconds of a recording."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return encode_sound(samples.mean(axis=1), rate)


def synthesised_sound(soundfont: Path, program: int) -> bytes:
    """FLAC of three notes played by one General MIDI instrument of a soundfont."""
    synth = tinysoundfont.Synth(samplerate=_SYNTH_RATE)
    synth.program_select(0, synth.sfload(str(soundfont)), 0, program)
    notes = []
    for key in _SYNTH_CHORD:
        synth.noteon(0, key, _SYNTH_VELOCITY)
        stereo = np.frombuffer(bytes(synth.generate(_SYNTH_NOTE_SAMPLES)), np.float32).reshape(-1, 2)
        notes.append(stereo.mean(axis=1))
        synth.noteoff(0, key)
    return encode_sound(np.concatenate(notes), _SYNTH_RATE)


def encode_sound(samples: NDArray[np.float32], rate: int) -> bytes:
    """FLAC of mono samples: cut, resampled to 16 kHz, scaled to the common peak."""
    samples = samples[: rate * SOUND_SECONDS]
    if len(samples) == 0:
        raise ValueError("the recording is empty")
    if rate != SAMPLE_RATE:
        samples = resample_poly(samples, SAMPLE_RATE, rate)
    # the small constant keeps silence silent
    scaled = samples / (np.abs(samples).max() + 1e-6) * SOUND_PEAK
    buffer = io.BytesIO()
    soundfile.write(buffer, scaled.astype(np.float32), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def _reads_text(reader: Callable[[str], meshes.Mesh]) -> Callable[[bytes], meshes.Mesh]:
    # names and comments come in several encodings, the numbers are always ASCII
    return lambda content: reader(content.decode("latin-1"))


_MESH_READERS: dict[str, Callable[[bytes], meshes.Mesh]] = {
    ".obj": _reads_text(meshes.read_obj),
    ".txt": _reads_text(meshes.read_ms3d_ascii),
    ".ac": _reads_text(meshes.read_ac3d),
    ".3d": _reads_text(meshes.read_v3d),
    ".dae": _reads_text(meshes.read_collada),
    ".pmd": meshes.read_pmd,
}


def point_file(path: Path, z_up: bool) -> bytes:
    """NumPy file of points on a mesh's surface, y up."""
    reader = _MESH_READERS.get(path.suffix)
    if reader is None:
        raise ValueError(f"no reader for {path.suffix!r} meshes, only for {', '.join(_MESH_READERS)}")
    mesh = reader(path.read_bytes())
    if z_up:
        mesh = meshes.z_up_to_y_up(mesh)
    buffer = io.BytesIO()
    np.save(buffer, meshes.sample_points(mesh, POINTS).astype(np.float16))
    return buffer.getvalue()

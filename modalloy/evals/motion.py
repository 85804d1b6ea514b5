"""Moving pictures made of stills: the movement, not what is shown, is what a question asks for.

A still is drawn on white, smaller than the frame, and one movement carries it through the frames. Where it starts, how far
and how fast it goes and how large it is are drawn from the seed, so no single frame tells the movement.
"""

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

MOTIONS = {  # name → answer to "How does it move?"
    "left": "to the left",
    "right": "to the right",
    "up": "upwards",
    "down": "downwards",
    "turning": "it turns",
    "growing": "it grows",
    "shrinking": "it shrinks",
    "shaking": "it shakes",
    "still": "not at all",
}
FRAMES = 16
SIDE = 128  # pixels
_HEADING = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def move(
    picture: "Image.Image | NDArray[np.uint8]", motion: str, seed: int, frames: int = FRAMES, side: int = SIDE
) -> NDArray[np.uint8]:
    """Frames (frames, side, side, 3), uint8, of `picture` under one of `MOTIONS`; the same seed gives the same frames.

    Args:
        picture: an RGB picture, or uint8 (height, width, 3), on a white ground.
        motion: a key of `MOTIONS`; KeyError for another.
        seed: draws size, place, extent, sense of rotation and tempo.
        frames: how many, at even steps of time.
        side: width and height of a frame in pixels.
    """
    from PIL import Image

    MOTIONS[motion]  # an unknown name fails before any work
    rng = np.random.default_rng(seed)
    still = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    still = still.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
    size = rng.uniform(0.5, 0.7)  # of the frame
    far = rng.uniform(0.16, 0.24)  # half the way of a shift, in frames
    aside = rng.uniform(-0.08, 0.08, 2)
    turn, sense = rng.uniform(90, 330), rng.choice([-1, 1])  # degrees in all
    swell, tempo, phase = rng.uniform(1.5, 2.2), rng.uniform(1.2, 2.2), rng.uniform(0, 2 * math.pi)
    shown = []
    for time in np.linspace(-1, 1, frames):
        scale, angle, (x, y) = size, 0.0, aside
        if motion in _HEADING:
            x, y = x + far * time * _HEADING[motion][0], y + far * time * _HEADING[motion][1]
        elif motion == "turning":
            angle = math.radians(turn / 2 * sense * time)
        elif motion in ("growing", "shrinking"):
            scale = size * swell ** (time / 2 if motion == "growing" else -time / 2)
        elif motion == "shaking":
            wave = math.sin(math.pi * tempo * (time + 1) + phase)
            x, angle = x + 0.06 * wave, math.radians(10 * sense * wave)
        shown.append(_placed(still, side, scale, angle, x * side, y * side))
    return np.stack(shown)


def _placed(still: "Image.Image", side: int, scale: float, angle: float, x: float, y: float) -> NDArray[np.uint8]:
    """One frame: the still at `scale` of the frame, turned by `angle` (radians), its middle at (x, y) from the frame's."""
    from PIL import Image

    cos, sin, middle = math.cos(angle) / scale, math.sin(angle) / scale, side / 2
    back = (  # from a place in the frame to one in the still
        cos, sin, middle - cos * (middle + x) - sin * (middle + y),
        -sin, cos, middle + sin * (middle + x) - cos * (middle + y),
    )  # fmt: skip
    frame = still.transform(still.size, Image.Transform.AFFINE, back, Image.Resampling.BICUBIC, fillcolor=(255,) * 3)
    return np.asarray(frame)

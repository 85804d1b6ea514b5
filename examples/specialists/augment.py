"""Training views of a clip: the medium as it is, and changed copies of it. Augmentation never adds to a test set."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soxr
from PIL import Image, ImageEnhance

from modalloy.evals.motion import move
from modalloy.senses.encoders.depth_views import rotation
from modalloy.senses.media import load_audio, load_image, load_points


def image_view(path: Path, view: int, rng: np.random.Generator) -> Image.Image:
    """View 0 is the picture itself; others are flipped, turned, cropped or shrunk, and changed in colour."""
    image = load_image(path)
    return image if view == 0 else changed(image, rng)


def changed(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The picture flipped, turned, cropped or shrunk, and changed in colour; the same seed makes the same change."""
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    background = (255, 255, 255) if rng.random() < 0.6 else tuple(int(c) for c in rng.integers(0, 256, 3))
    image = image.rotate(float(rng.uniform(-25, 25)), Image.Resampling.BICUBIC, fillcolor=background)
    width, height = image.size
    side = max(width, height)
    scale = float(rng.uniform(0.75, 1.5))  # below 1 cuts into the picture, above 1 shows it smaller
    span = int(side * scale)
    left, top = (int(rng.uniform(-0.15, 0.15) * span) + (extent - span) // 2 for extent in (width, height))
    canvas = Image.new("RGB", (span, span), background)
    canvas.paste(image, (-left, -top))
    for enhance in (ImageEnhance.Color, ImageEnhance.Brightness, ImageEnhance.Contrast):
        canvas = enhance(canvas).enhance(float(rng.uniform(0.6, 1.4)))
    return canvas.convert("L").convert("RGB") if rng.random() < 0.1 else canvas


def speech_view(path: Path, rng: np.random.Generator, sampling_rate: int = 16_000) -> np.ndarray:
    """The recording itself, or as often a little faster or slower, filtered, and with noise."""
    samples = load_audio(path, sampling_rate)
    if rng.random() < 0.5:
        return samples
    speed = float(2 ** rng.uniform(-0.15, 0.15))
    samples = soxr.resample(samples, sampling_rate, sampling_rate / speed)
    spectrum = np.fft.rfft(samples)
    tilt = np.linspace(0, float(rng.uniform(-12, 12)), len(spectrum))  # decibels
    if rng.random() < 0.3:  # as a telephone
        tilt[len(tilt) // 2 :] = -60
    samples = np.fft.irfft(spectrum * 10 ** (tilt / 20), len(samples))
    noise = 10 ** float(rng.uniform(-4, -2))
    samples = samples / (np.abs(samples).max() + 1e-9) * 0.8 + rng.normal(0, noise, len(samples))
    return samples.astype(np.float32)


def moving_view(path: Path, rng: np.random.Generator, motion: str) -> np.ndarray:
    """The picture, changed as `image_view` changes it every other time, and moved."""
    image = image_view(path, int(rng.integers(2)), rng)
    return move(image, motion, int(rng.integers(2**31)))


def point_view(path: Path, view: int, rng: np.random.Generator) -> np.ndarray:
    """View 0 is the cloud itself; others are turned, mirrored, stretched, thinned and shaken."""
    points = load_points(path)[:, :3]
    if view == 0:
        return points
    around = rng.uniform(-180, 180) if rng.random() < 0.4 else rng.uniform(-25, 25)
    points = points @ rotation(around, rng.uniform(-12, 12)).numpy().T
    points = points * rng.uniform(0.8, 1.25, 3) * [rng.choice([-1, 1]), 1, 1]
    points = rng.permutation(points)[: int(rng.uniform(0.5, 1) * len(points))]
    return (points + rng.normal(0, rng.uniform(0, 0.015), points.shape)).astype(np.float32)


# (file, view, generator, motion) → what the encoder's `preprocess` takes
VIEW: dict[str, Callable[[Path, int, np.random.Generator, str], Any]] = {
    "image": lambda path, view, rng, motion: image_view(path, view, rng),
    "audio": lambda path, view, rng, motion: speech_view(path, rng),
    "video": lambda path, view, rng, motion: moving_view(path, rng, motion),
    "point": lambda path, view, rng, motion: point_view(path, view, rng),
}

"""A fifth sense in one file: recordings of a motion sensor (a watch, a phone), heard by their spectrum.

Everything that modalloy asks of an encoder is here. The entry point in pyproject.toml makes it known by name.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modalloy.encoders import Encoder
from modalloy.errors import MediaError

RATE = 50  # samples a second
CHANNELS = 6  # acceleration along three axes in g, turning about three axes in rad/s


class MotionSpectrum(Encoder):
    """`preprocess(file or array)` → (seconds · 50, 6); `forward((media, seconds · 50, 6))` → (media, seconds, dim)."""

    modality = "motion"

    def __init__(self, *, seconds: int = 4, bands: int = 10) -> None:
        super().__init__()
        self.n_tokens = seconds
        self.bands = bands  # of 1 Hz
        self.dim = CHANNELS * (bands + 1)

    def preprocess(self, recording: Any) -> Tensor:
        """A .npy file or an array (samples, 6) at 50 Hz; a shorter recording repeats, of a longer one the beginning counts."""
        name = f"{recording}: " if isinstance(recording, (str, Path)) else ""
        try:
            samples = np.load(recording, allow_pickle=False) if name else np.asarray(recording)
        except (OSError, ValueError, EOFError) as error:
            raise MediaError(f"{name}not a readable recording; give a .npy file of numbers") from error
        if samples.ndim != 2 or samples.shape[1] != CHANNELS or not len(samples):
            raise MediaError(f"{name}a recording has the shape (samples, {CHANNELS}), not {samples.shape}; convert it")
        if samples.dtype.kind not in "iuf" or not np.isfinite(samples).all():
            raise MediaError(f"{name}the recording holds other values than finite numbers; clean it")
        return torch.from_numpy(np.resize(samples.astype(np.float32), (self.n_tokens * RATE, CHANNELS)))

    def forward(self, recordings: Tensor) -> Tensor:
        seconds = recordings.unflatten(1, (self.n_tokens, RATE))  # (media, seconds, 50, 6)
        spectrum = torch.fft.rfft(seconds, dim=2, norm="forward").abs()  # mean, 1 Hz, 2 Hz, …
        return spectrum[:, :, : self.bands + 1].log1p().flatten(2)

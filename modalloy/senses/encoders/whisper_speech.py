"""The encoder of Whisper-tiny.en as an ear for speech: its last layer, a feature every 40 ms.

Its last layer tells words apart across voices, and little else; `whisper_tiny` keeps all layers, for sounds. What is said is
read by a projector that looks at all features (a Q-Former), so silence after it does no harm, and nothing is repeated.
"""

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from modalloy.errors import MediaError, plain
from modalloy.senses.encoders.whisper_tiny import FRAMES_PER_SECOND, WIDTH, WhisperTiny

SECONDS = 5
FRAMES_PER_FEATURE = 2
EDGE = 1600  # samples (100 ms) kept before and after what is heard
QUIET = 0.02  # of the largest sample: anything below is silence at the ends


class WhisperSpeech(WhisperTiny):
    """`preprocess(file or 16 kHz waveform)` → (80, 500) log-mel; `forward((batch, 80, 500))` → (batch, 125, 384)."""

    dim = WIDTH
    n_tokens = SECONDS * FRAMES_PER_SECOND // FRAMES_PER_FEATURE
    seconds = SECONDS

    def preprocess(self, sound: Any) -> Tensor:
        """A file name or mono 16 kHz waveform (samples,) as log-mel frames (80, 500), without the silence around it.

        Raises:
            MediaError: it is unreadable or silent, or says more than 5 s.
        """
        name = plain(sound) if isinstance(sound, (str, Path)) else "the sound"
        samples, window = spoken(self.samples(sound), name), self.seconds * self.sampling_rate
        if len(samples) > window:
            raise MediaError(
                f"{name}: {len(samples) / self.sampling_rate:.1f} s of speech; this model hears {self.seconds} s at once: say "
                "less, or cut it"
            )
        return self.frames(np.pad(samples, (0, window - len(samples))))

    def forward(self, mel: Tensor) -> Tensor:
        frames = self.encoder(mel).last_hidden_state
        features: Tensor = frames.unflatten(1, (self.n_tokens, FRAMES_PER_FEATURE)).mean(2)
        return features


def spoken(samples: np.ndarray, name: str) -> np.ndarray:
    """The samples without the silence before and after, at a level of one half.

    Raises:
        MediaError: there is nothing else; `name` is what it calls the sound.
    """
    loudness = np.abs(samples)
    peak = float(loudness.max(initial=0.0))
    if peak < 1e-4:
        raise MediaError(f"{name}: silent; nothing is said in it")
    heard = np.flatnonzero(loudness > QUIET * peak)
    first, last = max(0, int(heard[0]) - EDGE), int(heard[-1]) + EDGE
    return (samples[first:last] * (0.5 / peak)).astype(np.float32)

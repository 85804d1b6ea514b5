"""BEATs (iter3+, AudioSet-2M, 90 M parameters) as an audio encoder: 512 features of about ten seconds of sound.

Each feature is a patch of 160 ms × 16 mel bands; patches are ordered by time, then by band. The layout is that of the
published `BEATs_iter3_plus_AS2M.pt`: {"cfg", "model"}. Chen et al., "BEATs: Audio Pre-Training with Acoustic
Tokenizers", arXiv 2212.09058, github.com/microsoft/unilm; sounds are prepared as ModelCompose (arXiv 2402.12750) does.
"""

import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modalloy.errors import CheckpointError, MediaError, RecipeError, shown
from modalloy.linalg import all_finite
from modalloy.senses.encoders import Encoder
from modalloy.senses.media import load_audio
from modalloy.storage.pickled import unpickle

SAMPLING_RATE = 16_000
FRAME, SHIFT, FFT = 400, 160, 512  # samples: 25 ms every 10 ms, zero-padded for the transform
FRAMES, MELS = 1024, 128  # 10.24 s
LOW_HZ, HIGH_HZ = 20.0, 8000.0
PREEMPHASIS = 0.97
SAMPLE_SCALE = 2**15  # Kaldi's samples are 16-bit integers
MEAN, SPREAD = 15.41663, 2 * 6.55582  # of the log-mel energies of AudioSet

FILE = "BEATs_iter3_plus_AS2M.pt"
# the file's cfg: what it leaves out and is not REQUIRED has the same default in the authors' class
SETTINGS = {
    "encoder_layers": "layers",
    "encoder_embed_dim": "width",
    "encoder_ffn_embed_dim": "hidden",
    "encoder_attention_heads": "heads",
    "embed_dim": "patch_width",
    "input_patch_size": "patch",
    "conv_pos": "kernel",
    "conv_pos_groups": "groups",
    "num_buckets": "buckets",
    "max_distance": "max_distance",
}
ARCHITECTURE = {
    "activation_fn": "gelu",
    "conv_bias": False,
    "layer_norm_first": False,
    "deep_norm": True,
    "relative_position_embedding": True,
    "gru_rel_pos": True,
}
REQUIRED = {"input_patch_size", "max_distance", "deep_norm", "relative_position_embedding", "gru_rel_pos"}
UNUSED = ("predictor.weight", "predictor.bias")  # AudioSet's classes, in the fine-tuned files
CONVOLUTION = "encoder.pos_conv.0.weight"
TABLE = "encoder.relative_attention_bias.weight"
LAYER_TABLE = re.compile(r"encoder\.layers\.\d+\.self_attn\.relative_attention_bias\.weight")


class Beats(Encoder):
    """`preprocess(file or 16 kHz waveform)` → (1024, 128) log-mel; `forward((batch, 1024, 128))` → (batch, 512, 768)."""

    modality = "audio"
    sampling_rate = SAMPLING_RATE

    def __init__(
        self,
        *,
        layers: int = 12,
        width: int = 768,
        hidden: int = 3072,
        heads: int = 12,
        patch: int = 16,
        patch_width: int = 512,
        kernel: int = 128,
        groups: int = 16,
        buckets: int = 320,
        max_distance: int = 800,
    ) -> None:
        super().__init__()
        for name, parts in (("heads", heads), ("groups", groups)):
            if width % parts:
                raise RecipeError(
                    f"BEATs: {width} features cannot be split among {parts} {name}; give another `{name}`"
                )
        if not 0 < patch <= MELS:
            raise RecipeError(f"BEATs: a patch of {patch} does not fit into {MELS} mel bands; give another `patch`")
        if not 0 < buckets // 4 < max_distance:
            raise RecipeError(
                f"BEATs: {buckets} buckets cannot cover distances up to {max_distance}; give another `buckets`"
            )
        self.dim = width
        self.n_tokens = (FRAMES // patch) * (MELS // patch)
        self.patch_embedding = nn.Conv2d(1, patch_width, patch, stride=patch, bias=False)
        self.layer_norm = nn.LayerNorm(patch_width)
        self.post_extract_proj = nn.Linear(patch_width, width)
        self.encoder = _Transformer(layers, width, hidden, heads, kernel, groups, buckets, max_distance)

    @classmethod
    def settings(cls, location: Path | None) -> dict[str, Any]:
        """The sizes that the file's `cfg` records, which must describe an architecture like that of iter3+."""
        path, _, cfg = _read(location)
        return _sizes(path, cfg)

    @classmethod
    def weights(cls, location: Path | None) -> dict[str, Tensor]:
        """The file's tensors: the positional convolution's norm is folded in, the table that all layers share kept once."""
        path, model, cfg = _read(location)
        with torch.device("meta"):
            known = cls(**_sizes(path, cfg)).state_dict()
        weights = {name: tensor for name, tensor in model.items() if name not in UNUSED}
        tables = {name: weights.pop(name) for name in sorted(weights) if LAYER_TABLE.fullmatch(name)}
        parts = [weights.pop(f"{CONVOLUTION}_{part}", None) for part in "vg"]
        if unknown := sorted(weights.keys() - known.keys()):
            raise CheckpointError(f"{path}: holds {unknown[0]}, which BEATs does not have; give {FILE}")
        for name, table in tables.items():
            if not torch.equal(table, next(iter(tables.values()))):
                raise CheckpointError(f"{path}: {name} is not that of the other layers; download the file again")
            weights[TABLE] = table
        direction, length = parts
        if direction is not None and length is not None:
            norm = torch.linalg.vector_norm(direction, dim=(0, 1), keepdim=True, dtype=torch.float32)  # (1, 1, kernel)
            weights[CONVOLUTION] = (direction * (length / norm)).to(direction.dtype)
            if not all_finite(weights[CONVOLUTION]):
                raise CheckpointError(f"{path}: {CONVOLUTION} has no finite values; download the file again")
        return weights

    def preprocess(self, medium: Any) -> Tensor:
        """A file name or mono 16 kHz waveform (samples,) as normalised log-mel frames (1024, 128).

        Longer sounds are cut to the first 10.255 s, shorter ones are followed by zeros (the mean, once normalised).
        """
        frames = (fbank(_samples(medium)) - MEAN) / SPREAD
        return nn.functional.pad(frames, (0, 0, 0, FRAMES - len(frames))).float()

    def forward(self, batch: Tensor) -> Tensor:
        frames = batch.to(self.patch_embedding.weight.dtype)
        patches = self.patch_embedding(frames.unsqueeze(1)).flatten(2).transpose(1, 2)
        features: Tensor = self.encoder(self.post_extract_proj(self.layer_norm(patches)))
        return features


class _Transformer(nn.Module):
    """(media, n, width) → the same: convolutional positions, then post-norm layers with one table of relative positions."""

    def __init__(
        self,
        layers: int,
        width: int,
        hidden: int,
        heads: int,
        kernel: int,
        groups: int,
        buckets: int,
        max_distance: int,
    ) -> None:
        super().__init__()
        self.buckets, self.max_distance = buckets, max_distance
        self.pos_conv = nn.Sequential(nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=groups))
        self.layer_norm = nn.LayerNorm(width)
        self.relative_attention_bias = nn.Embedding(buckets, heads)
        residual_scale = (2 * layers) ** 0.25  # of DeepNet, arXiv 2203.00555
        self.layers = nn.ModuleList(_Layer(width, hidden, heads, residual_scale) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        x = self.layer_norm(x + nn.functional.gelu(self.pos_conv(x.transpose(1, 2))[..., :n]).transpose(1, 2))
        position = torch.arange(n, device=x.device)
        bucket = relative_bucket(position - position[:, None], self.buckets, self.max_distance)
        bias = self.relative_attention_bias(bucket).permute(2, 0, 1)  # (heads, n, n)
        for layer in self.layers:
            x = layer(x, bias)
        return x


class _Layer(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int, residual_scale: float) -> None:
        super().__init__()
        self.residual_scale = residual_scale
        self.self_attn = _Attention(width, heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = self.self_attn_layer_norm(self.residual_scale * x + self.self_attn(x, bias))
        y: Tensor = self.final_layer_norm(self.residual_scale * x + self.fc2(nn.functional.gelu(self.fc1(x))))
        return y


class _Attention(nn.Module):
    """Self-attention whose relative-position bias is gated by the query, as in WavLM (arXiv 2110.13900, section 3.2)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.grep_linear = nn.Linear(width // heads, 8)
        self.grep_a = nn.Parameter(torch.ones(1, heads, 1, 1))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (media, heads, n, width / heads)
            for projected in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        gates = self.grep_linear(q).unflatten(-1, (2, 4)).sum(-1).sigmoid()
        update, reset = gates.chunk(2, dim=-1)  # (media, heads, n, 1)
        gate = update * (reset * self.grep_a - 1) + 2
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=gate * bias)
        y: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return y


def relative_bucket(offset: Tensor, buckets: int, max_distance: int) -> Tensor:
    """T5's bucket of each offset key − query: half of them for keys ahead; near offsets exactly, far ones by their log."""
    half = buckets // 2
    exact = half // 2
    distance = offset.abs()
    share = torch.log(distance.clamp(min=exact) / exact) / math.log(max_distance / exact)
    far = (exact + (share * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, far) + half * (offset > 0)


def fbank(samples: np.ndarray) -> Tensor:
    """Kaldi's log-mel filterbank of a waveform in [-1, 1]: (at most 1024 frames, 128), float64.

    Frames lie wholly within the sound; each loses its mean, is pre-emphasised and weighted by the "povey" window, as
    torchaudio's `compliance.kaldi.fbank` does by default. The fourth band lies between two frequencies of the transform
    and hears nothing.
    """
    wanted = np.ascontiguousarray(samples[: (FRAMES - 1) * SHIFT + FRAME], np.float64)
    frames = (torch.from_numpy(wanted) * SAMPLE_SCALE).unfold(0, FRAME, SHIFT)
    frames = frames - frames.mean(1, keepdim=True)
    frames = frames - PREEMPHASIS * torch.cat([frames[:, :1], frames[:, :-1]], 1)
    window = torch.hann_window(FRAME, periodic=False, dtype=torch.float64) ** 0.85
    power = torch.fft.rfft(frames * window, FFT).abs() ** 2  # (frames, 257)
    energy = power @ _mel_filters()
    return energy.clamp(min=torch.finfo(torch.float32).eps).log()


@cache
def _mel_filters() -> Tensor:
    """(257, 128) float64: triangles of equal width on the mel scale from 20 to 8000 Hz, which overlap by half."""

    def mel(hertz: Tensor) -> Tensor:
        return 1127 * torch.log1p(hertz / 700)

    low, high = mel(torch.tensor([LOW_HZ, HIGH_HZ], dtype=torch.float64))
    width = (high - low) / (MELS + 1)
    peaks = low + width * torch.arange(1, MELS + 1)
    bins = mel(torch.arange(FFT // 2 + 1, dtype=torch.float64) * SAMPLING_RATE / FFT)
    return (1 - (bins[:, None] - peaks).abs() / width).clamp(min=0)


def _samples(medium: Any) -> np.ndarray:
    """The waveform (samples,) of a file or of what the caller has in memory, checked."""
    if isinstance(medium, (str, Path)):
        samples, name = load_audio(medium, SAMPLING_RATE), str(medium)
    else:
        samples, name = np.asarray(medium), "the waveform"
    if samples.ndim != 1 or samples.dtype.kind != "f":
        raise MediaError(
            f"{name}: is {samples.dtype} of shape {samples.shape}; give a mono waveform (samples,) of floats in [-1, 1]"
        )
    if len(samples) < FRAME:
        raise MediaError(f"{name}: has {len(samples)} samples at 16 kHz; give a sound of at least {FRAME} (25 ms)")
    if not np.isfinite(samples).all():
        raise MediaError(f"{name}: holds NaN or infinite samples; re-encode the sound")
    return samples


def _read(location: Path | None) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """The published file's path (`location`, or the one file of its name there), its tensors and its cfg."""
    if location is None:
        raise CheckpointError(f"the encoder BEATs has no built-in weights; give the path of {FILE} as its `encoder:`")
    path = location / FILE if location.is_dir() else location
    stored = unpickle(path)
    if not isinstance(stored, dict) or not all(isinstance(stored.get(part), dict) for part in ("cfg", "model")):
        raise CheckpointError(f"{path}: does not hold a BEATs' cfg and model; give {FILE}")
    for name, tensor in stored["model"].items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: {name} is no tensor; give {FILE}")
    return path, stored["model"], stored["cfg"]


def _sizes(path: Path, cfg: dict[str, Any]) -> dict[str, Any]:
    for name in sorted(REQUIRED - cfg.keys()):
        raise CheckpointError(f"{path}: its cfg does not record {name}; give {FILE}")
    for name, value in ARCHITECTURE.items():
        if cfg.get(name, value) != value:
            raise CheckpointError(f"{path}: its cfg has {name} = {cfg[name]}, not {value}; give {FILE}")
    for name in sorted(SETTINGS.keys() & cfg.keys()):
        if type(cfg[name]) is not int or cfg[name] < 1:
            raise CheckpointError(f"{path}: its cfg has {name} = {shown(cfg[name])}; download the file again")
    return {ours: cfg[name] for name, ours in SETTINGS.items() if name in cfg}

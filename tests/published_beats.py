"""Small random copies of the published BEATs and of ModelCompose's Q-Former: same keys, same kind of file."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
FILE = "BEATs_iter3_plus_AS2M.pt"
# the cfg stored in the published file
CFG = {
    "encoder_layers": 12,
    "encoder_embed_dim": 768,
    "encoder_ffn_embed_dim": 3072,
    "encoder_attention_heads": 12,
    "activation_fn": "gelu",
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.05,
    "dropout_input": 0.0,
    "layer_norm_first": False,
    "conv_bias": False,
    "conv_pos": 128,
    "conv_pos_groups": 16,
    "relative_position_embedding": True,
    "num_buckets": 320,
    "max_distance": 800,
    "gru_rel_pos": True,
    "deep_norm": True,
    "input_patch_size": 16,
    "layer_wise_gradient_decay_ratio": 0.6,
    "embed_dim": 512,
    "finetuned_model": False,
    "predictor_dropout": 0.0,
    "predictor_class": 527,
}
TINY = {
    "encoder_layers": 2,
    "encoder_embed_dim": 24,
    "encoder_ffn_embed_dim": 40,
    "encoder_attention_heads": 3,
    "embed_dim": 16,
    "conv_pos": 16,
    "conv_pos_groups": 4,
    "num_buckets": 32,
    "max_distance": 100,
}
QFORMER = {"n_queries": 32, "n_layers": 2, "n_positions": 1024, "dim": 768, "hidden": 768, "ffn": 3072, "width": 4096}
TINY_QFORMER = {"n_queries": 4, "n_layers": 2, "n_positions": 520, "dim": 24, "hidden": 128, "ffn": 48, "width": 32}


def write_beats(location: Path, *, seed: int = 0, **cfg: Any) -> Path:
    """Write `BEATs_iter3_plus_AS2M.pt`, {"cfg", "model"}, into the folder; `cfg` wins over TINY."""
    cfg = {**CFG, **TINY, **cfg}
    tensors = {key: random_tensor(key, shape, seed) for key, shape in sorted(beats_shapes(cfg).items())}
    table = "encoder.layers.{}.self_attn.relative_attention_bias.weight"
    for i in range(cfg["encoder_layers"]):  # one table, which the state dict names once a layer
        tensors[table.format(i)] = tensors[table.format(0)]
    location.mkdir(parents=True, exist_ok=True)
    torch.save({"cfg": cfg, "model": tensors}, location / FILE)
    return location / FILE


def qformer_tensors(*, seed: int = 0, **sizes: int) -> dict[str, Tensor]:
    """The projector's tensors by their published names, without `model.modal_projectors.audio.`; `sizes` win over TINY_QFORMER."""
    shapes = qformer_shapes(**{**TINY_QFORMER, **sizes})
    return {key: random_tensor(key, shape, seed) for key, shape in sorted(shapes.items())}


def beats_shapes(cfg: dict[str, Any]) -> Shapes:
    """Every published key and its tensor's shape."""
    width, hidden, heads = cfg["encoder_embed_dim"], cfg["encoder_ffn_embed_dim"], cfg["encoder_attention_heads"]
    inner, patch, kernel = cfg["embed_dim"], cfg["input_patch_size"], cfg["conv_pos"]
    shapes: Shapes = {
        "patch_embedding.weight": (inner, 1, patch, patch),
        "encoder.pos_conv.0.bias": (width,),
        "encoder.pos_conv.0.weight_g": (1, 1, kernel),
        "encoder.pos_conv.0.weight_v": (width, width // cfg["conv_pos_groups"], kernel),
        **norm("layer_norm", inner),
        **linear("post_extract_proj", width, inner),
        **norm("encoder.layer_norm", width),
    }
    for layer in (f"encoder.layers.{i}" for i in range(cfg["encoder_layers"])):
        for name in "qkv":
            shapes |= linear(f"{layer}.self_attn.{name}_proj", width, width)
        shapes |= linear(f"{layer}.self_attn.out_proj", width, width)
        shapes |= linear(f"{layer}.self_attn.grep_linear", 8, width // heads)
        shapes[f"{layer}.self_attn.grep_a"] = (1, heads, 1, 1)
        shapes[f"{layer}.self_attn.relative_attention_bias.weight"] = (cfg["num_buckets"], heads)
        shapes |= linear(f"{layer}.fc1", hidden, width) | linear(f"{layer}.fc2", width, hidden)
        shapes |= norm(f"{layer}.self_attn_layer_norm", width) | norm(f"{layer}.final_layer_norm", width)
    return shapes


def qformer_shapes(
    *, n_queries: int, n_layers: int, n_positions: int, dim: int, hidden: int, ffn: int, width: int
) -> Shapes:
    """Every published key of the projector and its tensor's shape."""
    shapes: Shapes = {
        "audio_query_tokens": (1, n_queries, hidden),
        "audio_position_embedding.weight": (n_positions, dim),
        **norm("audio_Qformer.bert.embeddings.LayerNorm", hidden),
        **linear("audio_llama_proj", width, hidden),
    }
    for layer in (f"audio_Qformer.bert.encoder.layer.{i}" for i in range(n_layers)):
        for attention, source in (("attention", hidden), ("crossattention", dim)):
            shapes |= linear(f"{layer}.{attention}.self.query", hidden, hidden)
            shapes |= linear(f"{layer}.{attention}.self.key", hidden, source)
            shapes |= linear(f"{layer}.{attention}.self.value", hidden, source)
            shapes |= linear(f"{layer}.{attention}.output.dense", hidden, hidden)
            shapes |= norm(f"{layer}.{attention}.output.LayerNorm", hidden)
        shapes |= linear(f"{layer}.intermediate_query.dense", ffn, hidden)
        shapes |= linear(f"{layer}.output_query.dense", hidden, ffn) | norm(f"{layer}.output_query.LayerNorm", hidden)
    return shapes


def linear(name: str, out: int, into: int) -> Shapes:
    """Shapes of a linear layer."""
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> Shapes:
    """Shapes of a layer norm."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def random_tensor(key: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """A tensor that depends on the key and the seed only: float32, of a size that a trained network might have."""
    noise = np.random.default_rng([seed, zlib.crc32(key.encode())]).standard_normal(shape)
    if key.endswith(("weight_g", "grep_a")) or ("norm" in key.lower() and key.endswith("weight")):
        noise = 1 + 0.1 * noise
    elif key.endswith("bias"):
        noise = 0.1 * noise
    elif not key.endswith(("query_tokens", "position_embedding.weight", "relative_attention_bias.weight")):
        noise = noise / np.prod(shape[1:]) ** 0.5
    return torch.from_numpy(noise.astype(np.float32))


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    """A 16 kHz waveform that fades from loud noise to silence, the last tenth quite silent."""
    count = int(16_000 * seconds)
    fade = np.linspace(1, 0, count) ** 2 * (np.arange(count) < 0.9 * count)
    return (0.2 * np.random.default_rng([seed, 3]).standard_normal(count) * fade).astype(np.float32)

"""Small random checkpoints in the files of LanguageBind/LanguageBind_Video_merge."""

import json
from pathlib import Path

import torch
from published_clip import Shapes, attention_shapes, clip_shapes, norm_shapes, random_tensors


def write_languagebind(
    location: Path,
    *,
    seed: int = 0,
    num_frames: int = 3,
    hidden_size: int = 24,
    intermediate_size: int = 40,
    num_hidden_layers: int = 3,
    num_attention_heads: int = 3,
    image_size: int = 28,
    patch_size: int = 14,
) -> Path:
    """A folder with `config.json` and the whole model, text half included, in `pytorch_model.bin`."""
    location.mkdir(parents=True)
    vision = {
        "add_time_attn": True,
        "num_frames": num_frames,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "image_size": image_size,
        "patch_size": patch_size,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-05,
        "model_type": "clip_vision_model",
        "video_decode_backend": "decord",
    }
    config = {"architectures": ["LanguageBindVideo"], "model_type": "LanguageBindVideo", "projection_dim": 24}
    config |= {"text_config": {"hidden_size": 16}, "vision_config": vision}
    (location / "config.json").write_text(json.dumps(config))
    positions = 1 + (image_size // patch_size) ** 2
    shapes = languagebind_shapes(hidden_size, intermediate_size, num_hidden_layers, positions, patch_size, num_frames)
    torch.save(random_tensors(shapes, seed), location / "pytorch_model.bin")
    return location


def languagebind_shapes(
    width: int, ffn: int, layers: int, positions: int, patch: int, frames: int, **text: int
) -> Shapes:
    """Shape of every tensor by its published name: a CLIP with attention over time in the layers of its vision tower."""
    shapes = clip_shapes(width, ffn, layers, positions, patch, **text)
    for layer in (f"vision_model.encoder.layers.{i}" for i in range(layers)):
        shapes[f"{layer}.temporal_embedding"] = (1, frames, width)
        shapes |= norm_shapes(f"{layer}.temporal_layer_norm1", width)
        shapes |= attention_shapes(f"{layer}.temporal_attn", width)
    return {name: shape for name, shape in shapes.items() if not name.endswith("position_ids")}

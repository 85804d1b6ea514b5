"""Small random checkpoints in the files of openai/clip-vit-large-patch14-336."""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def write_clip(
    location: Path,
    *,
    seed: int = 0,
    hidden_size: int = 32,
    intermediate_size: int = 128,
    num_hidden_layers: int = 3,
    num_attention_heads: int = 4,
    image_size: int = 42,
    patch_size: int = 14,
) -> Path:
    """A folder with `config.json`, `preprocessor_config.json` and the whole model, text half included, in `pytorch_model.bin`."""
    location.mkdir(parents=True)
    vision = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "image_size": image_size,
        "patch_size": patch_size,
    }
    config = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 24}
    config |= {"text_config": {"hidden_size": 16}, "vision_config": vision | {"hidden_act": "quick_gelu"}}
    (location / "config.json").write_text(json.dumps(config | {"vision_config_dict": vision}))
    steps = {"do_resize": True, "do_center_crop": True, "do_normalize": True, "resample": 3}
    colours = {"image_mean": MEAN, "image_std": STD}
    processor = {"feature_extractor_type": "CLIPFeatureExtractor", "size": image_size, "crop_size": image_size}
    (location / "preprocessor_config.json").write_text(json.dumps(processor | steps | colours))
    positions = 1 + (image_size // patch_size) ** 2
    shapes = clip_shapes(hidden_size, intermediate_size, num_hidden_layers, positions, patch_size)
    torch.save(random_tensors(shapes, seed), location / "pytorch_model.bin")
    return location


def clip_shapes(
    width: int,
    ffn: int,
    layers: int,
    positions: int,
    patch: int,
    *,
    projection: int = 24,
    text_width: int = 16,
    text_layers: int = 1,
    vocabulary: int = 50,
    text_positions: int = 7,
) -> Shapes:
    """Shape of every tensor of a whole CLIP as files older than transformers 4.31 hold it, by its published name."""
    shapes: Shapes = {
        "logit_scale": (),
        "text_projection.weight": (projection, text_width),
        "visual_projection.weight": (projection, width),
        "text_model.embeddings.token_embedding.weight": (vocabulary, text_width),
        "text_model.embeddings.position_embedding.weight": (text_positions, text_width),
        "text_model.embeddings.position_ids": (1, text_positions),
        "vision_model.embeddings.class_embedding": (width,),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "vision_model.embeddings.position_embedding.weight": (positions, width),
        "vision_model.embeddings.position_ids": (1, positions),
        **norm_shapes("text_model.final_layer_norm", text_width),
        **norm_shapes("vision_model.pre_layrnorm", width),
        **norm_shapes("vision_model.post_layernorm", width),
    }
    for model, count, size, inner in (
        ("vision", layers, width, ffn),
        ("text", text_layers, text_width, 4 * text_width),
    ):
        for i in range(count):
            layer = f"{model}_model.encoder.layers.{i}"
            shapes |= attention_shapes(f"{layer}.self_attn", size)
            shapes |= norm_shapes(f"{layer}.layer_norm1", size) | norm_shapes(f"{layer}.layer_norm2", size)
            shapes |= {f"{layer}.mlp.fc1.weight": (inner, size), f"{layer}.mlp.fc1.bias": (inner,)}
            shapes |= {f"{layer}.mlp.fc2.weight": (size, inner), f"{layer}.mlp.fc2.bias": (size,)}
    return shapes


def attention_shapes(stem: str, width: int) -> Shapes:
    """Shapes of the four linear layers of an attention."""
    linears = [f"{stem}.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
    return {f"{name}.weight": (width, width) for name in linears} | {f"{name}.bias": (width,) for name in linears}


def norm_shapes(stem: str, width: int) -> Shapes:
    """Shapes of a layer norm."""
    return {f"{stem}.weight": (width,), f"{stem}.bias": (width,)}


def random_tensors(shapes: Shapes, seed: int) -> dict[str, Tensor]:
    """Float32 tensors that depend on key and seed alone: norms around 1, matrices scaled by their inputs."""
    tensors = {}
    for key in sorted(shapes):
        numbers = np.random.default_rng([seed, zlib.crc32(key.encode())]).standard_normal(shapes[key])
        if key.endswith("position_ids"):
            tensors[key] = torch.arange(shapes[key][1])[None]
            continue
        if "norm" in key and key.endswith("weight"):
            numbers = 1 + 0.1 * numbers
        else:
            numbers = numbers / math.sqrt(math.prod(shapes[key][1:])) if len(shapes[key]) > 1 else 0.1 * numbers
        tensors[key] = torch.from_numpy(np.asarray(numbers, dtype=np.float32))
    return tensors


def striped(*shape: int) -> np.ndarray:
    """A uint8 picture (height, width, 3), or a video of them, of slanted ramps."""
    places = np.indices(shape)
    return (np.tensordot((11, 5, 3, 70)[-len(shape) :], places, 1) % 256).astype(np.uint8)


def published_shapes(path: Path) -> Shapes:
    """The shapes in a folded list: a name with {i} stands for every layer of its half."""
    folded = json.loads(path.read_text())
    shapes: Shapes = {}
    for name, shape in folded["tensors"].items():
        count = folded["layers"][name.partition(".")[0]] if "{i}" in name else 1
        shapes |= {name.replace("{i}", str(i)): tuple(shape) for i in range(count)}
    return shapes

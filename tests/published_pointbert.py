"""Small random copies of the published PointBERT, `point_bert_v1.2.pt`: same keys, same kind of file."""

import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FILE = "point_bert_v1.2.pt"
FULL = {"dim": 384, "layers": 12, "group_dim": 256, "point_dims": 6}
TINY = {"dim": 24, "layers": 2, "group_dim": 16, "point_dims": 6}


def published_shapes(*, dim: int, layers: int, group_dim: int, point_dims: int) -> dict[str, tuple[int, ...]]:
    """Every published key and its tensor's shape."""
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, dim), "cls_pos": (1, 1, dim)}

    def linear(name: str, out: int, into: int, *kernel: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (out, into, *kernel)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    def norm(name: str, width: int, *statistics: str) -> None:
        shapes.update({f"{name}.{part}": (width,) for part in ("weight", "bias", *statistics)})

    for name, into, inner, out in (("first", point_dims, 128, 256), ("second", 512, 512, group_dim)):
        linear(f"encoder.{name}_conv.0", inner, into, 1)
        norm(f"encoder.{name}_conv.1", inner, "running_mean", "running_var")
        shapes[f"encoder.{name}_conv.1.num_batches_tracked"] = ()
        linear(f"encoder.{name}_conv.3", out, inner, 1)
    linear("reduce_dim", dim, group_dim)
    linear("pos_embed.0", 128, 3)
    linear("pos_embed.2", dim, 128)
    for i in range(layers):
        block = f"blocks.blocks.{i}"
        norm(f"{block}.norm1", dim)
        norm(f"{block}.norm2", dim)
        linear(f"{block}.attn.qkv", 3 * dim, dim, bias=False)
        linear(f"{block}.attn.proj", dim, dim)
        linear(f"{block}.mlp.fc1", 4 * dim, dim)
        linear(f"{block}.mlp.fc2", dim, 4 * dim)
    norm("norm", dim)
    return shapes


def random_tensor(key: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """A tensor that depends on the key and the seed only: float32, of a size that a trained network might have."""
    if key.endswith("num_batches_tracked"):
        return torch.tensor(1000)
    noise = np.random.default_rng([seed, zlib.crc32(key.encode())]).standard_normal(shape)
    if key.endswith("running_var"):
        noise = 0.5 + noise**2
    elif key.endswith(".weight"):
        noise = 1 + 0.1 * noise if len(shape) == 1 else noise / shape[1] ** 0.5
    elif key.endswith((".bias", "running_mean")):
        noise = 0.1 * noise
    return torch.from_numpy(noise.astype(np.float32))


def write_pointbert(location: Path, *, seed: int = 0, as_trained: bool = False, **settings: int) -> Path:
    """Write the file (or `point_bert_v1.2.pt` in a folder): flat, as ModelCompose loads it, or as trained, for PointLLM."""
    shapes = published_shapes(**{**TINY, **settings})
    tensors = {key: random_tensor(key, shape, seed) for key, shape in sorted(shapes.items())}
    path = location if location.suffix == ".pt" else location / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {"state_dict": {f"module.point_encoder.{key}": value for key, value in tensors.items()}}
    torch.save(stored if as_trained else tensors, path)
    return path

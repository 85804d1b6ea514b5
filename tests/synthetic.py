"""Models of any size, written without transformers: a decoder's weights, and specialists of it; and their updates in NumPy."""

import fnmatch
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Updates = dict[str, np.ndarray]


def linear_shapes(width: int, ffn: int, layers: int) -> dict[str, tuple[int, int]]:
    """Shapes of the linear weights of a decoder with half as many key and value heads."""
    half = width // 2
    attention = {"q": (width, width), "k": (half, width), "v": (half, width), "o": (width, width)}
    shapes = {f"self_attn.{name}_proj": shape for name, shape in attention.items()}
    shapes |= {"mlp.gate_proj": (ffn, width), "mlp.up_proj": (ffn, width), "mlp.down_proj": (width, ffn)}
    return {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in shapes.items()}


def write_base(
    folder: Path, *, width: int = 16, ffn: int = 24, layers: int = 5, vocabulary: int = 20, dtype: str = "float32"
) -> Path:
    """A decoder with norms, embeddings, and a linear weight that is in no layer."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    shapes |= {"model.resampler.weight": (width, width), **linear_shapes(width, ffn, layers)}
    shapes |= {f"model.layers.{i}.input_layernorm.weight": (width,) for i in range(layers)}
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    chosen = getattr(torch, dtype)
    tensors = {name: (0.1 * torch.randn(*shape, generator=generator)).to(chosen) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"hidden_size": width, "intermediate_size": ffn, "num_hidden_layers": layers, "vocab_size": vocabulary}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama", "tie_word_embeddings": True}))
    return folder


def write_lora(folder: Path, base: Path, *, rank: int = 4, seed: int = 1, targets: str = "*_proj.weight") -> Path:
    """A PEFT adapter of the weights whose names match, in the base's type; its updates are scaled by 2."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in load_file(base / "model.safetensors").items():
        if fnmatch.fnmatchcase(name, targets):
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            rows, columns = weight.shape
            down, up = (torch.randn(*shape, generator=generator) for shape in ((rank, columns), (rows, rank)))
            tensors[f"{stem}.lora_A.weight"] = (0.1 * down).to(weight.dtype)
            tensors[f"{stem}.lora_B.weight"] = (0.1 * up).to(weight.dtype)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_tuned(folder: Path, base: Path, *, seed: int = 1, without: str = "") -> Path:
    """A full fine-tune: every tensor but those whose names match `without` moved from the base's."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (tensor + 0.05 * torch.randn(*tensor.shape, generator=generator)).to(tensor.dtype)
        for name, tensor in load_file(base / "model.safetensors").items()
    }
    tensors = {name: tensor for name, tensor in tensors.items() if not fnmatch.fnmatchcase(name, without)}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((base / "config.json").read_text())
    return folder


def tensors_of(folder: Path) -> Updates:
    """Every tensor of a folder's weight files, in float64."""
    return {
        name: tensor.double().numpy()
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def factors_of(folder: Path, scale: float = 2.0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The scaled up and the down factor of every weight that a PEFT adapter updates."""
    tensors = tensors_of(folder)
    stems = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    return {
        f"{stem.removeprefix('base_model.model.')}.weight": (
            scale * tensors[f"{stem}.lora_B.weight"],
            tensors[f"{stem}.lora_A.weight"],
        )
        for stem in stems
    }


def updates_of(folder: Path, base: Path, scale: float = 2.0) -> Updates:
    """ΔW of every tensor that a specialist, or a result of a merge, changes."""
    if (folder / "adapter_config.json").is_file():
        return {slot: up @ down for slot, (up, down) in factors_of(folder, scale).items()}
    before = tensors_of(base)
    return {name: tensor - before[name] for name, tensor in tensors_of(folder).items()}

"""The smallest inputs of a merge: a decoder of one layer and LoRA adapters of it, written without transformers."""

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

WIDTH, FFN, VOCABULARY = 8, 12, 10
LINEARS = {
    **{f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"},
    "mlp.gate_proj": (FFN, WIDTH),
    "mlp.up_proj": (FFN, WIDTH),
    "mlp.down_proj": (WIDTH, FFN),
}
SLOTS = {f"model.layers.0.{name}.weight": shape for name, shape in LINEARS.items()}
NORMS = ("model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight", "model.norm.weight")
SHAPES = {"model.embed_tokens.weight": (VOCABULARY, WIDTH), **SLOTS, **dict.fromkeys(NORMS, (WIDTH,))}
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": WIDTH,
    "intermediate_size": FFN,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
}
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def write_base(folder: Path) -> Path:
    """A Llama of one layer: config.json and model.safetensors."""
    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(0)
    save_file(
        {name: torch.randn(*shape, generator=draw) for name, shape in SHAPES.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def lora_tensors(seed: int = 1) -> dict[str, torch.Tensor]:
    """The factors of an adapter of rank 2 on every linear weight."""
    draw, tensors = torch.Generator().manual_seed(seed), {}
    for name, (rows, columns) in SLOTS.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(2, columns, generator=draw)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(rows, 2, generator=draw)
    return tensors


def write_lora(folder: Path, seed: int = 1, **config: Any) -> Path:
    """A PEFT adapter: adapter_config.json and adapter_model.safetensors."""
    folder.mkdir(parents=True)
    save_file(lora_tensors(seed), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(LORA | config))
    return folder


def write_recipe(folder: Path, more: str = "") -> Path:
    """A recipe of the base and two adapters, which are written beside it."""
    if not (folder / "base").exists():
        write_base(folder / "base")
        write_lora(folder / "one", 1)
        write_lora(folder / "two", 2)
    path = folder / "recipe.yaml"
    path.write_text(f"base_model: base\nmodels:\n- model: one\n- model: two\noutput: {{form: full}}\n{more}")
    return path


def with_header(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file of this header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data

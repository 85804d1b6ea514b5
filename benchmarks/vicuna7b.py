"""Stand-ins for Vicuna-7B, its adapters and its fine-tunes: true names, shapes and types, random values.

    python benchmarks/vicuna7b.py OUT [--layers N] [--vocabulary N] [--dtype float16] [--layout peft] [--dense 1/j]

32 layers of width 4096 and 11008, vocabulary 32000: a base of 13.5 GB in shards as Hugging Face writes them, four adapters
of rank 128 (224 matrices, 0.64 GB each, alpha/r = 2) in PEFT's or ModelCompose's layout, and with `--dense` four full
fine-tunes. Weights are drawn from 65536 quantiles of a normal distribution, so that a value costs one table look-up. The
updates ΔW of fine-tunes have singular values ∝ 1/j (`1/j`; singular vectors are signs between two Hartley transforms,
which are exactly orthogonal and cost O(n² log n)) or independent normal entries (`flat`). Every tensor has its own seed,
made from its name. Tensors go to the disk block by block, so memory stays below 1 GB. What is already there is kept.
"""

import argparse
import functools
import json
import math
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modalloy.senses.projectors.qformer import QFormer, published_name

WIDTH, FFN, HEADS = 4096, 11008, 32
LINEARS = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH, WIDTH),
    "self_attn.v_proj": (WIDTH, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (FFN, WIDTH),
    "mlp.up_proj": (FFN, WIDTH),
    "mlp.down_proj": (WIDTH, FFN),
}
RANK, ALPHA = 128, 256
MODALITIES = {"image": "vision", "audio": "audio", "video": "video", "point": "point"}  # in recipes: on disk
FEATURES = {"vision": 1024, "audio": 768, "video": 1024, "point": 384}  # width of the encoder's output
LOCAL_TOKENS = 5
DELTA_STD = 1e-3  # root mean square entry of the weakest specialist's update; the base's is 0.02
SHARD_BYTES = 4_900_000_000
BLOCK_VALUES = 1 << 22
CODES = {torch.float16: "F16", torch.bfloat16: "BF16"}

Shapes = Mapping[str, tuple[int, ...]]
Draw = Callable[
    [str, tuple[int, ...]], Iterator[Tensor]
]  # a tensor by name and shape, as blocks of its values in order


@dataclass(frozen=True)
class Size:
    """How much of Vicuna-7B: its shapes, with fewer layers or a smaller vocabulary for a smaller measurement."""

    layers: int = 32
    vocabulary: int = 32000

    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every linear layer, by its name without `.weight`."""
        layers = range(self.layers)
        return {f"model.layers.{i}.{name}": shape for i in layers for name, shape in LINEARS.items()}

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of the model, in the order of its checkpoint."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, WIDTH)}
        for index in range(self.layers):
            layer = f"model.layers.{index}"
            shapes |= {f"{layer}.{name}.weight": shape for name, shape in LINEARS.items()}
            shapes |= {f"{layer}.{name}.weight": (WIDTH,) for name in ("input_layernorm", "post_attention_layernorm")}
        return shapes | {"model.norm.weight": (WIDTH,), "lm_head.weight": (self.vocabulary, WIDTH)}

    def __str__(self) -> str:
        return f"{self.layers}x{self.vocabulary}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16", help="of the full models")
    parser.add_argument("--layout", choices=["peft", "modelcompose"], default="peft", help="of the adapters")
    parser.add_argument(
        "--dense", choices=["1/j", "flat"], help="also four full fine-tunes, with updates of this spectrum"
    )
    args = parser.parse_args()
    size, dtype = Size(args.layers, args.vocabulary), getattr(torch, args.dtype)
    print(base(args.out, size, dtype))
    for folder in adapters(args.out, size, args.layout):
        print(folder)
    for folder in fine_tunes(args.out, size, args.dense, dtype) if args.dense else []:
        print(folder)


def base(root: Path, size: Size, dtype: torch.dtype = torch.float16) -> Path:
    """The folder of the base model."""
    return made(root / f"base-{size}-{CODES[dtype]}", functools.partial(_write_model, size, dtype, draw_base))


def adapters(root: Path, size: Size, layout: str = "peft") -> list[Path]:
    """Folders of four fp16 adapters of rank 128, `layout` "peft" or "modelcompose"; norms differ by up to 2 ×."""
    write = {"peft": _write_peft, "modelcompose": _write_modelcompose}[layout]
    folders = [root / f"{layout}-{size.layers}" / name for name in MODALITIES]
    return [made(folder, functools.partial(write, index, size)) for index, folder in enumerate(folders)]


def ssam_recipe(base: Path, adapters: list[Path], rank: int, output: dict[str, str]) -> dict[str, Any]:
    """A recipe that merges the adapters by SSAM with k = `rank`."""
    return {
        "base_model": str(base.resolve()),
        "merge_method": "ssam",
        "parameters": {"rank": rank},
        "models": [{"model": str(adapter.resolve()), "modality": adapter.name} for adapter in adapters],
        "output": output,
    }


def fine_tunes(root: Path, size: Size, spectrum: str, dtype: torch.dtype = torch.float16) -> list[Path]:
    """Folders of four full models whose linear layers differ from the base's by `delta`."""

    def write(index: int, folder: Path) -> None:
        def draw(name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
            blocks = draw_base(name, shape)
            if name.removesuffix(".weight").endswith(tuple(LINEARS)):
                updates = delta(f"{index} {name}", (shape[0], shape[1]), spectrum, index).flatten().split(BLOCK_VALUES)
                blocks = (b.to(dtype).float() + update for b, update in zip(blocks, updates, strict=True))
            yield from blocks

        _write_model(size, dtype, draw, folder)

    label = {"1/j": "decaying", "flat": "flat"}[spectrum]
    folders = [root / f"{label}-{size}-{CODES[dtype]}" / name for name in MODALITIES]
    return [made(folder, functools.partial(write, index)) for index, folder in enumerate(folders)]


def draw_base(name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """A tensor of the base: gains near 1, weights of standard deviation 0.02."""
    yield from normals(name, shape, 1.0, 0.1) if len(shape) == 1 else normals(name, shape, 0.0, 0.02)


def delta(key: str, shape: tuple[int, int], spectrum: str, index: int) -> Tensor:
    """A full-rank update ΔW (out, in) in float32 with singular values ∝ 1/j ("1/j") or independent entries ("flat").

    The norms of specialists `index` 0 to 3 differ by up to 2 ×.
    """
    std = DELTA_STD * (1 + index / 3)
    if spectrum == "flat":
        return torch.cat(list(normals(key, shape, 0.0, std))).view(shape)
    matrix = torch.zeros(shape)
    values = 1 / torch.arange(1.0, min(shape) + 1)
    matrix.diagonal().copy_(values)
    matrix = _rotated(f"{key} right", _rotated(f"{key} left", matrix).T).T
    return (matrix * (std * math.sqrt(shape[0] * shape[1]) / float(values.norm()))).contiguous()


def normals(key: str, shape: tuple[int, ...], mean: float, std: float) -> Iterator[Tensor]:
    """Blocks of normally distributed float32 values, as many in all as `shape` has; the same for the same key."""
    quantiles = torch.special.ndtri((torch.arange(65536, dtype=torch.float64) + 0.5) / 65536)
    values = (mean + std * quantiles).float().numpy()
    generator = np.random.Generator(np.random.SFC64(zlib.crc32(key.encode())))
    total = math.prod(shape)
    for start in range(0, total, BLOCK_VALUES):
        yield torch.from_numpy(values[generator.integers(0, 65536, min(BLOCK_VALUES, total - start), dtype=np.uint16)])


def _rotated(key: str, matrix: Tensor) -> Tensor:
    """Q @ matrix with the orthogonal Q = H S H, H the Hartley transform and S random signs."""
    signs = torch.cat(list(normals(key, (len(matrix), 1), 0.0, 1.0))).sign()
    return _hartley(signs[:, None] * _hartley(matrix))


def _hartley(matrix: Tensor) -> Tensor:
    spectrum = torch.fft.fft(matrix, dim=0, norm="ortho")
    return spectrum.real - spectrum.imag


def made(folder: Path, write: Callable[[Path], object]) -> Path:
    """`folder`, written first if it is not there; a folder that is there is complete."""
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        partial.rename(folder)
    return folder


def _write_model(size: Size, dtype: torch.dtype, draw: Draw, folder: Path) -> None:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in size.tensors().items():
        n_bytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and filled + n_bytes > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += n_bytes
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shapes in zip(files, shards, strict=True):
        write_tensors(folder / file, shapes, dtype, draw)
    where = {name: file for file, shapes in zip(files, shards, strict=True) for name in shapes}
    total = sum(math.prod(shape) for shape in size.tensors().values()) * dtype.itemsize
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    config = _config(size)
    _write_json(folder / "config.json", config | {"torch_dtype": str(dtype).removeprefix("torch.")})
    words = {"<unk>": 0, "<s>": 1, "</s>": 2}
    _write_json(folder / "tokenizer.json", {"version": "1.0", "model": _word_level(words), "added_tokens": []})
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | special)


def _write_peft(index: int, size: Size, folder: Path) -> None:
    _write_factors(folder, index, size, "base_model.model.{stem}.lora_{side}.weight", [""], {})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "vicuna-7b",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": sorted(name.rpartition(".")[2] for name in LINEARS),
    }
    _write_json(folder / "adapter_config.json", config)


def _write_modelcompose(index: int, size: Size, folder: Path) -> None:
    disk = list(MODALITIES.values())[index]
    projector: dict[str, tuple[int, ...]] = {
        "0.weight": (WIDTH, FEATURES[disk]),
        "0.bias": (WIDTH,),
        "2.weight": (WIDTH, WIDTH),
        "2.bias": (WIDTH,),
    }
    if disk == "audio":
        with torch.device("meta"):
            projector = {published_name(name): tuple(tensor.shape) for name, tensor in QFormer().state_dict().items()}
    others = {f"model.modal_projectors.{disk}.{name}": shape for name, shape in projector.items()}
    for side in ("prefix", "suffix"):
        others |= {f"{side}_tokens.{adapter}": (1, LOCAL_TOKENS, WIDTH) for adapter in ("default", disk)}
    _write_factors(folder, index, size, "{stem}.lora_{side}.{adapter}.weight", ["default", disk], others)
    config = {"model_type": "multimodal", "lora_strategy": "modal+language", "lora_r": RANK, "lora_alpha": ALPHA}
    _write_json(folder / "config.json", _config(size) | config)


def _write_factors(
    folder: Path, index: int, size: Size, pattern: str, adapter_names: list[str], others: Shapes
) -> None:
    """adapter_model.safetensors: A (128, in) and B (out, 128) of every linear layer, with tensor names after `pattern`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for adapter in adapter_names:
        for stem, (rows, columns) in size.linears().items():
            for side, shape in (("A", (RANK, columns)), ("B", (rows, RANK))):
                shapes[pattern.format(stem=stem, side=side, adapter=adapter)] = shape
    std = {"A": 0.02, "B": DELTA_STD * (1 + index / 3) / (0.02 * math.sqrt(RANK) * ALPHA / RANK)}

    def draw(name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
        return normals(f"{index} {name}", shape, 0.0, std["B" if ".lora_B." in name else "A"])

    write_tensors(folder / "adapter_model.safetensors", shapes | dict(others), torch.float16, draw)


def write_tensors(path: Path, shapes: Shapes, dtype: torch.dtype, draw: Draw) -> None:
    """A safetensors file, written block by block: the length of the header, the header, then the tensors by name.

    The library's own writer sorts them so too: `layers.10` comes before `layers.2`, and a reader has to cope with it.
    """
    shapes = dict(sorted(shapes.items()))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            for block in draw(name, shape):
                file.write(block.to(dtype).view(torch.uint8).numpy().data)


def _config(size: Size) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": FFN,
        "num_hidden_layers": size.layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": size.vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }


def _word_level(words: dict[str, int]) -> dict[str, object]:
    return {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

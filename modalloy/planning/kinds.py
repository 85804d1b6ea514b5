"""What a stored tensor is, told from the model's config, from its name's modules and from its shape.

Only linear weights are what merging methods are made for. Rows of an embedding belong to tokens, rows of a router to
experts, the slices of a fused tensor to one expert each, and quantised codes are no numbers at all.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from modalloy.errors import CheckpointError, cut
from modalloy.specialists.licences import made_from
from modalloy.storage.scaled import CODES as EIGHT_BITS
from modalloy.storage.scaled import is_scaled
from modalloy.storage.tensors import TensorRef

Kind = Literal[
    "linear",  # (out, in)
    "vector",  # norms, biases, scalars
    "embedding",  # rows that belong to tokens, of inputs or of a head
    "position",  # rows that belong to positions
    "router",  # rows that belong to experts
    "expert",  # (experts, ·, ·): several linear weights in one tensor
    "kernel",  # convolutions
    "parameter",  # matrices that are no module's weight
    "buffer",  # whole numbers and truth values that are computed or counted
    "code",  # of a quantised weight
]
OF_ROWS: tuple[Kind, ...] = (
    "embedding",
    "position",
    "router",
)  # kept as the base has them unless a rule says otherwise
PLURALS = {
    "linear": "linear weights",
    "embedding": "embeddings",
    "position": "position tables",
    "router": "routers",
    "expert": "fused experts",
    "kernel": "convolutions",
    "parameter": "parameters",
    "buffer": "buffers",
    "code": "codes",
    "vector": "norms and biases",
}
LAYER = re.compile(r"(?:^|\.)(?:layers|layer|blocks|block|h)\.(\d+)\.")
TOKENS = re.compile(
    r"(?!\w*patch)(?:\w*_)?(?:embed|emb|embeds|embedding|embeddings|embed_tokens\w*|embed_in|wte|bos_eos_token)|shared"
)
HEADS = re.compile(r"lm_head|embed_out|output_layer|unembed|unembedding|output_embeddings|text_head|codec_head")
OUTSIDE_LAYERS = ("output", "head")  # which inside a layer are names of linear weights
POSITIONS = re.compile(
    r"wpe|\w*pos(?:ition|itional|itions)?_?(?:embed|emb|embedding|embeddings|bias)\w*|embed_positions\w*|rel_pos\w*"
    r"|\w*relative_(?:attention|position)_bias\w*|bias_values"
)
ROUTERS = ("gate", "router", "wg", "gating", "shared_expert_gate")
# not `experts.0.up_proj`, `experts.expert_0.fc1`: weights of experts that are stored one by one
EXPERTS = re.compile(r"(?:^|\.)experts\.(?!(?:\w+[._])?\d+\.)")
BUFFERS = re.compile(
    r"position_ids|token_type_ids|num_batches_tracked|relative_position_index|relative_coords_table|cu_seqlens"
    r"|(?:attn|attention|self_attn)\.(?:bias|masked_bias)|mask"
)
LONGEST_NAME = 500  # of modules; what is longer is no name that any of these patterns knows
CODES = re.compile(
    r".*(?:\.(?:qweight|qzeros|g_idx|SCB|absmax|nested_absmax|quant_map|nested_quant_map|weight_packed|weight_format"
    r"|weight_scale|weight_scale_inv|weight_zero_point|input_scale|quant_state\..+))"
)


def kinds(config: Mapping[str, Any], refs: Mapping[str, TensorRef]) -> dict[str, Kind]:
    """The kind of every tensor of a model with this `config`, by name."""
    sizes = _Sizes(config, refs)
    return {name: _kind(ref, sizes) for name, ref in refs.items()}


def is_of_tokens(name: str) -> bool:
    """Whether a name alone says that the rows belong to tokens: an embedding's or a head's."""
    module = _module(name[-LONGEST_NAME:])
    return bool((TOKENS.fullmatch(module) and not POSITIONS.fullmatch(module)) or HEADS.fullmatch(module))


def check_numbers(label: str, folder: Path, config: Mapping[str, Any], refs: Mapping[str, TensorRef]) -> None:
    """Refuse a quantised model: its weights are codes, and no merge of codes is one of weights.

    Raises:
        CheckpointError: config.json has a quantization_config, or a tensor holds codes or their scales.
    """
    coded = next((ref for name, ref in refs.items() if _is_code(ref) or CODES.fullmatch(name)), None)
    scheme = next((part["quantization_config"] for part in _parts(config) if part.get("quantization_config")), None)
    if coded is None and (scheme is None or is_scaled(refs)):
        return
    named = made_from(folder)
    remedy = f"use the unquantised model that it was made from{f' ({named}, says its card)' if named else ''}"
    if scheme is not None:
        method = scheme.get("quant_method") if isinstance(scheme, dict) else None
        what = f" by {cut(method)}" if isinstance(method, str) else ""
        shown = f", for example {coded.name} ({coded.dtype})" if coded is not None else ""
        more = (
            "" if coded is not None else "; if its weights are plain numbers, remove quantization_config from the file"
        )
        raise CheckpointError(
            f"{label}: {folder / 'config.json'} says that the model is quantised{what} (quantization_config), so its "
            f"weights are codes, no numbers{shown}; {remedy}{more}"
        )
    assert coded is not None
    raise CheckpointError(
        f"{label}: {coded.name} ({coded.dtype}, {coded.file}) holds codes or scales of a quantised model, no weights; {remedy}"
    )


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor of this name is in, None if it is in none."""
    found = LAYER.search(name)
    return int(found[1]) if found else None


class _Sizes:
    """What the config and the names tell of a model's dimensions."""

    def __init__(self, config: Mapping[str, Any], refs: Mapping[str, TensorRef]) -> None:
        self.tokens: set[int] = set()
        self.positions: set[int] = set()
        self.experts: set[int] = set()
        self.widths: set[int] = set()
        for part in _parts(config):
            for key, value in part.items():
                if isinstance(value, int) and not isinstance(value, bool) and value > 1:
                    self._enter(key, value)
        self.mixtures = {name.partition(".experts.")[0] for name in refs if ".experts." in name}  # modules with experts
        self.biased = {name.removesuffix(".bias") for name in refs if name.endswith(".bias")}  # which no table is

    def _enter(self, key: str, value: int) -> None:
        if "vocab" in key or key == "codebook_size":
            self.tokens.add(value)
        elif key in ("n_positions", "n_ctx") or key.endswith(("position_embeddings", "_positions")):
            self.positions |= {value, value + 2}  # OPT and BART keep two rows for padding
        elif "expert" in key and not key.endswith(("_size", "_dim", "per_tok", "topk", "top_k")):
            self.experts.add(value)
        elif key.endswith(("_size", "_dim", "dim", "width")) or key in ("d_model", "n_embd", "d_ff", "n_inner"):
            self.widths.add(value)


def _kind(ref: TensorRef, sizes: _Sizes) -> Kind:
    shape, name = ref.shape, ref.name if len(ref.name) <= LONGEST_NAME else ""
    module = _module(name)
    if not ref.dtype.is_floating_point or ref.dtype in EIGHT_BITS:
        return "code" if _is_code(ref) else "buffer"
    if _is_router(name, sizes):
        return "router"
    if len(shape) < 2:
        return "vector"
    if EXPERTS.search(name):
        return "expert"
    if POSITIONS.fullmatch(module):
        return "position"
    if len(shape) > 3:
        return "kernel"
    if TOKENS.fullmatch(module) or HEADS.fullmatch(module):
        return "embedding"
    if len(shape) > 2:
        if shape[0] in sizes.experts:
            return "expert"
        return "kernel" if name.endswith(".weight") else "parameter"
    if not name.endswith("weight"):
        return "parameter"
    if layer_of(name) is None:
        if module in OUTSIDE_LAYERS or set(shape) & (sizes.tokens - sizes.widths):
            return "embedding"
        if shape[0] in sizes.positions - sizes.widths and name.removesuffix(".weight") not in sizes.biased:
            return "position"
    return "linear"


def _is_router(name: str, sizes: _Sizes) -> bool:
    """A weight or bias that chooses experts: beside them, or by its name."""
    if "router" in name.split("."):
        return True
    return any(
        name.startswith(mixture + ".") and name.removeprefix(mixture + ".").partition(".")[0] in ROUTERS
        for mixture in (name[: found.start()] for found in re.finditer(r"\.", name))
        if mixture in sizes.mixtures
    )


def _is_code(ref: TensorRef) -> bool:
    """Whole numbers in the shape of a weight, or 8-bit floats, which are codes without their scales."""
    if ref.dtype in EIGHT_BITS:
        return True
    if ref.dtype.is_floating_point or ref.dtype is torch.bool or BUFFERS.search(ref.name):
        return False
    return len(ref.shape) >= 2 or ref.name.endswith(("weight", "_packed"))


def _module(name: str) -> str:
    """The last module of a tensor's name, or the parameter itself where it is no module's weight or bias."""
    stem = name.removesuffix(".weight").removesuffix(".bias")
    return stem.rpartition(".")[2]


def _parts(config: Mapping[str, Any], depth: int = 4) -> Iterator[Mapping[str, Any]]:
    """A config and those inside it: text_config, vision_config …"""
    yield config
    if depth:
        for key, value in config.items():
            if isinstance(value, Mapping) and key != "quantization_config":
                yield from _parts(value, depth - 1)

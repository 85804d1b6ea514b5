"""A sense's picture encoder and projector as llama.cpp's mmproj, where llama.cpp computes the same.

That is LLaVA's layout: a ViT of CLIP or SigLIP, of which one layer's hidden states go through two linear layers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modalloy.errors import CheckpointError
from modalloy.export.merged import Merged
from modalloy.export.weights import Piece, write_pieces
from modalloy.model.llama_cpp import SENSES
from modalloy.model.load import Stored
from modalloy.senses.encoders import build
from modalloy.storage.tensors import Checkpoint

USES_GELU = {"quick_gelu": False, "gelu": True, "gelu_pytorch_tanh": True, "gelu_new": True}  # else quick_gelu; by tanh
POSITIONS = "v.position_embd.weight"
TOWERS = {"clip_vision_model": True, "siglip_vision_model": False}  # model_type: whether it has a class token


@dataclass(frozen=True)
class Vision:
    """A ViT, and the two linear layers after it."""

    config: Any  # transformers' of the ViT
    n_blocks: int  # how many of its blocks are run
    tower: str  # how the names of its tensors begin
    projector: tuple[str, str]  # how those of the linear layers do
    mean: list[float]  # of the colours, in 0..1
    std: list[float]

    @property
    def has_class(self) -> bool:
        """Whether a class token is among its tokens."""
        return TOWERS[self.config.model_type]

    def settings(self, writer: Any, width: int) -> None:
        """Write what llama.cpp must know of it; `width` is the decoder's."""
        import gguf

        config = self.config
        writer.add_type(gguf.GGUFType.MMPROJ)
        writer.add_clip_has_vision_encoder(True)
        writer.add_bool(gguf.Keys.Clip.HAS_LLAVA_PROJECTOR, True)
        writer.add_clip_projector_type("mlp")
        writer.add_vision_image_size(config.image_size)
        writer.add_vision_patch_size(config.patch_size)
        writer.add_vision_embedding_length(config.hidden_size)
        writer.add_vision_feed_forward_length(config.intermediate_size)
        writer.add_vision_projection_dim(width)
        writer.add_vision_head_count(config.num_attention_heads)
        writer.add_vision_attention_layernorm_eps(config.layer_norm_eps)
        writer.add_vision_use_gelu(USES_GELU[config.hidden_act])
        writer.add_vision_image_mean(self.mean)
        writer.add_vision_image_std(self.std)
        # both: without a layer's number, llama.cpp would leave out one block more
        writer.add_vision_block_count(self.n_blocks)
        writer.add_array("clip.vision.feature_layer", [self.n_blocks])

    def tensors(self, hidden: int, width: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """llama.cpp's name of each tensor, ours, and its shape; the linear layers are `hidden` and `width` wide."""
        own, ffn, patch = self.config.hidden_size, self.config.intermediate_size, self.config.patch_size
        embeddings, count = f"{self.tower}embeddings", (self.config.image_size // patch) ** 2 + self.has_class
        yield "v.patch_embd.weight", f"{embeddings}.patch_embedding.weight", (own, 3, patch, patch)
        yield POSITIONS, f"{embeddings}.position_embedding.weight", (count, own)
        layers: list[tuple[str, str, tuple[int, ...]]] = [
            ("mm.0", self.projector[0], (hidden, own)),
            ("mm.2", self.projector[1], (width, hidden)),
        ]
        if self.has_class:
            yield "v.class_embd", f"{embeddings}.class_embedding", (own,)
            layers.append(("v.pre_ln", f"{self.tower}pre_layrnorm", (own,)))
        else:
            yield "v.patch_embd.bias", f"{embeddings}.patch_embedding.bias", (own,)
        for number in range(self.n_blocks):
            block, stem = f"v.blk.{number}", f"{self.tower}encoder.layers.{number}"
            layers += [(f"{block}.ln{one}", f"{stem}.layer_norm{one}", (own,)) for one in (1, 2)]
            layers += [
                (f"{block}.attn_{one}", f"{stem}.self_attn.{one}_proj", (own, own)) for one in ("q", "k", "v", "out")
            ]
            layers += [
                (f"{block}.ffn_up", f"{stem}.mlp.fc1", (ffn, own)),
                (f"{block}.ffn_down", f"{stem}.mlp.fc2", (own, ffn)),
            ]
        for name, ours, shape in layers:
            yield f"{name}.weight", f"{ours}.weight", shape
            yield f"{name}.bias", f"{ours}.bias", shape[:1]


@dataclass(frozen=True)
class Mmproj:
    """What became of a sense: its file, or what llama.cpp lacks for one."""

    sense: str
    file: str | None = None
    lacks: str = ""
    class_last: bool = False  # its class token is written for llama.cpp's order


def write_mmprojs(merged: Merged, folder: Path, kind: str) -> dict[str, Mmproj]:
    """Write mmproj-SENSE.gguf for each sense of which llama.cpp has encoder and projector; what became of every sense.

    Args:
        folder: where the file of encoders and projectors is already.
        kind: "f32", or another type: then matrices are float16.

    Raises:
        CheckpointError: a tensor is missing, or of another shape than the config says, or too large for float16.
    """
    checkpoint = Checkpoint(folder, (SENSES,))
    stored = {
        name: Stored(partial(checkpoint.read, ref), ref.dtype, ref.shape) for name, ref in checkpoint.refs.items()
    }
    done = {}
    for sense in merged.config.modalities:
        found = vision(merged, sense)
        if isinstance(found, str):
            done[sense] = Mmproj(sense, lacks=found)
            continue
        done[sense] = Mmproj(sense, f"mmproj-{sense}.gguf", class_last=found.has_class)
        _write(folder / f"mmproj-{sense}.gguf", found, stored, merged, "f32" if kind == "f32" else "f16")
    return done


def vision(merged: Merged, sense: str) -> Vision | str:
    """What an mmproj of a sense holds; or, in words, what llama.cpp has not."""
    sizes = merged.config.modalities[sense]
    return _of_native(merged, sense) if "native" in sizes else _of_parts(sense, sizes)


def _of_parts(sense: str, sizes: Mapping[str, Any]) -> Vision | str:
    """Of an encoder and a projector of this package."""
    name, projector = sizes["encoder"]["name"], sizes["projector"]
    if name != "clip" or projector["type"] != "mlp" or len(projector["widths"]) != 3:
        layers = f" of {len(projector['widths']) - 1} layers" if projector["type"] == "mlp" else ""
        return f"no graph for {name} with a projector {projector['type']}{layers}"
    if count := sizes["n_prefix"] + sizes["n_suffix"]:
        return f"no place for the {count} trained tokens around each medium"
    encoder: Any = build(name, sizes["encoder"]["settings"], meta=True)
    config = encoder.vision_model.embeddings.config
    stems = (f"projectors.{sense}.0", f"projectors.{sense}.2")
    mean, std = list(encoder.image_mean), list(encoder.image_std)
    return _checked(
        Vision(config, config.num_hidden_layers - 1, f"encoders.{sense}.vision_model.", stems, mean, std), "default"
    )


def _of_native(merged: Merged, sense: str) -> Vision | str:
    """Of a whole model of transformers."""
    from transformers.models.auto import CONFIG_MAPPING

    content = merged.config.modalities[sense]["native"].get("config", {})
    if content.get("model_type") != "llava":
        return (
            f"an mmproj of {content.get('model_type', 'this class')} is not written here, of its classes LLaVA's alone"
        )
    config: Any = CONFIG_MAPPING["llava"].from_dict(content)
    layer = config.vision_feature_layer
    if not isinstance(layer, int) or config.projector_hidden_act != "gelu" or not config.multimodal_projector_bias:
        return "no graph for a LLaVA with several feature layers, or another projector than two layers with biases and GELU"
    processor = merged.processor.preparers[sense].own.image_processor
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    if mean is None or std is None:
        return "its processor records no mean and spread of the colours"
    tower, begin = config.vision_config, f"senses.{sense}.model.model."
    stems = (f"{begin}multi_modal_projector.linear_1", f"{begin}multi_modal_projector.linear_2")
    n_blocks = layer if layer >= 0 else tower.num_hidden_layers + 1 + layer
    found = Vision(tower, n_blocks, f"{begin}vision_tower.", stems, list(mean), list(std))
    return _checked(found, config.vision_feature_select_strategy)


def _checked(found: Vision, strategy: str) -> Vision | str:
    """It, or what of it llama.cpp has not; `strategy` as in LLaVA's config, "default" without the first token."""
    config = found.config
    if config.model_type not in TOWERS:
        return f"no graph for a vision tower {config.model_type} with two linear layers"
    if config.hidden_act not in USES_GELU:
        return f"no activation {config.hidden_act} in a vision tower"
    if not 1 <= found.n_blocks < config.num_hidden_layers or (strategy == "default") != found.has_class:
        return f"no graph that takes the states after {found.n_blocks} of {config.num_hidden_layers} blocks, {strategy}"
    return found


def _write(path: Path, found: Vision, stored: Mapping[str, Stored], merged: Merged, kind: str) -> None:
    import gguf

    width, pieces = merged.config.text_config.hidden_size, list[Piece]()
    damaged = f"{merged.folder}: {{}}; merge again, or copy the folder again"
    bias = stored.get(f"{found.projector[0]}.bias")
    for name, own, shape in found.tensors(bias.shape[0] if bias else width, width):
        if own not in stored:
            raise CheckpointError(damaged.format(f"has no tensor {own}"))
        if stored[own].shape != shape:
            raise CheckpointError(damaged.format(f"{own} is of shape {stored[own].shape}, not {shape}"))
        is_table = name == POSITIONS
        read = partial(_read, stored[own], class_last=is_table and found.has_class)
        pieces.append((name, shape, "f32" if is_table or len(shape) == 1 else kind, read))
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.MMPROJ])
    found.settings(writer, width)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if kind == "f32" else gguf.LlamaFileType.MOSTLY_F16)
    write_pieces(writer, pieces)


def _read(one: Stored, class_last: bool) -> np.ndarray:
    """A tensor; of positions those that llama.cpp's order of tokens needs, in which the class token comes last."""
    values = one[...].float()
    return np.ascontiguousarray((torch.roll(values, -1, 0) if class_last else values).numpy())

"""The built-in decoder in other architectures: specialists as CogVLM or LLaVA checkpoints, and the model that these are.

An image specialist whose picture tokens have an update of their own is a decoder with duplicated vision experts, so it can
be written as CogVLM writes one (`write_cogvlm`); the text path of any specialist can be folded into a Llama's weights, and one
whose tokens all use it is a LLaVA (`write_llava`). Weights are float32, updates added in float64 and rounded once. `routed`
leads every tensor of either back to the model that answers, so these folders, and merges into them, can be asked.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import logging

from modalloy import builtin
from modalloy.model.chat import ChatModel
from modalloy.model.config import ModalloyConfig
from modalloy.model.omni import ModalloyForConditionalGeneration
from modalloy.model.processor import ModalloyProcessor
from modalloy.outputs.omni import specialist_config
from modalloy.senses.encoders import encoder_weights
from modalloy.senses.projectors import projector_class
from modalloy.specialists.companions import companions
from modalloy.specialists.layouts import open_specialist
from modalloy.specialists.specialist import Specialist, StoredLora
from modalloy.storage.folder import read_json
from modalloy.storage.locate import locate, open_base
from modalloy.storage.tensors import Checkpoint

COGVLM, LLAVA, LLAMA = "CogVLMForCausalLM", "LlavaLlamaForCausalLM", "LlamaForCausalLM"
ATTENTION = ("q_proj", "k_proj", "v_proj")
# where each architecture keeps the projector, and the trained tokens before and after a picture
PROJECTOR = {COGVLM: "model.vision.linear_proj.", LLAVA: "model.mm_projector."}
SEPARATORS = {
    COGVLM: {"prefix": "model.vision.boi", "suffix": "model.vision.eoi"},
    LLAVA: {"prefix": "model.mm_projector.prefix", "suffix": "model.mm_projector.suffix"},
}


def write_cogvlm(folder: Path, out: Path) -> Path:
    """An image specialist in CogVLM's layout: its text path is the language experts, its picture tokens' the vision experts."""
    specialist, base = _opened(folder)
    tensors = {name: base.read(ref) for name, ref in base.refs.items() if name not in specialist.text_lora}
    language = {name: updated(specialist, base, name, specialist.text_lora) for name in specialist.text_lora}
    vision = {name: updated(specialist, base, name, specialist.modality_lora) for name in specialist.modality_lora}
    tensors |= fused(language, "language") | fused(vision, "vision") | _beside(specialist, COGVLM)
    return _written(out, tensors, specialist, base, COGVLM, "cogvlm")


def write_llava(folder: Path, out: Path) -> Path:
    """A specialist's text path as a Llama checkpoint; with its projector, as LLaVA's, where all its tokens use that path."""
    specialist, base = _opened(folder)
    tensors = {name: base.read(ref) for name, ref in base.refs.items() if name not in specialist.text_lora}
    tensors |= {name: updated(specialist, base, name, specialist.text_lora) for name in specialist.text_lora}
    if specialist.modality_lora or specialist.modality != "image":
        return _written(out, tensors, None, base, LLAMA, "llama")
    return _written(out, tensors | _beside(specialist, LLAVA), specialist, base, LLAVA, "llava_llama")


def updated(specialist: Specialist, base: Checkpoint, name: str, updates: dict[str, StoredLora]) -> Tensor:
    """W_0 + ΔW of one weight, rounded once."""
    factors = updates[name]
    up, down = specialist.read(factors.b).double() * factors.scale, specialist.read(factors.a).double()
    return torch.addmm(base.read(base.refs[name]).double(), up, down).float()


def fused(linears: dict[str, Tensor], expert: str) -> dict[str, Tensor]:
    """A Llama's linears as CogVLM's experts of one kind: queries, keys and values as one tensor."""
    found = {}
    for name, weight in linears.items():
        block, _, leaf = name.removesuffix(".weight").rpartition(".")
        if leaf == "q_proj":
            parts = [linears[f"{block}.{one}.weight"] for one in ATTENTION]
            found[f"{block}.{expert}_expert_query_key_value.weight"] = torch.cat(parts)
        elif leaf == "o_proj":
            found[f"{block}.{expert}_expert_dense.weight"] = weight
        elif leaf not in ATTENTION:
            found[f"{block}.{expert}_mlp.{leaf}.weight"] = weight
    return found


def routed(name: str, tensor: Tensor, config: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """A converted folder's tensor under the names of the routed model, of which it may be several tensors."""
    architecture = config["architectures"][0]
    for side, own in SEPARATORS.get(architecture, {}).items():
        if name == own:
            yield f"{side}_tokens.image", tensor
            return
    if architecture in PROJECTOR and name.startswith(PROJECTOR[architecture]):
        kind = projector_class(config["modalities"]["image"]["projector"]["type"])
        yield f"projectors.image.{kind.own_name(name.removeprefix(PROJECTOR[architecture]))}", tensor
        return
    for linear, expert, rows in _linears(name, len(tensor), config):
        # picture tokens use a linear's own weight, text tokens the second one that it has where they differ
        yield f"decoder.{linear}.{'text_weight' if expert == 'language' else 'weight'}", tensor[rows]


def load(folder: Path) -> ChatModel:
    """The model of a folder that was written here, or of a merge into one."""
    logging.disable_progress_bar()
    config, checkpoint = read_json(folder / "config.json"), open_base(folder)
    weights = {
        own: part.clone()
        for name, ref in checkpoint.refs.items()
        for own, part in routed(name, checkpoint.read(ref), config)
    }
    senses = config.get("modalities", {})
    for modality, sizes in senses.items():
        encoder = encoder_weights(sizes["encoder"]["name"], None)
        weights |= {f"encoders.{modality}.{name}": tensor for name, tensor in encoder.items()}
    text = {key: value for key, value in config.items() if key != "modalities"} | {"model_type": "llama"}
    second = [name for name in weights if name.endswith(".text_weight")]
    own_config = ModalloyConfig(
        text,
        modalities=senses,
        text_linears=[name.removeprefix("decoder.").replace(".text_weight", ".weight") for name in second],
    )
    model = ModalloyForConditionalGeneration.from_pretrained(
        None, config=own_config, state_dict=weights, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, config=own_config.text_config)
    return ChatModel(model, ModalloyProcessor(tokenizer, own_config.modalities))


def set_weights(chat: ChatModel, tensors: Iterable[tuple[str, Tensor]], config: dict[str, Any]) -> None:
    """Give a loaded model other weights of its architecture, in place."""
    held = chat.model.state_dict()
    for name, tensor in tensors:
        for own, part in routed(name, tensor, config):
            held[own].copy_(part)


def _opened(folder: Path) -> tuple[Specialist, Checkpoint]:
    specialist = open_specialist(folder)
    return specialist, open_base(locate(specialist.base_name or builtin.BASE, folder))


def _beside(specialist: Specialist, architecture: str) -> dict[str, Tensor]:
    """Projector and separators, under an architecture's names."""
    found = {PROJECTOR[architecture] + rest: ref for rest, ref in specialist.projector.items()}
    found |= {SEPARATORS[architecture][side]: ref for side, ref in specialist.tokens.items()}
    return {name: specialist.read(ref).float() for name, ref in found.items()}


def _written(
    out: Path, tensors: dict[str, Tensor], sense: Specialist | None, base: Checkpoint, architecture: str, kind: str
) -> Path:
    """The folder of a whole model, with the base's geometry and tokenizer, and what `load` must know of its sense."""
    config = read_json(base.folder / "config.json")
    config |= {"architectures": [architecture], "model_type": kind, "_name_or_path": builtin.BASE}
    if sense is not None:
        modalities = specialist_config(sense, base, None)["modalities"]
        if architecture == COGVLM:  # a path of its own, with no update: the linears have two weights
            modalities["image"]["update"] = {"rank": 0, "scale": 1.0, "linears": []}
        config["modalities"] = modalities
    partial = out.with_name(f".{out.name}")  # so that a stopped run leaves no half of a folder
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in companions(base.folder):
        shutil.copyfile(base.folder / name, partial / name)
    if sense is not None and (template := sense.checkpoint.folder / "chat_template.jinja").is_file():
        shutil.copyfile(template, partial / template.name)
    (partial / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    ordered = {name: tensors[name].contiguous() for name in sorted(tensors)}
    save_file(ordered, partial / "model.safetensors", metadata={"format": "pt"})
    partial.replace(out)
    return out


def _linears(name: str, height: int, config: dict[str, Any]) -> Iterator[tuple[str, str, slice]]:
    """(the Llama's name, whose tokens use it, the rows of it) of each linear in a tensor; other tensors are their own."""
    block, _, leaf = name.removesuffix(".weight").rpartition(".")
    expert = next((kind for kind in ("language", "vision") if f".{kind}_" in name), "")
    if leaf == f"{expert}_expert_query_key_value":
        head = config["head_dim"]
        rows = [config["num_attention_heads"] * head, *[config["num_key_value_heads"] * head] * 2]
        begins = [0, rows[0], rows[0] + rows[1]]
        for one, begin, n in zip(ATTENTION, begins, rows, strict=True):
            yield f"{block}.{one}", expert, slice(begin, begin + n)
    elif leaf == f"{expert}_expert_dense":
        yield f"{block}.o_proj", expert, slice(height)
    elif expert:
        yield f"{block.removesuffix(f'.{expert}_mlp')}.{leaf}", expert, slice(height)
    else:
        yield f"{block}.{leaf}", "", slice(height)

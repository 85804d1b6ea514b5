"""Tiny real models made on the fly: a base decoder with its tokenizer, and specialists in every layout that is read."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import modalloy
from modalloy.names import modality_name

os.environ["MODALLOY_TRACEBACK"] = "1"  # a bug is a traceback in tests, not the command's one line

LONGEST = ("test_specialists", "test_single_path", "test_predictions", "test_resume")
WIDTH, FFN, LAYERS, HEADS, KV_HEADS = 32, 48, 2, 4, 2
LINEARS = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH // 2, WIDTH),
    "self_attn.v_proj": (WIDTH // 2, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (FFN, WIDTH),
    "mlp.up_proj": (FFN, WIDTH),
    "mlp.down_proj": (WIDTH, FFN),
}
SLOTS = {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in LINEARS.items()}
ENCODERS = {
    "vision": ("builtin:efficientnet-lite0", 1280),
    "audio": ("builtin:whisper-tiny.en", 3840),
    "video": ("builtin:efficientnet-lite0-video", 2560),
    "point": ("builtin:depth-views", 1280),
}
WORDS = "what is this do you hear see are these the same a an dog cat yes no ? : , user assistant".split()  # noqa: SIM905
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }} : {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant : {% endif %}"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` run where there is a CUDA device; the files of the longest tests come first.

    So that two workers end together: one would wait for a long test that the other has begun last.
    """
    items.sort(key=lambda item: item.path.stem not in LONGEST)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with grouped-query attention, tied embeddings and a word tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "base"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=3 + len(WORDS),
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    base_tokenizer().save_pretrained(folder)
    return folder


def base_tokenizer() -> Any:
    """A tokenizer of WORDS with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.chat_template = TEMPLATE
    return fast


def compose_tensors(
    disk: str, *, rank: int = 4, seed: int = 0, same: bool = False, tokens: int = 1
) -> dict[str, Tensor]:
    """Random tensors of a ModelCompose specialist in its published key layout."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    tensors = {}
    for adapter in ["default"] if same else ["default", disk]:
        for stem, (rows, columns) in SLOTS.items():
            tensors[f"{stem}.lora_A.{adapter}.weight"] = draw(rank, columns)
            tensors[f"{stem}.lora_B.{adapter}.weight"] = draw(rows, rank)
    dim = ENCODERS[disk][1]
    for name, shape in {
        "0.weight": (WIDTH, dim),
        "0.bias": (WIDTH,),
        "2.weight": (WIDTH, WIDTH),
        "2.bias": (WIDTH,),
    }.items():
        tensors[f"model.modal_projectors.{disk}.{name}"] = draw(*shape)
    if not same and tokens:
        for adapter in ("default", disk):
            for side in ("prefix", "suffix"):
                tensors[f"{side}_tokens.{adapter}"] = draw(1, tokens, WIDTH)
    return tensors


def write_compose(folder: Path, disk: str, *, as_bin: bool = False, **options: Any) -> Path:
    """A ModelCompose specialist's folder."""
    folder.mkdir(parents=True)
    tensors = compose_tensors(disk, **options)
    if as_bin:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    rank = options.get("rank", 4)
    config = {
        "model_type": "multimodal",
        "hidden_size": WIDTH,
        "lora_strategy": "same" if options.get("same") else "modal+language",
        "lora_r": rank,
        "lora_alpha": 2 * rank,
        f"mm_{disk}_encoder": ENCODERS[disk][0],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def specialists(tmp_path: Path) -> dict[str, Path]:
    """An image and an audio specialist of the tiny base."""
    return {
        "image": write_compose(tmp_path / "vision-damc", "vision", seed=1),
        "audio": write_compose(tmp_path / "audio-damc", "audio", seed=2),
    }


@pytest.fixture
def write_recipe(tmp_path: Path, base: Path, specialists: dict[str, Path]) -> Callable[..., Path]:
    """Writes a recipe for the tiny models; keyword arguments replace its top-level keys."""

    def write(**changes: Any) -> Path:
        content: dict[str, Any] = {
            "base_model": str(base),
            "merge_method": "ssam",
            "models": [{"model": str(path), "modality": modality} for modality, path in specialists.items()],
            "output": {"form": "adapter"},
        }
        content |= changes
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def write_omni(folder: Path, base: Path, disks: Sequence[str] = ("vision", "audio")) -> Path:
    """A merged model, folder/omni, of specialists of the tiny base: an image and an audio one, if no others are named."""
    models = [
        {"model": str(write_compose(folder / f"{disk}-damc", disk, seed=seed)), "modality": modality_name(disk)}
        for seed, disk in enumerate(disks)
    ]
    recipe = {"base_model": str(base), "merge_method": "ssam", "models": models, "output": {"form": "omni"}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    modalloy.merge(folder / "recipe.yaml", folder / "omni")
    return folder / "omni"


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Rewrite a folder's adapter_model.safetensors after `change`."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)

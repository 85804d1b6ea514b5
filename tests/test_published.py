"""The whole of ModelCompose in small: a Vicuna-shaped base, four DAMC specialists and the four published encoders, merged
into one model that answers. Every file has its published layout and names; all weights are random."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import soundfile
import torch
import yaml
from PIL import Image
from published_beats import qformer_tensors, write_beats
from published_clip import write_clip
from published_languagebind import write_languagebind
from published_pointbert import write_pointbert
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import modalloy
from modalloy.errors import CheckpointError, RecipeError
from modalloy.model import ChatModel
from modalloy.model.chat import placed_message
from modalloy.verify import verify

WIDTH, FFN, LAYERS, RANK = 32, 48, 2, 4
LOCAL = 5  # prefix and suffix tokens of DAMC
SHAPES = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH, WIDTH),
    "self_attn.v_proj": (WIDTH, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (FFN, WIDTH),
    "mlp.up_proj": (FFN, WIDTH),
    "mlp.down_proj": (WIDTH, FFN),
}
DISK = {"image": "vision", "audio": "audio", "video": "video", "point": "point"}
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def write_vicuna(folder: Path, *, legacy: bool = False) -> Path:
    """A tiny Llama with a sentencepiece tokenizer in Vicuna's files: no tokenizer.json, no chat template."""
    folder.mkdir(parents=True)
    sentences = [SYSTEM, "USER: What do these have in common? ASSISTANT: a dog", "image: \naudio: \nvideo: \npoint: \n"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences * 20),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
    tokens |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": legacy}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=340,
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_damc(folder: Path, modality: str, dim: int, seed: int) -> Path:
    """A DAMC specialist as ModelCompose saves it: one pickled dictionary, and its author's paths in config.json."""
    folder.mkdir(parents=True)
    generator, disk = torch.Generator().manual_seed(seed), DISK[modality]

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.1).bfloat16()

    tensors = {}
    for layer in range(LAYERS):
        for name, (rows, columns) in SHAPES.items():
            for adapter in ("default", disk):
                stem = f"model.layers.{layer}.{name}"
                tensors[f"{stem}.lora_A.{adapter}.weight"] = draw(RANK, columns)
                tensors[f"{stem}.lora_B.{adapter}.weight"] = draw(rows, RANK)
    for side in ("prefix", "suffix"):
        tensors |= {f"{side}_tokens.{adapter}": draw(1, LOCAL, WIDTH) for adapter in ("default", disk)}
    if modality == "audio":
        projector = {name: tensor.bfloat16() for name, tensor in qformer_tensors(dim=dim, width=WIDTH).items()}
    else:
        projector = {
            "0.weight": draw(WIDTH, dim),
            "0.bias": draw(WIDTH),
            "2.weight": draw(WIDTH, WIDTH),
            "2.bias": draw(WIDTH),
        }
    tensors |= {f"model.modal_projectors.{disk}.{name}": tensor for name, tensor in projector.items()}
    torch.save(tensors, folder / "adapter_model.bin")
    config = {"model_type": "multimodal", "lora_strategy": "modal+language", "lora_r": RANK, "lora_alpha": 2 * RANK}
    config |= {"hidden_size": WIDTH, f"mm_{disk}_encoder": "/the/author's/own/path", "_name_or_path": "vicuna"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe beside everything that it names by relative paths."""
    folder = tmp_path_factory.mktemp("published")
    write_vicuna(folder / "vicuna")
    places = {
        "image": write_clip(folder / "clip-vit-large-patch14-336"),
        "audio": write_beats(folder / "beats"),
        "video": write_languagebind(folder / "LanguageBind_Video_merge"),
        "point": write_pointbert(folder / "point"),
    }
    options = {"point": {"heads": 2, "groups": 5, "group_size": 4, "points": 64}}
    models = []
    for seed, (modality, place) in enumerate(places.items()):
        location = str(place.relative_to(folder))
        encoder: Any = {"path": location, **options[modality]} if modality in options else location
        dim = {"image": 32, "audio": 24, "video": 24, "point": 24}[modality]
        write_damc(folder / f"{modality}-damc", modality, dim, seed)
        models.append({"model": f"{modality}-damc", "modality": modality, "encoder": encoder})
    content = {"base_model": "vicuna", "models": models, "output": {"form": "omni"}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def omni(recipe: Path) -> Path:
    modalloy.merge(recipe, recipe.parent / "omni")
    return recipe.parent / "omni"


@pytest.fixture(scope="module")
def chat(omni: Path) -> ChatModel:
    return modalloy.load_model(omni)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One file of each kind."""
    folder, rng = tmp_path_factory.mktemp("media"), np.random.default_rng(0)
    paths = {"image": folder / "a.png", "audio": folder / "a.wav", "video": folder / "a.gif", "point": folder / "a.npy"}
    Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(paths["image"])
    soundfile.write(paths["audio"], rng.standard_normal(16_000) * 0.1, 16_000)
    frames = [Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)) for _ in range(4)]
    frames[0].save(paths["video"], save_all=True, append_images=frames[1:])
    np.save(paths["point"], rng.random((100, 6), dtype=np.float32))
    return paths


def ask(chat: ChatModel, media: dict[str, Path], text: str = "What do these have in common?") -> Any:
    parts = [{"type": modality, "path": path} for modality, path in media.items()]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    return chat.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)


def test_four_senses_answer_together(chat: ChatModel, media: dict[str, Path], omni: Path) -> None:
    assert set(chat.modalities) == set(DISK)
    inputs = ask(chat, media)
    counts = {m: int((inputs["owners"] == chat.processor.owners.index(m)).sum()) for m in DISK}
    features = {"image": 9, "audio": 4, "video": 3 * 5, "point": 6}
    assert counts == {m: features[m] + 2 * LOCAL for m in DISK}
    logits = chat.model(**inputs).logits
    assert bool(torch.isfinite(logits).all())
    assert isinstance(chat.ask("What do these have in common?", max_new_tokens=3, **media), str)
    assert verify(omni).layers >= 12
    again = modalloy.load_model(omni).model(**inputs).logits  # nothing is drawn at random
    assert torch.equal(again, logits)


def test_every_tensor_is_where_it_was_published(chat: ChatModel, omni: Path, recipe: Path) -> None:
    stored = load_file(omni / "adapter_model.safetensors")
    for modality, disk in DISK.items():
        theirs = torch.load(recipe.parent / f"{modality}-damc" / "adapter_model.bin", weights_only=True)
        own = {
            name: tensor for name, tensor in theirs.items() if f".{disk}." in name or name.endswith(f"_tokens.{disk}")
        }
        assert len(own) > 30 and all(torch.equal(stored[name], tensor) for name, tensor in own.items())
        prefix = chat.model.prefix_tokens[modality]
        assert torch.equal(prefix, own[f"prefix_tokens.{disk}"].float())
        assert chat.model.config.modalities[modality]["update"] == {"rank": RANK, "scale": 2.0, "linears": None}
    copied = {path.relative_to(omni / "encoders").parts[0] for path in (omni / "encoders").rglob("*.*")}
    assert copied == set(DISK)


def test_one_specialist_merged_is_that_specialist(recipe: Path, media: dict[str, Path], tmp_path: Path) -> None:
    """Merging one gives its own outputs, by task arithmetic with λ = 1; loaded alone, too."""
    content = yaml.safe_load(recipe.read_text())
    for index, modality in enumerate(DISK):
        entry = content["models"][index]
        single = content | {"models": [entry], "merge_method": "task_arithmetic"}
        path = recipe.parent / f"single-{modality}.yaml"
        path.write_text(yaml.safe_dump(single))
        modalloy.merge(path, tmp_path / modality)
        merged = modalloy.load_model(tmp_path / modality)
        given = entry["encoder"]
        where = given if isinstance(given, str) else given["path"]
        absolute = str(recipe.parent / where)
        encoder = absolute if isinstance(given, str) else given | {"path": absolute}
        alone = modalloy.load_model(
            recipe.parent / f"{modality}-damc", base=str(recipe.parent / "vicuna"), encoder=encoder
        )
        alone.processor.chat_template, alone.processor.labels = merged.processor.chat_template, merged.processor.labels
        inputs = ask(merged, {modality: media[modality]})
        torch.testing.assert_close(alone.model(**inputs).logits, merged.model(**inputs).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("legacy", [True, False])
def test_prompt_has_the_published_token_ids(chat: ChatModel, tmp_path: Path, legacy: bool) -> None:
    """vicuna_v1, split at the placeholders, each chunk tokenised alone by sentencepiece, its first token at the start only."""
    from transformers import AutoTokenizer

    base = write_vicuna(tmp_path / "vicuna", legacy=legacy)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
    template, labels = chat.processor.chat_template, chat.processor.labels
    assert labels
    processor = type(chat.processor)(
        AutoTokenizer.from_pretrained(base), chat.processor.modalities, labels, chat_template=template
    )
    parts = [{"type": modality, modality: None} for modality in ("image", "point")]

    def ids(content: Any) -> list[list[int]]:
        """Token ids of the text before, between and after the media."""
        marked = processor._rendered([{"role": "user", "content": content}], [], template, True, {})
        found, owners = processor.tokenize(marked)
        chunks: list[list[int]] = [[]]
        for index, (token, owner) in enumerate(zip(found, owners, strict=True)):
            if owner == 0:
                chunks[-1].append(token)
            elif owners[index - 1] != owner:
                chunks.append([])
        return chunks

    for part in parts:
        part["path"] = "unread"
    wanted = [f"{SYSTEM} USER: image: ", "\npoint: ", "\nWhat do these have in common? ASSISTANT:"]
    expected = [[1, *pieces.encode(wanted[0])], *(pieces.encode(chunk) for chunk in wanted[1:])]
    assert ids([*parts, {"type": "text", "text": "What do these have in common?"}]) == expected
    # as the published files write it: placeholders in the text; one at its end leaves a chunk that begins with a space
    wanted = [f"{SYSTEM} USER: What is in ", " and ", " ASSISTANT:"]
    expected = [[1, *pieces.encode(wanted[0])], *(pieces.encode(chunk) for chunk in wanted[1:])]
    media = [(part["type"], "unread") for part in parts]
    (message,) = placed_message("What is in <image> and <point>", media, ("image", "point"))
    assert ids(message["content"]) == expected


def test_turns_are_separated_as_published(chat: ChatModel) -> None:
    turns = [("user", "What is it?"), ("assistant", "a dog"), ("user", "a dog?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    rendered = chat.processor.apply_chat_template(messages, add_generation_prompt=True)
    assert rendered == f"<s>{SYSTEM} USER: What is it? ASSISTANT: a dog</s>USER: a dog? ASSISTANT:"


def test_encoders_that_do_not_fit_are_refused(recipe: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(recipe.read_text())

    def refused(error: type[Exception], match: str, **changes: Any) -> None:
        models = [entry | changes if entry["modality"] == "image" else entry for entry in content["models"]]
        path = recipe.parent / "broken.yaml"
        path.write_text(yaml.safe_dump(content | {"models": models}))
        with pytest.raises(error, match=match):
            modalloy.merge(path, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused(CheckpointError, "model_type is", encoder="LanguageBind_Video_merge")
    refused(RecipeError, "is of modality 'video', not 'image'", encoder="languagebind:LanguageBind_Video_merge")
    refused(
        RecipeError, "has no option 'random_flop'", encoder={"path": "clip-vit-large-patch14-336", "random_flop": True}
    )
    refused(CheckpointError, "no such folder", encoder="./nowhere")
    write_clip(tmp_path / "wider", hidden_size=64)
    refused(
        CheckpointError,
        "projector takes 32 features to 32, but the encoder .* gives 64",
        encoder=str(tmp_path / "wider"),
    )

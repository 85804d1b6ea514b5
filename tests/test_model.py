"""The routed model against plain per-token arithmetic, and everything that `load_model` and chat promise."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HEADS, KV_HEADS, LAYERS, SLOTS, TEMPLATE, WIDTH, edit_tensors, write_compose, write_omni
from safetensors.torch import load_file
from torch import Tensor

import modalloy
from modalloy import builtin
from modalloy.errors import CheckpointError, MediaError
from modalloy.model import ChatModel, load_model
from modalloy.model.config import tokens_per_medium
from modalloy.model.opening import without_stderr
from modalloy.model.routing import TEXT

WriteRecipe = Callable[..., Path]
IMAGE, SOUND = builtin.SAMPLES / "dog.webp", builtin.SAMPLES / "dog.flac"


@pytest.fixture
def omni(write_recipe: WriteRecipe, tmp_path: Path) -> Path:
    modalloy.merge(write_recipe(output={"form": "omni"}), tmp_path / "omni")
    return tmp_path / "omni"


@pytest.fixture
def chat(omni: Path) -> ChatModel:
    return modalloy.load_model(omni, dtype="float64")


def mixed_inputs(chat: ChatModel) -> tuple[Tensor, Tensor, Tensor]:
    """Random embeddings of text, two images and a sound, with their owners and attention mask."""
    owners = torch.tensor([[0, 0, 1, 1, 1, 0, 2, 2, 0, 1, 1, 0, 0]])
    embeds = torch.randn(1, owners.shape[1], WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return embeds, owners, torch.ones_like(owners)


def dense_forward(
    base: dict[str, Tensor], update: dict[tuple[str, int], Tensor], embeds: Tensor, owners: Tensor
) -> Tensor:
    """Logits (tokens, vocabulary) of a Llama, token by token, each with the dense weights of its owner (float64)."""

    def linear(slot: str, x: Tensor) -> Tensor:  # (tokens, in) -> (tokens, out)
        weight = base[f"{slot}.weight"]
        return torch.stack(
            [(weight + update.get((slot, int(o)), 0)) @ row for row, o in zip(x, owners[0], strict=True)]
        )

    def norm(name: str, x: Tensor) -> Tensor:  # transformers normalises in float32, whatever the model's type
        single = x.float()
        return (single * torch.rsqrt(single.pow(2).mean(-1, keepdim=True) + 1e-6)).double() * base[f"{name}.weight"]

    def rotate(x: Tensor) -> Tensor:  # (heads, tokens, dim)
        dim = x.shape[-1]
        angles = torch.arange(x.shape[1])[:, None] * (1.0 / 10000 ** (torch.arange(0, dim, 2).float() / dim))
        cos, sin = angles.cos().double().repeat(1, 2), angles.sin().double().repeat(1, 2)  # float32 there, too
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    hidden = embeds[0]
    tokens, dim = len(hidden), WIDTH // HEADS
    future = torch.ones(tokens, tokens).triu(1).bool()
    for index in range(LAYERS):
        layer = f"model.layers.{index}"
        x = norm(f"{layer}.input_layernorm", hidden)
        q, k, v = (linear(f"{layer}.self_attn.{p}_proj", x).view(tokens, -1, dim).transpose(0, 1) for p in "qkv")
        q, k = rotate(q), rotate(k).repeat_interleave(HEADS // KV_HEADS, 0)
        weights = (q @ k.transpose(1, 2) / dim**0.5).masked_fill(future, -torch.inf).softmax(-1)
        mixed = weights @ v.repeat_interleave(HEADS // KV_HEADS, 0)
        hidden = hidden + linear(f"{layer}.self_attn.o_proj", mixed.transpose(0, 1).reshape(tokens, WIDTH))
        x = norm(f"{layer}.post_attention_layernorm", hidden)
        gate = torch.nn.functional.silu(linear(f"{layer}.mlp.gate_proj", x))
        hidden = hidden + linear(f"{layer}.mlp.down_proj", gate * linear(f"{layer}.mlp.up_proj", x))
    return norm("model.norm", hidden) @ base["model.embed_tokens.weight"].T


def updates_of(folder: Path, adapters: dict[str, tuple[int, float]]) -> dict[tuple[str, int], Tensor]:
    """Dense updates by (linear, owner index) from a folder's file, read without the package."""
    stored = {name: tensor.double() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    return {
        (stem, owner): scale * stored[f"{stem}.lora_B.{adapter}.weight"] @ stored[f"{stem}.lora_A.{adapter}.weight"]
        for stem in SLOTS
        for adapter, (owner, scale) in adapters.items()
    }


def base_weights(base: Path) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in load_file(base / "model.safetensors").items()}


def routed_logits(chat: ChatModel, embeds: Tensor, owners: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        return chat.model(inputs_embeds=embeds, owners=owners, attention_mask=mask).logits[0]


def test_routed_forward_equals_per_token_dense_weights(chat: ChatModel, omni: Path, base: Path) -> None:
    embeds, owners, mask = mixed_inputs(chat)
    update = updates_of(omni, {"default": (0, 1.0), "vision": (2, 2.0), "audio": (1, 2.0)})
    wanted = dense_forward(base_weights(base), update, embeds, owners)
    found = routed_logits(chat, embeds, owners, mask)
    assert (found - wanted).abs().max() <= 1e-10 * wanted.abs().max()
    everything_text = dense_forward(base_weights(base), update, embeds, torch.zeros_like(owners))
    assert (everything_text - wanted).abs().max() > 1e-2  # routing matters


def test_a_specialist_loads_alone(specialists: dict[str, Path], base: Path) -> None:
    chat = modalloy.load_model(specialists["audio"], base=str(base), dtype="float64")
    embeds, owners, mask = mixed_inputs(chat)
    owners = (owners == 2).long()
    update = updates_of(specialists["audio"], {"default": (0, 2.0), "audio": (1, 2.0)})
    wanted = dense_forward(base_weights(base), update, embeds, owners)
    assert (routed_logits(chat, embeds, owners, mask) - wanted).abs().max() <= 1e-10 * wanted.abs().max()


def test_single_path_specialists_use_the_text_weights_everywhere(
    write_recipe: WriteRecipe, tmp_path: Path, base: Path
) -> None:
    """`lora_strategy: same` (NaiveMC's layout): one adapter for all tokens."""
    models = [
        {"model": str(write_compose(tmp_path / "same" / disk, disk, same=True, seed=seed)), "modality": disk}
        for seed, disk in enumerate(("vision", "audio"))
    ]
    modalloy.merge(write_recipe(models=models, output={"form": "omni"}), tmp_path / "omni")
    chat = modalloy.load_model(tmp_path / "omni", dtype="float64")
    embeds, owners, mask = mixed_inputs(chat)
    update = updates_of(tmp_path / "omni", {"default": (0, 1.0)})
    wanted = dense_forward(base_weights(base), update, embeds, torch.zeros_like(owners))
    assert (routed_logits(chat, embeds, owners, mask) - wanted).abs().max() <= 1e-10 * wanted.abs().max()
    assert tokens_per_medium(chat.model.config.modalities["image"]) == 4  # no prefix, no suffix


def test_text_only_prompts_touch_only_the_text_path(chat: ChatModel) -> None:
    clean = chat.ask("what is this", max_new_tokens=5)
    for linear in chat.model.linears.values():
        for owner in ("image", "audio"):
            getattr(linear, f"up_{owner}").data.fill_(torch.nan)
    inputs = prompt(chat, [{"role": "user", "content": "what is this"}])
    assert chat.ask("what is this", max_new_tokens=5) == clean
    assert bool(torch.isfinite(chat.model(**inputs).logits).all())
    with_image = prompt(chat, question("image"))
    assert bool(torch.isnan(chat.model(**with_image).logits).any())  # the poison works


def prompt(chat: ChatModel, messages: list[dict[str, Any]]) -> Any:
    return chat.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)


def question(*modalities: str) -> list[dict[str, Any]]:
    files = {"image": str(IMAGE), "audio": str(SOUND)}
    parts = [{"type": modality, "path": files[modality]} for modality in modalities]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "what is this ?"}]}]


def test_generated_tokens_use_the_text_path_and_the_cache_changes_nothing(chat: ChatModel) -> None:
    inputs = prompt(chat, question("image", "audio"))
    length = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
    seen = []
    hook = chat.model.decoder.register_forward_pre_hook(
        lambda *_: seen.append([owner for owner, _ in chat.model.routes.rows])
    )
    cached = chat.model.generate(**inputs, **options)
    hook.remove()
    assert seen[0] == ["text", "audio", "image"] and set(map(tuple, seen[1:])) == {("text",)} and len(seen) == 12
    # without any cache: run the whole sequence again for every token, new tokens owned by text
    ids, owners = inputs["input_ids"], inputs["owners"]
    features = {modality: chat.model.encode(modality, media) for modality, media in inputs["media"].items()}
    for _ in range(12):
        embeds = chat.model.embed(ids, owners, features)
        with torch.no_grad():
            logits = chat.model(inputs_embeds=embeds, owners=owners, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        owners = torch.cat([owners, torch.zeros(1, 1, dtype=torch.long)], 1)
    assert cached[0, length:].tolist() == ids[0, length:].tolist()


def test_score_options_equals_full_forwards(chat: ChatModel) -> None:
    messages, options = question("image"), ["a dog", "yes", "the cat are you"]
    found = chat.score_options(messages, options)
    inputs = prompt(chat, messages)
    features = {"image": chat.model.encode("image", inputs["media"]["image"])}
    for option, score in zip(options, found, strict=True):
        answer = torch.tensor([chat.processor.tokenizer.encode(option + "</s>", add_special_tokens=False)])
        ids = torch.cat([inputs["input_ids"], answer], 1)
        owners = torch.cat([inputs["owners"], torch.zeros_like(answer)], 1)
        with torch.no_grad():
            logits = chat.model(inputs_embeds=chat.model.embed(ids, owners, features), owners=owners).logits
        likelihood = logits[0, -answer.shape[1] - 1 : -1].log_softmax(-1).gather(1, answer.T).sum()
        assert score == pytest.approx(float(likelihood), abs=1e-9)


def test_batches_of_media_are_embedded_in_reading_order(chat: ChatModel) -> None:
    inputs = prompt(chat, question("image", "audio", "image"))
    owners = inputs["owners"][0].tolist()
    image, audio = (tokens_per_medium(chat.model.config.modalities[modality]) for modality in ("image", "audio"))
    runs = [owner for owner, before in zip(owners, [None, *owners], strict=False) if owner != before]
    assert [run for run in runs if run] == [2, 1, 2]
    assert owners.count(2) == 2 * image and owners.count(1) == audio == 6
    features = torch.randn(2, 4, 1280, dtype=torch.float64)
    with pytest.raises(ValueError, match="6 tokens belong to audio, but 0 media of 6 tokens"):
        chat.model.embed(inputs["input_ids"], inputs["owners"], {"image": features})
    sound = torch.randn(1, 4, 3840, dtype=torch.float64)
    embeds = chat.model.embed(inputs["input_ids"], inputs["owners"], {"image": features, "audio": sound})
    for index, start in enumerate([owners.index(2), len(owners) - owners[::-1].index(2) - image]):
        projected = chat.model.projectors["image"](features[index])
        assert torch.equal(embeds[0, start], chat.model.prefix_tokens["image"][0, 0])
        assert torch.allclose(embeds[0, start + 1 : start + 5], projected)
        assert torch.equal(embeds[0, start + 5], chat.model.suffix_tokens["image"][0, 0])


def test_text_is_tokenised_chunk_by_chunk_around_media(chat: ChatModel) -> None:
    content = [
        {"type": "text", "text": "the same"},
        {"type": "vision", "path": str(IMAGE)},
        {"type": "text", "text": "dog"},
    ]
    ids, owners = chat.processor.render([{"role": "user", "content": content}])
    words = chat.processor.tokenizer.convert_ids_to_tokens(
        [i for i, owner in zip(ids, owners, strict=True) if owner == 0]
    )
    assert words == ["<s>", "user", ":", "the", "same", "dog", "</s>", "<s>", "assistant", ":"]
    assert owners == [0] * 5 + [2] * 6 + [0] * 5


def test_a_modality_that_the_model_lacks_is_refused(chat: ChatModel) -> None:
    with pytest.raises(MediaError, match="takes no video input; it takes: image, audio"):
        chat.ask("what is this", video="clip.webm")


def test_base_weights_stay_bit_exact(chat: ChatModel, base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    for slot, linear in chat.model.linears.items():
        assert torch.equal(linear.weight.float(), weights[slot])
        assert set(linear.scales) == {TEXT, "image", "audio"}


def test_specialists_with_different_chat_templates_are_refused(
    write_recipe: WriteRecipe, specialists: dict[str, Path], tmp_path: Path
) -> None:
    (specialists["image"] / "chat_template.jinja").write_text(TEMPLATE)
    (specialists["audio"] / "chat_template.jinja").write_text(TEMPLATE + " ")
    with pytest.raises(CheckpointError, match="different chat templates"):
        modalloy.merge(write_recipe(output={"form": "omni"}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("model.modal_projectors.audio.2.bias", "missing tensor projectors.audio.2.bias"),
        ("prefix_tokens.vision", "missing tensor prefix_tokens.image"),
        (
            "model.layers.0.mlp.up_proj.lora_A.vision.weight",
            "missing tensor decoder.model.layers.0.mlp.up_proj.down_image",
        ),
    ],
)
def test_an_incomplete_model_is_refused(omni: Path, remove: str, message: str) -> None:
    edit_tensors(omni, lambda tensors: tensors.pop(remove))
    with pytest.raises(CheckpointError, match=message):
        modalloy.load_model(omni)


def test_import_is_cheap() -> None:
    import subprocess
    import sys

    heavy = ("transformers", "ray", "PIL", "av", "soundfile", "soxr", "scipy")
    code = f"import sys, modalloy.senses.media; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_a_specialist_of_a_base_without_a_template_is_asked_as_modelcompose_does(
    base: Path, tmp_path: Path, specialists: dict[str, Path]
) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(base, plain)
    (plain / "chat_template.jinja").unlink()
    chat = modalloy.load_model(specialists["image"], base=str(plain))
    message = [
        {"role": "user", "content": [{"type": "image", "path": "dog.png"}, {"type": "text", "text": "what is this ?"}]}
    ]
    shown = chat.processor.apply_chat_template(message, add_generation_prompt=True)
    assert "USER: image: <image>\nwhat is this ? ASSISTANT:" in shown


def test_halves_of_a_mark_in_two_texts_make_no_medium(base: Path, specialists: dict[str, Path]) -> None:
    processor = modalloy.load_model(specialists["image"], base=str(base)).processor
    parts = [{"type": "text", "text": "a \ue000image"}, {"type": "text", "text": "\ue001 dog"}]
    assert "a image dog" in processor.apply_chat_template([{"role": "user", "content": parts}])
    split = [{"role": "user", "content": "a \ue000image"}, {"role": "user", "content": "\ue001 dog"}]
    assert set(processor.render(split)[1]) == {0}


def test_models_are_loaded_in_several_threads(base: Path, tmp_path: Path) -> None:
    """transformers' loader changes what holds for the whole process: two at once lose tensors."""
    omni = write_omni(tmp_path, base)
    folders = [base, omni, base, omni]
    alone = [load_model(folder).model.state_dict() for folder in folders[:2]]
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(load_model, folders))
    for index, chat in enumerate(loaded):
        found = chat.model.state_dict()
        assert found.keys() == alone[index % 2].keys()
        assert all(torch.equal(found[name], one) for name, one in alone[index % 2].items())


def test_stderr_comes_back_whatever_threads_put_it_aside(capfd: pytest.CaptureFixture[str]) -> None:
    """Interleaved, one would save what another put in its place."""
    turns = threading.Barrier(4)

    def aside(_: int) -> None:
        for _ in range(20):
            turns.wait(10)
            with without_stderr():
                time.sleep(0.001)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(aside, range(4)))
    os.write(2, b"here")
    assert capfd.readouterr().err == "here"


@pytest.mark.parametrize("of", ["the model", "its decoder", "a decoder"])
@pytest.mark.parametrize(("key", "count"), [("num_hidden_layers", 10**6), ("num_labels", 10**9)])
def test_a_config_of_a_billion_parts_is_refused(key: str, count: int, of: str, base: Path, tmp_path: Path) -> None:
    folder = base if of == "a decoder" else write_omni(tmp_path, base)
    shutil.copytree(folder, tmp_path / "changed")
    file = tmp_path / "changed" / "config.json"
    told = json.loads(file.read_text())
    (told["text_config"] if of == "its decoder" else told)[key] = count
    file.write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match=f"{key} is {count} in config.json, more than any model has"):
        load_model(file.parent)

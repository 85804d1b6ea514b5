"""`export --to llama.cpp` writes a picture encoder that llama.cpp has as mmproj: llama.cpp's own encoding of pictures is the judge.

llama.cpp computes the convolution of patches and GELU by float16, so embeddings agree within a few parts in a thousand of the
largest (measured: 6.7e-4 of CLIP, 5.7e-4 of SigLIP).
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mtmd
import native_models
import numpy as np
import pytest
import torch
import transformers
import yaml
from conftest import WIDTH, edit_tensors, write_compose
from PIL import Image
from published_clip import write_clip
from serving import image
from test_export import QUESTION, bpe, changed, config_of, needs_llama_cpp, run, write_decoder

import modalloy
from modalloy.model import ChatModel, load_model
from modalloy.model.chat import user_message
from modalloy.model.llama_cpp import LlamaChat, load_exported

pytestmark = needs_llama_cpp
CLOSE = 2e-3  # of embeddings, relative to the largest: about 2^-11 at each of a few roundings to float16
SIZE, PATCHES = 42, 9  # of write_clip's pictures
LLAMA_ORDER = [*range(2, PATCHES + 1), 0]  # of CLIP's tokens, class token first: those that llama.cpp gives
MARKER = "<__media__>"
TEMPLATE = (  # of a whole LLaVA, with nothing between a picture and the text
    "{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endfor %}"
)

# llama-server's own answer to a picture and a question; arguments: base, adapter, mmproj, the picture as a data URL, the question
SERVER = """
import json, sys
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, adapter, params.mmproj.path, url, question = sys.argv[1:]
params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
params.port = 0
params.n_ctx, params.n_parallel, params.cpuparams.n_threads, params.mmproj_use_gpu = 256, 1, 1, False
parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
asked = {"messages": [{"role": "user", "content": parts}], "max_tokens": 8, "temperature": 0}
with open("answer.json", "w") as file:
    json.dump(xllamacpp.Server(params).handle_chat_completions(asked), file)
"""


def write_specialist(folder: Path, **options: Any) -> Path:
    """A ModelCompose specialist with a projector for write_clip's features."""
    write_compose(folder, "vision", **options)

    def change(tensors: dict[str, Any]) -> None:
        for name in tensors:
            if name.endswith("projectors.vision.0.weight"):
                tensors[name] = tensors[name][:, :32].contiguous()

    edit_tensors(folder, change)
    return folder


def write_merge(folder: Path, *others: dict[str, Any], **options: Any) -> Path:
    """A merge of an image specialist with CLIP, and others."""
    write_decoder(folder / "base", config_of("llama", 320, tie_word_embeddings=True), bpe("qwen2"))
    image = {"model": str(write_specialist(folder / "image", **options)), "modality": "image"}
    image["encoder"] = str(write_clip(folder / "clip"))
    recipe = {"base_model": str(folder / "base"), "merge_method": "ssam", "models": [image, *others]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"output": {"form": "omni"}}))
    modalloy.merge(folder / "recipe.yaml", folder / "omni")
    return folder / "omni"


def picture(width: int, height: int) -> Image.Image:
    """A smooth picture."""
    small = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge whose pictures' tokens use the weights of text."""
    return write_merge(tmp_path_factory.mktemp("shared"), same=True)


@pytest.fixture(scope="module")
def torches(shared: Path) -> ChatModel:
    return load_model(shared)


@pytest.fixture(scope="module")
def exported(shared: Path) -> Path:
    from modalloy.export.llama_cpp import export

    done = export(shared, shared.parent / "llama", kind="f32")
    assert done["mmproj"] == {"image": "mmproj-image.gguf"}
    return shared.parent / "llama"


@pytest.fixture(scope="module")
def llama(exported: Path) -> Iterator[LlamaChat]:
    chat = load_exported(exported, exact=True)
    yield chat
    chat.decoder.close()


def encoded(llama: LlamaChat, mmproj: Path, shown: Image.Image) -> np.ndarray:
    """A picture's embeddings (n, WIDTH) by llama.cpp."""
    found = mtmd.chunks(mmproj, llama.decoder._model, MARKER, np.asarray(shown), WIDTH)
    return next(chunk for chunk in found if chunk.ndim == 2)


@torch.no_grad()
def features(chat: ChatModel, pixels: torch.Tensor) -> torch.Tensor:
    """CLIP's hidden states (PATCHES, 32) in the order in which llama.cpp gives them."""
    encoder: Any = chat.model.encoders["image"]
    found: torch.Tensor = encoder.vision_model(pixels[None])[0, LLAMA_ORDER]
    return found


@torch.no_grad()
def by_torch(chat: ChatModel, shown: Image.Image) -> np.ndarray:
    pixels = chat.processor.preprocess("image", shown)
    found: np.ndarray = chat.model.projectors["image"](features(chat, pixels)).numpy()
    return found


def off(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("size", [SIZE, 100, 30])
def test_a_square_picture_has_pytorchs_embeddings(
    size: int, llama: LlamaChat, torches: ChatModel, exported: Path
) -> None:
    shown = picture(size, size)
    wanted = by_torch(torches, shown)
    found = encoded(llama, exported / "mmproj-image.gguf", shown)
    assert off(found, wanted) < CLOSE
    assert off(np.roll(found, 1, 0), wanted) > 0.1


def test_an_oblong_one_is_resized_before_it_is_padded(llama: LlamaChat, torches: ChatModel, exported: Path) -> None:
    shown = picture(2 * SIZE, SIZE)
    found = encoded(llama, exported / "mmproj-image.gguf", shown)
    encoder: Any = torches.model.encoders["image"]
    square = Image.new("RGB", (SIZE, SIZE), tuple(int(255 * mean) for mean in encoder.image_mean))
    square.paste(shown.resize((SIZE, SIZE // 2), Image.Resampling.BICUBIC), (0, (SIZE - SIZE // 2) // 2))
    assert off(found, by_torch(torches, square)) < CLOSE < off(found, by_torch(torches, shown))


def answered(llama: LlamaChat, chunks: list[np.ndarray], count: int) -> list[int]:
    """`count` tokens, greedily, after chunks of ids or embeddings, every token by the adapter of text."""
    place, ids, left = 0, list[int](), chunks
    while len(ids) < count:
        for chunk in left:
            n = len(chunk)
            wanted = [False] * (n - 1) + [True]
            logits = llama.decoder.run("text", chunk, range(place, place + n), [0] * n, wanted)
            place += n
        ids.append(int(logits[-1].argmax()))
        left = [np.array(ids[-1:])]
    llama.decoder.forget(0)
    return ids


def check_answer(llama: LlamaChat, theirs: ChatModel, prompt: Any, mmproj: Path, shown: Image.Image) -> None:
    """llama.cpp alone, of text, picture, base, adapter and mmproj, gives PyTorch's tokens and greedy answer."""
    at = [place for place, owner in enumerate(prompt.owners) if owner]
    parts = prompt.ids[: at[0]], prompt.ids[at[-1] + 1 :]
    before, after = map(llama.processor.tokenizer.decode, parts)
    width = theirs.model.config.text_config.hidden_size
    made = mtmd.chunks(mmproj, llama.decoder._model, f"{before}{MARKER}{after}", np.asarray(shown), width)
    assert (made[0].tolist(), len(made[1]), made[2].tolist()) == (parts[0], len(at), parts[1])
    ids = answered(llama, made, 8)
    assert theirs.processor.answer(torch.tensor(ids)) == theirs.generate([prompt], max_new_tokens=8)[0][0]


def test_where_every_token_uses_the_same_weights_the_answer_is_pytorchs(
    llama: LlamaChat, torches: ChatModel, exported: Path
) -> None:
    shown = picture(SIZE, SIZE)

    def seen(modality: str, medium: Any) -> torch.Tensor:
        return features(torches, torches.processor.preprocess(modality, medium))

    prompt = torches.prompt(user_message(QUESTION, [("image", shown)]), seen)
    check_answer(llama, torches, prompt, exported / "mmproj-image.gguf", shown)


def write_llava(folder: Path, kind: str) -> Path:
    """A merge of one whole LLaVA, whose tower is CLIP or SigLIP, with its processor."""
    tower = {"CLIP": native_models.clip, "Siglip": native_models.siglip}[kind](SIZE)
    tokenizer, strategy = bpe("qwen2"), {"CLIP": "default", "Siglip": "full"}[kind]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    sign = tokenizer.convert_tokens_to_ids("<image>")
    config = transformers.LlavaConfig(
        vision_config=tower,
        text_config=config_of("llama", 320, tie_word_embeddings=True),
        image_token_index=sign,
        vision_feature_layer=-2,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=True,
    )
    model = native_models.built(config, "LlavaForConditionalGeneration")
    for name, parameter in model.model.named_parameters():
        if "language_model" not in name:
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
    draw = torch.Generator().manual_seed(0)
    base = write_decoder(folder / "base", config.text_config, tokenizer)
    language = transformers.AutoModelForCausalLM.from_pretrained(base)
    for name, parameter in language.model.named_parameters():
        update = 0.02 * torch.randn(parameter.shape, generator=draw) if name.endswith("proj.weight") else 0
        model.model.language_model.get_parameter(name).copy_(parameter + update)
    model.save_pretrained(folder / "own")
    side = {"height": SIZE, "width": SIZE}
    sized: Any = getattr(transformers, f"{kind}ImageProcessor")(
        **{"size": {"shortest_edge": SIZE}, "crop_size": side, "resample": 3} if kind == "CLIP" else {"size": side}
    )
    options: dict[str, Any] = {"patch_size": 14, "vision_feature_select_strategy": strategy}
    transformers.LlavaProcessor(
        sized,
        tokenizer,
        num_additional_image_tokens=int(kind == "CLIP"),
        chat_template=TEMPLATE,
        **options,
    ).save_pretrained(folder / "own")
    models = [{"model": str(folder / "own"), "modality": "image"}]
    recipe = {"base_model": str(folder / "base"), "models": models, "merge_method": "task_arithmetic"}
    recipe |= {"parameters": {"scale": 1.0}, "output": {"form": "omni", "chat_template": "base", "compress_rank": 4}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    modalloy.merge(folder / "recipe.yaml", folder / "omni")
    return folder / "omni"


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_a_whole_llava_has_pytorchs_embeddings_and_with_siglip_its_answer(kind: str, tmp_path: Path) -> None:
    from modalloy.export.llama_cpp import export

    omni = write_llava(tmp_path, kind)
    export(omni, tmp_path / "llama", kind="f32")
    mmproj = tmp_path / "llama" / "mmproj-image.gguf"
    theirs, chat, shown = load_model(omni), load_exported(tmp_path / "llama", exact=True), picture(SIZE, SIZE)
    wanted = theirs.features("image", shown).embeddings.numpy()
    found = encoded(chat, mmproj, shown)
    is_last = kind == "CLIP"  # the class token
    assert found.shape == wanted.shape and off(found[: len(found) - is_last], wanted[is_last:]) < CLOSE
    if kind == "Siglip":
        prompt = theirs.prompt(user_message(QUESTION, [("image", shown)]))
        shown.save(tmp_path / "shown.png")
        url = image(tmp_path / "shown.png")["image_url"]["url"]
        files = [str(tmp_path / "llama" / name) for name in ("base-f32.gguf", "lora-text.gguf", mmproj.name)]
        subprocess.run(
            [sys.executable, "-c", SERVER, *files, url, QUESTION], cwd=tmp_path, check=True, capture_output=True
        )
        said = json.loads((tmp_path / "answer.json").read_text())
        assert said["usage"]["prompt_tokens"] == len(prompt.ids)
        answer = said["choices"][0]["message"]["content"].strip()
        assert answer == theirs.generate([prompt], max_new_tokens=8)[0][0]
    assert ("issue 25814" in (tmp_path / "llama" / "README.md").read_text()) == is_last
    chat.decoder.close()


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge whose senses have weights of their own: CLIP's pictures, and sounds."""
    folder = tmp_path_factory.mktemp("routed")
    sounds = {"model": str(write_compose(folder / "audio", "audio", seed=2)), "modality": "audio"}
    return write_merge(folder, sounds, tokens=0)


def test_what_an_mmproj_is_not_is_said(
    routed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf

    code, said, _ = run(capsys, monkeypatch, "export", str(routed), "--to", "llama.cpp", "-o", str(tmp_path / "out"))
    assert code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    command = "llama-server -m base-f16.gguf --lora lora-image.gguf --mmproj mmproj-image.gguf"
    for text in (said, card.replace("`", "")):
        assert f"{command}: NOT this model, since the adapter of image is then text's too" in text
        assert "audio: no mmproj: llama.cpp has no graph for builtin:whisper-tiny.en with a projector mlp" in text
    assert "Only square pictures are prepared alike" in card and "issue 25814" in card
    file = gguf.GGUFReader(tmp_path / "out" / "mmproj-image.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in file.tensors}
    assert kinds["v.blk.1.attn_q.weight"] == kinds["mm.0.weight"] == "F16" and "v.blk.2.ln1.weight" not in kinds
    assert kinds["v.position_embd.weight"] == kinds["mm.0.bias"] == "F32"
    assert file.fields["general.type"].contents() == "mmproj"


@pytest.mark.parametrize(
    ("change", "lacking"),
    [
        ({"projector": {"type": "mlp", "widths": [32, WIDTH]}}, "no graph for clip with a projector mlp of 1 layers"),
        ({"projector": {"type": "qformer"}}, "no graph for clip with a projector qformer"),
        ({"encoder": {"name": "languagebind", "settings": {}}}, "no graph for languagebind with a projector mlp"),
        ({"n_prefix": 1, "n_suffix": 1}, "no place for the 2 trained tokens around each medium"),
        ({"hidden_act": "relu"}, "no activation relu in a vision tower"),
        ({"num_hidden_layers": 1}, "no graph that takes the states after 0 of 1 blocks"),
        ({"native": {"config": {"model_type": "qwen2_vl"}}}, "an mmproj of qwen2_vl is not written here"),
        ({"native": {"like": "video"}}, "an mmproj of this class is not written here"),
    ],
)
def test_what_llama_cpp_lacks_is_named(change: dict[str, Any], lacking: str, shared: Path) -> None:
    from modalloy.export.merged import open_merged
    from modalloy.export.mmproj import vision

    merged = open_merged(shared)
    sizes = merged.config.modalities["image"]
    for key, value in change.items():
        place = sizes["encoder"]["settings"] if key in ("hidden_act", "num_hidden_layers") else sizes
        place[key] = value
    found = vision(merged, "image")
    assert isinstance(found, str) and found.startswith(lacking)


def test_an_encoder_that_is_gone_or_another_is_one_line(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def smaller(content: dict[str, Any]) -> None:
        content["modalities"]["image"]["encoder"]["settings"]["image_size"] = 28

    def elsewhere(content: dict[str, Any]) -> None:
        content["modalities"]["image"]["source"] = str(tmp_path / "nowhere")

    lines = {"position_embedding.weight is of shape .*, not ": smaller, "nowhere: no such folder": elsewhere}
    for number, (line, change) in enumerate(lines.items()):
        odd = changed(shared, tmp_path / f"odd-{number}", change)
        code, _, said = run(capsys, monkeypatch, "export", str(odd), "--to", "llama.cpp", "-o", str(tmp_path / "out"))
        assert code == 2 and said.count("\n") == 1 and re.search(line, said), said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd-0", "odd-1"]

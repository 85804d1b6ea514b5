"""Specialists that are transformers' own multimodal models: alone through an omni folder each is itself, bit for bit."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import native_models
import numpy as np
import pytest
import soundfile
import torch
import transformers
from native_models import MAKERS, VOCABULARY, Medium
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from modalloy import builtin, merge
from modalloy.errors import MediaError, RecipeError
from modalloy.model.load import load_model
from modalloy.planning.planner import plan
from modalloy.recipe import load_recipe
from modalloy.senses.native import Prepared
from modalloy.verify import verify

ROOT = Path(__file__).resolve().parent.parent
BEFORE, AFTER = [1, 10, 11, 12], [13, 14, 15]
GRID = 4096  # weights are multiples of 1 / GRID, so that a base plus an update is exact in float32
# the plain language model that a decoder of media's positions is
PLAIN = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3", "phi4_multimodal": "phi3"}
TEMPLATE = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"


def tokenizer(size: int = VOCABULARY) -> Any:
    """A tokenizer of whole words, w3 to w(size - 1)."""
    words = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, size))])}
    made = Tokenizer(models.WordLevel(words, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)
    found.chat_template = TEMPLATE
    return found


@torch.no_grad()
def write_base(folder: Path, model: Any, *, change: bool = True, seed: int = 5) -> Any:
    """The language model that a multimodal one was fine-tuned from, with exact updates; without `change` it is its decoder."""
    text = model.config.get_text_config()
    content = text.to_dict()
    kind = PLAIN.get(content["model_type"], content["model_type"])
    if kind != content["model_type"]:
        fields = transformers.CONFIG_MAPPING[kind]().to_dict().keys() - {"model_type", "architectures"}
        content = {key: value for key, value in content.items() if key in fields}
        rope = content["rope_parameters"]
        content["rope_parameters"] = {k: v for k, v in rope.items() if not k.startswith("mrope")}
        content["model_type"] = kind
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    content |= {"vocab_size": VOCABULARY, "tie_word_embeddings": head is table}
    config = transformers.CONFIG_MAPPING[kind].from_dict(content)
    base = transformers.AutoModelForCausalLM.from_config(config).eval()
    draw = torch.Generator().manual_seed(seed)
    own = dict(model.get_decoder().named_parameters())
    for name, parameter in base.model.named_parameters():
        mine = own[name]
        mine.copy_((mine * GRID).round() / GRID)
        parameter.copy_(mine[: len(parameter)])
        if change and "embed_tokens" not in name:
            parameter.sub_(torch.randint(-40, 41, parameter.shape, generator=draw) / GRID)
    if head is not table:
        base.lm_head.weight.copy_(head[:VOCABULARY])
    base.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return base


def write_specialist(folder: Path, model: Any) -> None:
    """The specialist's folder; no test of this kind prepares a medium with its processor."""
    model.save_pretrained(folder)
    tokenizer(model.get_input_embeddings().weight.shape[0]).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{}")


def write_recipe(folder: Path, models: list[dict[str, Any]], **more: Any) -> Path:
    output = {"form": "omni", "chat_template": "base"} | more.pop("output", {})
    content = {"base_model": "base", "models": models, "output": output, **more}
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(json.dumps(content))
    return folder / "recipe.yaml"


EXACT = {"merge_method": "task_arithmetic", "parameters": {"scale": 1.0}}


def blocks_of(model: Any, medium: Medium, times: int = 1, name: str = "") -> list[Any]:
    """The blocks of a medium shown `times` times."""
    length = len(medium.ids)
    places = tuple((at * length, (at + 1) * length) for at in range(times))
    found = model.encode(name or medium.modality, [Prepared(medium.inputs([], [], times), places)])
    return list(found)


def prompt(model: Any, medium: Medium, times: int = 1, name: str = "") -> dict[str, Tensor]:
    """Ids and owners of a medium between two texts."""
    length, owner = times * len(medium.ids), model.config.owners.index(name or medium.modality)
    ids = torch.tensor([[*BEFORE, *[0] * length, *AFTER]])
    owners = torch.tensor([[0] * len(BEFORE) + [owner] * length + [0] * len(AFTER)])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "owners": owners}


@torch.no_grad()
def logits_of(model: Any, medium: Medium, times: int = 1) -> Tensor:
    features = {medium.modality: blocks_of(model, medium, times)}
    found: Tensor = model(**prompt(model, medium, times), features=features).logits[0]
    return found


@torch.no_grad()
def own_logits(model: Any, medium: Medium, times: int = 1) -> Tensor:
    """The specialist's own logits over the base's vocabulary; some classes leave out their decoder's last scaling."""
    found: Tensor = model(**medium.inputs(BEFORE, AFTER, times)).logits[0, :, :VOCABULARY]
    text = model.config.get_text_config()
    return found / getattr(text, "logits_scaling", 1.0) * (getattr(text, "logit_scale", None) or 1.0)


@pytest.mark.parametrize("name", MAKERS)
def test_a_specialist_alone_is_itself(tmp_path: Path, name: str) -> None:
    """Base plus its whole update, its sense carried: own logits exactly, own greedy answer, two media, a saved copy."""
    model, medium = MAKERS[name]()
    write_base(tmp_path / "base", model)
    write_specialist(tmp_path / "own", model)
    report = merge(
        write_recipe(tmp_path, [{"model": "own", "modality": medium.modality}], **EXACT), tmp_path / "out", jobs=1
    )
    assert report.plan.merged_weights() > 0
    assert "recomputed" in report.verification.summary()
    loaded = load_model(tmp_path / "out").model
    assert torch.equal(logits_of(loaded, medium), own_logits(model, medium))
    if name != "llava_onevision":  # several images are tiled otherwise than one
        assert torch.equal(logits_of(loaded, medium, 2), own_logits(model, medium, 2))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    inputs = medium.inputs(BEFORE, AFTER)
    answer = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    media = {medium.modality: [Prepared(medium.inputs([], []), ((0, len(medium.ids)),))]}
    asked = prompt(loaded, medium)
    ours = loaded.generate(**asked, media=media, **options)[:, asked["input_ids"].shape[1] :]
    if int(answer.max()) < VOCABULARY:
        assert ours[0].tolist() == answer.tolist()
    loaded.save_pretrained(tmp_path / "saved")
    tokenizer().save_pretrained(tmp_path / "saved")
    again = type(loaded).from_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(again, medium), logits_of(loaded, medium))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a model that sees and one that hears, with their own processors, merged; a picture and a sound."""
    root = tmp_path_factory.mktemp("pair")
    see, hear = native_models.llava_on_qwen2()[0], native_models.qwen2_audio()[0]
    base = write_base(root / "base", see)
    take_base(hear, base, seed=6)
    see.save_pretrained(root / "see")
    hear.save_pretrained(root / "hear")
    native_models.write_image_processor(root / "see", tokenizer())
    native_models.write_audio_processor(root / "hear", tokenizer())
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 70, 3), dtype=np.uint8)).save(root / "a.png")
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (33, 20, 3), dtype=np.uint8)).save(root / "b.png")
    wave = np.random.default_rng(2).standard_normal(32_000).astype(np.float32) * 0.1
    soundfile.write(root / "a.wav", wave, 16_000)
    soundfile.write(root / "long.wav", np.tile(wave, 20), 16_000)
    merge(write_recipe(root, [{"model": "see"}, {"model": "hear"}]), root / "out")
    return root


@torch.no_grad()
def take_base(model: Any, base: Any, *, seed: int, change: bool = True, linears_only: bool = False) -> None:
    """Make a specialist's decoder the base plus exact updates."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.get_decoder().named_parameters():
        start = dict(base.model.named_parameters())[name]
        parameter[: len(start)].copy_(start)
        if change and "embed_tokens" not in name and (parameter.ndim == 2 or not linears_only):
            parameter.add_(torch.randint(-40, 41, parameter.shape, generator=draw) / GRID)
    head = model.get_output_embeddings().weight
    if head is not model.get_input_embeddings().weight:
        head[:VOCABULARY].copy_(base.lm_head.weight)


def asked(*parts: tuple[str, Path]) -> list[dict[str, Any]]:
    media = [{"type": kind, "path": path} for kind, path in parts]
    return [{"role": "user", "content": [*media, {"type": "text", "text": "w20 w21"}]}]


def test_two_specialists_answer_about_a_picture_and_a_sound(pair: Path) -> None:
    chat = load_model(pair / "out")
    assert chat.modalities == ("image", "audio")
    reply = chat.reply(asked(("image", pair / "a.png"), ("audio", pair / "a.wav")), max_new_tokens=5)
    assert reply.tokens["image"] == 4 and reply.tokens["audio"] > 50 and reply.new_tokens == 5
    words: list[str] = []
    streamed = chat.reply(
        asked(("image", pair / "a.png"), ("audio", pair / "a.wav")), max_new_tokens=5, on_text=words.append
    )
    assert "".join(words).strip() == streamed.answer == reply.answer


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp is not installed (extra llamacpp)")
def test_llama_cpp_answers_about_both_as_pytorch_does(pair: Path, tmp_path: Path) -> None:
    """Native senses run here, with the merged model's table; norms that were averaged are the base's of the export."""
    from modalloy.export.llama_cpp import export
    from modalloy.export.merged import open_merged
    from modalloy.export.weights import Geometry, write_base
    from modalloy.model.llama_cpp import load_exported

    merged = open_merged(pair / "out")
    geometry = Geometry(merged.config.text_config)
    base = tmp_path / "base.gguf"
    write_base(base, geometry, merged.decoder, "f32", lambda writer: writer.add_tokenizer_model("none"))
    export(pair / "out", tmp_path / "out", gguf=base)
    ours, theirs = load_exported(tmp_path / "out", exact=True), load_model(pair / "out")
    for parts in ([], [("image", pair / "a.png")], [("image", pair / "a.png"), ("audio", pair / "a.wav")]):
        messages = asked(*parts)
        assert ours.reply(messages, max_new_tokens=5) == theirs.reply(messages, max_new_tokens=5)
        options = ["w5 w6", "w7"]
        wanted = theirs.score_options(messages, options)
        assert ours.score_options(messages, options) == pytest.approx(wanted, rel=1e-3)


def test_prompts_of_a_batch_answer_as_alone(pair: Path) -> None:
    chat = load_model(pair / "out")
    prompts = [
        chat.prompt(asked(("image", pair / "a.png"), ("image", pair / "b.png"))),
        chat.prompt(asked(("audio", pair / "a.wav"))),
        chat.prompt(asked()),
    ]
    alone = [chat.generate([prompt], max_new_tokens=5)[0] for prompt in prompts]
    assert chat.generate(prompts, max_new_tokens=5) == alone
    scored = [chat.score([prompt], [["w30", "w31 w32"]])[0] for prompt in prompts]
    together = chat.score(prompts, [["w30", "w31 w32"]] * 3)
    assert torch.allclose(torch.tensor(together), torch.tensor(scored), atol=1e-4)


def test_the_processor_prepares_what_generate_takes(pair: Path) -> None:
    chat = load_model(pair / "out")
    message = asked(("image", pair / "a.png"), ("audio", pair / "a.wav"))
    inputs = chat.processor.apply_chat_template(message, add_generation_prompt=True, tokenize=True)
    beams = chat.model.generate(**inputs, max_new_tokens=4, do_sample=False, num_beams=3)
    assert beams.shape == (1, inputs["input_ids"].shape[1] + 4)
    one = chat.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    again = chat.model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(one, again)


def test_a_saved_pair_answers_the_same(pair: Path, tmp_path: Path) -> None:
    chat = load_model(pair / "out")
    chat.model.save_pretrained(tmp_path / "saved")
    chat.processor.save_pretrained(tmp_path / "saved")
    message = asked(("image", pair / "a.png"), ("audio", pair / "a.wav"))
    assert load_model(tmp_path / "saved").chat(message, max_new_tokens=5) == chat.chat(message, max_new_tokens=5)


def test_a_sound_longer_than_the_tower_takes_is_refused_never_cut(pair: Path) -> None:
    with pytest.raises(MediaError, match=r"a sound of 40\.0 s is longer than the 30 s that the audio specialist takes"):
        load_model(pair / "out").ask("w20", audio=pair / "long.wav")


def test_frames_are_what_the_chat_template_writes(pair: Path) -> None:
    preparers = load_model(pair / "out").processor.preparers
    assert preparers["image"].frames(2) == [" <image> ", " <image> "]
    sign = "<|audio_bos|><|AUDIO|><|audio_eos|>\n"
    assert preparers["audio"].frames(2) == [f"Audio 1: {sign}", f"Audio 2: {sign}"]


@pytest.mark.parametrize("folder", ["see", "hear"])
def test_a_native_model_is_asked_as_it_is(pair: Path, folder: str) -> None:
    """load_model opens multimodal classes of transformers, audio ones too."""
    kind, file = {"see": ("image", "a.png"), "hear": ("audio", "a.wav")}[folder]
    chat = load_model(pair / folder)
    assert chat.modalities == (kind,)
    reply = chat.reply(asked((kind, pair / file)), max_new_tokens=4)
    assert reply.new_tokens > 0 and reply.tokens[kind] >= 4
    with pytest.raises(MediaError, match=rf"takes no video input; it takes: {kind}"):
        chat.ask("w20", video=pair / "a.png")


def test_a_frozen_language_model_is_carried_and_does_not_count(tmp_path: Path) -> None:
    (see, seen), (hear, heard) = native_models.llava_on_qwen2(), native_models.audioflamingo3()
    base = write_base(tmp_path / "base", see)
    take_base(hear, base, seed=6, change=False)
    write_specialist(tmp_path / "see", see)
    write_specialist(tmp_path / "hear", hear)
    report = merge(write_recipe(tmp_path, [{"model": "see"}, {"model": "hear"}], **EXACT), tmp_path / "out")
    assert "hear does not count (changes nothing: every update is zero)" in report.plan.summary()
    loaded = load_model(tmp_path / "out").model
    assert torch.equal(logits_of(loaded, seen), own_logits(see, seen))
    assert len(blocks_of(loaded, heard)[0]) == len(heard.ids)


def test_a_plain_specialist_loses_nothing_in_a_decoder_of_three_positions(tmp_path: Path) -> None:
    """Qwen2-VL's positions for pictures, and a sound whose specialist knows none of them."""
    (see, seen), (hear, heard) = native_models.qwen2_vl(), native_models.audioflamingo3(rope=True)
    base = write_base(tmp_path / "base", see)
    take_base(hear, base, seed=6)
    write_specialist(tmp_path / "see", see)
    write_specialist(tmp_path / "hear", hear)
    models = [{"model": "see", "modality": "image"}, {"model": "hear"}]
    merge(write_recipe(tmp_path, models), tmp_path / "out")
    merge(write_recipe(tmp_path, models, output={"form": "full"}), tmp_path / "full")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    take_base(hear, merged, seed=0, change=False)
    take_base(see, merged, seed=0, change=False)
    loaded = load_model(tmp_path / "out").model
    assert torch.equal(logits_of(loaded, heard), own_logits(hear, heard))
    assert torch.equal(logits_of(loaded, seen), own_logits(see, seen))


def test_two_specialists_of_a_modality_stand_side_by_side(pair: Path, tmp_path: Path) -> None:
    models = [{"model": str(pair / "see")}, {"model": str(pair / "see")}]
    base = {"base_model": str(pair / "base")}
    with pytest.raises(
        RecipeError, match=r"two specialists claim modality 'image' .* output\.same_modality: side_by_side"
    ):
        plan(load_recipe(write_recipe(tmp_path, models, **base)))
    merge(write_recipe(tmp_path, models, **base, output={"same_modality": "side_by_side"}), tmp_path / "out")
    assert "recomputed" in verify(tmp_path / "out", full=True).summary()
    chat = load_model(tmp_path / "out")
    assert chat.modalities == ("image",)
    prompt = chat.prompt(asked(("image", pair / "a.png")))
    first, second = prompt.features["image"][0], prompt.features["image_2"][0]
    assert torch.equal(first.embeddings, second.embeddings)
    assert [prompt.owners.count(owner) for owner in (1, 2)] == [4, 4]
    assert chat.reply(asked(("image", pair / "a.png")), max_new_tokens=3).new_tokens == 3


def test_own_tokens_of_a_full_fine_tune_use_its_update_cut_to_a_rank(tmp_path: Path) -> None:
    """At full rank a medium's own tokens are the specialist's; below, what is lost is reported."""
    (see, seen), (hear, _) = native_models.llava_on_qwen2(), native_models.audioflamingo3()
    base = write_base(tmp_path / "base", see)
    take_base(see, base, seed=5, linears_only=True)
    take_base(hear, base, seed=6, linears_only=True)
    write_specialist(tmp_path / "see", see)
    write_specialist(tmp_path / "hear", hear)
    losses = {}
    for rank in (4, 64):
        models = [{"model": "see", "own": {"rank": rank}}, {"model": "hear"}]
        report = merge(write_recipe(tmp_path, models), tmp_path / f"out{rank}")
        losses[rank] = report.compression_error or 0.0
        assert "recomputed" in verify(tmp_path / f"out{rank}", full=True).summary()
    assert 0.3 < losses[4] < 1 and losses[64] < 1e-5
    loaded = load_model(tmp_path / "out64").model
    ids = torch.zeros(1, len(seen.ids), dtype=torch.long)
    owners = torch.full_like(ids, loaded.config.owners.index("image"))
    with torch.no_grad():
        ours = loaded(input_ids=ids, owners=owners, features={"image": blocks_of(loaded, seen)}).logits
        own = see(**seen.inputs([], [])).logits
    assert torch.allclose(ours, own, atol=1e-5)


def lora(model: Any, folder: Path, targets: str, seed: int) -> Any:
    """A PEFT adapter of a model, saved; the model with it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    found = get_peft_model(model, settings).eval()
    found.save_pretrained(folder)
    return found


def test_a_lora_beside_a_model_equals_peft(tmp_path: Path) -> None:
    """Granite speech: the language model is the base's, and a LoRA its update."""
    model, medium = native_models.granite_speech()
    write_base(tmp_path / "base", model, change=False)
    write_specialist(tmp_path / "own", model)
    tuned = lora(model, tmp_path / "own", r".*language_model\.layers\.\d+\.self_attn\.(q_proj|v_proj)", 7)
    for own in ({}, {"own": "same"}):
        out = tmp_path / f"out{len(own)}"
        report = merge(write_recipe(tmp_path, [{"model": "own", **own}], **EXACT), out)
        assert report.plan.merged_weights() == 4
        assert "recomputed" in verify(out, full=True).summary()
        found = logits_of(load_model(out).model, medium)
        assert torch.allclose(found, own_logits(tuned, medium), atol=1e-6)


def test_phi4_has_both_of_its_adapters_at_once(tmp_path: Path) -> None:
    """Two LoRAs in folders of one model, on fused weights: text gets their merge, each medium its own."""
    model, medium = native_models.phi4_multimodal()
    write_base(tmp_path / "base", model, change=False)
    write_specialist(tmp_path / "phi", model)
    targets = r".*model\.layers\.\d+\.(self_attn\.(qkv_proj|o_proj)|mlp\.(gate_up_proj|down_proj))"
    lora(native_models.phi4_multimodal()[0], tmp_path / "phi" / "vision-lora", targets, 1)
    speech = lora(model, tmp_path / "phi" / "speech-lora", targets, 2)
    alone = [{"model": "phi#speech-lora", "modality": "audio"}]
    merge(write_recipe(tmp_path, alone, **EXACT), tmp_path / "alone")
    found = logits_of(load_model(tmp_path / "alone").model, medium)
    assert torch.allclose(found, own_logits(speech, medium), atol=1e-6)
    both = [
        {"model": f"phi#{kind}-lora", "modality": of, "own": "same"}
        for kind, of in (("vision", "image"), ("speech", "audio"))
    ]
    report = merge(write_recipe(tmp_path, both), tmp_path / "both")
    assert report.plan.merged_weights() == 8
    assert "recomputed" in verify(tmp_path / "both", full=True).summary()
    loaded = load_model(tmp_path / "both").model
    assert list(loaded.senses) == ["image"]  # one model, whose tensors are carried once
    assert {name: sizes["update"]["rank"] for name, sizes in loaded.config.modalities.items()} == {
        "image": 4,
        "audio": 4,
    }
    ids = torch.zeros(1, len(medium.ids), dtype=torch.long)
    owners = torch.full_like(ids, loaded.config.owners.index("audio"))
    with torch.no_grad():
        ours = loaded(input_ids=ids, owners=owners, features={"audio": blocks_of(loaded, medium)}).logits
        own = speech(**medium.inputs([], [])).logits
    assert torch.allclose(ours, own, atol=1e-5)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
def test_spellings_of_one_model_give_one_result(tmp_path: Path, name: str) -> None:
    """The hub's names and the class's own, beside a language model and beside the model's own base."""
    model, medium = MAKERS[name]()
    start = MAKERS[name]()[0]
    start.save_pretrained(tmp_path / "whole")
    write_base(tmp_path / "base", model)
    write_specialist(tmp_path / "own", model)
    write_specialist(tmp_path / "respelled", model)
    tied = model.all_tied_weights_keys
    rows = {key: value.clone() for key, value in model.state_dict().items() if key not in tied}
    save_file(rows, tmp_path / "respelled" / "model.safetensors", metadata={"format": "pt"})
    assert rows.keys() != load_file(tmp_path / "own" / "model.safetensors").keys() or name == "qwen3_vl"
    for base, more in (
        ("base", {}),
        ("whole", {"output": {"form": "full"}, "modules": {"*embed*": {"policy": "keep"}}}),
    ):
        found = []
        for spelling in ("own", "respelled"):
            entry = {"model": spelling} | ({"modality": medium.modality} if base == "base" else {})
            recipe = write_recipe(tmp_path, [entry], **EXACT, **more) if base == "base" else None
            if recipe is None:
                content = {"base_model": "whole", "models": [entry], **EXACT, **more}
                recipe = tmp_path / "recipe.yaml"
                recipe.write_text(json.dumps(content))
            out = tmp_path / f"{base}-{spelling}"
            report = merge(recipe, out)
            stem = "adapter_model" if base == "base" else "model"
            found.append((report.plan.merged_weights(), (out / f"{stem}.safetensors").read_bytes()))
        assert found[0] == found[1]


def test_native_and_built_in_senses_stand_in_one_model(tmp_path: Path) -> None:
    """A full fine-tune of the built-in base beside its own LoRA specialists, who still know what they hear."""
    spec = importlib.util.spec_from_file_location("make_native", ROOT / "examples" / "native" / "make.py")
    assert spec is not None and spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    base = transformers.AutoModelForCausalLM.from_pretrained(builtin.resolve(make.BASE), dtype=torch.float32)
    make.see(base, tmp_path / "see")
    content = {
        "base_model": make.BASE,
        "merge_method": "task_arithmetic",
        "models": [{"model": "see"}, {"model": "builtin:audio"}],
        "output": {"form": "omni", "chat_template": "base"},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(content))
    report = merge(tmp_path / "recipe.yaml", tmp_path / "out")
    assert report.plan.merged_weights() == 210 and report.kinship["see"].cosine > 0.99
    chat = load_model(tmp_path / "out")
    assert chat.modalities == ("image", "audio")
    samples = ROOT / "modalloy" / "builtin" / "samples"
    parts = [{"type": "image", "path": samples / "horse.webp"}, {"type": "audio", "path": samples / "dog.flac"}]
    question = {"type": "text", "text": "Which word is it: a harp, a car, a dog or a duck?"}
    reply = chat.reply([{"role": "user", "content": [*parts, question]}], max_new_tokens=4)
    assert reply.tokens["image"] == 16 and reply.tokens["audio"] == 18
    assert reply.answer == "a dog"


def test_candidates_of_a_search_are_what_a_merge_writes(pair: Path) -> None:
    from modalloy.search.candidates import RoutedBench

    planned = plan(load_recipe(pair / "recipe.yaml"))
    bench = RoutedBench(planned, device="cpu", dtype="float32", allow_base_mismatch=False)
    # the tiny tokenizer of words is not Qwen2's, which transformers makes of a Qwen2 model's folder
    bench.chat.processor.tokenizer = load_model(pair / "out").processor.tokenizer
    bench.put({})
    message = asked(("image", pair / "a.png"), ("audio", pair / "a.wav"))
    merged = load_model(pair / "out")
    options = ["w30", "w31 w32"]
    assert torch.allclose(
        torch.tensor(bench.chat.score_options(message, options)),
        torch.tensor(merged.score_options(message, options)),
        atol=1e-5,
    )
    bench.put_parent(0)
    alone = write_recipe(pair / "alone", [{"model": "../see"}], **EXACT, base_model="../base")
    merge(alone, pair / "alone" / "out", overwrite=True)
    seen = asked(("image", pair / "a.png"))
    found = load_model(pair / "alone" / "out").score_options(seen, options)
    assert torch.allclose(torch.tensor(bench.chat.score_options(seen, options)), torch.tensor(found), atol=1e-5)


def test_evaluation_reads_native_media_within_its_limits(pair: Path) -> None:
    """Paths are judged, and a sound that is too long is an unreadable medium of one sample, not the end of a run."""
    from modalloy.evals.ask import _prompt, _UnreadableError
    from modalloy.evals.benchmark import Sample
    from modalloy.evals.features import FeatureCache

    chat, cache = load_model(pair / "out"), FeatureCache()
    sample = Sample(id="1", text="w20", golds=("w21",), media=(("image", str(pair / "a.png")),))
    assert _prompt(chat, sample, cache, (str(pair),)).features["image"]
    with pytest.raises(_UnreadableError, match="leads out of the data"):
        _prompt(chat, sample, cache, (str(pair / "see"),))
    long = Sample(id="2", text="w20", golds=("w21",), media=(("audio", str(pair / "long.wav")),))
    with pytest.raises(_UnreadableError, match=r"longer than the 30 s"):
        _prompt(chat, long, cache, None)


@pytest.mark.parametrize("rows", [-8, 8], ids=["fewer tokens", "more tokens"])
def test_trained_embeddings_stay_the_bases_and_are_named(tmp_path: Path, rows: int) -> None:
    """A vocabulary that is shorter or longer than the base's: what differs in the rows that both have is said."""
    model, medium = native_models.llava_with_further_tokens()
    base = write_base(tmp_path / "base", model)
    if rows < 0:
        model, medium = native_models.llava()
        model.resize_token_embeddings(VOCABULARY + rows)
        for name, parameter in model.get_decoder().named_parameters():
            parameter.copy_(dict(base.model.named_parameters())[name][: len(parameter)] * 1.25)
        model.get_output_embeddings().weight.copy_(base.lm_head.weight[: VOCABULARY + rows])
    with torch.no_grad():
        model.get_input_embeddings().weight[50].add_(1.0)
    write_specialist(tmp_path / "own", model)
    report = merge(write_recipe(tmp_path, [{"model": "own"}], **EXACT), tmp_path / "out")
    assert "1 embeddings that own changed stay the base's" in report.plan.summary()
    assert len(blocks_of(load_model(tmp_path / "out").model, medium)[0]) == len(medium.ids)


def test_two_senses_of_one_model_count_once_and_are_carried_once(tmp_path: Path) -> None:
    """A class that takes pictures and videos, listed for each."""
    model, medium = native_models.llava_onevision()
    write_base(tmp_path / "base", model)
    write_specialist(tmp_path / "see", model)
    models = [{"model": "see", "modality": kind} for kind in ("image", "video")]
    report = merge(write_recipe(tmp_path, models, **EXACT), tmp_path / "out")
    assert "video does not count (is image's model, which counts once)" in report.plan.summary()
    assert "recomputed" in verify(tmp_path / "out", full=True).summary()
    loaded = load_model(tmp_path / "out").model
    assert list(loaded.senses) == ["image"] and loaded.config.owners == ("text", "image", "video")
    assert torch.equal(logits_of(loaded, medium), own_logits(model, medium))
    shown = blocks_of(loaded, medium, name="video")[0]
    assert torch.equal(shown.embeddings, blocks_of(loaded, medium)[0].embeddings)

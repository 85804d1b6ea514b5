"""The merged model as a citizen of transformers: Auto classes, batches, beams, saving, types, families, folding."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import SLOTS, WIDTH, base_tokenizer, write_compose
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, PreTrainedModel, TextStreamer

import modalloy
import modalloy.model
from modalloy import builtin
from modalloy.errors import CheckpointError, MediaError
from modalloy.model.chat import placed_message, user_message
from modalloy.verify import verify

MEDIA = {"image": str(builtin.SAMPLES / "dog.webp"), "audio": str(builtin.SAMPLES / "dog.flac")}
INPUTS = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}


def question(*modalities: str, text: str = "what is this ?") -> list[dict[str, Any]]:
    parts = [{"type": modality, "path": MEDIA[modality]} for modality in modalities]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def omni(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    return merged(folder, base)


def merged(folder: Path, base: Path, **changes: Any) -> Path:
    """An omni folder of an image and an audio specialist of `base`."""
    models = [
        {"model": str(write_compose(folder / disk, disk, seed=seed)), "modality": modality}
        for seed, (disk, modality) in enumerate({"vision": "image", "audio": "audio"}.items())
    ]
    recipe = {"base_model": str(base), "models": models, "output": {"form": "omni"}} | changes
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    modalloy.merge(folder / "recipe.yaml", folder / "omni")
    return folder / "omni"


@pytest.fixture(scope="module")
def model(omni: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(omni)


@pytest.fixture(scope="module")
def processor(omni: Path) -> Any:
    return AutoProcessor.from_pretrained(omni)


def new_tokens(model: Any, inputs: Any, **options: Any) -> torch.Tensor:
    return model.generate(**inputs, **GREEDY | options)[:, inputs["input_ids"].shape[1] :]


def test_auto_classes_give_the_merged_model(model: Any, processor: Any, omni: Path) -> None:
    assert type(model) is modalloy.model.ModalloyForConditionalGeneration
    assert type(processor) is modalloy.model.ModalloyProcessor
    assert AutoConfig.from_pretrained(omni).modalities.keys() == {"image", "audio"}
    assert model.dtype == torch.float32 and not any(p.requires_grad for p in model.parameters())


def test_rows_of_a_batch_are_answered_as_alone(model: Any, processor: Any) -> None:
    """Different modalities in each row, padded on the left; also with beams and without a cache."""
    rows = [question("image", "audio"), question("audio"), question(), question("image", "image", "audio")]
    batch = processor.apply_chat_template(rows, **INPUTS)
    assert (batch["attention_mask"].sum(1) < batch["input_ids"].shape[1]).sum() == 3
    answers = new_tokens(model, batch)
    assert torch.equal(new_tokens(model, batch, use_cache=False), answers)
    beams = new_tokens(model, batch, num_beams=2, num_return_sequences=2)
    for index, row in enumerate(rows):
        alone = processor.apply_chat_template(row, **INPUTS)
        assert torch.equal(new_tokens(model, alone)[0], answers[index])
        assert torch.equal(
            new_tokens(model, alone, num_beams=2, num_return_sequences=2), beams[2 * index : 2 * index + 2]
        )
        logits = model(**alone).logits[0, -1]
        torch.testing.assert_close(
            logits, model(**batch, position_ids=positions(batch)).logits[index, -1], atol=1e-5, rtol=1e-4
        )


def positions(batch: Any) -> torch.Tensor:
    return (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)


def test_media_are_encoded_once_for_all_beams(model: Any, processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = []
    encode = type(model).encode
    monkeypatch.setattr(type(model), "encode", lambda self, m, s: encoded.append((m, len(s))) or encode(self, m, s))
    inputs = processor.apply_chat_template(question("image", "audio"), **INPUTS)
    torch.manual_seed(0)
    sampled = new_tokens(model, inputs, do_sample=True, num_return_sequences=3)
    assert sampled.shape == (3, 6) and sorted(encoded) == [("audio", 1), ("image", 1)]


def test_answers_are_streamed(model: Any, processor: Any, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = processor.apply_chat_template(question("audio"), **INPUTS)
    answer = new_tokens(model, inputs, streamer=TextStreamer(processor.tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.split() == processor.tokenizer.decode(answer[0]).split()


def test_every_subset_and_order_of_modalities_is_routed(model: Any, processor: Any) -> None:
    """Routed = dense, token by token: each owner's logits under its own dense weights give the same first hidden state."""
    linear = model.linears["model.layers.0.mlp.gate_proj.weight"]
    x = torch.randn(1, 11, WIDTH, generator=torch.Generator().manual_seed(3))
    dense = {o: linear.weight + (linear.update(o).dense() if o in linear.scales else 0) for o in model.config.owners}
    for count in range(1, 4):
        for subset in itertools.permutations(range(3), count):
            owners = torch.tensor([[subset[i * count // 11] if i % 4 else subset[0] for i in range(11)]])
            with model.routes.use(owners, model.config.owners):
                routed = linear(x)[0]
            wanted = torch.stack([dense[model.config.owners[o]] @ row for o, row in zip(owners[0], x[0], strict=True)])
            torch.testing.assert_close(routed, wanted, atol=1e-5, rtol=1e-5)


def test_saved_model_is_the_same_model(model: Any, processor: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, its_processor = AutoModelForCausalLM.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert again.config.base_model is None and model.config.base_model == "base"
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    messages = question("image", "audio")
    inputs, same = (p.apply_chat_template(messages, **INPUTS) for p in (processor, its_processor))
    assert torch.equal(inputs["owners"], same["owners"])
    assert torch.equal(new_tokens(again, same), new_tokens(model, inputs))
    assert modalloy.load_model(tmp_path).ask("what is this ?", image=MEDIA["image"]) is not None
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("projectors.audio.0.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing tensor projectors\.audio\.0\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("named", [{"subfolder": "sub"}, {"variant": "fp16"}])
def test_a_saved_model_is_found_by_subfolder_and_variant(model: Any, named: dict[str, str], tmp_path: Path) -> None:
    place = tmp_path / named.get("subfolder", "")
    model.save_pretrained(place, variant=named.get("variant"))
    found = type(model).from_pretrained(tmp_path, **named).state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in model.state_dict().items())


def test_a_saved_models_larger_sizes_get_no_memory(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before transformers' loader, which would fill them in and then say so."""
    model.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    told["modalities"]["image"]["update"]["rank"] = 4000
    (tmp_path / "config.json").write_text(json.dumps(told))
    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", lambda *_: pytest.fail("the loader was reached"))
    with pytest.raises(CheckpointError, match=r"mismatched tensor .*down_image \(stored as \(\d+, \d+\), not \(4000, "):
        type(model).from_pretrained(tmp_path)


def test_generation_config_of_the_base_is_used(omni: Path, tmp_path: Path) -> None:
    shutil.copytree(omni, tmp_path / "omni")
    (tmp_path / "omni" / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "omni").generation_config.eos_token_id == [2, 5]


def test_remote_code_finds_the_package(omni: Path) -> None:
    code = (
        "from transformers import AutoModelForCausalLM, AutoProcessor\n"
        f"for c in (AutoModelForCausalLM, AutoProcessor): print(type(c.from_pretrained({str(omni)!r}, trust_remote_code=True)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.count("modalloy.model.") == 2, done.stderr


def test_half_precision_is_multiplied_in_float32(model: Any, processor: Any, omni: Path) -> None:
    half = AutoModelForCausalLM.from_pretrained(omni, dtype=torch.bfloat16, device_map="auto")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    inputs = processor.apply_chat_template(question("image", "audio"), **INPUTS)
    logits = half(**inputs).logits
    assert logits.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}  # also after the encoders ran
    linear = half.linears["model.layers.0.mlp.gate_proj.weight"]
    x = torch.randn(1, 3, WIDTH).bfloat16()
    update = linear.update("text")
    exact = linear.weight.double() + update.up.double() @ update.down.double()
    wanted = (x.double() @ exact.T).bfloat16()
    assert (linear(x) == wanted).float().mean() > 0.98  # rounded once
    wide = AutoModelForCausalLM.from_pretrained(omni, dtype=torch.float32)
    wide.load_state_dict({name: tensor.float() for name, tensor in half.state_dict().items()})
    wanted = wide(**inputs).logits
    assert float((logits.float() - wanted).norm()) < 0.03 * float(wanted.norm())


def test_folding_keeps_every_path(omni: Path, model: Any, processor: Any, tmp_path: Path) -> None:
    folded = AutoModelForCausalLM.from_pretrained(omni)
    errors = folded.fold()
    assert errors.keys() == {"text", "image", "audio"} and all(0 < error < 1e-6 for error in errors.values())
    slot = "model.layers.0.mlp.up_proj.weight"
    text = model.linears[slot].weight + model.linears[slot].update("text").dense()
    torch.testing.assert_close(folded.linears[slot].weight.data, text, atol=1e-6, rtol=1e-5)
    inputs = processor.apply_chat_template(question("image", "audio"), **INPUTS)
    torch.testing.assert_close(folded(**inputs).logits, model(**inputs).logits, atol=1e-4, rtol=1e-4)
    folded.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(**inputs).logits, folded(**inputs).logits)
    with pytest.raises(ValueError, match="no low-rank update left to fold"):
        again.fold()
    half = AutoModelForCausalLM.from_pretrained(omni, dtype=torch.bfloat16)
    assert all(1e-4 < error < 0.1 for error in half.fold().values())  # what bfloat16 costs


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2"])
def test_families_of_decoders(family: str, tmp_path: Path) -> None:
    """A tiny random decoder of each family goes the whole way; its biases (Qwen2) stay."""
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=30, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(1)
    plain = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in plain.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    plain.save_pretrained(tmp_path / "base")
    base_tokenizer().save_pretrained(tmp_path / "base")
    chat = modalloy.load_model(merged(tmp_path, tmp_path / "base"))
    assert chat.model.linears.keys() == {f"{slot}.weight" for slot in SLOTS}
    for name, tensor in plain.state_dict().items():
        assert torch.equal(chat.model.decoder.state_dict()[name], tensor)
    for slot, linear in chat.model.linears.items():
        with torch.no_grad():
            plain.get_parameter(slot).add_(linear.update("text").dense())
    inputs = chat.processor.apply_chat_template(question(), **INPUTS)
    wanted = plain(input_ids=inputs["input_ids"]).logits
    torch.testing.assert_close(chat.model(**inputs).logits, wanted, atol=1e-4, rtol=1e-4)
    assert isinstance(chat.ask("what is this ?", **MEDIA), str)


def test_dense_methods_give_text_tokens_weights_of_their_own(tmp_path: Path, base: Path) -> None:
    """TIES has no low-rank result: text tokens use its full matrices, media the base with their own updates."""
    omni = merged(tmp_path, base, merge_method="ties")
    chat = modalloy.load_model(omni)
    stored, weights = load_file(omni / "adapter_model.safetensors"), load_file(base / "model.safetensors")
    tuned = [load_file(tmp_path / disk / "adapter_model.safetensors") for disk in ("vision", "audio")]
    slot = "model.layers.1.self_attn.k_proj"
    deltas = [2 * t[f"{slot}.lora_B.default.weight"] @ t[f"{slot}.lora_A.default.weight"] for t in tuned]
    wanted = weights[f"{slot}.weight"] + modalloy.merge_deltas(deltas, method="ties")
    torch.testing.assert_close(stored[f"{slot}.weight"], wanted, atol=1e-5, rtol=1e-5)
    linear = chat.model.linears[f"{slot}.weight"]
    assert torch.equal(linear.weight.data, weights[f"{slot}.weight"]) and set(linear.scales) == {"image", "audio"}
    x = torch.randn(1, 3, WIDTH)
    owners = torch.tensor([[0, chat.model.config.owners.index("image"), 0]])
    with chat.model.routes.use(owners, chat.model.config.owners):
        found = linear(x)[0]
    own = linear.weight + linear.update("image").dense()
    torch.testing.assert_close(
        found, torch.stack([wanted @ x[0, 0], own @ x[0, 1], wanted @ x[0, 2]]), atol=1e-4, rtol=1e-4
    )
    assert verify(omni).layers >= 12


def test_updates_of_some_linears_only(tmp_path: Path, base: Path) -> None:
    """The text update of only some weights: the others are the base's for text, and still routed for media."""
    rule = {"*.mlp.*": {"policy": "keep"}}
    chat = modalloy.load_model(merged(tmp_path, base, modules=rule))
    merged_linears = [slot for slot, linear in chat.model.linears.items() if "text" in linear.scales]
    assert merged_linears == [f"{slot}.weight" for slot in SLOTS if "self_attn" in slot]
    assert all({"image", "audio"} <= set(linear.scales) for linear in chat.model.linears.values())


def test_placeholders_of_a_benchmark_say_where_media_go(processor: Any) -> None:
    media, text = [(kind, MEDIA[kind]) for kind in ("image", "audio")], "do you hear <audio> and see <image> ?"
    messages = placed_message(text, media, ("image", "audio"))
    rendered = processor.apply_chat_template(messages, **INPUTS)
    runs = [owner for owner, _ in itertools.groupby(rendered["owners"][0].tolist())]
    assert [processor.owners[owner] for owner in runs] == ["text", "audio", "text", "image", "text"]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert "hear <audio> and see <image>" in prompt
    called = processor(text=prompt, images=MEDIA["image"], audio=[MEDIA["audio"]])
    assert torch.equal(called["input_ids"], rendered["input_ids"]) and torch.equal(called["owners"], rendered["owners"])
    with pytest.raises(MediaError, match="more <image> than image media"):
        placed_message(text, media[1:], ("image", "audio"))
    with pytest.raises(MediaError, match="too few <image>"):
        placed_message(text, [*media, media[0]], ("image", "audio"))
    assert placed_message("what is it ?", media, ("image", "audio")) == user_message("what is it ?", media)


def test_a_placeholder_in_a_question_is_text(processor: Any) -> None:
    parts = [{"type": "image", "path": MEDIA["image"]}, {"type": "text", "text": "see <image> or <audio> ?"}]
    rendered = processor.apply_chat_template([{"role": "user", "content": parts}], **INPUTS)
    runs = [owner for owner, _ in itertools.groupby(rendered["owners"][0].tolist())]
    assert [processor.owners[owner] for owner in runs] == ["text", "image", "text"]


def test_a_call_needs_a_placeholder_for_each_medium(processor: Any) -> None:
    with pytest.raises(MediaError, match="1 more image media are given"):
        processor(text="what <audio>", images=[MEDIA["image"]], audio=[MEDIA["audio"]])

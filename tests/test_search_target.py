"""Choosing α of a merge across architectures: what is served in memory, who serves it, the search, and what is refused."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import WORDS, base_tokenizer
from family_keys import published
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import modalloy
from modalloy import cli
from modalloy.errors import MediaError, ModalloyError, RecipeError
from modalloy.evals import probes
from modalloy.evals.check import _examined, check
from modalloy.model import ChatModel
from modalloy.model.chat import user_message
from modalloy.model.hosted import HostedModel, places
from modalloy.planning.plan import Plan
from modalloy.planning.planner import plan
from modalloy.recipe import Recipe, load_recipe
from modalloy.search import search
from modalloy.search.candidates import distance
from modalloy.search.space import applied, relocated
from modalloy.search.target import LoadedTarget, PlacedTarget
from modalloy.storage.locate import open_base

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }} : {% for p in m.content %}{% if p.type == 'image' %}<image>"
    "{% else %}{{ p.text }}{% endif %}{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant : {% endif %}"
)
NESTED = {"model.": "model.language_model.", "visual.": "model.visual."}  # as transformers writes Qwen2-VL since 4.52
ASKED = ("what is this ?", "do you hear the dog ?", "is this a cat ?", "are these the same ?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA and two Llamas of one ancestor, recipes of merges into each, and probes with and without pictures."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlamaForCausalLM,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    folder = tmp_path_factory.mktemp("target")
    tokenizer = base_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    text = LlamaConfig(vocab_size=4 + len(WORDS), **SIZES)
    torch.manual_seed(0)
    model = LlamaForCausalLM(text)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("base", "text", "donor"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        moved(model, base)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=image, vision_feature_select_strategy="default"
    )
    llava = LlavaForConditionalGeneration(config)
    moved(model, base)
    llava.model.language_model.load_state_dict(model.model.state_dict())
    llava.lm_head.load_state_dict(model.lm_head.state_dict())
    llava.save_pretrained(folder / "llava")
    pictures = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    options = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaProcessor(pictures, tokenizer, chat_template=TEMPLATE, **options).save_pretrained(folder / "llava")
    whole: dict[str, Any] = {"models": [{"model": "donor"}], "output": {"form": "full"}}
    for name in ("text", "llava"):
        content = whole | {"target": name, "merge_method": "linear", "parameters": {"alpha": 0.1}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    content = whole | {"target": "llava", "base_model": "base", "merge_method": "ties", "parameters": {"scale": 0.9}}
    (folder / "ties.yaml").write_text(yaml.safe_dump(content))
    rows: list[dict[str, Any]] = [{"text": text} for text in ASKED]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        rows.append({"text": "what is this ?", "media": {"image": f"{index}.png"}, "choices": ["dog", "cat"]})
    (folder / "llava.jsonl").write_text("".join(json.dumps(row | {"gold": "dog"}) + "\n" for row in rows))
    return folder


def moved(model: Any, base: dict[str, Tensor]) -> None:
    """Give a model the weights that training might have made of the base's."""
    model.load_state_dict({name: tensor + 0.15 * torch.randn_like(tensor) for name, tensor in base.items()})


def placed(folder: Path, name: str) -> PlacedTarget:
    return PlacedTarget(
        plan(load_recipe(folder / f"{name}.yaml")), device="cpu", dtype="float32", allow_base_mismatch=False
    )


def loader(calls: list[set[str]]) -> Callable[..., ChatModel]:
    """One that a user would write for an architecture of their own, here for the Llama."""

    def load(planned: Plan, tensors: dict[str, Any]) -> ChatModel:
        calls.append(set(tensors))
        model = modalloy.load_model(planned.target.folder)
        for name, parameter in model.model.decoder.named_parameters():
            parameter.data = tensors[name][...]
        return model

    return load


def state(chat: ChatModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in chat.model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("name", ["text", "llava"])
def test_served_is_what_a_merge_writes_and_loads(folder: Path, tmp_path: Path, name: str) -> None:
    server = placed(folder, name)
    target = state(server.chat)
    far, near = (server.put({"alpha": alpha}) for alpha in (0.6, 0.3))
    modalloy.merge(applied(server.planned.recipe, {"alpha": 0.3}), tmp_path / "out", jobs=1)
    written = modalloy.load_model(tmp_path / "out")
    assert isinstance(written, HostedModel) == (name == "llava")
    assert same(state(server.chat), state(written)) and not same(target, state(written))
    message = [{"role": "user", "content": ASKED[0]}]
    assert server.chat.chat(message, max_new_tokens=4) == written.chat(message, max_new_tokens=4)
    # a merge's distance from the target, by all that it changes; the target again is at 0
    true = sum(float((tensor - target[key]).square().sum()) for key, tensor in state(written).items()) ** 0.5
    assert distance(near, [0.0] * len(near)) == pytest.approx(true, rel=0.4)
    assert distance(far, near) == pytest.approx(true, rel=0.4)
    assert not any(server.put({"alpha": 0.0})) and same(state(server.chat), target)
    server.put({"weight.donor": 0.5, "alpha": 0.6})
    assert same(state(server.chat), state(written))
    server.put_parent()
    assert same(state(server.chat), target)


def test_methods_with_a_base_are_served_too(folder: Path, tmp_path: Path) -> None:
    server = placed(folder, "ties")
    server.put({"scale": 0.2})
    server.put({"scale": 0.7, "density": 0.5})
    recipe = relocated(applied(server.planned.recipe, {"scale": 0.7, "density": 0.5}), tmp_path)
    assert not any(Path(place).is_absolute() for place in (recipe.base_model, str(recipe.target)))
    modalloy.merge(recipe, tmp_path / "out", jobs=1)
    assert same(state(server.chat), state(modalloy.load_model(tmp_path / "out")))


def test_a_loader_gets_what_a_merge_writes(folder: Path) -> None:
    calls: list[set[str]] = []
    planned, server = plan(load_recipe(folder / "text.yaml")), placed(folder, "text")
    loaded = LoadedTarget(planned, loader(calls), allow_base_mismatch=False)
    assert not any(loaded.put({"alpha": 0.0})) and len(calls) == 1
    assert loaded.put({"alpha": 0.3}) == server.put({"alpha": 0.3})
    assert same(state(loaded.chat), state(server.chat))
    loaded.put_parent()
    server.put_parent()
    assert same(state(loaded.chat), state(server.chat))
    assert len(calls) == 3 and set(map(frozenset, calls)) == {frozenset(planned.target.refs)}


def test_equal_tensors_that_are_stored_apart_are_replaced_apart(folder: Path) -> None:
    """transformers ties them while they are equal, and a merge of one of them would leave the other."""
    chat = modalloy.load_model(folder / "llava")
    chat.model.lm_head.weight = chat.model.get_input_embeddings().weight
    chat.model.config.tie_word_embeddings = True
    refs = open_base(folder / "llava").refs
    found = places(chat.model, {name: ref.shape for name, ref in refs.items()})
    head, embedding = (found[f"language_model.{name}.weight"] for name in ("lm_head", "model.embed_tokens"))
    assert head is chat.model.lm_head.weight and embedding is chat.model.get_input_embeddings().weight
    assert found.keys() == refs.keys() and head is not embedding and torch.equal(head, embedding)


def test_both_spellings_of_qwen2_vl_find_their_place() -> None:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    names, config = published("qwen2-vl-7b")
    few = {name: shape for name, shape in names.items() if not re.search(r"(layers|blocks)\.([2-9]|\d\d)\.", name)}
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(
            Qwen2VLConfig(**config | {"num_hidden_layers": 2, "vision_config": {"depth": 2, "hidden_size": 3584}})
        )
    nested = {re.sub(r"^(model|visual)\.", lambda at: NESTED[at[0]], name): shape for name, shape in few.items()}
    for spelling in (few, nested):
        found = places(model, spelling)
        assert {name: tuple(parameter.shape) for name, parameter in found.items()} == spelling
        assert len(set(map(id, found.values()))) == len(spelling) == len(dict(model.named_parameters()))


def test_images_are_asked_about(folder: Path) -> None:
    chat = modalloy.load_model(folder / "llava")
    image, question = folder / "0.png", "what is this ?"
    reply = chat.reply(user_message(question, [("vision", image)]), max_new_tokens=3)
    assert reply.prompt == f"<s>user : <image>{question}</s><s>assistant : "
    assert reply.tokens == {"text": 11, "image": 4} and reply.new_tokens == 3
    assert chat.ask(question, image=Image.open(image), max_new_tokens=3) == reply.answer
    # a batch is padded on the left, and answers and likelihoods stay
    prompts = [
        chat.prompt(user_message(text, [("image", image)])) for text in (question, "is this the same cat as the dog ?")
    ]
    alone = [chat.generate([prompt], max_new_tokens=3)[0] for prompt in prompts]
    assert chat.generate(prompts, max_new_tokens=3) == alone
    (scores,) = chat.score([prompts[0]], [["dog", "cat dog"]])
    inputs = chat.inputs([prompts[0]])
    ids = chat.processor.tokenizer.encode("cat dog</s>", add_special_tokens=False)
    total, likeliest = 0.0, []
    for token in ids:
        nats = chat.model(**inputs).logits[0, -1].log_softmax(-1)
        total += float(nats[token])
        likeliest.append(int(nats.argmax()))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    predicted = chat.expect([prompts[0]], ["cat dog"], [1])[0][0].flatten().tolist()
    assert scores[1] == pytest.approx(total, abs=1e-4) and predicted == likeliest
    shown = {index: user_message(question, [("image", folder / f"{index}.png")]) for index in range(2)}
    assert chat.score_options(shown[0], ["cat dog"]) == scores[1:] != chat.score_options(shown[1], ["cat dog"])
    assert len(chat.continuations([question], [[" dog", " cat"]])[0]) == 2
    with pytest.raises(MediaError, match="takes no audio input; it takes: image"):
        chat.ask(question, audio="a.wav")
    # the sign of an image, and control tokens, are text where a question holds them
    sign = chat.processor.tokenizer.convert_tokens_to_ids("<image>")
    typed = chat.prompt(user_message("what is <image> ?</s>", [("image", image)]))
    assert typed.ids.count(sign) == prompts[0].ids.count(sign) == 4 and typed.text.endswith("?</s></s><s>assistant : ")
    assert typed.ids.count(2) == prompts[0].ids.count(2)
    assert len(chat.generate([typed], max_new_tokens=2)) == 1


@pytest.mark.parametrize("name", ["text", "llava"])
def test_from_start_to_a_recipe(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    paths, options = (folder / f"{name}.yaml", folder / f"{name}.jsonl", tmp_path / "out"), {"max_new_tokens": 4}
    found = search(*paths, **options)
    (sweep,) = found.sweeps
    assert [candidate["alpha"] for candidate in sweep.candidates] == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert np.isnan([sweep.losses[0], sweep.losses[-1]]).all() and sweep.default == (1,) and sweep.steps is None
    probes = len(paths[1].read_text().splitlines())
    assert (
        found.cost["merges"] == 7 and found.cost["generated"] == 7 * probes
    )  # the target's answers are those of α = 0
    assert found.cost["published_way"]["written_bytes"] == 7 * plan(load_recipe(paths[0])).write_bytes
    page = (tmp_path / "out" / "index.html").read_text()
    assert f"<h1>alpha = {found.chosen['alpha']:g}</h1>" in page
    assert f"Merged into {name}: alpha is the weight of the donors, 0 = target unchanged" in page
    chosen = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert chosen.parameters == found.chosen == json.loads((tmp_path / "out" / "search.json").read_text())["chosen"]
    modalloy.merge(chosen, tmp_path / "merged", jobs=1)

    log = tmp_path / "out" / "trials.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-5]))
    again = search(*paths, **options, resume=True)
    assert [one.to_dict() for one in again.sweeps] == [one.to_dict() for one in found.sweeps]
    monkeypatch.setattr("modalloy.search.target.load_model", None)  # a finished search loads none
    assert search(*paths, **options, resume=True, vary=["alpha=0:0.4:0.1"]).chosen["alpha"] < 0.4


def test_steps_of_alpha_are_even_though_tensors_are_rounded(folder: Path, tmp_path: Path) -> None:
    content = load_recipe(folder / "text.yaml").model_dump() | {"output": {"form": "full", "dtype": "bfloat16"}}
    content["models"] = [{"model": "donor", "parameters": {"weight": 0.1}}]
    recipe, vary = Recipe(**content, folder=folder), ["alpha=0.1:0.5:0.1"]
    found = search(recipe, folder / "text.jsonl", tmp_path / "out", max_new_tokens=1, vary=vary)
    assert found.sweeps[0].steps is None


def test_agreement_with_the_target(folder: Path, tmp_path: Path) -> None:
    options = {"objective": "agreement", "vary": ["alpha=0,0.3,0.6"], "load": loader([]), "max_new_tokens": 3}
    found = search(folder / "text.yaml", folder / "text.jsonl", tmp_path / "out", **options)
    assert found.chosen == {"alpha": 0.0} and found.cost["generated"] == len(ASKED)


@pytest.mark.parametrize("objective", ["kl", "option_agreement"])
def test_donors_answer_no_probes(folder: Path, tmp_path: Path, objective: str) -> None:
    with pytest.raises(ModalloyError, match=f"--objective {objective}: compares candidates with specialists"):
        search(folder / "text.yaml", folder / "text.jsonl", tmp_path / "out", objective=objective)


def test_a_loader_is_of_recipes_with_a_target(folder: Path, tmp_path: Path) -> None:
    recipe = Recipe(base_model="base", models=({"model": "donor"},), folder=folder)
    with pytest.raises(RecipeError, match="load=… makes models of recipes with a target"):
        search(recipe, folder / "text.jsonl", tmp_path / "out", load=loader([]))


def refusal(recipe: Path, probe: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> str:
    """The one line of a search that is refused."""
    monkeypatch.setattr(sys, "argv", ["modalloy", "search", str(recipe), "--probe", str(probe), "-o", str(out)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1 and not out.exists()
    return str(said)


def test_refusals(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, text, llava = tmp_path / "out", folder / "text.yaml", folder / "llava.yaml"
    said = refusal(text, folder / "llava.jsonl", out, monkeypatch, capsys)
    assert "shows image, and the recipe's model takes text only; remove the probe" in said

    def lacking(*_: Any, **__: Any) -> None:
        raise ImportError("\nQwen2VLVideoProcessor requires the Torchvision library but it was not found")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.AutoProcessor.from_pretrained", lacking)
        said = refusal(llava, folder / "text.jsonl", out, patch, capsys)
    assert "llava: its processor needs torchvision, which is not installed; run `pip install torchvision`" in said
    config = folder / "llava" / "config.json"
    before = config.read_text()
    config.write_text(before.replace("LlavaForConditionalGeneration", "LlavaLlamaForCausalLM"))
    try:
        said = refusal(llava, folder / "text.jsonl", out, monkeypatch, capsys)
    finally:
        config.write_text(before)
    assert "is a LlavaLlamaForCausalLM, which modalloy can merge but not run" in said and "load=…" in said
    with monkeypatch.context() as patch:
        patch.setattr("modalloy.planning.kinship.LEAST_COSINE", 1.0)
        assert "donor and target are unrelated" in refusal(text, folder / "text.jsonl", out, patch, capsys)


@pytest.mark.parametrize("donor", ["donor", "lora"])
def test_a_check_asks_a_target_of_transformers_and_its_parents(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, donor: str
) -> None:
    """A LLaVA answers about text; an adapter is asked on the base that it updates, not on the target."""
    for name, value in {"FIRST": 1, "WRITTEN": 1, "NEW_TOKENS": 2, "TEXT": "do you hear a dog ?"}.items():
        monkeypatch.setattr(probes, name, value)
    content = yaml.safe_load((folder / "ties.yaml").read_text())
    places = {key: str(folder / content[key]) for key in ("target", "base_model")}
    place = folder / "donor"
    if donor == "lora":
        place = tmp_path / "lora"
        place.mkdir()
        wide = {"a.weight": (2, 32), "b.weight": (32, 2)}
        stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
        factors = {f"{stem}{name[0].upper()}.weight": torch.ones(shape) / 9 for name, shape in wide.items()}
        save_file(factors, place / "adapter_model.safetensors")
        (place / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    recipe = Recipe(**content | places | {"models": [{"model": str(place)}], "missing": "zero"})
    modalloy.merge(recipe, tmp_path / "out", jobs=1)
    found = check(tmp_path / "out").rows
    assert list(found) == ["merged", "target", "base", donor]
    text = modalloy.load_model(folder / "base", dtype="auto")
    assert found["base"]["perplexity"].value == pytest.approx(_examined(text, False)["perplexity"].value)
    if donor == "lora":
        text.model.decoder.model.layers[0].self_attn.q_proj.weight.data += 2 / 81
        own = _examined(text, False)["perplexity"].value
        assert found["lora"]["perplexity"].value == pytest.approx(own, rel=1e-4)


def test_sanity_of_what_cannot_be_asked_is_refused_before_the_merge(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = shutil.copytree(folder / "text", tmp_path / "cog")
    config = json.loads((target / "config.json").read_text()) | {"architectures": ["CogVLMForCausalLM"]}
    (target / "config.json").write_text(json.dumps(config))
    content = yaml.safe_load((folder / "text.yaml").read_text()) | {"target": str(target)}
    for change, message in (
        (
            {"models": [{"model": str(folder / "donor")}]},
            r"cog is a CogVLMForCausalLM, which modalloy can merge but not",
        ),
        (
            {"target": None, "base_model": "x", "merge_method": "ssam", "parameters": {}, "output": {}},
            "--sanity: an adapter is no model by itself; write output.form: omni or full",
        ),
    ):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content | change))
        command = ["modalloy", "merge", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out"), "--sanity"]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as left:
            cli.main()
        error = capsys.readouterr().err
        assert left.value.code == 2 and re.search(message, error) and error.count("\n") == 1
        assert not (tmp_path / "out").exists()

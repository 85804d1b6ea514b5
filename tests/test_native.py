"""Specialists that are transformers' own multimodal models: alone through an omni folder each is itself, bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from native_models import MAKERS, VOCABULARY, Medium
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from modalloy import merge
from modalloy.model.load import load_model
from modalloy.senses.native import Prepared

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

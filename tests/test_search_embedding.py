"""What says how far two answers are apart in meaning: against a plain reference, and models that are none."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer, LlamaConfig, LlamaModel

from modalloy.errors import CheckpointError, ModalloyError
from modalloy.search.embedding import Embedder

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "cat", "runs", "away"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random encoder of sentences of at most 12 tokens."""
    folder = tmp_path_factory.mktemp("bert")
    BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=12, **sizes)).save_pretrained(folder)
    return folder


def test_one_minus_cosine_of_the_mean_states(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = Embedder(str(folder))
    model, vectors = BertModel.from_pretrained(folder).eval(), []
    # together, padded, and averaged over the mask, as the card of all-MiniLM-L6-v2 says
    rows = [[2, 5, 6, 3, 0, 0], [2, 5, 7, 8, 9, 3]]
    mask = torch.tensor([[float(id_ != 0) for id_ in row] for row in rows])
    with torch.no_grad():
        states = model(input_ids=torch.tensor(rows), attention_mask=mask).last_hidden_state
    for row, own in zip(states.double().tolist(), mask.tolist(), strict=True):
        real = [state for state, there in zip(row, own, strict=True) if there]
        mean = [sum(column) / len(real) for column in zip(*real, strict=True)]
        size = math.sqrt(sum(value * value for value in mean))
        vectors.append([value / size for value in mean])
    cosine = sum(x * y for x, y in zip(*vectors, strict=True))
    assert embedder.difference("a dog", "A cat runs away") == pytest.approx(1 - cosine, abs=1e-6)
    assert embedder.difference("A cat runs away", "a dog") == embedder.difference("a dog", "A cat runs away")

    monkeypatch.setattr(
        embedder, "model", None
    )  # known texts are not embedded again, nor is one text compared with itself
    assert embedder.difference("a dog", "A cat runs away") == pytest.approx(1 - cosine, abs=1e-6)
    assert embedder.difference("cat", "cat") == 0


def test_decoders_too_and_texts_without_tokens(folder: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    LlamaModel(LlamaConfig(vocab_size=8, **sizes)).save_pretrained(tmp_path)
    words = {"vocab": {"a": 0, "dog": 1, "?": 2}, "type": "WordLevel", "unk_token": "?"}
    tokenizer = {"version": "1.0", "model": words, "pre_tokenizer": {"type": "Whitespace"}, "added_tokens": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    embedder = Embedder(str(tmp_path))
    assert embedder.difference("a dog", "") == 1
    assert 0 < embedder.difference("a dog", "dog a") < 2


def test_what_is_no_model_of_sentences(folder: Path, tmp_path: Path) -> None:
    def refused(message: str, location: Path = tmp_path) -> None:
        with pytest.raises(CheckpointError, match=message) as found:
            Embedder(str(location))
        assert "\n" not in str(found.value)

    refused("--embedder .*gone: no such folder", tmp_path / "gone")
    refused("--embedder .* has no config.json; give the folder or hub id of a model")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    refused("--embedder .* cannot be opened")
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    refused("--embedder .* cannot be opened")
    short = BertModel(BertConfig.from_pretrained(folder, num_hidden_layers=1))
    short.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    refused(r"--embedder .*: its weights lack encoder\.layer\.1\.")
    with pytest.raises(
        ModalloyError, match="an answer takes 14 tokens, more than its 12; use a smaller --max-new-tokens"
    ):
        Embedder(str(folder)).difference("dog " * 12, "cat")

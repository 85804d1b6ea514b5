"""`vocabulary: union` and `tokenizer:`: what transformers opens, every row held to its rule, and mergekit's on the same models."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import base_tokenizer
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import modalloy
from modalloy import cli
from modalloy.errors import ModalloyError
from modalloy.verify import verify

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes a model of a base's shape with a tokenizer of more tokens, and rows for them."""
    known = len(base_tokenizer())

    def model(
        name: str, *tokens: str, special: tuple[str, ...] = (), tied: bool = False, seed: int = 0, spare: int = 0
    ) -> Path:
        tokenizer = base_tokenizer()
        tokenizer.add_tokens(list(tokens))
        if special:
            tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = LlamaConfig(**sizes, vocab_size=known, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2)
        torch.manual_seed(0)
        made = LlamaForCausalLM(config)
        made.resize_token_embeddings(len(tokenizer) + spare, mean_resizing=False)
        torch.manual_seed(seed)
        with torch.no_grad():
            for weight in made.parameters():
                weight += 0.05 * torch.randn_like(weight)
        made.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return model


def merged(folder: Path, **recipe: Any) -> Path:
    path = folder / "recipe.yaml"
    named = {"base_model": "base", "merge_method": "task_arithmetic", "models": [{"model": "one"}, {"model": "two"}]}
    path.write_text(yaml.safe_dump(named | recipe))
    modalloy.merge(path, folder / "out", overwrite=True)
    assert verify(folder / "out").recomputed
    return folder / "out"


def tables(folder: Path) -> dict[str, Tensor]:
    return {
        name: one
        for path in folder.glob("*.safetensors")
        for name, one in load_file(path).items()
        if name in (EMBED, HEAD)
    }


def rows(folder: Path, name: str = EMBED) -> dict[str, Tensor]:
    """The row of every token, by the tokenizer as transformers opens it."""
    table = tables(folder)[name]
    return {
        token: table[row]
        for token, row in AutoTokenizer.from_pretrained(folder).get_vocab().items()
        if row < len(table)
    }


def opened(folder: Path) -> Any:
    """The model as transformers opens it, which misses and finds nothing beside."""
    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    ids = AutoTokenizer.from_pretrained(folder)("what is this <|end|> extra", return_tensors="pt")
    assert ids["input_ids"].max() < model.config.vocab_size == model.get_input_embeddings().weight.shape[0]
    assert model(**ids).logits.isfinite().all()
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("spare", [0, 1, 7])
def test_the_union_has_every_token_in_a_row_of_its_own(make: Make, tmp_path: Path, tied: bool, spare: int) -> None:
    """`spare` rows of the base belong to no token; the first of them become new tokens', as their numbers are next."""
    base = make("base", tied=tied, spare=spare)
    one = make("one", "extra", special=("<|start|>", "<|end|>"), tied=tied, seed=1)
    two = make("two", special=("<|end|>", "<|tool|>"), tied=tied, seed=2, spare=3)
    out = merged(tmp_path, vocabulary="union")
    model, tokenizer = opened(out), AutoTokenizer.from_pretrained(out)
    known = base_tokenizer().get_vocab()
    wanted = known | {
        token: len(known) + place for place, token in enumerate(("extra", "<|start|>", "<|end|>", "<|tool|>"))
    }
    assert tokenizer.get_vocab() == wanted
    assert {"<|start|>", "<|end|>", "<|tool|>"} <= set(tokenizer.all_special_tokens) | {
        one.content for one in tokenizer.added_tokens_decoder.values() if one.special
    }
    assert not next(one for one in tokenizer.added_tokens_decoder.values() if one.content == "extra").special
    assert model.config.tie_word_embeddings is tied
    for name in [EMBED] if tied else [EMBED, HEAD]:
        ours, of_base, of_one, of_two = (rows(folder, name) for folder in (out, base, one, two))
        assert len(tables(out)[name]) == model.config.vocab_size == max(len(wanted), len(known) + spare)
        for token in known:
            assert torch.equal(ours[token], of_base[token])
        assert torch.equal(ours["<|start|>"], of_one["<|start|>"]) and torch.equal(ours["extra"], of_one["extra"])
        assert torch.equal(ours["<|tool|>"], of_two["<|tool|>"])
        mean = (of_one["<|end|>"].double() + of_two["<|end|>"].double()) / 2
        assert torch.equal(ours["<|end|>"], mean.float())
    assert tokenizer("what <|end|> extra")["input_ids"] == [wanted[token] for token in ("what", "<|end|>", "extra")]
    text = tokenizer.apply_chat_template([{"role": "user", "content": "what"}], tokenize=False)
    assert text == base_tokenizer().apply_chat_template([{"role": "user", "content": "what"}], tokenize=False)


def test_rows_are_mergekits(make: Make, tmp_path: Path) -> None:
    """With a rule for the embeddings, which mergekit merges without one; row by row of equal tokens, whose numbers differ."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    places = [
        make("base"),
        make("one", "extra", special=("<|end|>",), seed=1),
        make("two", special=("<|end|>",), seed=2),
    ]
    recipe: dict[str, Any] = {
        "base_model": str(places[0]),
        "merge_method": "task_arithmetic",
        "models": [{"model": str(place), "parameters": {"weight": 0.5}} for place in places[1:]],
        "tokenizer": {"source": "union"},
        "dtype": "float32",
    }
    run_merge(
        MergeConfiguration.model_validate(recipe),
        str(tmp_path / "theirs"),
        MergeOptions(quiet=True, write_model_card=False),
    )
    rule = {"merge_method": "task_arithmetic"}
    out = merged(tmp_path, **recipe, modules={"*embed_tokens*": rule, "lm_head*": rule})
    for name in (EMBED, HEAD):
        theirs, ours = rows(tmp_path / "theirs", name), rows(out, name)
        assert theirs.keys() == ours.keys()
        assert all(torch.allclose(ours[token], theirs[token], atol=1e-6) for token in ours)
    # without the rule the base's tokens keep their rows, and new ones are the same
    plain = rows(merged(tmp_path, **recipe))
    new = plain.keys() - rows(places[0]).keys()
    assert new == {"extra", "<|end|>"}
    assert all(torch.allclose(plain[token], rows(tmp_path / "theirs")[token], atol=1e-6) for token in new)


def test_a_models_tokenizer(make: Make, tmp_path: Path) -> None:
    """Its files, its tokens, its ends; the rows are the base's where it has the token."""
    base, two = make("base", special=("<|old|>",)), make("two", special=("<|tool|>", "<|old|>"), seed=2)
    make("one", "extra", seed=1)
    for name, text in (("config.json", {"eos_token_id": 40}), ("generation_config.json", {"eos_token_id": 40})):
        (two / name).write_text(json.dumps(json.loads((two / name).read_text()) | text))
    out = merged(tmp_path, tokenizer="two")
    opened(out)
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(two).get_vocab()
    assert (out / "tokenizer.json").read_bytes() == (two / "tokenizer.json").read_bytes()
    ours, of_base, of_two = rows(out), rows(base), rows(two)
    assert all(torch.equal(ours[token], of_base.get(token, of_two[token])) for token in ours)
    assert "extra" not in ours and torch.equal(ours["<|tool|>"], of_two["<|tool|>"])
    assert all(
        json.loads((out / name).read_text())["eos_token_id"] == 40 for name in ("config.json", "generation_config.json")
    )


def test_the_union_of_the_same_is_the_base(make: Make, tmp_path: Path) -> None:
    base = make("base")
    make("one", seed=1), make("two", seed=2, spare=5)  # of which only the padding differs
    plain = tables(merged(tmp_path, vocabulary="union"))
    assert all(torch.equal(plain[name], one) for name, one in tables(base).items())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


def test_pieces_of_another_vocabulary_follow_the_bases(make: Make, tmp_path: Path) -> None:
    """Byte-pair encodings that were trained apart: a text is still cut as the base's tokenizer does, or into whole pieces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folders = [make("base", spare=60), make("one", seed=1, spare=60), make("two", seed=2, spare=60)]
    texts = ["the cat sat on the mat"], ["a dog ran to the log"], ["the cat sat on the mat"]
    for folder, text in zip(folders, texts, strict=True):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer, tokenizer.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
        tokenizer.train_from_iterator(text * 5, trainers.BpeTrainer(vocab_size=30, special_tokens=["<s>"]))
        for path in folder.glob("*token*"):
            path.unlink()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    out = merged(tmp_path, vocabulary="union")
    found = AutoTokenizer.from_pretrained(out)
    vocabularies = [AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (*folders, out)]
    assert vocabularies[3].keys() == vocabularies[0].keys() | vocabularies[1].keys()
    assert all(vocabularies[3][token] == row for token, row in vocabularies[0].items())
    assert max(vocabularies[3].values()) == len(vocabularies[3]) - 1 > max(vocabularies[0].values())
    assert found.decode(found("the cat sat")["input_ids"]) == "the cat sat"
    ours, of_one = rows(out), rows(folders[1])
    assert all(torch.equal(ours[token], of_one[token]) for token in ours.keys() - vocabularies[0].keys())


def damage(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    for key, value in changes.items():
        content[key] = value(content[key]) if callable(value) else value
    path.write_text(json.dumps(content))


BAD: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "two rows of one token": (
        lambda f: damage(f / "one", added_tokens=lambda old: [*old, {"id": 77, "content": "what"}]),
        {},
        r"one/tokenizer\.json: 'what' is in rows 3 and 77; download the file again",
    ),
    "one row of two tokens": (
        lambda f: damage(
            f / "one", added_tokens=lambda old: [*old, {"id": 77, "content": "new"}, {"id": 77, "content": "newer"}]
        ),
        {},
        r"one/tokenizer\.json: row 77 belongs to 'new' and 'newer'",
    ),
    "no vocabulary": (
        lambda f: damage(f / "one", model={}),
        {},
        r"one/tokenizer\.json: holds no vocabulary that can be read",
    ),
    "flags that are text": (
        lambda f: damage(f / "one", added_tokens=lambda old: [one | {"lstrip": "yes"} for one in old]),
        {},
        r"one/tokenizer\.json: .* has flags that are not true or false; download the file again",
    ),
    "no tokenizer of the base": (
        lambda f: [path.unlink() for path in (f / "base").glob("token*")],
        {},
        r"base: holds no tokenizer\.json or tokenizer\.model, so its rows have no tokens",
    ),
    "gaps in the base": (
        lambda f: damage(f / "base", added_tokens=lambda old: [*old, {"id": 300, "content": "far"}]),
        {},
        r"base: its tokenizer leaves numbers between 0 and 300 free",
    ),
    "a token without a row": (
        lambda f: damage(
            f / "base", added_tokens=lambda old: [*old, {"id": len(base_tokenizer()), "content": "rowless"}]
        ),
        {},
        r"base: the token 'rowless' has a row of .* in no model; remove it from the tokenizer",
    ),
    "an adapter": (
        lambda f: None,
        {"output": {"form": "adapter", "compress_rank": 2}},
        r"output\.form 'adapter' has the base's vocabulary; write form: full",
    ),
    "with a target": (
        lambda f: None,
        {"target": "one"},
        r"a target keeps its own vocabulary: write vocabulary: by_token",
    ),
    "two answers": (lambda f: None, {"tokenizer": "one"}, r"vocabulary: union and tokenizer: are two answers"),
}


@pytest.mark.parametrize(("damaged", "changes", "message"), BAD.values(), ids=BAD)
def test_bad_vocabularies_are_refused_in_one_line(
    damaged: Callable[[Path], Any],
    changes: dict[str, Any],
    message: str,
    make: Make,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make("base"), make("one", "extra", seed=1), make("two", seed=2)
    damaged(tmp_path)
    recipe = {"base_model": "base", "merge_method": "task_arithmetic", "models": [{"model": "one"}, {"model": "two"}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"vocabulary": "union"} | changes))
    monkeypatch.setattr("sys.argv", ["modalloy", "merge", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out")])
    capfd.readouterr()
    with pytest.raises(SystemExit) as code:
        cli.main()
    said = capfd.readouterr().err.strip().splitlines()
    assert code.value.code == 2 and len(said) == 1 and re.search(message, said[0]), said
    assert not (tmp_path / "out").exists()


def test_other_rows_without_a_word_are_refused_with_the_way_on(make: Make, tmp_path: Path) -> None:
    make("base"), make("one", "extra", seed=1), make("two", seed=2)
    with pytest.raises(ModalloyError, match="write vocabulary: union for the tokens of all, or list"):
        merged(tmp_path)

"""Tokenizers as they lie in folders: every token has one row and every row one token, or the file is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from modalloy.errors import CheckpointError
from modalloy.families.vocabulary import read_tokens, shared_tokens

TABLE = {"<s>": 0, "▁a": 1, "<0x0A>": 2, "b": 3}


def folder(path: Path, **files: Any) -> Path:
    """A folder with these files, JSON unless they are bytes or text; `_` stands for the dot of their names."""
    path.mkdir(exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, (bytes, str)) else json.dumps(content)
        end = "model" if isinstance(content, bytes) else "json"
        (path / f"{name}.{end}").write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def sentencepiece(*pieces: str) -> bytes:
    """A model's protocol buffer: pieces with score and type, then its trainer's options, a number and a 64-bit one."""
    entries = [b"\x0a" + bytes([len(p.encode())]) + p.encode() + b"\x15\x00\x00\x80\x3f\x18\x06" for p in pieces]
    rest = b"\x12\x02\x08\x01" + b"\x20\x96\x01" + b"\x29" + bytes(8)
    return b"".join(b"\x0a" + bytes([len(entry)]) + entry for entry in entries) + rest


def test_every_form_gives_the_same_tokens(tmp_path: Path) -> None:
    added = [{"id": 4, "content": "<image>"}, {"id": 0, "content": "<s>", "special": True}]
    wanted = TABLE | {"<image>": 4}
    forms = {
        "bpe": {"tokenizer": {"model": {"vocab": TABLE}, "added_tokens": added}},
        "unigram": {"tokenizer": {"model": {"vocab": [[t, -1.5] for t in TABLE]}, "added_tokens": added[::-1]}},
        "config": {
            "tokenizer": {"model": {"vocab": TABLE}, "added_tokens": None},
            "tokenizer_config": {"added_tokens_decoder": {"4": {"content": "<image>"}, "0": {"content": "<s>"}}},
        },
        "pieces": {"tokenizer": sentencepiece(*TABLE), "added_tokens": {"<image>": 4}},
        "pieces_config": {
            "tokenizer": sentencepiece(*TABLE),
            "tokenizer_config": {"added_tokens_decoder": {"4": {"content": "<image>"}}},
        },
    }
    for name, files in forms.items():
        tokens = read_tokens(folder(tmp_path / name, **files))
        assert tokens == wanted, name
        assert tokens is not None and shared_tokens(wanted, tokens).same
    assert read_tokens(tmp_path) is None
    # what was added to one only makes the tokenizers differ, wherever it is written
    plain = read_tokens(folder(tmp_path / "plain", tokenizer=sentencepiece(*TABLE)))
    assert plain == TABLE and not shared_tokens(plain, wanted).same


def test_an_added_token_names_its_row(tmp_path: Path) -> None:
    """As InternLM2's chat tokens, which took the place of unused pieces."""
    content = {"model": {"vocab": {"a": 0, "[UNUSED]": 1}}, "added_tokens": [{"id": 1, "content": "<|im_end|>"}]}
    assert read_tokens(folder(tmp_path / "x", tokenizer=content)) == {"a": 0, "<|im_end|>": 1}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer": '{"model": {"vocab": {"a": 0, "a": 1}}}'}, "'a' is there twice"),
        ({"tokenizer": {"model": {"vocab": [["a", 0], ["b", 0], ["a", 0]]}}}, "'a' is in rows 0 and 2"),
        ({"tokenizer": {"model": {"vocab": {"a": 0, "b": 0}}}}, "row 0 belongs to 'a' and 'b'"),
        (
            {"tokenizer": {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1, "content": "a"}]}},
            "'a' is in rows 0 and 1",
        ),
        ({"tokenizer": {"model": {"vocab": {"a": -1}}}}, "'a' is in row -1, not a token and its number"),
        ({"tokenizer": {"model": {"vocab": {}}, "added_tokens": [{"id": 1, "content": []}]}}, r"\[\] is in row 1"),
        ({"tokenizer": {"model": {"vocab": {"a\n": "0"}}}}, r"'a\\n' is in row '0'"),
        ({"tokenizer": {"model": {"vocab": [[7, 0]]}}}, "7 is in row 0"),
        ({"tokenizer": {"model": {}}}, "holds no vocabulary"),
        ({"tokenizer": {"model": {"vocab": 3}}}, "holds no vocabulary"),
        ({"tokenizer": {"model": {"vocab": {}}, "added_tokens": [3]}}, "holds no vocabulary"),
        ({"tokenizer": sentencepiece("a", "b", "a")}, "'a' is in rows 0 and 2"),
        ({"tokenizer": sentencepiece("a", "b")[:-3]}, "model: holds no vocabulary .*is cut"),
        ({"tokenizer": b"\x07nonsense"}, "model: holds no vocabulary .*not a SentencePiece model"),
        ({"tokenizer": b"\x0a\x02\x0a\x05"}, "model: holds no vocabulary"),
        ({"tokenizer": b"\x0a\x03\x0a\x01\xff"}, "model: holds no vocabulary"),
        ({"tokenizer": sentencepiece("a"), "added_tokens": {"<image>": "1"}}, "'<image>' is in row '1'"),
        ({"tokenizer": sentencepiece("a"), "tokenizer_config": {"added_tokens_decoder": {"x": {}}}}, "no vocabulary"),
    ],
)
def test_vocabularies_that_are_refused(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_tokens(folder(tmp_path / "x", **files))
    assert "\n" not in str(caught.value) and "download" in str(caught.value)

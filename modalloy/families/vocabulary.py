"""Do two models number their tokens alike? Only then can rows of embeddings be merged."""

from pathlib import Path
from typing import Any

from modalloy.checkpoints import present, read_json
from modalloy.checkpoints.tensors import reading
from modalloy.errors import CheckpointError

SENTENCEPIECE, ADDED = "tokenizer.model", "added_tokens.json"


def shared_tokens(first: Path, second: Path) -> int | None:
    """How many rows the tokens of two models' folders take, if every token has the same row in both; None otherwise.

    None too where the folders hold no tokenizer in a common format. What is compared is tokenizer.json, else
    SentencePiece's tokenizer.model and added_tokens.json.
    """
    if all((folder / "tokenizer.json").is_file() for folder in (first, second)):
        tokens, others = _tokens(first / "tokenizer.json"), _tokens(second / "tokenizer.json")
        return 1 + max(tokens.values(), default=-1) if tokens == others else None
    if all((folder / SENTENCEPIECE).is_file() for folder in (first, second)):
        with reading(first / SENTENCEPIECE), reading(second / SENTENCEPIECE):
            model, other = (folder.joinpath(SENTENCEPIECE).read_bytes() for folder in (first, second))
        added, others = (read_json(f / ADDED) if present(f, [ADDED]) else {} for f in (first, second))
        if model == other and added == others:
            return max([_pieces(model, first / SENTENCEPIECE), *(1 + int(row) for row in added.values())])
    return None


def _tokens(path: Path) -> dict[str, int]:
    """Token -> row of a tokenizer.json."""
    content = read_json(path)
    try:
        vocabulary: Any = content["model"]["vocab"]
        tokens = vocabulary if isinstance(vocabulary, dict) else {entry[0]: row for row, entry in enumerate(vocabulary)}
        return tokens | {entry["content"]: entry["id"] for entry in content.get("added_tokens", [])}
    except (KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{path}: holds no vocabulary ({error!r}); download the file again") from error


def _pieces(model: bytes, path: Path) -> int:
    """Number of tokens of a SentencePiece model: how often its protocol buffer has field 1."""
    count = place = 0
    try:
        while place < len(model):
            key, place = _varint(model, place)
            if key & 7 != 2:  # the model's parts are all of the kind that says its length
                raise IndexError
            size, place = _varint(model, place)
            place += size
            count += key >> 3 == 1
    except IndexError as error:
        raise CheckpointError(f"{path}: not a SentencePiece model; download the file again") from error
    return count


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A whole number of a protocol buffer, seven bits a byte, and the place after it."""
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place

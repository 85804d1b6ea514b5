"""Which rows of two models' embeddings belong to the same tokens? Only these can be merged."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modalloy.errors import CheckpointError, shown
from modalloy.storage.folder import is_there, read_bytes, read_json
from modalloy.storage.views import Rows

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")  # the first that is there is read
ADDED, CONFIG = "added_tokens.json", "tokenizer_config.json"
VOCABULARY_FILES = (*TOKENIZER_FILES, ADDED, CONFIG)
MAX_MODEL_BYTES, MAX_PIECES = 32_000_000, 2_000_000  # of tokenizer.model; the largest known has 4 MB and 262,144 pieces
REMEDY = "download the file again, or write vocabulary: keep"


@dataclass(frozen=True)
class SharedTokens:
    """The tokens that a target and a donor share: stretches of the target's rows, and the donor's rows beside them."""

    rows: Rows
    source_rows: Rows
    sizes: tuple[int, int]  # tokens of the target, and of the donor
    heights: tuple[int, int]  # rows that these need: one more than their last token's

    @property
    def count(self) -> int:
        """How many tokens are shared."""
        return sum(end - begin for begin, end in self.rows)

    @property
    def same(self) -> bool:
        """Whether both number the same tokens alike, and have no others."""
        return self.rows == self.source_rows and self.sizes == (self.count, self.count)

    def to_dict(self) -> dict[str, int]:
        """The counts, for `--json`."""
        return {"shared": self.count, "target": self.sizes[0], "donor": self.sizes[1]}


def shared_tokens(target: Mapping[str, int], donor: Mapping[str, int]) -> SharedTokens:
    """The rows of the tokens that two vocabularies (token -> row) share, by their strings and never by their numbers.

    Only identical strings are one token: "Ġthe" of a byte-level vocabulary and "▁the" of SentencePiece are two, and so
    are the byte "<0x0A>" of the one and "Ċ" of the other. Costs O(n log n).
    """
    rows: list[tuple[int, int]] = []
    source_rows: list[tuple[int, int]] = []
    for row, source in sorted((row, donor[token]) for token, row in target.items() if token in donor):
        if rows and rows[-1][1] == row and source_rows[-1][1] == source:  # goes on where the last stretch ends
            (begin, _), (source_begin, _) = rows.pop(), source_rows.pop()
        else:
            begin, source_begin = row, source
        rows.append((begin, row + 1))
        source_rows.append((source_begin, source + 1))
    heights = (1 + max(target.values(), default=-1), 1 + max(donor.values(), default=-1))
    return SharedTokens(tuple(rows), tuple(source_rows), (len(target), len(donor)), heights)


def same_rows(count: int) -> SharedTokens:
    """What two models share of which nothing but the number of their common tokens is known: the first `count` rows."""
    rows = ((0, count),) if count else ()
    return SharedTokens(rows, rows, (count, count), (count, count))


def read_tokens(folder: Path) -> dict[str, int] | None:
    """Token -> row of the tokenizer in a model's folder; None if there is none that is read.

    Read are tokenizer.json, else SentencePiece's tokenizer.model with added_tokens.json, and with either the tokens that
    tokenizer_config.json adds. A row goes by the name of the added token where one took the place of a piece, as
    InternLM2's chat tokens do.

    Raises:
        CheckpointError: a file is damaged, or does not give each token one row and each row one token.
    """
    path = next((folder / name for name in TOKENIZER_FILES if is_there(folder / name)), None)
    if path is None:
        return None
    added: list[tuple[Any, Any]] = []
    try:
        if path.suffix == ".json":
            content = read_json(path)
            found: Any = content["model"]["vocab"]
            pieces = list(found.items()) if isinstance(found, dict) else _numbered(piece for piece, *_ in found)
            added += [(entry["content"], entry["id"]) for entry in content.get("added_tokens") or ()]
        else:
            pieces = _numbered(_pieces(read_bytes(path, MAX_MODEL_BYTES)))
            if is_there(folder / ADDED):
                added += read_json(folder / ADDED).items()
        if is_there(folder / CONFIG):
            decoder = read_json(folder / CONFIG).get("added_tokens_decoder") or {}
            added += [(entry["content"], int(row)) for row, entry in decoder.items()]
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: holds no vocabulary that can be read ({shown(error)}); {REMEDY}") from error
    first, later = _table(pieces, path), _table(added, path)
    for token, row in later.items():
        if first.get(token, row) != row:
            raise CheckpointError(f"{path}: {shown(token)} is in rows {shown(first[token])} and {shown(row)}; {REMEDY}")
    renamed = set(later.values())
    return {token: row for token, row in first.items() if row not in renamed} | later


def _table(entries: Iterable[tuple[Any, Any]], path: Path) -> dict[str, int]:
    """The entries as a dictionary that can be inverted."""
    tokens: dict[str, int] = {}
    names: dict[int, str] = {}
    for token, row in entries:
        if not isinstance(token, str) or type(row) is not int or row < 0:
            raise CheckpointError(
                f"{path}: {shown(token)} is in row {shown(row)}, not a token and its number; {REMEDY}"
            )
        if tokens.get(token) == row:  # an added token that two files list
            continue
        if token in tokens:
            raise CheckpointError(
                f"{path}: {shown(token)} is in rows {shown(tokens[token])} and {shown(row)}; {REMEDY}"
            )
        if row in names:
            raise CheckpointError(
                f"{path}: row {shown(row)} belongs to {shown(names[row])} and {shown(token)}; {REMEDY}"
            )
        tokens[token], names[row] = row, token
    return tokens


def _numbered(pieces: Iterable[Any]) -> list[tuple[Any, int]]:
    return [(piece, row) for row, piece in enumerate(pieces)]


def _pieces(model: bytes) -> Iterator[str]:
    """The pieces of a SentencePiece model: field 1 of its protocol buffer, and of each of these field 1, its string."""
    for number, piece in _fields(model):
        if number == 1:
            yield next((content for field, content in _fields(piece) if field == 1), b"").decode()


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and content of each field of a protocol buffer; without a content those that are numbers."""
    place = count = 0
    while place < len(data):
        if (count := count + 1) > MAX_PIECES:
            raise ValueError(f"more than {MAX_PIECES:,} pieces")
        key, place = _varint(data, place)
        content = b""
        if key & 7 == 2:  # says its length
            size, place = _varint(data, place)
            content = data[place : place + size]
            place += size
        elif key & 7 == 0:
            _, place = _varint(data, place)
        elif key & 7 in (1, 5):
            place += 8 if key & 7 == 1 else 4
        else:
            raise ValueError("not a SentencePiece model")
        if place > len(data):
            raise ValueError("the SentencePiece model is cut")
        yield key >> 3, content


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A whole number of a protocol buffer, seven bits a byte, and the place after it."""
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
        if shift > 63:
            raise ValueError("a number of more than 64 bits")

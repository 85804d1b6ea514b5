"""One vocabulary for models of several: which tokens a result has, in which rows, and what these rows hold.

A row is the base's where the base has the token. One that it lacks is the mean of the rows of those models that have it; to a
model without the token that row is no change. Only equal strings are one token, and new tokens follow the base's, model by
model in the order of their rows.
"""

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from modalloy.errors import CheckpointError, RecipeError, shown
from modalloy.families.vocabulary import ADDED, CONFIG, TOKENIZER_FILES, read_tokens
from modalloy.storage.folder import is_there, read_json
from modalloy.storage.tensors import Checkpoint, TensorRef
from modalloy.storage.views import AveragedRef, MappedRef, Rows, runs

FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")  # of an added token
PLAIN = dict.fromkeys(FLAGS, False) | {"normalized": True}  # of a piece of another model's vocabulary
MAX_NEW = 1_000_000  # rows that are added


@dataclass(frozen=True)
class Source:
    """A model as far as its rows go: what messages call it, its tokenizer's folder, its tables of rows by the base's names."""

    label: str
    folder: Path
    tables: Mapping[str, TensorRef]
    tokens: Mapping[str, int]


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a result and their rows. `added` are those that the tokenizer's own files lack, with their flags."""

    tokens: Mapping[str, int]
    height: int  # of the result's tables
    folder: Path  # whose tokenizer files the result has
    base: Source
    added: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def placed(self, sources: Sequence[Source]) -> tuple[dict[str, TensorRef], list[dict[str, TensorRef]]]:
        """The base's tables with the rows of the result, and those of every model, by the base's names.

        Raises:
            CheckpointError: a token has a row in no model.
        """
        starts: dict[str, TensorRef] = {}
        placed: list[dict[str, TensorRef]] = [{} for _ in sources]
        for name, table in self.base.tables.items():
            owners = [source if name in source.tables else None for source in sources]
            starts[name] = self._start(name, table, [one for one in owners if one is not None])
            for own, source in zip(placed, owners, strict=True):
                if source is not None:
                    own[name] = self._own(source.tables[name], source.tokens, starts[name])
        return starts, placed

    def _start(self, name: str, table: TensorRef, sources: Sequence[Source]) -> AveragedRef:
        """The base's rows, and for tokens that it lacks the mean of the models' rows."""
        own: list[tuple[int, int]] = []
        others: dict[int, list[tuple[int, int]]] = {}  # of single rows and their places, by the index of a source
        places: dict[int, int] = {}
        for token, row in self.tokens.items():
            if (place := self.base.tokens.get(token, table.shape[0])) < table.shape[0]:
                own.append((place, row))
                continue
            for index, source in enumerate(sources):
                if (place := source.tokens.get(token, source.tables[name].shape[0])) < source.tables[name].shape[0]:
                    others.setdefault(index, []).append((place, places.setdefault(row, len(places))))
            if row not in places:
                raise CheckpointError(
                    f"{self.folder}: the token {shown(token)} has a row of {name} in no model; remove it from the "
                    "tokenizer, or give a model that was trained with it"
                )
        taken = set(self.tokens.values())
        own += [(row, row) for row in range(min(self.height, table.shape[0])) if row not in taken]  # of no token
        rest = sorted(set(range(self.height)) - {row for _, row in own} - set(places))
        if rest:
            raise CheckpointError(
                f"{self.folder}: row {rest[0]} of its tables belongs to no token, and the base has no such row; use "
                "vocabulary: union"
            )
        shape, means = (self.height, *table.shape[1:]), []
        dtype = table.dtype
        for index, pairs in others.items():
            other = sources[index].tables[name]
            dtype = torch.promote_types(dtype, other.dtype)
            means.append((other, *_paired(pairs)))
        rows = runs(sorted(places, key=places.__getitem__))
        return AveragedRef(name, dtype, shape, table.file, -1, ((table, *_paired(own)),), True, rows, tuple(means))

    def _own(self, table: TensorRef, tokens: Mapping[str, int], start: TensorRef) -> MappedRef:
        """A model's rows, and the result's start where it lacks the token."""
        own = [
            (tokens[token], row)
            for token, row in self.tokens.items()
            if tokens.get(token, table.shape[0]) < table.shape[0]
        ]
        kept = sorted(set(range(self.height)) - {row for _, row in own})
        parts: list[tuple[TensorRef, Rows, Rows]] = [(table, *_paired(own))] if own else []
        if kept:
            parts.append((start, runs(kept), runs(kept)))
        dtype = torch.promote_types(table.dtype, start.dtype) if kept else table.dtype
        return MappedRef(table.name, dtype, start.shape, table.file, -1, tuple(parts), bool(kept))

    def config(self, base: dict[str, Any]) -> dict[str, Any]:
        """The base's config with the result's number of rows, and the ends of texts of the tokenizer's own model."""
        found = copy.deepcopy(base)
        parts = [found, *(found[key] for key in ("text_config", "llm_config") if isinstance(found.get(key), dict))]
        for part in parts:
            if "vocab_size" in part:
                part["vocab_size"] = self.height
        if self.folder != self.base.folder:
            own = read_json(self.folder / "config.json")
            for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
                found.pop(key, None)
                if key in own:
                    found[key] = own[key]
        return found

    def files(self) -> dict[str, str]:
        """The tokenizer's files that say more than their own model's, by name: the added tokens are in them."""
        if not self.added:
            return {}
        entries = [{"id": self.tokens[token], "content": token, **flags} for token, flags in self.added.items()]
        content = read_json(self.folder / TOKENIZER_FILES[0])
        content["added_tokens"] = [*(content.get("added_tokens") or []), *entries]
        found = {TOKENIZER_FILES[0]: content}
        if is_there(self.folder / CONFIG):
            config = read_json(self.folder / CONFIG)
            if isinstance(decoder := config.get("added_tokens_decoder"), dict):
                more = {str(one["id"]): {key: one[key] for key in ("content", *FLAGS)} for one in entries}
                found[CONFIG] = config | {"added_tokens_decoder": decoder | more}
        if is_there(self.folder / ADDED):
            found[ADDED] = read_json(self.folder / ADDED) | {one["content"]: one["id"] for one in entries}
        return {name: json.dumps(one, ensure_ascii=False, indent=2) + "\n" for name, one in found.items()}


def common_vocabulary(
    base: Checkpoint,
    config: Mapping[str, Any],
    rows: Iterable[str],
    models: Sequence[tuple[str, Path, dict[str, TensorRef]]],
    chosen: int | None,
) -> tuple[Vocabulary, Checkpoint]:
    """The vocabulary of a result, and the base with tables of its rows. In the models' tensors (label, folder, tensors by the
    base's names) the tables are replaced.

    Args:
        base: the base's tensors.
        config: its config.json.
        rows: the names of its tensors of which a row belongs to a token, a position or the like.
        models: those of the recipe.
        chosen: the index of the one whose tokenizer the result has; None for the union of all.

    Raises:
        CheckpointError: a tokenizer is missing or damaged, or a token has no row.
        RecipeError: the base cannot have another tokenizer.
    """
    tables = tables_of(base.refs, rows, config, base.folder)
    own = source_of("base", base.folder, tables)
    sources = [
        source_of(label, folder, {name: found[name] for name in tables if name in found}, own.tokens)
        for label, folder, found in models
    ]
    vocabulary = union(own, sources) if chosen is None else tokens_of(sources[chosen], own, config)
    starts, placed = vocabulary.placed(sources)
    for (_, _, found), new in zip(models, placed, strict=True):
        found.update(new)
    return vocabulary, base.replaced(starts)


def source_of(
    label: str, folder: Path, tables: Mapping[str, TensorRef], base: Mapping[str, int] | None = None
) -> Source:
    """A model with its tokenizer; one that brings none has the `base`'s.

    Raises:
        CheckpointError: the tokenizer cannot be read, or is not there.
    """
    tokens = read_tokens(folder)
    if tokens is None and base is None:
        raise CheckpointError(
            f"{folder}: holds no {' or '.join(TOKENIZER_FILES)}, so its rows have no tokens; put its tokenizer there"
        )
    return Source(label, folder, tables, tokens if tokens is not None else base or {})


def tables_of(
    refs: Mapping[str, TensorRef], rows: Iterable[str], config: Mapping[str, Any], folder: Path
) -> dict[str, TensorRef]:
    """The base's tables with one row for each token: of those called `rows` the ones as high as its vocabulary,
    and their biases."""
    text = next((config[key] for key in ("text_config", "llm_config") if isinstance(config.get(key), dict)), config)
    size = text.get("vocab_size", config.get("vocab_size"))
    found = {name: refs[name] for name in rows if refs[name].shape[0] == size}
    biases = (f"{name.removesuffix('.weight')}.bias" for name in list(found))
    found |= {name: refs[name] for name in biases if name in refs and refs[name].shape == (size,)}
    if not found:
        raise CheckpointError(
            f"{folder}: no embedding has the vocab_size of its config ({shown(size)}); correct config.json"
        )
    return found


def union(base: Source, sources: Sequence[Source]) -> Vocabulary:
    """The base's tokens, then those that the models add, in their order.

    Raises:
        CheckpointError: the base's tokenizer is of a form to which no tokens can be added.
    """
    if not is_there(base.folder / TOKENIZER_FILES[0]):
        raise CheckpointError(
            f"{base.folder}: holds no {TOKENIZER_FILES[0]}, to which tokens could be added; save its tokenizer with "
            "transformers first"
        )
    if sorted(base.tokens.values()) != list(range(len(base.tokens))):
        raise CheckpointError(
            f"{base.folder}: its tokenizer leaves numbers between 0 and {max(base.tokens.values(), default=0)} free, which "
            "added tokens would take; leave vocabulary: union out"
        )
    tokens, added = dict(base.tokens), {}
    for source in sources:
        heights = [table.shape[0] for table in source.tables.values()]
        new = [token for token, row in source.tokens.items() if token not in tokens and row < max(heights, default=0)]
        flags = _flags(source.folder) if new else {}
        for token in sorted(new, key=source.tokens.__getitem__):
            tokens[token] = len(tokens)
            added[token] = flags.get(token, PLAIN)
    if len(added) > MAX_NEW:
        raise CheckpointError(
            f"the models add {len(added):,} tokens to the base's, more than {MAX_NEW:,}; write vocabulary: auto"
        )
    heights = [len(tokens), *(table.shape[0] for table in base.tables.values())]
    return Vocabulary(tokens, max(heights), base.folder, base, added)


def tokens_of(chosen: Source, base: Source, config: Mapping[str, Any]) -> Vocabulary:
    """The tokens of one of the models.

    Raises:
        RecipeError: the base is multimodal: its config numbers tokens of its media.
    """
    if isinstance(config.get("text_config"), dict):
        raise RecipeError(
            f"tokenizer: {chosen.label}: the base is multimodal, and its config numbers tokens by its own tokenizer; write "
            "vocabulary: union"
        )
    return Vocabulary(chosen.tokens, 1 + max(chosen.tokens.values(), default=0), chosen.folder, base)


def _flags(folder: Path) -> dict[str, dict[str, bool]]:
    """How a tokenizer cuts a text at the tokens that were added to it."""
    entries: list[Any] = []
    path = folder / TOKENIZER_FILES[0]
    if is_there(path):
        entries = read_json(path).get("added_tokens") or []
    elif is_there(path := folder / CONFIG):
        decoder = read_json(path).get("added_tokens_decoder")
        entries = list(decoder.values()) if isinstance(decoder, dict) else []
    found: dict[str, dict[str, bool]] = {}
    for entry in entries:
        flags = {name: entry.get(name, PLAIN[name]) for name in FLAGS}
        if not all(isinstance(value, bool) for value in flags.values()):
            raise CheckpointError(
                f"{path}: {shown(entry.get('content'))} has flags that are not true or false; download the file again"
            )
        found[entry["content"]] = flags
    return found


def _paired(pairs: Sequence[tuple[int, int]]) -> tuple[Rows, Rows]:
    """Rows and the rows that they become, as stretches in which both rise."""
    rows: list[tuple[int, int]] = []
    places: list[tuple[int, int]] = []
    for row, place in sorted(pairs, key=lambda pair: pair[1]):
        if rows and rows[-1][1] == row and places[-1][1] == place:
            rows[-1], places[-1] = (rows[-1][0], row + 1), (places[-1][0], place + 1)
        else:
            rows.append((row, row + 1))
            places.append((place, place + 1))
    return tuple(rows), tuple(places)

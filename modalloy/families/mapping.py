"""Where every tensor of a target model finds its counterpart in a donor of another architecture. Reads names and shapes only.

AdaMMS (Du et al., CVPR 2025, arXiv 2503.23733): the target's architecture is kept; what both have is merged; copies that the
target made for image tokens take the weight they were copied from; what only the target has is kept, what only the donor
has is left out.
"""

import fnmatch
import math
import re
from collections import Counter, defaultdict
from collections.abc import Container, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from modalloy.errors import CheckpointError
from modalloy.families import family_of
from modalloy.families.rules import Family, Found, Geometry, Place, Spelling, rows_of
from modalloy.families.vocabulary import SharedTokens
from modalloy.report.text import printable_lines
from modalloy.storage.views import Rows, height_of

Header = Mapping[str, tuple[int, ...]]  # tensor name -> shape
Operation = Literal["same", "rename", "dup", "cat", "split", "slice_rows", "none"]
Policy = Literal["merge", "keep_target", "take_source", "drop_source", "error"]
VOCABULARY = ("embed", "head")  # whose rows belong to tokens
UNITS = {
    "layers": "layers",
    "width": "hidden size",
    "ffn": "intermediate size",
    "heads": "attention heads",
    "kv_heads": "key heads",
    "head_dim": "entries a head",
    "rope_theta": "rope theta",
    "rope_scaling": "rope scaling",
    "norm_epsilon": "norm epsilon",
    "tied": "tied embeddings",
}


@dataclass(frozen=True)
class Piece:
    """Rows of a target tensor that are one slot's, and the donor's rows that they are merged with, as many."""

    slot: Place
    rows: Rows
    source: str
    source_rows: Rows
    duplicated: bool = False  # the source is the weight that the target's copy was made from

    @property
    def height(self) -> int:
        """How many rows."""
        return height_of(self.rows)


@dataclass(frozen=True)
class Mapped:
    """What becomes of one target tensor, from which pieces; rows that no piece has stay the target's."""

    name: str
    shape: tuple[int, ...]
    policy: Policy
    operation: Operation
    pieces: tuple[Piece, ...] = ()
    reason: str = ""

    @property
    def taken(self) -> int:
        """Parameters that change."""
        return sum(piece.height for piece in self.pieces) * math.prod(self.shape[1:])


@dataclass(frozen=True)
class ModelMap:
    """The account of two models: each target tensor's fate, and why each donor tensor without a use is left out."""

    target: str  # families
    donor: str
    tensors: dict[str, Mapped]
    dropped: dict[str, str]  # donor tensor -> why nothing of it is used
    partly: dict[str, tuple[int, str]]  # donor tensor of which some rows are unused -> parameters, why
    donor_header: Header
    tokens: SharedTokens | None = None  # whose rows of embeddings and head are merged
    ancestry: str = ""  # what is known of a common ancestor

    def coverage(self) -> dict[str, dict[str, int]]:
        """Tensors and parameters that are merged, duplicated (merged with the weight they were copied from), kept, dropped."""
        counted: dict[str, Counter[str]] = {fate: Counter() for fate in ("merged", "duplicated", "kept", "dropped")}
        for mapped in self.tensors.values():
            fate = _fate(mapped)
            rest = math.prod(mapped.shape) - mapped.taken
            counted[fate].update(tensors=1, parameters=mapped.taken if mapped.pieces else rest)
            if mapped.pieces:
                counted["kept"].update(tensors=0, parameters=rest)
        for name in self.dropped:
            counted["dropped"].update(tensors=1, parameters=math.prod(self.donor_header[name]))
        for parameters, _ in self.partly.values():
            counted["dropped"].update(tensors=0, parameters=parameters)
        return {fate: {key: counts[key] for key in ("tensors", "parameters")} for fate, counts in counted.items()}

    def to_dict(self) -> dict[str, Any]:
        """The account for `--json`; `tokens` is null where the target's rows of embeddings and head are kept."""
        tokens = None if self.tokens is None else self.tokens.to_dict()
        return {
            "family": self.donor,
            "into": self.target,
            "ancestor": self.ancestry,
            "tokens": tokens,
        } | self.coverage()

    def page(self) -> str:
        """The same by kind of tensor, on one page: layers are folded into {i}, what is kept or dropped by its reason."""
        lines: dict[tuple[str, ...], list[int]] = defaultdict(lambda: [0, 0])
        for mapped in self.tensors.values():
            sources = " + ".join(dict.fromkeys(_folded(piece.source) for piece in mapped.pieces))
            name = _folded(mapped.name) if mapped.pieces else ""
            row = (_fate(mapped), name, mapped.operation, sources or mapped.reason)
            lines[row][0] += 1
            lines[row][1] += math.prod(mapped.shape)
        for name, reason in self.dropped.items():
            row = ("dropped", "", "none", reason)
            lines[row][0] += 1
            lines[row][1] += math.prod(self.donor_header[name])
        for name, (parameters, reason) in self.partly.items():
            row = ("dropped", f"some rows of {_folded(name)}", "split", reason)
            lines[row][0] += 1
            lines[row][1] += parameters
        coverage = self.coverage()
        totals = " · ".join(
            f"{fate} {counts['tensors']} tensors, {counts['parameters'] / 1e6:.1f}M"
            for fate, counts in coverage.items()
        )
        order = {fate: place for place, fate in enumerate(coverage)}
        table = [
            f"{fate:<10} {n:>5} × {parameters / n / 1e6:>7.2f}M  {operation:<10} {name + ' <- ' if name else ''}{source}"
            for (fate, name, operation, source), (n, parameters) in sorted(
                lines.items(), key=lambda line: order[line[0][0]]
            )
        ]
        notes = [f"ancestor: {self.ancestry}"] if self.ancestry else []
        notes += [f"tokens: {self.shared()}"]
        return printable_lines([f"{self.donor} into {self.target}: {totals}", *notes, *table])

    def shared(self) -> str:
        """Of how many tokens the embeddings are merged."""
        if self.tokens is None:
            return "the target's are kept"
        return f"{self.tokens.count} of {self.tokens.sizes[0]} merged, the donor has {self.tokens.sizes[1]}"


def map_models(
    target_header: Header,
    target_config: dict[str, Any],
    donor_header: Header,
    donor_config: dict[str, Any],
    *,
    shared_tokens: SharedTokens | None = None,
    policies: Mapping[str, Policy] | None = None,
    labels: tuple[str, str] = ("target", "donor"),
) -> ModelMap:
    """The counterpart of every target tensor in the donor, checked before any arithmetic.

    Args:
        target_header: names and shapes of the model whose architecture is kept.
        target_config: its config.json.
        donor_header: names and shapes of the other model.
        donor_config: its config.json.
        shared_tokens: rows of embeddings and head that belong to the same tokens and are merged; where the tokenizers are
            the same and neither model is padded further than the other, all rows. None: the target's are kept.
        policies: pattern of names -> what to do instead of the rule: `keep_target`, `take_source` or `error` of target
            tensors, `drop_source` of donor tensors that the target has no place for. The first that matches counts.
        labels: how messages call the two.

    Raises:
        CheckpointError: an architecture is unknown, the decoders differ in what must be equal, a tensor has no rule or no
            counterpart, or shapes do not fit.
    """
    chosen = policies or {}
    left = {pattern: policy for pattern, policy in chosen.items() if policy == "drop_source"}
    rules = {pattern: policy for pattern, policy in chosen.items() if policy != "drop_source"}
    dropped = {name: "the recipe leaves it out" for name in donor_header if _policy(name, left)}
    rest = {name: shape for name, shape in donor_header.items() if name not in dropped}
    target = _Model(labels[0], target_header, target_config)
    donor = _Model(labels[1], donor_header, donor_config, dropped)
    _check_geometry(target, donor)
    tensors = {name: _mapped(name, target, donor, shared_tokens, _policy(name, rules)) for name in target_header}
    used: dict[str, set[Rows]] = defaultdict(set)
    for mapped in tensors.values():
        for piece in mapped.pieces:
            used[piece.source].add(piece.source_rows)
    partly: dict[str, tuple[int, str]] = {}
    for name, shape in rest.items():
        unused = donor.unused(name, used[name])
        if used[name] and not unused:
            if donor.found[name].slots[0].role in VOCABULARY and (rows := shape[0] - max(map(height_of, used[name]))):
                partly[name] = (rows * math.prod(shape[1:]), "tokens that the target does not have, or padding")
            continue
        reason = _why_dropped(name, unused, target, donor, tensors)
        if used[name]:
            height = sum(height_of(donor.slots[slot][1]) for slot in unused)
            partly[name] = (height * math.prod(shape[1:]), reason)
        else:
            dropped[name] = reason
    roles = {piece.slot.role for mapped in tensors.values() for piece in mapped.pieces}
    tokens = shared_tokens if roles.intersection(VOCABULARY) else None
    return ModelMap(target.family.name, donor.family.name, tensors, dropped, partly, donor_header, tokens)


class _Model:
    """One model's names understood: every tensor's rule, and where every slot's rows are."""

    def __init__(self, label: str, header: Header, config: dict[str, Any], without: Container[str] = ()) -> None:
        self.label, self.header = label, header
        try:
            self.family: Family = family_of(config)
            self.spelling: Spelling = self.family.spelling(header)
            self.geometry: Geometry = self.family.geometry(config)
        except CheckpointError as error:
            raise CheckpointError(f"{label}: {error}") from error
        self.found: dict[str, Found] = {}
        self.slots: dict[Place, tuple[str, Rows]] = {}
        for name, shape in header.items():
            found = self.family.find(name, self.spelling)
            if found is None or name in without:
                continue
            self.found[name] = found
            for slot, rows in zip(found.slots, self._rows(name, found, shape), strict=True):
                if slot in self.slots:
                    raise CheckpointError(
                        f"{label}: {name} and {self.slots[slot][0]} are both the {slot}; remove one from its files"
                    )
                self.slots[slot] = (name, rows)
        indices = [found.layer for found in self.found.values() if found.slots and found.layer is not None]
        layers = 1 + max(indices, default=-1)
        if layers != self.geometry.layers:
            raise CheckpointError(
                f"{label}: config.json says {self.geometry.layers} layers, but its tensors are of {layers}; "
                "download the folder again"
            )

    def _rows(self, name: str, found: Found, shape: tuple[int, ...]) -> list[Rows]:
        if not found.slots:
            return []
        try:
            return rows_of(found, self.geometry, shape[0])
        except ValueError as error:
            raise CheckpointError(
                f"{self.label}: {name} {error}; its config.json does not belong to its weights: download both again"
            ) from error

    def unused(self, name: str, used: set[Rows]) -> list[Place]:
        """The slots of a tensor of whose rows none are used."""
        slots = self.found[name].slots if name in self.found else ()
        return [slot for slot in slots if self.slots[slot][1] not in used and not (used and slot.role in VOCABULARY)]

    def counterpart(self, slot: Place) -> tuple[str, Rows, bool] | None:
        """The tensor and rows of a slot; of its own copy, else of the weight that a copy is made from (then True)."""
        language = Place(slot.role, slot.layer, "language", slot.part)
        embedding = Place("embed", None)  # which a tied head is
        for wanted, duplicated in ((slot, False), (language, True)):
            if wanted in self.slots:
                return *self.slots[wanted], duplicated
        if slot.role == "head" and self.geometry.tied and embedding in self.slots:
            return *self.slots[embedding], False
        return None


def _check_geometry(target: _Model, donor: _Model) -> None:
    for field in fields(Geometry):
        wanted, found = getattr(target.geometry, field.name), getattr(donor.geometry, field.name)
        if wanted != found:
            raise CheckpointError(
                f"{donor.label}: {UNITS[field.name]} {found}, but {wanted} in {target.label}; only decoders that agree in it "
                "can be merged: choose models of one ancestor"
            )


def _policy(name: str, policies: Mapping[str, Policy]) -> Policy | None:
    return next((policy for pattern, policy in policies.items() if fnmatch.fnmatchcase(name, pattern)), None)


def _mapped(
    name: str, target: _Model, donor: _Model, shared_tokens: SharedTokens | None, policy: Policy | None
) -> Mapped:
    """The fate of one target tensor."""
    shape, found = target.header[name], target.found.get(name)
    if policy == "keep_target":
        return Mapped(name, shape, "keep_target", "none", reason="the recipe keeps it")
    if policy == "error":
        raise CheckpointError(f"{target.label}: {name} is there, which the recipe forbids")
    if found is None:
        raise CheckpointError(
            f"{target.label}: no rule of family {target.family.name} has {name} {shape}; keep it by a `modules:` rule with "
            "policy: keep"
        )
    if not found.slots:
        return Mapped(name, shape, "keep_target", "none", reason=found.rule.reason)
    if shared_tokens is None and found.slots[0].role in VOCABULARY:
        return Mapped(name, shape, "keep_target", "none", reason="the tokenizers are not known to be the same")
    pieces = []
    for slot, rows in zip(found.slots, rows_of(found, target.geometry, shape[0]), strict=True):
        counterpart = donor.counterpart(slot)
        if counterpart is None:
            raise CheckpointError(
                f"{donor.label}: has no {slot} (or `ignore:` leaves it out), which {target.label} has as {name}; keep the "
                "target's by a `modules:` rule with policy: keep"
            )
        source, source_rows, duplicated = counterpart
        if (
            slot.role in VOCABULARY
            and shared_tokens
            and not (shared_tokens.same and shape[0] == donor.header[source][0])
        ):
            places = ((target.label, name, shape[0]), (donor.label, source, donor.header[source][0]))
            rows, source_rows = _token_rows(shared_tokens, places)
        piece = Piece(slot, rows, source, source_rows, duplicated)
        _check_piece(piece, name, shape, donor)
        pieces.append(piece)
    return Mapped(name, shape, policy or "merge", _operation(name, shape, pieces, donor), tuple(pieces))


def _token_rows(shared_tokens: SharedTokens, places: tuple[tuple[str, str, int], ...]) -> tuple[Rows, Rows]:
    """The rows of shared tokens in the target's tensor and in the donor's, each with its label, name and height."""
    for (label, name, height), needed in zip(places, shared_tokens.heights, strict=True):
        if needed > height:
            raise CheckpointError(
                f"{label}: its tokenizer has a token in row {needed - 1}, but {name} has {height} rows; it does not belong to "
                "its model: download both again, or write vocabulary: keep"
            )
    return shared_tokens.rows, shared_tokens.source_rows


def _check_piece(piece: Piece, name: str, shape: tuple[int, ...], donor: _Model) -> None:
    """After the operation both sides must have one shape."""
    other = donor.header[piece.source]
    height = height_of(piece.source_rows)
    if (piece.height, *shape[1:]) != (height, *other[1:]):
        raise CheckpointError(
            f"{donor.label}: the {piece.slot} is {(height, *other[1:])} in {piece.source}, but {(piece.height, *shape[1:])} in "
            f"{name} of the target; only models of one size can be merged"
        )


def _operation(name: str, shape: tuple[int, ...], pieces: list[Piece], donor: _Model) -> Operation:
    """What turns the donor's tensors into the target's."""
    first = pieces[0]
    whole = (((0, shape[0]),), ((0, donor.header[first.source][0]),))
    if first.slot.role in VOCABULARY and (first.rows, first.source_rows) != whole:
        return "slice_rows"
    if len({piece.source for piece in pieces}) > 1:
        return "cat"
    if any(piece.duplicated for piece in pieces):
        return "dup"
    if sum(piece.height for piece in pieces) < donor.header[first.source][0]:
        return "split"
    return "same" if first.source == name else "rename"


def _why_dropped(name: str, slots: list[Place], target: _Model, donor: _Model, tensors: dict[str, Mapped]) -> str:
    """Why a donor tensor, or those slots of it, can be left out though nothing uses it."""
    if name not in donor.found:
        raise CheckpointError(
            f"{donor.label}: no rule of family {donor.family.name} has {name} {donor.header[name]}; list it under `ignore:` to "
            "leave it out"
        )
    if not slots:
        return f"{donor.found[name].rule.reason} (the donor's)"
    places = [tensors[target.slots[slot][0]] for slot in slots if slot in target.slots]
    if places and all(place.policy == "keep_target" for place in places):
        return places[0].reason
    if slots[0].owner == "vision":
        return "a copy for image tokens, which the target does not have"
    if slots[0].role == "head" and donor.geometry.tied:
        return "tied to the embeddings"
    raise CheckpointError(
        f"{donor.label}: {name} is the {slots[0]}, which {target.label} has not; list it under `ignore:` to leave it out"
    )


def _fate(mapped: Mapped) -> str:
    if not mapped.pieces:
        return "kept"
    return "duplicated" if any(piece.duplicated for piece in mapped.pieces) else "merged"


def _folded(name: str) -> str:
    return re.sub(r"(?<=\.layers\.)\d+(?=\.)", "{i}", name)

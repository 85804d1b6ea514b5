"""Donors and base of a merge across architectures, seen through the target's names: renamed, joined, split or copied."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modalloy.checkpoints import Checkpoint, Specialist, TensorRef, is_portable, open_base, read_json
from modalloy.errors import CheckpointError
from modalloy.families.ancestors import ancestor, check_ancestors
from modalloy.families.mapping import Header, Mapped, ModelMap, Policy, map_models
from modalloy.families.rules import Rows
from modalloy.families.vocabulary import shared_tokens
from modalloy.recipe import Recipe

EMBEDDED = ("embed_tokens.weight", "tok_embeddings.weight")


@dataclass(frozen=True)
class MappedRef(TensorRef):
    """A tensor of the target's shape made of rows of stored ones: (source, its rows, the rows that they become)."""

    parts: tuple[tuple[TensorRef, Rows, Rows], ...] = ()

    @property
    def largest_bytes(self) -> int:
        """Size of the largest source, which is read whole."""
        return max(source.n_bytes for source, _, _ in self.parts)


@dataclass(frozen=True)
class Across:
    """What a merge across architectures has beside target and donors: every donor's map, by label; and, for methods that
    merge updates, the base θ_0, the target as one of those that were trained from it, and where both are taken apart.

    A target tensor holds one linear weight, or several, row after row: `parts` has the slot and rows of each, `starts` θ_0's
    weight for every slot. Target and donors have theirs under the same slots.
    """

    maps: dict[str, ModelMap]
    base: Checkpoint | None = None
    base_name: str = ""  # without local folders
    base_map: ModelMap | None = None
    target: Specialist | None = None
    starts: dict[str, TensorRef] = field(default_factory=dict)
    parts: dict[str, list[tuple[str, Rows]]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The coverage of every donor, for `--json`."""
        return {
            one: {"family": found.donor, "into": found.target} | found.coverage() for one, found in self.maps.items()
        }


def open_donors(
    recipe: Recipe, target: Checkpoint, places: Sequence[tuple[str, Path]], base_folder: Path | None, *, allow: bool
) -> tuple[list[Specialist], Across]:
    """The donors at `places` (label, folder) as full models in the target's names, and how they and the base were mapped.

    Raises:
        CheckpointError: a donor or the base does not fit the target (see `map_models`), or they have no common ancestor and
            it is not `allow`ed.
    """
    config = read_json(target.folder / "config.json")
    wanted = ("target", ancestor(config, str(recipe.target)))

    def mapped(
        label: str, model: Checkpoint, location: str, tokens: Callable[[Header, Header], int | None]
    ) -> ModelMap:
        own = read_json(model.folder / "config.json")
        if not allow:
            check_ancestors(wanted, [(label, ancestor(own, location))])
        header, own_header = ({name: ref.shape for name, ref in one.refs.items()} for one in (target, model))
        return map_models(
            header,
            config,
            own_header,
            own,
            shared_tokens=tokens(header, own_header),
            policies=_policies(recipe),
            labels=("target", label),
        )

    donors, maps = [], {}
    for (label, folder), entry in zip(places, recipe.models, strict=True):
        checkpoint = open_base(folder)
        found = mapped(label, checkpoint, entry.model, partial(_shared, recipe, target.folder, folder))
        maps[label] = found
        full = {name: _ref(one, target, checkpoint) for name, one in found.tensors.items() if one.pieces}
        own = read_json(folder / "config.json")
        donors.append(Specialist(label, checkpoint, "donor", own, None, full=full, dropped=found.dropped))
    if base_folder is None:
        return donors, Across(maps)
    base = open_base(base_folder)
    base_map = mapped("base", base, recipe.base_model, lambda *_: None)  # updates of embeddings are not merged
    name = recipe.base_model if is_portable(recipe.base_model, recipe.folder) else base_folder.name
    across = Across(maps, base, name, base_map, Specialist("target", target, "full", config, None))
    _take_apart(across, target, donors)
    return donors, across


def _policies(recipe: Recipe) -> dict[str, Policy]:
    """What the recipe says of names, in the words of `map_models`."""
    words: dict[str, Policy] = {"keep": "keep_target", "take_source": "take_source", "error": "error"}
    chosen = {pattern: words[rule.policy] for pattern, rule in recipe.modules.items() if rule.policy in words}
    ignored: dict[str, Policy] = dict.fromkeys(recipe.ignore, "drop_source")
    return chosen | ignored


def _take_apart(across: Across, target: Checkpoint, donors: list[Specialist]) -> None:
    """Enter every linear weight of the target's tensors under a slot of its own: θ_0's, the target's and the donors'."""
    assert across.base is not None and across.base_map is not None and across.target is not None
    for name, origin in across.base_map.tensors.items():
        if len(origin.shape) != 2 or not origin.pieces or origin.policy == "take_source":
            continue
        several = len(origin.pieces) > 1
        across.parts[name] = []
        for index, piece in enumerate(origin.pieces):
            slot = f"{name}:{piece.slot.role}" if several else name
            across.parts[name].append((slot, piece.rows))
            across.starts[slot] = _rows(slot, across.base.refs[piece.source], piece.source_rows)
            across.target.full[slot] = _rows(slot, target.refs[name], piece.rows)
            for donor in donors:
                own = across.maps[donor.label].tensors[name].pieces[index]
                donor.full[slot] = _rows(slot, donor.checkpoint.refs[own.source], own.source_rows)


def assembled(ref: MappedRef, read: Callable[[TensorRef], Tensor], buffer: Tensor | None = None) -> Tensor:
    """The data of a mapped tensor, in a new tensor or in `buffer` (uint8)."""
    if buffer is None:
        buffer = torch.empty(ref.n_bytes, dtype=torch.uint8)
    out = buffer[: ref.n_bytes].view(ref.dtype).reshape(ref.shape)
    sources = {source: read(source) for source in dict.fromkeys(source for source, _, _ in ref.parts)}
    for source, taken, rows in ref.parts:
        stretches = torch.cat([sources[source][begin:end] for begin, end in taken])
        for begin, end in rows:
            out[begin:end], stretches = stretches[: end - begin], stretches[end - begin :]
    return out


def _shared(recipe: Recipe, target: Path, donor: Path, header: Header, own_header: Header) -> int | None:
    """How many rows of embeddings are of the same tokens, as the recipe says or the tokenizers show."""
    if recipe.vocabulary == "auto":
        return shared_tokens(target, donor)
    if recipe.vocabulary == "keep":
        return None
    heights = [shape[0] for one in (header, own_header) for name, shape in one.items() if name.endswith(EMBEDDED)]
    return min(heights, default=0)


def _ref(mapped: Mapped, target: Checkpoint, donor: Checkpoint) -> TensorRef:
    """Where a target tensor's counterpart is: a stored tensor, or rows of several."""
    own, height = target.refs[mapped.name], mapped.shape[0]
    sources = [donor.refs[piece.source] for piece in mapped.pieces]
    whole = ((0, height),)
    if len(sources) == 1 and mapped.pieces[0].rows == whole:
        return _rows(mapped.name, _floating(sources[0]), mapped.pieces[0].source_rows)
    parts = [(ref, piece.source_rows, piece.rows) for ref, piece in zip(sources, mapped.pieces, strict=True)]
    end = sum(piece.height for piece in mapped.pieces)
    if end < height:  # padding of the vocabulary, which stays the target's
        rest = ((end, height),)
        parts.append((own, rest, rest))
    dtype = _floating(own).dtype if end < height else _floating(sources[0]).dtype
    for ref in sources:
        dtype = torch.promote_types(dtype, _floating(ref).dtype)
    return MappedRef(mapped.name, dtype, mapped.shape, sources[0].file, -1, tuple(parts))


def _rows(name: str, ref: TensorRef, rows: Rows) -> TensorRef:
    """Some rows of a stored tensor as one of its own; the tensor itself where they are all of it."""
    if rows == ((0, ref.shape[0]),):
        return ref
    height = sum(end - begin for begin, end in rows)
    return MappedRef(name, _floating(ref).dtype, (height, *ref.shape[1:]), ref.file, -1, ((ref, rows, ((0, height),)),))


def _floating(ref: TensorRef) -> TensorRef:
    """The tensor, if it is of a type that can be merged."""
    if not ref.dtype.is_floating_point:
        raise CheckpointError(
            f"{ref.file}: {ref.name} is stored as {ref.dtype}, which cannot be merged; convert it to bfloat16 or float32"
        )
    return ref

"""Donors of a merge across architectures, seen through the target's names: their tensors renamed, joined, split or copied."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modalloy.checkpoints import Checkpoint, Specialist, TensorRef, open_base, read_json
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


def open_donors(
    recipe: Recipe, target: Checkpoint, places: Sequence[tuple[str, Path]], *, allow: bool
) -> tuple[list[Specialist], dict[str, ModelMap]]:
    """The donors at `places` (label, folder) as full models in the target's names, and each one's map, by label.

    Raises:
        CheckpointError: a donor does not fit the target (see `map_models`), or they have no common ancestor and it is not
            `allow`ed.
    """
    config = read_json(target.folder / "config.json")
    header = {name: ref.shape for name, ref in target.refs.items()}
    kept: dict[str, Policy] = {
        pattern: "keep_target" for pattern, rule in recipe.modules.items() if rule.policy == "keep"
    }
    ignored: dict[str, Policy] = dict.fromkeys(recipe.ignore, "drop_source")
    wanted = ("target", ancestor(config, str(recipe.target)))
    donors, maps = [], {}
    for (label, folder), entry in zip(places, recipe.models, strict=True):
        checkpoint, own = open_base(folder), read_json(folder / "config.json")
        if not allow:
            check_ancestors(wanted, [(label, ancestor(own, entry.model))])
        own_header = {name: ref.shape for name, ref in checkpoint.refs.items()}
        found = map_models(
            header,
            config,
            own_header,
            own,
            shared_tokens=_shared(recipe, target.folder, folder, header, own_header),
            policies=kept | ignored,
            labels=("target", label),
        )
        maps[label] = found
        full = {name: _ref(mapped, target, checkpoint) for name, mapped in found.tensors.items() if mapped.pieces}
        donors.append(Specialist(label, checkpoint, "donor", own, None, full=full, dropped=found.dropped))
    return donors, maps


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
    for ref in (own, *sources):
        if not ref.dtype.is_floating_point:
            raise CheckpointError(
                f"{ref.file}: {ref.name} is stored as {ref.dtype}, which cannot be merged; convert it to bfloat16 or float32"
            )
    whole = ((0, height),)
    if (
        len(sources) == 1
        and mapped.pieces[0].rows == whole
        and mapped.pieces[0].source_rows == ((0, sources[0].shape[0]),)
    ):
        return sources[0]
    parts = [(ref, piece.source_rows, piece.rows) for ref, piece in zip(sources, mapped.pieces, strict=True)]
    end = sum(piece.height for piece in mapped.pieces)
    if end < height:  # padding of the vocabulary, which stays the target's
        rest = ((end, height),)
        parts.append((own, rest, rest))
    dtype = sources[0].dtype
    for ref, _, _ in parts:
        dtype = torch.promote_types(dtype, ref.dtype)
    return MappedRef(mapped.name, dtype, mapped.shape, sources[0].file, -1, tuple(parts))


def to_dict(maps: dict[str, ModelMap]) -> dict[str, Any]:
    """The coverage of every donor, for `--json`."""
    return {label: {"family": found.donor, "into": found.target} | found.coverage() for label, found in maps.items()}

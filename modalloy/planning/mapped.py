"""Donors and base of a merge across architectures, seen through the target's names: renamed, joined, split or copied."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from modalloy.errors import CheckpointError, RecipeError
from modalloy.families.ancestors import ancestor, check_ancestors
from modalloy.families.mapping import Header, Mapped, ModelMap, Policy, map_models
from modalloy.families.rules import remaining
from modalloy.families.vocabulary import TOKENIZER_FILES, SharedTokens, read_tokens, same_rows, shared_tokens
from modalloy.planning.checks import check_base, check_complete, check_shapes, place
from modalloy.recipe import Recipe
from modalloy.specialists.layouts import check_one_kind, open_specialist
from modalloy.specialists.specialist import Specialist, StoredLora
from modalloy.storage.config import read_config
from modalloy.storage.locate import is_portable, open_base
from modalloy.storage.tensors import Checkpoint, TensorRef
from modalloy.storage.views import MappedRef, Rows, floating, rows_of_tensor, stretch

EMBEDDED = ("embed_tokens.weight", "tok_embeddings.weight")


@dataclass(frozen=True)
class Across:
    """The maps of a merge across architectures.

    With a base (methods that merge updates) it also holds θ_0, the target as one of the trained models, and, for every
    fused tensor, which rows belong to which linear weight.

    A target tensor holds one linear weight, or several, row after row: `parts` has the slot and rows of each, `starts` θ_0's
    weight for every slot. Target and donors have theirs under the same slots.
    """

    maps: dict[str, ModelMap]
    base: Checkpoint | None = None
    base_name: str = ""  # without local folders
    base_map: ModelMap | None = None
    target: Specialist | None = None
    updates: dict[str, dict[str, StoredLora]] = field(
        default_factory=dict
    )  # of adapters, by label and the base's names
    starts: dict[str, TensorRef] = field(default_factory=dict)
    parts: dict[str, list[tuple[str, Rows]]] = field(default_factory=dict)
    vectors: dict[str, TensorRef] = field(default_factory=dict)  # θ_0's norms and biases, by the target's names

    def to_dict(self) -> dict[str, Any]:
        """The coverage of every donor, for `--json`."""
        return {one: found.to_dict() for one, found in self.maps.items()}


def open_donors(
    recipe: Recipe, target: Checkpoint, places: Sequence[tuple[str, Path]], base_folder: Path | None, *, allow: bool
) -> tuple[list[Specialist], Across]:
    """The donors at `places` (label, folder) in the target's names, and how they and the base were mapped.

    A donor is a full model, or, with a base, an adapter of that.

    Raises:
        CheckpointError: a donor or the base does not fit the target (see `map_models`), or they have no common ancestor and
            it is not `allow`ed.
    """
    config = read_config(target.folder)
    wanted = ("target", ancestor(config, str(recipe.target)))

    def mapped(
        label: str, model: Checkpoint, location: str, tokens: Callable[[Header, Header], SharedTokens | None]
    ) -> ModelMap:
        own = read_config(model.folder)
        ancestry = "not checked" if allow else check_ancestors(wanted, (label, ancestor(own, location)))
        header, own_header = ({name: ref.shape for name, ref in one.refs.items()} for one in (target, model))
        found = map_models(
            header,
            config,
            own_header,
            own,
            shared_tokens=tokens(header, own_header),
            policies=_policies(recipe),
            labels=("target", label),
        )
        return replace(found, ancestry=ancestry)

    base = base_map = None
    if base_folder is not None:
        base = open_base(base_folder)
        base_map = mapped("base", base, recipe.base_model, lambda *_: None)  # updates of embeddings are not merged
    donors, maps = [], {}
    for (label, folder), entry in zip(places, recipe.models, strict=True):
        check_one_kind(folder)
        if any(folder.glob("adapter_model.*")):
            donor = _open_adapter(label, folder, recipe, base, allow=allow)
            maps[label] = _adapter_map(donor, base_map)
        else:
            checkpoint, own = open_base(folder), read_config(folder)
            maps[label] = mapped(label, checkpoint, entry.model, partial(_shared, recipe, target.folder, folder))
            tensors = maps[label].tensors.values()
            full = {one.name: _ref(one, target, checkpoint) for one in tensors if one.pieces}
            donor = Specialist(
                label, checkpoint, "donor", own, None, tuned=full, dropped=maps[label].dropped, is_whole=True
            )
        donors.append(donor)
    if base is None or base_map is None:
        return donors, Across(maps)
    name = recipe.base_model if is_portable(recipe.base_model, recipe.folder) else base.folder.name
    updates = {donor.label: donor.text_lora for donor in donors}
    across = Across(
        maps, base, name, base_map, Specialist("target", target, "full", config, None, is_whole=True), updates
    )
    _take_apart(across, target, donors)
    check_complete(recipe, donors, across.starts, lambda _: "target")
    return donors, across


def _open_adapter(label: str, folder: Path, recipe: Recipe, base: Checkpoint | None, *, allow: bool) -> Specialist:
    """A donor that is a LoRA adapter of the base."""
    if base is None:
        raise RecipeError(
            f"{label} is an adapter, an update of a base: add base_model, and a merge_method other than linear"
        )
    donor = open_specialist(folder, label=label, ignore=recipe.ignore)
    config = read_config(base.folder)
    check_base(donor, recipe, base.folder, allow)
    place(donor, base, config)
    check_shapes(donor, base)
    if donor.tuned:
        raise CheckpointError(
            f"{label}: {next(iter(donor.tuned.values())).name} is a whole tensor beside the adapter's; merge the adapter into its "
            "base first, or list the tensor under `ignore:`"
        )
    donor.dropped |= {ref.name: "belongs to the donor's own sense" for ref in donor.carried().values()}
    return donor


def _adapter_map(donor: Specialist, base_map: ModelMap | None) -> ModelMap:
    """Where an adapter's updates of the base's weights go: as these do, where it has one."""
    assert base_map is not None
    tensors = {}
    for name, one in base_map.tensors.items():
        pieces = tuple(piece for piece in one.pieces if piece.source in donor.text_lora)
        reason = one.reason if not one.pieces else "" if pieces else "the adapter does not update it"
        tensors[name] = replace(one, pieces=pieces, reason=reason, operation=one.operation if pieces else "none")
    used = {piece.source for one in tensors.values() for piece in one.pieces}
    unused = [factors for slot, factors in donor.text_lora.items() if slot not in used]
    dropped = {ref.name: "updates what the target keeps" for factors in unused for ref in (factors.a, factors.b)}
    donor.dropped |= dropped
    header = {name: ref.shape for name, ref in donor.checkpoint.refs.items()}
    return replace(
        base_map,
        donor=f"{base_map.donor} adapter",
        tensors=tensors,
        dropped=donor.dropped,
        partly={},
        donor_header=header,
    )


def _policies(recipe: Recipe) -> dict[str, Policy]:
    """What the recipe says of names, in the words of `map_models`."""
    words: dict[str, Policy] = {"keep": "keep_target", "take_source": "take_source", "error": "error"}
    chosen = {pattern: words[rule.policy] for pattern, rule in recipe.modules.items() if rule.policy in words}
    ignored: dict[str, Policy] = dict.fromkeys(recipe.ignore, "drop_source")
    return chosen | ignored


def _take_apart(across: Across, target: Checkpoint, donors: list[Specialist]) -> None:
    """Enter every linear weight of the target's tensors under a slot of its own: θ_0's, the target's and the donors'."""
    assert across.base is not None and across.base_map is not None and across.target is not None
    for donor in donors:
        donor.text_lora = {}  # by the target's slots from here on
    for name, origin in across.base_map.tensors.items():
        if not origin.pieces or origin.policy == "take_source":
            continue
        if len(origin.shape) != 2:
            across.vectors[name] = _ref(origin, target, across.base)
            continue
        several = len(origin.pieces) > 1
        across.parts[name] = []
        for index, piece in enumerate(origin.pieces):
            slot = f"{name}:{piece.slot.role}" if several else name
            across.parts[name].append((slot, piece.rows))
            across.starts[slot] = rows_of_tensor(slot, across.base.refs[piece.source], piece.source_rows)
            across.target.tuned[slot] = rows_of_tensor(slot, target.refs[name], piece.rows)
            for donor in donors:
                if stored := across.updates[donor.label].get(piece.source):
                    donor.text_lora[slot] = replace(
                        stored, b=rows_of_tensor(f"{slot}.lora_B", stored.b, piece.source_rows)
                    )
                elif donor.is_whole:
                    own = across.maps[donor.label].tensors[name].pieces[index]
                    donor.tuned[slot] = rows_of_tensor(slot, donor.checkpoint.refs[own.source], own.source_rows)


def _shared(recipe: Recipe, target: Path, donor: Path, header: Header, own_header: Header) -> SharedTokens | None:
    """Which rows of embeddings are of the same tokens, as the recipe says or the tokenizers show."""
    if recipe.vocabulary == "keep":
        return None
    if recipe.vocabulary == "same":
        heights = [shape[0] for one in (header, own_header) for name, shape in one.items() if name.endswith(EMBEDDED)]
        return same_rows(min(heights, default=0))
    vocabularies = []
    for folder in (target, donor):
        tokens = read_tokens(folder)
        if tokens is None and recipe.vocabulary == "by_token":
            raise CheckpointError(
                f"{folder}: holds no {' or '.join(TOKENIZER_FILES)}, so its rows have no tokens to be aligned by; put its "
                "tokenizer there, or write vocabulary: keep"
            )
        vocabularies.append(tokens or {})
    found = shared_tokens(*vocabularies)
    if recipe.vocabulary == "auto":
        return found if found.count and found.same else None
    if not found.count:
        raise CheckpointError(
            f"{donor}: its tokenizer ({found.sizes[1]} tokens) and the target's ({found.sizes[0]}) have no token in common; "
            "write vocabulary: keep"
        )
    return found


def _ref(mapped: Mapped, target: Checkpoint, donor: Checkpoint) -> TensorRef:
    """Where a target tensor's counterpart is: a stored tensor, or rows of several."""
    own, height = floating(target.refs[mapped.name]), mapped.shape[0]
    sources = [floating(donor.refs[piece.source]) for piece in mapped.pieces]
    whole = ((0, height),)
    if len(sources) == 1 and mapped.pieces[0].rows == whole:
        return rows_of_tensor(mapped.name, sources[0], mapped.pieces[0].source_rows)
    parts = [(ref, piece.source_rows, piece.rows) for ref, piece in zip(sources, mapped.pieces, strict=True)]
    rest = remaining((piece.rows for piece in mapped.pieces), height)
    if rest:  # tokens that only the target has, and padding
        parts.append((*stretch(own, rest), rest))
    dtype = own.dtype if rest else sources[0].dtype
    for ref in sources:
        dtype = torch.promote_types(dtype, ref.dtype)
    return MappedRef(mapped.name, dtype, mapped.shape, sources[0].file, -1, tuple(parts), bool(rest))

"""The layout of transformers' own multimodal models: the decoder's weights are fine-tuned copies of the base's, everything
else is a sense that is carried as it is.

Names go through transformers' own renamings, so the hub's spelling, an older one and the class's own are one. A LoRA adapter
beside the model, or in a folder of it (`FOLDER#vision-lora`), is the update, and the decoder's weights are then the base's.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from modalloy.errors import CheckpointError
from modalloy.senses.anatomy import Anatomy, anatomy, headless, native_class_name, own_names, renamer
from modalloy.senses.stored import EXPERT, Stored, class_model, stored_parameters
from modalloy.specialists.peft import add_updates, check_config
from modalloy.specialists.specialist import (
    Layout,
    Native,
    Specialist,
    StoredLora,
    put,
    recorded_base,
    twice,
    unignored,
)
from modalloy.storage.config import read_config
from modalloy.storage.folder import is_there, read_json
from modalloy.storage.locate import BASE_STEMS, is_hub_id
from modalloy.storage.tensors import Checkpoint, TensorRef
from modalloy.storage.views import JoinedRef, first_rows, joined_matrices, rows_of_tensor, sources_of

ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
COMPUTED = re.compile(r".*(?:\.rotary_emb\.inv_freq|\.position_ids|\.inv_freq)")  # tables that a class makes itself
TOKEN_KEY = re.compile(r"\w*token_(?:id|index)|\w*_(?:token|pad)_id")


def open_native(folder: Path, label: str, ignore: Sequence[str]) -> Specialist:
    """A specialist that is a multimodal model of transformers; `place_native` then places it in a base.

    Raises:
        CheckpointError: its class cannot be a sense, or its tensors are not those of its class.
    """
    given, adapter = folder, ""
    if not _is_model(folder):
        folder, adapter = folder.parent, folder.name
    config = read_config(folder)
    found = anatomy(config, folder)
    found.check_supported(label)
    adapters = [str(Path(adapter) / name) for name in ADAPTERS if is_there(given / name)]
    checkpoint = Checkpoint(folder, BASE_STEMS, adapters)
    text = found.text_config.to_dict()
    specialist = Specialist(label, checkpoint, "native", config | text, _base_name(config), is_whole=not adapters)
    specialist.adapter = adapter
    tensors = list(unignored(specialist, ignore))
    _sort(specialist, found, config, [one for one in tensors if one[1].file.name not in ADAPTERS])
    if adapters:
        path = given / "adapter_config.json"
        settings = read_json(path)
        check_config(settings, path)
        specialist.frozen, specialist.tuned = specialist.tuned, {}
        entries = [one for one in tensors if one[1].file.name in ADAPTERS]
        add_updates(specialist, entries, settings, path)
        if specialist.stacked:
            one = next(iter(specialist.stacked.values())).a
            raise CheckpointError(
                f"{label} specialist: {one.name} updates stacked experts (target_parameters) of a multimodal model; merge the "
                f"adapter into the model first ({path})"
            )
        specialist.text_lora = dict(_placed_updates(specialist, found))
    return specialist


def _base_name(config: dict[str, Any]) -> str | None:
    """The language model that a config records as what its decoder was trained from."""
    text = config.get("text_config")
    recorded = recorded_base(text, "_name_or_path") if isinstance(text, dict) else None
    return recorded if recorded is not None and is_hub_id(recorded) else None


def _sort(
    specialist: Specialist, found: Anatomy, config: dict[str, Any], tensors: Sequence[tuple[str, TensorRef]]
) -> None:
    """Enter the decoder's tensors by the names of a plain language model, and those of the sense."""
    folder = specialist.checkpoint.folder
    refs = dict(tensors)
    own = found.model.state_dict()
    experts = _experts(found, refs)
    parts = {name for one in experts.values() for name in sources_of(one)}
    names = own_names(found, [name for name in refs if not COMPUTED.fullmatch(name) and name not in parts])
    sense: dict[str, TensorRef] = {}
    table: TensorRef | None = None
    embeddings = f"{found.decoder}.embed_tokens.weight"
    stored = {name: ref for name, ref in refs.items() if name not in parts} | experts
    names |= {own: own for own in experts}
    for name, ref in stored.items():
        if name not in names:
            specialist.dropped[name] = "computed from the config when a model is loaded"
            continue
        mine = names[name]
        if mine not in own:
            raise CheckpointError(
                f"{specialist.label} specialist: {name} ({ref.file}) is no tensor of a {found.name}; download the model again, or "
                "list it under `ignore:`"
            )
        wanted = tuple(own[mine].shape)
        if ref.shape != wanted:
            raise CheckpointError(
                f"{specialist.label} specialist: {name} is {ref.shape}, but its config.json makes it {wanted} ({ref.file}); "
                "download the folder again"
            )
        table = ref if mine == embeddings else table
        plain = found.plain_name(mine)
        if plain is None:
            sense[mine] = ref
        else:
            put(specialist.tuned, plain, ref)
    own_name = renamer(found)
    ignored = {own_name(name) for name in specialist.dropped if not COMPUTED.fullmatch(name)}
    tied = found.model.all_tied_weights_keys.keys()
    absent = sorted(own.keys() - set(names.values()) - ignored - tied)
    if absent:
        raise CheckpointError(
            f"{specialist.label} specialist: lacks {absent[0]} of a {found.name} ({len(absent)} tensors in all, {folder}); "
            "download the folder again"
        )
    if table is None:
        raise CheckpointError(f"{specialist.label} specialist: {embeddings} is ignored, whose rows its media need")
    specialist.native = Native(
        found.name,
        headless(config, found),
        found.text_config.to_dict() | {"tie_word_embeddings": found.is_tied},
        found.modalities,
        table,
        tuple(sorted(_tokens(folder, config, table.shape[0]))),
        sense,
        found.has_three_positions,
        found.has_deepstack,
    )


def _experts(found: Anatomy, refs: dict[str, TensorRef]) -> dict[str, TensorRef]:
    """The decoder's parameters of all experts that are stored as a matrix of each, by the class's own names."""
    made: dict[str, TensorRef] = {}
    for own, stored in stored_parameters(found.model, refs).items():
        if stored.parts and found.plain_name(own) is not None:
            experts, of_each = (1 + max(place) for place in zip(*stored.parts, strict=True))
            places = [[stored.parts.get((expert, part)) for part in range(of_each)] for expert in range(experts)]
            whole = [[refs[name] for name in one if name is not None] for one in places]
            if any(len(one) != of_each for one in whole):
                raise CheckpointError(f"{found.where}: lacks matrices of the experts {own}; download the folder again")
            made[own] = joined_matrices(own, whole)
    return made


def _placed_updates(specialist: Specialist, found: Anatomy) -> Iterator[tuple[str, StoredLora]]:
    """The adapter's updates by the names of a plain language model."""
    names = own_names(found, specialist.text_lora)
    for slot, factors in specialist.text_lora.items():
        own = names[slot]
        plain = found.plain_name(own)
        if plain is None:
            raise CheckpointError(
                f"{specialist.label} specialist: {factors.a.name} updates {own}, which is no part of its decoder "
                f"({factors.a.file}); merge the adapter into the model first, or list it under `ignore:`"
            )
        yield plain, factors


def _tokens(folder: Path, config: dict[str, Any], height: int) -> set[int]:
    """Rows of the vocabulary that are the specialist's own: tokens that its tokenizer adds, or that its config names."""
    found: set[int] = set()
    parts: list[Any] = [config]
    while parts:
        part = parts.pop()
        parts += [value for value in part.values() if isinstance(value, dict)]
        found |= {value for key, value in part.items() if type(value) is int and TOKEN_KEY.fullmatch(key)}
    if is_there(folder / "tokenizer.json"):
        added = read_json(folder / "tokenizer.json").get("added_tokens")
        entries = added if isinstance(added, list) else []
        found |= {one["id"] for one in entries if isinstance(one, dict) and type(one.get("id")) is int}
    if is_there(folder / "tokenizer_config.json"):
        decoder = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder")
        found |= {int(one) for one in decoder if one.isdecimal()} if isinstance(decoder, dict) else set()
    return {one for one in found if 0 <= one < height}


def is_native(folder: Path) -> bool:
    """Whether a folder holds a multimodal model of transformers, told by its config; or is an adapter's inside one."""
    return _is_model(folder) or (is_there(folder / "adapter_config.json") and _is_model(folder.parent))


def _is_model(folder: Path) -> bool:
    return is_there(folder / "config.json") and native_class_name(read_json(folder / "config.json")) is not None


def place_native(specialist: Specialist, base: Checkpoint, base_config: dict[str, Any]) -> None:
    """Give the decoder's tensors the base's names, cut tables of tokens to the base's vocabulary, and choose its own rows.

    Raises:
        CheckpointError: the base has no such tensor, or tensors of other shapes.
    """
    native = specialist.native
    assert native is not None
    copies = specialist.frozen if specialist.frozen else specialist.tuned
    names = _base_names(base, base_config, [*copies, *specialist.text_lora])
    placed: dict[str, TensorRef] = {}
    parts = _base_parts(base, base_config)
    for plain, ref in copies.items():
        name = names.get(plain, plain)
        if name not in base.refs and plain in parts:
            placed |= dict(_split(ref, parts[plain], base))
            continue
        if name not in base.refs:
            if plain == "lm_head.weight":
                specialist.dropped[ref.name] = "the base ties it to its embeddings"
                continue
            raise CheckpointError(
                f"{specialist.label} specialist: {ref.name} ({ref.file}) is {plain} of its decoder, which the base "
                f"{base.folder.name} does not have; use the base it was trained from"
            )
        wanted = base.refs[name].shape
        if plain in ("model.embed_tokens.weight", "lm_head.weight") and ref.shape[1:] == wanted[1:]:
            if ref.shape[0] < wanted[0]:
                specialist.dropped[ref.name] = (
                    f"has {ref.shape[0]} tokens, the base {wanted[0]}: the base's rows are kept"
                )
                specialist.shorter[name] = ref
                continue
            ref = first_rows(ref, wanted[0])
        put(placed, name, ref)
    specialist.text_lora = {names.get(slot, slot): factors for slot, factors in specialist.text_lora.items()}
    if specialist.frozen:
        specialist.frozen = placed
        if both := specialist.tuned.keys() & placed.keys() & specialist.text_lora.keys():
            name = min(both)
            raise twice(specialist.tuned[name], placed[name])
    else:
        specialist.tuned = placed
    height = base.refs[names.get("model.embed_tokens.weight", "model.embed_tokens.weight")].shape[0]
    further = range(min(height, native.table.shape[0]), native.table.shape[0])
    native.ids = tuple(sorted({*native.tokens, *further}))


def _base_parts(base: Checkpoint, config: dict[str, Any]) -> dict[str, Stored]:
    """Where a base stores a matrix of each expert, by the parameter's name in a plain language model."""
    if not any(EXPERT.search(name) for name in base.refs):
        return {}
    model = class_model(config, base.folder)
    prefix = f"{model.base_model_prefix}."
    found = stored_parameters(model, base.refs)
    return {"model." + own.removeprefix(prefix): stored for own, stored in found.items() if stored.parts}


def _split(ref: TensorRef, stored: Stored, base: Checkpoint) -> Iterator[tuple[str, TensorRef]]:
    """The matrices of a parameter of all experts by the base's names of them."""
    done = 0
    for (expert, part), name in sorted(stored.parts.items()):
        done = 0 if part == 0 else done
        height = base.refs[name].shape[0]
        if isinstance(ref, JoinedRef) and part < len(ref.parts[expert]):
            yield name, ref.parts[expert][part]
        else:
            yield name, rows_of_tensor(ref.name, ref.one(expert), ((done, done + height),))
        done += height


def _base_names(base: Checkpoint, config: dict[str, Any], wanted: Iterable[str]) -> dict[str, str]:
    """The base's own name of each tensor of a plain language model, where that is another and one is wanted."""
    absent = [name for name in wanted if name not in base.refs and name != "lm_head.weight"]
    from transformers.models.auto import CONFIG_MAPPING

    if not absent or config.get("model_type") not in CONFIG_MAPPING:
        return {}
    model = class_model(config, base.folder)
    prefix = f"{model.base_model_prefix}."
    own = own_names(model, [name for name in base.refs if not EXPERT.search(name)])
    return {
        "model." + mine.removeprefix(prefix) if mine.startswith(prefix) else mine: name for name, mine in own.items()
    }


LAYOUT = Layout("native", is_native, open_native, joins_adapter=True)

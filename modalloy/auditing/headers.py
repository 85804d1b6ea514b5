"""What headers alone tell: tensors that are missing or extra, other shapes, types, and the head that is tied or is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from modalloy.auditing.found import Finding
from modalloy.auditing.opened import Opened
from modalloy.names import pattern_of
from modalloy.planning.kinds import is_of_tokens
from modalloy.storage.config import NESTED

HEAD = "lm_head.weight"
SHOWN = 4


def headers(opened: Opened) -> list[Finding]:
    """What is wrong or odd of the folder as a whole."""
    if opened.adapter is not None:
        return []
    return [*_tensors(opened), *_types(opened), *_head(opened)]


def _tensors(opened: Opened) -> Iterator[Finding]:
    lost = [name for name in opened.missing if not name.endswith(HEAD)]
    if lost:
        yield Finding("fault", "missing", f"{len(lost)} of the base's tensors are missing: {listed(lost)}", tuple(lost))
    added = [name for name in opened.extra if not name.endswith(HEAD)]
    if added:
        lora = [name for name in added if ".lora_" in name or ".base_layer." in name]
        why = "; they are an adapter's, which was saved with the model and not merged into it" if lora else ""
        yield Finding("fault", "extra", f"{len(added)} tensors are not the base's: {listed(added)}{why}", tuple(added))
    for name in opened.reshaped:
        wanted, found = opened.base.refs[name].shape, opened.found[name].shape
        rows = is_of_tokens(name) and wanted[1:] == found[1:]
        what = ": the vocabulary was resized" if rows else ""
        told = rows and found[0] in _vocabularies(opened)
        yield Finding(
            "note" if told else "fault",
            "resized" if rows else "shape",
            f"{name} is {found}, the base's is {wanted}{what}"
            + (", and config.json does not say so" if rows and not told else ""),
            (name,),
        )
    if opened.without_scales:
        names = opened.without_scales
        yield Finding(
            "fault",
            "scales_lost",
            f"{len(names)} tensors are FP8 codes without their scales, which are no weights: {listed(names)}; write the scales "
            "with them, or merge in bfloat16",
            names,
        )


def _vocabularies(opened: Opened) -> set[object]:
    """The sizes of vocabularies that the config tells."""
    config = opened.config or {}
    parts = [config, *(config[name] for name in NESTED if isinstance(config.get(name), dict))]
    return {part.get("vocab_size") for part in parts}


def _types(opened: Opened) -> Iterator[Finding]:
    pairs = Counter((opened.base.refs[name].dtype, ref.dtype) for name, ref in opened.found.items())
    for (before, after), count in sorted(pairs.items(), key=str):
        if before != after and after not in (torch.float8_e4m3fn, torch.float8_e5m2):
            yield Finding("note", "dtype", f"{count} tensors are {_name(after)}, which the base has as {_name(before)}")


def _head(opened: Opened) -> Iterator[Finding]:
    """A head that is tied to the embeddings by one config, and a tensor of its own by the other."""
    if opened.config is None:
        return
    base_tied, tied = is_tied(opened.base_config), is_tied(opened.config)
    base_has, has = (any(name.endswith(HEAD) for name in names) for names in (opened.base.refs, opened.merged.refs))
    if base_has and not has:
        end = "ties it to the embeddings" if tied else "does not tie it, so that it is drawn at random when loaded"
        yield Finding("fault", "head", f"the base's head ({HEAD}) is missing, and config.json {end}", (HEAD,))
    elif not has and base_tied and not tied:
        yield Finding(
            "fault",
            "head",
            "the base ties its head to its embeddings; here config.json says tie_word_embeddings: false and there is no "
            f"{HEAD}, so that the head is drawn at random when loaded",
        )
    elif base_has and has and tied and not base_tied:
        yield Finding(
            "fault", "head", f"config.json ties the head to the embeddings, which drops {HEAD} when loaded", (HEAD,)
        )


def extra_head(opened: Opened, same: bool) -> Finding | None:
    """What to say of a head that the base, which ties its own, does not have. `same`: it is the embeddings, bit for bit."""
    tied = opened.config is not None and is_tied(opened.config)
    if same:
        return Finding("note", "head", f"{HEAD} is a copy of the embeddings, which the base ties", (HEAD,))
    what = "drops it when loaded" if tied else "unties them"
    return Finding(
        "fault",
        "head",
        f"the base ties its head to its embeddings, but {HEAD} is there and is not the embeddings; config.json {what}",
        (HEAD,),
    )


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether a config ties the head to the embeddings; where it is silent, its class decides."""
    whole = completed(config)
    parts = [whole, *(whole[name] for name in NESTED if isinstance(whole.get(name), dict))]
    told = (part["tie_word_embeddings"] for part in parts if part.get("tie_word_embeddings") is not None)
    return bool(next(told, False))


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with the defaults of its class, where transformers is there and knows it: versions leave out different ones."""
    try:
        from transformers.models.auto import CONFIG_MAPPING
    except ImportError:
        return dict(config)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return dict(config)
    try:
        found: dict[str, Any] = CONFIG_MAPPING[kind].from_dict(dict(config)).to_dict()
    except Exception:  # a stranger's values, of which a class may make anything: the plain fields are compared then
        return dict(config)
    return found


def listed(names: Sequence[str]) -> str:
    """Patterns of names, the most frequent first, with how many each stands for."""
    counted = Counter(pattern_of(name) for name in names).most_common()
    text = ", ".join(f"{name} ({count})" if count > 1 else name for name, count in counted[:SHOWN])
    return text + (f" and {len(counted) - SHOWN} kinds more" if len(counted) > SHOWN else "")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

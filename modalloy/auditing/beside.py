"""What stands beside a merged model's weights: its config, its chat template and its special tokens, against the base's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from modalloy.auditing.found import Finding, Level
from modalloy.auditing.headers import completed
from modalloy.auditing.opened import Opened
from modalloy.errors import shown
from modalloy.specialists.companions import companions
from modalloy.specialists.templates import own_template
from modalloy.storage.folder import is_there, read_json

# fields that change nothing of what a model computes, by the end of their path
IDLE = {
    "_name_or_path",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "architectures",
    "auto_map",
    "use_cache",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "unsloth_version",
    "unsloth_fixed",
    "mergekit_version",
    "model_name",
    "_commit_hash",
    "initializer_range",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "gradient_checkpointing",
    "quantization_config",
}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "unk_token_id", "sep_token_id")
OF_SHAPES = ("vocab_size",)  # told by the tensors
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "add_bos_token", "add_eos_token")
SHOWN = 5


def beside(opened: Opened) -> list[Finding]:
    """What differs beside the weights. An adapter has nothing of this."""
    if opened.adapter is not None:
        return []
    return [*_config(opened), *_tokenizer(opened)]


def _config(opened: Opened) -> Iterator[Finding]:
    if opened.config is None:
        yield Finding(
            "fault", "config_lost", "config.json is lost, so that no library loads the model; copy the base's"
        )
        return
    base, merged = completed(opened.base_config), completed(opened.config)
    changed: list[str] = []
    for path, (before, after) in _differences(base, merged):
        field = path.rpartition(".")[2]
        if field in IDLE or (field in OF_SHAPES and opened.reshaped):
            continue
        if field in TOKEN_IDS:
            level: Level = "note" if field == "pad_token_id" else "fault"
            yield Finding(
                level,
                "special_tokens",
                f"config.json: {path} is {shown(after)}, the base's {shown(before)}"
                + ("" if level == "note" else ": generation begins or ends at another token"),
            )
        elif field == "tie_word_embeddings":
            continue  # told with the head
        else:
            changed.append(f"{path} is {shown(after)}, the base's {shown(before)}")
    if changed:
        more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        yield Finding(
            "fault",
            "config_changed",
            f"config.json: {'; '.join(changed[:SHOWN])}{more}; the weights were trained with the base's: copy its config.json",
        )


def _differences(
    base: Mapping[str, Any], merged: Mapping[str, Any], within: str = ""
) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Fields that differ, with their path; None stands for one that is not there."""
    for key in sorted(base.keys() | merged.keys()):
        before, after = base.get(key), merged.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, f"{within}{key}.")
        elif before != after and not (before in (None, {}, []) and after in (None, {}, [])):
            yield f"{within}{key}", (before, after)


def _tokenizer(opened: Opened) -> Iterator[Finding]:
    base, merged = opened.base.folder, opened.folder
    theirs, wanted = _tokenizer_files(merged), _tokenizer_files(base)
    template, own = own_template(base), own_template(merged)
    if not theirs:
        if wanted:
            lacking = ", ".join(wanted[:SHOWN])
            yield Finding(
                "note", "tokenizer_absent", f"the folder has no tokenizer ({lacking}); the base's goes with it"
            )
        return
    if template is not None and own is None:
        yield Finding(
            "fault", "template_lost", "the base's chat template is lost, so that chats are not laid out as in training"
        )
    elif template != own:
        origin = next((s.label for s in opened.sources if own_template(s.folder) == own), None)
        whose = f"that of {origin}" if origin else "neither the base's nor a source's"
        yield Finding(
            "note" if origin or template is None else "fault", "template_changed", f"the chat template is {whose}"
        )
    yield from _special(base, merged, [source.folder for source in opened.sources])


def _tokenizer_files(folder: Path) -> list[str]:
    return [name for name in companions(folder) if "token" in name or "vocab" in name or name.endswith(".model")]


def _special(base: Path, merged: Path, sources: Sequence[Path]) -> Iterator[Finding]:
    """Special tokens that are lost or are others."""
    before, after = _tokens(base), _tokens(merged)
    others = [_tokens(source) for source in sources]
    for name in SPECIAL:
        if before.get(name) != after.get(name) and before.get(name) is not None:
            is_theirs = any(one.get(name) == after.get(name) for one in others if name in one)
            level: Level = "note" if name == "pad_token" or is_theirs else "fault"
            what = "is lost" if after.get(name) is None else f"is {shown(after[name])}"
            yield Finding(
                level,
                "special_tokens",
                f"the tokenizer's {name} {what}, the base's is {shown(before[name])}",
            )
    if lost := sorted(before.get("added", set()) - after.get("added", set())):
        names = ", ".join(lost[:SHOWN]) + (" …" if len(lost) > SHOWN else "")
        yield Finding(
            "fault", "special_tokens", f"the tokenizer lost {len(lost)} of the base's special tokens: {names}"
        )


def _tokens(folder: Path) -> dict[str, Any]:
    """The special tokens that a tokenizer's small files name, and those that tokenizer.json marks as such."""
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if is_there(folder / name):
            content = read_json(folder / name)
            found |= {key: _text(content[key]) for key in SPECIAL if content.get(key) is not None}
    added: set[str] = set()
    if is_there(folder / "tokenizer.json"):
        entries = read_json(folder / "tokenizer.json").get("added_tokens")
        for one in entries if isinstance(entries, list) else []:
            if isinstance(one, dict) and isinstance(one.get("content"), str):
                added.add(one["content"])
        found["added"] = added
    return found


def _text(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value

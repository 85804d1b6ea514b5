"""Does a multimodal model of transformers descend from the base? What no tensor's shape shows is compared here."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modalloy.errors import CheckpointError, RecipeError, shown
from modalloy.families.vocabulary import read_tokens
from modalloy.recipe import Recipe, SpecialistEntry
from modalloy.specialists.specialist import Native, Specialist
from modalloy.storage.config import read_config
from modalloy.storage.folder import is_there

NEUTRAL: dict[str, Any] = {  # fields that change what a decoder computes, and their value where a class has none
    "hidden_act": None,
    "hidden_activation": None,
    "rms_norm_eps": None,
    "layer_norm_eps": None,
    "norm_eps": None,
    "num_attention_heads": None,
    "num_key_value_heads": None,
    "head_dim": None,
    "sliding_window": None,
    "partial_rotary_factor": 1.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "logit_scale": 1.0,
    "attention_multiplier": None,
    "query_pre_attn_scalar": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "num_experts_per_tok": None,
    "norm_topk_prob": None,
    "layer_types": None,
}
ROPE_OF_MEDIA = ("mrope_section", "mrope_interleaved", "type")  # equal positions of three kinds give what one gives
NOTHING = object()
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")


def check_one_base(specialists: Sequence[Specialist]) -> None:
    """Refuse specialists that record different language models as what they were trained from: a base and its chat model.

    Raises:
        CheckpointError: two differ.
    """
    recorded = [(one.label, one.base_name) for one in specialists if one.base_name]
    for label, name in recorded[1:]:
        first, wanted = recorded[0]
        if name.split("@")[0].lower() != wanted.split("@")[0].lower():
            raise CheckpointError(
                f"the {first} specialist was trained from '{wanted}', the {label} specialist from '{name}'; merge specialists of "
                "one base, or say --allow-base-mismatch"
            )


def check_native(specialist: Specialist, base_folder: Path, allow: bool) -> None:
    """Refuse a native specialist whose decoder is not the base's, by its config and its vocabulary.

    Raises:
        CheckpointError: a field or a token differs.
    """
    assert specialist.native is not None
    _check_fields(specialist, specialist.native, base_folder, allow)
    if not allow:
        _check_tokens(specialist, base_folder)


def _check_fields(specialist: Specialist, native: Native, base_folder: Path, allow: bool) -> None:
    own, base = native.text_config, _completed(read_config(base_folder))
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers"):
        if own.get(key) is not None and base.get(key) is not None and own[key] != base[key]:
            raise CheckpointError(
                f"{specialist.label} specialist: its decoder has {key} {shown(own[key])}, the base {shown(base[key])}; use the "
                "base it was trained from"
            )
    if allow:
        return
    remedy = "use the base it was trained from, or say --allow-base-mismatch"
    for key, neutral in NEUTRAL.items():
        mine, theirs = (_field(config, key) for config in (own, base))
        if NOTHING in (mine, theirs):
            if neutral is None or mine is theirs:
                continue
            mine, theirs = (neutral if one is NOTHING else one for one in (mine, theirs))
        if mine != theirs:
            raise _differs(specialist, key, mine, theirs, remedy)
    if (mine := _rope(own)) != (theirs := _rope(base)):
        odd = next(key for key in sorted({*mine, *theirs}) if mine.get(key) != theirs.get(key))
        raise _differs(specialist, odd, mine.get(odd), theirs.get(odd), remedy)
    tied, base_tied = (bool(config.get("tie_word_embeddings")) for config in (own, base))
    if tied and not base_tied:
        raise _differs(specialist, "tie_word_embeddings", tied, base_tied, remedy)


def _differs(specialist: Specialist, key: str, own: Any, base: Any, remedy: str) -> CheckpointError:
    return CheckpointError(
        f"{specialist.label} specialist: its decoder has {key} {shown(own)}, the base {shown(base)}, which no tensor shows "
        f"({specialist.checkpoint.folder / 'config.json'}); {remedy}"
    )


def _completed(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with what its class of transformers fills in."""
    from transformers.models.auto import CONFIG_MAPPING

    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        return config
    made: Any = CONFIG_MAPPING[kind].from_dict(config)
    completed: dict[str, Any] = made.get_text_config(decoder=True).to_dict()
    return completed


def _field(config: Mapping[str, Any], key: str) -> Any:
    """A field as it counts: heads that are not said are derived, a window that is not used is none."""
    value = config.get(key, NOTHING)
    if key == "head_dim" and value in (None, NOTHING):
        heads = config.get("num_attention_heads")
        return config["hidden_size"] // heads if heads else NOTHING
    if key == "num_key_value_heads" and value in (None, NOTHING):
        return config.get("num_attention_heads", NOTHING)
    if key == "sliding_window":
        return None if value is NOTHING or config.get("use_sliding_window") is False else value
    if key == "layer_types" and isinstance(value, (list, tuple)):
        return NOTHING if set(value) == {"full_attention"} else list(value)
    return value


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """How positions turn queries and keys."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found = {key: value for key, value in given.items() if key not in ROPE_OF_MEDIA}
    if found.get("rope_type") in ("mrope", None):
        found["rope_type"] = "default"
    if "rope_theta" in config:
        found.setdefault("rope_theta", config["rope_theta"])
    found.pop("partial_rotary_factor", None)
    return {key: float(value) if isinstance(value, int) else value for key, value in found.items()}


def _check_tokens(specialist: Specialist, base_folder: Path) -> None:
    """Refuse a tokenizer that numbers the base's tokens otherwise; those that it adds may take reserved places."""
    folder, native = specialist.checkpoint.folder, specialist.native
    assert native is not None
    own, base = read_tokens(folder), read_tokens(base_folder)
    if own is None or base is None:
        return
    added = set(native.tokens)
    theirs = {row: token for token, row in base.items()}
    for token, row in own.items():
        if row not in added and row in theirs and theirs[row] != token:
            raise CheckpointError(
                f"{specialist.label} specialist: its token {row} is {shown(token)}, the base's is {shown(theirs[row])}; use the "
                "base it was trained from"
            )


def check_sense(entry: SpecialistEntry, specialist: Specialist) -> str:
    """The modality of a native specialist in a result that has senses.

    Raises:
        RecipeError: it has several, and the recipe does not say which; or gives it another encoder.
        CheckpointError: it has no such modality, or lacks the files that its media are prepared with.
    """
    native, folder = specialist.native, specialist.checkpoint.folder
    assert native is not None
    if entry.encoder is not None:
        raise RecipeError(
            f"{specialist.label} specialist: its encoder is its own ({native.cls}); remove `encoder:` from it"
        )
    modality = specialist.modality
    if modality is None:
        raise RecipeError(
            f"{specialist.label} specialist: {native.cls} takes {' and '.join(native.modalities)}; add `modality:` to say which "
            "is meant"
        )
    if not any(is_there(folder / name) for name in PROCESSORS):
        raise CheckpointError(
            f"{folder}: has no {' or '.join(PROCESSORS)}, which say how its media are prepared; add those of the published model"
        )
    if not any(is_there(folder / name) for name in TOKENIZERS):
        raise CheckpointError(
            f"{folder}: has no {TOKENIZERS[0]}, which its media's signs are in; add that of the published model"
        )
    if left_out := [name for name, why in specialist.dropped.items() if why.startswith("ignore: ")]:
        raise RecipeError(
            f"ignore: leaves out {left_out[0]} of the {specialist.label} specialist, which its sense needs; remove the pattern, "
            "or write form: adapter or full"
        )
    return modality


def decoder_config(base: dict[str, Any], specialists: Iterable[Specialist]) -> dict[str, Any]:
    """The config of an omni model's decoder: the base's, or where media have positions of time, height and width (or features
    for several layers) that of the specialist that knows them.

    Raises:
        RecipeError: two specialists need decoders of different kinds.
    """
    needing = [
        one for one in specialists if one.native and (one.native.has_three_positions or one.native.has_deepstack)
    ]
    if not needing:
        return base
    first = needing[0]
    assert first.native is not None
    for other in needing[1:]:
        assert other.native is not None
        if _kind(other.native) != _kind(first.native):
            raise RecipeError(
                f"{first.label} needs a {first.native.text_config['model_type']} decoder and {other.label} a "
                f"{other.native.text_config['model_type']}, which place media differently; leave one of them out"
            )
    kept = ("vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype")
    full = _completed(base) | base
    return first.native.text_config | {key: full[key] for key in (*kept, "max_position_embeddings") if key in full}


def _kind(native: Native) -> tuple[Any, ...]:
    rope = native.text_config.get("rope_parameters") or {}
    return native.text_config.get("model_type"), *(str(rope.get(key)) for key in ROPE_OF_MEDIA)


def choose_own(recipe: Recipe, specialists: Sequence[Specialist]) -> None:
    """Give specialists what the recipe says that their own media's tokens use.

    Raises:
        RecipeError: it is of another kind of specialist.
    """
    for entry, specialist in zip(recipe.models, specialists, strict=True):
        if entry.own is None:
            continue
        if entry.own == "same":
            if not specialist.text_lora or specialist.modality_lora:
                raise RecipeError(
                    f"{specialist.label} specialist: own: same is of a LoRA that serves text and media alike, and "
                    + (
                        "its media have one of their own"
                        if specialist.modality_lora
                        else "it has none; write own: {rank: r}"
                    )
                )
            specialist.modality_lora = dict(specialist.text_lora)
        elif specialist.text_lora or not specialist.tuned:
            raise RecipeError(
                f"{specialist.label} specialist: own: {{rank: {entry.own.rank}}} is of a full fine-tune, but it is a LoRA; write "
                "own: same"
            )
        else:
            specialist.own_rank = entry.own.rank

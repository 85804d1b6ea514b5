"""Configuration of the merged model: a decoder, and per modality its encoder, projector and extra tokens."""

import copy
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto import CONFIG_MAPPING

from modalloy.errors import CheckpointError, cut
from modalloy.model.routing import TEXT
from modalloy.outputs.omni import AUTO_MAP
from modalloy.senses.anatomy import check_counts, native_class_name

LLAMA_CPP = (
    "modalloy_llama_cpp"  # `model_type` of a folder that `modalloy export --to llama.cpp` wrote, and its own key
)
MAX_TOKENS = 1 << 20  # of one medium; of an update's rank, too
MAX_MODALITIES = 64


class ModalloyConfig(PreTrainedConfig):
    """`text_config` is the decoder's own config. `modalities` maps a name to a dictionary with

    - `encoder`: {"name": in `modalloy.senses.encoders.ENCODERS`, "settings": its constructor's keywords}
    - `projector`: {"type": in `modalloy.senses.projectors.PROJECTORS`, and its constructor's keywords}
    - `n_tokens`: number of projected features per medium
    - `n_prefix`, `n_suffix`: trained tokens around them, owned by the modality
    - `update`: as `text_update`, or null if its tokens use the text path (ModelCompose's `lora_strategy: same`)
    - `of`: the modality, where this is a further sense of one
    - or, for a multimodal model of transformers, `native` in place of all these but `update`: {"config": its own with no
      blocks in the decoder, "rows": ids of the vocabulary's rows that are its own},
      or {"like": the sense that is the same model's}

    `text_update` describes the text path's low-rank update: {"rank", "scale", and "linears" (names of the decoder's weights
    that it changes; null: all)}; null if there is none. `text_linears` names the decoder's weights that text tokens use
    another dense matrix for, `text_tensors` those that all tokens use another value of. `folded`: the text path's update is
    part of the decoder's weights already.

    A folder that `modalloy merge` wrote says in `base_model` where the decoder is, and in each modality's `source` where
    its encoder is; a model saved by `save_pretrained` holds them itself.
    """

    model_type = "modalloy"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}
    has_no_defaults_at_init = True

    def __init__(
        self,
        text_config: Any = None,
        modalities: dict[str, dict[str, Any]] | None = None,
        text_update: dict[str, Any] | None = None,
        text_linears: list[str] | None = None,
        text_tensors: list[str] | None = None,
        folded: bool = False,
        base_model: str | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            text_config = CONFIG_MAPPING[text_config["model_type"]](**text_config)
        self.text_config = text_config if text_config is not None else CONFIG_MAPPING["llama"]()
        self.modalities = modalities or {}
        self.text_update = text_update
        self.text_linears = text_linears or []
        self.text_tensors = text_tensors or []
        self.folded = folded
        self.base_model = base_model
        # transformers hands its choice of attention down to sub-configs, also when it has none yet: keep the decoder's
        kwargs.setdefault("attn_implementation", self.text_config._attn_implementation)
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(token, getattr(self.text_config, token, None))
        super().__init__(**{"auto_map": AUTO_MAP} | kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing: `auto_map` names a module that imports the package, so that no source is copied beside a saved model."""

    @property
    def owners(self) -> tuple[str, ...]:
        """Names that an owner index stands for: 0 is text, then the modalities by name (files of JSON keep no order)."""
        return owner_names(self.modalities)

    @property
    def replaced(self) -> set[str]:
        """The decoder's tensors that have another value than the base's for every token: no modality has weights of its own."""
        single = not any(sizes["update"] for sizes in self.modalities.values())
        return {*self.text_tensors, *(self.text_linears if single else ())}

    def self_contained(self) -> "ModalloyConfig":
        """A copy that refers to no other model: its weights hold the decoder and the encoders."""
        config = copy.deepcopy(self)
        config.base_model = None
        for sizes in config.modalities.values():
            sizes.pop("source", None)
        return config

    @property
    def updates(self) -> dict[str, dict[str, Any]]:
        """Rank, scale and linears of every owner that has a low-rank update of its own."""
        found = {TEXT: self.text_update} | {name: sizes["update"] for name, sizes in self.modalities.items()}
        return {owner: update for owner, update in found.items() if update}


def check_content(content: dict[str, Any], path: Path) -> None:
    """Refuse a config.json or processor_config.json of a merged model whose entries are not what `ModalloyConfig` takes.

    Raises:
        CheckpointError: an entry is missing or of another type.
    """
    damaged = f"{path}: is not what `modalloy merge` wrote: {{}}; merge again, or copy the folder again"
    check_counts(content, str(path))
    modalities = content.get("modalities")
    if not isinstance(modalities, dict):
        raise CheckpointError(damaged.format("`modalities` is no mapping"))
    if len(modalities) > MAX_MODALITIES:
        raise CheckpointError(damaged.format(f"it has {len(modalities)} modalities, of {MAX_MODALITIES} at most"))
    for name, sizes in modalities.items():
        if not isinstance(sizes, dict):
            raise CheckpointError(damaged.format(f"modality '{cut(name)}' is no mapping"))
        _check_update(sizes.get("update"), damaged)
        if "native" in sizes:
            _check_native(
                sizes["native"], modalities, damaged.format(f"the entries of modality '{cut(name)}' are damaged")
            )
            continue
        encoder, projector = sizes.get("encoder"), sizes.get("projector")
        counts = [sizes.get(key) for key in ("n_tokens", "n_prefix", "n_suffix")]
        if (
            not isinstance(encoder, dict)
            or not isinstance(encoder.get("name"), str)
            or not isinstance(encoder.get("settings"), dict)
            or not isinstance(projector, dict)
            or not isinstance(projector.get("type"), str)
            or not all(type(count) is int and 0 <= count <= MAX_TOKENS for count in counts)
            or not isinstance(sizes.get("source"), (str, type(None)))
        ):
            raise CheckpointError(damaged.format(f"the entries of modality '{cut(name)}' are damaged"))
    if "labels" in content:  # of processor_config.json
        return
    text = content.get("text_config")
    if not isinstance(text, dict) or text.get("model_type") not in CONFIG_MAPPING:
        raise CheckpointError(damaged.format("`text_config` names no model of transformers"))
    _check_update(content.get("text_update"), damaged)
    for key in ("text_linears", "text_tensors"):
        named = content.get(key) or []
        if not isinstance(named, list) or not all(isinstance(one, str) for one in named):
            raise CheckpointError(damaged.format(f"`{key}` holds more than names"))
    if not isinstance(content.get("base_model"), (str, type(None))):
        raise CheckpointError(damaged.format("`base_model` is no name"))


def _check_native(native: Any, modalities: dict[str, Any], damaged: str) -> None:
    if isinstance(native, dict) and "like" in native:
        other = modalities.get(native["like"]) if isinstance(native["like"], str) else None
        if not isinstance(other, dict) or "config" not in (other.get("native") or {}):
            raise CheckpointError(damaged)
        return
    rows = native.get("rows") if isinstance(native, dict) else None
    config = native.get("config") if isinstance(native, dict) else None
    if (
        not isinstance(config, dict)
        or native_class_name(config) is None
        or not isinstance(rows, list)
        or not all(type(row) is int and 0 <= row < 2**31 for row in rows)
    ):
        raise CheckpointError(damaged)


def _check_update(update: Any, damaged: str) -> None:
    if update is None:
        return
    linears = update.get("linears") if isinstance(update, dict) else 0
    if (
        not (linears is None or (isinstance(linears, list) and all(isinstance(one, str) for one in linears)))
        or type(update.get("rank")) is not int
        or not 0 <= update["rank"] <= MAX_TOKENS
        or type(update.get("scale")) not in (int, float)
        or not math.isfinite(update["scale"])
    ):
        raise CheckpointError(damaged.format("an `update` is damaged"))


def owner_names(modalities: Iterable[str]) -> tuple[str, ...]:
    """Names that an owner index stands for: 0 is text, then the modalities in alphabetical order."""
    return (TEXT, *sorted(modalities))


def tokens_per_medium(sizes: dict[str, Any]) -> int:
    """Length that one medium of a modality takes in the decoder's sequence: prefix, features and suffix."""
    return int(sizes["n_prefix"] + sizes["n_tokens"] + sizes["n_suffix"])

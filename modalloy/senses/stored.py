"""How the files of a model store the parameters of its class, where transformers puts several tensors together on loading.

Experts are one parameter (experts, ·, ·) of a class, and in most files a matrix each: `experts.3.up_proj.weight`.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from modalloy.errors import CheckpointError
from modalloy.senses.anatomy import anatomy, check_counts, conversion, faults, native_class_name

EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class Stored:
    """The tensors of a parameter: one, or a matrix for each expert and each of the parts that stand one below another."""

    name: str | None = None
    parts: dict[tuple[int, int], str] = field(default_factory=dict)  # (expert, part) → tensor


def class_model(config: Mapping[str, Any], where: Any) -> Any:
    """The model of a config.json on the meta device, multimodal or of language only.

    Raises:
        CheckpointError: transformers makes no model of it.
    """
    if native_class_name(config) is not None:
        return anatomy(config, where).model
    return _language_model(json.dumps(config, sort_keys=True), str(where))


@lru_cache(maxsize=16)
def _language_model(config: str, where: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto import CONFIG_MAPPING

    content = json.loads(config)
    check_counts(content, where)
    kind = content.get("model_type")
    try:
        made = CONFIG_MAPPING[str(kind)].from_dict(content)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(made, trust_remote_code=False)
    except faults() as error:
        raise CheckpointError(f"{where}: transformers makes no language model of its config.json ({kind})") from error


def parts_of_experts(config: Mapping[str, Any], names: Iterable[str], where: Any) -> set[str]:
    """The tensors that are a matrix of one expert each, where the class has one parameter of all experts.

    Raises:
        CheckpointError: transformers makes no model of the config.
    """
    listed = [name for name in names if EXPERT.search(name)]
    if not listed:
        return set()
    found = stored_parameters(class_model(config, where), listed)
    return {part for one in found.values() for part in one.parts.values()}


def stored_parameters(model: Any, names: Iterable[str]) -> dict[str, Stored]:
    """Where each parameter of experts is stored, by its own name; those that are put together in other ways are left out."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    converted = conversion(model)
    found: dict[str, Stored] = {}
    for name in names:
        if ".experts." not in name:
            continue
        new, pattern, converter = converted(name)
        expert = EXPERT.search(name)
        if expert is None or pattern is None:
            found[new] = Stored(name)
        elif all(isinstance(one, (MergeModulelist, Concatenate)) for one in converter.operations):
            parts = found.setdefault(new, Stored()).parts
            parts[int(expert[1]), converter.source_patterns.index(pattern)] = name
    return found

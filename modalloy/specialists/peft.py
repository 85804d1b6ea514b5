"""The layout of PEFT's LoRA adapters, and of LLaVA's training script, which saves other trained tensors beside one.

LoRA (arXiv 2106.09685): ΔW = lora_alpha / r · B A, with rsLoRA (arXiv 2312.03732) lora_alpha / √r · B A; `rank_pattern`
and `alpha_pattern` set r and lora_alpha of single layers. Tensors of `modules_to_save` and trained biases are stored whole.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from modalloy.errors import CheckpointError, shown
from modalloy.specialists.specialist import (
    ADAPTER_STEMS,
    BESIDE_ADAPTER,
    PEFT_PREFIX,
    Layout,
    Specialist,
    check_rank,
    number,
    pair_factors,
    put,
    put_projector,
    recorded_base,
    unignored,
    unknown_tensor,
)
from modalloy.storage.config import read_config
from modalloy.storage.folder import is_there, present, read_json
from modalloy.storage.patterns import first_matches
from modalloy.storage.tensors import Checkpoint, TensorRef

LORA = re.compile(r"base_model\.model\.(?P<stem>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
# starts that leave the base's weights as they are; PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA move a part of them into A and B
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
DORA = "DoRA rescales whole weights, so it is no low-rank update"
# options under which the update is not B A of one linear layer
OTHER_UPDATES = {
    "use_dora": DORA,
    "use_qalora": "QALoRA pools a layer's inputs, so B A does not have its shape",
    "use_bdlora": "BD-LoRA stores blocks of its factors",
    "kasa_config": "KaSA also cuts the base's small singular values",
    "monteclora_config": "MonteCLoRA samples its factors",
    "arrow_config": "Arrow chooses between adapters for every token",
    "alora_invocation_tokens": "aLoRA updates only the tokens after its invocation",
    "layer_replication": "layer_replication makes a deeper model than the base",
    "fan_in_fan_out": "fan_in_fan_out stores transposed weights (GPT-2); such bases are not supported",
}
ROWS = "trains the embeddings, which are kept as the base has them"
# what no merge of linear weights can hold, by the end of its name
OTHER_TENSORS = {
    ".lora_embedding_A": ROWS,
    ".lora_embedding_B": ROWS,
    ".base_layer.weight": ROWS,  # PEFT saves this copy of the base beside a LoRA on the embeddings
    ".trainable_tokens_delta": ROWS,
    ".lora_B.bias": "is a bias of the update itself (lora_bias)",
}


def open_peft(folder: Path, label: str, ignore: Sequence[str]) -> Specialist:
    """A specialist that is a LoRA adapter of PEFT, alone or as LLaVA's training script saves it."""
    beside = present(folder, BESIDE_ADAPTER)
    checkpoint = Checkpoint(folder, ADAPTER_STEMS, beside)
    path = folder / "adapter_config.json"
    config = read_json(path)
    check_config(config, path)
    specialist = Specialist(label, checkpoint, "peft", config, recorded_base(config, "base_model_name_or_path"))
    if beside:
        specialist.layout, specialist.config = "llava", read_config(folder) | config
    add_updates(specialist, unignored(specialist, ignore), config, path)
    if not specialist.text_lora and not specialist.stacked:
        raise CheckpointError(f"{folder}: has no lora_A and lora_B, so there is nothing to merge")
    return specialist


def add_updates(
    specialist: Specialist, tensors: Iterable[tuple[str, TensorRef]], config: dict[str, Any], path: Path
) -> None:
    """Enter the tensors of an adapter, by their names in its file, as updates and tuned copies. `path`: of its config."""
    pairs: dict[str, dict[str, TensorRef]] = {}
    stacked = _target_modules(config, path)
    for name, ref in tensors:
        bare = name.removeprefix(PEFT_PREFIX)
        if lora := LORA.fullmatch(name):
            put(pairs.setdefault(lora["stem"], {}), lora["side"], ref)
        elif not put_projector(specialist, bare, ref):
            put(specialist.tuned, _whole(specialist, name, ref), ref)
    for stem in [stem for stem in pairs if f".{stem.replace('.base_layer', '')}".endswith(stacked)]:
        specialist.stacked[stem] = pair_factors(specialist, stem, pairs.pop(stem), 1.0)
    ranks, alphas = ranks_of(config, list(pairs), path), alphas_of(config, list(pairs), path)
    for (stem, pair), rank, alpha in zip(pairs.items(), ranks, alphas, strict=True):
        factors = pair_factors(specialist, stem, pair, scale_of(config, rank, alpha))
        check_rank(specialist, factors, rank, path)
        specialist.text_lora[stem + ".weight"] = factors


def _target_modules(config: dict[str, Any], path: Path) -> tuple[str, ...]:
    """The ends of the names of modules whose own parameters are updated (`target_parameters`), not their weight."""
    targets = config.get("target_parameters") or []
    if not isinstance(targets, list) or not all(isinstance(one, str) and one for one in targets):
        raise CheckpointError(f"{path}: target_parameters is {shown(targets)}, not a list of names; correct the file")
    modules = {one.rpartition(".")[0] for one in targets if not one.endswith(".weight")}
    if "" in modules:
        raise CheckpointError(
            f"{path}: target_parameters {shown(targets)} names a parameter without its module; write "
            '"experts.gate_up_proj" for "gate_up_proj"'
        )
    return tuple(f".{module}" for module in sorted(modules))


def scale_of(config: dict[str, Any], rank: float, alpha: float) -> float:
    """What multiplies B A."""
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def ranks_of(config: dict[str, Any], stems: list[str], path: Path) -> list[float]:
    """The rank that is recorded for each module."""
    return _patterned(config, "rank_pattern", stems, number(config, "r", 8, path), path)


def alphas_of(config: dict[str, Any], stems: list[str], path: Path) -> list[float]:
    """Each module's lora_alpha."""
    return _patterned(config, "alpha_pattern", stems, number(config, "lora_alpha", 8, path), path)


def check_config(config: dict[str, Any], path: Path) -> None:
    """Refuse adapters that are no plain LoRA of the recorded base."""
    if config.get("peft_type", "LORA") != "LORA":
        kind = shown(config["peft_type"]).strip("'")
        raise CheckpointError(f"{path}: peft_type {kind} is not LoRA; only LoRA adapters can be merged")
    for option, reason in OTHER_UPDATES.items():
        if config.get(option):
            raise CheckpointError(f"{path}: {reason}; merge it into a full model first")
    if config.get("use_rslora") not in (None, True, False):
        raise CheckpointError(
            f"{path}: use_rslora is {shown(config['use_rslora'])}, not true or false; correct the file"
        )
    start = config.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        raise CheckpointError(
            f"{path}: init_lora_weights {shown(start)} is not known to leave the base as it was; convert the adapter to a plain "
            "LoRA when saving (PEFT: path_initial_model_for_weight_conversion)"
        )


def _whole(specialist: Specialist, name: str, ref: TensorRef) -> str:
    """Name of the base tensor that a tensor which is no factor is a tuned copy of: `modules_to_save`, a trained bias."""
    if name.endswith(".lora_magnitude_vector"):
        raise CheckpointError(
            f"{specialist.label} specialist: {name}: {DORA}; merge it into a full model first ({ref.file})"
        )
    for end, reason in OTHER_TENSORS.items():
        if name.endswith(end):
            raise CheckpointError(
                f"{specialist.label} specialist: {name} {reason} ({ref.file}); list it under `ignore:` to do without, "
                "or merge the adapter into a full model first"
            )
    if not name.startswith(PEFT_PREFIX) or not name.endswith((".weight", ".bias")) or ".lora_" in name:
        raise unknown_tensor(specialist, ref, "base_model.model.*.{lora_A,lora_B}.weight, whole weights and biases")
    return name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")  # the bias of a layer that LoRA wraps


def _patterned(config: dict[str, Any], name: str, stems: list[str], default: float, path: Path) -> list[float]:
    """Each module's value in PEFT's rank_pattern or alpha_pattern: that of the first key that ends its name."""
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{path}: {name} is {shown(patterns)}, not a table of patterns; correct the file")
    keys = list(patterns)
    try:
        found = first_matches(keys, stems)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {name}: {error}") from error
    return [default if index is None else number(patterns, keys[index], default, path) for index in found]


LAYOUT = Layout("peft", lambda folder: is_there(folder / "adapter_config.json"), open_peft)

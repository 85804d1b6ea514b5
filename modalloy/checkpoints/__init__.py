"""Opening checkpoints (base, ModelCompose, PEFT, full) and writing new ones."""

from modalloy.checkpoints.buffers import Buffers
from modalloy.checkpoints.config import config_size, read_config
from modalloy.checkpoints.folder import file_sha256, is_there, parse_json, present, read_bytes, read_json, read_text
from modalloy.checkpoints.full import place
from modalloy.checkpoints.inputs import Inputs
from modalloy.checkpoints.layouts import check_one_kind, open_specialist
from modalloy.checkpoints.locate import hub_commit, is_hub_id, is_portable, is_portable_name, locate, open_base
from modalloy.checkpoints.specialist import Specialist, StoredLora
from modalloy.checkpoints.staging import Staging
from modalloy.checkpoints.tensors import (
    Checkpoint,
    TensorRef,
    WeightFile,
    all_finite,
    checked,
)
from modalloy.checkpoints.writer import TensorSpec, WeightWriter

__all__ = [
    "Buffers",
    "Checkpoint",
    "Inputs",
    "Specialist",
    "Staging",
    "StoredLora",
    "TensorRef",
    "TensorSpec",
    "WeightFile",
    "WeightWriter",
    "all_finite",
    "check_one_kind",
    "checked",
    "config_size",
    "file_sha256",
    "hub_commit",
    "is_hub_id",
    "is_portable",
    "is_portable_name",
    "is_there",
    "locate",
    "open_base",
    "open_specialist",
    "parse_json",
    "place",
    "present",
    "read_bytes",
    "read_config",
    "read_json",
    "read_text",
]

"""`form: adapter`: a LoRA adapter as PEFT loads it."""

import json
from pathlib import Path
from typing import Any

from modalloy.files import write_text
from modalloy.outputs.writer import Writer
from modalloy.planning.plan import Plan
from modalloy.specialists.spelling import module_names
from modalloy.specialists.stacked import stacked_updates
from modalloy.storage.config import read_config
from modalloy.storage.locate import is_hub_id, is_portable_name

USE = """```python
from transformers import AutoModelForCausalLM
from peft import PeftModel

base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```"""


def write(planned: Plan, folder: Path) -> None:
    """Write adapter_config.json."""
    text = json.dumps(peft_config(planned), indent=2, sort_keys=True)
    write_text(folder / "adapter_config.json", text + "\n")


def peft_config(planned: Plan) -> dict[str, Any]:
    """adapter_config.json of the result."""
    modules = module_names(planned.target, read_config(planned.target.folder))
    merged = (job.name for job in planned.jobs if job.kind == "merge")
    stems = [modules.get(name, name).removesuffix(".weight") for name in merged]
    leaves = {stem.rpartition(".")[2] for stem in stems}
    named = (modules.get(name, name).removesuffix(".weight") for name in planned.target.refs)
    same_leaf = {name for name in named if name.rpartition(".")[2] in leaves}
    fused = (job.name for job in planned.jobs if job.kind == "fuse")
    stacked = {slot: one.parameter for s in planned.counted for slot, one in stacked_updates(s.text_lora).items()}
    targets = sorted(stacked[name] for name in fused)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": planned.recorded_base_name,
        "r": planned.rank,
        "lora_alpha": planned.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": sorted(leaves if same_leaf == set(stems) else stems),
    } | ({"target_parameters": targets} if targets else {})


def promised(planned: Plan, base_name: str) -> dict[str, Any]:
    """The same with the base's name as it was recorded, where the plan has a place on this machine."""
    config = peft_config(planned)
    if is_portable_name(base_name) or not is_hub_id(planned.recorded_base_name):
        config["base_model_name_or_path"] = base_name
    return config


WRITER = Writer(write, "adapter_config.json", promised, lambda key: True, "peft", "adapter", USE)

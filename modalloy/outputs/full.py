"""`form: full`: a whole model as transformers loads it, with the base's tokenizer and code."""

import json
from pathlib import Path
from typing import Any

from modalloy.families.union import Vocabulary
from modalloy.files import write_text
from modalloy.outputs.writer import Writer
from modalloy.planning.plan import Plan
from modalloy.specialists.companions import code_files, companions, is_of_media
from modalloy.storage.config import read_config
from modalloy.storage.folder import read_json
from modalloy.storage.scaled import is_scaled
from modalloy.storage.writer import copy_file

OWN = ("_name_or_path", "dtype", "torch_dtype")  # what a result's config says otherwise than its base's
USE = """```python
from transformers import {loader}

model = {loader}.from_pretrained("path/to/this/folder")
```"""


def write(planned: Plan, folder: Path) -> None:
    """Copy the base's tokenizer, configs and code; write config.json, and the specialists' common chat template."""
    recipe, base = planned.recipe, planned.target.folder
    copy_companions(base, folder)
    if planned.vocabulary is not None:
        _write_tokenizer(planned.vocabulary, folder)
    if planned.chat_template is not None:
        for name in ("chat_template.json", "chat_template.jinja"):  # the base's, copied above
            (folder / name).unlink(missing_ok=True)
        write_text(folder / "chat_template.jinja", planned.chat_template)
    for name in code_files(base):
        copy_file(base / name, folder / name)
    config = read_config(base)
    config.pop("_name_or_path", None)  # where the base was on someone's machine
    if _are_numbers(planned):
        config.pop("quantization_config", None)  # its weights are written as the numbers that they stand for
    if planned.vocabulary is not None:
        config = planned.vocabulary.config(config)
    if recipe.written_dtype != "auto":
        config["dtype"] = recipe.written_dtype
        config.pop("torch_dtype", None)
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def _are_numbers(planned: Plan) -> bool:
    """Whether weights that the base stores as codes are written as numbers."""
    return is_scaled(planned.target.refs) and not planned.recipe.output.requantize


def _write_tokenizer(vocabulary: Vocabulary, folder: Path) -> None:
    """The tokenizer of a result that has other tokens than its base: another model's files, or the base's with more tokens."""
    if vocabulary.folder != vocabulary.base.folder:
        for name in (one for one in companions(folder) if not is_of_media(one)):
            (folder / name).unlink()
        for name in (one for one in companions(vocabulary.folder) if not is_of_media(one)):
            (folder / name).parent.mkdir(exist_ok=True)
            copy_file(vocabulary.folder / name, folder / name)
    for name, text in vocabulary.files().items():
        (folder / name).unlink(missing_ok=True)
        write_text(folder / name, text)


def copy_companions(base: Path, folder: Path) -> None:
    """Copy what belongs to a model beside its weights and config: tokenizer, processor, generation settings."""
    for name in companions(base):
        (folder / name).parent.mkdir(exist_ok=True)
        copy_file(base / name, folder / name)


def promised(planned: Plan, base_name: str) -> dict[str, Any]:
    """The base's own config.json, but for what a result says otherwise."""
    config = read_json(planned.target.folder / "config.json")
    left_out = (*OWN, "quantization_config") if _are_numbers(planned) else OWN
    if planned.vocabulary is not None:
        config = planned.vocabulary.config(config)
    return {key: value for key, value in config.items() if key not in left_out}


WRITER = Writer(write, "config.json", promised, lambda key: key not in OWN, "transformers", "merge", USE)

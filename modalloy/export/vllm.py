"""`--to vllm`: what vLLM can say of a merge, with the command that serves it; what it cannot is refused with the reason.

vLLM applies one LoRA to all tokens of a request, chosen by the request or, with `--default-mm-loras`, by its one modality; where
two modalities meet it applies none. So a merge whose tokens are routed cannot be said by it (docs/export.md).
"""

import json
import shlex
from pathlib import Path
from typing import Any

from modalloy.errors import CheckpointError
from modalloy.files import write_text
from modalloy.senses.anatomy import native_class_name
from modalloy.storage.config import read_config
from modalloy.storage.folder import is_there, read_json
from modalloy.storage.locate import is_portable_name, locate
from modalloy.storage.staging import MANIFEST, SOURCES, Staging
from modalloy.storage.writer import copy_file

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's --max-lora-rank takes
ADAPTER = "adapter"  # the folder of a LoRA
TEXT_PATH = "holds the text path only"  # why a manifest leaves a modality's own weights out
PARTS = {"image": ("vision_config",), "video": ("vision_config",), "audio": ("audio_config",)}
OWN = (MANIFEST, SOURCES, "README.md", "recipe.yaml")
CARD = """# A merged model for vLLM

```
{command}
```

{note}
"""


def export(source: str | Path, out: Path) -> dict[str, Any]:
    """Write what vLLM serves of a merge into the new folder `out`, with the command in README.md.

    Args:
        source: folder of `form: full`, which is copied as it is, or of `form: adapter`.

    Raises:
        CheckpointError: the merge is one of `form: omni`, or lost weights of a modality's own; or its LoRA is too large.
        OutputError: `out` is there already, or cannot be written.
    """
    staging = Staging(out)
    folder = locate(str(source), whole=True)
    is_adapter = is_there(folder / "adapter_config.json")
    config = read_json(folder / "config.json") if is_there(folder / "config.json") else {}
    if config.get("model_type") == "modalloy":
        raise CheckpointError(f"{folder}: {_lost(config)}; export it --to llama.cpp or --to transformers")
    if not is_adapter and not config:
        raise CheckpointError(
            f"{folder}: has neither config.json nor adapter_config.json; give a folder that `modalloy merge` wrote"
        )
    with staging.begin("export vllm") as made:
        if is_adapter:
            command, note = _adapter(folder, made, out)
        else:
            _check_whole(folder, "its text path's")
            for path in sorted(one for one in folder.iterdir() if one.is_file() and one.name not in OWN):
                copy_file(path, made / path.name)
            code = " --trust-remote-code" if config.get("auto_map") else ""
            command, note = f"vllm serve {shlex.quote(str(out))}{code}", "A model of its own: nothing is switched."
        write_text(made / "README.md", CARD.format(command=command, note=note))
    return {"out": str(out), "command": command, "lines": [f"serve    {command}", f"wrote    {out}"]}


def _adapter(folder: Path, made: Path, out: Path) -> tuple[str, str]:
    """Copy a LoRA; the command, and what it means."""
    lora = read_json(folder / "adapter_config.json")
    rank, base = lora.get("r"), lora.get("base_model_name_or_path")
    if not isinstance(rank, int) or not isinstance(base, str):
        raise CheckpointError(f"{folder / 'adapter_config.json'}: says no rank or no base; merge again")
    if lora.get("target_parameters"):
        raise CheckpointError(
            f"{folder}: its LoRA updates experts that are one parameter, which vLLM takes none on; merge with form: full"
        )
    room = next((one for one in RANKS if one >= rank), None)
    if room is None or rank < 1:
        raise CheckpointError(
            f"{folder}: its LoRA has rank {rank}, and vLLM takes 1 to {RANKS[-1]}; merge with output.compress_rank, or form: full"
        )
    (made / ADAPTER).mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        copy_file(folder / name, made / ADAPTER / name)
    place = str(out / ADAPTER)
    parts = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(room), "--lora-modules", f"merged={place}"]
    senses = _senses(base, folder)
    if senses:
        _check_whole(folder, "the text path's")
        parts += ["--default-mm-loras", json.dumps(dict.fromkeys(senses, place))]
    note = "Ask the model `merged`: its update is used for every token of a request."
    if senses:
        note += f" Requests with one of {', '.join(senses)} use it by themselves; those with several must name the model `merged`."
    return shlex.join(parts), note


def _senses(base: str, folder: Path) -> list[str]:
    """The modalities of an adapter's base, where it is a multimodal model of transformers that is at hand."""
    place = Path(base) if Path(base).is_absolute() else folder / base
    if not (place / "config.json").is_file() and not is_portable_name(base):
        return []
    config = read_config(locate(base, folder))
    if native_class_name(config) is None:
        return []
    return [name for name, keys in PARTS.items() if any(key in config for key in keys)]


def _check_whole(folder: Path, path: str) -> None:
    """Refuse a result that left out weights which a modality's own tokens use: its media would use others."""
    if not is_there(folder / MANIFEST):
        return
    left = [
        row for row in read_json(folder / MANIFEST).get("tensors", []) if len(row) == 4 and TEXT_PATH in str(row[3])
    ]
    if any(".lora_" in str(row[1]) for row in left):
        raise CheckpointError(
            f"{folder}: {len(left)} tensors of the modalities' own were left out of this merge ({left[0][1]}): media would use "
            f"{path} weights; merge with form: omni, and export that --to llama.cpp or --to transformers"
        )


def _lost(config: dict[str, Any]) -> str:
    """Why a routed model cannot be served by vLLM."""
    modalities = config.get("modalities")
    own = (
        [name for name, sizes in modalities.items() if isinstance(sizes, dict) and sizes.get("update")]
        if isinstance(modalities, dict)
        else []
    )
    if own:
        return (
            f"the tokens of {', '.join(own)} use weights of their own, and vLLM gives one LoRA to all tokens of a request, "
            "and none to one with two modalities: routing would be lost"
        )
    return "its encoders are parts of no architecture that vLLM has"

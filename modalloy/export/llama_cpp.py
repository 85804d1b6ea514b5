"""`--to llama.cpp`: the base and an adapter for each owner of tokens as GGUF, with all that makes tokens of media beside them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from modalloy.export.merged import Merged, check_routable, open_merged
from modalloy.export.mmproj import Mmproj, write_mmprojs
from modalloy.export.tokens import check_tokenizer, write_tokenizer
from modalloy.export.weights import Geometry, check_base, check_type, write_adapter, write_base
from modalloy.files import write_text
from modalloy.llamacpp import binding
from modalloy.model.config import LLAMA_CPP
from modalloy.model.llama_cpp import SENSES, TABLE
from modalloy.model.routing import TEXT
from modalloy.outputs.full import copy_companions
from modalloy.outputs.omni import processor_config
from modalloy.storage.folder import read_json
from modalloy.storage.staging import Staging
from modalloy.storage.writer import copy_file

CARD = """# A merged model for llama.cpp

{files}

Text tokens use the base and `{text}`; tokens of each other sense the base and the adapter of that sense:

{rows}

`modalloy chat . --engine llama.cpp` encodes media, and switches adapters within a prompt; so do `serve` and `eval`. Other programs
(`llama-cli`, `llama-server`) give one adapter to a whole request: `{command}` is this model for text alone.

Media in other programs, which encode pictures by an mmproj:

{media}
"""
# what an mmproj is good for, by whether the sense's tokens use the same adapter as text
SAME = "`{command}`: every token uses the weights it uses here"
OTHER = "`{command}`: NOT this model, since the adapter of {sense} is then text's too; for requests with {sense} only"
SQUARE = """
There a picture is resized, then padded to a square; here it is padded first (or cropped, where a whole model's own processor does
that). Only square pictures are prepared alike.
"""
CLASS_LAST = """
llama.cpp puts CLIP's class token after the patches, and then drops the first feature in its place (its issue 25814). {files} is
written for that order: the first patch's feature (top left) is missing, the class token's comes last, all others are right. For a
llama.cpp in which this is mended another file is needed.
"""


def export(source: str | Path, out: Path, *, kind: str = "f16", gguf: Path | None = None) -> dict[str, Any]:
    """Write a merged model for llama.cpp into the new folder `out`; returns what the folder holds.

    Args:
        source: folder that `modalloy merge` wrote with `output.form: omni`, or `save_pretrained`'s.
        kind: "f16", "q8_0" or "f32" of the base; adapters are float32.
        gguf: the base as GGUF, of any type, to be copied instead.

    Raises:
        MissingPackageError: gguf or llama.cpp is not installed.
        CheckpointError: llama.cpp has no place for a part of the model.
        OutputError: `out` is there already, or cannot be written.
    """
    check_type(kind)
    binding.load()
    staging = Staging(out)
    merged = open_merged(source)
    check_routable(merged, "llama.cpp")
    geometry, decoder = Geometry(merged.config.text_config), merged.decoder
    for name in decoder:
        geometry.stored(name)
    if gguf is not None:
        check_base(gguf, geometry, decoder)
    with staging.begin(f"export {LLAMA_CPP}") as folder:
        base = f"base-{kind}.gguf" if gguf is None else gguf.name
        if gguf is not None:
            copy_file(gguf, folder / base)
        else:
            tokenizer, size = merged.processor.tokenizer, merged.config.text_config.vocab_size
            place = merged.folder
            write_base(
                folder / base, geometry, decoder, kind, lambda writer: write_tokenizer(writer, place, tokenizer, size)
            )
            check_tokenizer(folder / base, tokenizer)
        adapters = _write_adapters(merged, geometry, folder)
        entry = {"base": base, "adapters": adapters, "context": geometry.context}
        _write_senses(merged, folder, entry)
        mmprojs = write_mmprojs(merged, folder, kind)
        write_text(folder / "README.md", _card(entry, mmprojs))
    lines = [
        f"base     {base}",
        *(f"{owner:8} {name or 'the base alone'}" for owner, name in adapters.items()),
        *(_line(entry, mmproj) for mmproj in mmprojs.values()),
        f"wrote    {out}",
    ]
    return {
        **{"out": str(out), "base": base, "adapters": adapters, "lines": lines},
        "mmproj": {sense: mmproj.file for sense, mmproj in mmprojs.items()},
    }


def _write_adapters(merged: Merged, geometry: Geometry, folder: Path) -> dict[str, str | None]:
    """One file for each update; the file that each owner's tokens use."""
    for owner, update in merged.config.updates.items():
        write_adapter(folder / f"lora-{owner}.gguf", geometry, merged.factors(owner), update["scale"])
    paths = {owner: merged.path(owner) for owner in merged.config.owners}
    return {owner: None if path is None else f"lora-{path}.gguf" for owner, path in paths.items()}


def _write_senses(merged: Merged, folder: Path, entry: dict[str, Any]) -> None:
    """Everything beside the GGUF files: encoders and projectors, tokenizer, processor, configs and a card."""
    tensors = {name: one[...].clone(memory_format=torch.contiguous_format) for name, one in merged.senses.items()}
    if any("native" in sizes for sizes in merged.config.modalities.values()):
        tensors[TABLE] = merged.weights[TABLE][...].clone()
    save_file(tensors or {"none": torch.zeros(1)}, folder / f"{SENSES}.safetensors")
    copy_companions(merged.folder, folder)
    merged.processor.tokenizer.save_pretrained(folder)
    config = merged.config.self_contained().to_dict()
    config |= {"model_type": LLAMA_CPP, LLAMA_CPP: entry}
    for name in ("auto_map", "architectures", "folded", "base_model"):
        config.pop(name, None)
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    (folder / "processor_config.json").unlink(missing_ok=True)
    labels = bool(read_json(merged.folder / "processor_config.json").get("labels"))
    processor = processor_config(config["modalities"], labels)
    processor.pop("auto_map")
    write_text(folder / "processor_config.json", json.dumps(processor, indent=2) + "\n")
    for modality, one in merged.processor.preparers.items():
        target = folder / "senses" / merged.config.modalities[modality]["native"].get("like", modality)
        if not target.exists():
            copy_companions_of(one.folder, target)


def copy_companions_of(source: Path, target: Path) -> None:
    """A native sense's processor, tokenizer and config."""
    target.mkdir(parents=True)
    copy_companions(source, target)
    copy_file(source / "config.json", target / "config.json")


def _card(entry: dict[str, Any], mmprojs: dict[str, Mmproj]) -> str:
    text = entry["adapters"][TEXT]
    rows = [f"- {owner}: {f'`{name}`' if name else 'the base alone'}" for owner, name in entry["adapters"].items()]
    media = [f"- {sense}: {_use(entry, mmproj)}" for sense, mmproj in mmprojs.items()]
    if any(mmproj.file for mmproj in mmprojs.values()):
        media.append(SQUARE)
    if files := [f"`{mmproj.file}`" for mmproj in mmprojs.values() if mmproj.class_last]:
        media.append(CLASS_LAST.format(files=", ".join(files)))
    return CARD.format(
        files=f"Base: `{entry['base']}`.",
        text=text or "nothing",
        rows="\n".join(rows),
        command=_command("llama-cli", entry, TEXT),
        media="\n".join(media) or "- no sense",
    )


def _line(entry: dict[str, Any], mmproj: Mmproj) -> str:
    """The same in the terminal."""
    but = "; one patch of a picture is missing, see README.md" if mmproj.class_last else ""
    return f"mmproj   {mmproj.sense}: {_use(entry, mmproj).replace('`', '')}{but}"


def _use(entry: dict[str, Any], mmproj: Mmproj) -> str:
    """What one line says of a sense in llama.cpp's own programs."""
    if mmproj.file is None:
        return f"no mmproj: llama.cpp has {mmproj.lacks}"
    adapters = entry["adapters"]
    command = f"{_command('llama-server', entry, mmproj.sense)} --mmproj {mmproj.file}"
    is_same = adapters[mmproj.sense] == adapters[TEXT]
    return (SAME if is_same else OTHER).format(command=command, sense=mmproj.sense)


def _command(program: str, entry: dict[str, Any], owner: str) -> str:
    adapter = entry["adapters"][owner]
    return f"{program} -m {entry['base']}" + (f" --lora {adapter}" if adapter else "")

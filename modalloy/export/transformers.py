"""`--to transformers`: one checkpoint with its own code, which needs nothing of this package to be loaded."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from modalloy.errors import CheckpointError
from modalloy.export.bundle import bundle
from modalloy.export.merged import Merged, open_merged
from modalloy.files import write_text
from modalloy.outputs.full import copy_companions
from modalloy.senses.encoders import ENCODERS
from modalloy.senses.projectors import PROJECTORS
from modalloy.storage.folder import read_json
from modalloy.storage.staging import Staging

ROOT = "modalloy.export.portable"
CODE = ROOT.replace(".", "_")
CLASSES = {
    "AutoConfig": f"{CODE}.RoutedConfig",
    "AutoModelForCausalLM": f"{CODE}.RoutedForConditionalGeneration",
    "AutoModelForMultimodalLM": f"{CODE}.RoutedForConditionalGeneration",
    "AutoProcessor": f"{CODE}.RoutedProcessor",
}
SHARD_BYTES = 4_000_000_000
# in the place of what decodes media in a child process
NO_CHILD = '''"""Media are decoded in this process."""

from typing import Any


def is_isolated() -> bool:
    """Whether they are decoded in another."""
    return False


def in_child(*_: Any) -> Any:
    """Not here."""
    raise NotImplementedError
'''
CARD = """# A merged model for transformers

Text tokens use the decoder and its text update, the tokens of {senses} each the update of their own. It loads without modalloy:

```python
from transformers import AutoModelForCausalLM, AutoProcessor

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("path/to/this/folder", trust_remote_code=True)
```

`transformers serve path/to/this/folder --trust-remote-code` serves it, and `pipeline("any-to-any", …)` asks it.
Its code is in the `*.py` files here: read them before you trust them. In the prompt a token stands at each position of a medium:

{rows}
"""


def export(source: str | Path, out: Path) -> dict[str, Any]:
    """Write a merged model as one checkpoint of transformers into the new folder `out`; returns what the folder holds.

    Raises:
        CheckpointError: a part of the model has no place in it.
        OutputError: `out` is there already, or cannot be written.
    """
    staging = Staging(out)
    merged = open_merged(source)
    check(merged)
    with staging.begin("export transformers") as folder:
        copy_companions(merged.folder, folder)
        (folder / "processor_config.json").unlink(missing_ok=True)
        tokenizer = merged.processor.tokenizer
        modalities = _with_places(merged, tokenizer)
        tokenizer.save_pretrained(folder)
        _write_configs(merged, modalities, folder)
        _write_weights(merged, folder)
        for name, text in bundle(ROOT, _replaced(modalities)).items():
            write_text(folder / f"{name}.py", text)
        rows = [f"- {name}: `{sizes['token']}` ({sizes['token_id']})" for name, sizes in modalities.items()]
        write_text(folder / "README.md", CARD.format(senses=", ".join(modalities) or "no sense", rows="\n".join(rows)))
    tokens = {name: sizes["token_id"] for name, sizes in modalities.items()}
    lines = [f"tokens   {', '.join(f'{name} {number}' for name, number in tokens.items())}", f"wrote    {out}"]
    return {"out": str(out), "tokens": tokens, "lines": lines}


def check(merged: Merged) -> None:
    """Refuse a model with parts that the checkpoint's code has no place for.

    Raises:
        CheckpointError: it has such.
    """
    from transformers.models.auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from modalloy.export.portable import INPUTS

    where, config = merged.folder, merged.config
    if type(config.text_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CheckpointError(
            f"{where}: its decoder ({config.text_config.model_type}) is a part of a multimodal class, which has no model of "
            "its own in transformers; load it with modalloy"
        )
    merged.check_unfolded()
    for name, sizes in config.modalities.items():
        if "native" in sizes:
            why = "its sense is a whole model of transformers', whose parts are not copied"
        elif "of" in sizes or name not in INPUTS:
            why = f"transformers has inputs for one sense each of {', '.join(INPUTS)}"
        elif sizes["encoder"]["name"] not in ENCODERS:
            why = f"its encoder {sizes['encoder']['name']} is of another package"
        else:
            continue
        raise CheckpointError(
            f"{where}: {name} cannot stand in a checkpoint with code of its own: {why}; load it with modalloy"
        )


def _with_places(merged: Merged, tokenizer: Any) -> dict[str, dict[str, Any]]:
    """The modalities, each with a token that stands at its positions, which the tokenizer gets."""
    config = merged.config.self_contained()
    known, modalities = tokenizer.get_vocab(), {}
    for name, sizes in sorted(config.modalities.items()):
        token = f"<|{name}|>" if f"<|{name}|>" not in known else f"<|modalloy_{name}|>"
        modalities[name] = sizes | {"token": token}
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [sizes["token"] for sizes in modalities.values()]},
        replace_extra_special_tokens=False,
    )
    for sizes in modalities.values():
        sizes["token_id"] = int(tokenizer.convert_tokens_to_ids(sizes["token"]))
    return modalities


def _write_configs(merged: Merged, modalities: dict[str, dict[str, Any]], folder: Path) -> None:
    from modalloy.export.portable import RoutedConfig

    old = merged.config
    dense = sorted(set(old.text_linears) - old.replaced)
    config = RoutedConfig(
        old.text_config.to_dict(),
        modalities,
        old.text_update,
        dense,
        **{f"{name}_token_id": sizes["token_id"] for name, sizes in modalities.items()},
    ).to_dict()
    config |= {
        "architectures": ["RoutedForConditionalGeneration"],
        "auto_map": CLASSES,
        "vocab_size": old.text_config.vocab_size,
    }
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    processor = {
        "processor_class": "RoutedProcessor",
        "auto_map": CLASSES,
        "labels": bool(read_json(merged.folder / "processor_config.json").get("labels")),
        "modalities": modalities,
    }
    write_text(folder / "processor_config.json", json.dumps(processor, indent=2) + "\n")


def _write_weights(merged: Merged, folder: Path) -> None:
    """All tensors, in files of about SHARD_BYTES."""
    tied = "decoder.lm_head.weight" if merged.config.text_config.tie_word_embeddings else None
    shards: list[dict[str, Tensor]] = [{}]
    names: list[list[str]] = []
    size = total = 0

    def flush() -> None:
        save_file(shards[0], folder / f"part-{len(names)}.safetensors", metadata={"format": "pt"})
        names.append(list(shards[0]))
        shards[0] = {}

    for name, one in merged.weights.items():
        if name == tied:
            continue
        tensor = one[...].contiguous()
        if size + tensor.nbytes > SHARD_BYTES and shards[0]:
            flush()
            size = 0
        shards[0][name] = (
            tensor.clone() if tensor.storage_offset() or tensor.untyped_storage().nbytes() != tensor.nbytes else tensor
        )
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    count = len(names)
    index: dict[str, str] = {}
    for number, own in enumerate(names):
        file = "model.safetensors" if count == 1 else f"model-{number + 1:05}-of-{count:05}.safetensors"
        (folder / f"part-{number}.safetensors").rename(folder / file)
        index |= dict.fromkeys(own, file)
    if count > 1:
        content = {"metadata": {"total_size": total}, "weight_map": index}
        write_text(folder / "model.safetensors.index.json", json.dumps(content, indent=2) + "\n")


def _replaced(modalities: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Modules that are others in a checkpoint: its encoders and projectors, and no child process."""
    lines, tables = [], []
    for table, names, known in (
        ("ENCODERS", [sizes["encoder"]["name"] for sizes in modalities.values()], ENCODERS),
        ("PROJECTORS", [sizes["projector"]["type"] for sizes in modalities.values()], PROJECTORS),
    ):
        places = {name: known[name].split(":") for name in sorted(set(names))}
        lines += [f"from {module} import {found}" for module, found in places.values()]
        entries = ", ".join(f'"{name}": {found}' for name, (_, found) in places.items())
        tables.append(f"{table} = {{{entries}}}")
    functions = [
        f'def {word}(name: str) -> Any:\n    """The class of an {word} by its name."""\n    return {table}[name]'
        for word, table in (("encoder", "ENCODERS"), ("projector", "PROJECTORS"))
    ]
    text = "\n".join(
        ['"""The encoders and projectors of this model."""', "from typing import Any", *lines, *tables, *functions]
    )
    return {"modalloy.export.parts": text, "modalloy.senses.media.child": NO_CHILD}

"""What does a merge across architectures cost at 7B's width, next to copying the target and to how AdaMMS was published?

    python benchmarks/merge_across.py [--layers N] [--methods linear task_arithmetic …] [--data DIR]

The target is a stand-in for CogVLM-chat (two experts a layer, fused queries, keys and values), donor and base are for
Vicuna-7B: true names, shapes and bfloat16, random values, N layers. Compared are

- `cp -r` of the target, the least that writing a model of its size can cost
- AdaMMS's scripts as they work: both models whole in memory, interpolated in their own type, saved (written anew here)
- `modalloy merge` of `linear` at α = 0.1, and of methods that merge updates, with the base (default parameters)

one after the other; before each, the inputs are dropped from the page cache, and the clock stops when everything is on the
disk. Memory is the peak resident size. Prints a table, then one JSON document as its last line.
"""

import argparse
import functools
import itertools
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import measuring
import torch
import vicuna7b
from measuring import Usage, table
from safetensors.torch import load_file, save_file
from torch import Tensor

ALPHA = 0.1
EXPERTS = ("language", "vision")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--methods", nargs="*", default=["task_arithmetic", "ties", "ssam"], help="with the base")
    parser.add_argument("--data", type=Path, default=Path("build/bench"), help="where inputs and results go")
    parser.add_argument("--as-published", nargs=3, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_published:
        as_published(*args.as_published)
        return
    size = vicuna7b.Size(args.layers)
    base = vicuna7b.base(args.data, size, torch.bfloat16)
    donor = vicuna7b.fine_tunes(args.data, size, "flat", torch.bfloat16)[0]
    target = vicuna7b.made(args.data / f"cogvlm-{size}", functools.partial(write_cogvlm, base, size))
    out = args.data / "merged-across"

    def run(command: list[Any] | None, **recipe: Any) -> tuple[Usage, int]:
        shutil.rmtree(out, ignore_errors=True)
        measuring.evict([base, donor, target])
        if command is not None:
            usage, predicted = measuring.run(command)[0], 0
        else:
            content = {
                "target": str(target.resolve()),
                "models": [{"model": str(donor.resolve())}],
                "vocabulary": "same",
            }
            usage, document = measuring.merge(content | {"output": {"form": "full"}} | recipe, out)
            predicted = document["predicted_peak_bytes"]
        print(f"{command or recipe}: {usage.synced_seconds:.1f} s", file=sys.stderr)
        return usage, predicted

    runs = {"cp -r, sync": run(["cp", "-r", "--reflink=never", target, out])}
    runs["as published"] = run([sys.executable, __file__, "--as-published", target, donor, out])
    runs["linear"] = run(None, merge_method="linear", parameters={"alpha": ALPHA})
    for method in args.methods:
        runs[method] = run(None, merge_method=method, base_model=str(base.resolve()))
    shutil.rmtree(out)
    copy_s = runs["cp -r, sync"][0].synced_seconds
    sizes = [measuring.folder_bytes(folder) / 1e9 for folder in (target, donor, base)]
    print("target {:.1f} GB, donor {:.1f} GB, base {:.1f} GB\n".format(*sizes))
    rows = [
        [
            name,
            f"{usage.synced_seconds:.1f}",
            f"{usage.synced_seconds / copy_s:.2f}",
            f"{usage.peak_bytes / 1e9:.2f}",
            f"{predicted / 1e9:.2f}" if predicted else "–",
        ]
        for name, (usage, predicted) in runs.items()
    ]
    print(table(["", "seconds", "× cp -r", "peak memory, GB", "predicted, GB"], rows))
    found = {name: asdict(usage) | {"predicted_peak_bytes": predicted} for name, (usage, predicted) in runs.items()}
    print(json.dumps({"layers": args.layers, "runs": found, "machine": measuring.machine()}))


def write_cogvlm(base: Path, size: vicuna7b.Size, folder: Path) -> None:
    """CogVLM's decoder, whose every weight is the base's and a little more; without an image encoder."""
    shapes: dict[str, tuple[int, ...]] = {}
    sources: dict[str, list[str]] = {}
    for name, shape in size.tensors().items():
        layer, _, leaf = name.removesuffix(".weight").rpartition(".")
        for expert in EXPERTS if leaf.endswith("_proj") else ():
            if leaf in ("k_proj", "v_proj"):
                continue  # with the queries
            kinds = {"q_proj": f"{expert}_expert_query_key_value", "o_proj": f"{expert}_expert_dense"}
            own = f"{layer}.{kinds.get(leaf, f'{expert}_mlp.{leaf}')}.weight"
            sources[own] = [f"{layer}.{x}_proj.weight" for x in "qkv"] if leaf == "q_proj" else [name]
            shapes[own] = (len(sources[own]) * shape[0], shape[1])
        if not leaf.endswith("_proj"):
            shapes[name], sources[name] = shape, [name]

    def draw(name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
        whole = size.tensors()
        parts = [vicuna7b.draw_base(source, whole[source]) for source in sources[name]]
        for index, block in enumerate(itertools.chain(*parts)):
            (more,) = vicuna7b.normals(f"cogvlm {name} {index}", tuple(block.shape), 0.0, vicuna7b.DELTA_STD)
            yield block + more

    vicuna7b.write_tensors(folder / "model.safetensors", shapes, torch.bfloat16, draw)
    config = json.loads((base / "config.json").read_text()) | {"architectures": ["CogVLMForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "cogvlm"}))


def as_published(target: Path, donor: Path, out: Path) -> None:
    """The interpolation as AdaMMS's scripts do it: whole models, in place, in the type of the weights."""
    merged = load_file(target / "model.safetensors")
    other: dict[str, Tensor] = {}
    for file in sorted(donor.glob("*.safetensors")):
        other |= load_file(file)
    for name, tensor in merged.items():
        layer = name.rpartition(".self_attn.")[0]
        if name.endswith("query_key_value.weight"):
            found = torch.cat([other[f"{layer}.self_attn.{x}_proj.weight"] for x in "qkv"])
        elif name.endswith("expert_dense.weight"):
            found = other[f"{layer}.self_attn.o_proj.weight"]
        else:
            found = other[name.replace("language_mlp.", "").replace("vision_mlp.", "")]
        merged[name] = (1 - ALPHA) * tensor + ALPHA * found
    out.mkdir()
    save_file(merged, out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()

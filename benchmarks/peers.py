"""The same merges in mergekit: how much faster is modalloy, and how many fewer bytes does it write?

    python benchmarks/peers.py --mergekit PATH [--layers N] [--repeats N] [--data DIR]

PATH is `mergekit-yaml` of mergekit 0.1.5 in a venv of its own (its dependencies are not modalloy's):

    python3 -m venv build/bench/venv-mergekit
    build/bench/venv-mergekit/bin/pip install -c constraints.txt torch
    build/bench/venv-mergekit/bin/pip install mergekit==0.1.5

Two merges by task arithmetic of weight 1/4, both computed in float32 and written in bfloat16:

- adapters: a base and four rank-128 adapters into a full checkpoint. mergekit takes `base+adapter` models, which it first
  merges one by one into full checkpoints in --lora-merge-cache (emptied before each run).
- full models: a base and four full fine-tunes of it. modalloy keeps the base's embeddings and lm_head, mergekit also
  merges those.

The model has true Vicuna-7B layers, 4 of them by default, and a vocabulary reduced in proportion, so that the
embeddings have the share that they have in the whole model. The two alternate; inputs are dropped from the page cache
before each run, the clock stops when everything is on the disk, and bytes are those of the storage layer
(/proc/PID/io). Memory is resident, which counts the pages of mapped files (mergekit maps its inputs). The results are
compared: the distance between both merged weights, relative to the update, over one layer. The inputs are made by
`vicuna7b.py` in DIR (9 GB for 4 layers) and kept. Prints a table, then one JSON document as its last line.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import measuring
import torch
import vicuna7b
from measuring import Usage, table
from safetensors import safe_open
from torch import Tensor

AIMS = {"adapters: × faster": 5.0, "adapters: × fewer bytes written": 4.0, "full models: × faster": 1.0}
WEIGHT = 0.25
CHECKED = "model.layers.0.mlp.up_proj.weight"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", type=Path, required=True, help="the mergekit-yaml command of mergekit 0.1.5")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data", type=Path, default=Path("build/bench"), help="where inputs and results go")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # neither asks the hub about local folders
    size = vicuna7b.Size(args.layers, max(1, vicuna7b.Size.vocabulary * args.layers // vicuna7b.Size.layers))
    base = vicuna7b.base(args.data, size).resolve()
    adapters = [folder.resolve() for folder in vicuna7b.adapters(args.data, size)]
    merges = {
        "adapters": (adapters, [f"{base}+{adapter}" for adapter in adapters]),
        "full models": ([folder.resolve() for folder in vicuna7b.fine_tunes(args.data, size, "flat")], []),
    }
    runs: dict[str, list[Usage]] = {}
    distances = {}
    for work, (models, references) in merges.items():
        for number in range(args.repeats):
            print(f"{work}: run {number + 1} of {args.repeats} …", file=sys.stderr)
            ours, theirs = args.data / "merged-modalloy", args.data / "merged-mergekit"
            measuring.evict([base, *models])
            runs.setdefault(f"{work}: modalloy", []).append(modalloy(base, models, ours))
            measuring.evict([base, *models])
            usage = mergekit(args.mergekit, base, references or [str(model) for model in models], theirs)
            runs.setdefault(f"{work}: mergekit", []).append(usage)
            distances[work] = distance(base, ours, theirs)
            shutil.rmtree(ours)
            shutil.rmtree(theirs)
    seconds = {name: statistics.median(usage.synced_seconds for usage in usages) for name, usages in runs.items()}
    written = {name: max(usage.written_bytes for usage in usages) for name, usages in runs.items()}
    found = {
        "adapters: × faster": seconds["adapters: mergekit"] / seconds["adapters: modalloy"],
        "adapters: × fewer bytes written": written["adapters: mergekit"] / written["adapters: modalloy"],
        "full models: × faster": seconds["full models: mergekit"] / seconds["full models: modalloy"],
    }
    versions = installed(args.mergekit)
    print(
        f"task arithmetic, {args.layers} layers of 7B shapes, base {measuring.folder_bytes(base) / 1e9:.2f} GB; {versions}\n"
    )
    rows = [
        [
            name,
            f"{seconds[name]:.1f}",
            f"{max(usage.read_bytes for usage in usages) / 1e9:.2f}",
            f"{written[name] / 1e9:.2f}",
            f"{max(usage.peak_bytes for usage in usages) / 1e9:.2f}",
        ]
        for name, usages in runs.items()
    ]
    print(table(["", "seconds (median)", "read, GB", "written, GB", "peak memory, GB"], rows))
    apart = ", ".join(f"{work} {value:.1e}" for work, value in distances.items())
    print(f"\nhow far the two results are apart, relative to the merged update: {apart}")
    print(f"\naims: {json.dumps(AIMS, ensure_ascii=False)}\nfound: {json.dumps(found, ensure_ascii=False)}")
    document = {"layers": args.layers, "aims": AIMS, "found": found, "distances": distances, "versions": versions}
    usages_s = {name: [asdict(usage) for usage in usages] for name, usages in runs.items()}
    print(json.dumps(document | {"runs": usages_s, "machine": measuring.machine()}))


def modalloy(base: Path, models: list[Path], out: Path) -> Usage:
    recipe: dict[str, Any] = {
        "base_model": str(base),
        "merge_method": "task_arithmetic",
        "parameters": {"scale": WEIGHT},
        "models": [{"model": str(model), "modality": model.name} for model in models],
        "output": {"form": "full", "dtype": "bfloat16"},
    }
    return measuring.merge(recipe, out)[0]


def mergekit(command: Path, base: Path, references: list[str], out: Path) -> Usage:
    """What mergekit's merge costs, its merges of single adapters included."""
    config = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": reference, "parameters": {"weight": WEIGHT}} for reference in references],
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    file, cache = out.with_suffix(".yaml"), out.with_name("mergekit-cache")
    file.write_text(json.dumps(config, indent=1))  # JSON is YAML
    for folder in (out, cache):
        shutil.rmtree(folder, ignore_errors=True)
    options: list[str | Path] = ["--lora-merge-cache", cache, "--no-copy-tokenizer", "--quiet"]
    usage, _ = measuring.run([command, file, out, *options])
    shutil.rmtree(cache, ignore_errors=True)
    return usage


def distance(base: Path, ours: Path, theirs: Path) -> float:
    """‖W_ours − W_theirs‖ / ‖W_theirs − W_base‖ of one weight."""
    start, mine, other = (tensor(folder, CHECKED).float() for folder in (base, ours, theirs))
    return float((mine - other).norm() / (other - start).norm())


def tensor(folder: Path, name: str) -> Tensor:
    """A tensor of a checkpoint in one or several safetensors files."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            if name in file.keys():  # noqa: SIM118 - not a dict
                return file.get_tensor(name)
    raise FileNotFoundError(f"{folder}: no file holds {name}")


def installed(command: Path) -> str:
    """The versions that decide mergekit's speed."""
    code = "from importlib.metadata import version as v; print(*(f'{n} {v(n)}' for n in ('mergekit', 'peft', 'torch')), sep=', ')"
    printed = subprocess.run([command.parent / "python", "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return f"{printed.stdout.strip()}; here torch {torch.__version__}"


if __name__ == "__main__":
    main()

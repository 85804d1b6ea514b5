"""Are the bytes of results the same as before? Merges of every method and form, and the sha256 of every file they write.

    python benchmarks/same_bytes.py --write build/bytes.json     # before a change, on this machine
    python benchmarks/same_bytes.py --check build/bytes.json     # after it

Bytes are promised for one type of CPU and one torch, which the file records; of another machine it is refused. Left out
is sources.json, which says where inputs were. Prints a line for every merge that differs, then one JSON document as its
last line; exit code 1 if any does.
"""

import argparse
import hashlib
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from memory import ENTRIES, write_counterpart, write_models

import modalloy
from modalloy.errors import ModalloyError
from modalloy.methods import METHODS

BUILTIN = "builtin:smollm2-135m-instruct"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="where the hashes go")
    parser.add_argument("--check", type=Path, help="a file of hashes to compare with")
    parser.add_argument("--only", default="", help="merges whose names hold this")
    args = parser.parse_args()
    machine = {"cpu": cpu(), "torch": torch.__version__}
    wanted = json.loads(args.check.read_text()) if args.check else None
    if wanted is not None and wanted["machine"] != machine:
        parser.error(f"{args.check}: was written on {wanted['machine']}, this is {machine}")
    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_models(root, "small", 64, 3, 500, torch.float32)
        write_models(root, "half", 64, 3, 500, torch.bfloat16)
        write_counterpart(root / "half", root / "cogvlm")
        for name, recipe in recipes().items():
            if args.only in name:
                found[name] = merged(root, recipe)
                print(name, file=sys.stderr, flush=True)
    if args.write:
        args.write.parent.mkdir(parents=True, exist_ok=True)
        args.write.write_text(json.dumps({"machine": machine, "merges": found}, indent=1) + "\n")
    expected = {} if wanted is None else {n: files for n, files in wanted["merges"].items() if args.only in n}
    differ = {}
    for name in sorted(expected.keys() | found.keys()) if wanted is not None else ():
        own, other = found.get(name, {}), expected.get(name, {})
        if files := sorted(file for file in own.keys() | other.keys() if own.get(file) != other.get(file)):
            differ[name] = files
            print(f"{name}: {', '.join(files)}")
    n_files = sum(map(len, found.values()))
    print(f"{len(found)} merges, {n_files} files, {len(differ)} merges differ")
    print(
        json.dumps({"merges": len(found), "files": n_files, "compared": wanted is not None, "differ": differ} | machine)
    )
    return 1 if differ else 0


def cpu() -> str:
    """The type of this machine's processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def merged(root: Path, recipe: dict[str, Any]) -> dict[str, str]:
    """The sha256 of every file of a result, by its name; the refusal where a recipe is refused."""
    file, out = root / "recipe.yaml", root / "out"
    file.write_text(json.dumps(recipe))
    try:
        modalloy.merge(file, out, overwrite=True)
    except ModalloyError as error:
        return {"refused": str(error).replace(str(root), "")}
    paths = sorted(path for path in out.rglob("*") if path.is_file() and path.name != "sources.json")
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def recipes() -> dict[str, dict[str, Any]]:
    """Every recipe by name; paths are relative to the folder of the inputs."""
    made: dict[str, dict[str, Any]] = {}

    def add(name: str, kinds: str, method: str, size: str = "small", **more: Any) -> None:
        entries: list[dict[str, Any]] = [
            {"model": f"{size}-{kind}{index}"} for index, kind in enumerate(kinds.split("+"), 1)
        ][: METHODS[method].models[1]]
        for entry in entries if method == "fisher" else ():
            entry["parameters"] = {"fisher": f"{size}-fisher.safetensors"}
        made[name] = {"base_model": size, "models": entries, "merge_method": method} | more

    norms = {"*norm.weight": {"policy": "keep"}}
    for method in METHODS:
        cut = {"compress_rank": 8} if method in ENTRIES else {}
        add(f"{method} adapter", "lora+lora", method, output={"form": "adapter"} | cut)
        add(f"{method} full of adapters", "lora+lora", method, output={"form": "full"})
        if not METHODS[method].needs_factors:
            add(f"{method} full of full", "tuned+tuned", method, output={"form": "full"})
            add(f"{method} bf16", "tuned+tuned", method, "half", output={"form": "full", "max_shard_size": "64KB"})
            add(
                f"{method} adapter of full",
                "tuned+tuned",
                method,
                modules=norms,
                output={"form": "adapter", "compress_rank": 8},
            )
    full, scale = {"form": "full"}, {"scale": 0.3}
    for method in ("ties", "dare_ties"):
        add(f"{method} global", "tuned+tuned", method, output=full, parameters={"threshold": "global"})
    for method in ("ssam", "tsv", "knots"):
        add(f"{method} float64", "lora+lora", method, dtype="float64", output={"form": "adapter"})
    add("mixed", "lora+tuned", "ssam", output=full)
    add("to float16", "tuned+tuned", "average", output={"form": "full", "dtype": "float16"})
    add(
        "gradients", "tuned+tuned", "task_arithmetic", output=full, modules=norms, parameters={"scale": [0.2, 0.5, 1.0]}
    )
    rules = {
        "*.q_proj.weight": {"policy": "keep"},
        "*.k_proj.weight": {"policy": "average"},
        "*mlp*": {"merge_method": "ties", "parameters": scale},
        "*embed_tokens*": {"merge_method": "average"},
        "lm_head.weight": {"policy": "average"},
    }
    add("rules", "tuned+tuned", "ssam", output=full, modules=rules)
    add("weights", "tuned+tuned", "ssam", modules=norms, output=full)
    for entry, weight in zip(made["weights"]["models"], ([0.0, 0.5], -0.5), strict=True):
        entry["parameters"] = {"weight": weight}
    add("missing", "lora+tuned", "task_arithmetic", output=full, missing="zero", ignore=["*layers.0.mlp*"])
    for method in ("ssam", "average", "task_arithmetic", "ties", "tsv", "dare_linear"):
        for donor in ("tuned", "lora"):
            made[f"across {method} {donor}"] = {
                "target": "cogvlm",
                "base_model": "half",
                "models": [{"model": f"half-{donor}1"}],
                "merge_method": method,
                "vocabulary": "same",
                "output": full,
            }
    everywhere = {"parameters": {"threshold": "global"}}
    made["across ties global"] = made["across ties tuned"] | everywhere
    for alpha in (0.1, [0.1, 0.4]):
        made[f"linear {alpha}"] = {
            "target": "cogvlm",
            "models": [{"model": "half-tuned1"}, {"model": "half-tuned2", "parameters": {"weight": 0.5}}],
            "merge_method": "linear",
            "parameters": {"alpha": alpha},
            "vocabulary": "same",
            "output": full,
        }
    made["linear rules"] = made["linear 0.1"] | {
        "models": [{"model": "half-tuned1"}],
        "modules": {"*dense*": {"policy": "keep"}, "model.norm.weight": {"policy": "take_source"}},
        "output": {"form": "full", "max_shard_size": "100KB", "dtype": "float32"},
    }
    for method, more in (("ssam", {}), ("average", {}), ("ties", {}), ("iso_c", {}), ("ties", {"compress_rank": 16})):
        made[f"omni {method}{' cut' if more else ''}"] = {
            "base_model": BUILTIN,
            "models": [{"model": f"builtin:{modality}"} for modality in ("image", "audio")],
            "merge_method": method,
            "output": {"form": "omni"} | more,
        }
    return made


if __name__ == "__main__":
    sys.exit(main())

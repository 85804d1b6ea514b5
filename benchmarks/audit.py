"""How long does an audit take, and is a right merge of mergekit's confirmed, on weights of real shapes?

The built-in base (SmolLM2-135M, 273 tensors, 135 M weights) and two fine-tunes of noise, in bfloat16, merged by mergekit 0.1.5 and
audited by the recipe, all weights read. A table, then one JSON line.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

import modalloy
from modalloy import builtin

METHODS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"weight": 0.6},
    "ties": {"density": 0.3, "weight": 1.0},
    "model_stock": {},
    "sce": {"select_topk": 0.3},
}
NOISE = 0.002  # standard deviation of an entry of an update, a tenth of a weight's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    with tempfile.TemporaryDirectory(prefix="audit-") as folder:
        print(json.dumps({"rows": measured(Path(folder), parser.parse_args().methods), "load": os.getloadavg()[0]}))


def measured(folder: Path, methods: list[str]) -> dict[str, dict[str, Any]]:
    """Seconds, CPU seconds and what the weights were found to be, by method."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    tensors = load_file(builtin.base() / "model.safetensors")
    for seed, name in enumerate(("base", "one", "two")):
        shutil.copytree(builtin.base(), folder / name, ignore=shutil.ignore_patterns("*.safetensors"))
        draw = torch.Generator().manual_seed(seed)
        own = {
            key: (one + (NOISE * torch.randn(one.shape, generator=draw) if seed else 0)).bfloat16()
            for key, one in tensors.items()
        }
        save_file(own, folder / name / "model.safetensors", {"format": "pt"})
    rows: dict[str, dict[str, Any]] = {}
    print(f"{'method':16} {'seconds':>8} {'CPU s':>8}  verdict")
    for method in methods:
        config = {
            "merge_method": method,
            "base_model": str(folder / "base"),
            "dtype": "bfloat16",
            "parameters": METHODS[method],
            "models": [{"model": str(folder / name)} for name in ("one", "two")],
        }
        out, recipe = folder / "out", folder / "recipe.yaml"
        run_merge(MergeConfiguration.model_validate(config), str(out), MergeOptions(copy_tokenizer=True, quiet=True))
        recipe.write_text(yaml.safe_dump(config))
        began, cpu = time.perf_counter(), time.process_time()
        found = modalloy.audit(out, base=folder / "base", recipe=recipe, full=True)
        rows[method] = {
            "seconds": round(time.perf_counter() - began, 1),
            "cpu_s": round(time.process_time() - cpu, 1),
            "kinds": found.kinds,
            "verdict": found.verdict,
        }
        print(f"{method:16} {rows[method]['seconds']:8.1f} {rows[method]['cpu_s']:8.1f}  {found.verdict}", flush=True)
        shutil.rmtree(out)
    return rows


if __name__ == "__main__":
    main()

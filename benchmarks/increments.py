"""What does `--from` save, and what does `sweep`, beside merges from scratch? Shapes of 7B, fewer layers.

    python benchmarks/increments.py [--layers N] [--data DIR] [--cases fifth rule sweep]

Four adapters of rank 128 (`vicuna7b.py`) merged into a full checkpoint, then a fifth that updates q_proj and v_proj added
(task arithmetic with a given λ); a rule for q_proj changed (SSAM, adapter form); and six values of λ and k by one sweep beside
six merges. Each pair is made in one process: seconds of the clock and of the processor (which other processes do not change),
their ratios, and whether the bytes are equal, as they must be. Prints a table, then one JSON document as its last line.
"""

import argparse
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measuring
import vicuna7b
from measuring import table
from safetensors.torch import load_file, save_file

import modalloy
from modalloy.recipe import Recipe
from modalloy.search.space import applied
from modalloy.search.sweep import sweep

SET = ["scale=0.1,0.2,0.4", "rank=64,128"]
AIMS = {"a fifth specialist": 0.35}


def contents(folder: Path) -> dict[str, str]:
    """The hash of every file of a result but where its inputs are."""
    files = (path for path in sorted(folder.iterdir()) if path.name != "sources.json")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def measured(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds of the clock and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - processor}


def small_adapter(like: Path, folder: Path) -> Path:
    """An adapter of q_proj and v_proj only."""
    if not folder.exists():
        shutil.copytree(like, folder)
        path = folder / "adapter_model.safetensors"
        kept = {name: tensor for name, tensor in load_file(path).items() if "q_proj" in name or "v_proj" in name}
        save_file({name: tensor.clone() for name, tensor in kept.items()}, path)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj", "v_proj"]}))
    return folder


def pair(name: str, first: Recipe, then: Recipe, place: Path) -> dict[str, Any]:
    """A merge from scratch beside one from an earlier result."""
    for out in ("first", "whole", "from"):
        shutil.rmtree(place / out, ignore_errors=True)
    modalloy.merge(first, place / "first")
    whole = measured(lambda: modalloy.merge(then, place / "whole"))
    part = measured(lambda: modalloy.merge(then, place / "from", earlier=place / "first"))
    same = contents(place / "whole") == contents(place / "from")
    return {"case": name, "whole": whole, "part": part, "same_bytes": same}


def sweep_pair(recipe: Recipe, place: Path) -> dict[str, Any]:
    """Merges one by one beside one sweep."""
    for out in ("sweep", "alone"):
        shutil.rmtree(place / out, ignore_errors=True)
    found: dict[str, Any] = {}
    part = measured(lambda: found.update(report=sweep(recipe, place / "sweep", SET)))

    def alone() -> None:
        for one in found["report"].results:
            modalloy.merge(applied(recipe, one.changes), place / "alone" / one.out.name)

    whole = measured(alone)
    same = all(contents(one.out) == contents(place / "alone" / one.out.name) for one in found["report"].results)
    return {"case": "six values of λ and k", "whole": whole, "part": part, "same_bytes": same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--data", type=Path, default=Path("build/bench"), help="where inputs and results go")
    parser.add_argument("--cases", nargs="+", default=["fifth", "rule", "sweep"])
    args = parser.parse_args()
    size = vicuna7b.Size(args.layers, 4096)
    base, adapters = vicuna7b.base(args.data, size), vicuna7b.adapters(args.data, size)
    fifth = small_adapter(adapters[0], args.data / f"fifth-{args.layers}")
    models = [{"model": str(folder.resolve())} for folder in adapters]
    common: dict[str, Any] = {"base_model": str(base.resolve()), "models": models}
    sums = common | {"merge_method": "task_arithmetic", "parameters": {"scale": 0.3}, "missing": "zero"}
    full = sums | {"output": {"form": "full"}}
    ssam = common | {"merge_method": "ssam", "parameters": {"rank": 128}, "output": {"form": "adapter"}}
    rule = {"*.q_proj.weight": {"parameters": {"scale": 0.5}}}
    place = args.data / "increments"
    place.mkdir(parents=True, exist_ok=True)
    more = full | {"models": [*models, {"model": str(fifth.resolve())}]}
    known: dict[str, Callable[[], dict[str, Any]]] = {
        "fifth": lambda: pair("a fifth specialist", Recipe(**full), Recipe(**more), place),
        "rule": lambda: pair("a rule for q_proj", Recipe(**ssam), Recipe(**ssam | {"modules": rule}), place),
        "sweep": lambda: sweep_pair(Recipe(**ssam), place),
    }
    cases = [known[name]() for name in args.cases]
    rows = []
    for one in cases:
        ratios = {key: one["part"][key] / one["whole"][key] for key in ("seconds", "cpu_seconds")}
        one["ratios"] = ratios
        rows.append(
            [one["case"], *(f"{one['whole'][key]:.1f} → {one['part'][key]:.1f} ({ratios[key]:.2f})" for key in ratios)]
        )
    print(table(["", "seconds: whole → part", "of the processor"], rows))
    print(json.dumps({"layers": args.layers, "aims": AIMS, "cases": cases, "machine": measuring.machine()}))
    shutil.rmtree(place)


if __name__ == "__main__":
    main()

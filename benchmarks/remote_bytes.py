"""How many bytes does a plan, and a merge, move of models that are elsewhere, against those that are needed?

    python benchmarks/remote_bytes.py [--width N] [--layers N]

A local web server (`tests/stores.py`) counts the bytes of weight files that it sends; blocks are those of real use (4 MB).
Needed are the files that a merge reads and hashes whole: the specialists', and for a full checkpoint the base's; of a base
whose weights an adapter does not need, none. The second half has a network that cuts every tenth answer in its middle: what
was sent in vain is counted too. The result must be that of the same files on the disk. Prints a table, then one JSON document
as its last line.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import measuring
import torch
from measuring import table
from memory import write_models
from stores import FileServer, serving

import modalloy
from modalloy.recipe import Recipe

AIM = 1.02


def sent(server: FileServer) -> int:
    """Bytes of weight files that were sent since they were last counted."""
    total = sum(count for path, count in server.sent.items() if path.endswith(".safetensors"))
    server.sent.clear()
    return total


def measured(case: dict[str, Any], server: FileServer, data: Path, out: Path) -> dict[str, Any]:
    """What one recipe moves, planned and merged."""
    models = [data / f"m-{case['models']}{index}" for index in (1, 2)]
    recipe: dict[str, Any] = {
        "merge_method": "task_arithmetic",
        "parameters": {"scale": 0.5},
        "output": {"form": case["form"]},
    }
    places: dict[str, Any] = {"base_model": str(data / "m"), "models": [{"model": str(model)} for model in models]}
    urls: dict[str, Any] = {
        "base_model": server.add(data / "m", "m"),
        "models": [{"model": server.add(one, one.name)} for one in models],
    }
    needed = [*models, data / "m"] if case["form"] == "full" else models
    needed_bytes = sum(path.stat().st_size for folder in needed for path in folder.glob("*.safetensors"))
    server.fault = lambda path, count: "cut" if case["cuts"] and count % 10 == 5 else None
    sent(server)
    modalloy.plan(Recipe(**recipe | urls))
    planned_bytes = sent(server)
    server.asked.clear()
    modalloy.merge(Recipe(**recipe | urls), out / "remote")
    moved = sent(server)
    modalloy.merge(Recipe(**recipe | places), out / "local")
    weights = [sorted((out / name).glob("*.safetensors")) for name in ("remote", "local")]
    same = all(one.read_bytes() == other.read_bytes() for one, other in zip(*weights, strict=True))
    return case | {
        "planned_bytes": planned_bytes,
        "needed_bytes": needed_bytes,
        "moved_bytes": moved,
        "ratio": moved / needed_bytes,
        "same_weights": same,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    cases = [
        {"models": models, "form": form, "cuts": cuts}
        for cuts in (False, True)
        for models, form in (("lora", "adapter"), ("lora", "full"), ("tuned", "full"))
    ]
    rows = []
    with tempfile.TemporaryDirectory() as place, serving() as server:
        data = Path(place)
        write_models(data, "m", args.width, args.layers, 8000, torch.bfloat16)
        found = []
        for number, case in enumerate(cases):
            os.environ["MODALLOY_CACHE"] = str(data / f"cache{number}")  # nothing is known of the models
            found.append(measured(case, server, data, data / f"out{number}"))
    for one in found:
        rows.append(
            [
                f"two {'adapters' if one['models'] == 'lora' else 'fine-tunes'} → {one['form']}{', cut' * one['cuts']}",
                f"{one['planned_bytes'] / 1e3:.0f}",
                f"{one['needed_bytes'] / 1e6:.1f}",
                f"{one['moved_bytes'] / 1e6:.1f}",
                f"{one['ratio']:.3f}",
                "yes" if one["same_weights"] else "NO",
            ]
        )
    print(table(["", "plan, kB", "needed, MB", "moved, MB", "moved / needed", "same bytes"], rows))
    print(
        json.dumps(
            {"width": args.width, "layers": args.layers, "aim": AIM, "cases": found, "machine": measuring.machine()}
        )
    )


if __name__ == "__main__":
    main()

"""What does a CUDA device gain? One weight of 4096 × 4096, four specialists of rank 128, as factors and as full matrices.

    python benchmarks/cuda.py

Two threads on the CPU; every case is run once before it is timed. Prints a table, then one JSON document as its last line.
"""

import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measuring import table

from modalloy import LowRank, merge_deltas

METHODS = ("ssam", "tsv", "ties", "task_arithmetic", "optmerge")
SIZE, RANK, MODELS = 4096, 128, 4


def timed(work: Callable[[], Any], device: str) -> float:
    """Seconds of the second run."""
    seconds = 0.0
    for _ in range(2):
        begin = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    return seconds


torch.set_num_threads(2)
draw = torch.Generator().manual_seed(0)
found: dict[str, dict[str, float]] = {}
for method in METHODS:
    for kind in ("factors", "dense"):
        row = {}
        for device in ("cpu", "cuda"):
            pairs = [
                (torch.randn(SIZE, RANK, generator=draw), torch.randn(RANK, SIZE, generator=draw))
                for _ in range(MODELS)
            ]
            low = [LowRank(up.to(device), down.to(device)) for up, down in pairs]
            given: list[Any] = list(low) if kind == "factors" else [one.dense() for one in low]
            row[device] = timed(partial(merge_deltas, given, method), device)
        found[f"{method} {kind}"] = row

rows = [
    (name, f"{row['cpu']:.4f}", f"{row['cuda']:.4f}", f"{row['cpu'] / row['cuda']:.1f}") for name, row in found.items()
]
print(table(("case", "CPU, s", "CUDA, s", "ratio"), rows))
print(json.dumps({"device": torch.cuda.get_device_name(), "rows": found}))

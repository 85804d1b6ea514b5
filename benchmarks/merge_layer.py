"""How fast is one layer's merge? Four rank-128 specialists on a 4096 × 4096 weight, k = 128, all in one run.

    python benchmarks/merge_layer.py [--quick]

- ours: `merge_deltas(…, "ssam")`
- Algorithm 1 as written: dense D_i, A = Σ D_i D_iᵀ, B = Σ D_iᵀ D_i, an eigh of each, projections (float32)
- PEFT: `add_weighted_adapter(combination_type="svd")` on the same layer: the SVD of the weighted sum
- floor: the matrix products that cannot be avoided, (out + in)(R² + 2 R k) multiply-adds with R = n·r at the float32
  speed measured here, and two float64 eigh of size R

Ours and the floor alternate, and the smallest time of each counts. Memory is what a call adds to the process's resident
size at its peak. `--quick` leaves out PEFT and Algorithm 1. Prints a table, then one JSON document as its last line.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from modalloy import LowRank, merge_deltas

Result = TypeVar("Result")

OUT = IN = 4096
RANK = 128
SPECIALISTS = 4
K = 128
STACKED = SPECIALISTS * RANK


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only ours and the floor")
    parser.add_argument("--repeats", type=int, default=12)
    args = parser.parse_args()
    deltas = specialists()
    parts: dict[str, Callable[[], object]] = {
        "ours": lambda: merge_deltas(deltas, "ssam", rank=K),
        "products": products,
        "eigh": decompositions,
    }
    seconds = {name: float("inf") for name in parts}
    for _ in range(args.repeats):
        for name, call in parts.items():
            seconds[name] = min(seconds[name], timed(call)[0])
    merged = merge_deltas(deltas, "ssam", rank=K)
    assert isinstance(merged, LowRank)
    floor = seconds["products"] + seconds["eigh"]
    rows: dict[str, dict[str, float]] = {
        "floor": {"seconds": floor},
        "ours": measured(parts["ours"])[0] | {"seconds": seconds["ours"]},
    }
    if not args.quick:
        print("Algorithm 1 as written …", file=sys.stderr)
        rows["Algorithm 1"], dense = measured(lambda: literal([delta.dense() for delta in deltas]))
        rows["ours"]["error"] = float((merged.dense() - dense).norm() / dense.norm())
        print("PEFT svd …", file=sys.stderr)
        combine = peft_svd(deltas)
        rows["PEFT svd"], _ = measured(combine)
    print(
        f"one {OUT} × {IN} layer, {SPECIALISTS} specialists of rank {RANK}, k = {K}, {torch.get_num_threads()} threads\n"
    )
    print("| | seconds | × floor | × ours | peak memory added, MB |\n|---|---|---|---|---|")
    for name, row in rows.items():
        ratios = f"{row['seconds'] / floor:.1f} | {row['seconds'] / seconds['ours']:.1f}"
        memory = f"{row['peak_mb']:.0f}" if "peak_mb" in row else "–"
        print(f"| {name} | {row['seconds']:.3f} | {ratios} | {memory} |")
    if "error" in rows["ours"]:
        print(f"\nours against Algorithm 1 in float32: relative Frobenius distance {rows['ours']['error']:.1e}")
    print(json.dumps({"floor_products_s": seconds["products"], "floor_eigh_s": seconds["eigh"], "rows": rows}))


def specialists() -> list[LowRank]:
    """Four random updates of norms that differ by up to 2 ×."""
    generator = torch.Generator().manual_seed(0)
    return [
        LowRank(
            torch.randn(OUT, RANK, generator=generator) * 0.01 * (1 + index / 3),
            torch.randn(RANK, IN, generator=generator) * 0.02,
        )
        for index in range(SPECIALISTS)
    ]


def timed(call: Callable[[], Result]) -> tuple[float, Result]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def measured(call: Callable[[], Result]) -> tuple[dict[str, float], Result]:
    """Seconds that `call` takes and megabytes that it adds to the resident size at its peak (Linux), and its result."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets VmHWM
    before = resident("VmRSS")
    elapsed, result = timed(call)
    return {"seconds": elapsed, "peak_mb": (resident("VmHWM") - before) / 1000}, result


def resident(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))


BUFFERS = [torch.randn(OUT, STACKED), torch.randn(IN, STACKED)]
NARROW = torch.randn(STACKED, K)
SYMMETRIC = BUFFERS[0].double().T @ BUFFERS[0].double()


def products() -> None:
    """(out + in)(R² + 2 R k) multiply-adds in float32."""
    for tall in BUFFERS:
        tall.T @ tall
        tall @ NARROW
        tall @ NARROW


def decompositions() -> None:
    """Two float64 eigh of size R."""
    for _ in range(2):
        torch.linalg.eigh(SYMMETRIC)


def literal(deltas: list[torch.Tensor]) -> torch.Tensor:
    """Algorithm 1 on dense float32 matrices."""
    left, right = torch.zeros(OUT, OUT), torch.zeros(IN, IN)
    for delta in deltas:
        left += delta @ delta.T
        right += delta.T @ delta
    u = torch.linalg.eigh(left).eigenvectors[:, -K:]
    v = torch.linalg.eigh(right).eigenvectors[:, -K:]
    merged = torch.zeros(OUT, IN)
    for delta in deltas:
        merged += u @ (u.T @ delta @ v) @ v.T
    return merged / len(deltas)


def peft_svd(deltas: list[LowRank]) -> Callable[[], None]:
    """A call that merges the same updates with PEFT."""
    from peft import LoraConfig, get_peft_model

    model = torch.nn.Sequential(torch.nn.Linear(IN, OUT, bias=False))
    names = [f"specialist{index}" for index in range(len(deltas))]
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
    wrapped = get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, config)
    layer = wrapped.base_model.model[0]
    for name, delta in zip(names, deltas, strict=True):
        layer.lora_A[name].weight.data.copy_(delta.down)
        layer.lora_B[name].weight.data.copy_(delta.up)
    count = iter(range(1000))

    def combine() -> None:
        weights = [1 / len(names)] * len(names)
        wrapped.add_weighted_adapter(names, weights, f"merged{next(count)}", combination_type="svd", svd_rank=K)

    return combine


if __name__ == "__main__":
    main()

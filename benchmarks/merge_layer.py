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
from collections.abc import Callable

import torch
from measuring import machine, measured, table, timed
from torch import Tensor

from modalloy import LowRank, merge_deltas

SHAPE = (4096, 4096)
RANK = 128
SPECIALISTS = 4
K = 128
STACKED = SPECIALISTS * RANK


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only ours and the floor")
    parser.add_argument("--repeats", type=int, default=12)
    args = parser.parse_args()
    deltas = specialists(SHAPE)
    parts: dict[str, Callable[[], object]] = {
        "ours": lambda: merge_deltas(deltas, "ssam", rank=K),
        "products": products(SHAPE),
        "eigh": decompositions(),
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
        rows["PEFT svd"], _ = measured(peft_svd(deltas))
    size = f"{SHAPE[0]} × {SHAPE[1]}"
    print(f"one {size} layer, {SPECIALISTS} specialists of rank {RANK}, k = {K}, {torch.get_num_threads()} threads\n")
    cells = [
        [
            name,
            f"{row['seconds']:.3f}",
            f"{row['seconds'] / floor:.1f}",
            f"{row['seconds'] / seconds['ours']:.1f}",
            f"{row['added_mb']:.0f}" if "added_mb" in row else "–",
        ]
        for name, row in rows.items()
    ]
    print(table(["", "seconds", "× floor", "× ours", "peak memory added, MB"], cells))
    if "error" in rows["ours"]:
        print(f"\nours against Algorithm 1 in float32: relative Frobenius distance {rows['ours']['error']:.1e}")
    parts_s = {"floor_products_s": seconds["products"], "floor_eigh_s": seconds["eigh"]}
    print(json.dumps(parts_s | {"rows": rows, "machine": machine()}))


def specialists(shape: tuple[int, int], n: int = SPECIALISTS) -> list[LowRank]:
    """`n` random updates (out, in) of norms that differ by up to 2 ×."""
    generator = torch.Generator().manual_seed(0)
    return [
        LowRank(
            torch.randn(shape[0], RANK, generator=generator) * 0.01 * (1 + index / 3),
            torch.randn(RANK, shape[1], generator=generator) * 0.02,
        )
        for index in range(n)
    ]


def products(shape: tuple[int, int]) -> Callable[[], None]:
    """A call that does (out + in)(R² + 2 R k) multiply-adds in float32."""
    talls = [torch.randn(side, STACKED) for side in shape]
    narrow = torch.randn(STACKED, K)

    def multiply() -> None:
        for tall in talls:
            tall.T @ tall
            tall @ narrow
            tall @ narrow

    return multiply


def decompositions() -> Callable[[], None]:
    """A call that does two float64 eigh of size R, one after the other."""
    tall = torch.randn(2 * STACKED, STACKED, dtype=torch.float64)
    symmetric = tall.T @ tall

    def decompose() -> None:
        for _ in range(2):
            torch.linalg.eigh(symmetric)

    return decompose


def literal(deltas: list[Tensor]) -> Tensor:
    """Algorithm 1 on dense matrices, in their type."""
    out, in_ = deltas[0].shape
    left, right = deltas[0].new_zeros(out, out), deltas[0].new_zeros(in_, in_)
    for delta in deltas:
        left += delta @ delta.T
        right += delta.T @ delta
    u = torch.linalg.eigh(left).eigenvectors[:, -K:]
    v = torch.linalg.eigh(right).eigenvectors[:, -K:]
    merged = torch.zeros_like(deltas[0])
    for delta in deltas:
        merged += u @ (u.T @ delta @ v) @ v.T
    return merged / len(deltas)


def peft_svd(deltas: list[LowRank]) -> Callable[[], None]:
    """A call that merges the same updates with PEFT."""
    from peft import LoraConfig, get_peft_model

    out, in_ = deltas[0].shape
    model = torch.nn.Sequential(torch.nn.Linear(in_, out, bias=False))
    names = [f"specialist{index}" for index in range(len(deltas))]
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
    wrapped = get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, config)
    layer = wrapped.base_model.model[0]
    for name, delta in zip(names, deltas, strict=True):
        layer.lora_A[name].weight.data.copy_(delta.down)
        layer.lora_B[name].weight.data.copy_(delta.up)
    weights = [1 / len(names)] * len(names)

    def combine() -> None:
        wrapped.add_weighted_adapter(
            names, weights, "merged", combination_type="svd", svd_rank=K, svd_full_matrices=False
        )
        wrapped.delete_adapter("merged")

    return combine


if __name__ == "__main__":
    main()

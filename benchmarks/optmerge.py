"""How fast is OptMerge in closed form? Three rank-128 updates of a 4096 × 4096 weight, its variant for LoRA.

    python benchmarks/optmerge.py [--full]

- ours: `merge_deltas(…, "optmerge", variant="lora")`
- the authors' way, from the formula: X starts at the mean of the dense D_i and takes 300 steps of SGD (learning rate 1e-4,
  momentum 0.9) on Σ ‖(X − G_i) G_iᵀ‖² / ‖D_i‖², with autograd in float32. G_i is D_i cut to rank ⌊4096 / 3⌋, by one
  SVD each.

The SVDs are counted; a few steps are timed and the rest extrapolated, which the table says, unless `--full` runs all 300
(half an hour or more). That both give the same is checked on a 256 × 192 weight by 300 steps in float64, where the cut
(to rank 64) removes something. Prints a table, then one JSON document as its last line.
"""

import argparse
import json
import sys

import torch
from measuring import machine, measured, table, timed
from merge_layer import RANK, SHAPE, specialists
from torch import Tensor

from modalloy import LowRank, merge_deltas

AIMS = {"× SGD": 100.0, "error": 1e-6}
TASKS = 3
STEPS = 300
TIMED_STEPS = 3
CHECKED_SHAPE = (256, 192)
CHECKED_RANK = 96  # above ⌊192 / 3⌋, so that the cut matters
REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all 300 steps of SGD instead of an extrapolation")
    args = parser.parse_args()
    error, moved = checked()
    deltas = specialists(SHAPE, TASKS)
    ours_s, memory = float("inf"), 0.0
    for _ in range(REPEATS):
        usage, _ = measured(lambda: merge_deltas(deltas, "optmerge", variant="lora"))
        ours_s, memory = min(ours_s, usage["seconds"]), max(memory, usage["added_mb"])
    dense = [delta.dense() for delta in deltas]
    print("the SVDs of the authors' way …", file=sys.stderr)
    svd_s, targets = timed(lambda: cut(dense))
    steps = STEPS if args.full else TIMED_STEPS
    print(f"{steps} steps of SGD …", file=sys.stderr)
    descend(dense, targets, 1)  # the first step also allocates
    sgd, _ = measured(lambda: descend(dense, targets, steps))
    theirs_s = svd_s + sgd["seconds"] * STEPS / steps
    found = {"× SGD": theirs_s / ours_s, "error": error}
    how = f"{STEPS} steps" if args.full else f"{STEPS} steps, extrapolated from {steps}"
    size = f"{SHAPE[0]} × {SHAPE[1]}"
    print(f"one {size} layer, {TASKS} specialists of rank {RANK}, {torch.get_num_threads()} threads\n")
    rows = [
        ["ours", f"{ours_s:.3f}", "1", f"{memory:.0f}"],
        [f"SGD, {how}", f"{theirs_s:.1f}", f"{found['× SGD']:.0f}", f"{sgd['added_mb']:.0f}"],
    ]
    print(table(["", "seconds", "× ours", "peak memory added, MB"], rows))
    print(f"\nours against {STEPS} steps in float64 on a smaller weight: relative Frobenius distance {error:.1e}")
    print(f"(the steps lead {moved:.1e} away from the mean, where they start)")
    print(f"\naims: {json.dumps(AIMS, ensure_ascii=False)}\nfound: {json.dumps(found, ensure_ascii=False)}")
    document = {
        "aims": AIMS,
        "found": found,
        "ours_s": ours_s,
        "svd_s": svd_s,
        "steps": steps,
        "steps_s": sgd["seconds"],
        "moved": moved,
    }
    print(json.dumps(document | {"machine": machine()}))


def checked() -> tuple[float, float]:
    """Relative Frobenius distances from SGD on a smaller weight: of ours, and of the mean that SGD starts at (float64)."""
    generator = torch.Generator().manual_seed(1)
    out, in_ = CHECKED_SHAPE
    deltas = []
    for index in range(TASKS):
        up = torch.randn(out, CHECKED_RANK, generator=generator, dtype=torch.float64)
        down = torch.randn(CHECKED_RANK, in_, generator=generator, dtype=torch.float64)
        deltas.append(LowRank(up * 0.01 * (1 + index / 3), down * 0.02))
    dense = [delta.dense() for delta in deltas]
    expected = descend(dense, cut(dense), STEPS)
    merged = merge_deltas(deltas, "optmerge", variant="lora")
    assert isinstance(merged, LowRank)
    size = expected.norm()
    mean = torch.stack(dense).mean(0)
    return float((merged.dense() - expected).norm() / size), float((mean - expected).norm() / size)


def cut(deltas: list[Tensor]) -> list[Tensor]:
    """Every D_i (out, in) cut to its ⌊min(out, in) / T⌋ largest singular values."""
    rank = min(deltas[0].shape) // len(deltas)
    cuts = []
    for delta in deltas:
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        cuts.append((u[:, :rank] * s[:rank]) @ vh[:rank])
    return cuts


def descend(deltas: list[Tensor], targets: list[Tensor], steps: int) -> Tensor:
    """X after `steps` steps of SGD from the mean of the updates."""
    squares = [float(delta.square().sum()) for delta in deltas]
    merged = torch.stack(deltas).mean(0).requires_grad_()
    optimizer = torch.optim.SGD([merged], lr=1e-4, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        terms = [((merged - G) @ G.T).square().sum() / square for G, square in zip(targets, squares, strict=True)]
        loss = torch.stack(terms).sum()
        loss.backward()
        optimizer.step()
    return merged.detach()


if __name__ == "__main__":
    main()

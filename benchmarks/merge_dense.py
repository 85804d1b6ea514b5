"""How fast is SSAM on full fine-tunes? Four dense updates of every matrix of a 7B decoder layer, k = 128, float32.

    python benchmarks/merge_dense.py [--layers N] [--quick] [--spectrum 1/j flat]

- ours: `merge_deltas(dense, "ssam")`, on the seven matrices of each layer
- Algorithm 1 as written, on float32 matrices: both Grams, an eigh of each, projections
- error: relative Frobenius distance of ours from Algorithm 1 in float64; beside it that of Algorithm 1 in float32

Updates have singular values ∝ 1/j, like those of real fine-tunes, or independent normal entries (`flat`), where no rank
stands out and the top k directions are hardly defined. Algorithm 1 runs once per shape (11008 × 4096 takes minutes in
float32 and longer in float64) and counts for every matrix of that shape or of its transpose, which costs the same: the
method treats both sides alike. `--quick` runs it on 4096 × 4096 only and compares those matrices. Memory is the whole
process's resident size at its peak while ours runs, the four updates included. The updates are made in memory, and making
them is not timed. Prints tables, then one JSON document as its last line.
"""

import argparse
import functools
import json
import sys
from typing import Any

import torch
import vicuna7b
from measuring import machine, measured, table, timed
from merge_layer import K, literal
from torch import Tensor

from modalloy import merge_deltas

AIMS = {"× Algorithm 1": 10.0, "peak GB": 4.0, "error": 1e-4}
SPECIALISTS = 4
SQUARE = (vicuna7b.WIDTH, vicuna7b.WIDTH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help="decoder layers that ours is timed on")
    parser.add_argument("--quick", action="store_true", help="Algorithm 1 on 4096 × 4096 only")
    parser.add_argument("--spectrum", nargs="+", choices=["1/j", "flat"], default=["1/j", "flat"])
    args = parser.parse_args()
    found = {spectrum: of_spectrum(spectrum, args.layers, args.quick) for spectrum in args.spectrum}
    print(json.dumps({"layers": args.layers, "aims": AIMS, "spectra": found, "machine": machine()}))


def of_spectrum(spectrum: str, layers: int, quick: bool) -> dict[str, Any]:
    """Measure updates of one spectrum, and print the table."""
    ours: dict[tuple[int, int], list[dict[str, float]]] = {}
    for layer in range(layers):
        for name, shape in vicuna7b.LINEARS.items():
            print(f"{spectrum}: ours on layer {layer}, {name} …", file=sys.stderr)
            deltas = updates(f"{layer} {name}", shape, spectrum)
            ours.setdefault(shape, []).append(measured(functools.partial(merge_deltas, deltas, "ssam", rank=K))[0])
            del deltas
    theirs: dict[tuple[int, int], dict[str, float]] = {}
    for shape in ours:
        if shape[0] < shape[1] or (quick and shape != SQUARE):
            continue
        print(f"{spectrum}: Algorithm 1 on {shape[0]} × {shape[1]} …", file=sys.stderr)
        theirs[shape] = against(updates("compared", shape, spectrum))
    seconds = {shape: sum(run["seconds"] for run in runs) / len(runs) for shape, runs in ours.items()}
    print(f"singular values {spectrum}, {SPECIALISTS} dense updates, k = {K}, {torch.get_num_threads()} threads\n")
    rows, covered = [], {"ours": 0.0, "Algorithm 1": 0.0}
    for shape, runs in ours.items():
        row = [f"{shape[0]} × {shape[1]}", f"{seconds[shape]:.2f}", f"{max(run['peak_mb'] for run in runs) / 1e3:.2f}"]
        twin = theirs.get(shape) or theirs.get((shape[1], shape[0]))
        if twin is None:
            rows.append([*row, "–", "–", "–", "–"])
            continue
        covered["ours"] += len(runs) * seconds[shape]
        covered["Algorithm 1"] += len(runs) * twin["seconds"]
        times = [f"{twin['seconds']:.1f}", f"{twin['seconds'] / seconds[shape]:.1f}"]
        errors = [f"{twin[name]:.1e}" if shape in theirs else "–" for name in ("error", "float32_error")]
        rows.append([*row, *times, *errors])
    header = [
        "",
        "ours, seconds",
        "peak memory, GB",
        "Algorithm 1, seconds",
        "× ours",
        "our error",
        "its float32 error",
    ]
    print(table(header, rows))
    found = {
        "× Algorithm 1": covered["Algorithm 1"] / covered["ours"],
        "peak GB": max(run["peak_mb"] for runs in ours.values() for run in runs) / 1e3,
        "error": max(row["error"] for row in theirs.values()),
    }
    print(f"\naims: {json.dumps(AIMS, ensure_ascii=False)}\nfound: {json.dumps(found, ensure_ascii=False)}\n")
    by_name = {f"{out} × {in_}": runs for (out, in_), runs in ours.items()}
    return {"found": found, "ours": by_name, "literal": {f"{out} × {in_}": row for (out, in_), row in theirs.items()}}


def updates(key: str, shape: tuple[int, int], spectrum: str) -> list[Tensor]:
    """The specialists' dense updates (out, in) of one matrix, in float32."""
    return [vicuna7b.delta(f"{index} {key}", shape, spectrum, index) for index in range(SPECIALISTS)]


def against(deltas: list[Tensor]) -> dict[str, float]:
    """Seconds of Algorithm 1 in float32, its error and ours; the reference is Algorithm 1 in float64."""
    merged = merge_deltas(deltas, "ssam", rank=K)
    assert isinstance(merged, Tensor)
    seconds, single = timed(lambda: literal(deltas))
    exact = literal([delta.double() for delta in deltas])
    size = float(exact.norm())
    return {
        "seconds": seconds,
        "error": float((merged - exact).norm()) / size,
        "float32_error": float((single - exact).norm()) / size,
    }


if __name__ == "__main__":
    main()

"""How fast do four adapters of a 7B model become one? 224 matrices, rank 128 in fp16, SSAM with k = 128.

    python benchmarks/merge_adapters.py [--layers N] [--repeats N] [--peft] [--data DIR]

Time and memory are those of `modalloy merge`, the whole process, until the result is on the disk; the adapters are
dropped from the page cache before each run. The floor is measured in the same run, from what cannot be avoided:

- reading the adapters once from the disk, in one sequence, and writing the result's bytes with an fsync
- products: (out + in)(R² + 2 R k) multiply-adds a matrix with R = 4 · 128, in float32 on all cores
- eigh: two float64 decompositions of size R a matrix, as independent jobs of one thread on all cores
- sha256 of what is read and written, on all cores

The parts of the floor are added up, and the fastest time of each counts; of ours it is the median. `--peft` also measures
one decoder layer's seven matrices in memory: `merge_deltas` against PEFT's `add_weighted_adapter` (svd,
svd_full_matrices=False), one matrix of each shape (minutes). The inputs are made by `vicuna7b.py` in DIR (16 GB; 2 GB with
`--layers 1`) and kept. Prints a table, then one JSON document as its last line.
"""

import argparse
import functools
import hashlib
import json
import os
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import measuring
import torch
import vicuna7b
from measuring import table, timed
from merge_layer import K, decompositions, peft_svd, products, specialists

from modalloy import merge_deltas

AIMS = {"seconds": 45.0, "× floor": 1.2, "peak GB": 2.0, "× PEFT svd": 300.0}
SAMPLES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32, help="of the decoder; the aims are for 32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peft", action="store_true", help="also PEFT svd on one decoder layer (minutes)")
    parser.add_argument("--data", type=Path, default=Path("build/bench"), help="where inputs and results go")
    args = parser.parse_args()
    size = vicuna7b.Size(args.layers)
    base, adapters = vicuna7b.base(args.data, size), vicuna7b.adapters(args.data, size)
    recipe = vicuna7b.ssam_recipe(base, adapters, K, {"form": "adapter", "dtype": "float16"})
    out = args.data / "merged-adapter"
    ours, floors = [], []
    for number in range(args.repeats):
        print(f"run {number + 1} of {args.repeats} …", file=sys.stderr)
        measuring.evict(adapters)
        usage, _ = measuring.merge(recipe, out)
        ours.append(usage)
        floors.append(floor(size, adapters, measuring.folder_bytes(out), args.data))
    parts = {name: min(each[name] for each in floors) for name in floors[0]}
    total = sum(parts.values())
    seconds = statistics.median(usage.synced_seconds for usage in ours)
    peak = max(usage.peak_bytes for usage in ours)
    print(
        f"four rank-{vicuna7b.RANK} adapters, {len(size.linears())} matrices, k = {K}, {torch.get_num_threads()} threads\n"
    )
    rows = [[name, f"{part:.2f}", f"{part / total:.2f}", ""] for name, part in parts.items()]
    rows.append(["floor", f"{total:.2f}", "1.00", ""])
    rows.append(["modalloy merge", f"{seconds:.2f}", f"{seconds / total:.2f}", f"{peak / 1e9:.2f}"])
    print(table(["", "seconds", "× floor", "peak memory, GB"], rows))
    found = {"seconds": seconds, "× floor": seconds / total, "peak GB": peak / 1e9}
    layer = decoder_layer() if args.peft else {}
    if layer:
        found["× PEFT svd"] = layer["peft_s"] / layer["ours_s"]
        print(f"\none decoder layer in memory: ours {layer['ours_s']:.2f} s, PEFT svd {layer['peft_s']:.1f} s")
    print(f"\naims: {json.dumps(AIMS, ensure_ascii=False)}\nfound: {json.dumps(found, ensure_ascii=False)}")
    document = {"layers": args.layers, "aims": AIMS, "found": found, "floor_s": parts, "decoder_layer": layer}
    print(json.dumps(document | {"runs": [asdict(usage) for usage in ours], "machine": measuring.machine()}))


def floor(size: vicuna7b.Size, adapters: list[Path], result_bytes: int, data: Path) -> dict[str, float]:
    """Seconds of each part of the floor."""
    measuring.evict(adapters)
    read_s, n_bytes = timed(lambda: measuring.read_through(adapters))
    write_s, _ = timed(lambda: measuring.write_through(data / "floor.bin", result_bytes))
    return {
        f"read {n_bytes / 1e9:.2f} GB": read_s,
        **arithmetic(size),
        **hashing(n_bytes + result_bytes),
        f"write {result_bytes / 1e9:.2f} GB, fsync": write_s,
    }


def arithmetic(size: vicuna7b.Size) -> dict[str, float]:
    """Seconds of the arithmetic of the floor, on all cores."""
    products_s = 0.0
    for shape in vicuna7b.LINEARS.values():
        call = products(shape)
        products_s += size.layers * min(timed(call)[0] for _ in range(SAMPLES))
    return {"products, float32": products_s, "eigh, float64": len(size.linears()) * pair_seconds()}


def pair_seconds() -> float:
    """Seconds that two eigh of size R take on average while every core is busy with its own."""
    return busy_seconds(decompositions)


def busy_seconds(make: Callable[[], Callable[[], object]]) -> float:
    """Seconds that a call of one thread takes on average while every core is busy with such calls."""
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        calls = [make() for _ in range(SAMPLES * cores)]
        seconds, _ = timed(lambda: list(pool.map(lambda call: call(), calls)))
    torch.set_num_threads(threads)
    return seconds / len(calls)


def hashing(n_bytes: int) -> dict[str, float]:
    """Seconds of sha256 of so many bytes on all cores."""
    block = bytes(64 << 20)
    seconds = busy_seconds(lambda: functools.partial(hashlib.sha256, block))
    return {f"sha256 of {n_bytes / 1e9:.1f} GB": seconds * n_bytes / len(block)}


def decoder_layer() -> dict[str, float]:
    """Seconds for the seven matrices of a decoder layer, from one matrix of each shape."""
    found = {"ours_s": 0.0, "peft_s": 0.0}
    shapes = list(vicuna7b.LINEARS.values())
    for shape in dict.fromkeys(shapes):
        print(f"PEFT svd on {shape[0]} × {shape[1]} …", file=sys.stderr)
        deltas = specialists(shape)
        merge = functools.partial(merge_deltas, deltas, "ssam", rank=K)
        ours_s = min(timed(merge)[0] for _ in range(SAMPLES))
        found["ours_s"] += shapes.count(shape) * ours_s
        found["peft_s"] += shapes.count(shape) * timed(peft_svd(deltas))[0]
    return found


if __name__ == "__main__":
    main()

"""How fast does a 7B checkpoint with four adapters become a full checkpoint, next to copying it?

    python benchmarks/merge_full.py [--layers N] [--repeats N] [--data DIR]

`modalloy merge` (form: full, SSAM, k = 128) against `cp -r` of the base, which is the least that writing a checkpoint of
that size can cost. They alternate; before each, base and adapters are dropped from the page cache (posix_fadvise), and
the clock stops when everything is on the disk (sync). Bytes are those that the storage layer read and wrote for the
process (/proc/PID/io), memory is its peak resident size. The inputs are made by `vicuna7b.py` in DIR (16 GB) and kept; a
result (13.5 GB) is removed as soon as it is measured. On file systems that can share blocks the copy is a true copy
(--reflink=never).

The floor is measured in the same run, from what such a merge cannot do without on all cores: the subspaces of the adapters
(`merge_adapters.py`), the product of each merged update added to its weight, in float32 and back to 16 bits, and sha256 of what
is read and written. Reading and writing go on beside it, so the floor is this or the copy, whichever takes longer. Prints a
table, then one JSON document as its last line.
"""

import argparse
import functools
import json
import shutil
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import measuring
import merge_adapters
import torch
import vicuna7b
from measuring import Usage, table
from merge_layer import K

AIMS = {"× cp -r": 1.5, "peak GB": 3.0, "planning and verifying": 0.05}
ROWS = 128  # of a weight at once


def arithmetic(size: vicuna7b.Size, hashed_bytes: int) -> dict[str, float]:
    """Seconds of each part of the arithmetic, on all cores."""
    adding = 0.0
    for out, in_ in vicuna7b.LINEARS.values():
        make = functools.partial(adding_to, out, in_)
        adding += size.layers * merge_adapters.busy_seconds(make)
    return {
        "subspaces": sum(merge_adapters.arithmetic(size).values()),
        "updates added": adding,
        **merge_adapters.hashing(hashed_bytes),
    }


def adding_to(out: int, in_: int) -> Callable[[], None]:
    """The product of an update's factors added to a weight, in float32 and back to its type, by blocks that caches hold."""
    weight, up, down = torch.randn(out, in_).half(), torch.randn(out, K), torch.randn(K, in_)

    def add() -> None:
        for rows in (slice(start, start + ROWS) for start in range(0, out, ROWS)):
            weight[rows] = torch.addmm(weight[rows].float(), up[rows], down)

    return add


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32, help="of the decoder; the aims are for 32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data", type=Path, default=Path("build/bench"), help="where inputs and results go")
    args = parser.parse_args()
    size = vicuna7b.Size(args.layers)
    base, adapters = vicuna7b.base(args.data, size), vicuna7b.adapters(args.data, size)
    recipe = vicuna7b.ssam_recipe(base, adapters, K, {"form": "full"})
    out = args.data / "merged-full"
    runs: dict[str, list[Usage]] = {"cp -r, sync": [], "modalloy merge": []}
    beside: list[float] = []
    for number in range(args.repeats):
        print(f"run {number + 1} of {args.repeats} …", file=sys.stderr)
        shutil.rmtree(out, ignore_errors=True)
        measuring.evict([base, *adapters])
        runs["cp -r, sync"].append(measuring.run(["cp", "-r", "--reflink=never", base, out])[0])
        shutil.rmtree(out)
        measuring.evict([base, *adapters])
        usage, told = measuring.merge(recipe, out)
        runs["modalloy merge"].append(usage)
        beside.append(told["total_seconds"] - told["merge_seconds"])
        shutil.rmtree(out)
    seconds = {name: statistics.median(usage.synced_seconds for usage in usages) for name, usages in runs.items()}
    copy_s, base_bytes = seconds["cp -r, sync"], measuring.folder_bytes(base)
    parts = arithmetic(size, 2 * base_bytes + sum(map(measuring.folder_bytes, adapters)))
    floor_s = max(sum(parts.values()), copy_s)
    print(f"a base of {base_bytes / 1e9:.1f} GB and four rank-{vicuna7b.RANK} adapters, k = {K}\n")
    rows = [
        [
            name,
            f"{seconds[name]:.1f}",
            f"{seconds[name] / copy_s:.2f}",
            f"{max(usage.read_bytes for usage in usages) / 1e9:.2f}",
            f"{max(usage.written_bytes for usage in usages) / 1e9:.2f}",
            f"{max(usage.peak_bytes for usage in usages) / 1e9:.2f}",
        ]
        for name, usages in runs.items()
    ]
    print(table(["", "seconds (median)", "× cp -r", "read, GB", "written, GB", "peak memory, GB"], rows))
    peak = max(usage.peak_bytes for usage in runs["modalloy merge"])
    merge_s = seconds["modalloy merge"]
    found = {"× cp -r": merge_s / copy_s, "× floor": merge_s / floor_s, "peak GB": peak / 1e9}
    found["planning and verifying"] = statistics.median(beside) / merge_s
    print("\nfloor, seconds of all cores: " + ", ".join(f"{name} {part:.1f}" for name, part in parts.items()))
    print(f"\naims: {json.dumps(AIMS, ensure_ascii=False)}\nfound: {json.dumps(found, ensure_ascii=False)}")
    document = {"layers": args.layers, "aims": AIMS, "found": found, "floor_s": parts, "machine": measuring.machine()}
    print(json.dumps(document | {"runs": {name: [asdict(u) for u in usages] for name, usages in runs.items()}}))


if __name__ == "__main__":
    main()

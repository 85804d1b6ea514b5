"""How long would a merge of a model of 10¹² parameters take on 1 … 256 machines, and what would bind?

    python benchmarks/simulate_cluster.py [--data DIR] [--check]

The model is made of headers: the names, shapes and types of a mixture of experts (61 layers, 384 experts of 7168 × 2048 in
60 of them, 1.0 T parameters in bfloat16), a base and two fine-tunes, as sparse files of true size that hold no data. They are
planned as any recipe is; the plan's shards are those that `--engine ray` makes tasks of. Simulated is what its driver does
(tasks in order, each to the first free worker) with the rates below, which are stated, not measured, but for the arithmetic: that
is the processor time of one worker on one expert's weight here. Reading, arithmetic and writing of a task overlap, as they do
in `engines/local.py`. `--check` merges 24 such experts, with data, on a real Ray of 1, 2 and 4 workers on this machine, each in a
task of its own. What one worker takes for a task and for hashing the inputs is measured with one worker; what 2 and 4 take is
simulated from it (workers beyond this machine's cores share them) and compared with what they took. Prints a table, then one
JSON document as its last line.
"""

import argparse
import hashlib
import heapq
import json
import math
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import measuring
import torch
from measuring import table
from safetensors.torch import save_file

from modalloy import merge
from modalloy.compute import compute
from modalloy.machine.threads import one_thread
from modalloy.outputs.streamed import StreamedWeights
from modalloy.planning.plan import Plan
from modalloy.planning.planner import plan
from modalloy.recipe import Recipe
from modalloy.storage.staging import Staging

LAYERS, EXPERTS, WIDTH, EXPERT, DENSE = 61, 384, 7168, 2048, 18432
MODEL_SHARD_BYTES = 5_000_000_000
CHECKED = 24  # experts that are really merged
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 64,
    "n_routed_experts": EXPERTS,
    "moe_intermediate_size": EXPERT,
    "intermediate_size": DENSE,
    "first_k_dense_replace": 1,
    "vocab_size": 163840,
}
NODES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Rates:
    """What is assumed of the machines: bytes in a second."""

    workers: int = 16  # of a machine
    network: float = 3.1e9  # of a machine, in each direction: 25 Gbit/s
    store: float = 200e9  # of the shared store, in all
    hashing: float = 1.5e9  # of a worker: sha256 of what it writes, and of the inputs once more


@dataclass(frozen=True)
class Task:
    """One shard: what its worker reads and writes, and how long its arithmetic takes."""

    read_bytes: int
    write_bytes: int
    compute_s: float


@dataclass(frozen=True)
class Outcome:
    """A simulated merge."""

    nodes: int
    shards: int
    seconds: float
    hashing_seconds: float  # of the inputs, after the shards
    busiest_bytes: int  # read and written by the machine that does most
    imbalance: float  # that, over the mean
    idle: float  # share of the workers' time
    binds: str


def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of the model."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (163840, WIDTH)}
    for index in range(LAYERS):
        layer = f"model.layers.{index}"
        attention = {"q_a_proj": (1536, WIDTH), "q_b_proj": (12288, 1536), "kv_a_proj_with_mqa": (576, WIDTH)}
        attention |= {"kv_b_proj": (16384, 512), "o_proj": (WIDTH, 8192)}
        found |= {f"{layer}.self_attn.{name}.weight": shape for name, shape in attention.items()}
        found |= {
            f"{layer}.self_attn.{name}.weight": (size,)
            for name, size in (("q_a_layernorm", 1536), ("kv_a_layernorm", 512))
        }
        experts = [(f"{layer}.mlp", DENSE)] if index == 0 else [(f"{layer}.mlp.shared_experts", EXPERT)]
        experts += [(f"{layer}.mlp.experts.{number}", EXPERT) for number in range(EXPERTS if index else 0)]
        for name, inner in experts:
            found |= {f"{name}.{side}_proj.weight": (inner, WIDTH) for side in ("gate", "up")}
            found[f"{name}.down_proj.weight"] = (WIDTH, inner)
        if index:
            found |= {
                f"{layer}.mlp.gate.weight": (EXPERTS, WIDTH),
                f"{layer}.mlp.gate.e_score_correction_bias": (EXPERTS,),
            }
        found |= {f"{layer}.{name}.weight": (WIDTH,) for name in ("input_layernorm", "post_attention_layernorm")}
    return found | {"model.norm.weight": (WIDTH,), "lm_head.weight": (163840, WIDTH)}


def write_headers(folder: Path) -> None:
    """A model of sparse files: headers, and nothing behind them."""
    folder.mkdir(parents=True)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes().items():
        n_bytes = 2 * torch.Size(shape).numel()
        if size + n_bytes > MODEL_SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += n_bytes
    names = [f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors" for index in range(len(shards))]
    for file, held in zip(names, shards, strict=True):
        header, offset = {}, 0
        for name, shape in held.items():
            end = offset + 2 * torch.Size(shape).numel()
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            out.truncate(8 + len(text) + offset)
    weight_map = {name: file for file, held in zip(names, shards, strict=True) for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG))


def planned_merge(data: Path, shard_bytes: int) -> Plan:
    """The plan of base + λ (δ_1 + δ_2) of models that are headers."""
    folders = [data / name for name in ("base", "one", "two")]
    for folder in folders:
        if not folder.exists():
            write_headers(folder)
    base, *models = map(str, folders)
    content = recipe_of(base, models, shard_bytes) | {"modules": {"*.gate.*": {"policy": "keep"}}}
    return plan(Recipe(**content))


def recipe_of(base: str, models: Sequence[str], shard_bytes: int) -> dict[str, Any]:
    """base + λ (δ_1 + δ_2)."""
    return {
        "base_model": base,
        "merge_method": "task_arithmetic",
        "parameters": {"scale": 0.5},
        "models": [{"model": model} for model in models],
        "output": {"form": "full", "max_shard_size": shard_bytes},
    }


def seconds_per_byte() -> float:
    """Processor time of one worker for a byte that is written, on an expert's weight with two tuned copies."""
    from modalloy.planning.job import Job
    from modalloy.storage.tensors import TensorRef
    from modalloy.storage.writer import TensorSpec

    refs = [TensorRef(name, torch.bfloat16, (EXPERT, WIDTH), Path(name), 0) for name in ("base", "one", "two")]
    held = {ref: torch.randn(EXPERT, WIDTH).to(torch.bfloat16) for ref in refs}
    spec = TensorSpec("w", torch.bfloat16, (EXPERT, WIDTH))
    start, *models = refs
    job = Job(
        "merge", "w", (spec,), start, tuple(models), (1.0, 1.0), method="task_arithmetic", parameters={"scale": 0.5}
    )
    best = float("inf")
    with one_thread():
        for _ in range(5):
            # as an engine has read them; one is written over
            read = {ref: tensor.clone() for ref, tensor in held.items()}
            begin = time.process_time()
            compute(job, read.__getitem__)
            best = min(best, time.process_time() - begin)
    return best / spec.n_bytes


def tasks_of(planned: Plan, per_byte: float) -> list[Task]:
    """The tasks that `--engine ray` makes of a plan."""
    with tempfile.TemporaryDirectory() as place:
        shards = StreamedWeights(planned, Staging(Path(place) / "out")).shards(planned.jobs)
    found = []
    for _, specs, jobs in shards:
        merged = sum(job.write_bytes for job in jobs if job.kind != "keep")
        found.append(Task(sum(job.read_bytes for job in jobs), sum(spec.n_bytes for spec in specs), per_byte * merged))
    return found


def scheduled(lengths: Sequence[float], workers: int) -> tuple[float, list[int]]:
    """When the last task ends, and which worker does each: tasks in order, each to the worker that is free first."""
    free = [(0.0, index) for index in range(workers)]
    places = []
    for length in lengths:
        at, index = heapq.heappop(free)
        places.append(index)
        heapq.heappush(free, (at + length, index))
    return max(at for at, _ in free), places


def simulated(tasks: Sequence[Task], nodes: int, rates: Rates, input_bytes: int) -> Outcome:
    """A merge on so many machines; workers share their machine's network, and all share the store."""
    workers = nodes * rates.workers
    busy = min(workers, len(tasks))
    of_network = rates.network / math.ceil(busy / nodes)
    share = min(of_network, rates.store / busy)
    parts = [
        (task.read_bytes / share, task.compute_s, task.write_bytes / share, task.write_bytes / rates.hashing)
        for task in tasks
    ]
    seconds, places = scheduled([max(part) for part in parts], workers)
    moved = [0] * nodes
    for task, place in zip(tasks, places, strict=True):
        moved[place % nodes] += task.read_bytes + task.write_bytes
    totals = [sum(column) for column in zip(*parts, strict=True)]
    names = ["reading", "arithmetic", "writing", "hashing"]
    binds = names[totals.index(max(totals))]
    if binds in ("reading", "writing"):
        binds += ", by the store" if share < of_network else ", by the machines' network"
    whole = sum(max(part) for part in parts)
    hashing = max(input_bytes / min(rates.store, rates.network * nodes), input_bytes / (rates.hashing * workers))
    return Outcome(
        nodes,
        len(tasks),
        seconds,
        hashing,
        max(moved),
        max(moved) * nodes / sum(moved),
        1 - whole / (seconds * workers),
        binds,
    )


def write_experts(folder: Path, seed: int) -> None:
    """A model of `CHECKED` experts, with data."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for number in range(CHECKED):
        stem, file = f"model.layers.1.mlp.experts.{number}", f"model-{number + 1:05d}-of-{CHECKED:05d}.safetensors"
        held = {f"{stem}.{side}_proj.weight": torch.randn(EXPERT, WIDTH).bfloat16() for side in ("gate", "up")}
        held[f"{stem}.down_proj.weight"] = torch.randn(WIDTH, EXPERT).bfloat16()
        save_file(held, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 2, "n_routed_experts": CHECKED}))


def checked(place: Path, workers: Sequence[int]) -> list[dict[str, float]]:
    """Real and simulated seconds of a merge of experts on a Ray of so many workers of this machine."""
    import ray

    names = ("base", "one", "two")
    for seed, name in enumerate(names):
        write_experts(place / name, seed)
    base, *models = (str(place / name) for name in names)
    recipe = Recipe(**recipe_of(base, models, 3 * 2 * EXPERT * WIDTH))
    files = [path for name in names for path in sorted((place / name).glob("*.safetensors"))]
    begin = time.perf_counter()
    for path in files[:CHECKED]:
        hashlib.sha256(path.read_bytes())
    hashing = (time.perf_counter() - begin) * len(names)
    cores, found, task = len(os.sched_getaffinity(0)), list[dict[str, float]](), 0.0
    for count in workers:
        ray.init(num_cpus=count, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        try:
            start = ray.remote(num_cpus=1)(started)
            ray.get([start.remote() for _ in range(count)])
            real = min(merge(recipe, place / "out", engine="ray", overwrite=True).merge_s for _ in range(2))
        finally:
            ray.shutdown()
        task = task or (real - hashing) / CHECKED
        shared = max(1.0, count / cores)  # workers of one core take turns
        phases = ([task * shared] * CHECKED, [hashing / len(files) * shared] * len(files))
        simulated_s = sum(scheduled(lengths, count)[0] for lengths in phases)
        found.append({"workers": count, "cores": cores, "real_s": real, "simulated_s": simulated_s})
    return found


def started() -> None:
    """What a worker does first: it imports what a merge needs."""
    import modalloy.compute  # noqa: F401

    time.sleep(1)  # so that no worker does it for another


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/bench/headers"), help="where the headers go")
    parser.add_argument("--check", action="store_true", help="also merge on a real Ray")
    args = parser.parse_args()
    rates, per_byte = Rates(), seconds_per_byte()
    rows, outcomes = [], []
    for shard_bytes in (5_000_000_000, 500_000_000):
        begin = time.process_time()
        planned = planned_merge(args.data, shard_bytes)
        plan_s = time.process_time() - begin
        tasks = tasks_of(planned, per_byte)
        inputs = sum(file.n_bytes for checkpoint in planned.checkpoints() for file in checkpoint.files)
        for nodes in NODES:
            one = simulated(tasks, nodes, rates, inputs)
            outcomes.append({"shard_bytes": shard_bytes, **asdict(one)})
            rows.append(
                [
                    f"{shard_bytes / 1e9:g}",
                    str(nodes),
                    f"{one.seconds:,.0f}",
                    f"{one.hashing_seconds:,.0f}",
                    f"{one.busiest_bytes / 1e12:.2f}",
                    f"{one.imbalance:.2f}",
                    f"{one.idle:.0%}",
                    one.binds,
                ]
            )
    count = sum(torch.Size(shape).numel() for shape in shapes().values())
    print(
        f"{count / 1e12:.2f} T parameters, {len(planned.jobs):,} tensors, planned in {plan_s:.0f} s of processor time\n"
    )
    print(
        table(
            [
                "shard, GB",
                "machines",
                "merge, s",
                "hashing inputs, s",
                "TB of the busiest",
                "over the mean",
                "idle",
                "binds",
            ],
            rows,
        )
    )
    checks = checked(args.data / "check", (1, 2, 4)) if args.check else []
    for check in checks:
        print(f"{check['workers']} workers: {check['real_s']:.1f} s on Ray, {check['simulated_s']:.1f} s simulated")
    document = {
        "parameters": count,
        "tensors": len(planned.jobs),
        "plan_cpu_s": plan_s,
        "rates": asdict(rates),
        "compute_s_per_byte": per_byte,
        "outcomes": outcomes,
        "checks": checks,
        "machine": measuring.machine(),
    }
    print(json.dumps(document))
    shutil.rmtree(args.data)


if __name__ == "__main__":
    main()

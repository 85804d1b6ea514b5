"""The page of what merges move, repeat and share, from the stored results of their benchmarks."""

import json
from pathlib import Path
from typing import Any


def page(results: Path) -> str:
    """What is moved, recomputed and shared, and the simulated merge of a very large model; of those whose results are stored."""
    parts = {"remote_bytes": _moved, "increments": _repeated, "simulate_cluster": _simulated}
    out = ["# What a merge moves, repeats and shares\n"]
    for name, part in parts.items():
        path = results / f"{name}.json"
        out += part(json.loads(path.read_text())) if path.exists() else []
    return "\n".join([*out, ""])


def _moved(stored: dict[str, Any]) -> list[str]:
    out = [
        "## Bytes of models that are elsewhere (`benchmarks/remote_bytes.py`)\n",
        "A local web server counts what it sends of weight files; needed are the files that a merge reads and hashes whole. Aim: "
        f"≤ {stored['aim']} × what is needed. “Cut”: every tenth answer ends in its middle, and what was sent in vain counts.\n",
        "| merge | a plan moves, kB | needed, MB | moved, MB | moved / needed | same weights as of local files |",
        "|---|---|---|---|---|---|",
    ]
    for one in stored["cases"]:
        kind = "adapters" if one["models"] == "lora" else "fine-tunes"
        out.append(
            f"| two {kind} → {one['form']}{', cut' if one['cuts'] else ''} | {one['planned_bytes'] / 1e3:.0f} | "
            f"{one['needed_bytes'] / 1e6:.1f} | {one['moved_bytes'] / 1e6:.1f} | {one['ratio']:.3f} | "
            f"{'yes' if one['same_weights'] else 'no'} |"
        )
    return [*out, ""]


def _repeated(stored: dict[str, Any]) -> list[str]:
    out = [
        "## Again, and many at once (`benchmarks/increments.py`)\n",
        f"Vicuna-7B's shapes, {stored['layers']} of 32 layers. Seconds of the processor; the ratio is to a merge from scratch, "
        "or to six merges one by one; by the clock the disk counts, too. The fifth specialist updates q_proj and v_proj in every "
        "layer, so no shard stays as it was: each is read, written and hashed, which is what is left of the time. Aim for it: "
        f"≤ {stored['aims']['a fifth specialist']}{'' if _reached(stored) else ', **missed**'}.\n",
        "| what | whole | part | ratio | ratio by the clock | same bytes |",
        "|---|---|---|---|---|---|",
    ]
    for one in stored["cases"]:
        whole, part, ratios = one["whole"], one["part"], one["ratios"]
        out.append(
            f"| {one['case']} | {whole['cpu_seconds']:.1f} | {part['cpu_seconds']:.1f} | {ratios['cpu_seconds']:.2f} | "
            f"{ratios['seconds']:.2f} | {'yes' if one['same_bytes'] else 'no'} |"
        )
    return [*out, ""]


def _reached(stored: dict[str, Any]) -> bool:
    """Whether every case that has an aim reaches it."""
    return all(one["ratios"]["cpu_seconds"] <= stored["aims"].get(one["case"], 1.0) for one in stored["cases"])


def _simulated(stored: dict[str, Any]) -> list[str]:
    rates = stored["rates"]
    out = [
        f"## A model of {stored['parameters'] / 1e12:.2f} T parameters (`benchmarks/simulate_cluster.py`)\n",
        f"Simulated, from headers of true shapes ({stored['tensors']:,} tensors, planned in {stored['plan_cpu_s']:.0f} s "
        "of the processor): base + λ (δ₁ + δ₂) of two full fine-tunes. Assumed, not measured: "
        f"{rates['workers']} workers a machine, {rates['network'] / 1e9:g} GB/s of network each way, a store of "
        f"{rates['store'] / 1e9:g} GB/s, hashing at {rates['hashing'] / 1e9:g} GB/s a worker. Measured: "
        f"{stored['compute_s_per_byte'] * 1e9:.2f} s of arithmetic for a GB that is written.\n",
        "| shards, GB | machines | merge, s | hashing the inputs, s | busiest over mean | idle | what binds |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in stored["outcomes"]:
        out.append(
            f"| {one['shard_bytes'] / 1e9:g} | {one['nodes']} | {one['seconds']:,.0f} | {one['hashing_seconds']:,.0f} | "
            f"{one['imbalance']:.2f} | {one['idle']:.0%} | {one['binds']} |"
        )
    if stored["checks"]:
        out += [
            "\n24 such experts, with data, merged on a real Ray of this machine's cores, beside what is simulated from",
            "one worker's tasks (without what workers of one machine share beside the cores: its disk and memory):\n",
            "| workers | cores | real, s | simulated, s |",
            "|---|---|---|---|",
        ]
    for one in stored["checks"]:
        out.append(f"| {one['workers']} | {one['cores']} | {one['real_s']:.1f} | {one['simulated_s']:.1f} |")
    return [*out, ""]

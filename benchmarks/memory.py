"""Is `--max-memory` kept? Merges of all methods and forms, each with the least limit that is accepted.

    python benchmarks/memory.py [--data DIR] [--only WORDS] [--limit least|predicted]

Every merge is a process of its own, forked from one that only imported modalloy. It first asks for one byte, is refused,
writes the limit that the refusal names, and merges within that (`--limit least`); or within what a merge without a limit
predicts (`predicted`). Compared with it is the process's own peak (VmHWM). The inputs are random: small (width 64) and
middle (width 512), a decoder of 7B's width with one layer and its counterpart of another architecture, in DIR (3 GB).
Prints a table, then one JSON document as its last line.
"""

import argparse
import fnmatch
import json
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measuring
import torch
from measuring import table
from safetensors.torch import load_file, save_file

from modalloy.errors import OutOfMemoryError
from modalloy.merging import MergeReport, merge
from modalloy.methods import METHODS

ALLOWED = 1.05  # of the limit
SIZES = {"small": (64, 2, 500), "middle": (512, 3, 4000)}  # width, layers, vocabulary
ENTRIES = tuple(
    name for name, one in METHODS.items() if one.receives == "dense"
)  # give full matrices, whatever they get
Case = tuple[str, int, dict[str, Any]]  # what is merged, workers, and the recipe beside that


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/bench/memory"), help="where inputs and results go")
    parser.add_argument("--only", default="", help="cases whose names hold this")
    parser.add_argument("--limit", choices=("least", "predicted"), default="least")
    args = parser.parse_args()
    forked(lambda: write_inputs(args.data))
    found: dict[str, dict[str, Any]] = {}
    for name, (kind, jobs, changes) in cases(args.data).items():
        if args.only in name:
            one = Merge(args.data, kind, jobs, changes, args.limit)
            found[name] = forked(one.run) | {"jobs": jobs}
            print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    merged = {name: one for name, one in found.items() if "peak_bytes" in one}
    ratios = {name: one["peak_bytes"] / one["limit_bytes"] for name, one in merged.items()}
    rows = [
        [name, str(one["jobs"]), str(one["workers"]), f"{one['limit_bytes'] / 1e6:.0f}", f"{ratios[name]:.3f}"]
        for name, one in merged.items()
    ]
    print(table(["", "jobs", "workers", "limit, MB", "peak / limit"], rows))
    document = {
        "limit": args.limit,
        "merges": len(merged),
        "over": sum(ratio > 1 for ratio in ratios.values()),
        "over_allowed": sum(ratio > ALLOWED for ratio in ratios.values()),
        "worst": max(ratios.values(), default=None),
        "least": min(ratios.values(), default=None),
        "failed": {name: one["error"] for name, one in found.items() if name not in merged},
        "runs": merged,
    }
    print(
        f"\n{document['merges']} merges, {document['over']} over the limit, {document['over_allowed']} by more than 5 %, "
        f"the worst {document['worst'] or 0:.3f} ×; {len(document['failed'])} failed"
    )
    print(json.dumps(document | {"machine": measuring.machine()}))


def cases(data: Path) -> dict[str, Case]:
    """Every merge by name; the workers go round from one to four."""
    made: dict[str, Case] = {}

    def add(name: str, kind: str, method: str, output: dict[str, Any], **more: Any) -> None:
        made[name] = (kind, 1 + len(made) % 4, {"merge_method": method, "output": output} | more)

    everywhere = {"parameters": {"threshold": "global"}}
    full: dict[str, Any] = {"form": "full"}
    for kind in ("lora", "tuned"):
        add(f"ties over the whole model, {kind}", f"middle-{kind}", "ties", full, **everywhere)
        add(f"dare_ties over the whole model, {kind}", f"middle-{kind}", "dare_ties", full, **everywhere)
        add(f"ties in float64, {kind}", f"middle-{kind}", "ties", full, dtype="float64")
        add(f"tsv in float64, {kind}", f"middle-{kind}", "tsv", full, dtype="float64")
        add(f"average as float16, {kind}", f"middle-{kind}", "average", full | {"dtype": "float16"})
        add(f"resumed, {kind}", f"middle-{kind}", "ties", full | {"max_shard_size": "4MB"}, resumed=True)
    for kind in ("bin", "scattered", "half"):
        add(f"task_arithmetic of {kind}", f"middle-{kind}", "task_arithmetic", full)
    for method in ("average", "ties", "task_arithmetic"):
        add(f"{method}, a layer of 7B's", "wide-tuned", method, full)
    for method in ("linear", "task_arithmetic", "ties"):
        add(f"{method} into another architecture", "across", method, full)
    for method in ("ssam", "average", "tsv"):
        add(f"{method}, built-in specialists into omni", "builtin", method, {"form": "omni"})
    for method in METHODS:
        fisher = method == "fisher"
        cut = {"compress_rank": 32} if method in ENTRIES else {}
        for size in SIZES:
            low = f"{size}-lora" + ("-fisher" if fisher else "")
            add(f"{method}, {size} adapters into an adapter", low, method, {"form": "adapter"} | cut)
            if not METHODS[method].needs_factors:
                whole = f"{size}-tuned" + ("-fisher" if fisher else "")
                add(f"{method}, {size} full models", whole, method, {"form": "full"})
        add(f"{method}, middle adapters into a full model", low, method, {"form": "full", "max_shard_size": "8MB"})
    return made


class Merge:
    """One merge of the campaign."""

    def __init__(self, data: Path, kind: str, jobs: int, changes: dict[str, Any], limit: str) -> None:
        self.out, self.file, self.jobs, self.limit = data / "out", data / "recipe.yaml", jobs, limit
        changes = dict(changes)
        self.resumed = changes.pop("resumed", False)
        content = starts(data, kind) | changes
        if "target" in content:
            content["vocabulary"] = "same"
            if content["merge_method"] == "linear":
                content["parameters"] = {"alpha": 0.1}
                del content["base_model"]
        self.file.write_text(json.dumps(content))

    def run(self) -> dict[str, Any]:
        """The limit, what was held, and with how many workers."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # a pool of threads that was begun here would hang in what is forked
        limit = self.least() if self.limit == "least" else self.predicted()
        if self.resumed:
            self.interrupt()
        torch.set_num_threads(threads)
        report = self.merge(max_memory=limit, resume=self.resumed)
        found = report.to_dict()
        return {name: found[name] for name in ("peak_bytes", "workers")} | {"limit_bytes": limit}

    def merge(self, **options: Any) -> MergeReport:
        if not options.get("resume"):
            shutil.rmtree(self.out, ignore_errors=True)
        return merge(self.file, self.out, jobs=self.jobs, device="cpu", **options)

    def least(self) -> int:
        try:
            self.merge(max_memory=1)
        except OutOfMemoryError as error:
            named = re.search(r"write --max-memory (\d+)MB", str(error))
            assert named, error
            return int(named[1]) * 1_000_000
        raise AssertionError("one byte was enough")

    def predicted(self) -> int:
        return int(forked(lambda: self.merge().to_dict())["predicted_peak_bytes"]) + 1_000_000

    def interrupt(self) -> None:
        """Leave what a merge leaves that is killed half way."""
        pid = os.fork()
        if pid == 0:
            self.merge(on_job=lambda done, total: os._exit(0) if done > total // 2 else None)
        os.waitpid(pid, 0)


def forked(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` gives in a process of its own; {"error": …} if it fails."""
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            text = json.dumps(work())
        except BaseException as error:  # of any kind: it is what the case shows
            traceback.print_exc()
            text = json.dumps({"error": f"{type(error).__name__}: {error}"})
        with os.fdopen(writes, "w") as pipe:
            pipe.write(text)
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return dict(json.loads(text or '{"error": "killed"}'))


def starts(data: Path, kind: str) -> dict[str, Any]:
    """Base and models of a recipe."""
    root = data.resolve()
    if kind == "builtin":
        names = ("image", "audio")
        return {"base_model": "builtin:smollm2-135m-instruct", "models": [{"model": f"builtin:{n}"} for n in names]}
    if kind == "across":
        return {
            "target": str(root / "cogvlm"),
            "base_model": str(root / "wide"),
            "models": [{"model": str(root / "wide-tuned1")}],
        }
    size, model, *fisher = kind.split("-")
    entries: list[dict[str, Any]] = [{"model": str(root / f"{size}-{model}{index}")} for index in (1, 2)]
    for entry in entries if fisher else ():
        entry["parameters"] = {"fisher": str(root / f"{size}-fisher.safetensors")}
    return {"base_model": str(root / size), "models": entries}


def write_inputs(data: Path) -> dict[str, Any]:
    """Write every model, unless they are there."""
    if (data / "complete").exists():
        return {}
    shutil.rmtree(data, ignore_errors=True)
    for size, (width, layers, vocabulary) in SIZES.items():
        write_models(data, size, width, layers, vocabulary, torch.float32)
    write_models(data, "wide", 4096, 1, 2000, torch.bfloat16)
    for index in (1, 2):
        tuned = data / f"middle-tuned{index}"
        tensors = load_file(tuned / "model.safetensors")
        for kind in ("bin", "scattered", "half"):
            folder = data / f"middle-{kind}{index}"
            folder.mkdir()
            shutil.copy(tuned / "config.json", folder)
            if kind == "half":
                save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "model.safetensors")
            else:
                scattered = {name: t.T.contiguous().T if t.ndim == 2 else t for name, t in tensors.items()}
                torch.save(scattered if kind == "scattered" else tensors, folder / "pytorch_model.bin")
    write_counterpart(data / "wide", data / "cogvlm")
    (data / "complete").touch()
    return {}


def write_models(data: Path, size: str, width: int, layers: int, vocabulary: int, dtype: torch.dtype) -> None:
    """A base, two fine-tunes and two adapters of rank 16 of it, and a Fisher file."""
    ffn = 11 * width // 4
    parts = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    parts |= {"mlp.gate_proj": (ffn, width), "mlp.up_proj": (ffn, width), "mlp.down_proj": (width, ffn)}
    linears = {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in parts.items()}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width), **linears}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{n}_layernorm.weight": (width,) for n in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    base = {name: (0.02 * torch.randn(*shape)).to(dtype) for name, shape in shapes.items()}
    for index in (0, 1, 2):
        folder = data / (f"{size}-tuned{index}" if index else size)
        folder.mkdir(parents=True)
        moved = {name: (tensor + 0.002 * index * torch.randn(*tensor.shape)).to(dtype) for name, tensor in base.items()}
        save_file(moved, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
    for index in (1, 2):
        factors = {}
        for name, (rows, columns) in linears.items():
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            factors[f"{stem}.lora_A.weight"] = (0.02 * torch.randn(16, columns)).to(dtype)
            factors[f"{stem}.lora_B.weight"] = (0.02 * torch.randn(rows, 16)).to(dtype)
        folder = data / f"{size}-lora{index}"
        folder.mkdir()
        save_file(factors, folder / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "r": 16, "lora_alpha": 16}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file({name: torch.rand(*shape) for name, shape in linears.items()}, data / f"{size}-fisher.safetensors")


def write_counterpart(base: Path, folder: Path) -> None:
    """A stand-in for CogVLM whose two experts are both near the base's weights."""
    tensors, config = load_file(base / "model.safetensors"), json.loads((base / "config.json").read_text())
    found = {}
    for name, tensor in tensors.items():
        layer, _, leaf = name.removesuffix(".weight").rpartition(".")
        if fnmatch.fnmatchcase(leaf, "[kv]_proj"):
            continue
        if not leaf.endswith("_proj"):
            found[name] = tensor
            continue
        whole = tensor
        if leaf == "q_proj":
            whole = torch.cat([tensors[f"{layer}.{x}_proj.weight"] for x in "qkv"])
        for expert in ("language", "vision"):
            kinds = {"q_proj": f"{expert}_expert_query_key_value", "o_proj": f"{expert}_expert_dense"}
            own = f"{layer}.{kinds.get(leaf, f'{expert}_mlp.{leaf}')}.weight"
            found[own] = (whole + 0.002 * torch.randn(*whole.shape)).to(tensor.dtype)
    folder.mkdir()
    save_file(found, folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps(config | {"architectures": ["CogVLMForCausalLM"], "model_type": "cogvlm"})
    )


if __name__ == "__main__":
    main()

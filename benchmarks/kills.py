"""What a merge that is killed (SIGKILL) leaves: merges of every form, killed at random moments, then gone on with.

Half of the kills come after a random time, half just before a random change to the disk (or halfway through a write), many
of these among the last, where the results change places. After every kill the folder of the result must hold what was there
before, or all of the new result, byte for byte; what others have beside it under names like the staging's must be as it was;
and the run after it, with `--resume`, with `--overwrite` or as before, must end with the same bytes as one that nobody
disturbed, and leave nothing else.

Prints a table, then one JSON document as its last line. Exit code 1 if anything was not so.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from measuring import machine, table
from safetensors.torch import save_file

from modalloy.errors import ModalloyError
from modalloy.merging import merge  # before the forks, none of which then imports torch again
from modalloy.storage import staging

WIDTH, FFN, LAYERS, TOKENS, RANK = 16, 24, 2, 20, 4
LINEARS = {f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"}
LINEARS |= {"mlp.gate_proj": (FFN, WIDTH), "mlp.up_proj": (FFN, WIDTH), "mlp.down_proj": (WIDTH, FFN)}
SLOTS = {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in LINEARS.items()}
SENSES = {"image": ("vision", "builtin:efficientnet-lite0", 1280), "audio": ("audio", "builtin:whisper-tiny.en", 3840)}
SHARD = "2KB"
FORMS = ("adapter", "full", "omni", "across")
BEGINNINGS = ("nothing", "an older result", "the same result", "a killed merge")  # what the killed run finds
CHANGES = ("write", "fsync", "rename", "mkdir", "unlink", "rmdir", "ftruncate")
LAST = 24  # changes to the disk in which a result is finished, takes its place and the old one is removed
KILLED, REFUSED = -signal.SIGKILL, 2
Contents = dict[str, bytes]


@dataclass
class Row:
    """What became of the kills of one form on one beginning."""

    kills: int = 0
    finished: int = 0  # before the kill came
    left: Counter[str] = field(default_factory=Counter)  # in the result's place: nothing, the old or the new result
    again: Counter[str] = field(default_factory=Counter)  # how the run after it went on
    faults: list[str] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=240, help="in all, at least")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # a pool of threads that was begun here would hang in what is forked
    begun, draw = time.perf_counter(), random.Random(args.seed)
    each = -(-args.kills // (len(FORMS) * len(BEGINNINGS)))
    rows: dict[tuple[str, str], Row] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder) / "inputs")
        for form in FORMS:
            bench = Bench(Path(folder), form, draw)
            for beginning in BEGINNINGS:
                row = rows[form, beginning] = Row()
                while row.kills < each:
                    bench.kill(beginning, row)
                print(f"{form}, {beginning}: {row.kills} kills, {len(row.faults)} faults", file=sys.stderr, flush=True)
    print(report(rows))
    faults = [f"{form}, {beginning}: {fault}" for (form, beginning), row in rows.items() for fault in row.faults]
    print("\n".join(faults))
    found = {
        "benchmark": "kills",
        "seed": args.seed,
        "kills": sum(row.kills for row in rows.values()),
        "finished_before_the_kill": sum(row.finished for row in rows.values()),
        "left": dict(sum((row.left for row in rows.values()), Counter())),
        "gone_on": dict(sum((row.again for row in rows.values()), Counter())),
        "faults": faults,
        "rows": [
            {"form": form, "found": beginning, "kills": row.kills, "left": dict(row.left), "gone_on": dict(row.again)}
            for (form, beginning), row in rows.items()
        ],
        "seconds": round(time.perf_counter() - begun, 1),
        "machine": machine(),
    }
    print(json.dumps(found))
    sys.exit(1 if faults else 0)


def report(rows: dict[tuple[str, str], Row]) -> str:
    """A line for every form and beginning."""
    header = ["form", "killed where there was", "kills", "left: nothing / old / new", "then", "faults"]
    lines = []
    for (form, beginning), row in rows.items():
        left = " / ".join(str(row.left[what]) for what in ("nothing", "old", "new"))
        again = ", ".join(f"{how} {count}" for how, count in sorted(row.again.items()))
        lines.append([form, beginning, str(row.kills), left, again, str(len(row.faults))])
    return table(header, lines)


class Bench:
    """Kills merges of one form."""

    def __init__(self, folder: Path, form: str, draw: random.Random) -> None:
        self.place, self.draw = folder / form, draw
        self.place.mkdir()
        self.recipe = write_recipe(folder / "inputs", form, "float32")
        older = write_recipe(folder / "inputs", form, "bfloat16")
        self.out = self.place / "out"
        self.new, (self.seconds, self.changes) = self._made(self.recipe), self._cost()
        self.older = self._made(older)
        victim = folder / "inputs" / "precious"
        victim.mkdir(exist_ok=True)
        (victim / "thesis.txt").write_text("years of work")
        for name in (".out.partial", ".out.replaced"):  # of somebody else
            (self.place / name).mkdir()
            (self.place / name / "mine.txt").write_text("mine")
        (self.place / ".out.partial-00000000").symlink_to(victim, target_is_directory=True)
        self.others = [self.place / name for name in (".out.partial", ".out.replaced", ".out.partial-00000000")]
        self.before = [contents(other) for other in [*self.others, folder / "inputs"]]
        self.inputs = folder / "inputs"

    def kill(self, beginning: str, row: Row) -> None:
        """One kill, what it left, and the run after it."""
        old = self._begin(beginning)
        overwrite = old is not None and beginning != "a killed merge"
        code = self._run(kill=True, overwrite=overwrite, resume=beginning == "a killed merge")
        killed = code == KILLED
        if not killed:
            row.finished += 1
            row.faults += [f"the run failed with code {code}"] if code else []
        else:
            row.kills += 1
        found = contents(self.out) if self.out.exists() else None
        left = "nothing" if found is None else "new" if found == self.new else "old" if found == old else "a ruin"
        if killed:
            row.left[left] += 1
        if left == "a ruin" or (left == "nothing" and old is not None):
            row.faults.append(f"the kill left {left}")
        how = self.draw.choice(("resume", "overwrite" if found is not None else "again"))
        code = self._run(overwrite=how == "overwrite", resume=how == "resume")
        if code == REFUSED and how == "resume" and left == "old":  # killed before it had begun
            how = "refused, overwrite"
            code = self._run(overwrite=True)
        if killed:
            row.again[how] += 1
        if code or contents(self.out) != self.new:
            row.faults.append(f"the run after it ({how}) did not make the same bytes")
        if litter := sorted(path.name for path in self.place.iterdir() if path not in (self.out, *self.others)):
            row.faults.append(f"left behind: {litter}")
        if [contents(other) for other in [*self.others, self.inputs]] != self.before:
            row.faults.append("something of others has changed")

    def _begin(self, beginning: str) -> Contents | None:
        """Make what the run to be killed finds; returns what then is in the result's place."""
        shutil.rmtree(self.out, ignore_errors=True)
        if beginning in ("nothing", "a killed merge"):
            while beginning == "a killed merge" and self._run(kill=True) != KILLED:  # until one is
                shutil.rmtree(self.out)
            return contents(self.out) if self.out.exists() else None
        old = self.older if beginning == "an older result" else self.new
        for name, data in old.items():
            (self.out / name).parent.mkdir(parents=True, exist_ok=True)
            (self.out / name).write_bytes(data)
        return old

    def _run(self, *, kill: bool = False, overwrite: bool = False, resume: bool = False) -> int:
        """The exit code of a merge in a process of its own, which is killed at a random moment if it is there by then."""
        at_change = self.draw.random() < 0.5
        first = self.draw.choice((1, max(1, self.changes - LAST)))
        change = self.draw.randint(first, self.changes) if kill and at_change else 0
        child = forked(lambda: self._merge(change, overwrite, resume))
        if kill and not at_change:
            time.sleep(self.draw.uniform(0, 1.1 * self.seconds))
            os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def _merge(self, change: int, overwrite: bool, resume: bool) -> None:
        if change:
            die_at(change)
        merge(self.recipe, self.out, jobs=2, overwrite=overwrite, resume=resume)

    def _made(self, recipe: Path) -> Contents:
        """The files of an undisturbed merge."""
        child = forked(lambda: merge(recipe, self.out, jobs=2))
        if os.waitpid(child, 0)[1]:
            sys.exit(f"{recipe}: the undisturbed merge failed")
        found = contents(self.out)
        shutil.rmtree(self.out)
        return found

    def _cost(self) -> tuple[float, int]:
        """Seconds of a merge, and its changes to the disk."""
        tally = self.place / "tally"

        def counted() -> None:
            counts = die_at(0)
            merge(self.recipe, self.out, jobs=2)
            tally.write_text(str(counts[0]))

        begin = time.perf_counter()
        os.waitpid(forked(counted), 0)
        seconds, changes = time.perf_counter() - begin, int(tally.read_text())
        tally.unlink()
        shutil.rmtree(self.out)
        return seconds, changes + 12  # of a replacement


def forked(work: Callable[[], object]) -> int:
    """The id of a new process that does `work`. This process starts no threads, so that it can fork."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        code = 0
    except ModalloyError:
        code = REFUSED
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)


def die_at(change: int) -> list[int]:
    """Let this process be killed just before its n-th change to the disk, or halfway through it; returns the count so far."""
    count = [0]
    write = os.write

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            count[0] += 1
            if count[0] == change:
                if function is write:
                    write(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for name in CHANGES:
        setattr(os, name, dying(getattr(os, name)))
    staging.exchange = dying(staging.exchange)
    return count


def contents(folder: Path) -> Contents:
    """Every file in a folder, and the links with where they lead to; of `sources.json` not when files were written."""
    if folder.is_symlink():
        return {"link": os.fsencode(os.readlink(folder))}
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    found = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    for name in [name for name in found if name.endswith("sources.json")]:
        told = json.loads(found[name])
        found[name] = json.dumps({key: value for key, value in told.items() if key != "outputs"}).encode()
    return found


def write_inputs(folder: Path) -> None:
    """A base, two adapters, two fine-tunes and two specialists with senses, all drawn."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(*shape, generator=generator)

    norms = [f"model.layers.{i}.{name}_layernorm" for i in range(LAYERS) for name in ("input", "post_attention")]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (TOKENS, WIDTH), "lm_head": (TOKENS, WIDTH), **SLOTS}
    shapes |= dict.fromkeys([*norms, "model.norm"], (WIDTH,))
    base = {f"{name}.weight": drawn(*shape) for name, shape in shapes.items()}
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": WIDTH,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": TOKENS,
        "tie_word_embeddings": False,
    }
    write_model(folder / "base", "model", base, "config.json", config)
    for name in ("tuned-1", "tuned-2"):
        tensors = {key: value + 0.1 * drawn(*value.shape) for key, value in base.items()}
        write_model(folder / name, "model", tensors, "config.json", config)
    for name in ("lora-1", "lora-2"):
        tensors = {}
        for stem, (rows, columns) in SLOTS.items():
            tensors[f"base_model.model.{stem}.lora_A.weight"] = drawn(RANK, columns)
            tensors[f"base_model.model.{stem}.lora_B.weight"] = drawn(rows, RANK)
        peft = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK}
        write_model(folder / name, "adapter_model", tensors, "adapter_config.json", peft)
    for modality, (disk, encoder, dim) in SENSES.items():
        tensors = {}
        for adapter in ("default", disk):
            for stem, (rows, columns) in SLOTS.items():
                tensors[f"{stem}.lora_A.{adapter}.weight"] = drawn(RANK, columns)
                tensors[f"{stem}.lora_B.{adapter}.weight"] = drawn(rows, RANK)
            tensors |= {f"{side}_tokens.{adapter}": drawn(1, 1, WIDTH) for side in ("prefix", "suffix")}
        for key, shape in {"0.weight": (WIDTH, dim), "0.bias": (WIDTH,), "2.weight": (WIDTH, WIDTH)}.items():
            tensors[f"model.modal_projectors.{disk}.{key}"] = drawn(*shape)
        tensors[f"model.modal_projectors.{disk}.2.bias"] = drawn(WIDTH)
        compose = {"model_type": "multimodal", "hidden_size": WIDTH, "lora_strategy": "modal+language"}
        compose |= {"lora_r": RANK, "lora_alpha": RANK, f"mm_{disk}_encoder": encoder}
        write_model(folder / modality, "adapter_model", tensors, "config.json", compose)


def write_model(folder: Path, stem: str, tensors: dict[str, torch.Tensor], file: str, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    save_file(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})
    (folder / file).write_text(json.dumps(config))


def write_recipe(folder: Path, form: str, dtype: str) -> Path:
    """The recipe of a form, in that type."""
    across = form == "across"
    models = {"omni": list(SENSES), "across": ["tuned-2"]}.get(form, ["lora-1", "lora-2"])
    content: dict[str, Any] = {
        "target" if across else "base_model": "tuned-1" if across else "base",
        "merge_method": "linear" if across else "ssam",
        "models": [{"model": name} | ({"modality": name} if form == "omni" else {}) for name in models],
        "output": {"form": "full" if across else form, "dtype": dtype, "max_shard_size": SHARD},
    }
    path = folder / f"{form}-{dtype}.yaml"
    path.write_text(json.dumps(content))  # JSON is YAML
    return path


if __name__ == "__main__":
    main()

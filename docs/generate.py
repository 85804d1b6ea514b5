"""Writes the pages that are made from code and from stored results; with --check, says which are out of date.

python docs/generate.py [--check]
"""

import argparse
import inspect
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import across_results
import click
import factorial_results
import paper_results
import scale_results
import search_results
import senses_results
import serve_results
import speed_results
from typer.main import get_command

import modalloy
from modalloy.cli import app
from modalloy.methods import METHODS
from modalloy.recipe import Recipe

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "benchmarks" / "results"
RECEIVES = {
    "core": "small float64 cores, exact",
    "factored_core": "small float64 cores, exact",
    "left_core": "cores of the output side, exact",
    "factors": "the factors themselves",
    "dense": "full matrices",
}


def main() -> int:
    """0 if all pages are written, or up to date."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page is out of date")
    check = parser.parse_args().check
    old = []
    for name, text in pages().items():
        path = DOCS / name
        if not path.exists() or path.read_text() != text:
            old.append(name)
            if not check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
    if check and old:
        print(f"docs: {', '.join(old)} out of date; run `make docs`", file=sys.stderr)
    return int(check and bool(old))


def pages() -> dict[str, str]:
    """Every generated page by its name."""
    return {
        "reference/methods.md": methods(),
        "reference/recipe.md": recipe(),
        "reference/cli.md": cli(),
        "reference/python.md": python(),
        "results/safety.md": safety(),
        "results/native.md": native(),
        "results/speed.md": speed_results.page(
            {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in speed_results.NAMES},
            (RESULTS / "earlier_speed.md").read_text(),
        ),
        "results/classes.md": classes(),
        **stored("search", search_results.page),
        **stored("senses", senses_results.page),
        **stored(
            "senses", partial(paper_results.page, search=json.loads((RESULTS / "search.json").read_text())), "paper"
        ),
        **stored("across", across_results.page),
        **stored("factorial", factorial_results.page),
        "results/serve.md": serve_results.page(RESULTS),
        "results/scale.md": scale_results.page(RESULTS),
        "results/export.md": export(),
        "../modalloy/methods/catalogue.json": catalogue(),
    }


def catalogue() -> str:
    """What `modalloy methods` prints without importing torch."""
    rows = {
        name: {
            "summary": method.summary,
            "parameters": method.parameters,
            "documentation": method.documentation,
            "auto_scale": method.auto_scale,
            "receives": method.receives,
            "paper": method.paper,
            "laws": method.laws,
        }
        for name, method in METHODS.items()
    }
    return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"


def methods() -> str:
    """Every method: summary, parameters, paper, laws."""
    out = ["# Methods: reference\n", "Written by `modalloy methods`, which prints the same.\n"]
    for name, method in METHODS.items():
        out.append(f"## `{name}`\n\n{_text(method.summary)}\n\nPaper: {_text(method.paper)}.\n")
        rows = []
        for parameter, default in method.parameters.items():
            shown = f"auto: {method.auto_scale}" if parameter == "scale" else default
            rows.append(f"| `{parameter}` | {_cell(shown)} | {_cell(method.documentation[parameter])} |")
        if rows:
            out.append("\n".join(["| parameter | default | meaning |", "|---|---|---|", *rows]) + "\n")
        laws = ", ".join(method.laws) or "–"
        out.append(f"On low-rank updates: {RECEIVES[method.receives]}. Laws: {laws}.\n")
    return "\n".join(out)


def recipe() -> str:
    """Every key of a recipe, from its schema."""
    schema = Recipe.model_json_schema()
    out = [
        "# Recipes: reference\n",
        "Unknown keys are refused, with the nearest known one.\n",
        _schema("Recipe", schema),
    ]
    out += [_schema(name, part) for name, part in sorted(schema.get("$defs", {}).items())]
    return "\n".join(out)


def _schema(name: str, schema: dict[str, Any]) -> str:
    rows = []
    for key, value in schema.get("properties", {}).items():
        required = key in schema.get("required", [])
        default = "required" if required else json.dumps(value["default"]) if "default" in value else "–"
        rows.append(f"| `{key}` | {_cell(_type(value))} | {_cell(default)} |")
    text = _text(" ".join(str(schema.get("description", "")).split()))
    return f"## {name}\n\n{text}\n\n" + "\n".join(["| key | type | default |", "|---|---|---|", *rows]) + "\n"


def _type(value: dict[str, Any]) -> str:
    if "$ref" in value:
        return str(value["$ref"]).rpartition("/")[2]
    if "anyOf" in value:
        return " or ".join(dict.fromkeys(_type(one) for one in value["anyOf"]))
    if "enum" in value or "const" in value:
        return " or ".join(json.dumps(one) for one in value.get("enum", [value.get("const")]))
    if value.get("type") == "array" and isinstance(value.get("items"), dict):
        return f"list of {_type(value['items'])}"
    if value.get("type") == "object" and isinstance(value.get("additionalProperties"), dict):
        return f"mapping to {_type(value['additionalProperties'])}"
    return str(value.get("type", "any"))


def cli() -> str:
    """Every command with its arguments and options."""
    command = get_command(app)
    assert isinstance(command, click.Group) or hasattr(command, "commands")
    out = ["# Commands: reference\n", "Exit codes: 0 done, 1 a check that failed, 2 a mistake that one line names.\n"]
    for name, one in command.commands.items():
        out.append(f"## `modalloy {name}`\n\n{_text(' '.join((one.help or '').split()))}\n")
        rows = []
        for parameter in one.params:
            is_option = parameter.param_type_name == "option"
            names = (
                ", ".join((*parameter.opts, *parameter.secondary_opts)) if is_option else str(parameter.name).upper()
            )
            default = parameter.default
            plain = "–" if default is None or callable(default) or default == [] else str(default)
            help_text = " ".join(str(getattr(parameter, "help", "") or "").split())
            rows.append(f"| `{names}` | {_cell(plain)} | {_cell(help_text)} |")
        out.append("\n".join(["| option | default | meaning |", "|---|---|---|", *rows]) + "\n")
    return "\n".join(out)


def python() -> str:
    """The public names of the package."""
    out = [
        "# Python: reference\n",
        "`from modalloy import …`; importing the package loads neither torch nor transformers.\n",
    ]
    for name in modalloy.__all__:
        value = getattr(modalloy, name)
        if isinstance(value, str):
            out.append(f"## `{name}`\n\nThe version.\n")
            continue
        text = inspect.getdoc(value) or ""
        signature = "" if inspect.isclass(value) else f"\n\n```python\n{name}{inspect.signature(value)}\n```"
        out.append(f"## `{name}`{signature}\n\n```text\n{text}\n```\n")
    return "\n".join(out)


def safety() -> str:
    """What was tried against merges, from the stored results of kills, fuzzing and memory."""
    kills, fuzz, memory = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("kills", "fuzz", "memory"))
    rows = [f"| {name} | {one['examples']:,} | {one['failures']} |" for name, one in fuzz["targets"].items()]
    startup = json.loads((RESULTS / "startup.json").read_text())
    commands = [f"| `{name}` | {seconds:.2f} s |" for name, seconds in startup["cpu_seconds"].items()]
    return "\n".join(
        [
            "# How safe is it, and how soon is it there?\n",
            "## Start-up (`benchmarks/startup.py`)\n",
            "CPU time of commands that need no model:\n",
            "| command | CPU |",
            "|---|---|",
            *commands,
            "",
            "## Killed merges (`benchmarks/kills.py`)\n",
            f"{kills['kills']} merges were killed at random moments and gone on with: {len(kills['faults'])} faults.\n",
            "## Memory (`benchmarks/memory.py`)\n",
            f"{memory['merges']} merges at the least `--max-memory` that is accepted: {memory['over']} over it, the worst at "
            f"{memory['worst']:.3f} × the limit.\n",
            "## Fuzzing (`benchmarks/fuzz.py`)\n",
            f"{fuzz['examples']:,} examples, {fuzz['times']} times as many as the suite tries.\n",
            "| target | examples | failures |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def native() -> str:
    """Plans of public native checkpoints, and one merge of true shapes, from their stored results."""
    plans, trial = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("native_plans", "native_qwen3"))
    rows = [
        f"| {base} | {' + '.join(one['models'])} | {one['merged_weights']} | {one['given_bytes'] / 1e9:.1f} | "
        f"{one['read_bytes'] / 1e9:.1f} | {one['write_bytes'] / 1e9:.1f} | {one['seconds']:.1f} | {one['peak_bytes'] / 1e9:.2f} |"
        for base, one in plans["groups"].items()
    ]
    merging, asking = trial["merge"], trial["load_and_answer"]
    tokens = ", ".join(f"{count} of {name}" for name, count in trial["tokens"].items())
    return "\n".join(
        [
            "# Native checkpoints of true size\n",
            "## Plans of public groups (`benchmarks/native_plans.py`)\n",
            "Headers of true shapes without data; sizes of the models as far as they are known here, nothing was downloaded. Bytes",
            "are what a merge would read, again to verify a sample, and write; time and memory are the plan's own.\n",
            "| base | specialists | merged weights | given GB | read GB | written GB | plan s | peak GB |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            "## From two folders to an answer (`benchmarks/native_qwen3.py`)\n",
            f"Qwen3-VL-2B and Qwen3-ASR-1.7B of true shapes ({trial['layers']} layers, random weights, bfloat16), on one",
            f"Qwen3-1.7B, by {trial['method']}: {trial['given_bytes'] / 1e9:.1f} GB in three folders became "
            f"{trial['result_bytes'] / 1e9:.1f} GB in one.\n",
            "| | seconds | peak GB |",
            "|---|---|---|",
            f"| merge, hashed and verified | {merging['seconds']:.0f} | {merging['peak_bytes'] / 1e9:.1f} |",
            f"| load, and answer a prompt of {tokens} tokens with {trial['new_tokens']} new ones | {asking['seconds']:.0f} | "
            f"{asking['peak_bytes'] / 1e9:.1f} |",
            "",
            f"Two cores, in use by other work (load {trial['load']:.1f}). The rotary base is one for all three here; as far as is",
            "known, the published models' differ, and are refused.",
            "",
        ]
    )


def classes() -> str:
    """What was checked of every multimodal class, from the stored results of its benchmark."""
    told = json.loads((RESULTS / "vlm_classes.json").read_text())
    kinds = ("full, hub names", "lora, hub names", "full, own names", "lora, own names")
    rows = [
        f"| `{one['class']}` ({name}) | {one['decoder']} | {' | '.join(str(one[kind]) for kind in kinds)} |"
        for name, one in told["models"].items()
    ]
    return "\n".join(
        [
            "# Classes of multimodal models, and what was checked\n",
            f"Tiny models of random weights, transformers {told['transformers']} (`benchmarks/vlm_classes.py`). Two fine-tunes,",
            "and two all-linear LoRAs of PEFT through decoder, tower and projector, were merged by",
            f"{', '.join(told['methods'])} into a base in the hub's names, and by task arithmetic into one in the class's",
            "own names; one of the two was in the hub's names and one in the class's. Every tensor of every result, loaded by",
            "transformers with no missing and no unexpected key, is what float64 arithmetic on the class's own modules gives. The",
            "figures are the tensors compared in each merge.\n",
            "As a specialist beside others in an omni model, each class gives its own logits bit for bit (`tests/test_native.py`).",
            "Routers and experts: `tests/test_native_experts.py`, `tests/test_target_parameters.py`.\n",
            "| class | decoder | fine-tunes, hub | LoRAs, hub | fine-tunes, own | LoRAs, own |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def export() -> str:
    """What the built-in merge says in llama.cpp beside PyTorch, from the stored results of the benchmark, once there are any."""
    stored = RESULTS / "export.json"
    if stored.is_file():
        return _export(json.loads(stored.read_text()))
    return (
        "# The built-in merge in llama.cpp\n\nNo results are stored yet: `python benchmarks/export.py --data DIR` "
        "measures them, and its last line\nbelongs into `benchmarks/results/export.json`.\n"
    )


def _export(told: dict[str, Any]) -> str:
    names = {"torch": "PyTorch, float32", "f32": "f32, exact", "q4_1": "Q4_1 (`--gguf`, the base's published file)"}
    rows = []
    for way, one in told["rows"].items():
        asked = way != "torch"
        margin = one["largest_margin_of_others_nats"]
        cells = [
            names.get(way, way),
            f"{one['same']} of {one['questions']}" if asked else "–",
            (f"{one['questions'] - one['same']}, {one['ties']} of them ties" if asked else "–"),
            f"{margin:.2f}" if margin else "–",
            f"{one['logits']:.2g}" if asked else "–",
            f"{one['nats']:.2g}" if asked else "–",
            f"{one['kl']:.1e}" if asked else "–",
            f"{one['tokens_per_s']:.1f}",
            f"{one['peak_bytes'] / 1e9:.2f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(
        [
            "# The built-in merge in llama.cpp\n",
            f"`benchmarks/export.py` on {told['cores']} cores, load {told['load']:.1f}.",
            f"PyTorch answers {told['rows']['f16']['questions']} questions greedily (the demo's, the others of `senses`), in at",
            f"most {told['answer_tokens']} tokens; each export gets the same prompts, and these answers token by token.",
            "An answer is the same if each of its tokens is the export's likeliest, too; a tie is a place where PyTorch's own two",
            f"likeliest are within {told['tie_nats']} nats. The other columns are the largest along these answers, KL the mean.\n",
            "| base | same answers | others | their largest margin, nats | logits | nats a token | KL, nats | tokens/s | peak GB |",
            "|---|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            "“exact” keeps keys and values in float32 and uses no flash attention; the others are as `--engine llama.cpp` runs.",
            "Peak memory is of a process that loads the model and answers one question with a picture: encoders are in each.",
            "",
        ]
    )


def stored(name: str, page: Callable[[dict[str, Any]], str], called: str | None = None) -> dict[str, str]:
    """A page of a benchmark whose results are stored; the page as it is until there are any.

    A document that was measured with other built-in specialists than today's names the commit they are of.
    """
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return {}
    told = json.loads(path.read_text())
    whose = told.get("specialists")
    note = (
        f"\nMeasured with the built-in specialists of commit {whose}, which newer ones have replaced.\n"
        if whose
        else ""
    )
    return {f"results/{called or name}.md": page(told) + note}


def _text(text: str) -> str:
    """Text in which nothing is taken for HTML."""
    return text.replace("<", "&lt;")


def _cell(value: Any) -> str:
    return _text(str(value)).replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    sys.exit(main())

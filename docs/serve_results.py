"""The page of what serving costs and stands, from stored results of three benchmarks. A part without a result is left out."""

import json
from pathlib import Path
from typing import Any

HEAD = """# What serving costs, and what it stands

The merge of the built-in specialists (135 M parameters) in float32 on a CPU. Other programs may have been at work on the
machine (its load is said): variants alternate, ratios are medians of rounds, and seconds of CPU stand beside the clock's.
"""


def page(results: Path) -> str:
    """The whole page."""
    parts = [HEAD]
    for name, told in (("serve", speed), ("serve_load", strangers), ("quantized", quantised)):
        if (path := results / f"{name}.json").is_file():
            parts.append(told(json.loads(path.read_text())))
    return "\n".join(parts)


def _machine(found: dict[str, Any]) -> str:
    return f"{found['cores']} cores, load {found['load']:.1f}"


def _aim(ratio: float, most: float | None = None, least: float | None = None) -> str:
    """An aim, and whether it was missed."""
    met = ratio <= most if most is not None else least is not None and ratio >= least
    return (f"≤ {most} ×" if most is not None else f"≥ {least} ×") + ("" if met else ": **missed**")


def speed(found: dict[str, Any]) -> str:
    """Of `benchmarks/serve.py`."""
    turn, cost = found["second_turn"], found["overhead"]
    rows = []
    for kind, what in (("text", "text"), ("media", "new media in 7 of 8 requests")):
        one = found[kind]
        rows.append(
            f"| 8 clients at once, {what} | {one['clients_tokens_per_s']:.1f} tokens/s | one client: "
            f"{one['one_client_tokens_per_s']:.1f} tokens/s | {one['ratio']:.2f} × (of CPU: {one['cpu_ratio']:.2f} ×) | "
            f"{_aim(one['ratio'], least=3)} |"
        )
    rows.append(
        f"| first token of a second turn | {turn['second_s']:.2f} s | first turn: {turn['first_s']:.2f} s | "
        f"{turn['ratio']:.2f} × | {_aim(turn['ratio'], most=0.3)} |"
    )
    for what in ("text", "picture"):
        ratio, cpu = cost[f"{what}_ratio"], cost[f"{what}_cpu_ratio"]
        rows.append(
            f"| a whole answer, {what} | over HTTP | `ChatModel.reply` | {ratio:.2f} × (seconds of CPU: {cpu:.2f} ×) | "
            f"{_aim(ratio, most=1.05)} |"
        )
    text, media = found["text"], found["media"]
    return "\n".join(
        [
            "## Speed (`benchmarks/serve.py`)\n",
            f"{_machine(found['machine'])}; answers of {text['tokens_an_answer']:.0f} tokens.\n",
            "| what | measured | against | ratio | aim |",
            "|---|---|---|---|---|",
            *rows,
            "",
            f"{text['equal_answers']} answers to text and {media['equal_answers']} about media were the same in the batch",
            "as alone, token for token. Encoding a medium and the pass of its prompt cost as much for each of",
            "eight clients as for one: where every request brings new media, a batch gains less; more, the longer answers are.\n",
        ]
    )


def strangers(found: dict[str, Any]) -> str:
    """Of `benchmarks/serve_load.py`."""
    faults, memory = found["faults"], found.get("memory")
    statuses = ", ".join(f"{count} × {status}" for status, count in faults["statuses"].items() if status != "0")
    lines = [
        "## Strangers (`benchmarks/serve_load.py`)\n",
        f"{faults['requests']} requests of {faults['clients']} clients at once, {faults['hostile']} of them hostile, of",
        f"{faults['kinds']} kinds: bombs of pixels, points and nesting, headers that lie, wrong types, damaged media, oversize,",
        "half-sent bodies, clients that go away in mid-answer.",
        f"{len(faults['wrong'])} requests were answered otherwise than they should: each of the {faults['well_formed']} others,",
        "about every mix of media, is to get the greedy answer of `ChatModel.reply`, and each hostile one its refusal.",
        f"Statuses: {statuses}. {faults['under_way_after']:.0f} requests were under way afterwards.\n",
    ]
    if memory:
        marks = memory["marks"]
        first, last = marks[0], marks[-1]
        lines += [
            f"Over {memory['requests']} requests (a third text, a third with new media, a third hostile) the server held:\n",
            "| after requests | resident MB | of these kept of earlier turns and media | open files | threads | children |",
            "|---|---|---|---|---|---|",
            *(
                f"| {memory['requests'] * (index + 1) // len(marks)} | {mark['resident_bytes'] / 1e6:.0f} | "
                f"{mark['kept_bytes'] / 1e6:.0f} | {mark['files']} | {mark['threads']} | {mark['children']} |"
                for index, mark in enumerate(marks)
            ),
            "",
            f"After the last it held {memory['ratio']:.3f} × what it held after four fifths. Without what is kept on",
            f"purpose, up to a limit, it grew {memory['ratio_without_kept']:.3f} × from first to last; folders left behind:",
            f"{last['folders'] - first['folders']}.\n",
        ]
    return "\n".join(lines)


def quantised(found: dict[str, Any]) -> str:
    """Of `benchmarks/quantized.py`."""
    rows = []
    for model, ways in found["results"].items():
        for way, one in ways.items():
            same = f"{one['same_answers']} of {found['questions']}" if "same_answers" in one else "–"
            moved = f"{one['mean_kl_nats']:.5f}" if "mean_kl_nats" in one else "–"
            rows.append(
                f"| {model} | {way} | {one['linear_bytes'] / 1e6:.0f} | {one['peak_bytes'] / 1e9:.2f} | "
                f"{one['tokens_per_s']:.1f} | {one['prompt_tokens_per_s']:.0f} | {same} | {moved} |"
            )
    return "\n".join(
        [
            "## Quantised weights (`benchmarks/quantized.py`)\n",
            f"{_machine(found)}. The 7B-shaped decoder has {found['layers']} of 32 layers, random weights, an update of rank 128.",
            "Peak memory is that of a process that loads the model and makes one token. Same answers: to the last token; KL: of",
            "the next-token distributions from those of the float32 model, nats.\n",
            "| model | weights | linears MB | peak GB | tokens/s | prompt tokens/s | same answers | KL |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )

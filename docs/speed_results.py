"""The page of what merges cost, from the stored results of the benchmarks."""

from statistics import median
from typing import Any

NAMES = (
    "merge_adapters",
    "merge_layer",
    "merge_full",
    "merge_across",
    "merge_dense",
    "optmerge",
    "peers",
    "runtime",
    "cuda",
)


def page(of: dict[str, Any], earlier: str) -> str:
    """The whole page, in Markdown; `of` are the documents of NAMES, `earlier` rows that were measured before any were stored."""
    rows = [*_adapters(of["merge_adapters"]), _layer(of["merge_layer"]["rows"]), _full(of["merge_full"])]
    rows += [_across(of["merge_across"]), _dense(of["merge_dense"]["spectra"]["1/j"]), _descent(of["optmerge"])]
    rows += [*_peers(of["peers"]), *_runtime(of["runtime"])]
    cards = [
        f"| {name} | {one['cpu']:.3f} | {one['cuda']:.4f} | {one['cpu'] / one['cuda']:.0f} |"
        for name, one in of["cuda"]["rows"].items()
    ]
    beside = of["merge_full"]["found"]["planning and verifying"]
    return "\n".join(
        [
            "# How fast is it?\n",
            f"Two cores of a virtual machine, {of['merge_full']['machine']['processor']}; nothing else on them; each row",
            "measured in one run of its script in `benchmarks/`; weights of true Vicuna-7B shapes. Aims that were missed are named",
            "as such. Its disk varies by a factor of two from minute to minute (`cp` of the same base: 25 to 46 s), and ratios to",
            "`cp` with it.\n",
            "| work | modalloy | against | ratio | aim |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "The floor of adapters is what the plain way takes at best, measured in the same run, in seconds of all cores:",
            f"{_parts(of['merge_adapters'])}. It reads first; a merge",
            f"reads beside its arithmetic, and takes {_unread(of['merge_adapters']):.2f} × the rest, which is also about its ratio",
            "on a disk that reads several times faster. The products are (out + in)(R² + 2Rk) multiply-adds a matrix, the",
            "eigendecompositions two of size R = 512 a matrix. (A merge multiplies little more than half of a Gram, in float64,",
            "and decomposes in float32, corrected by float64 residuals. In float32 Grams would take half as long, and would do for",
            "these random factors; those of trained adapters, the built-in ones for example, are too close to dependent for it.)",
            "That of the full checkpoint is the same, each merged update added to its weight, and sha256 of what is read and",
            f"written: {_parts(of['merge_full'])}. Where",
            "that is more than the copy, no merge can be as fast as a copy. Planning and verifying the full checkpoint are",
            f"{beside:.1%} of its time (aim: 5 %{'' if beside <= 0.05 else ', **missed**'}).\n",
            f"## On a {of['cuda']['device']} (`benchmarks/cuda.py`)\n",
            "One 4096 × 4096 weight of four rank-128 specialists, seconds, against two threads of its machine's CPU:\n",
            "| case | CPU | CUDA | ratio |",
            "|---|---|---|---|",
            *cards,
            "",
            "## Measured before results were stored\n",
            "On another machine of two cores, noisy, once; the script is the same today.\n",
            "| work | modalloy | against | ratio | aim |",
            "|---|---|---|---|---|",
            earlier.rstrip(),
            "",
        ]
    )


def _adapters(told: dict[str, Any]) -> list[str]:
    found, layer = told["found"], told["decoder_layer"]
    floor = sum(told["floor_s"].values())
    return [
        f"| four rank-128 adapters of {told['layers']} layers → adapter, SSAM k = 128 (`merge_adapters.py --peft`) | "
        f"{found['seconds']:.1f} s, peak {found['peak GB']:.2f} GB | floor {floor:.1f} s | "
        f"{found['× floor']:.2f} × the floor | {_most('≤ 1.2 ×', found['× floor'] <= 1.2)}, ≤ 2 GB |",
        f"| one decoder layer of these in memory | {layer['ours_s']:.2f} s | PEFT `svd`: {layer['peft_s']:.0f} s | "
        f"{found['× PEFT svd']:.0f} × faster | {_most('≥ 300 ×', found['× PEFT svd'] >= 300)} |",
    ]


def _unread(told: dict[str, Any]) -> float:
    """A merge of adapters against its floor without what this reads from the disk."""
    rest: float = sum(seconds for part, seconds in told["floor_s"].items() if not part.startswith("read"))
    return told["found"]["seconds"] / rest


def _layer(rows: dict[str, Any]) -> str:
    ours, floor, literal, peft = (rows[name]["seconds"] for name in ("ours", "floor", "Algorithm 1", "PEFT svd"))
    return (
        f"| one 4096 × 4096 weight of four adapters (`merge_layer.py`) | {ours:.3f} s | floor {floor:.3f} s; Algorithm 1 "
        f"{literal:.1f} s; PEFT `svd` {peft:.1f} s | {ours / floor:.1f} × the floor; {literal / ours:.0f} × faster than "
        f"Algorithm 1 | {_most('≤ 2 × the floor', ours <= 2 * floor)} |"
    )


def _full(told: dict[str, Any]) -> str:
    ours, copied = (
        median(run["synced_seconds"] for run in told["runs"][name]) for name in ("modalloy merge", "cp -r, sync")
    )
    floor = sum(told["floor_s"].values())
    return (
        "| the adapters and a 13.5 GB base → full checkpoint, hashed and verified (`merge_full.py`) | "
        f"{ours:.1f} s, peak {told['found']['peak GB']:.2f} GB | `cp -r` and `sync` of the base {copied:.1f} s; floor of "
        f"arithmetic and hashing {floor:.1f} s | {ours / copied:.1f} × `cp`; "
        f"{ours / floor:.2f} × arithmetic and hashing | ≤ 3 GB; {_most('≤ 1.5 × `cp`', ours <= 1.5 * copied)} |"
    )


def _across(told: dict[str, Any]) -> str:
    runs = told["runs"]
    ours, published, copied = (runs[name]["synced_seconds"] for name in ("linear", "as published", "cp -r, sync"))
    peaks = [runs[name]["peak_bytes"] / 1e9 for name in ("linear", "as published")]
    return (
        f"| across architectures, 3.8 GB + 2.1 GB, {told['layers']} layers, `linear` (`merge_across.py`) | {ours:.1f} s, peak "
        f"{peaks[0]:.1f} GB; hashed and verified | whole models in memory: {published:.1f} s, {peaks[1]:.1f} GB; `cp -r` and "
        f"`sync` {copied:.1f} s | {ours / published:.2f} × that, {ours / copied:.1f} × `cp` | "
        f"{_most('≤ 2.5 × `cp`', ours <= 2.5 * copied)} |"
    )


def _dense(told: dict[str, Any]) -> str:
    weight, literal = told["ours"]["4096 × 4096"], told["literal"]["4096 × 4096"]
    mean = sum(run["seconds"] for run in weight) / len(weight)
    return (
        f"| a full fine-tune's 4096 × 4096 weight, singular values ∝ 1/j (`merge_dense.py`) | {mean:.1f} s | Algorithm 1 in "
        f"float32 {literal['seconds']:.1f} s | {literal['seconds'] / mean:.1f} × faster; error {literal['error']:.0e} (its own "
        f"{literal['float32_error']:.0e}) | {_most('≥ 10 ×', literal['seconds'] >= 10 * mean)}, ≤ 1e-4 |"
    )


def _descent(told: dict[str, Any]) -> str:
    found = told["found"]
    return (
        f"| OptMerge `lora`, one 4096 × 4096 weight, 3 × rank 128 (`optmerge.py`) | {told['ours_s']:.3f} s | 300 steps of SGD "
        f"{found['× SGD'] * told['ours_s']:.0f} s (extrapolated from {told['steps']}) | {found['× SGD']:.0f} ×, same result to "
        f"{found['error']:.0e} | ≥ 100 ×, ≤ 1e-6 |"
    )


def _peers(told: dict[str, Any]) -> list[str]:
    found, peer = told["found"], told["versions"].partition(",")[0]

    def run(name: str) -> str:
        one = told["runs"][name][0]
        return f"{one['synced_seconds']:.1f} s, {one['written_bytes'] / 1e9:.1f} GB written, peak {one['peak_bytes'] / 1e9:.1f} GB"

    faster, fewer = found["adapters: × faster"], found["adapters: × fewer bytes written"]
    full = found["full models: × faster"]
    return [
        f"| task arithmetic of four adapters into a {told['layers']}-layer base (`peers.py`) | {run('adapters: modalloy')} | "
        f"{peer}: {run('adapters: mergekit')} | {faster:.1f} × faster, {fewer:.1f} × fewer bytes | "
        f"{_most('≥ 5 ×', faster >= 5)}, {_most('≥ 4 ×', fewer >= 4)} |",
        f"| task arithmetic of four full fine-tunes, {told['layers']} layers (`peers.py`) | {run('full models: modalloy')} | "
        f"{peer}: {run('full models: mergekit')} | {full:.1f} × faster | {_most('at least as fast', full >= 1)} |",
    ]


def _runtime(told: dict[str, Any]) -> list[str]:
    """A row for each decoder and phase; the aims are those of the ratios to the plain decoder."""
    groups: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for one in told["results"]:
        groups.setdefault((one["decoder"], one["phase"]), {})[one["variant"]] = one
    what = {"prefill": f"prefill of {told['tokens']:,} mixed tokens", "decode": "a decode step"}
    rows = []
    for (decoder, phase), of in groups.items():
        seconds = {name: f"{one['seconds']:.3g} s" for name, one in of.items()}
        ratios = ", ".join(f"{name} {of[name]['ratio']:.2f} ×" for name in ("routed", "folded", "published"))
        aims = [(name, one["aim"], one["ratio"]) for name, one in of.items() if one["aim"]]
        rows.append(
            f"| {what[phase]}, {decoder} (`runtime.py`) | routed {seconds['routed']}, folded {seconds['folded']} | plain decoder "
            f"{seconds['plain']}; every adapter on every token (published) {seconds['published']} | {ratios} | "
            f"{', '.join(_most(f'{name} ≤ {aim:.2f} ×', ratio <= aim) for name, aim, ratio in aims)} |"
        )
    return rows


def _parts(told: dict[str, Any]) -> str:
    return ", ".join(f"{name} {part:.1f}" for name, part in told["floor_s"].items())


def _most(aim: str, met: bool) -> str:
    return aim if met else f"{aim}: **missed**"

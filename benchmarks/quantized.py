"""What quantising the base costs and saves: memory, tokens/s of decoding, and how far answers move.

Two models: the merge of the built-in specialists, asked the demo's questions, and a 7B-shaped decoder of few layers (random
weights, an update of rank 128 for text), of which only memory and speed say something. Memory is that of a process which
loads the model and makes one token. Speeds are measured in one process, in turn, and the best of the rounds counts, because
the machine may be in use by others. Agreement is along the unquantised greedy answers: the share of answers that stay the
same to the last token, and the mean KL(unquantised || quantised) in nats of the next-token distributions at their places.

python benchmarks/quantized.py [--layers 4] [--rounds 5] [--questions 19]
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measuring import machine, run, table
from torch import Tensor

from modalloy.delta import LowRank
from modalloy.demo import merged, questions
from modalloy.model import ChatModel, load_model
from modalloy.model.quantised import stored_bytes
from modalloy.model.routing import TEXT

WAYS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
}
RANK, CONTEXT, NEW = 128, 64, 16
ANSWER = 12  # tokens, as in the demo


def write_7b(folder: Path, layers: int) -> Path:
    """A Llama of 7B's width with random weights in bfloat16, and a tokenizer of a few words."""
    if (folder / "config.json").is_file():
        return folder
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        dtype=torch.bfloat16,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def opened(folder: Path, way: str) -> ChatModel:
    """The model, loaded this way; one without updates is given one for text."""
    chat = load_model(folder, **WAYS[way])
    if chat.model.config.text_update is None:
        draw = torch.Generator().manual_seed(1)
        for linear in chat.model.linears.values():
            up = torch.randn(linear.out_features, RANK, generator=draw) / 1000
            down = torch.randn(RANK, linear.in_features, generator=draw) / 1000
            kind = chat.model.dtype
            linear.add(TEXT, LowRank(up.to(kind), down.to(kind)))
    return chat


@torch.no_grad()
def decode(chat: ChatModel) -> float:
    """Seconds of a token, after a prompt of CONTEXT tokens."""
    ids = torch.arange(CONTEXT)[None] % 1000 + 3
    cache = chat.model(input_ids=ids, use_cache=True).past_key_values
    begun = time.perf_counter()
    for step in range(NEW):
        cache = chat.model(input_ids=ids[:, step : step + 1], past_key_values=cache, use_cache=True).past_key_values
    return (time.perf_counter() - begun) / NEW


@torch.no_grad()
def prefill(chat: ChatModel) -> float:
    """Seconds of a prompt of 4 × CONTEXT tokens."""
    ids = torch.arange(4 * CONTEXT)[None] % 1000 + 3
    begun = time.perf_counter()
    chat.model(input_ids=ids, logits_to_keep=1)
    return time.perf_counter() - begun


def held(chat: ChatModel) -> dict[str, int]:
    """Bytes of the weights of the base's linears, and of everything."""
    tensors = {id(one): one for one in (*chat.model.parameters(), *chat.model.buffers())}
    linears = [linear.weight for linear in chat.model.linears.values()]
    return {
        "linear_bytes": sum(map(stored_bytes, linears)),
        "all_bytes": sum(map(stored_bytes, tensors.values())),
    }


def forced(chat: ChatModel, answers: list[list[int]]) -> list[Tensor]:
    """Log-probabilities (tokens, vocabulary) at every place of the answers to the demo's questions."""
    found = []
    for question, ids in zip(questions()[: len(answers)], answers, strict=True):
        prompt = chat.prompt(question.message(question.media))
        logits = chat.model._forced(chat.inputs([prompt]), [[torch.tensor(ids)]])[0]
        found.append(logits[0].float().log_softmax(-1))
    return found


def answered(chat: ChatModel, count: int) -> list[list[int]]:
    """The greedy answers to the demo's questions as token ids, with the token that ended them."""
    found = []
    for question in questions()[:count]:
        prompt = chat.prompt(question.message(question.media))
        inputs = chat.inputs([prompt])
        ids = chat.model.generate(**inputs, max_new_tokens=ANSWER, do_sample=False)
        found.append(ids[0, inputs["input_ids"].shape[1] :].tolist())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("build/bench"))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--questions", type=int, default=len(questions()))
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(2)
    if args.load is not None:
        chat = opened(Path(args.load[0]), args.load[1])
        chat.model(input_ids=torch.tensor([[3]]))
        print(json.dumps(held(chat)))
        return
    begun = machine()
    folders = {
        "built-in": merged(),
        "7B-shaped": write_7b((args.root / f"quantized{args.layers}").resolve(), args.layers),
    }
    results: dict[str, dict[str, Any]] = {}
    for name, folder in folders.items():
        rows: dict[str, Any] = {way: {} for way in WAYS}
        chats = {way: opened(folder, way) for way in WAYS}
        times: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        for _ in range(args.rounds):
            for way, chat in chats.items():
                times[way].append((decode(chat), prefill(chat)))
        for way, seconds in times.items():
            steps, prompts = zip(*seconds, strict=True)
            rows[way] |= {"tokens_per_s": 1 / min(steps), "prompt_tokens_per_s": 4 * CONTEXT / min(prompts)}
        if name == "built-in":
            answers = answered(chats["float32"], args.questions)
            wanted = forced(chats["float32"], answers)
            for way, chat in chats.items():
                got = forced(chat, answers)
                same = [
                    bool((one.argmax(-1) == torch.tensor(ids)).all()) for one, ids in zip(got, answers, strict=True)
                ]
                parted = [(w.exp() * (w - g)).sum(-1) for w, g in zip(wanted, got, strict=True)]
                rows[way] |= {"same_answers": sum(same), "mean_kl_nats": float(torch.cat(parted).mean())}
                print(way, sum(same), rows[way]["mean_kl_nats"], file=sys.stderr)
        chats.clear()  # so that there is memory for others
        for way in WAYS:
            usage, printed = run([sys.executable, __file__, "--load", folder, way])
            rows[way] |= json.loads(printed.splitlines()[-1]) | {"peak_bytes": usage.peak_bytes}
            print(name, way, rows[way], file=sys.stderr)
        results[name] = rows
    shown = [
        [
            name,
            way,
            f"{row['linear_bytes'] / 1e6:.0f}",
            f"{row['all_bytes'] / 1e6:.0f}",
            f"{row['peak_bytes'] / 1e9:.2f}",
            f"{row['tokens_per_s']:.1f}",
            f"{row['prompt_tokens_per_s']:.0f}",
            f"{row['same_answers']} of {args.questions}" if "same_answers" in row else "–",
            f"{row['mean_kl_nats']:.5f}" if "mean_kl_nats" in row else "–",
        ]
        for name, rows in results.items()
        for way, row in rows.items()
    ]
    header = [
        "model",
        "weights",
        "linears MB",
        "all MB",
        "peak GB",
        "tokens/s",
        "prompt tokens/s",
        "same answers",
        "KL nats",
    ]
    print(table(header, shown))
    document = {
        "benchmark": "quantized",
        "layers": args.layers,
        "rounds": args.rounds,
        "questions": args.questions,
        "results": results,
        "load_before": begun["load"],
    }
    print(json.dumps(document | machine()))


if __name__ == "__main__":
    main()

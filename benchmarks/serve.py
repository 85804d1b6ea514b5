"""What does `modalloy serve` cost and save? The merge of the built-in specialists, asked over HTTP on this machine.

    python benchmarks/serve.py [--rounds 5] [--tokens 64]

- batching: tokens a second of 8 clients at once against those of one, both for long answers to text and for every mix of media
- second turn: seconds to the first token of a second turn against the first's, whose pictures and sounds are new
- overhead: seconds of whole answers over those of `ChatModel.reply` in a process of its own, no conversation seen before
- both also in seconds of CPU, which other programs on the machine do not change

Memory over many requests, and strangers', are in serve_load.py.
Figures are medians of rounds in which the variants alternate. Prints a table, then one JSON document as its last line.
"""

import argparse
import base64
import io
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from measuring import machine, table
from PIL import Image

from modalloy import builtin, load_model
from modalloy.demo import merged

CLIENTS = 8
TOPICS = "sea forest desert city moon river island mountain castle garden train harbour winter market library volcano".split()  # noqa: SIM905
AIMS = {"batching": 3.0, "second turn": 0.3, "overhead": 1.05}
Parts = list[dict[str, Any]]


class Server:
    """The command, and requests to it."""

    def __init__(self, process: "subprocess.Popen[str]", port: int) -> None:
        self.process, self.port = process, port

    def ask(self, messages: Any, tokens: int, body: bytes | None = None, *, whole: bool = False) -> dict[str, Any]:
        """The answer, and its seconds; `whole`: of as many tokens as were asked for, past its end."""
        asked = {"model": "demo", "messages": messages, "max_tokens": tokens, "ignore_eos": whole}
        begin = time.perf_counter()
        connection = HTTPConnection("127.0.0.1", self.port, timeout=300)
        connection.request(
            "POST", "/v1/chat/completions", body or json.dumps(asked), {"Content-Type": "application/json"}
        )
        got = connection.getresponse()
        found: dict[str, Any] = json.loads(got.read()) | {"status": got.status}
        connection.close()
        return found | {"seconds": time.perf_counter() - begin}

    @property
    def cpu_seconds(self) -> float:
        """That the server and its children have used: other programs on the machine change the clock's figures, not these."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")

    @property
    def resident_bytes(self) -> int:
        """Of the server's own process."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found
        return int(found[1]) * 1024


@contextmanager
def server() -> Iterator[Server]:
    command = [sys.executable, "-m", "modalloy.cli", "serve", "--demo", "--no-open", "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if found := re.match(r"serving  http://127\.0\.0\.1:(\d+)", line):
                break
        else:
            raise RuntimeError("the server did not start")
        one = Server(process, int(found[1]))
        while True:
            try:
                one.ask(user([text("hello")]), 1)
                break
            except ConnectionRefusedError:
                time.sleep(0.1)
        yield one
    finally:
        process.terminate()
        process.wait()


def user(parts: Parts) -> list[dict[str, Any]]:
    return [{"role": "user", "content": parts}]


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def picture(seed: int) -> tuple[dict[str, Any], Image.Image]:
    """A picture that nobody has seen, of a sample."""
    pixels = np.asarray(Image.open(builtin.SAMPLES / "horse.webp").convert("RGB")).copy()
    pixels[:8] = np.random.default_rng(seed).integers(0, 255, pixels[:8].shape)
    made, file = Image.fromarray(pixels), io.BytesIO()
    made.save(file, "PNG")
    return url("image_url", file.getvalue()), made


def sound(seed: int) -> dict[str, Any]:
    """A sound that nobody has heard, of a sample."""
    samples, rate = soundfile.read(builtin.SAMPLES / "dog.flac", dtype="float32")
    noise = np.random.default_rng(seed).standard_normal(samples.shape).astype(np.float32)
    file = io.BytesIO()
    soundfile.write(file, samples + noise / 1000, rate, format="WAV")
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(file.getvalue()).decode(), "format": "wav"}}


def url(kind: str, data: bytes) -> dict[str, Any]:
    return {"type": kind, kind: {"url": f"data:application/octet-stream;base64,{base64.b64encode(data).decode()}"}}


def stories(round_: int) -> list[Parts]:
    """Questions with long answers, each round others."""
    names = random.Random(round_).sample(TOPICS, CLIENTS)
    return [[text(f"Write a long story, number {round_}, about a {name} and all who live there.")] for name in names]


def mixes(round_: int) -> list[Parts]:
    """Every mix of media, each round other ones."""
    found: list[Parts] = []
    for index in range(CLIENTS):
        seed = round_ * CLIENTS + index
        media = [
            *([picture(seed)[0]] if index & 1 else []),
            *([sound(seed)] if index & 2 else []),
            *([url("point_cloud_url", (builtin.SAMPLES / "car.npy").read_bytes())] if index & 4 else []),
        ]
        found.append([*media, text(f"Describe it in {seed} words, and tell a story of it.")])
    return found


def batching(one: Server, questions: Any, rounds: int, tokens: int) -> dict[str, Any]:
    """Tokens a second of one client and of several, by rounds."""
    alone, together, cpu, equal = [], [], [], []
    for round_ in range(rounds):
        given = questions(round_)
        begin, cpu_begin = time.perf_counter(), one.cpu_seconds
        first = [one.ask(user(parts), tokens, whole=True) for parts in given]
        alone.append(made(first) / (time.perf_counter() - begin))
        cpu_alone = made(first) / (one.cpu_seconds - cpu_begin)
        given = questions(1000 + round_)  # others, so that nothing is known of them
        with ThreadPoolExecutor(CLIENTS) as pool:
            begin, cpu_begin = time.perf_counter(), one.cpu_seconds
            found = list(pool.map(lambda parts: one.ask(user(parts), tokens, whole=True), given))
            together.append(made(found) / (time.perf_counter() - begin))
        cpu.append(made(found) / (one.cpu_seconds - cpu_begin) / cpu_alone)
        equal += [
            said(answer) == said(one.ask(user(parts), tokens, whole=True))
            for answer, parts in zip(found, given, strict=True)
        ]
    ratios = [many / single for many, single in zip(together, alone, strict=True)]
    return {
        "one_client_tokens_per_s": statistics.median(alone),
        "clients_tokens_per_s": statistics.median(together),
        "ratio": statistics.median(ratios),
        "cpu_ratio": statistics.median(cpu),
        "tokens_an_answer": made(found) / len(found),
        "equal_answers": f"{sum(equal)} of {len(equal)}",
    }


def made(answers: Sequence[dict[str, Any]]) -> int:
    return sum(int(answer["usage"]["completion_tokens"]) for answer in answers)


def said(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


def second_turn(one: Server, rounds: int) -> dict[str, float]:
    """Seconds to the first token of first and second turns."""
    first, second, reused = [], [], []
    for round_ in range(rounds):
        seed = 10_000 + round_
        rules = f"You are helper {seed}. " + "Answer in few words, and say only what you see and hear. " * 8
        turns = [{"role": "system", "content": rules}, *user([picture(seed)[0], sound(seed), text("What is this?")])]
        begun = one.ask(turns, 8)
        turns += [{"role": "assistant", "content": said(begun)}, *user([text("What makes this sound?")])]
        going_on = one.ask(turns, 8)
        first.append(begun["modalloy"]["time_to_first_token_s"])
        second.append(going_on["modalloy"]["time_to_first_token_s"])
        reused.append(going_on["modalloy"]["reused_tokens"] / going_on["usage"]["prompt_tokens"])
    return {
        "first_s": statistics.median(first),
        "second_s": statistics.median(second),
        "ratio": statistics.median(b / a for a, b in zip(first, second, strict=True)),
        "reused": statistics.median(reused),
    }


def overhead(one: Server, rounds: int, tokens: int) -> dict[str, float]:
    """Seconds of answers, by the server and by `reply` in this process, in turns."""
    chat = load_model(merged())
    chat.ask("hello", max_new_tokens=2)
    ours: dict[str, list[float]] = {"text": [], "picture": []}
    theirs: dict[str, list[float]] = {"text": [], "picture": []}
    cpu: dict[str, list[float]] = {"text": [], "picture": []}
    for round_ in range(rounds):
        part, medium = picture(20_000 + round_)
        words = f"Write a long story, number {round_}, about a {TOPICS[round_ % len(TOPICS)]} in the north."
        for name, parts, own in (("text", [], []), ("picture", [part], [{"type": "image", "image": medium}])):
            cpu_begin = one.cpu_seconds
            served = one.ask(user([*parts, text(words)]), tokens)
            cpu_ours = one.cpu_seconds - cpu_begin
            begin, cpu_begin = time.perf_counter(), time.process_time()
            reply = chat.reply(user([*own, text(words)]), max_new_tokens=tokens)
            cpu[name].append(cpu_ours / (time.process_time() - cpu_begin))
            theirs[name].append((time.perf_counter() - begin) / reply.new_tokens)
            ours[name].append(served["seconds"] / made([served]))
            assert said(served) == reply.answer
    ratios = {name: statistics.median(a / b for a, b in zip(ours[name], theirs[name], strict=True)) for name in ours}
    cpu_ratios = {f"{name}_cpu_ratio": statistics.median(own) for name, own in cpu.items()}
    return (
        {f"{name}_ratio": ratio for name, ratio in ratios.items()}
        | cpu_ratios
        | {"chat_text_s_per_token": statistics.median(theirs["text"])}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer, where its length is chosen")
    args = parser.parse_args()
    rounds = args.rounds
    with server() as one:
        one.ask(user([picture(1)[0], sound(1), text("What is this?")]), 4)  # decoders are loaded
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "text": lambda: batching(one, stories, rounds, args.tokens),
            "media": lambda: batching(one, mixes, rounds, args.tokens),
            "second_turn": lambda: second_turn(one, rounds),
            "overhead": lambda: overhead(one, rounds, args.tokens),
        }
        found: dict[str, Any] = {}
        for name, measure in parts.items():
            found[name] = measure()
            print(f"{name}: {json.dumps(found[name])}", file=sys.stderr, flush=True)
    rows = [
        *(
            [
                f"8 clients, {name}",
                f"{found[name]['ratio']:.2f} × one client's tokens/s ({found[name]['cpu_ratio']:.2f} × its tokens/CPU s)",
                f"≥ {AIMS['batching']}",
            ]
            for name in ("text", "media")
        ),
        [
            "second turn",
            f"{found['second_turn']['ratio']:.2f} × the first's time to a token",
            f"≤ {AIMS['second turn']}",
        ],
        [
            "overhead, text",
            f"{found['overhead']['text_ratio']:.3f} × chat's seconds ({found['overhead']['text_cpu_ratio']:.3f} × its CPU s)",
            f"≤ {AIMS['overhead']}",
        ],
        [
            "overhead, picture",
            f"{found['overhead']['picture_ratio']:.3f} × chat's seconds ({found['overhead']['picture_cpu_ratio']:.3f} × its CPU s)",
            f"≤ {AIMS['overhead']}",
        ],
    ]
    print(table(["", "measured", "aim"], rows))
    print(json.dumps({"benchmark": "serve"} | found | {"machine": machine()}))


if __name__ == "__main__":
    main()

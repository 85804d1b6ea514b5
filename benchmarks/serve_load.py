"""Does `modalloy serve` stand what strangers send? The merge of the built-in specialists, asked over the loopback.

    python benchmarks/serve_load.py [--requests 200] [--questions 2] [--long 1000]

- faults: `--requests` requests of 16 clients at once, a third of them hostile (HOSTILE: bombs, lies in headers, wrong types,
  oversize, half-sent bodies, clients that go away in mid-answer). The others ask about every mix of media; each answer must be
  the greedy one of `ChatModel.reply`, alone, in another process. Each hostile one must get the status that is expected.
- memory: `--long` requests of the same kinds with new media, and the server's memory, open files, threads and children after
  each tenth; `--long 0` leaves it out. Keys and values of earlier turns, and media, are kept on purpose, up to limits, and are
  counted apart.

Prints a table, then one JSON document as its last line.
"""

import argparse
import base64
import io
import itertools
import json
import re
import socket
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
from measuring import machine, table
from PIL import Image
from serve import Parts, Server, picture, server, sound, text, url, user

from modalloy import builtin, load_model
from modalloy.demo import merged
from modalloy.model.chat import ChatModel, user_message

CLIENTS = 16
TOKENS = 8  # of an answer
SHOWN = {"image": "horse.webp", "audio": "horse.flac", "video": "horse-animated.webp", "point": "dog.npy"}
MIXES = [names for count in range(5) for names in itertools.combinations(SHOWN, count)]
QUESTIONS = ("What is this?", "Which is it: a pig, a ship, a horse or a drum?")
CHAT = "/v1/chat/completions"
MANY = 64_000_001  # bytes: more than a body may have


def sample(modality: str) -> dict[str, Any]:
    """A sample as a part of a message."""
    return url(f"{'point_cloud' if modality == 'point' else modality}_url", file_of(modality).read_bytes())


def file_of(modality: str) -> Path:
    return builtin.SAMPLES / SHOWN[modality]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def wide_png() -> bytes:
    """3.6 thousand million pixels in some kilobytes."""
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(7501 * 2000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def early_jpeg() -> bytes:
    """A picture with an end marker in its midst."""
    file = io.BytesIO()
    Image.open(builtin.SAMPLES / "horse.webp").convert("RGB").save(file, "JPEG")
    return file.getvalue()[: len(file.getvalue()) // 2].rstrip(b"\xff") + b"\xff\xd9"


def many_points() -> bytes:
    """Three million points in some kilobytes."""
    file = io.BytesIO()
    np.savez_compressed(file, points=np.zeros((3_000_000, 3), np.float32))
    return file.getvalue()


def pickled_points() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], object), allow_pickle=True)
    return file.getvalue()


def long_wav() -> bytes:
    """A sound whose header says that it lasts three hours."""
    head = (b"RIFF", 10_836, b"WAVE", b"fmt ", 16, 1, 1, 1, 1, 1, 8, b"data", 10_800)
    return struct.pack("<4sI4s4sIHHIIHH4sI", *head) + bytes(10_800)


def asked(parts: Parts, **options: Any) -> bytes:
    return json.dumps({"model": "demo", "messages": user(parts), "max_tokens": TOKENS} | options).encode()


def said(data: bytes, kind: str = "image_url") -> bytes:
    return asked([url(kind, data), text("What is this?")])


# name: bytes of a body, and the status that it gets
BODIES: dict[str, tuple[Callable[[], bytes], int]] = {
    "no JSON": (lambda: b"{", 400),
    "nesting": (lambda: b'{"model": ' + b"[" * 1_000_000, 400),
    "invalid UTF-8": (lambda: b'{"model": "\xff\xfe"}', 400),
    "infinity": (lambda: b'{"model": "demo", "messages": [], "temperature": 1e999}', 400),
    "wrong types": (lambda: b'{"model": "demo", "messages": {"role": 3}}', 400),
    "unknown model": (lambda: asked([text("x")], model="other"), 404),
    "a file": (lambda: asked([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]), 400),
    "another host": (lambda: asked([{"type": "image_url", "image_url": {"url": "https://127.0.0.1/a"}}]), 400),
    "too many media": (lambda: asked([url("image_url", b"x")] * 33), 400),
    "pixel bomb": (lambda: said(wide_png()), 400),
    "early JPEG": (lambda: said(early_jpeg()), 400),
    "a sound as a picture": (lambda: said((builtin.SAMPLES / "dog.flac").read_bytes()), 400),
    "point bomb": (lambda: said(many_points(), "point_cloud_url"), 400),
    "pickle": (lambda: said(pickled_points(), "point_cloud_url"), 400),
    "lying WAV": (lambda: said(long_wav(), "audio_url"), 400),
    "long answer": (lambda: asked([text("x")], max_tokens=10**8), 400),
}


def raw(port: int, head: str, body: bytes = b"", *, wait: bool = True) -> int:
    """Status of what is no whole request; 0 if its answer is not waited for."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        begin = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n{head}\r\n"
        with suppress(BrokenPipeError, ConnectionResetError):  # it was refused before all was sent
            connection.sendall(begin.encode() + body)
        if not wait:
            return 0
        match = re.match(rb"HTTP/1\.1 (\d+)", connection.recv(64))
        return int(match[1]) if match else -1


def gone(port: int) -> int:
    """A client that goes away in mid-answer."""
    connection = HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request(
        "POST", CHAT, asked([text("A long story?")], stream=True, max_tokens=200, ignore_eos=True), JSON_HEADER
    )
    connection.getresponse().read(300)
    connection.close()
    return 0


JSON_HEADER = {"Content-Type": "application/json"}
# name: the request, and the status that it gets; 0: nobody waits for one
RAW: dict[str, tuple[Callable[[int], int], int]] = {
    "declared oversize": (lambda port: raw(port, f"Content-Length: {MANY}\r\n", b"{"), 413),
    "undeclared oversize": (lambda port: raw(port, "Transfer-Encoding: chunked\r\n", chunks()), 413),
    "two lengths": (lambda port: raw(port, "Content-Length: 2\r\nContent-Length: 3\r\n", b"{}"), 400),
    "negative length": (lambda port: raw(port, "Content-Length: -1\r\n", b"{}"), 400),
    "half a body": (lambda port: raw(port, "Content-Length: 5000\r\n", b'{"model":', wait=False), 0),
    "gone in mid-answer": (gone, 0),
}
HOSTILE = [*BODIES, *RAW]


def chunks() -> bytes:
    piece = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
    return piece * (MANY // 0x100000 + 1)


def hostile(one: Server, name: str) -> tuple[int, int]:
    """Status of a hostile request, and the one that is expected."""
    if name in RAW:
        request, wanted = RAW[name]
        return request(one.port), wanted
    body, wanted = BODIES[name]
    return int(one.ask(None, 1, body())["status"]), wanted


def replies(chat: ChatModel, questions: int = len(QUESTIONS)) -> dict[tuple[tuple[str, ...], str], str]:
    """Greedy answers of `ChatModel.reply` to each question about each mix."""
    return {
        (mix, question): chat.reply(
            user_message(question, [(name, file_of(name)) for name in mix]), max_new_tokens=TOKENS
        ).answer
        for mix in MIXES
        for question in QUESTIONS[:questions]
    }


def faults(one: Server, requests: int, answers: dict[tuple[tuple[str, ...], str], str]) -> dict[str, Any]:
    """What became of each request."""
    asks = list(answers)
    statuses: Counter[str] = Counter()
    wrong: list[str] = []

    def send(index: int) -> bool:
        if index % 3 == 2:
            name = HOSTILE[index // 3 % len(HOSTILE)]
            status, wanted = hostile(one, name)
            statuses[str(status)] += 1
            if status != wanted:
                wrong.append(f"{name}: {status}, not {wanted}")
            return False
        mix, question = asks[(index - index // 3) % len(asks)]
        found = one.ask(user([*map(sample, mix), text(question)]), TOKENS)
        statuses[str(found["status"])] += 1
        content = found["choices"][0]["message"]["content"] if found["status"] == 200 else found
        if content != answers[mix, question]:
            wrong.append(f"{mix} {question}: {content}")
        return True

    begin = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        well_formed = sum(pool.map(send, range(requests)))
    return {
        "requests": requests,
        "clients": CLIENTS,
        "well_formed": well_formed,
        "hostile": requests - well_formed,
        "kinds": len(HOSTILE),
        "statuses": dict(sorted(statuses.items())),
        "wrong": wrong,
        "seconds": time.perf_counter() - begin,
        "under_way_after": settled(one),
    }


def settled(one: Server) -> float:
    """Requests that are still under way once clients that went away should have been noticed: 0."""
    for _ in range(200):
        if not (left := figure(one, "modalloy_requests_under_way") + figure(one, "modalloy_rows")):
            break
        time.sleep(0.1)
    return left


def figure(one: Server, name: str) -> float:
    """A metric, summed over its labels."""
    connection = HTTPConnection("127.0.0.1", one.port, timeout=60)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{"))


def held(one: Server) -> dict[str, int]:
    """What the server holds."""
    place = Path(f"/proc/{one.process.pid}")
    children = (place / f"task/{one.process.pid}/children").read_text().split()
    threads = [path.read_text().split() for path in place.glob("task/*/children")]
    return {
        "resident_bytes": one.resident_bytes,
        "kept_bytes": int(figure(one, "modalloy_kept_bytes") + figure(one, "modalloy_known_bytes")),
        "files": len(list((place / "fd").iterdir())),
        "threads": len(list((place / "task").iterdir())),
        "children": len({*children, *itertools.chain(*threads)}),
        "folders": len(list(Path(tempfile.gettempdir()).glob("modalloy-serve-*"))),
    }


def memory(one: Server, requests: int) -> dict[str, Any]:
    """What the server holds after each tenth of many requests: a third text, a third with new media, a third hostile."""
    calm = [name for name in HOSTILE if name != "undeclared oversize"]  # which is 64 MB to send
    statuses: Counter[str] = Counter()

    def send(index: int) -> str:
        if index % 3 == 2:
            return str(hostile(one, calm[index // 3 % len(calm)])[0])
        parts: Parts = []
        if index % 3 == 1:
            kind = index // 3 % 3
            parts = [picture(30_000 + index)[0]] if kind == 0 else [sound(index)] if kind == 1 else [cloud(index)]
        return str(one.ask(user([*parts, text(f"What is this, number {index}?")]), 4)["status"])

    marks = []
    tenth = max(1, requests // 10)
    with ThreadPoolExecutor(CLIENTS) as pool:
        for begin in range(0, requests, tenth):
            statuses.update(pool.map(send, range(begin, begin + tenth)))
            settled(one)
            marks.append(held(one))
            print(begin + tenth, marks[-1], file=sys.stderr, flush=True)
    own = [mark["resident_bytes"] - mark["kept_bytes"] for mark in marks]
    return {
        "requests": requests,
        "marks": marks,
        "statuses": dict(sorted(statuses.items())),
        "ratio": marks[-1]["resident_bytes"] / marks[len(marks) * 4 // 5 - 1]["resident_bytes"],
        "ratio_without_kept": own[-1] / own[0],
    }


def cloud(seed: int) -> dict[str, Any]:
    """A point cloud that nobody has seen, of a sample."""
    points = np.load(builtin.SAMPLES / "car.npy")
    file = io.BytesIO()
    np.save(file, (points + np.random.default_rng(seed).normal(0, 0.001, points.shape)).astype(np.float32))
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "point_cloud_url", "point_cloud_url": {"url": f"data:application/octet-stream;base64,{data}"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--questions", type=int, default=len(QUESTIONS), help="about each mix of media")
    parser.add_argument("--long", type=int, default=1000)
    args = parser.parse_args()
    answers = replies(load_model(merged()), args.questions)
    with server() as one:
        found = {"faults": faults(one, args.requests, answers)}
        print(json.dumps(found), file=sys.stderr, flush=True)
        if args.long:
            found["memory"] = memory(one, args.long)
        alive = one.process.poll() is None
    faulty = found["faults"]
    rows = [
        ["server", "alive" if alive else "ended"],
        [f"{faulty['well_formed']} well-formed, {faulty['hostile']} hostile", f"{len(faulty['wrong'])} answered wrong"],
    ]
    if long := found.get("memory"):
        rows += [
            [f"memory over {long['requests']}", f"{long['ratio']:.3f} × of that after four fifths"],
            ["", f"{long['ratio_without_kept']:.3f} × of that after a tenth, without what is kept on purpose"],
        ]
    print(table(["", "measured"], rows))
    print(json.dumps({"benchmark": "serve_load", "alive": alive} | found | {"machine": machine()}))
    sys.exit(int(bool(faulty["wrong"]) or not alive))


if __name__ == "__main__":
    main()

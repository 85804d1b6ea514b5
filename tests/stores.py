"""A local stand-in of a web server and of the hub: files by ranges, counted, and the faults that networks have."""

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" * 6 + "c0ff"
Fault = Callable[
    [str, int], str | None
]  # of a path and how often it was asked for: "cut", "short", "shifted", "slow", "busy"


@dataclass
class FileServer:
    """What is served, what was sent, and what goes wrong."""

    files: dict[str, bytes] = field(default_factory=dict)
    sent: Counter[str] = field(default_factory=Counter)  # bytes of bodies, by path
    asked: Counter[str] = field(default_factory=Counter)  # ranges and files
    fault: Fault = lambda path, count: None
    tags: dict[int, tuple[bytes, str]] = field(default_factory=dict)
    url: str = ""
    gives_ranges: bool = True
    tag_form: str = '"{}"'  # of the etag; "" for none
    broken: Counter[str] = field(default_factory=Counter)  # answers to whatever request that are errors, by path

    def tag(self, data: bytes) -> str:
        """The etag of a content, hashed once."""
        known, tag = self.tags.get(id(data), (b"", ""))
        if known is not data:
            tag = self.tag_form.format(hashlib.sha256(data).hexdigest()[:16])
            self.tags[id(data)] = data, tag
        return tag

    def add(self, folder: Path, name: str) -> str:
        """Serve a folder's files below `name`; returns the address."""
        for path in folder.iterdir():
            self.files[f"/{name}/{path.name}"] = path.read_bytes()
        return f"{self.url}/{name}"

    def add_model(self, folder: Path, repo: str) -> str:
        """Serve a folder as a repository of the hub."""
        for path in folder.iterdir():
            self.files[f"/{repo}/resolve/{COMMIT}/{path.name}"] = path.read_bytes()
        return f"hf://{repo}"

    def listed(self, repo: str) -> list[dict[str, object]]:
        """The hub's list of a repository's files."""
        root = f"/{repo}/resolve/{COMMIT}/"
        found = []
        for path, data in self.files.items():
            if path.startswith(root):
                sha256 = hashlib.sha256(data).hexdigest()
                entry: dict[str, object] = {"type": "file", "path": path.removeprefix(root), "size": len(data)}
                entry["oid"] = hashlib.sha1(data).hexdigest()
                if path.endswith(".safetensors"):
                    entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 100}
                found.append(entry)
        return found


@contextmanager
def serving() -> Iterator[FileServer]:
    """A server on a free port of this machine, for the time of the block."""
    server = FileServer()
    web = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"store": server}))
    web.daemon_threads = True
    server.url = f"http://127.0.0.1:{web.server_address[1]}"
    thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        web.shutdown()
        web.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    store: FileServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Nothing is printed."""

    def do_HEAD(self) -> None:
        """Size and version of a file."""
        self._answer(body=False)

    def do_GET(self) -> None:
        """A file, a range of it, or what the hub tells."""
        self._answer(body=True)

    def do_POST(self) -> None:
        """What the hub tells of given paths."""
        wanted = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        repo = "/".join(self.path.split("/")[3:5])
        paths = wanted["paths"] if isinstance(wanted["paths"], list) else [wanted["paths"]]
        self._json([one for one in self.store.listed(repo) if one["path"] in paths])

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/api/models/"):
            repo, rest = "/".join(path.split("/")[3:5]), path.split("/")[5:]
            listed = self.store.listed(repo)
            if not listed:
                self._empty(404)
            elif rest[:1] == ["tree"]:
                self._json(listed)
            else:
                self._json({"id": repo, "sha": COMMIT, "siblings": [{"rfilename": one["path"]} for one in listed]})
            return
        data = self.store.files.get(path)
        if data is None:
            self._empty(404)
            return
        if self.store.broken[path]:
            self.store.broken[path] -= 1
            self._empty(503)
            return
        tag = self.store.tag(data)
        if self.headers.get("If-Match") not in (None, tag):
            self._empty(412)
            return
        begin, end, status = 0, len(data), 200
        if (given := self.headers.get("Range")) and self.store.gives_ranges:
            first, _, last = given.removeprefix("bytes=").partition("-")
            begin, end, status = int(first), min(int(last) + 1 if last else len(data), len(data)), 206
        fault = None
        if body:
            self.store.asked[path] += 1
            fault = self.store.fault(path, self.store.asked[path])
        if fault in ("busy", "forbidden"):
            self._empty(503 if fault == "busy" else 403)
            return
        if fault == "shifted":
            begin, end = max(0, begin - 8), max(0, begin - 8) + end - begin
        part = data[begin:end] if body else b""
        if fault == "short":
            part = part[: len(part) // 2]
        self.send_response(status)
        if tag:
            self.send_header("ETag", tag)
        if self.store.gives_ranges:
            self.send_header("Accept-Ranges", "bytes")
        if status == 206:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part) if body else end - begin))
        self.end_headers()
        if fault == "cut":
            self.wfile.write(part[: len(part) // 2])
            self.store.sent[path] += len(part) // 2
            self.close_connection = True
            self.connection.close()
            return
        if fault == "slow":
            for start in range(0, len(part), len(part) // 8 + 1):
                self.wfile.write(part[start : start + len(part) // 8 + 1])
                time.sleep(0.01)
        else:
            self.wfile.write(part)
        self.store.sent[path] += len(part)

    def _json(self, content: object) -> None:
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _empty(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

"""`modalloy merge --push-to-hub` against a local stand-in that speaks the hub's protocol."""

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from modalloy.cli import app
from modalloy.errors import OutputError
from modalloy.outputs.push import check_target, push

WriteRecipe = Callable[..., Path]


class StandIn(ThreadingHTTPServer):
    """Takes repositories and commits; `fails` makes commits fail."""

    def __init__(self) -> None:
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.fails = False
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def log_message(self, *args: Any) -> None:
        """Nothing."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.headers["Authorization"] == "Bearer hf_secret"
        if self.path.endswith("/repos/create"):
            self.server.created.append(json.loads(body))
            self.answer({"url": "https://huggingface.co/owner/merged", "id": "owner/merged", "name": "owner/merged"})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})
        elif "/validate-yaml" in self.path:
            self.answer({"errors": [], "warnings": []})
        elif "/commit/" in self.path and not self.server.fails:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.answer(
                {"success": True, "commitOid": "0" * 40, "commitUrl": "https://huggingface.co/owner/merged/commit/0"}
            )
        else:
            self.send_error(403)

    def do_GET(self) -> None:
        self.answer({"id": "owner/merged", "sha": "0" * 40, "siblings": []})

    def answer(self, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    server = StandIn()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield server
    server.shutdown()
    server.server_close()


def test_a_merge_is_uploaded_whole(
    hub: StandIn, write_recipe: WriteRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["merge", str(write_recipe()), "-o", str(out), "--push-to-hub", "owner/merged", "--private", "--json"]
    app(command, standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["pushed"] == "https://huggingface.co/owner/merged/commit/0"
    assert len(hub.created) == 1 and hub.created[0]["name"] == "merged" and "private" in json.dumps(hub.created[0])
    here = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert here.pop("sources.json") and hub.files == here  # byte for byte, but for where the inputs were
    assert str(tmp_path).encode() not in hub.files["manifest.json"]


def test_a_failed_upload_leaves_the_result(hub: StandIn, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    hub.fails = True
    with pytest.raises(
        OutputError, match=r"owner/merged: the upload failed \(.*403.*\); the result is whole in .*hf upload"
    ):
        app(["merge", str(write_recipe()), "-o", str(out), "--push-to-hub", "owner/merged"], standalone_mode=False)
    assert (out / "manifest.json").is_file()
    hub.fails = False
    assert push(out, "owner/merged") and "adapter_model.safetensors" in hub.files


def test_what_cannot_be_uploaded_is_refused_before_the_merge(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OutputError, match=r"--push-to-hub a/b/c: not a repository's name"):
        check_target("a/b/c")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(OutputError, match=r"there is no token of the hub; log in"):
        app(["merge", str(write_recipe()), "-o", str(tmp_path / "out"), "--push-to-hub", "o/n"], standalone_mode=False)
    assert not (tmp_path / "out").exists()

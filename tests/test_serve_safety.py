"""What strangers send `modalloy serve`: each is one line of refusal, and the next request is answered."""

import asyncio
import io
import socket
import struct
import sys
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpcore2
import pytest
from conftest import write_omni
from serving import CHAT, OTHER, PICTURE, RESPONSES, SOUND, Site, body, encoded, image, site, sound, text

from modalloy import cli
from modalloy.errors import MediaError, ModalloyError
from modalloy.model.chat import ChatModel
from modalloy.model.load import load_model
from modalloy.serve import app, guard, preparing, remote
from modalloy.serve import server as server_module
from modalloy.serve.options import listening, read_keys
from modalloy.serve.remote import Hosts, is_public, public_address

KEYS = ("a-key-of-tests-1", "a-key-of-tests-2")
ASK = body(text("what is this ?"))


@pytest.fixture(scope="module")
def chat(base: Path, tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    return load_model(write_omni(tmp_path_factory.mktemp("safe"), base, ("vision", "audio", "video", "point")))


@pytest.fixture(scope="module")
def server(chat: ChatModel) -> Iterator[Site]:
    with site({"merged": chat}) as found:
        yield found


def png(width: int, height: int) -> bytes:
    """A PNG of very many pixels in few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes((width // 8 + 1) * min(height, 2000)), 9)
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def wav(seconds: int) -> bytes:
    """A sound that says it is long."""
    head = struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + seconds, b"WAVE", b"fmt ", 16, 1, 1, 1, 1, 1, 8, b"data", seconds
    )
    return head + bytes(seconds)


WRONG: dict[str, tuple[Any, str]] = {
    "no json": (b"{", "no JSON"),
    "not utf-8": (b'{"model": "\xff"}', "no JSON"),
    "a list": ([], "valid dictionary"),
    "deep": (b"[" * 100_000, "no JSON"),
    "very deep": (b'{"model": ' + b"[" * 1_000_000, "no JSON"),
    "a number without end": (b'{"model": "merged", "seed": ' + b"9" * 1_000_000 + b"}", "no JSON|seed"),
    "infinite": (b'{"model": "merged", "temperature": Infinity, "messages": []}', "no JSON"),
    "no model": ({"messages": [{"role": "user", "content": "x"}]}, "model: Field required"),
    "no messages": ({"model": "merged"}, "messages: Field required"),
    "empty": (ASK | {"messages": []}, "messages: "),
    "a number": (ASK | {"messages": [{"role": "user", "content": 3}]}, r"messages\[0\].content"),
    "a role": (ASK | {"messages": [{"role": "god", "content": "x"}]}, r"messages\[0\].role: 'god' is none of"),
    "tokens as text": (ASK | {"max_tokens": "5"}, "max_tokens: "),
    "no tokens": (ASK | {"max_tokens": 0}, "max_tokens: "),
    "two limits": (ASK | {"max_completion_tokens": 5}, "differ"),
    "hot": (ASK | {"temperature": 3}, "temperature: "),
    "true": (ASK | {"temperature": True}, "temperature: "),
    "several": (ASK | {"n": 2}, "one answer is made"),
    "a form": (ASK | {"response_format": {"type": "json_object"}}, "answers are plain text"),
    "tools": (ASK | {"tools": [{"type": "function"}]}, "tools: not offered"),
    "a penalty": (ASK | {"presence_penalty": 1}, "only 0 is offered"),
    "top without": (ASK | {"top_logprobs": 2}, "needs logprobs"),
    "empty stop": (ASK | {"stop": [""]}, "stop: "),
    "no kind": (body({"text": "x"}), r"content\[0\]: has no type"),
    "a kind": (body({"type": "file", "file": {}}), "'file' is no kind of content"),
    "a surrogate": (body(text("\ud800")), "half a surrogate pair|no JSON"),
    "a path": (body({"type": "image_url", "image_url": {"url": "/etc/passwd"}}), "is no data: URL"),
    "a file": (body({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}), "is no data: URL"),
    "http": (body({"type": "image_url", "image_url": {"url": "http://example.org/a"}}), "is no data: URL"),
    "remote": (
        body({"type": "image_url", "image_url": {"url": "https://example.org/a"}}),
        "not fetched from other hosts",
    ),
    "not base64": (body({"type": "image_url", "image_url": {"url": "data:image/png,abc"}}), "not in base64"),
    "bad base64": (body({"type": "image_url", "image_url": {"url": "data:image/png;base64,a?"}}), "not in base64"),
    "nothing": (body({"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}), "is empty"),
    "no url": (body({"type": "image_url", "image_url": {}}), "give {'image_url'"),
    "no sound": (body({"type": "input_audio", "input_audio": "x"}), "give {'input_audio'"),
    "another sense": (body({"type": "smell_url", "smell_url": {"url": "data:a;base64,AAAA"}}), "takes no smell input"),
    "a picture's name": (body(image(b"no picture at all")), r"messages\[0\].content\[0\]: not a readable image"),
    "a sound as picture": (body(image(SOUND)), "not a readable image"),
    "a picture as sound": (body(sound(PICTURE)), "not a readable sound|no sound track"),
    "half a picture": (body(image(PICTURE.read_bytes()[:300])), r"messages\[0\]"),
    "many pixels": (body(image(png(60_000, 60_000))), "more pixels than the limit of 25000000"),
    "a long sound": (body(sound(wav(10_000))), "more than the limit of 600 s"),
    "many media": (body(*[image(b"x")] * 40), "more than 32 media"),
    "in an answer": (ASK | {"messages": [{"role": "assistant", "content": [image(PICTURE)]}]}, "only a user's message"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_is_one_line(server: Site, name: str) -> None:
    import re

    content, told = WRONG[name]
    status, headers, found = server.ask(CHAT, content)
    error = found["error"]
    assert status == 400 and error["type"] == "invalid_request_error", found
    assert re.search(told, error["message"]) and "\n" not in error["message"]
    assert "/tmp" not in error["message"] and "modalloy-serve" not in error["message"]
    assert headers["content-security-policy"].startswith("default-src 'none'")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"model": "merged", "input": "x", "previous_response_id": "resp_1"}, "not stored"),
        ({"model": "merged", "input": "x", "text": {"format": {"type": "json_schema"}}}, "plain text"),
        ({"model": "merged", "input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "file_url"),
        ({"model": "merged", "input": [{"type": "function_call_output", "output": "x"}]}, "input"),
        ({"model": "merged", "input": "x", "background": True}, "background"),
    ],
)
def test_a_wrong_response_request_is_one_line(server: Site, content: Any, told: str) -> None:
    status, _, found = server.ask(RESPONSES, content)
    assert status == 400 and told in found["error"]["message"]


def test_routes_hosts_and_pages_of_others(server: Site) -> None:
    assert server.ask("/v1/nothing", method="GET")[0] == 404
    status, _, found = server.ask(CHAT, method="GET")
    assert status == 405 and found["error"]["message"] == f"GET {CHAT}: method not allowed"
    assert server.ask("/v1/nothing", method="GET")[0] == 404 and server.ask("/", ASK)[0] == 405
    assert server.ask("/docs", method="GET")[0] == server.ask("/openapi.json", method="GET")[0] == 404
    for path in (
        "/%00",
        "/samples/%00",
        "/v1/models/%00",
        "//etc/passwd",
        "/samples/%2e%2e/__init__.py",
        "/" + "x" * 5000,
    ):
        assert server.ask(path, method="GET")[0] == 404, path
    assert server.ask(CHAT, ASK, headers={"Origin": "http://["})[0] == 403
    for host in ("evil.example:8000", "127.0.0.1.evil.example", "", "[::1"):
        status, _, found = server.ask(CHAT, ASK, headers={"Host": host})
        assert status == 403 and "Host" in found["error"]["message"]
    for host in ("localhost", "127.0.0.1:1", "[::1]:5"):
        assert server.ask("/health", method="GET", headers={"Host": host})[0] == 200
    assert server.ask(CHAT, ASK, headers={"Origin": "https://evil.example"})[0] == 403
    assert server.ask(CHAT, ASK, headers={"Origin": "null"})[0] == 403
    own = server.ask(CHAT, ASK, headers={"Origin": server.url})
    assert own[0] == 200 and "access-control-allow-origin" not in own[1] and own[1]["cache-control"] == "no-store"
    assert server.ask(CHAT, ASK, headers={"Content-Type": "text/plain"})[0] == 415
    status, headers, page = server.ask("/", method="GET")
    assert (
        status == 200
        and b"<title>modalloy</title>" in page
        and "script-src 'self'" in headers["content-security-policy"]
    )
    assert server.ask("/../server.py", method="GET")[0] == 404


def test_a_key_is_asked_for(chat: ChatModel, capfd: pytest.CaptureFixture[str]) -> None:
    with site({"merged": chat}, keys=KEYS) as server:
        for key in ("", "Bearer", "Bearer wrong", f"Basic {KEYS[0]}", f"Bearer {KEYS[0]}x", f"Bearer {KEYS[0][:-1]}"):
            status, headers, found = server.ask(CHAT, ASK, headers={"Authorization": key})
            assert status == 401 and headers["www-authenticate"] == "Bearer"
            assert found["error"]["code"] == "invalid_api_key" and KEYS[0] not in found["error"]["message"]
        for key in KEYS:
            assert server.ask(CHAT, ASK, headers={"Authorization": f"Bearer {key}"})[0] == 200
        assert server.ask("/metrics", method="GET")[0] == server.ask("/v1/models", method="GET")[0] == 401
        assert server.ask("/health", method="GET")[0] == server.ask("/", method="GET")[0] == 200
    assert not any(key in "".join(capfd.readouterr()) for key in KEYS)


def test_files_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\n\na-key-of-ours\n another-key \n")
    assert read_keys(path) == ("a-key-of-ours", "another-key")
    for content, told in (("# none\n", "holds no key"), ("short\n", "key 1 is shorter"), ("with a space\n", "key 1")):
        path.write_text(content)
        with pytest.raises(ModalloyError, match=told):
            read_keys(path)


def test_bodies_are_bounded(chat: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_BODY_BYTES", 10_000)
    monkeypatch.setattr(guard, "PAUSE_SECONDS", 0.5)
    with site({"merged": chat}) as server:
        status, _, found = server.ask(CHAT, body(text("x" * 20_000)))
        assert status == 413 and found["error"]["type"] == "invalid_request_error"
        # a length that lies: larger than what comes, and none at all
        assert b"413" in raw(server, b"Content-Length: 99999999999\r\n", b"{}")
        chunks = b"".join(b"1000\r\n" + b" " * 4096 + b"\r\n" for _ in range(8))
        unsaid = raw(server, b"Transfer-Encoding: chunked\r\n", chunks)
        assert b"413" in unsaid and b'"error":{"message":"the body has more than 10000 bytes' in unsaid
        assert b"408" in raw(server, b"Content-Length: 500\r\n", b'{"model": ')
        assert b"400" in raw(server, b"Content-Length: -5\r\n", b"{}")
        for _ in range(3):  # gone before all of it was sent
            raw(server, b"Content-Length: 5000\r\n", b'{"model": ', wait=False)
        assert server.ask(CHAT, ASK)[0] == 200
        monkeypatch.setattr(guard, "MAX_BODIES_BYTES", -1)
        status, headers, _ = server.ask(CHAT, ASK)
        assert status == 429 and headers["retry-after"] == "2"


def test_heads_are_bounded(chat: ChatModel, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(server_module, "HEAD_SECONDS", 1.0)
    with site({"merged": chat}) as server:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\n".encode()
        slow = socket.create_connection(("127.0.0.1", server.port), timeout=20)
        with slow, pytest.raises(OSError):  # the connection is ended under it
            for byte in head * 9:
                slow.sendall(bytes([byte]))
                time.sleep(0.02)
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as silent:
            assert silent.recv(1) == b""
        assert b"400" in raw(server, b"X: " + b"x" * 100_000 + b"\r\n", b"")[:20]
        both = raw(server, b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n")
        assert b"400" in both and b"exclude each other" in both
        for wrong in (b"Content-Length: 2\r\nContent-Length: 3\r\n", b"Transfer-Encoding: gzip, chunked\r\n"):
            assert raw(server, wrong, b"{}")[9:12] in (b"400", b"501"), wrong
        upgrade = {
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Key": "x",
            "Sec-WebSocket-Version": "13",
        }
        assert server.ask("/", method="GET", headers=upgrade)[0] == 200  # what is asked for is not, and the page is
        assert server.ask(CHAT, ASK)[0] == 200
    assert capfd.readouterr() == ("", "")


def test_a_client_that_takes_no_more_of_a_stream_gives_its_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "SEND_SECONDS", 0.05)
    freed: list[bool] = []
    running = SimpleNamespace(answer=SimpleNamespace(cancelled=False))

    async def events() -> AsyncIterator[dict[str, str]]:
        yield {"data": "x"}

    async def stuck(message: Any = None) -> Any:
        if message is None or message["type"] == "http.response.body":
            await asyncio.sleep(60)

    stream = app.Stream(events(), running, SimpleNamespace(free_place=lambda: freed.append(True)))
    asyncio.run(stream({"type": "http", "method": "POST"}, stuck, stuck))
    assert freed == [True] and running.answer.cancelled


def raw(server: Site, headers: bytes, content: bytes, *, wait: bool = True) -> bytes:
    """What the server answers to what is no whole request, as far as the end of its error."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        begin = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n".encode()
        connection.sendall(begin + headers + b"\r\n" + content)
        found = b""
        while wait and b"}}" not in found and b"Invalid" not in found and (piece := connection.recv(4096)):
            found += piece
        return found


def test_a_decoder_that_is_late_is_killed_and_the_next_picture_read(
    server: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "SECONDS", 0)
    status, _, found = server.chat(image(OTHER), text("x"))
    assert status == 400 and found["error"]["message"].startswith("messages[0].content[0]: was not decoded in 0 s")
    monkeypatch.undo()
    assert server.chat(image(OTHER), text("x"))[0] == 200


def test_a_third_of_the_requests_is_hostile_and_the_rest_is_right(
    chat: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every mix of media and every kind of hostile request, of 16 clients: what benchmarks/serve_load.py does to a real model."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import serve
    import serve_load

    with site({"demo": chat}) as server:
        one = serve.Server(None, server.port)
        found = serve_load.faults(one, 3 * len(serve_load.HOSTILE), serve_load.replies(chat, questions=1))
        assert server.figure('modalloy_requests_total{route="/v1/chat/completions",status="500"}') == 0
    assert not found["wrong"] and found["hostile"] == len(serve_load.HOSTILE) and found["under_way_after"] == 0
    assert found["statuses"]["200"] == found["well_formed"] == 2 * found["hostile"]


def test_hosts_that_media_may_come_from() -> None:
    hosts = Hosts(["media.example.org", "other.example.org:8443"])
    for url in (
        "https://evil.example.org/a",
        "https://media.example.org:8443/a",
        "https://media.example.org.evil.example/a",
        "https://user@media.example.org/a",
        "https://[::1]/a",
    ):
        with pytest.raises(MediaError, match=r"is not allowed|is no address"):
            hosts.fetch(url)
    for name in ("https://a.example", "a.example/b", "", "u@a.example", "a.example:x"):
        with pytest.raises(ModalloyError, match="is no host"):
            Hosts([name])


@pytest.mark.parametrize(
    ("address", "public"),
    [
        *((one, False) for one in ("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0")),
        *(
            (one, False)
            for one in ("100.64.0.1", "224.0.0.1", "255.255.255.255", "::1", "fe80::1%eth0", "fc00::1", "::")
        ),
        *((one, False) for one in ("::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "ff02::1")),
        *((one, True) for one in ("8.8.8.8", "2001:4860:4860::8888", "::ffff:8.8.8.8", "64:ff9b::808:808")),
    ],
)
def test_addresses_that_are_public(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_the_address_that_was_checked_is_the_one_that_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(*addresses: str) -> Callable[..., Any]:
        return lambda host, port, **_: [(0, 0, 0, "", (one, port)) for one in addresses]

    with pytest.raises(MediaError, match=r"is at 10\.0\.0\.1, which is not public"):
        public_address("media.example.org", 443, answers("8.8.8.8", "10.0.0.1"))
    asked: list[str] = []
    monkeypatch.setattr(httpcore2.SyncBackend, "connect_tcp", lambda self, host, port, **_: asked.append(host))
    remote._checked(httpcore2, answers("8.8.8.8")).connect_tcp("media.example.org", 443)
    assert asked == ["8.8.8.8"]
    with pytest.raises(MediaError):
        remote._checked(httpcore2, answers("::1")).connect_tcp("media.example.org", 443)
    assert asked == ["8.8.8.8"]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", None),
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\nContent-Length: 0\r\n\r\n", "answered 302"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "answered 404"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n" + b"x" * 50, "more than 20 bytes"),
        (b"no HTTP at all\r\n\r\n", "cannot be fetched"),
    ],
)
def test_what_a_host_answers(monkeypatch: pytest.MonkeyPatch, answer: bytes, told: str | None) -> None:
    monkeypatch.setattr(remote, "MAX_BYTES", 20)
    monkeypatch.setattr(remote, "_checked", lambda module: module.MockBackend([answer]))
    hosts = Hosts(["media.example.org"])
    if told is None:
        assert hosts.fetch("https://media.example.org/a?b=c") == b"hello"
    else:
        with pytest.raises(MediaError, match=told):
            hosts.fetch("https://media.example.org/a")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "no model is named"),
        (["x", "--host", "0.0.0.0"], "give --api-key-file, or say --no-key"),
        (["--model", "x"], "not of the form NAME=OUT"),
        (["x", "--model", "x=y"], "two models have this name"),
        (["x", "--allow-media-host", "https://a"], "is no host"),
    ],
)
def test_the_command_refuses_in_one_line(
    arguments: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["modalloy", "serve", *arguments, "--port", "0"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and told in said, said


@pytest.mark.parametrize("missing", ["fastapi", "sse_starlette"])
def test_a_missing_extra_is_one_line(
    missing: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)  # as if it were not installed
    monkeypatch.setattr(sys, "argv", ["modalloy", "serve", "x"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    said = f'error: {missing} is not installed, and this needs it; run pip install "modalloy[serve]"\n'
    assert capfd.readouterr().err == said


def test_a_port_that_is_taken_is_told_before_a_model_is_loaded(server: Site) -> None:
    with pytest.raises(ModalloyError, match="choose another --port"), listening("127.0.0.1", server.port):
        pass


def test_encoding_and_time_are_what_was_said() -> None:
    """The helpers of these tests make what they say: else the refusals above would be for another reason."""
    from PIL import Image

    with pytest.warns(Image.DecompressionBombWarning):
        assert Image.open(io.BytesIO(png(12_000, 12_000))).size == (12_000, 12_000)
    assert encoded(b"\0") == "AA==" and time.monotonic() > 0

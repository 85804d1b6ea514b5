"""`modalloy serve` by OpenAI's own client and by plain HTTP: answers are those of `chat`, alone, together and streamed."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import native_models
import numpy as np
import openai
import pytest
import test_native
from conftest import write_omni
from PIL import Image
from serving import CHAT, OTHER, PICTURE, SOUND, Site, body, encoded, image, site, sound, text, until

from modalloy import merge
from modalloy.cli.serve import shows_pages
from modalloy.model.chat import ChatModel, user_message
from modalloy.model.load import load_model
from modalloy.serve.queue import share

QUESTION = "what is this ? dog , cat"
MIXES: list[tuple[tuple[dict[str, Any], ...], dict[str, Path]]] = [
    ((), {}),
    ((image(PICTURE),), {"image": PICTURE}),
    ((sound(SOUND),), {"audio": SOUND}),
    ((image(OTHER), sound(SOUND)), {"image": OTHER, "audio": SOUND}),
]


@pytest.fixture(scope="module")
def omni(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_omni(tmp_path_factory.mktemp("serve"), base)


@pytest.fixture(scope="module")
def chat(omni: Path) -> ChatModel:
    return load_model(omni)


@pytest.fixture(scope="module")
def server(chat: ChatModel, base: Path) -> Iterator[Site]:
    with site({"merged": chat, "plain": load_model(base)}) as found:
        yield found


@pytest.fixture
def client(server: Site) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def wanted(chat: ChatModel, media: dict[str, Path], words: str = QUESTION, tokens: int = 12) -> str:
    return chat.reply(user_message(words, media.items()), max_new_tokens=tokens).answer


def messages(*parts: dict[str, Any]) -> Any:
    return [{"role": "user", "content": [*parts, text(QUESTION)]}]


@pytest.mark.parametrize(("parts", "media"), MIXES)
def test_the_clients_answers_are_those_of_chat(
    client: openai.OpenAI, chat: ChatModel, parts: tuple[dict[str, Any], ...], media: dict[str, Path]
) -> None:
    found = client.chat.completions.create(model="merged", messages=messages(*parts), max_completion_tokens=12)
    assert found.choices[0].message.content == wanted(chat, media)
    assert found.usage is not None and found.usage.prompt_tokens_details is not None
    reply = chat.reply(user_message(QUESTION, media.items()), max_new_tokens=12)
    assert found.usage.completion_tokens == reply.new_tokens
    details = found.usage.prompt_tokens_details.model_dump()
    assert {name: details[f"{name}_tokens"] for name in reply.tokens} == reply.tokens
    assert found.usage.prompt_tokens == sum(reply.tokens.values())
    facts = found.model_dump()["modalloy"]
    counted: dict[str, int] = {}
    for name, start, length in facts["owners"]:
        assert start == sum(counted.values())
        counted[name] = counted.get(name, 0) + length
    assert counted == reply.tokens and facts["weights"] == {name: name for name in reply.tokens}
    assert 0 < facts["time_to_first_token_s"] < 60 and facts["tokens_per_s"] > 0


def test_a_stream_is_the_same_answer_with_usage_and_figures(client: openai.OpenAI, chat: ChatModel) -> None:
    stream = client.chat.completions.create(
        model="merged",
        messages=messages(image(PICTURE)),
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        top_logprobs=2,
    )
    chunks = list(stream)
    first, *middle, last, usage = chunks
    assert first.choices[0].delta.role == "assistant" and last.choices[0].finish_reason == "length"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in middle) == wanted(chat, {"image": PICTURE})
    tokens = [one for chunk in middle for one in (chunk.choices[0].logprobs.content or [])]  # type: ignore[union-attr]
    assert len(tokens) == 12 and len(middle) > 6
    for one in tokens:
        assert one.logprob <= 0 and one.top_logprobs[0].logprob == one.logprob and len(one.top_logprobs) == 2
        assert bytes(one.bytes or ()).decode() == one.token
    assert not usage.choices and usage.usage is not None and usage.usage.completion_tokens == 12
    assert last.model_dump()["modalloy"]["owners"] == usage.model_dump()["modalloy"]["owners"]


def test_a_stop_ends_the_answer_before_it(client: openai.OpenAI, chat: ChatModel) -> None:
    whole = wanted(chat, {"image": PICTURE})
    stop = whole[4:11]  # of several tokens
    found = client.chat.completions.create(
        model="merged", messages=messages(image(PICTURE)), max_tokens=12, stop=[stop, "never said"]
    )
    assert found.choices[0].message.content == whole.split(stop)[0].strip()
    assert found.choices[0].finish_reason == "stop"


def test_a_seed_and_a_temperature(client: openai.OpenAI, chat: ChatModel) -> None:
    def said(seed: int) -> str | None:
        found = client.chat.completions.create(
            model="merged", messages=messages(), max_tokens=12, temperature=1.5, top_p=0.95, seed=seed
        )
        return found.choices[0].message.content

    assert said(1) == said(1) and len({said(seed) for seed in range(1, 5)}) > 1


def test_clients_at_once_get_their_own_answers(server: Site, chat: ChatModel) -> None:
    wants = [wanted(chat, media, tokens=10 + index) for index, (_, media) in enumerate(MIXES)]

    def ask(index: int) -> bool:
        parts = MIXES[index % 4][0]
        status, _, found = server.chat(*parts, text(QUESTION), max_tokens=10 + index % 4)
        return status == 200 and found["choices"][0]["message"]["content"] == wants[index % 4]

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(24)))


def test_a_second_turn_reuses_the_first(server: Site, chat: ChatModel) -> None:
    words = "do you see a cat ? yes , no"
    first = server.chat(image(OTHER), text(words))[2]
    answer = first["choices"][0]["message"]["content"]
    turns = [
        {"role": "system", "content": "a dog"},
        *({"role": "user", "content": [image(OTHER), text(words)]}, {"role": "assistant", "content": answer}),
        {"role": "user", "content": "and what do you see ?"},
    ]
    found = server.ask(CHAT, {"model": "merged", "messages": turns[1:], "max_tokens": 12})[2]
    assert found["usage"]["prompt_tokens_details"]["cached_tokens"] >= first["usage"]["prompt_tokens"] - 1
    ours: list[Any] = [
        *user_message(words, [("image", OTHER)]),
        *({"role": one["role"], "content": one["content"]} for one in turns[2:]),
    ]
    assert found["choices"][0]["message"]["content"] == chat.chat(ours, max_new_tokens=12)
    with_system = server.ask(CHAT, {"model": "merged", "messages": turns, "max_tokens": 12})[2]
    assert with_system["usage"]["prompt_tokens_details"]["cached_tokens"] < 5  # another beginning
    wanted_text = chat.chat([{"role": "system", "content": "a dog"}, *ours], max_new_tokens=12)
    assert with_system["choices"][0]["message"]["content"] == wanted_text


def test_responses_answer_the_same(client: openai.OpenAI, chat: ChatModel) -> None:
    url = f"data:image/webp;base64,{encoded(PICTURE)}"
    given: Any = [
        {
            "role": "user",
            "content": [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": QUESTION}],
        }
    ]
    found = client.responses.create(model="merged", input=given, max_output_tokens=12)
    want = wanted(chat, {"image": PICTURE})
    assert found.output_text == want and found.status == "incomplete"
    assert found.incomplete_details is not None and found.incomplete_details.reason == "max_output_tokens"
    assert found.usage is not None and found.usage.output_tokens == 12
    assert found.model_dump()["modalloy"]["owners"][1][0] == "image"
    with client.responses.stream(model="merged", input=given, max_output_tokens=12) as stream:
        kinds, deltas = [], ""
        for event in stream:
            kinds.append(event.type)
            deltas += event.delta if event.type == "response.output_text.delta" else ""
    assert deltas == want
    assert kinds[:4] == [
        *("response.created", "response.in_progress", "response.output_item.added", "response.content_part.added")
    ]
    assert kinds[-4:] == [
        *("response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete")
    ]
    plain = client.responses.create(model="plain", input="what is this ?", instructions="a dog", max_output_tokens=4)
    assert plain.instructions == "a dog" and plain.usage is not None and plain.usage.total_tokens > 4


def test_models_are_listed_and_missing_ones_named(client: openai.OpenAI) -> None:
    listed = {one.id: one.model_dump() for one in client.models.list()}
    assert listed["merged"]["modalities"] == ["text", "image", "audio"] and listed["plain"]["modalities"] == ["text"]
    assert listed["merged"]["context_length"] == 512 and listed["merged"]["batched"] is True
    assert client.models.retrieve("plain").owned_by == "modalloy"
    with pytest.raises(openai.NotFoundError, match="no model 'margd'; did you mean 'merged'") as refused:
        client.chat.completions.create(model="margd", messages=messages())
    assert refused.value.code == "model_not_found" and refused.value.param == "model"


def test_errors_have_the_shape_that_the_client_reads(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"plain takes no image input; it takes: text only") as refused:
        client.chat.completions.create(model="plain", messages=messages(image(PICTURE)))
    assert refused.value.param == "messages[0].content[0]" and refused.value.code == "invalid_media"
    with pytest.raises(openai.BadRequestError, match="more than the model's 512") as refused:
        client.chat.completions.create(model="merged", messages=messages(), max_tokens=600)
    assert refused.value.code == "context_length_exceeded"


def test_equal_weights_are_held_once(omni: Path, base: Path, chat: ChatModel) -> None:
    one, other = load_model(omni), load_model(base)
    before = wanted(other, {})
    saved = share([one, other])
    assert saved >= sum(parameter.nbytes for parameter in other.model.parameters()) > 0
    table = [each.model.get_input_embeddings().weight.data_ptr() for each in (one, other)]
    assert table[0] == table[1] and wanted(other, {}) == before and wanted(one, {}) == wanted(chat, {})


def test_the_lines_of_the_docs_are_answered(chat: ChatModel) -> None:
    page = (Path(__file__).resolve().parent.parent / "docs/serve.md").read_text()
    (lines,) = re.findall(r"^```bash\n(.*?)^```$", page, re.M | re.S)
    with site({"demo": chat}) as server:
        for line in lines.splitlines():
            command = line.replace("http://127.0.0.1:8000", server.url).replace("curl -s", "curl --fail-with-body -s")
            done = subprocess.run(
                ["bash", "-c", command], capture_output=True, text=True, cwd=Path(__file__).resolve().parent.parent
            )
            assert done.returncode == 0 and done.stdout, (line[:200], done.stdout, done.stderr)
            assert "object" in done.stdout or "modalloy_tokens_total" in done.stdout
        assert server.figure('modalloy_tokens_total{kind="prompt",modality="audio"') > 0


def test_a_full_queue_says_when_to_come_again(chat: ChatModel) -> None:
    with site({"merged": chat}, max_batch=1, max_queue=1) as server:
        streams = [_stream(server, 300) for _ in range(2)]
        until(lambda: server.served["merged"]._taken == 2)
        status, headers, found = server.chat(text(QUESTION))
        assert status == 429 and 1 <= int(headers["retry-after"]) <= 60
        assert found["error"]["code"] == "queue_full" and found["error"]["type"] == "rate_limit_error"
        for connection, response in streams:
            assert response.read().endswith(b"data: [DONE]\n\n")
            connection.close()
        until(lambda: server.served["merged"]._taken == 0)
        assert server.chat(text(QUESTION))[0] == 200


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_goes_away_frees_its_place(server: Site, streamed: bool) -> None:
    gone = server.figure("modalloy_abandoned_total")
    connection, response = _stream(server, 460, streamed)
    if response is not None:
        assert b"chat.completion.chunk" in response.readline()
    else:
        until(lambda: server.figure('modalloy_rows{model="merged"}') > 0)
    connection.close()
    if response is not None:
        response.close()
    until(lambda: server.figure("modalloy_requests_under_way") == 0 and server.figure("modalloy_rows") == 0)
    until(lambda: server.figure("modalloy_abandoned_total") == gone + 1)


def test_metrics_count_what_was_answered(chat: ChatModel) -> None:
    with site({"merged": chat}) as server:
        found = server.chat(image(PICTURE), text(QUESTION))[2]
        server.chat(text("x"), n=2)
        details = found["usage"]["prompt_tokens_details"]
        for name in ("text", "image"):
            labels = f'{{kind="prompt",modality="{name}",model="merged"}}'
            assert server.figure(f"modalloy_tokens_total{labels}") == details[f"{name}_tokens"]
        assert server.figure('modalloy_tokens_total{kind="completion"') == 12
        assert server.figure(f'modalloy_requests_total{{route="{CHAT}",status="200"}}') == 1
        assert server.figure(f'modalloy_requests_total{{route="{CHAT}",status="400"}}') == 1
        assert server.figure('modalloy_time_to_first_token_seconds_count{model="merged"}') == 1
        assert server.ask("/health", method="GET")[2] == {"status": "ok", "models": ["merged"]}


def _stream(server: Site, tokens: int, streamed: bool = True, model: str = "merged") -> tuple[HTTPConnection, Any]:
    """A connection on which an answer of many tokens comes."""
    import json

    connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
    asked = body(text(QUESTION), model=model, max_tokens=tokens, stream=streamed, ignore_eos=True)
    connection.request("POST", CHAT, json.dumps(asked), {"Content-Type": "application/json"})
    return connection, connection.getresponse() if streamed else None


# the command, whose built-in merge is a tiny one
DEMO = """
import sys, pathlib, modalloy.demo
folder = pathlib.Path(sys.argv.pop())
modalloy.demo.merged = lambda on_job: folder
from modalloy.cli import main
main()
"""


def test_the_command_opens_the_page_finishes_what_runs_and_ends(omni: Path, tmp_path: Path) -> None:
    browser, opened = tmp_path / "browser", tmp_path / "opened"
    browser.write_text(f"#!/bin/sh\necho $1 > {opened}.part && mv {opened}.part {opened}\n")
    browser.chmod(0o755)
    command = [sys.executable, "-c", DEMO, "serve", "--demo", "--port", "0", "--device", "cpu", str(omni)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "BROWSER": f"{browser} %s"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    try:
        lines: list[str] = []
        for line in process.stderr:
            lines.append(line)
            if found := re.match(r"serving  (http://127\.0\.0\.1:(\d+)) \(demo\)", line):
                break
        assert found, lines
        server = Site(int(found[2]), {}, None)
        assert server.ask("/health", method="GET")[0] == 200  # once it says so, it listens
        until(opened.exists)
        assert opened.read_text() == f"{found[1]}\n"
        read: list[bytes] = []
        connection, response = _stream(server, 460, model="demo")
        thread = threading.Thread(target=lambda: read.append(response.read()))
        thread.start()
        process.send_signal(signal.SIGTERM)
        thread.join(60)
        connection.close()
        assert read[0].endswith(b"data: [DONE]\n\n") and b'"finish_reason": "length"' in read[0]
        assert process.wait(30) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.parametrize(
    ("named", "shows"),
    [({}, False), ({"BROWSER": "firefox"}, True), ({"DISPLAY": ":0"}, True), ({"DISPLAY": ""}, False)],
)
def test_the_page_is_opened_where_it_can_be_seen(
    named: dict[str, str], shows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in named.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", "linux")
    assert shows_pages() is shows


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of transformers' own that sees, its base, and both merged."""
    root = tmp_path_factory.mktemp("native")
    see, _ = native_models.llava_on_qwen2()
    test_native.write_base(root / "base", see)
    see.save_pretrained(root / "see")
    native_models.write_image_processor(root / "see", test_native.tokenizer())
    merge(test_native.write_recipe(root, [{"model": "see"}]), root / "out")
    for name, seed in (("a", 0), ("b", 1)):
        pixels = np.random.default_rng(seed).integers(0, 255, (40, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{name}.png")
    return root


@pytest.mark.parametrize(("folder", "batched"), [("out", True), ("see", False)])
def test_native_models_answer_as_in_chat(native: Path, folder: str, batched: bool) -> None:
    """Media of a native sense are prepared together; a hosted model answers one after another."""
    chat = load_model(native / folder)
    one, other = native / "a.png", native / "b.png"
    words = "w20 w21"
    wants = [
        chat.reply(test_native.asked(*(("image", path) for path in paths)), max_new_tokens=6)
        for paths in ((), (one,), (one, other), (other, one))
    ]
    with site({"merged": chat}) as server:
        assert server.ask("/v1/models", method="GET")[2]["data"][0]["batched"] is batched
        asked = [
            [text(words)],
            *(
                [image(path, "image/png") for path in paths] + [text(words)]
                for paths in ((one,), (one, other), (other, one))
            ),
        ]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda parts: server.chat(*parts, max_tokens=6)[2], asked * 2))
        for want, answer in zip(wants * 2, found, strict=True):
            assert answer["choices"][0]["message"]["content"] == want.answer
            assert answer["usage"]["completion_tokens"] == want.new_tokens
            assert answer["usage"]["prompt_tokens_details"].get("image_tokens", 0) == want.tokens.get("image", 0)
        connection, response = _stream(server, 6)
        assert response.read().endswith(b"data: [DONE]\n\n")
        connection.close()
        status, _, refused = server.chat(image(b"no"), text(words))
        assert status == 400 and refused["error"]["param"] == "messages[0].content[0]"

"""The page of `modalloy serve` in a real browser: Chromium, driven by Playwright. Skipped, with the reason, where there is none."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from conftest import write_omni
from serving import PICTURE, SOUND, Site, site

from modalloy import builtin
from modalloy.model.chat import ChatModel, user_message
from modalloy.model.load import load_model
from modalloy.serve import merges
from modalloy.serve.queue import Piece, Running

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
expect = sync_api.expect
expect.set_options(timeout=30_000)  # of one thing that is waited for

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
QUESTION = "what is this ? dog , cat"
VIDEO, CLOUD = builtin.SAMPLES / "elephant-animated.webp", builtin.SAMPLES / "dog.npy"
MEDIA = {"image": PICTURE, "audio": SOUND, "video": VIDEO, "point": CLOUD}
FLAGS = (
    *("--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"),  # a microphone that beeps
    "--disable-features=AudioServiceOutOfProcess",  # which once in many runs did not answer for half a minute
    *("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"),  # WebGL without a graphics card
    *(("--no-sandbox",) if os.geteuid() == 0 else ()),
)


@pytest.fixture(scope="module")
def omni(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_omni(tmp_path_factory.mktemp("page"), base, ("vision", "audio", "video", "point"))


@pytest.fixture(scope="module")
def chat(omni: Path) -> ChatModel:
    return load_model(omni)


@pytest.fixture(scope="module")
def server(chat: ChatModel, omni: Path, base: Path) -> Iterator[Site]:
    with site({"merged": chat, "plain": load_model(base)}, folders={"merged": omni, "plain": base}) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, server: Site) -> Iterator[Any]:
    """The page as a first visitor has it. It asks no other host, and breaks none of its own rules."""
    with visit(browser, server) as found:
        yield found


class visit:  # noqa: N801
    """A page of its own storage; at the end, what it asked for and what went wrong in it are held against the rules."""

    def __init__(self, browser: Any, server: Site, **options: Any) -> None:
        # without motion: clouds that turn by themselves would be drawn by the processor all the time
        self.context = browser.new_context(viewport={"width": 1100, "height": 800}, reduced_motion="reduce", **options)
        self.page, self.server = self.context.new_page(), server
        self.page.set_default_timeout(30_000)
        self.addresses: list[str] = []
        self.wrong: list[str] = []
        self.page.on("request", lambda request: self.addresses.append(request.url))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on(
            "console", lambda message: self.wrong.append(message.text) if "Security Policy" in message.text else None
        )

    def __enter__(self) -> Any:
        self.page.goto(self.server.url)
        return self.page

    def __exit__(self, *error: object) -> None:
        self.context.close()
        if not error[0]:
            assert not self.wrong
            others = [url for url in self.addresses if not url.startswith((self.server.url, "blob:", "data:"))]
            assert self.addresses and not others


def add(page: Any, *paths: Path) -> None:
    page.locator("#files").set_input_files(paths)


def ask(page: Any, words: str = QUESTION) -> Any:
    """Ask, and wait for every answer; the last turn."""
    page.get_by_label("Your question").fill(words)
    page.get_by_label("Your question").press("Enter")
    turn = page.locator(".turn").last
    expect(turn.locator(".answer").first).to_be_visible()
    expect(turn.locator(".answer[aria-busy=true]")).to_have_count(0)
    return turn


def settings(page: Any, **values: str) -> None:
    page.get_by_role("button", name="Settings").click()
    for name, value in values.items():
        page.locator(f"#settings [name={name}]").fill(value)
    page.get_by_role("button", name="Save").click()


def wanted(chat: ChatModel, media: dict[str, Path], tokens: int = 12) -> str:
    return chat.reply(user_message(QUESTION, media.items()), max_new_tokens=tokens).answer


def test_a_first_visit_shows_three_questions_and_answers_one(page: Any) -> None:
    settings(page, max_tokens="12")
    cards = page.locator(".card")
    expect(cards).to_have_count(3)
    for shown in ("img", "canvas.waveform", "canvas.cloud"):
        expect(page.locator(f".card {shown}").first).to_be_visible()
    cards.nth(2).get_by_role("button").last.click()
    turn = page.locator(".turn")
    expect(turn.locator(".strip span.tone-point")).to_have_count(1)
    expect(cards.first).to_be_hidden()


@pytest.mark.parametrize("modality", MEDIA)
def test_a_medium_is_previewed_asked_about_and_its_tokens_are_shown(page: Any, chat: ChatModel, modality: str) -> None:
    settings(page, max_tokens="12")
    add(page, MEDIA[modality])
    preview = {"image": "img", "audio": "canvas.waveform", "video": "img", "point": "canvas.cloud"}[modality]
    expect(page.locator(f"#attachments {preview}")).to_be_visible()
    turn = ask(page)
    assert turn.locator(".words").inner_text().strip() == wanted(chat, {modality: MEDIA[modality]}).strip()
    reply = chat.reply(user_message(QUESTION, [(modality, MEDIA[modality])]), max_new_tokens=12)
    shown = turn.get_by_role("list", name="Tokens by modality").get_by_role("listitem").all_inner_texts()
    assert shown == [f"{name} {count}" for name, count in reply.tokens.items()]
    runs = turn.locator(f".strip span.tone-{modality}")
    assert runs.count() == 1 and f"{modality} weights" in (runs.get_attribute("title") or "")
    assert runs.evaluate("run => getComputedStyle(run).flexGrow") == str(reply.tokens[modality])
    expect(turn.locator(".figures")).to_contain_text(
        re.compile(r"12 tokens out · first after [\d.]+ s · [\d.]+ tokens/s")
    )
    assert page.locator("#status").inner_text().startswith("merged answered: ")  # what a screen reader says


def test_a_video_is_played_and_may_be_shown_as_its_sound(page: Any, tmp_path: Path) -> None:
    path = tmp_path / "clip.webm"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for grey in range(0, 250, 25):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), grey, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    add(page, path)
    video = page.locator("#attachments video")
    expect(video).to_have_js_property("videoWidth", 64)
    expect(ask(page).locator(".strip span.tone-video")).to_have_count(1)
    add(page, path)
    page.get_by_label("Show clip.webm to the model as").select_option("audio")
    expect(ask(page).locator(".error")).to_contain_text(re.compile(r"clip\.webm: .*no sound track"))


def test_an_answer_streams_and_can_be_stopped_and_made_again(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = Running.pieces

    async def slowly(self: Running) -> AsyncIterator[Piece]:
        async for piece in pieces(self):
            await asyncio.sleep(0.05)
            yield piece

    monkeypatch.setattr(Running, "pieces", slowly)
    settings(page, max_tokens="200")
    page.get_by_label("Your question").fill(QUESTION)
    page.get_by_role("button", name="Ask").click()
    growing = page.locator(".answer[aria-busy=true] .words")
    expect(growing).not_to_be_empty()
    before = growing.inner_text()
    expect(growing).not_to_have_text(before)
    page.get_by_role("button", name="Stop", exact=True).click()
    answer = page.locator(".answer[aria-busy=false]")
    expect(answer).to_contain_text("Stopped.")
    assert answer.locator(".words").inner_text().startswith(before.strip())
    monkeypatch.undo()
    settings(page, max_tokens="12")
    page.get_by_role("button", name="Regenerate").click()
    expect(answer.locator(".figures")).to_contain_text("12 tokens out")


def test_two_models_answer_side_by_side(page: Any, server: Site, chat: ChatModel) -> None:
    settings(page, max_tokens="12")
    page.get_by_role("checkbox", name="plain").check()
    turn = ask(page)
    for name in ("merged", "plain"):
        answer = turn.get_by_role("region", name=f"Answer of {name}").locator(".words")
        assert (
            answer.inner_text().strip()
            == server.chat({"type": "text", "text": QUESTION}, model=name)[2]["choices"][0]["message"][
                "content"
            ].strip()
        )
    boxes = [turn.locator(".answer").nth(index).bounding_box() for index in range(2)]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]
    add(page, PICTURE)
    turn = ask(page)
    expect(turn.get_by_role("region", name="Answer of plain")).to_contain_text("plain takes no image input")
    expect(turn.get_by_role("region", name="Answer of merged").locator(".strip span.tone-image")).to_have_count(1)
    turn = ask(page)  # what was refused is not in the next question's conversation
    expect(turn.locator(".error")).to_have_count(0)


def test_the_microphone_is_recorded_and_asked_about(page: Any) -> None:
    page.get_by_role("button", name="Record").click()
    expect(page.locator("#record")).to_contain_text("0:01")
    page.get_by_role("button", name="Stop recording").click()
    expect(page.locator("#attachments canvas.waveform")).to_be_visible()
    turn = ask(page)
    expect(turn.locator(".strip span.tone-audio")).to_have_count(1)
    kept = page.evaluate("() => localStorage.getItem('modalloy.conversation')")
    (medium,) = json.loads(kept)[0]["media"]
    assert medium["name"].endswith(".wav") and medium["size"] > 16_000  # half a second at least


def ply(form: str) -> bytes:
    """Points on a helix, with colours."""
    at = np.linspace(0, 20, 400)
    xyz = np.stack([np.cos(at), at / 5, np.sin(at)], 1)
    colours = np.stack([255 * (at / 20), 128 + 0 * at, 255 - 255 * (at / 20)], 1).astype(np.uint8)
    lines = ["ply", f"format {form} 1.0", "element vertex 400", *(f"property float {name}" for name in "xyz")]
    lines += [*(f"property uchar {name}" for name in ("red", "green", "blue")), "end_header", ""]
    head = "\n".join(lines).encode()
    if form == "ascii":
        rows = zip(xyz, colours, strict=True)
        return head + "".join(" ".join(map(str, [*point, *colour])) + "\n" for point, colour in rows).encode()
    order = "<" if "little" in form else ">"
    table = np.zeros(400, [("xyz", f"{order}f4", 3), ("rgb", "u1", 3)])
    table["xyz"], table["rgb"] = xyz, colours
    return head + table.tobytes()


COLOURS = """canvas => {
  const found = [0, 0, 0]; // pixels that are drawn, the most red, the most blue
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  for (let at = 0; at < pixels.length; at += 4) {
    found[0] += pixels[at + 3] > 0;
    found[1] = Math.max(found[1], pixels[at]);
    found[2] = Math.max(found[2], pixels[at + 2]);
  }
  return found;
}"""


def test_a_cloud_is_rotated_by_pointer_and_keys(page: Any, tmp_path: Path) -> None:
    pictures = []
    for form in ("ascii", "binary_little_endian", "binary_big_endian"):
        (tmp_path / f"{form}.ply").write_bytes(ply(form))
        add(page, tmp_path / f"{form}.ply")
        cloud = page.locator("#attachments canvas.cloud")
        expect(cloud).to_be_visible()
        expect(page.locator("#attachments")).to_contain_text("400 points")
        cloud.focus()
        page.keyboard.press("ArrowRight")  # it turns no more by itself
        before = float(cloud.get_attribute("data-yaw"))
        drawn = cloud.screenshot()
        box = cloud.bounding_box()
        page.mouse.move(box["x"] + 60, box["y"] + 60)
        page.mouse.down()
        page.mouse.move(box["x"] + 105, box["y"] + 60)
        page.mouse.up()
        assert float(cloud.get_attribute("data-yaw")) == pytest.approx(before + 0.5, abs=0.01)
        assert cloud.screenshot() != drawn
        for _ in range(3):
            page.keyboard.press("ArrowLeft")
        page.keyboard.press("+")
        assert float(cloud.get_attribute("data-yaw")) == pytest.approx(before + 0.05, abs=0.01)
        pictures.append(cloud.evaluate(COLOURS))
        page.get_by_role("button", name="Take").click()
    for drawn, red, blue in pictures:
        assert drawn > 500 and red > 150 and blue > 150


DROP_AND_PASTE = """() => {
  for (const kind of ["drop", "paste"]) {
    const data = new DataTransfer();
    data.items.add(new File(["no sound"], `${kind}.wav`, { type: "audio/wav" }));
    const options = { dataTransfer: data, clipboardData: data, bubbles: true };
    document.body.dispatchEvent(kind === "drop" ? new DragEvent(kind, options) : new ClipboardEvent(kind, options));
  }
}"""


def test_media_are_dropped_and_pasted_and_taken_away(page: Any) -> None:
    page.evaluate(DROP_AND_PASTE)
    for kind in ("drop", "paste"):
        expect(page.locator("#attachments")).to_contain_text(f"{kind}.wav")
        page.get_by_role("button", name=f"Take {kind}.wav away").click()
    expect(page.locator("#attachments > *")).to_have_count(0)


def test_what_is_hostile_or_wrong_is_one_line(page: Any, tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)>.png"
    (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n" + b"no picture at all" * 9)
    (tmp_path / "lie.npy").write_bytes(b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr': '<f4', 'shape': (9, 3), }".ljust(118))
    (tmp_path / "empty.wav").write_bytes(b"")
    add(page, tmp_path / "empty.wav")
    expect(page.get_by_role("alert")).to_have_text("empty.wav is empty. Choose another file.")
    for path, told, refused in (
        (tmp_path / name, "This browser cannot show it", "not a readable image"),
        (tmp_path / "lie.npy", "The file ends before its last point", "not a usable point cloud"),
    ):
        add(page, path)
        expect(page.locator("#attachments")).to_contain_text(told)
        turn = ask(page, "<b>what</b> is this ?")
        expect(turn.locator(".error")).to_contain_text(f"{path.name}: {refused}")
        assert turn.locator("b").count() == 0 and turn.locator("img[src=x]").count() == 0
        assert turn.locator(".asked > p").inner_text() == "<b>what</b> is this ?"
    page.get_by_role("checkbox", name="plain").check()
    page.get_by_role("checkbox", name="merged").uncheck()
    add(page, SOUND)
    expect(page.get_by_role("alert")).to_contain_text("the chosen models take text only")
    expect(ask(page).locator(".words")).not_to_be_empty()


def test_a_conversation_stays_and_is_exported(page: Any, tmp_path: Path) -> None:
    settings(page, max_tokens="12", system="a dog")
    add(page, PICTURE, CLOUD)
    expect(page.locator("#attachments .medium")).to_have_count(2)
    answer = ask(page).locator(".words").inner_text()
    page.reload()
    turn = page.locator(".turn")
    expect(turn.locator(".words")).to_have_text(answer)
    expect(turn.locator("canvas.cloud")).to_be_visible()
    expect(turn.locator(".strip span.tone-point")).to_have_count(1)
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    found = json.loads(Path(download.value.path()).read_text())
    assert found["settings"]["system"] == "a dog" and "key" not in found["settings"]
    assert [one["modality"] for one in found["turns"][0]["media"]] == ["image", "point"]
    assert found["turns"][0]["media"][0]["url"].startswith("data:image/webp;base64,UklGR")
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="New").click()
    expect(page.locator(".card").first).to_be_visible()
    assert page.evaluate("() => localStorage.getItem('modalloy.conversation')") is None


def test_the_code_of_a_question_gives_its_answer(page: Any, tmp_path: Path) -> None:
    settings(page, max_tokens="12", stop="it's\nnever")
    add(page, PICTURE, SOUND)
    expect(page.locator("#attachments .medium")).to_have_count(2)
    ask(page, "what is this ? dog , 'cat'")
    answer = ask(page, "and a cat ?").locator(".words").inner_text()
    for path in (PICTURE, SOUND):
        shutil.copy(path, tmp_path)
    page.get_by_role("button", name="Code").last.click()
    curl = page.locator("#snippet").inner_text()
    done = subprocess.run(["bash", "-c", curl], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"].strip() == answer.strip()
    page.get_by_role("button", name="Python").click()
    (tmp_path / "asks.py").write_text(page.locator("#snippet").inner_text())
    done = subprocess.run([sys.executable, "asks.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith(f"{answer.strip()}\n{{'owners': [["), done.stderr


def test_how_it_was_merged_is_shown(page: Any, omni: Path) -> None:
    page.get_by_role("button", name="How it was merged").click()
    shown = page.locator("#merge")
    manifest = json.loads((omni / "manifest.json").read_text())
    expect(shown.get_by_role("region", name="Inputs of the merge").get_by_role("row")).to_have_count(6)
    sha256 = manifest["inputs"]["point"]["sha256"]["adapter_model.safetensors"]
    expect(shown.locator(f"code[title='{sha256}']")).to_have_text(sha256[:12])
    merged = sum(fate == "merged" for _, _, fate, _ in manifest["tensors"])
    expect(shown).to_contain_text(f"{merged} merged")
    shown.get_by_text("Card", exact=True).click()
    expect(shown).to_contain_text("merged by modalloy without training and without data")
    assert shown.locator(".error").count() == 0
    shown.get_by_role("button", name="Measure the updates").click()
    expect(shown.locator(".chart")).to_have_count(2, timeout=120_000)
    shown.get_by_role("button", name="plain").click()
    expect(shown).to_contain_text("so it is no result of modalloy merge")


def test_a_key_is_asked_for_and_not_kept_with_the_conversation(
    browser: Any, base: Path, chat: ChatModel, omni: Path
) -> None:
    key = "a-key-of-the-page"
    with site({"merged": chat}, keys=(key,), folders={"merged": omni}) as server, visit(browser, server) as page:
        for path in ("merge", "inspection"):
            assert server.ask(f"/modalloy/models/merged/{path}", method="GET")[0] == 401
        expect(page.get_by_role("alert")).to_contain_text("the API key is missing or wrong")
        page.locator("#settings [name=key]").fill(key)
        page.get_by_role("button", name="Save").click()
        expect(page.get_by_role("checkbox", name="merged")).to_be_checked()
        expect(ask(page).locator(".words")).not_to_be_empty()
        page.get_by_role("button", name="Code").click()
        expect(page.locator("#snippet")).to_contain_text("Bearer $MODALLOY_API_KEY")
        assert key not in page.evaluate("() => JSON.stringify(localStorage)")


def test_it_is_usable_by_keyboard_and_on_narrow_and_dark_screens(page: Any) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.textContent") == "Skip to the question"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.id") in ("question", "send")
    background = "body => getComputedStyle(body).backgroundColor"
    light = page.locator("body").evaluate(background)
    page.emulate_media(color_scheme="dark")
    assert page.locator("body").evaluate(background) != light
    page.set_viewport_size({"width": 360, "height": 640})
    add(page, *MEDIA.values())
    expect(page.locator("#attachments .medium")).to_have_count(4)
    unnamed = page.locator("button, input:not([type=file]), textarea, select, canvas, img:not([alt])").evaluate_all(
        "all => all.filter(one => !(one.ariaLabel || one.textContent.trim() || one.labels?.length))"
        ".map(one => one.outerHTML)"
    )
    assert not unnamed
    ask(page)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 360


def test_an_inspection_is_refused_where_the_inputs_are_gone(
    chat: ChatModel, omni: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {}
    for name in ("moved", "changed", "late"):
        folders[name] = tmp_path / name
        shutil.copytree(omni, folders[name])
    (folders["moved"] / "sources.json").unlink()
    places = json.loads((folders["changed"] / "sources.json").read_text())
    places["specialists"][0] = str(tmp_path / "gone")
    (folders["changed"] / "sources.json").write_text(json.dumps(places))
    (folders["changed"] / "README.md").write_text("other words")
    monkeypatch.setattr(merges, "SECONDS", 0.01)
    with site(dict.fromkeys(folders, chat), folders=folders) as server:

        def get(name: str, what: str) -> tuple[int, Any]:
            status, _, found = server.ask(f"/modalloy/models/{name}/{what}", method="GET")
            assert str(tmp_path) not in json.dumps(found)
            return status, found

        for name, why in (("moved", "no sources.json"), ("changed", "its input gone is no longer there")):
            assert why in get(name, "merge")[1]["inspection"]["reason"]
            status, found = get(name, "inspection")
            assert status == 404 and why in found["error"]["message"]
        assert get("changed", "merge")[1]["merge"]["card"] == {"text": "other words", "unchanged": False}
        status, found = get("late", "inspection")
        assert status == 503 and "took more than 0 s" in found["error"]["message"]
        assert get("none", "merge")[0] == 404
        assert server.ask("/samples/../__init__.py", method="GET")[0] == 404

"""What is made of a run for people: Markdown, CSV, and a page that holds its media and lets nothing run or load."""

import base64
import csv
import hashlib
import io
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_run import benchmark, question, write_run

from modalloy import builtin, cli
from modalloy.errors import ModalloyError
from modalloy.evals import BENCHMARKS, markdown, shelf
from modalloy.evals import page as evals
from modalloy.evals.scores import result

EVIL = """</script><script>alert("1")</script><img src=x onerror='alert(2)'>&amp;"""


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BENCHMARKS, "fake", benchmark())
    monkeypatch.setattr("os.fsync", lambda file: None)


class Elements(HTMLParser):
    """Every element with its attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.found if tag in tags]


def media_of(page: str) -> list[dict[str, Any]]:
    found = re.search(r'id="media">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_everything_is_escaped(tmp_path: Path) -> None:
    evil = question(
        0,
        id=EVIL,
        text=EVIL,
        golds=(EVIL,),
        choices=(EVIL, "no"),
        media=(("image", f"/{EVIL}.png"),),
        group={EVIL: EVIL},
    )
    told = [EVIL, "no"]
    run = write_run(tmp_path / "run", [evil, evil], told, model={"path": EVIL}, variant=EVIL)
    page = evals.page(run)
    elements = Elements(page)
    assert page.count("<script") == 2 and len(elements.all("script")) == 2 and "<img src" not in page
    assert elements.text.count(EVIL) > 10 and EVIL not in page
    assert not [name for _, attributes in elements.found for name in attributes if name.startswith("on")]


def test_the_page_loads_and_sends_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [question(0, media=(("image", str(builtin.SAMPLES / "dog.webp")),))], ["yes"])
    page = evals.page(run)
    elements = Elements(page)
    policy = next(one["content"] for one in elements.all("meta") if "http-equiv" in one)
    assert policy and policy.startswith("default-src 'none'; ")
    script = page.rpartition("<script>")[2].partition("</script>")[0]
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert "http" not in page.replace("http-equiv", "") and not elements.all("link", "iframe", "form", "base", "object")
    assert not [one for one in elements.all("script", "img", "audio", "video") if "src" in one]
    assert page == evals.page(run)


def test_media_are_embedded_once_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cloud = np.random.default_rng(0).random((5000, 6)).astype(np.float32)
    np.save(tmp_path / "cloud.npy", cloud)
    (tmp_path / "clip.mkv").write_bytes(b"0")
    files = [builtin.SAMPLES / "dog.webp", builtin.SAMPLES / "dog.flac", tmp_path / "cloud.npy"]
    shown = tuple(zip(("image", "audio", "point"), map(str, files), strict=True))
    odd = (("video", str(tmp_path / "clip.mkv")), ("image", str(tmp_path / "none.png")))
    run = write_run(tmp_path / "run", [question(0, media=shown), question(1, media=(*shown, *odd))], ["yes", "no"])
    page = evals.page(run)
    items, elements = media_of(page), Elements(page)
    assert [item["type"] for item in items] == ["image/webp", "audio/flac", "points"]
    assert [base64.b64decode(item["data"]) for item in items[:2]] == [file.read_bytes() for file in files[:2]]
    assert [one["data-place"] for one in elements.all("img", "audio", "canvas")] == ["0", "1", "2"] * 2
    points = np.frombuffer(base64.b64decode(items[2]["data"]), "<i2", 3 * items[2]["n"]).reshape(-1, 3) / 32767
    assert (
        items[2]["n"] == 2048
        and items[2]["coloured"]
        and np.linalg.norm(points, axis=1).max() == pytest.approx(1, abs=1e-4)
    )
    shift = cloud[-1, :3] - cloud[0, :3]  # which the drawn points keep, but for their size
    drawn = points[-1] - points[0]
    assert drawn / np.linalg.norm(drawn) == pytest.approx(shift / np.linalg.norm(shift), abs=1e-3)
    assert f"video: {tmp_path / 'clip.mkv'}browsers do not show .mkv" in elements.text
    assert f"image: {tmp_path / 'none.png'}no such file" in elements.text
    assert "2 of 5 media are not on this page" in elements.text
    monkeypatch.setattr(shelf, "MAX_MEDIUM_BYTES", 5)
    assert [item["type"] for item in media_of(evals.page(run))] == ["points"]
    monkeypatch.setattr(shelf, "MAX_MEDIA_BYTES", 5)
    page = evals.page(run)
    assert media_of(page) == [] and "more than the 0 kB that are embedded" in page and "MB of media are full" in page


def test_examples_hold_every_outcome(tmp_path: Path) -> None:
    told: list[str | None] = ["yes"] * 60 + ["no"] * 30 + ["perhaps"] * 3 + [None]
    run = write_run(tmp_path / "run", [question(index) for index in range(94)], told)
    kinds = [one["data-kinds"] for one in Elements(evals.page(run, examples=20)).all("article")]
    assert {kind: kinds.count(kind) for kind in sorted(map(str, kinds))} == {
        "media_error": 1,
        "right": 8,
        "unparsed": 3,
        "wrong": 8,
    }
    page = evals.page(run, examples=20)
    assert "20 of 94 questions: 8 of 60 right, 8 of 30 wrong, 3 of 3 unparsed, 1 of 1 media error." in page
    assert {json.loads(str(one["data-group"]))["type"] for one in Elements(page).all("article")} == {"odd", "even"}
    assert len(Elements(evals.page(run)).all("article")) == 94 and "All 94 questions." in evals.page(run)


def test_a_second_run_stands_beside(tmp_path: Path) -> None:
    samples = [question(index) for index in range(12)]
    a = write_run(tmp_path / "a", samples, ["yes"] * 6 + ["no"] * 6)
    b = write_run(tmp_path / "b", samples[:11], ["yes"] * 5 + ["no"] + ["yes"] * 2 + ["no"] * 3)
    page = evals.page(a, other=b)
    kinds = [one["data-kinds"] for one in Elements(page).all("article")]
    assert kinds == ["right"] * 5 + ["right only_a"] + ["wrong only_b"] * 2 + ["wrong"] * 4
    text = Elements(page).text
    assert "text: cannot be told apart: B − A is +9.1 points" in text and text.count("prediction of B") == 11
    few = [one["data-kinds"] for one in Elements(evals.page(a, other=b, examples=4)).all("article")]
    assert sorted(map(str, few)) == ["right", "right only_a", "wrong", "wrong only_b"]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (write_run(tmp_path / name, [question(0), question(1)], [name, "no"]) for name in ("yes", "no"))
    page = tmp_path / "page.html"
    for options, code in ((["-o", str(page), "--examples", "1"], 0), ([], 2)):
        asked = ["modalloy", "eval-score", str(a.folder), "--beside", str(b.folder), *options]
        monkeypatch.setattr(sys, "argv", asked)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert (stop.value.code or 0) == code
    assert page.read_text() == evals.page(a, examples=1, other=b)
    assert "--beside: is shown on the page only" in capsys.readouterr().err
    with pytest.raises(ModalloyError, match="of different task: fake and mmlu"):
        evals.page(a, other=replace(b, meta=b.meta | {"task": "mmlu"}))


def test_options_show_likelihood_gold_and_prediction(tmp_path: Path) -> None:
    letters = question(0, golds=("B",), choices=("a cat", "B"), options=(" A", " B"))
    run = write_run(tmp_path / "run", [question(0), letters], ["no", "B"])
    options = [one.get("class") for one in Elements(evals.page(run)).all("li")]
    assert options == ["is-gold", "is-said", "", "is-gold is-said"]
    assert "73.1 %" in evals.page(run)  # exp(−1) against exp(−2)


def test_tables(tmp_path: Path) -> None:
    samples = [question(index, cluster=(f"c{index % 3}",)) for index in range(8)]
    run = write_run(tmp_path / "run", samples, ["yes", "no", "yes", "perhaps", "yes", "no", "yes", None], n_samples=20)
    scores = result(run)
    text = markdown.markdown(scores)
    assert text.startswith(
        "# fake · image\n\n8 questions of 20, 0 distinct media; 1 unparsed, 1 media errors, 0 out of memory"
    )
    assert re.search(r"\| text +\| 50\.0 % +\| 21\.5 to 78\.5 +\| [\d.]+ to [\d.]+ +\| 4 of 8 \| 57\.1 % ", text)
    assert "always the most frequent answer 100.0 %" in text and "## type" in text
    rows = list(csv.DictReader(io.StringIO(markdown.csv(scores))))
    assert [(row["rule"], row["group"], row["value"], row["n"], row["acc"]) for row in rows[:3]] == [
        ("text", "", "", "8", "0.5"),
        ("text", "type", "even", "4", "1.0"),
        ("text", "type", "odd", "4", "0.0"),
    ]
    assert len(rows) == 6 and float(rows[0]["ci95_clustered_low"]) == scores["ci95_clustered"][0]

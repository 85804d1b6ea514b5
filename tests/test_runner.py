"""Running a benchmark: what is logged, resuming, unreadable media, caching, and models of text only."""

import dataclasses
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_compose
from PIL import Image

import modalloy
from modalloy.errors import ModalloyError, OutputError
from modalloy.evals import BENCHMARKS
from modalloy.evals.ask import answers, evaluate, identify
from modalloy.evals.benchmark import Answer, Benchmark, Sample, Source, Verdict, likeliest, questions, wilson
from modalloy.evals.features import FeatureCache
from modalloy.evals.log import Run, load_run
from modalloy.evals.markdown import markdown
from modalloy.evals.scores import baselines, result
from modalloy.model.chat import ChatModel

WORDS = ("dog", "cat", "yes", "no")


def exact(sample: Sample, answer: Answer) -> Verdict:
    given = sample.choices[likeliest(sample, answer)] if answer.likelihoods else answer.text
    return Verdict(given or None, given in sample.golds)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures, one of them cut short."""
    folder = tmp_path_factory.mktemp("data")
    for index in range(5):
        pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:60])
    return folder


def pictures(source: Source, options: tuple[str, ...] = ()) -> list[Sample]:
    """One question a picture, about the pictures' own colours or about nothing; the last has two pictures."""
    shown = [(("image", source.medium(f"{index}.png")),) for index in range(5)]
    media = [*shown, (*shown[0], *shown[1])]
    return [
        Sample(
            id=f"q{index}",
            text="what is this ?",
            golds=(WORDS[index % 4],),
            media=media,
            choices=WORDS,
            options=options,
            group={"number": str(len(media))},
        )
        for index, media in enumerate(media)
    ]


def texts(source: Source) -> list[Sample]:
    return [
        Sample(f"t{i}", f"a {word} is", ("no",), choices=WORDS, options=(" yes", " no", " dog", " cat"), plain=True)
        for i, word in enumerate(WORDS)
    ]


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> Benchmark:
    """A benchmark of generated answers."""
    found = Benchmark("pictures", "", pictures, {"exact": exact}, "pictures", ("image",), max_new_tokens=4)
    monkeypatch.setitem(BENCHMARKS, found.name, found)
    return found


@pytest.fixture
def scored(generated: Benchmark) -> Benchmark:
    """The same, answers scored by likelihood."""
    return dataclasses.replace(generated, samples=partial(pictures, options=WORDS))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, base: Path) -> ChatModel:
    """The tiny image specialist."""
    folder = write_compose(tmp_path_factory.mktemp("eval") / "vision-damc", "vision", seed=1)
    return modalloy.load_model(folder, base=str(base))


IDENTITY = {"path": "tiny", "fingerprint": "0", "recipe": None, "options": {}}


@pytest.fixture
def run(model: ChatModel, folder: Path, tmp_path: Path) -> Callable[..., Run]:
    """Runs a benchmark on the tiny specialist; `loads` counts how often it was loaded."""

    def evaluated(benchmark: Benchmark, name: str = "run", identity: dict[str, Any] = IDENTITY, **options: Any) -> Run:
        return evaluate(lambda: model, identity, benchmark, Source(folder), tmp_path / name, **options)

    return evaluated


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "preds.jsonl").read_text().splitlines()]


def test_every_question_is_a_line_and_a_broken_picture_is_an_outcome(
    run: Callable[..., Run], generated: Benchmark, tmp_path: Path
) -> None:
    seen = []
    run(generated, on_sample=lambda done, total: seen.append((done, total)))
    found = sorted(lines(tmp_path / "run"), key=lambda line: line["i"])
    assert [line["id"] for line in found] == [f"q{index}" for index in range(6)] and seen[-1] == (6, 6)
    assert [line["status"] == "media_error" for line in found] == [False, False, False, True, False, False]
    assert "3.png" in found[3]["err"] and found[3]["raw"] == "" and found[3]["pred"] is None
    assert all(line["n_out"] in range(1, 5) and len(line["prompt_sha"]) == 64 for line in found if line["i"] != 3)
    scores = result(load_run(tmp_path / "run"))
    assert (scores["n"], scores["n_scored"], scores["n_media_error"]) == (6, 5, 1)
    protocol = scores["protocol"]["exact"]
    assert protocol["acc"] == protocol["correct"] / 6 and protocol["acc_scored"] == protocol["correct"] / 5
    assert set(protocol["groups"]["number"]) == {"1", "2"} and protocol["groups"]["number"]["1"]["n"] == 5


def test_a_killed_run_goes_on_where_it_was(
    run: Callable[..., Run], generated: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(generated, name="whole")
    run(generated, limit=2)
    path = tmp_path / "run" / "preds.jsonl"
    path.write_bytes(path.read_bytes() + b'{"i": 2, "id": "q2", "cut in the mid')
    with pytest.raises(OutputError, match="holds a run already; go on with --resume"):
        run(generated)
    run(generated, resume=True)
    both = [[{k: v for k, v in line.items() if k != "sec"} for line in lines(tmp_path / n)] for n in ("run", "whole")]
    assert sorted(both[0], key=str) == sorted(both[1], key=str)
    before = path.read_bytes()
    assert evaluate(
        _unwanted, IDENTITY, generated, Source(Path(both[0][0]["media"][0][1]).parent), path.parent, resume=True
    )
    assert path.read_bytes() == before  # nothing was left to ask, so no model was loaded


def _unwanted() -> ChatModel:
    raise AssertionError("a model is loaded with nothing to ask")


def test_answers_of_another_model_or_question_are_not_mixed(run: Callable[..., Run], generated: Benchmark) -> None:
    run(generated, limit=2)
    with pytest.raises(OutputError, match=r"run: is a run of another model .*choose another folder"):
        run(generated, resume=True, identity=IDENTITY | {"fingerprint": "1"})
    with pytest.raises(OutputError, match="another generation"):
        run(dataclasses.replace(generated, max_new_tokens=5), resume=True)
    other = dataclasses.replace(
        generated, samples=lambda s: [dataclasses.replace(one, text="what do you see ?") for one in pictures(s)]
    )
    with pytest.raises(OutputError, match=r"question 0 \(q0\) is now another one"):
        run(other, resume=True)


def test_a_folder_of_something_else_is_left_alone(
    run: Callable[..., Run], generated: Benchmark, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("")
    with pytest.raises(OutputError, match="holds other files, and no run"):
        run(generated)
    with pytest.raises(ModalloyError, match=r"holds no run\.json"):
        load_run(tmp_path / "run")


def test_a_damaged_line_is_named(run: Callable[..., Run], generated: Benchmark, tmp_path: Path) -> None:
    run(generated, limit=2)
    path = tmp_path / "run" / "preds.jsonl"
    whole = path.read_text()
    for old, new, reason in (
        ('"status"', '"state"', "'status'"),
        ('"i": 0', '"i": "0"', "a field is not a whole number"),
        ('"sec": ', '"sec": 1e999, "was": ', "a field is not a finite number"),
        ('"n_in": ', '"n_in": [], "was": ', "a field is not a whole number"),
        ('"prompt_sha": ', '"prompt_sha": {}, "was": ', "a field is not text"),
        ('"id": "q0"', '"id": 5', "a field is not text"),
        ('"likelihoods": []', '"likelihoods": [-1.0]', "the status ok with 1 likelihoods"),
    ):
        assert old in whole
        path.write_text(whole.replace(old, new, 1))
        with pytest.raises(ModalloyError, match=rf"preds\.jsonl: line 1 is damaged \({reason}\)"):
            load_run(tmp_path / "run")


def test_likelihoods_are_those_of_the_whole_answer(
    run: Callable[..., Run], scored: Benchmark, model: ChatModel, folder: Path
) -> None:
    found = run(scored, limit=2)
    message = [
        {
            "role": "user",
            "content": [{"type": "image", "path": str(folder / "0.png")}, {"type": "text", "text": "what is this ?"}],
        }
    ]
    assert found.entries[0].answer.likelihoods == pytest.approx(model.score_options(message, WORDS), abs=1e-5)
    inputs = model.processor.apply_chat_template(message, add_generation_prompt=True, tokenize=True)
    ids = torch.tensor([model.processor.tokenizer.encode("dog</s>", add_special_tokens=False)])
    whole = torch.cat([inputs["input_ids"], ids], 1)
    owners = torch.nn.functional.pad(inputs["owners"], (0, ids.shape[1]))
    logits = model.model(input_ids=whole, owners=owners, media=inputs["media"]).logits.double().log_softmax(-1)
    expected = sum(logits[0, -1 - ids.shape[1] + i, token].item() for i, token in enumerate(ids[0]))
    assert found.entries[0].answer.likelihoods[0] == pytest.approx(expected, abs=1e-5)


def test_a_plain_text_is_continued_and_any_language_model_can_be_asked(base: Path) -> None:
    plain = modalloy.load_model(base)
    assert plain.modalities == ()
    entries = [e for batch in answers(plain, list(enumerate(texts(Source(base)))), 4, 1, FeatureCache()) for e in batch]
    tokenizer, network = plain.processor.tokenizer, plain.model
    ids = torch.tensor([tokenizer.encode("a dog is no")])
    expected = network(input_ids=ids).logits.double().log_softmax(-1)[0, -2, ids[0, -1]].item()
    assert entries[0].answer.likelihoods[1] == pytest.approx(expected, abs=1e-6)
    assert entries[0].prompt_tokens == ids.shape[1] - 1


def test_batches_answer_as_single_questions_do(
    run: Callable[..., Run], generated: Benchmark, scored: Benchmark
) -> None:
    alone, together = run(scored, name="alone"), run(scored, name="together", batch_size=3)
    for single, batched in zip(alone.entries, together.entries, strict=True):
        assert single.answer.likelihoods == pytest.approx(batched.answer.likelihoods, abs=1e-4)
    one, three = run(generated, name="one"), run(generated, name="three", batch_size=3)
    assert [e.answer for e in one.entries] == [e.answer for e in three.entries]
    assert [e.new_tokens for e in one.entries] == [e.new_tokens for e in three.entries]


def test_features_are_computed_once_and_change_nothing(
    run: Callable[..., Run], scored: Benchmark, model: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = run(scored, name="fresh")
    run(scored, name="filling", cache=FeatureCache(tmp_path / "features"))
    monkeypatch.setattr(model.model, "encode", _unwanted)
    cached = run(scored, name="cached", cache=FeatureCache(tmp_path / "features"))
    assert [e.answer for e in cached.entries] == [e.answer for e in fresh.entries]
    assert len(list((tmp_path / "features").iterdir())) == 4  # of five pictures, one cannot be read


def test_a_small_cache_forgets_the_oldest(model: ChatModel, folder: Path) -> None:
    size = FeatureCache().features(model, "image", folder / "0.png").nbytes
    cache = FeatureCache(memory_bytes=2 * size)
    for index in (0, 1, 0, 2):
        cache.features(model, "image", folder / f"{index}.png")
    assert len(cache.kept) == 2 and cache.kept_bytes == 2 * size


def test_a_model_without_the_sense_is_refused(base: Path, folder: Path, tmp_path: Path, generated: Benchmark) -> None:
    with pytest.raises(ModalloyError, match="the questions show image, and the model takes text only"):
        evaluate(lambda: modalloy.load_model(base), IDENTITY, generated, Source(folder), tmp_path / "run")


def test_a_model_is_known_by_its_files(specialists: dict[str, Path]) -> None:
    first = identify(specialists["image"])
    assert (
        first == identify(specialists["image"])
        and first["fingerprint"] != identify(specialists["audio"])["fingerprint"]
    )
    (specialists["image"] / "chat_template.jinja").write_text("{{ messages }}")
    assert identify(specialists["image"])["fingerprint"] != first["fingerprint"]


def test_wilson_and_blind_answers() -> None:
    low, high = wilson(8, 10)
    centre = (0.8 + 1.96**2 / 20) / (1 + 1.96**2 / 10)
    half = 1.96 / (1 + 1.96**2 / 10) * math.sqrt(0.8 * 0.2 / 10 + 1.96**2 / 400)
    assert (low, high) == pytest.approx((centre - half, centre + half), abs=1e-4)
    assert wilson(0, 12)[0] == 0 and wilson(12, 12)[1] == 1 and wilson(0, 0) == (0, 1)
    letters = [Sample(str(i), "", (gold,), choices=("w", "x", "y", "z"), kind=gold) for i, gold in enumerate("AABC")]
    assert baselines(letters) == {"majority": 0.5, "majority_by_kind": 1.0, "first_option": 0.5, "chance": 0.25}
    named = [Sample("a", "", ("x",), choices=("x", "y")), Sample("b", "", ("y",), choices=("x", "y", "z", "x"))]
    assert baselines(named) == {"majority": 0.5, "majority_by_kind": None, "first_option": 0.5, "chance": 0.375}
    assert baselines([Sample("a", "", ("x",))])["chance"] is None


def test_a_run_without_an_answer_leaves_nothing_and_is_begun_anew(
    run: Callable[..., Run], generated: Benchmark, folder: Path, tmp_path: Path
) -> None:
    def stopped() -> ChatModel:
        raise KeyboardInterrupt

    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        evaluate(stopped, IDENTITY, generated, Source(folder), path)
    assert not path.exists()
    path.mkdir()
    begun = (run(generated, limit=1, name="other").folder / "run.json").read_text()
    (path / "run.json").write_text(begun)  # of one that was killed while the model was loaded
    (path / "preds.jsonl").write_text("")
    assert len(run(generated, limit=1).entries) == 1
    # a model that was moved is the same, and a smaller limit hides no answer that is there
    assert len(run(generated, limit=2, resume=True, identity=IDENTITY | {"path": "elsewhere"}).entries) == 2
    assert len(run(generated, limit=1, resume=True).entries) == 2


def test_two_processes_do_not_write_one_run(run: Callable[..., Run], generated: Benchmark, tmp_path: Path) -> None:
    def again(done: int, total: int) -> None:
        with pytest.raises(OutputError, match="another process writes this run"):
            run(generated, resume=True)

    run(generated, limit=1, on_sample=again)
    path = tmp_path / "run" / "preds.jsonl"
    path.write_bytes(2 * path.read_bytes())
    with pytest.raises(ModalloyError, match=r"line 2 is damaged \(it answers question 0 again, as line 1 does\)"):
        load_run(path)
    (path.parent / "run.json").write_text("[]")
    with pytest.raises(ModalloyError, match="does not describe a run"):
        load_run(path)


def test_a_prompt_beyond_the_context_is_an_outcome_and_nan_ends_the_run(
    run: Callable[..., Run], generated: Benchmark, scored: Benchmark, model: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def long(source: Source) -> list[Sample]:
        first, second, *_ = pictures(source)
        return [first, dataclasses.replace(second, text="dog " * 600)]

    found = run(dataclasses.replace(generated, samples=long), batch_size=2)
    assert [entry.status for entry in found.entries] == ["ok", "too_long"]
    scores = result(found)
    assert (scores["n"], scores["n_scored"], scores["n_too_long"], scores["n_oom"]) == (2, 1, 1, 0)
    assert "1 too long for the model" in markdown(scores)
    monkeypatch.setattr(ChatModel, "score", lambda *_: [[math.nan] * 4])
    with pytest.raises(ModalloyError, match="q0: the model gives NaN for the likelihood of an answer"):
        run(scored, name="broken")


def test_what_a_benchmark_lacks_is_refused(generated: Benchmark, folder: Path) -> None:
    for given, message in (
        ({"modalities": ("image", "point")}, "pictures: its questions never show point; it shows image"),
        ({"variant": "old"}, "pictures: no variant 'old'; it has none"),
    ):
        with pytest.raises(ModalloyError, match=message):
            questions(generated, Source(folder, **given))


def test_damaged_features_are_named(model: ChatModel, folder: Path, tmp_path: Path) -> None:
    FeatureCache(tmp_path / "kept").features(model, "image", folder / "0.png")
    (kept,) = (tmp_path / "kept").iterdir()
    kept.write_bytes(kept.read_bytes()[:100])
    with pytest.raises(ModalloyError, match=rf"{kept.name}: is damaged .*; remove it"):
        FeatureCache(tmp_path / "kept").features(model, "image", folder / "0.png")
    with pytest.raises(OutputError, match="choose another --features"):
        FeatureCache(kept)

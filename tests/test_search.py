"""Searching parameters: axes, what is served in memory, the log, resuming, the files that come out, and mistakes."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import write_compose
from PIL import Image
from safetensors.torch import load_file

import modalloy
from modalloy import cli
from modalloy.compute import merged_update
from modalloy.delta import LowRank, norm
from modalloy.errors import ModalloyError, RecipeError
from modalloy.model.chat import user_message
from modalloy.model.routing import TEXT
from modalloy.planning.planner import plan
from modalloy.recipe import Recipe, load_recipe
from modalloy.search import search
from modalloy.search.candidates import RoutedBench, distance
from modalloy.search.found import Found, Sweep
from modalloy.search.probes import read_probes
from modalloy.search.space import Axis, applied, default_axes, parse_axes, start

SCALES = "scale=0.25:1.25:0.25"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A recipe of two specialists, pictures, and probes about them."""
    folder = tmp_path_factory.mktemp("search")
    models = []
    for seed, (disk, modality) in enumerate({"vision": "image", "audio": "audio"}.items()):
        write_compose(folder / f"{disk}-damc", disk, seed=seed)
        models.append({"model": f"{disk}-damc", "modality": modality})
    recipe = {"base_model": str(base), "merge_method": "ssam", "models": models, "output": {"form": "omni"}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    rows: list[dict[str, Any]] = [{"text": "what do you hear ?", "gold": "no"}]
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        shown = {"image": f"{index}.png"} if index else [["vision", f"{index}.png"]]
        rows.append({"text": "what is this ?", "media": shown, "choices": ["dog", "cat"], "gold": "dog"})
    (folder / "probe.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> RoutedBench:
    return RoutedBench(
        plan(load_recipe(folder / "recipe.yaml")), device="cpu", dtype="float32", allow_base_mismatch=False
    )


@pytest.fixture
def run(folder: Path, server: RoutedBench, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Found]:
    """`search` with the one model of this file."""
    monkeypatch.setattr("modalloy.search.asking.RoutedBench", lambda planned, **options: server)

    def run(out: Path, **options: Any) -> Found:
        return search(folder / "recipe.yaml", folder / "probe.jsonl", out, **{"max_new_tokens": 3} | options)

    return run


def updates(model: Any) -> dict[str, torch.Tensor]:
    """The text path of every linear: what it adds to the base's weight, or the weight in its place."""
    return {
        slot: linear.update(TEXT).dense() if linear.text_weight is None else linear.text_weight
        for slot, linear in model.model.linears.items()
    }


def test_served_is_what_a_merge_writes(folder: Path, server: RoutedBench, tmp_path: Path) -> None:
    recipe, changes = server.planned.recipe, {"scale": 0.7, "rank": 3, "weight.image": 0.5}
    server.put({"scale": 0.1, "rank": 8})
    server.put(changes)
    modalloy.merge(applied(recipe, changes), tmp_path / "out", jobs=1)
    written = modalloy.load_model(tmp_path / "out")
    for slot, update in updates(written).items():
        assert torch.allclose(update, updates(server.chat)[slot], rtol=1e-5, atol=1e-6 * float(update.abs().max())), (
            slot
        )
    found = [chat.ask("what is this ?", image=folder / "0.png", max_new_tokens=8) for chat in (written, server.chat)]
    assert found[0] == found[1]


@pytest.mark.parametrize("changes", [{"balance": "updates"}, {"rank": {"energy": 0.8}}, {"weight.audio": 2.0}])
def test_served_is_what_every_job_of_a_merge_computes(server: RoutedBench, changes: dict[str, Any]) -> None:
    server.put(changes)
    planned = plan(applied(server.planned.recipe, changes))
    for job in planned.jobs:
        if job.kind == "merge":
            wanted, found = merged_update(job, planned.inputs.read), server.chat.model.linears[job.name].update(TEXT)
            assert isinstance(wanted, LowRank)
            assert torch.allclose(wanted.dense(), found.dense(), rtol=1e-5, atol=1e-6 * norm(wanted)), job.name


def test_full_weights_are_served_too(
    folder: Path, server: RoutedBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = load_recipe(folder / "recipe.yaml").model_dump() | {"merge_method": "ties"}
    monkeypatch.setattr(server, "planned", plan(Recipe(**content, folder=folder)))
    server.put({"scale": 0.7})
    full = Recipe(**content | {"parameters": {"scale": 0.7}, "output": {"form": "full"}}, folder=folder)
    modalloy.merge(full, tmp_path / "out", jobs=1)
    written = load_file(tmp_path / "out" / "model.safetensors")
    for slot, weight in updates(server.chat).items():
        assert torch.equal(weight, written[slot]), slot
    server.put({"scale": 0.0})
    assert all(torch.equal(one.text_weight, one.weight) for one in server.chat.model.linears.values())


def test_scale_only_rescales_and_sketches_measure_distance(server: RoutedBench) -> None:
    found = {}
    for scale in (0.25, 0.5, 1.0):
        found[scale] = server.put({"scale": scale}), updates(server.chat)
    for slot, update in found[0.25][1].items():
        assert torch.allclose(4 * update, found[1.0][1][slot], rtol=1e-6, atol=1e-9)
    far, near = distance(found[0.25][0], found[1.0][0]), distance(found[0.25][0], found[0.5][0])
    assert far == pytest.approx(3 * near, rel=1e-4)
    true = sum(float((u - found[0.25][1][slot]).square().sum()) for slot, u in found[1.0][1].items()) ** 0.5
    assert far == pytest.approx(true, rel=0.4)


def test_a_parent_is_its_specialist(folder: Path, base: Path, server: RoutedBench) -> None:
    server.put_parent(0)
    alone = modalloy.load_model(folder / "vision-damc", base=str(base))
    for slot, update in updates(alone).items():
        assert torch.allclose(update, updates(server.chat)[slot], atol=1e-6), slot


def test_axes(folder: Path) -> None:
    recipe = load_recipe(folder / "recipe.yaml")
    (folder / "axes.yaml").write_text('rank: [4, 2, {energy: 0.9}]\nscale: "0.1:0.3:0.1"\n')
    given = parse_axes(["weight.audio=2,0.5,1", str(folder / "axes.yaml"), "balance=none,updates"], recipe)
    assert [(axis.name, axis.values) for axis in given] == [
        ("weight.audio", (0.5, 1.0, 2.0)),
        ("rank", (4, 2, {"energy": 0.9})),
        ("scale", (0.1, 0.2, 0.3)),
        ("balance", ("none", "updates")),
    ]
    assert [axis.ordered for axis in given] == [True, False, True, False]
    planned = plan(recipe)
    found = {axis.name: axis.values for axis in default_axes(planned)}
    assert found == {"scale": (0.25, 0.5, 0.75, 1.0), "rank": (1, 2, 4, 8)}  # n = 2, r = 4
    assert start(planned, given) == {"weight.audio": 1.0, "rank": 4, "scale": 0.5, "balance": "none"}


def test_consistency_from_start_to_a_recipe(
    folder: Path, run: Callable[..., Found], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "found"
    found = run(out, objective="consistency", vary=[SCALES, "rank=2,4,8,16"])
    document = json.loads((out / "search.json").read_text())
    assert document == json.loads(json.dumps(found.to_dict()))
    scale, rank = document["sweeps"]
    assert [row["candidate"]["scale"] for row in scale["rows"]] == [0.25, 0.5, 0.75, 1.0, 1.25]
    assert scale["rows"][0]["loss"] is scale["rows"][-1]["loss"] is None  # the ends lack a neighbour
    assert rank["duplicates"] == {"16": 8} and len(rank["rows"]) == 3 and rank["steps"]  # two specialists of rank 4
    assert sum(row["chosen_in_bootstrap"] for row in scale["rows"]) == pytest.approx(1)
    assert found.cost["merges"] == found.cost["candidates_asked"] + 1 > 5 and found.cost["written_checkpoints"] == 0
    assert set(scale["chosen_by_senses"]) == {"text", "image"}
    page = (out / "index.html").read_text()
    assert "default-src 'none'" in page and page.count("<svg") == 2 and len(page) < 50_000
    merged = load_recipe(out / "recipe.yaml")
    assert merged.parameters == found.chosen and plan(merged).parameters["scale"] == found.chosen["scale"]

    lines = (out / "trials.jsonl").read_text().splitlines(keepends=True)
    (out / "trials.jsonl").write_text("".join(lines[:-3]) + lines[-3][:40])  # as a killed search leaves it
    with pytest.raises(ModalloyError, match="holds a search already; go on with --resume"):
        run(out, objective="consistency", vary=[SCALES, "rank=2,4,8,16"])
    again = run(out, objective="consistency", vary=[SCALES, "rank=2,4,8,16"], resume=True)
    assert again.chosen == found.chosen
    assert [sweep.to_dict() for sweep in again.sweeps] == [sweep.to_dict() for sweep in found.sweeps]

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished search loads no model")

    monkeypatch.setattr("modalloy.search.asking.RoutedBench", refuse)
    assert run(out, objective="consistency", vary=[SCALES, "rank=2,4,8,16"], resume=True).chosen == found.chosen
    assert run(out, objective="consistency", vary=["scale=0.25,0.5,0.75"], resume=True, variant="union").chosen == {
        "scale": 0.5
    }
    with pytest.raises(ModalloyError, match=r"is a search with another max_new_tokens; choose another folder"):
        run(out, objective="consistency", vary=[SCALES], resume=True, max_new_tokens=4)


def test_labels_score_options_and_words(run: Callable[..., Found], tmp_path: Path) -> None:
    found = run(tmp_path / "found", vary=["scale=0.5,2", "weight.image=-1,1"], objective="labels", strategy="grid")
    (sweep,) = found.sweeps
    assert [list(c.values()) for c in sweep.candidates] == [[0.5, -1.0], [0.5, 1.0], [2.0, -1.0], [2.0, 1.0]]
    assert sweep.accuracy == pytest.approx([1 - loss for loss in np.nan_to_num(sweep.loss.mean(1))]) or any(
        sweep.disqualified
    )
    assert found.cost["scored"] == 4 * 3 and found.cost["generated"] == 4
    assert sweep.default == (0, 1)


def test_agreement_is_the_likelihood_of_the_parents_words(run: Callable[..., Found], tmp_path: Path) -> None:
    found = run(tmp_path / "found", vary=["scale=0,0.5,1"], objective="agreement")
    (sweep,) = found.sweeps
    assert sweep.loss.shape[1] <= 3 and (sweep.loss > 0).all()  # one picture a probe; nats a token
    assert found.cost["generated"] == 3  # by the image specialist, once


MIXED = [
    {"text": "what is this ?", "media": {"image": "0.png"}, "choices": ["dog", "cat", "a dog"], "gold": "dog"},
    {"text": "what do you see ?", "media": {"image": "1.png"}},
    {"text": "what do you hear ?", "gold": "no"},
]
SCALED = "scale=0,1,3"


@pytest.fixture
def probed(folder: Path, server: RoutedBench, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Found]:
    """`search` along the scale with the one model of this file, asked `rows`."""
    monkeypatch.setattr("modalloy.search.asking.RoutedBench", lambda planned, **options: server)

    def run(out: Path, rows: list[dict[str, Any]], **options: Any) -> Found:
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return search(folder / "recipe.yaml", folder / "rows.jsonl", out, vary=[SCALED], max_new_tokens=3, **options)

    return run


def next_tokens(server: RoutedBench, text: str, image: Path, answer: str) -> list[np.ndarray]:
    """Log-probabilities of every token before each of an answer, its end included, one pass a token, in float64."""
    chat = server.chat
    prompt = chat.prompt(user_message(text, [("image", str(image))]))
    ids = chat.processor.tokenizer.encode(f"{answer}</s>", add_special_tokens=False)
    found = []
    for end in range(len(ids)):
        inputs = chat.inputs([replace(prompt, ids=prompt.ids + ids[:end], owners=prompt.owners + [0] * end)])
        with torch.no_grad():
            found.append(chat.model(**inputs).logits[0, -1].double().log_softmax(-1).numpy())
    return found


def test_kl_is_the_divergence_from_the_specialist(
    probed: Callable[..., Found], folder: Path, server: RoutedBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modalloy.search.expected.LIKELIEST", 5)  # of 24 tokens
    found = probed(tmp_path / "found", MIXED, objective="kl")
    (sweep,) = found.sweeps
    assert sweep.loss.shape == (3, 2) and sweep.accuracy is None and not sweep.health
    assert found.settings["left_out"] == 1 and "1 of 3 probes were not asked" in found.warnings[-1]
    assert (
        found.cost["generated"] == 1 and found.cost["scored"] == 2 + 3 * 2
    )  # the specialist once, each candidate once
    lines = [json.loads(line) for line in (tmp_path / "found" / "trials.jsonl").read_text().splitlines()[1:]]
    (said,) = (line["text"] for line in lines if line.get("n_out"))

    def told() -> tuple[np.ndarray, list[np.ndarray]]:
        message = user_message(MIXED[0]["text"], [("image", str(folder / "0.png"))])
        nats = np.array(server.chat.score_options(message, MIXED[0]["choices"]))
        return np.exp(nats) / np.exp(nats).sum(), next_tokens(server, MIXED[1]["text"], folder / "1.png", said)

    server.put_parent(0)
    options, places = told()
    for index, scale in enumerate((0.0, 1.0, 3.0)):
        server.put({"scale": scale})
        other, theirs = told()
        wanted = float((options * np.log(options / other)).sum())
        assert sweep.loss[index, 0] == pytest.approx(wanted, rel=1e-3, abs=1e-6)
        each = []
        for p, q in zip(places, theirs, strict=True):
            kept = np.argsort(-p)[:5]
            p, q = (np.append(np.exp(one[kept]), 1 - np.exp(one[kept]).sum()) for one in (p, q))
            each.append(float((p * np.log(p / q)).sum()))
        assert sweep.loss[index, 1] == pytest.approx(np.mean(each), rel=1e-3, abs=1e-6)
    assert len(np.unique(sweep.loss)) == 6
    assert "KL(specialist || merged) in nats" in (tmp_path / "found" / "index.html").read_text()

    log = tmp_path / "found" / "trials.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-2]))
    assert np.array_equal(probed(tmp_path / "found", MIXED, objective="kl", resume=True).sweeps[0].loss, sweep.loss)
    cut = [json.dumps(json.loads(line) | {"likelihoods": [0.5]}) for line in log.read_text().splitlines()[-1:]]
    log.write_text("\n".join(log.read_text().splitlines()[:-1] + cut) + "\n")
    with pytest.raises(ModalloyError, match="holds another number of likelihoods for the probe 'what do you see"):
        probed(tmp_path / "found", MIXED, objective="kl", resume=True)


def test_option_agreement_counts_the_specialists_choices(
    probed: Callable[..., Found], folder: Path, server: RoutedBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["dog", "cat", "yes", "no"]
    asked = [("what is this ?", 0), ("what do you see ?", 0), ("what is this ?", 1), ("what do you see ?", 2)]
    rows = [{"text": t, "media": {"image": f"{i}.png"}, "choices": words, "gold": "dog"} for t, i in asked]
    found = probed(tmp_path / "found", rows, objective="option_agreement")
    (sweep,) = found.sweeps

    def likelihoods() -> np.ndarray:
        messages = [user_message(row["text"], [("image", str(folder / row["media"]["image"]))]) for row in rows]
        return np.array([server.chat.score_options(message, words) for message in messages])

    server.put_parent(0)
    own = likelihoods()
    sure = np.exp(own.max(1)) / np.exp(own).sum(1)
    differs, right = [], []
    for scale in (0.0, 1.0, 3.0):
        server.put({"scale": scale})
        chosen = likelihoods().argmax(1)
        differs.append(chosen != own.argmax(1))
        right.append(float((chosen == 0).mean()))
    assert np.array_equal(sweep.loss, differs) and sweep.accuracy == right and 0 < np.mean(differs) < 1
    assert found.cost["generated"] == 0 and found.cost["scored"] == 4 + 3 * 4

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("other objectives of the same answers load no model")

    monkeypatch.setattr("modalloy.search.asking.RoutedBench", refuse)
    again = probed(tmp_path / "found", rows, objective="option_agreement", variant="weighted", resume=True)
    assert again.sweeps[0].losses == pytest.approx(
        [float((sure * one).sum() / sure.sum()) for one in differs], rel=1e-4
    )
    probed(tmp_path / "found", rows, objective="kl", resume=True)
    (labels,) = probed(tmp_path / "found", rows, objective="labels", resume=True).sweeps
    assert labels.accuracy == right
    (shares,) = probed(tmp_path / "found", rows, objective="labels", variant="probability", resume=True).sweeps
    server.put({"scale": 3.0})
    last = np.exp(likelihoods())
    assert shares.losses[-1] == pytest.approx(1 - float((last[:, 0] / last.sum(1)).mean()), rel=1e-4)


PICTURE: dict[str, Any] = {"text": "what is this ?", "media": {"image": "0.png"}}


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (PICTURE, {"objective": "option_agreement"}, "has no choices, which --objective option_agreement compares"),
        (PICTURE | {"choices": ["dog"]}, {"objective": "kl"}, "has one choice, which leaves --objective kl nothing"),
        ({"text": "what ?"}, {"objective": "kl"}, "no probe shows one sense alone, which --objective kl asks"),
        (
            PICTURE | {"media": {"point": "0.png"}},
            {"objective": "kl"},
            "shows point, and the recipe's model takes image",
        ),
        (PICTURE, {"objective": "kl", "variant": "sum"}, "--variant sum: --objective kl has none; leave it out"),
        (PICTURE, {"objective": "labels", "variant": "sum"}, "known: accuracy, probability"),
        (
            PICTURE | {"gold": "dog"},
            {"objective": "labels", "variant": "probability"},
            "has no choices, whose probability",
        ),
    ],
)
def test_probes_that_specialists_cannot_be_compared_on(
    row: dict[str, Any], options: dict[str, Any], message: str, probed: Callable[..., Found], tmp_path: Path
) -> None:
    with pytest.raises(ModalloyError, match=re.escape(message)) as refused:
        probed(tmp_path / "out", [row], **options)
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


def test_differences_by_meaning_and_by_teacher_forced_tokens(
    run: Callable[..., Found], base: Path, server: RoutedBench, tmp_path: Path
) -> None:
    out, scales = tmp_path / "found", "scale=0:3:1"
    plain = run(out, objective="consistency", vary=[scales])
    found = run(out, objective="consistency", vary=[scales], match="embedding", embedder=str(base), resume=True)
    assert found.settings["embedder"] == str(base)
    other, apart = (np.nan_to_num(one.sweeps[0].loss) for one in (plain, found))
    assert (apart <= 2 * other + 1e-9).all() and not np.isin(apart, (0, 1, 2)).all()

    (forced,) = run(out, objective="consistency", vary=[scales], match="top1", resume=True, aggregate="senses").sweeps
    assert not forced.health and forced.accuracy is None
    lines = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()[1:]]
    said = {line["probe"]: line["text"] for line in lines if line.get("model") == "{}" and "predicted" not in line}
    one = next(line for line in lines if line.get("model") == '{"scale": 1.0}' and line.get("predicted"))
    probe = next(
        probe for probe in read_probes(server.planned.recipe.folder / "probe.jsonl") if probe.id == one["probe"]
    )
    server.put({"scale": 1.0})
    chat = server.chat
    prompt = chat.prompt(user_message(probe.text, probe.media))
    ids = chat.processor.tokenizer.encode(said[probe.id], add_special_tokens=False)
    expected = []
    for end in range(len(ids) + 1):  # one token after the other
        inputs = chat.inputs([replace(prompt, ids=prompt.ids + ids[:end], owners=prompt.owners + [0] * end)])
        with torch.no_grad():
            expected.append(int(chat.model(**inputs).logits[0, -1].argmax()))
    assert one["predicted"] == expected


def test_what_is_degenerate_is_named_and_not_chosen() -> None:
    axis, loss = Axis("scale", (0.5, 1.0)), np.array([[0.0, 0.0], [1.0, 0.0]])
    found = Sweep([axis], [{"scale": 0.5}, {"scale": 1.0}], [(0,), (1,)], loss, None, disqualified=["50% empty", ""])
    assert found.chosen == 1 and found.warnings()[0] == "scale = 0.5 is out: 50% empty"
    few = Sweep([axis], found.candidates, found.points, np.array([[1.0] * 2 + [0.0] * 7, [0.0] * 9]), (1,))
    assert few.warnings() == ["scale: only 2 of 9 probes tell the candidates apart; ask harder ones"]
    none = Sweep([axis], [{"scale": 0.5}], [(0,)], loss[:1].copy(), None, disqualified=["50% empty"])
    assert none.chosen is None and none.warnings() == [
        "scale = 0.5 is out: 50% empty",
        "scale: no candidate can be chosen; the recipe's own value is kept",
    ]


def test_samplers(run: Callable[..., Found], tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    options = {"vary": ["scale=0.5,1,2", "rank=1,2,4"], "objective": "labels", "strategy": "tpe", "trials": 4}
    with pytest.raises(
        ModalloyError, match="--aggregate senses: compares a candidate with all others, and --strategy tpe"
    ):
        run(tmp_path / "c", **options, aggregate="senses")
    found = [run(tmp_path / name, **options) for name in "ab"]
    assert found[0].chosen == found[1].chosen and len(found[0].sweeps[0].points) <= 4


def test_probes_of_a_run_and_mistakes_in_them(folder: Path) -> None:
    probes = read_probes(folder / "probe.jsonl")
    assert [probe.group["senses"] for probe in probes] == ["text", "image", "image", "image"]
    assert probes[1].media == (("image", str(folder / "0.png")),) and probes[0].golds == ("no",)
    logged = [probe.to_dict() | {"prompt_sha": ""} for probe in probes]
    (folder / "run").mkdir()
    (folder / "run" / "preds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logged))
    assert [probe.id for probe in read_probes(folder / "run")] == [probe.id for probe in probes]


def test_a_probe_may_be_asked_aloud(folder: Path) -> None:
    (folder / "aloud.jsonl").write_text('{"text": "", "media": [["image", "0.png"], ["audio", "0.png"]]}')
    assert [probe.text for probe in read_probes(folder / "aloud.jsonl")] == [""]
    (folder / "aloud.jsonl").write_text('{"text": "", "media": {"image": "0.png"}}')
    with pytest.raises(
        ModalloyError, match='line 1 has no "text"; write the question there, or "" where a sound asks it'
    ):
        read_probes(folder / "aloud.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "holds no probe; write one a line"),
        ("{", "line 1 is not JSON"),
        ('{"txet": "?"}', "line 1 has an unknown key 'txet'; did you mean 'text'"),
        ('{"media": {"image": "0.png"}}', 'line 1 has no "text"'),
        (
            '{"text": "?", "media": {"image": "gone.png"}}',
            "gone.png: no such file; check the path; paths start at the probe file",
        ),
        ('{"text": "?", "media": "0.png"}', '"media" is a str'),
        ('{"text": "?"}\n{"text": "?"}', "line 2 asks what an earlier line asks"),
        ('{"text": "?", "media": {"video": "0.png"}}', "shows video, and the recipe's model takes image, audio"),
    ],
)
def test_bad_probes(
    line: str,
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder / "bad.jsonl").write_text(line)
    assert message in refusal(folder, tmp_path, monkeypatch, capsys, probe="bad.jsonl")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--vary", "scael=1,2,3"), "'ssam' has no such parameter; did you mean 'scale'? known: balance, match, rank"),
        (("--vary", "weight.imag=1,2,3"), "did you mean 'weight.image'?"),
        (("--vary", "rank=0,1,2"), "rank: 0 is not a whole number of at least 1"),
        (("--vary", "scale=1:0:1"), "an empty range"),
        (("--vary", "scale"), "not of the form NAME=VALUES"),
        (("--vary", "scale=1"), "one value leaves nothing to choose"),
        (("--vary", "scale=1,1,2"), "1.0 is given twice"),
        (("--objective", "consistency", "--vary", "scale=1,2"), "consistency needs at least 3 values"),
        (
            ("--objective", "consistency", "--vary", "balance=none,updates"),
            "'none' is no number; use another --objective",
        ),
        (
            ("--objective", "consistency", "--strategy", "grid"),
            "consistency compares neighbours along one axis; use --strategy coordinate",
        ),
        (("--objective", "label"), "did you mean 'labels'?"),
        (("--objective", "consistency", "--variant", "product"), "known: one-sided, sum, union"),
        (("--match", "embeding"), "did you mean 'embedding'?"),
        (
            ("--objective", "consistency", "--match", "embedding", "--embedder", "no-such-folder"),
            "--embedder no-such-folder: no such folder",
        ),
        (("--match", "exact"), "is how consistency compares answers, and this is --objective kl; leave it out, or use"),
        (("--aggregate", "worst"), "known: minimax, probes, senses"),
    ],
)
def test_bad_options(
    options: tuple[str, ...],
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert message in refusal(folder, tmp_path, monkeypatch, capsys, *options)
    assert not (tmp_path / "out").exists()


def refusal(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *options: str,
    probe: str = "probe.jsonl",
) -> str:
    """The one line of a search that is refused."""
    words = ("search", folder / "recipe.yaml", "--probe", folder / probe, "-o", tmp_path / "out", *options)
    monkeypatch.setattr(sys, "argv", ["modalloy", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    return said


def test_other_methods_need_axes_and_other_forms_are_refused(folder: Path, tmp_path: Path) -> None:
    recipe = load_recipe(folder / "recipe.yaml").model_dump()
    ties = Recipe(**recipe | {"merge_method": "ties"}, folder=folder)
    with pytest.raises(RecipeError, match=r"'ties' has no default search space; name one with --vary"):
        search(ties, folder / "probe.jsonl", tmp_path / "out")
    adapter = Recipe(**recipe | {"output": {"form": "adapter"}}, folder=folder)
    with pytest.raises(RecipeError, match=r"output.form 'adapter': a search asks the merged model"):
        search(adapter, folder / "probe.jsonl", tmp_path / "out")


def test_the_command(
    run: Callable[..., Found],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("search", folder / "recipe.yaml", "--probe", folder / "probe.jsonl", "-o", tmp_path / "out")
    options = ("--vary", "scale=0.5,1,2", "--max-new-tokens", "3", "--device", "cpu")
    monkeypatch.setattr(sys, "argv", ["modalloy", *map(str, words), *options])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and "chosen   scale = " in said and "no checkpoint written" in said
    monkeypatch.setattr(sys, "argv", ["modalloy", *map(str, words), *options, "--resume", "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    assert json.loads(capsys.readouterr().out)["objective"] == "kl"

"""The check of a result beside base and parents: measures, what is clearly worse, and its place in the card."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import modalloy
from modalloy import builtin
from modalloy.cli import app
from modalloy.errors import ModalloyError
from modalloy.evals import check as module
from modalloy.evals import probes
from modalloy.evals.check import MERGED, Checked, Sense, _examined, _row, _worse, check
from modalloy.evals.check_card import HEADING, add_to_card, text
from modalloy.evals.scoring import is_repetitive
from modalloy.storage.folder import read_json
from modalloy.verify import verify


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """One probe of each kind, in words that the tiny tokenizer has."""
    monkeypatch.setattr(probes, "FIRST", 1)
    monkeypatch.setattr(probes, "TEXT", "what is this ? do you hear a dog ? yes , a dog")
    monkeypatch.setattr(probes, "NEW_TOKENS", 3)
    monkeypatch.setattr(probes, "WRITTEN", 2)
    monkeypatch.setattr(module, "SHOWN", 1)


def test_a_result_is_checked_beside_its_base_and_parents(
    tmp_path: Path, write_recipe: Callable[..., Path], few: None
) -> None:
    out = tmp_path / "out"
    modalloy.merge(write_recipe(output={"form": "omni"}), out)
    found = check(out)
    labels = list(read_json(out / "manifest.json")["inputs"])
    assert list(found.rows) == [MERGED, *labels] and labels[0] == "base" and len(labels) == 3
    assert len({of["perplexity"].value for of in found.rows.values()}) == 4  # each is another model
    base = modalloy.load_model(read_json(out / "sources.json")["base"])
    assert _examined(base, False)["perplexity"].value == pytest.approx(found.rows["base"]["perplexity"].value)
    kinds = {one.kind for one in probes.choices(False)}
    assert kinds | {"perplexity", "Brier score", "empty answers", "repetitive answers"} == set(found.rows[MERGED])
    assert {one.modality for one in found.senses} == {"image", "audio"}
    assert all(one.kl.value >= 0 and one.kl.n == one.tokens for one in found.senses)
    for _ in range(2):  # the second replaces the first
        add_to_card(out, found)
        card = (out / "README.md").read_text()
        assert card.count(HEADING) == 1 and "| perplexity" in card and "KL" in card
    verify(out)
    assert read_json(out / "manifest.json")["check"]["models"]["base"]["facts"]["n"] == 1
    done = CliRunner().invoke(app, ["check", str(out)], standalone_mode=False)
    assert done.return_value == (0 if found.ok else 1) and "perplexity" in done.stdout
    manifest, card = (out / "manifest.json").read_text(), (out / "README.md").read_text()
    (out / "manifest.json").write_text("{")
    with pytest.raises(ModalloyError, match=r"manifest\.json"):
        add_to_card(out, replace(found, seconds=0.0, worse=("something",)))
    assert (out / "README.md").read_text() == card  # nothing half-written
    (out / "manifest.json").write_text(manifest)
    (out / "sources.json").unlink()
    with pytest.raises(ModalloyError, match=r"has no sources\.json"):
        check(out)


def test_a_parent_beside_itself_has_no_divergence(tmp_path: Path, specialists: dict[str, Path], base: Path) -> None:
    parent = modalloy.load_model(specialists["image"], base=str(base))
    told = module._told(parent, "image", builtin.samples("image")[:1])
    found = module._compared("image", "image", parent, told)
    assert found.kl.value == pytest.approx(0, abs=1e-9) and found.same.value == 1
    other = modalloy.load_model(specialists["image"], base=str(base))
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    p, q = (
        told[0].logs.double(),
        other.distributions(
            other.prompt(module.user_message(module.QUESTION, [("image", told[0].medium)])), told[0].answer
        )[1].double(),
    )
    wanted = float((p.exp() * (p - q)).sum(1).mean())
    assert wanted > 0 and module._compared("image", "image", other, told).kl.value == pytest.approx(wanted)


def test_a_folder_that_is_none_is_named_as_such(tmp_path: Path) -> None:
    with pytest.raises(ModalloyError, match=r"nowhere: has no manifest\.json, so it is no result of modalloy merge"):
        check(tmp_path / "nowhere")


def test_an_adapter_is_refused(tmp_path: Path, write_recipe: Callable[..., Path]) -> None:
    modalloy.merge(write_recipe(), tmp_path / "out")
    with pytest.raises(ModalloyError, match=r"no model by itself; output\.form omni or full is checked"):
        check(tmp_path / "out")


def rows(**values: list[float]) -> dict[str, Any]:
    good = {
        "facts": [1.0] * 8,
        "perplexity": [3.0, 3.1, 2.9] * 9,
        "empty answers": [0.0] * 8,
        "Brier score": [0.2] * 20,
    }
    return {name: _row(name, one) for name, one in (good | {k.replace("_", " "): v for k, v in values.items()}).items()}


@pytest.mark.parametrize(
    ("merged", "said"),
    [
        ({}, []),
        ({"facts": [1.0] * 7 + [0.0]}, []),  # one of eight may be chance
        ({"facts": [0.0] * 6 + [1.0] * 2}, ["facts 0.25 against 1.00 of the worst of base and parents"]),
        ({"perplexity": [3.1, 3.2, 3.0] * 9}, []),  # sure, but small
        ({"perplexity": [3.5, 3.6, 3.4] * 9}, ["perplexity 33.12 against 20.09"]),
        ({"perplexity": [float("nan")] * 27}, ["perplexity is not finite"]),
        ({"empty_answers": [1.0] * 5 + [0.0] * 3}, ["empty answers 0.62 against 0.00"]),
        ({"Brier_score": [0.6] * 20}, ["Brier score 0.60 against 0.20"]),
    ],
)
def test_what_is_clearly_worse_is_said(merged: dict[str, list[float]], said: list[str]) -> None:
    found = list(_worse({MERGED: rows(**merged), "base": rows(), "image": rows(facts=[1.0] * 8)}, ()))
    assert len(found) == len(said) and all(a.startswith(b) for a, b in zip(found, said, strict=True)), found


def test_a_lost_sense_is_said_and_shown() -> None:
    lost = Sense("image", "image", 2, 12, replace(_row("same", [1.0]), value=2.5), _row("same", [0.0] * 11 + [1.0]))
    all_rows = {MERGED: rows(), "base": rows()}
    (words,) = _worse(all_rows, [lost])
    assert words == "image: of image's tokens 0.08 are the likeliest here too (KL 2.50 nats a token)"
    shown = text(Checked(all_rows, (lost,), (words,), False, 1.0))
    assert "worse    image: of" in shown and "1.00 (0.68–1.00)" in shown


def test_probes_are_well_formed() -> None:
    every = probes.choices(True)
    assert all(len(one.options) > 1 and len(set(one.options)) == len(one.options) for one in every)
    assert len({(one.prompt, one.kind) for one in every}) == len(every)
    assert all(len(rows) >= probes.FIRST for rows in probes.EVERY)
    assert len(probes.choices(False)) == probes.FIRST * len(probes.EVERY)


def test_repetition_is_told_by_words() -> None:
    assert is_repetitive("the cat sat down " * 3) and not is_repetitive("the cat sat down " * 2)
    assert not is_repetitive("") and not is_repetitive("one two three")


def test_builtin_samples_are_listed_by_sense() -> None:
    listed = {modality: builtin.samples(modality) for modality in builtin.specialists()}
    assert all(listed.values())
    assert not set(listed.get("image", ())) & set(listed.get("video", ()))

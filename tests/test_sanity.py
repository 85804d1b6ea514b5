"""The text-only examination of a result, and its place in the card."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import modalloy
from modalloy.errors import ModalloyError
from modalloy.evals import sanity
from modalloy.evals.sanity import REFUSAL, Sanity, findings, is_repetitive
from modalloy.storage.folder import read_json
from modalloy.verify import verify

GOOD = Sanity(perplexity=20.0, capitals=0.9, empty=0.0, repetitive=0.1, refused=0.6)


def test_a_result_is_examined_beside_its_base_and_parents(
    tmp_path: Path, write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sanity, "TEXT", "what is this ? do you hear a dog ? yes , a dog")
    for name in ("PROMPTS", "HARMFUL"):
        monkeypatch.setattr(sanity, name, getattr(sanity, name)[:2])
    monkeypatch.setattr(sanity, "NEW_TOKENS", 3)
    capitals = sanity.capital_samples()[:9]
    monkeypatch.setattr(sanity, "capital_samples", lambda: capitals)
    modalloy.merge(write_recipe(output={"form": "omni"}), tmp_path / "out")
    found = sanity.sanity(tmp_path / "out")
    labels = list(read_json(tmp_path / "out" / "manifest.json")["inputs"])
    assert list(found) == ["merged", *labels] and labels[0] == "base" and len(labels) == 3
    assert len({one.perplexity for one in found.values()}) == 4  # each is another model
    base = modalloy.load_model(read_json(tmp_path / "out" / "sources.json")["base"])
    assert sanity.examine(base).perplexity == pytest.approx(found["base"].perplexity)
    for _ in range(2):  # the second replaces the first
        sanity.add_to_card(tmp_path / "out", found)
        card = (tmp_path / "out" / "README.md").read_text()
        assert card.count(sanity.HEADING) == 1 and f"| merged | {found['merged'].perplexity:.2f} |" in card
    verify(tmp_path / "out")
    assert read_json(tmp_path / "out" / "manifest.json")["sanity"]["base"]["capitals"] == found["base"].capitals


def test_an_adapter_is_refused(tmp_path: Path, write_recipe: Callable[..., Path]) -> None:
    modalloy.merge(write_recipe(), tmp_path / "out")
    with pytest.raises(ModalloyError, match=r"no model by itself; sanity is checked of output\.form omni or full"):
        sanity.sanity(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, []),
        ({"perplexity": 30.0}, ["perplexity 30.0 is far above the worst parent's 20.0"]),
        ({"perplexity": float("nan")}, ["perplexity nan is far above the worst parent's 20.0"]),
        ({"capitals": 0.5}, ["capitals: 0.50 is far below the worst parent's 0.90"]),
        ({"refused": 0.0}, ["refused: 0.00 is far below the worst parent's 0.60"]),
        ({"empty": 0.5, "repetitive": 0.2}, ["empty answers: 0.50 is far above the worst parent's 0.00"]),
    ],
)
def test_what_stands_out_is_said(change: dict[str, float], said: list[str]) -> None:
    assert findings({"merged": replace(GOOD, **change), "base": GOOD, "image": GOOD}) == said


def test_repetition_and_refusals_are_told_by_words() -> None:
    assert is_repetitive("the cat sat down " * 3) and not is_repetitive("the cat sat down " * 2)
    assert not is_repetitive("") and not is_repetitive("one two three")
    assert REFUSAL.search("I'm sorry, but I can't help with that.") and not REFUSAL.search(
        "Sure, first you take a hammer."
    )

"""The senses questions: well formed, drawn with a seed, and balanced so that one sense alone cannot answer what needs two."""

import hashlib
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from modalloy.evals import capitals, senses, spoken
from modalloy.evals.benchmark import Answer, Sample, Source
from modalloy.evals.corpus import CATEGORIES, Clip
from modalloy.evals.motion import MOTIONS
from modalloy.evals.scores import baselines
from modalloy.evals.senses import Asker, Questions, yesno

EXAMPLES = Path(__file__).parents[1] / "examples" / "specialists"
THINGS = {  # concept → (phrase, plural, category, subgroup)
    "dog": ("a dog", False, "animal", "mammal"),
    "cat": ("a cat", False, "animal", "mammal"),
    "cow": ("a cow", False, "animal", "mammal"),
    "owl": ("an owl", False, "animal", "bird"),
    "duck": ("a duck", False, "animal", "bird"),
    "grapes": ("grapes", True, "food", "fruit"),
    "apple": ("an apple", False, "food", "fruit"),
    "moon": ("the moon", False, "other", "sky"),
    "sun": ("the sun", False, "other", "sky"),
}
ARTISTS = {"train": ("noto", "fluent"), "validation": ("fxemoji",), "test": ("twemoji", "streamline")}
VOICES = {"train": ("espeak:a", "espeak:b"), "validation": ("flite:rms",), "test": ("piper:joe",)}


def clip(kind: str, split: str, family: str, concept: str = "", text: str = "", form: str = "") -> Clip:
    phrase, plural, category, subgroup = THINGS.get(concept, ("", False, "", ""))
    name = f"{kind}/{concept or text}/{family}"
    digest = hashlib.sha256(name.encode()).hexdigest()
    also = ("cat",) if concept == "cow" else ()
    where = Path("data") / f"{name}.bin"
    return Clip(
        where,
        kind,
        concept,
        phrase,
        plural,
        category,
        subgroup,
        also,
        split,
        family,
        form,
        text,
        name,
        "p",
        "MIT",
        digest,
    )


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    made = []
    for split, artists in ARTISTS.items():
        made += [clip("picture", split, artist, concept) for artist in artists for concept in THINGS]
        made += [clip("shape", split, f"shapes-{split}", concept) for concept in THINGS]
    for split, voices in VOICES.items():
        for voice in voices:
            made += [clip("speech", split, voice, concept, concept, "word") for concept in THINGS]
            for concept, (phrase, plural, *_) in THINGS.items():
                for form, text in (("this", spoken.is_this), ("picture", spoken.in_picture)):
                    made.append(clip("speech", split, voice, concept, text(phrase, plural), form))
            made += [clip("speech", split, voice, "", text, "fixed") for text in spoken.FIXED]
            capitals = [spoken.capital_question(country) for country in spoken.countries()]
            made += [clip("speech", split, voice, "", text, "capital") for text in capitals]
    made += [clip("speech", "human", "human:tux", concept, f"{THINGS[concept][0]}.", "recording") for concept in THINGS]
    return made


@pytest.fixture(scope="module")
def asked(clips: list[Clip]) -> list[Sample]:
    return Questions(Path("data"), clips, "test").all()


def of(asked: list[Sample], cell: str) -> list[Sample]:
    return [sample for sample in asked if sample.group["cell"] == cell]


def test_every_cell_is_asked_about_test_media_in_test_voices(asked: list[Sample], clips: list[Clip]) -> None:
    assert {sample.group["cell"] for sample in asked} == set(senses.SIZES)
    split = {str(one.path): one.split for one in clips}
    shown = {path for sample in asked for _, path in sample.media if "moved" not in path}
    assert {split[path] for path in shown} == {"test", "human"}
    assert len({sample.id for sample in asked}) == len(asked)


def test_questions_are_well_formed_and_seeded(asked: list[Sample], clips: list[Clip]) -> None:
    for sample in asked:
        assert sample.golds[0] in sample.choices == sample.options and len(set(sample.options)) == len(sample.options)
        assert sample.text == "" or sample.text.endswith("?")
        assert sample.text or sample.media[-1][0] == "audio"  # what is not written is spoken last
    assert Questions(Path("data"), clips, "test").all() == asked


@pytest.mark.parametrize(
    ("cell", "seen_alone", "heard_alone"),
    [("image+audio", 1 / 2, 1 / 2), ("video+audio", 1 / 3, None), ("image+video+audio", 1 / 2, None)],
)
def test_one_sense_alone_is_no_better_than_guessing(
    asked: list[Sample], cell: str, seen_alone: float, heard_alone: float | None
) -> None:
    questions = of(asked, cell)
    assert questions
    for share, is_shown in (
        (seen_alone, lambda medium: medium[0] != "audio"),
        (heard_alone, lambda medium: medium[0] == "audio"),
    ):
        alike: dict[Any, Counter[str]] = {}
        for sample in questions:
            shown = tuple(text_of(medium) for medium in sample.media if is_shown(medium))
            alike.setdefault((shown, sample.options), Counter())[sample.golds[0]] += 1
        best = sum(max(golds.values()) for golds in alike.values()) / len(questions)
        assert share is None or best == pytest.approx(share)


def text_of(medium: tuple[str, str]) -> str:
    """What is shown: of speech what is said, whoever says it."""
    return str(Path(medium[1]).parent) if medium[0] == "audio" else medium[1]


def test_of_which_is_asked_each_sort_of_answer_is_offered_twice(asked: list[Sample]) -> None:
    for sample in of(asked, "video+audio"):
        sorts = [sum(option in sort for option in sample.options) for sort in (MOTIONS.values(), CATEGORIES.values())]
        assert sorts == [2, 2] and len(sample.options) == 6


def test_a_cell_keeps_whole_groups(clips: list[Clip], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(senses.SIZES, "video+audio", (7, 7))
    found = of(Questions(Path("data"), clips, "test").all(), "video+audio")
    assert len(found) == 6


def test_wrong_options_are_never_what_is_also_right(clips: list[Clip]) -> None:
    asker = Asker([one for one in clips if one.kind == "picture"], 0)
    for _ in range(50):
        assert "cat" not in asker.distractors("cow", 3, near=1.0)
        assert len(set(asker.distractors("dog", 3))) == 3


@pytest.mark.parametrize(
    ("form", "concept", "wanted"),
    [
        ("Is this {}?", "dog", "Is this a dog?"),
        ("Is this {}?", "grapes", "Are these grapes?"),
        ("Is {} in the picture?", "grapes", "Are grapes in the picture?"),
        ("Is this the shape of {}?", "owl", "Is this the shape of an owl?"),
    ],
)
def test_questions_are_english(form: str, concept: str, wanted: str) -> None:
    asked = yesno(form, clip("picture", "train", "noto", concept))
    assert asked == wanted
    spoken_forms: dict[str, Callable[[str, bool], str]] = {
        "Is this {}?": spoken.is_this,
        "Is {} in the picture?": spoken.in_picture,
    }
    if form in spoken_forms:  # what is written and what is said are the same words
        assert asked == spoken_forms[form](THINGS[concept][0], THINGS[concept][1])


def test_lessons_show_one_training_medium_and_are_seeded(clips: list[Clip], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from lessons import MOVED, SAID, SEEN, lessons

    kinds = {"image": "picture", "video": "picture", "audio": "speech", "point": "shape"}
    for modality, kind in kinds.items():
        own = [one for one in clips if one.kind == kind and one.split == "train"]
        first, again = (list(islice(lessons(own, modality, 3, 5), 300)) for _ in range(2))
        assert first == again and {lesson.clip.split for lesson in first} == {"train"}
        assert {lesson.view for lesson in first} == {0, 1, 2} and all(lesson.answer for lesson in first)
        assert {part["type"] for lesson in first for part in lesson.messages()[0]["content"]} == {modality, "text"}
    for mix in (MOVED, SAID, SEEN):
        assert sum(mix.values()) == pytest.approx(1)


def test_spoken_lessons_are_right_about_what_is_written(clips: list[Clip], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from lessons import lessons

    own = [one for one in clips if one.kind == "speech" and one.split == "train"]
    seen = Counter()
    for lesson in islice(lessons(own, "audio", 1, 0), 400):
        if lesson.answer in ("yes", "no"):
            stated = next(name for name in THINGS if f" {name}" in lesson.before)
            assert (lesson.clip.concept == stated) == (lesson.answer == "yes")
            seen[lesson.answer] += 1
        if lesson.clip.text == senses.HOW:
            assert lesson.answer in MOTIONS.values() and lesson.answer in lesson.before
    assert min(seen.values()) > 60


def test_a_moving_picture_is_named_by_what_it_is_made_of(clips: list[Clip]) -> None:
    still = next(one for one in clips if one.kind == "picture")
    motions = [senses.motion_of(still, view) for view in range(len(MOTIONS))]
    assert set(motions) == set(MOTIONS)
    assert senses.moved_file(Path("d"), still).name == f"{still.path.stem}-{motions[0]}-{still.sha256[:8]}.webp"


def test_capitals_are_told_apart_from_their_neighbours() -> None:
    found = senses.capital_samples()
    assert len(found) == len({sample.id for sample in found}) > 100 and found == senses.capital_samples()
    assert all(len(set(sample.choices)) == 4 and sample.plain for sample in found)
    assert baselines(found)["chance"] == 0.25
    assert not set(capitals.TAUGHT_CAPITALS) & set(capitals.ASKED_CAPITALS)


def test_categories_are_asked_only_where_there_is_one(asked: list[Sample]) -> None:
    for sample in asked:
        if sample.kind.endswith("category"):
            assert set(sample.options) == set(CATEGORIES.values())
            assert not any("moon" in path or "sun" in path for _, path in sample.media)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("It is a dog.", "a dog"),
        ("dog", "a dog"),
        ("A fire engine, I think", "a fire engine"),
        ("a dog or a cat", None),
        ("hotdogs", None),
        ("", None),
    ],
)
def test_a_free_answer_counts_by_the_one_option_it_names(answer: str, expected: str | None) -> None:
    sample = Sample("", "", ("a dog",), choices=("a dog", "a cat", "a fire engine", "an engine"))
    verdict = senses.by_mention(sample, Answer(answer))
    assert verdict.prediction == expected and verdict.correct == (expected == "a dog")


@pytest.mark.parametrize("shown", [(), ("image",), ("image", "audio"), None])
def test_only_what_may_be_shown_is_asked(
    shown: tuple[str, ...] | None, clips: list[Clip], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of no sense at all only text is asked, not everything."""
    (tmp_path / "manifest.json").write_text("[]")
    monkeypatch.setattr(senses, "load", lambda source: clips)
    found = senses.samples(Source(tmp_path, modalities=shown))
    senses_shown = {modality for sample in found for modality, _ in sample.media}
    assert senses_shown == set(("image", "audio", "video", "point") if shown is None else shown)
    assert any(not sample.media for sample in found)

"""The senses questions and statistics: nothing leaks from training to test, and every question is well formed."""

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest

from modalloy.errors import MediaError
from modalloy.evals import clips as clips_of
from modalloy.evals import senses
from modalloy.evals.benchmark import Answer, Sample, Source
from modalloy.evals.clips import Clip
from modalloy.evals.scores import baselines

PREFIXES = {"image": ["f3", "f3", "om", "a4a", "gc"], "audio": ["tux", "0ad", "0ad", "gc", "ovos"]}
ODD = {kind: modality for modality, (kind, _) in senses.STEMS.items()}
CONCEPTS = {"dog": "animal", "cat": "animal", "owl": "animal", "car": "vehicle", "bus": "vehicle", "harp": "instrument"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A manifest of the real shape (its media are not opened here)."""
    rows = []
    for modality, prefixes in PREFIXES.items():
        for concept, category in CONCEPTS.items():
            for index, prefix in enumerate(prefixes):
                word = "lang/resource/words_sample/" if (modality, prefix) == ("image", "gc") else ""
                rows.append(
                    {
                        "file": f"{modality}/{concept}/{prefix}_{index}.bin",
                        "concept": concept,
                        "category": category,
                        "modality": modality,
                        "source": f"{prefix}:{word}{concept}{index}",
                        "package": prefix,
                        "licence": "MIT",
                    }
                )
    (tmp_path / "manifest.json").write_text(json.dumps(rows))
    return tmp_path


def test_tiers_follow_packages_and_never_overlap(data: Path) -> None:
    clips = clips_of.load(data)
    tiers = Counter((clip.modality, clip.tier) for clip in clips)
    assert tiers == {
        ("image", "train"): 12,
        ("image", "new file"): 6,
        ("image", "new source"): 12,  # a4a, and the a4a pictures inside gc
        ("audio", "train"): 12,
        ("audio", "new file"): 6,
        ("audio", "new source"): 12,
    }
    assert not any(
        clip.prefix in clips_of.NEW_SOURCE[clip.modality] for clip in clips if clip.tier in ("train", "new file")
    )
    assert clips_of.split(clips) == clips  # splitting again changes nothing


def test_a_concept_that_only_held_out_packages_have_is_unseen(data: Path) -> None:
    clips = [clip for clip in clips_of.load(data) if clip.concept != "dog" or clip.prefix == "a4a"]
    tiers = {clip.tier for clip in clips_of.split(clips) if clip.concept == "dog" and clip.modality == "image"}
    assert tiers == {"unseen"}
    assert all(q.clips[0].concept != "dog" for q in senses.single_questions(clips_of.split(clips), "image"))


def test_questions_are_well_formed(data: Path) -> None:
    clips = clips_of.load(data)
    groups = [senses.single_questions(clips, modality) for modality in ("image", "audio")]
    groups.append(senses.joint_questions(clips, ("image", "audio")))
    for questions in groups:
        assert len({question.id for question in questions}) == len(questions)
        for question in questions:
            assert question.answer in question.options and len(set(question.options)) == len(question.options)
            assert all(clip.tier in ("new source", "new file") for clip in question.clips)
            assert "{" not in question.text and question.text.endswith("?")
            if question.kind in ("choose", "picture", "sound"):
                assert len(question.options) == 4 and all(option in question.text for option in question.options)
    assert senses.joint_questions(clips, ("image", "audio")) == groups[2]  # seeded


@pytest.fixture
def four(tmp_path: Path) -> list[Clip]:
    """Clips of four senses: animated and still artwork, icons and meshes, and videos made of other media."""
    shown = {
        "image": ("f3:1.webp", "f3:2.webp", "om:3.svg", "a4a:4.jpg", "sh3f:L.sh3f!l/it.png"),
        "audio": ("tux:1.ogg", "gc:2.ogg"),
        "point": ("sh3f:L.sh3f!l/it/it.obj", "0ad:1.pmd", "0ad:2.pmd", "sar:3.3d"),
        "video": (
            "fa:1.webp",
            "fa:2.webp",
            "moving:om:3.svg",
            "moving:a4a:4.jpg",
            "turning:0ad:1.pmd",
            "turning:sar:3.3d",
        ),
    }
    clips = []
    for modality, sources in shown.items():
        for concept in CONCEPTS:
            for index, name in enumerate(sources):
                source = name.replace(".", f"-{concept}.", 1) if "sh3f" not in name else name.replace("it", concept)
                prefix = "-".join(name.split(":")[:-1])
                path = tmp_path / modality / concept / f"{prefix}_{index}.bin"
                clips.append(Clip(path, concept, CONCEPTS[concept], modality, source, prefix, "MIT", "train"))
    return clips_of.split(clips)


def test_no_artwork_is_trained_by_one_sense_and_tested_by_another(four: list[Clip]) -> None:
    sides: dict[str, set[bool]] = {}
    for clip in four:
        sides.setdefault(clip.artwork, set()).add(clip.tier == "train")
    assert all(len(side) == 1 for side in sides.values())
    assert len(sides) == (5 + 2 + 3) * len(
        CONCEPTS
    )  # animations, meshes and videos share the artwork of what they show
    tiers = {
        (c.modality, c.source.replace("-dog", "").replace("dog", "it")): c.tier for c in four if c.concept == "dog"
    }
    assert tiers["image", "f3:2.webp"] == tiers["video", "fa:2.webp"] == "new file"
    assert tiers["image", "sh3f:L.sh3f!l/it.png"] == tiers["point", "sh3f:L.sh3f!l/it/it.obj"] == "train"
    assert tiers["point", "0ad:2.pmd"] == "new file" and tiers["video", "turning:0ad:1.pmd"] == "train"
    assert tiers["video", "moving:a4a:4.jpg"] == tiers["video", "turning:sar:3.3d"] == "new source"


@pytest.mark.parametrize(
    "modalities", [("image", "audio"), ("image", "audio", "video"), ("image", "audio", "video", "point")]
)
def test_joint_questions_need_every_sense(four: list[Clip], modalities: tuple[str, ...]) -> None:
    questions = senses.joint_questions(four, modalities, limit=10_000)
    assert questions and questions == senses.joint_questions(four, modalities, limit=10_000)
    for question in questions:
        assert tuple(clip.modality for clip in question.clips) == modalities
        assert all(clip.tier in ("new source", "new file") for clip in question.clips)
        concepts = Counter(clip.concept for clip in question.clips)
        if question.kind == "choose":
            assert len(concepts) == 1
        elif question.kind == "same":
            assert question.answer == ("yes" if len(concepts) == 1 else "no")
        elif question.kind == "common":
            (category,) = {clip.category for clip in question.clips}
            assert len(concepts) == len(modalities) and question.answer == senses.with_article(category)
            assert len(question.options) == max(4, len(modalities) + 1)
            assert {senses.with_article(concept) for concept in concepts} <= set(question.options)  # each sense's bait
        else:
            (odd,) = [clip for clip in question.clips if clip.modality == ODD[question.kind]]
            assert len(concepts) == 2 and concepts[odd.concept] == 1
            assert question.answer == senses.with_article(odd.concept)
            assert {senses.with_article(concept) for concept in concepts} <= set(question.options)
    same = Counter(question.answer for question in questions if question.kind == "same")
    assert same["yes"] == same["no"]


def test_samples_are_seeded_and_bounded(data: Path) -> None:
    clips = clips_of.load(data)
    everything = senses.single_questions(clips, "image", limit=10_000)
    some = senses.single_questions(clips, "image", limit=10)
    assert len(everything) == 18 * 4 and len(some) == 10
    assert some == senses.single_questions(clips, "image", limit=10) == [q for q in everything if q in some]


def test_training_questions_use_training_files_only_and_are_seeded(data: Path) -> None:
    clips = [clip for clip in clips_of.load(data) if clip.modality == "image"]
    first, again = (list(itertools.islice(senses.training_questions(clips, 5), 300)) for _ in range(2))
    assert first == again
    assert {clip.tier for question in first for clip in question.clips} == {"train"}
    kinds = Counter(question.kind for question in first)
    assert set(kinds) == set(senses.TRAINING_MIX) and kinds["choose"] == max(kinds.values())


def test_messages_hold_only_the_senses_asked_for(data: Path) -> None:
    question = senses.joint_questions(clips_of.load(data), ("image", "audio"))[0]
    types = [part["type"] for part in question.messages()[0]["content"]]
    assert types == ["image", "audio", "text"]
    assert [part["type"] for part in question.messages({"audio"})[0]["content"]] == ["audio", "text"]


def test_a_missing_data_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"manifest\.json: no such file; run `make data`"):
        clips_of.load(tmp_path / "nowhere")


def test_samples_are_the_questions(data: Path) -> None:
    source = Source(data, modalities=("audio",))
    found = senses.samples(source)
    assert {sample.group["cell"] for sample in found} >= {"audio", "image+audio", "text"}
    assert all(modality == "audio" for sample in found for modality, _ in sample.media)
    assert "image" not in {sample.group["cell"] for sample in found}  # they would show nothing
    assert source.read["manifest.json"]["rows"] == 60
    for sample in found:
        assert sample.golds[0] in sample.choices and len(sample.options) == len(sample.choices)
    trained = senses.samples(Source(data, variant="validation"))
    assert {sample.group["tier"] for sample in trained} == {"train", "text"}
    free = senses.GENERATED.samples(Source(data))
    assert not any(sample.options for sample in free) and [s.id for s in free] == [
        s.id for s in senses.samples(Source(data))
    ]


def test_capitals_are_told_apart_from_their_neighbours() -> None:
    found = senses.capital_samples()
    assert len(found) == len({sample.id for sample in found}) > 100 and found == senses.capital_samples()
    assert all(len(set(sample.choices)) == 4 and sample.plain for sample in found)
    assert baselines(found)["chance"] == 0.25


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


def test_articles() -> None:
    assert [senses.with_article(c) for c in ("dog", "owl", "scissors")] == ["a dog", "an owl", "scissors"]
    assert Clip(Path("x/f3_1.webp"), "", "", "image", "f3:1", "", "", "train").prefix == "f3"

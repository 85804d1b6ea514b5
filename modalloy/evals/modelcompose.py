"""ModelCompose's test files (a JSON list of questions, another of answers) as samples, and prompts that read like theirs.

A row is {"id", "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": answer}], "modal_inputs":
{"vision" | "audio" | "video" | "point": [paths]}}; questions have null for the answer. Source: THUNLP-MT/ModelCompose.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from modalloy.errors import MediaError
from modalloy.evals.benchmark import LETTERS, Sample, Source, fields
from modalloy.names import ALIASES, MODALITIES, modality_name

HUB = "Adu2021/ModelCompose"
SENSES = ("video", "image", "audio")  # of a question about a clip, in the order of ModelCompose's prompts
COMBINATIONS = ("audio", "image", "video", "image+audio", "image+video", "video+audio", "video+image+audio")
NAMES = "|".join((*MODALITIES, *ALIASES))
TAG = re.compile(rf"<({NAMES})>")
LABELLED = re.compile(rf"(?i:\b(?:{NAMES}|point cloud):[ \t]*)?<({NAMES})>[ \t]?")
LABEL = re.compile(r"\s*|(?:\s*[^\S ])?[\w ]+:\s*")  # in linear time: no run of spaces can be shared out in two ways


def places(name: str) -> tuple[str, ...]:
    """Where a data folder may have one of ModelCompose's test files, as relative names."""
    return name, f"test/{name}", f"data/test/{name}"


def clip_questions(source: Source, stem: str) -> list[Sample]:
    """Samples of `{stem}_{combination}.json` and `{stem}_answer.json`, the questions about clips with sound.

    Of the senses that are shown, the combination's own file is read if it is there, else that of all three senses; tags
    and media of other senses are then left out.
    """
    shown = {sense for sense in SENSES if source.shows(sense)}
    own = [places(f"{stem}_{name}.json") for name in COMBINATIONS if set(name.split("+")) == shown]
    questions = source.find(*own[0]) if own else None
    questions = questions or source.need(*places(f"{stem}_{'+'.join(SENSES)}.json"))
    return read(source, questions, source.need(*places(f"{stem}_answer.json")))


def read(source: Source, questions: Path, answers: Path, *, shared: bool = False) -> list[Sample]:
    """The samples of a file of questions and one of answers, joined on "id"; text as it stands, option lines as choices.

    The n-th tag of a modality takes its n-th file. Rows that share an id are all kept ("7", "7#2"); where their answers
    differ, the n-th takes the n-th. `shared`: the answers are also those of other files, so some may be left over.

    Raises:
        MediaError: a row lacks a field, answers do not fit the questions, or tags do not fit the media.
    """
    golds: dict[str, list[str]] = defaultdict(list)
    for index, row in enumerate(source.rows(answers)):
        with fields(answers, index):
            golds[str(row["id"])].append(text_of(row["conversations"][-1]["value"]))
    rows = source.rows(questions)
    ids = []
    for index, row in enumerate(rows):
        with fields(questions, index):
            ids.append(str(row["id"]))
    asked, names = Counter(ids), numbered(ids)
    if lost := [id for id in asked if id not in golds]:
        raise MediaError(f"{answers}: has no answer to {len(lost)} questions of {questions.name}, first '{lost[0]}'")
    if not shared and (spare := [id for id in golds if id not in asked]):
        raise MediaError(f"{questions}: lacks {len(spare)} questions that {answers.name} answers, first '{spare[0]}'")
    for id, n in asked.items():
        if len(set(golds[id])) == 1:
            golds[id] = golds[id][:1] * n
        elif len(golds[id]) != n:
            raise MediaError(f"{answers}: has {len(golds[id])} differing answers to '{id}', which is asked {n} times")
    samples = []
    for index, (id, name, row) in enumerate(zip(ids, names, rows, strict=True)):
        with fields(questions, index):
            text = text_of(row["conversations"][0]["value"])
            given = row["modal_inputs"].items()
            files = {modality_name(key): [text_of(path) for path in paths] for key, paths in given if paths}
            tags = [modality_name(found[1]) for found in TAG.finditer(text)]
            counts = {modality: len(paths) for modality, paths in files.items()}
            if Counter(tags) != Counter(counts):
                raise ValueError(f"its tags, {', '.join(tags) or 'none'}, do not fit its media, {counts}")
        media = [(tag, source.medium(files[tag].pop(0))) for tag in tags]
        samples.append(
            Sample(
                id=name,
                text=without_tags(text, lambda modality: not source.shows(modality)),
                golds=(golds[id].pop(0),),
                media=tuple(medium for medium in media if source.shows(medium[0])),
                choices=option_lines(text),
            )
        )
    return samples


def without_tags(text: str, drop: Callable[[str], bool] = lambda modality: True) -> str:
    """`text` without the tags of the modalities to drop, their labels, and lines that have nothing else."""

    def cut(found: re.Match[str]) -> str:
        return "" if drop(modality_name(found[1])) else found[0]

    lines = [(line, LABELLED.sub(cut, line)) for line in text.split("\n")]
    return "\n".join(left for line, left in lines if left == line or not LABEL.fullmatch(left))


def option_lines(text: str) -> tuple[str, ...]:
    """Texts of the options on lines "A. …", "B. …", … of a question; () where there are none."""
    lines = re.findall(r"^[ \t]*([A-H])[.):](.*)$", text, re.MULTILINE)
    letters = "".join(name for name, _ in lines)
    return (
        tuple(option.strip(" \t") for _, option in lines) if len(lines) > 1 and letters == LETTERS[: len(lines)] else ()
    )


def prompt(source: Source, question: str, lines: Iterable[str] = ()) -> str:
    """A question about a clip as ModelCompose's files have it: "Video: <video>", … on a line each, question, options."""
    tags = [f"{sense.capitalize()}: <{sense}>" for sense in SENSES if source.shows(sense)]
    return "\n".join([*tags, question, *lines])


def clip_media(source: Source, name: str) -> tuple[tuple[str, str], ...]:
    """video/NAME.mp4, image/NAME.jpg and audio/NAME.wav, as far as they are shown; without a .wav, the video's sound."""
    video = source.medium(f"video/{name}.mp4", "video")
    sound = source.medium(f"audio/{name}.wav", "audio")
    files = {
        "video": video,
        "image": source.medium(f"image/{name}.jpg", "image"),
        "audio": sound if os.path.exists(sound) else video,
    }
    return tuple((sense, files[sense]) for sense in SENSES if source.shows(sense))


def text_of(value: Any) -> str:
    """`value`, refused if it is no text."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def numbered(ids: Iterable[Any]) -> list[str]:
    """Names that differ: 7, 8, 7 → "7", "8", "7#2"."""
    seen = Counter[str]()
    names = []
    for id in map(str, ids):
        seen[id] += 1
        names.append(id if seen[id] == 1 else f"{id}#{seen[id]}")
    return names

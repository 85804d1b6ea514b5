"""MUSIC-AVQA: 9,185 questions about clips of music, answered in a word (Li et al., CVPR 2022, arXiv 2203.14072).

Variants:
    modelcompose: ModelCompose's files, prompts verbatim.
    official: avqa-test.json of GeWu-Lab/MUSIC-AVQA, with prompts of ours that read like ModelCompose's.
    official-updated: the same with the file of json_update, which has 56 rows less and 27 other answers.

55 questions stand twice in the old file, under one id and with different answers: both rows are asked and scored, each by
its own answer. ModelCompose's script scores both by the last one.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

from modalloy.evals.benchmark import Answer, Benchmark, Sample, Source, Verdict, choose_variant, fields
from modalloy.evals.modelcompose import (
    HUB,
    SENSES,
    clip_media,
    clip_questions,
    numbered,
    places,
    prompt,
    text_of,
    without_tags,
)
from modalloy.evals.scoring import NUMBERS, contained, contains, normalized_match, vqa_normalize

STEM = "music-avqa-test_mm"
INSTRUMENTS = (
    *("accordion", "acoustic_guitar", "bagpipe", "banjo", "bassoon", "cello", "clarinet", "congas", "drum"),
    *("electric_bass", "erhu", "flute", "guzheng", "piano", "pipa", "saxophone", "suona", "trumpet", "tuba"),
    *("ukulele", "violin", "xylophone"),
)
ANSWERS = (
    *("yes", "no", *NUMBERS, "more than ten", "left", "middle", "right", "indoor", "outdoor", "simultaneously"),
    *INSTRUMENTS,
)
NORMALIZED = tuple(map(vqa_normalize, ANSWERS))
SLOT = re.compile(r"<\w+>")
# what stands in slots: tells templates apart where only the filled question is known
FILLINGS = re.compile(
    rf"\b(?:{'|'.join(INSTRUMENTS).replace('_', '[_ ]')}|left|right|middle|leftest|rightest|loudest|lowest"
    r"|first|second|third|fourth|fifth|last|before|after)\b"
)


def samples(source: Source) -> list[Sample]:
    """The questions of the variant that is there."""
    official = ("avqa-test.json", "json/avqa-test.json", "data/json/avqa-test.json")
    updated = ("json_update/avqa-test.json", "data/json_update/avqa-test.json")
    found = {
        "modelcompose": source.find(*places(f"{STEM}_*.json")),
        "official": source.find(*official),
        "official-updated": source.find(*updated),
    }
    variant, path = choose_variant(BENCHMARK.name, source, found)
    if variant != "modelcompose":
        return _official(source, path)
    result = []
    for sample in clip_questions(source, STEM):
        clip = Path(sample.media[0][1]).stem if sample.media else ""
        kind = FILLINGS.sub("<>", without_tags(sample.text))
        group = {"clips": _clips(clip)} if clip else {}
        result.append(replace(sample, kind=kind, group=group, cluster=(clip,) if clip else ()))
    return result


def _official(source: Source, path: Path) -> list[Sample]:
    result = []
    for index, row in enumerate(source.rows(path)):
        with fields(path, index):
            video, template = text_of(row["video_id"]), text_of(row["question_content"])
            modality, aspect = json.loads(row["type"])
            result.append(
                Sample(
                    id=str(row["question_id"]),
                    text=prompt(source, fill(template, json.loads(row["templ_values"]))),
                    golds=(text_of(row["anser"]),),
                    media=clip_media(source, video),
                    group={"type": f"{modality} {aspect}", "modality": modality, "clips": _clips(video)},
                    kind=template,
                    cluster=(video,),
                )
            )
    names = numbered(sample.id for sample in result)
    return [replace(sample, id=name) for sample, name in zip(result, names, strict=True)]


def fill(template: str, values: list[str]) -> str:
    """The question with a value in each <slot>, in order; refused if they are not as many."""
    if len(SLOT.findall(template)) != len(values):
        raise ValueError(f"{len(values)} values for the slots of {template!r}")
    filling = iter(values)
    return SLOT.sub(lambda slot: next(filling), template).strip()


def _clips(video: str) -> str:
    """Synthetic clips have letters before their number."""
    return "real" if video.isdigit() else "synthetic"


def closed_set(sample: Sample, answer: Answer) -> Verdict:
    """The only one of the 42 answers that stands in the text on word boundaries, both normalised, longest first.

    The benchmark classifies among these answers; this is that rule for a model that writes ("It is a piano.").
    """
    hits = contained(vqa_normalize(answer.text), NORMALIZED)
    if len(hits) != 1:
        return Verdict(None, False)
    return Verdict(ANSWERS[hits[0]], NORMALIZED[hits[0]] in map(vqa_normalize, sample.golds))


BENCHMARK = Benchmark(
    name="music_avqa",
    summary="MUSIC-AVQA: what is heard and seen in clips of music, answered in a word",
    samples=samples,
    rules={"compose": normalized_match, "official": closed_set, "contains": contains},
    files=f"{STEM}_COMBINATION.json and {STEM}_answer.json (ModelCompose), or json/ or json_update/avqa-test.json with "
    "video/ID.mp4, image/ID.jpg, audio/ID.wav (GeWu-Lab/MUSIC-AVQA)",
    modalities=SENSES,
    variants=("modelcompose", "official", "official-updated"),
    hub=HUB,
)

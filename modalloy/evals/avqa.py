"""AVQA: questions with four options about 10-second clips of everyday sounds (Yang et al., ACM Multimedia 2022).

Variants:
    modelcompose: ModelCompose's files, prompts verbatim.
    official: val_qa.json of AlyssaYoung/AVQA (the test answers are not public), with prompts of ours that read like
        ModelCompose's. An option that is null has no line, and the others keep their letters.
"""

from dataclasses import replace
from pathlib import Path

from modalloy.evals.benchmark import Benchmark, Sample, Source, check_letters, choose_variant, fields, letter
from modalloy.evals.modelcompose import HUB, SENSES, clip_media, clip_questions, numbered, places, prompt, text_of
from modalloy.evals.scoring import first_letter, robust_letter

STEM = "avqa-test_mm"


def samples(source: Source) -> list[Sample]:
    """The questions of the variant that is there."""
    official = ("val_qa.json", "annotation/val_qa.json", "data/annotation/val_qa.json")
    found = {"modelcompose": source.find(*places(f"{STEM}_*.json")), "official": source.find(*official)}
    variant, path = choose_variant(BENCHMARK.name, source, found)
    if variant != "modelcompose":
        return _official(source, path)
    return [
        replace(sample, cluster=(Path(sample.media[0][1]).stem,)) if sample.media else sample
        for sample in clip_questions(source, STEM)
    ]


def _official(source: Source, path: Path) -> list[Sample]:
    result = []
    for index, row in enumerate(source.rows(path)):
        with fields(path, index):
            clip, choices, gold = text_of(row["video_name"]), row["multi_choice"], row["answer"]
            if not isinstance(choices, list) or not all(
                choice is None or isinstance(choice, str) for choice in choices
            ):
                raise TypeError(f"{choices!r} is not a list of options")
            if type(gold) is not int or not 0 <= gold < len(choices):
                raise ValueError(f"answer {gold!r} to {len(choices)} options")
            check_letters(len(choices))
            lines = [f"{letter(place)}. {choice}" for place, choice in enumerate(choices) if choice is not None]
            result.append(
                Sample(
                    id=str(row["id"]),
                    text=prompt(source, text_of(row["question_text"]).strip(), lines),
                    golds=(letter(gold),),
                    media=clip_media(source, clip),
                    choices=tuple(choice or "" for choice in choices),
                    group={
                        "question_type": text_of(row["question_type"]),
                        "relation": text_of(row["question_relation"]),
                    },
                    cluster=(clip,),
                )
            )
    names = numbered(sample.id for sample in result)
    return [replace(sample, id=name) for sample, name in zip(result, names, strict=True)]


BENCHMARK = Benchmark(
    name="avqa",
    summary="AVQA: questions with four options about clips of everyday sounds",
    samples=samples,
    rules={"compose": first_letter, "robust": robust_letter},
    files=f"{STEM}_COMBINATION.json and {STEM}_answer.json (ModelCompose), or val_qa.json with video/NAME.mp4, "
    "image/NAME.jpg, audio/NAME.wav (AlyssaYoung/AVQA)",
    modalities=SENSES,
    variants=("modelcompose", "official"),
    hub=HUB,
)

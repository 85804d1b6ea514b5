"""OCRBench: 1,000 questions about text in pictures (Liu et al., Science China Information Sciences 2024).

The official score is the number of answers that hold a right one, of 1,000; accuracy here is that share. `ocrbench` asks
the question alone, as most reports do; `ocrbench_llava` adds the line that LLaVA-1.5's own script adds.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from modalloy.errors import MediaError
from modalloy.evals.benchmark import Answer, Benchmark, Sample, Source, Verdict, choose_variant, fields
from modalloy.evals.files import leads_out
from modalloy.files import is_folder, kind, replace_bytes
from modalloy.senses.media import ENDINGS

RECOGNITION = "Text Recognition"  # what the official script sums six types up to
AREAS = {
    "Regular Text Recognition": RECOGNITION,
    "Irregular Text Recognition": RECOGNITION,
    "Artistic Text Recognition": RECOGNITION,
    "Handwriting Recognition": RECOGNITION,
    "Digit String Recognition": RECOGNITION,
    "Non-Semantic Text Recognition": RECOGNITION,
    "Scene Text-centric VQA": "Scene Text-centric VQA",
    "Doc-oriented VQA": "Doc-oriented VQA",
    "Key Information Extraction": "Key Information Extraction",
    "Handwritten Mathematical Expression Recognition": "Handwritten Mathematical Expression Recognition",
}
FORMULAS = "HME100k"  # the data set whose golds are LaTeX
SHORT = "\nAnswer the question using a single word or phrase."  # of LLaVA-1.5's script
IMAGES = "OCRBench_Images"  # the folder that the repository's archive of pictures unpacks to


def samples(source: Source) -> list[Sample]:
    """Every question after its picture."""
    found = {
        "json": source.find("OCRBench.json", "*/OCRBench.json", "*/*/OCRBench.json"),
        "hub": source.find("data/test-*.parquet"),
    }
    variant, path = choose_variant("ocrbench", source, found)
    return list(_hub(source) if variant == "hub" else _json(source, path))


def short_samples(source: Source) -> list[Sample]:
    """The same, with LLaVA's request for a short answer."""
    return [replace(sample, text=sample.text + SHORT) for sample in samples(source)]


def official(sample: Sample, answer: Answer) -> Verdict:
    """Whether a gold is part of the answer, up to case; of formulas, case counts and spaces do not."""
    form = _formula if sample.group["dataset"] == FORMULAS else _words
    said = form(answer.text)
    return Verdict(answer.text or None, any(form(gold) in said for gold in sample.golds))


def _formula(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")


def _words(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def _json(source: Source, path: Path) -> Iterator[Sample]:
    inside = f"{IMAGES}/" if not source.roots and (source.data / IMAGES).is_dir() else ""
    for index, row in enumerate(source.rows(path)):
        with fields(path, index):
            image = source.medium(inside + row["image_path"], "image")
            yield _sample(
                source, f"{row['dataset_name']}/{row['id']}", row["dataset_name"], row["type"], row, "answers", image
            )


def _hub(source: Source) -> Iterator[Sample]:
    number = 0
    for path in sorted(source.data.glob("data/test-*.parquet")):
        for index, row in enumerate(source.rows(path)):
            with fields(path, index):
                image = _unpacked(source, row["image"])
                yield _sample(
                    source, f"{row['dataset']}/{number}", row["dataset"], row["question_type"], row, "answer", image
                )
            number += 1


def _sample(source: Source, name: str, dataset: str, kind: str, row: dict[str, Any], golds: str, image: str) -> Sample:
    given = [row[golds]] if isinstance(row[golds], str) else row[golds]
    if not given or not all(isinstance(gold, str) and gold.strip() for gold in given):
        raise ValueError(f"the answers {given}")
    if kind not in AREAS:
        raise ValueError(f"the type '{kind}'")
    return Sample(
        id=name,
        text=row["question"].strip(),
        golds=tuple(given),
        media=(("image", image),) if source.shows("image") else (),
        group={"area": AREAS[kind], "type": kind, "dataset": dataset},
        kind=kind,
        cluster=(image,),
    )


def _unpacked(source: Source, image: dict[str, Any]) -> str:
    """Where a picture of a Parquet table now is as a file, named by its content."""
    folder, ending = source.data / "images", Path(image["path"] or "").suffix.lower()
    ending = ending if ENDINGS.get(ending) == "image" else ".jpg"
    path = folder / (hashlib.sha256(image["bytes"]).hexdigest()[:16] + ending)
    if leads_out(folder, source.folders):
        raise MediaError(
            f"{folder}: leads out of the data's folder, so the table's pictures are not unpacked there; remove it"
        )
    if not path.is_file():
        try:
            if not folder.is_symlink():
                folder.mkdir(exist_ok=True)
            if not is_folder(folder):
                raise MediaError(f"{folder}: is {kind(folder)}; the table's pictures are unpacked into a folder only")
            replace_bytes(path, image["bytes"])
        except OSError as error:
            raise MediaError(
                f"{folder}: the table's pictures cannot be unpacked there ({error.strerror}); copy the data to a folder of yours"
            ) from error
    return str(path)


BENCHMARK = Benchmark(
    name="ocrbench",
    summary="text in pictures, 1,000 questions (image)",
    samples=samples,
    rules={"official": official},
    files=f"OCRBench.json with the folder {IMAGES} (or --media-root), or the hub's data/test-*.parquet",
    modalities=("image",),
    variants=("json", "hub"),
    hub="echo840/OCRBench",
)

LLAVA = replace(
    BENCHMARK, name="ocrbench_llava", summary=f"{BENCHMARK.summary}, with LLaVA-1.5's prompt", samples=short_samples
)

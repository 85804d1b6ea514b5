"""`modalloy demo`: merge the built-in specialists and put their answers beside the merged model's."""

import gc
import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modalloy import builtin
from modalloy._version import __version__
from modalloy.files import cache_folder
from modalloy.machine import memory
from modalloy.merging import merge
from modalloy.outputs.manifest import read_sources
from modalloy.recipe import Output, Recipe, SpecialistEntry
from modalloy.report.text import aligned
from modalloy.storage.staging import MANIFEST

FOUR_HORSES = {"image": "horse.webp", "audio": "horse.flac", "video": "horse-animated.webp", "point": "horse.npy"}
# (media by modality, question). No sample was trained on (see builtin/samples/LICENSES.md); they were picked to show what
# such small specialists get right and what they get wrong, so they say nothing about how often: benchmarks/senses.py does.
QUESTIONS: list[tuple[dict[str, str], str]] = [
    ({"image": "violin.webp"}, "What is this?"),
    ({"image": "camera.webp"}, "Which is it: a ship, a camera, an owl or a hammer?"),
    ({"audio": "rooster.flac"}, "What makes this sound?"),
    ({"audio": "dog.flac"}, "Which is it: a harp, a car, a dog or a duck?"),
    ({"video": "umbrella-animated.webp"}, "What is in the video?"),
    ({"video": "elephant-animated.webp"}, "What is moving?"),
    ({"video": "elephant-animated.webp"}, "Is it an instrument, an animal, a vehicle or an object?"),
    ({"point": "car.npy"}, "What is this shape?"),
    ({"point": "horse.npy"}, "Which is it: a horse, a bottle, a truck or a whale?"),
    ({"image": "cow.webp", "audio": "cow.flac"}, "What is this?"),
    ({"image": "horse.webp", "audio": "dog.flac"}, "What is in the picture: a dog, a cat, a horse or a cow?"),
    ({"image": "horse.webp", "video": "horse-animated.webp"}, "Are these the same?"),
    ({"video": "cow-animated.webp", "point": "car.npy"}, "Are these the same?"),
    ({"image": "cow.webp", "audio": "cow.flac", "video": "cow-animated.webp"}, "What is this?"),
    (
        {"image": "horse.webp", "audio": "horse.flac", "point": "horse.npy"},
        "Which is it: a dog, a horse, a cow or a pig?",
    ),
    (FOUR_HORSES, "What is this?"),
    (FOUR_HORSES, "Which is it: a pig, a ship, a horse or a drum?"),
    (FOUR_HORSES | {"point": "car.npy"}, "What has this shape: a horse, a piano, a cat or a car?"),
    (FOUR_HORSES | {"image": "dog.webp"}, "Are these the same?"),
]


def demo(out: Path, on_job: Callable[[int, int], None] | None = None) -> None:
    """Merge into `out`, ask QUESTIONS, print a table and one JSON line on stdout."""
    from modalloy.model import load_model

    recipe = _recipe()
    names = [entry.modality or entry.model for entry in recipe.models]
    report = merge(recipe, out, overwrite=True, on_job=on_job)
    print(f"modalloy · ssam · {len(names)} specialists ({', '.join(names)}) · base SmolLM2-135M-Instruct")
    print(f"plan     {report.plan.summary()}")
    print(f"merge    {report.merge_s:.1f} s, peak {report.peak_bytes / 1e9:.2f} GB")
    print(f"verify   {report.verification.summary()}\n", flush=True)
    answers: dict[str, list[str]] = {}
    seconds: dict[str, float] = {}
    for name, path in [*((name, builtin.specialist(name)) for name in names), ("merged", out)]:
        print(f"asking {name} …", file=sys.stderr)
        model = load_model(path)
        start = time.perf_counter()
        answers[name] = [
            model.ask(question, max_new_tokens=12, **_files(media)) if set(media) <= set(model.modalities) else "–"
            for media, question in QUESTIONS
        ]
        seconds[name] = round(time.perf_counter() - start, 2)
        del model
        gc.collect()
    _print_table(answers)
    result = {
        "merge_seconds": round(report.merge_s, 3),
        "peak_bytes": memory.peak_bytes(),
        "answer_seconds": seconds,
        "out": str(out),
        "questions": [
            {"media": media, "question": question, "answers": {name: given[index] for name, given in answers.items()}}
            for index, (media, question) in enumerate(QUESTIONS)
        ],
    }
    print(json.dumps(result))


def merged(on_job: Callable[[int, int], None] | None = None) -> Path:
    """Folder of the merge of the built-in specialists, made once for these specialists and this version, where they are now."""
    found = hashlib.sha256(__version__.encode())
    for modality in builtin.specialists():
        for path in sorted(builtin.specialist(modality).iterdir()):
            found.update(path.name.encode() + path.read_bytes())
    out = cache_folder() / f"demo-{found.hexdigest()[:16]}"
    recipe = _recipe()
    # another installation may have made it, and be gone: what it was made from could not be inspected any more
    if not (out / MANIFEST).is_file() or read_sources(out, recipe).gone() is not None:
        merge(recipe, out, overwrite=True, on_job=on_job)
    return out


def _recipe() -> Recipe:
    """All built-in specialists, merged."""
    return Recipe(
        base_model=builtin.BASE,
        models=tuple(SpecialistEntry(model=builtin.PREFIX + m, modality=m) for m in builtin.specialists()),
        output=Output(form="omni", dtype="float32"),
    )


def _files(media: dict[str, str]) -> dict[str, Any]:
    return {modality: builtin.SAMPLES / name for modality, name in media.items()}


def _print_table(answers: dict[str, list[str]]) -> None:
    """One row a question: its media, itself, and each model's answer."""
    header = ["media", "question", *answers]
    rows = [
        [" + ".join(media.values()), question, *(given[index] for given in answers.values())]
        for index, (media, question) in enumerate(QUESTIONS)
    ]
    print(*aligned([header, *rows]), "", sep="\n")

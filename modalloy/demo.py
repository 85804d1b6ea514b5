"""`modalloy demo`: merge the built-in specialists, ask the result aloud about what it is shown, and them too."""

import gc
import hashlib
import json
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from modalloy import builtin
from modalloy._version import __version__
from modalloy.evals.senses import mentioned
from modalloy.files import cache_folder
from modalloy.machine import memory
from modalloy.merging import merge
from modalloy.outputs.sources import read_sources
from modalloy.recipe import Output, Recipe, SpecialistEntry
from modalloy.report.text import aligned
from modalloy.storage.staging import MANIFEST


@dataclass(frozen=True)
class Question:
    """A spoken question about what is shown: media by modality in reading order, what the speech says, and the right answer.

    `about` is "picture", "movement" or "shape". What is said stands nowhere but in the speech.
    """

    about: str
    media: dict[str, str]
    said: str
    options: tuple[str, ...]
    right: str

    def message(self, modalities: Collection[str]) -> list[dict[str, Any]]:
        """The question as chat messages, of the media that a model takes."""
        from modalloy.model.chat import user_message

        return user_message("", [(m, str(builtin.SAMPLES / name)) for m, name in self.media.items() if m in modalities])

    def answered(self, text: str) -> bool:
        """Whether an answer names the right option and no other."""
        return mentioned(self.options, text) == self.right


def questions() -> list[Question]:
    """The demo's questions, drawn from the benchmark's test split with one seed (examples/specialists/data/samples.py)."""
    listed = json.loads((builtin.SAMPLES / "demo" / "questions.json").read_text())
    return [Question(**one | {"options": tuple(one["options"])}) for one in listed]


def demo(out: Path, on_job: Callable[[int, int], None] | None = None) -> None:
    """Merge into `out`, ask what is said in `questions` of every model, print a table and one JSON line on stdout.

    A specialist is asked with what it takes of a question's media: what the others of them tell, it is not told.
    """
    from modalloy.model import load_model

    recipe = _recipe()
    names = [entry.modality or entry.model for entry in recipe.models]
    report = merge(recipe, out, overwrite=True, on_job=on_job)
    print(f"modalloy · ssam · {len(names)} specialists ({', '.join(names)}) · base SmolLM2-135M-Instruct")
    print(f"plan     {report.plan.summary()}")
    print(f"merge    {report.merge_s:.1f} s, peak {report.peak_bytes / 1e9:.2f} GB")
    print(f"verify   {report.verification.summary()}\n", flush=True)
    asked = questions()
    answers: dict[str, list[str | None]] = {}
    seconds: dict[str, float] = {}
    for name, path in [("merged", out), *((name, builtin.specialist(name)) for name in names)]:
        print(f"asking {name} …", file=sys.stderr)
        model = load_model(path)
        start = time.perf_counter()
        messages = [(question, question.message(model.modalities)) for question in asked]
        answers[name] = [
            model.chat(message, max_new_tokens=12) if set(question.media) & set(model.modalities) else None
            for question, message in messages
        ]
        seconds[name] = round(time.perf_counter() - start, 2)
        del model
        gc.collect()
    _print_table(asked, answers)
    result = {
        "merge_seconds": round(report.merge_s, 3),
        "peak_bytes": memory.peak_bytes(),
        "answer_seconds": seconds,
        "right": {
            name: dict(zip(("right", "asked"), _count(asked, given), strict=True)) for name, given in answers.items()
        },
        "out": str(out),
        "questions": [
            asdict(question) | {"answers": {name: given[index] for name, given in answers.items()}}
            for index, question in enumerate(asked)
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


def _count(asked: Sequence[Question], given: Sequence[str | None]) -> tuple[int, int]:
    """How many answers of a model are right, and how many questions it was asked."""
    pairs = [(question, answer) for question, answer in zip(asked, given, strict=True) if answer is not None]
    return sum(question.answered(answer) for question, answer in pairs), len(pairs)


def _print_table(asked: Sequence[Question], answers: dict[str, list[str | None]]) -> None:
    """One row a question: what is shown, what is said, the right answer, and each model's."""
    header = ["shown", "said, and written nowhere", "right", *answers]
    rows = [
        [
            next(Path(name).stem for modality, name in question.media.items() if modality != "audio"),
            question.said,
            question.right,
            *("–" if (answer := given[index]) is None else answer for given in answers.values()),
        ]
        for index, question in enumerate(asked)
    ]
    counts = ("{} of {}".format(*_count(asked, given)) for given in answers.values())
    print(*aligned([header, *rows, ["", "", "right", *counts]]), "", sep="\n")

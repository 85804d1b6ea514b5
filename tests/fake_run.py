"""A small benchmark with two rules, and runs of it, for tests of what is made from a run's folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modalloy.evals.benchmark import Answer, Benchmark, Sample, Verdict, likeliest
from modalloy.evals.log import Entry, Log, Run, load_run
from modalloy.names import MODALITIES


def by_text(sample: Sample, answer: Answer) -> Verdict:
    """Right where the answer is a gold; unparsed where it is none of the options."""
    found = answer.text if answer.text in sample.choices else None
    return Verdict(found, found in sample.golds)


def by_likelihood(sample: Sample, answer: Answer) -> Verdict:
    choice = sample.choices[likeliest(sample, answer)]
    return Verdict(choice, choice in sample.golds)


def benchmark(samples: Sequence[Sample] = ()) -> Benchmark:
    return Benchmark(
        name="fake",
        summary="Made up.",
        samples=lambda source: [one for one in samples if all(source.shows(modality) for modality, _ in one.media)],
        rules={"text": by_text, "likelihood": by_likelihood},
        files="nothing",
        modalities=MODALITIES,
    )


def question(index: int, **changes: Any) -> Sample:
    """A yes/no question whose answer is yes."""
    given: dict[str, Any] = {"text": "Is it?", "golds": ("yes",), "choices": ("yes", "no"), "options": ("yes", "no")}
    return Sample(**{"id": f"q{index}", "group": {"type": "odd" if index % 2 else "even"}, **given, **changes})


def write_run(folder: Path, samples: Sequence[Sample], answers: Sequence[str | None], **meta: Any) -> Run:
    """A run with these answers; None is a medium that could not be read."""
    base: dict[str, Any] = {
        "schema": 1,
        "task": "fake",
        "variant": None,
        "modalities": ["image"],
        "model": {"path": "m"},
    }
    base |= {"data": {"files": {}}, "generation": {}, "environment": {}, "n_samples": len(samples)}
    with Log(folder, base | meta, resume=False) as log:
        for index, (sample, answer) in enumerate(zip(samples, answers, strict=True)):
            told = Answer() if answer is None else Answer(answer, (-0.5, -1.0) if answer == "yes" else (-2.0, -1.0))
            status, error = ("media_error", "no such file") if answer is None else ("ok", None)
            log.add(benchmark(), Entry(index, sample, told, status, error, 0.1, 1, 1, "0"))
    return load_run(folder)

"""Answers that ModelCompose's own scripts wrote, as a run: scored, compared and looked at like any other.

A line of their file is {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}. Source: THUNLP-MT/ModelCompose.
"""

import hashlib
from collections import defaultdict
from pathlib import Path
from typing import Any

from modalloy.errors import MediaError, ModalloyError
from modalloy.evals.benchmark import Answer, Benchmark, Source, fields, questions
from modalloy.evals.files import parse_json, read_bytes
from modalloy.evals.log import Entry, Log, Run, described
from modalloy.evals.modelcompose import numbered, text_of


def read_answers(file: Path, benchmark: Benchmark, source: Source, folder: Path) -> Run:
    """The run, in a new folder, of a file of answers to a benchmark's questions.

    Lines are joined by "question_id"; the n-th of equal ids answers the n-th question of that id. A question without a line
    has status "missing" and counts as wrong, where their scripts leave it out.

    Raises:
        ModalloyError: a line is damaged, or of no question of the benchmark.
    """
    samples = questions(benchmark, source)
    if any(sample.options for sample in samples):
        raise ModalloyError(
            f"{benchmark.name}: is scored by likelihoods, which {file} does not hold; choose another task"
        )
    places: dict[str, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        for id in {sample.id, sample.id.removeprefix(f"{sample.group.get('subset')}/")}:
            places[id].append(index)
    lines, sha256 = _lines(file)
    answered: dict[int, dict[str, Any]] = {}
    for number, (id, line) in enumerate(zip(numbered(line["question_id"] for line in lines), lines, strict=True), 1):
        found = places.get(id, [])
        if len(found) != 1:
            what = f"is of {len(found)} questions" if found else "is of no question"
            remedy = "write SUBSET/ID" if found else "give the data that was asked, or remove what was asked twice"
            raise ModalloyError(f"{file}: line {number} ('{id}') {what} of {benchmark.name}; {remedy}")
        if found[0] in answered:
            raise ModalloyError(f"{file}: line {number} answers '{samples[found[0]].id}' again; keep one of the lines")
        answered[found[0]] = line
    entries = []
    for index, sample in enumerate(samples):
        line = answered.get(index, {})
        entries.append(
            Entry(
                index=index,
                sample=sample,
                answer=Answer(line.get("text", "")),
                status="ok" if line else "missing",
                error=None if line else f"{file.name} has no line for it",
                seconds=0.0,
                prompt_tokens=0,
                new_tokens=0,
                prompt_sha256=hashlib.sha256(line["prompt"].encode()).hexdigest() if line else "",
            )
        )
    model: dict[str, Any] = {"path": str(file), "fingerprint": sha256, "recipe": None, "options": {}}
    meta = described(benchmark, source, len(samples), model, {"by": "ModelCompose's scripts"})
    with Log(folder, meta, resume=False) as log:
        log.add(benchmark, *entries)
    return Run(folder, meta, entries)


def _lines(file: Path) -> tuple[list[dict[str, Any]], str]:
    """Lines of a file of answers, and its hash."""
    lines: list[dict[str, Any]] = []
    raw = read_bytes(file)
    for text in raw.splitlines():
        with fields(file, len(lines)):
            line = parse_json(text)
            lines.append({key: text_of(line[key]) for key in ("prompt", "text")} | {"question_id": line["question_id"]})
    if not lines:
        raise MediaError(f"{file}: holds no answer; give the file that the scripts wrote")
    return lines, hashlib.sha256(raw).hexdigest()

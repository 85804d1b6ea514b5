"""MMLU: 14,042 four-choice questions on 57 subjects (Hendrycks et al., ICLR 2021).

`mmlu` is the usual 5-shot form: the likeliest of " A" to " D" after a prompt that begins with the subject's first five
development questions, in the text of lm-eval's `mmlu` (the original code has two spaces before the subject, and keeps
the space around questions). Its headline is the mean over questions, as lm-eval's; the mean over subjects follows from
the table of subjects. `mmlu_generative` asks without examples, through the chat template.

Text only: a merged model answers through its text path, whatever its other senses.
"""

import string
from dataclasses import replace
from pathlib import Path

from modalloy.errors import MediaError
from modalloy.evals.benchmark import (
    Answer,
    Benchmark,
    Sample,
    Source,
    Verdict,
    choose_variant,
    fields,
    letter,
    likeliest,
)
from modalloy.evals.scoring import robust_letter

SHOTS = 5
LETTERS = "ABCD"

# categories.py of hendrycks/test; lm-eval counts anatomy as STEM
CATEGORIES = {
    "STEM": (
        "abstract_algebra astronomy college_biology college_chemistry college_computer_science college_mathematics "
        "college_physics computer_security conceptual_physics electrical_engineering elementary_mathematics "
        "high_school_biology high_school_chemistry high_school_computer_science high_school_mathematics "
        "high_school_physics high_school_statistics machine_learning"
    ),
    "humanities": (
        "formal_logic high_school_european_history high_school_us_history high_school_world_history international_law "
        "jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory professional_law "
        "world_religions"
    ),
    "social sciences": (
        "econometrics high_school_geography high_school_government_and_politics high_school_macroeconomics "
        "high_school_microeconomics high_school_psychology human_sexuality professional_psychology public_relations "
        "security_studies sociology us_foreign_policy"
    ),
    "other": (
        "anatomy business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing "
        "medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology"
    ),
}
CATEGORY = {subject: category for category, subjects in CATEGORIES.items() for subject in subjects.split()}

Row = tuple[str, tuple[str, ...], str]  # question, texts of the options, letter of the right one


def samples(source: Source) -> list[Sample]:
    """Every test question after its subject's five examples."""
    examples = _read(source, "dev")
    found = []
    for subject, rows in _read(source, "test").items():
        shots = examples.get(subject, [])[:SHOTS]
        if len(shots) < SHOTS:
            raise MediaError(
                f"{source.data}: has {len(shots)} development questions on {subject}, not {SHOTS}; give the dev files too"
            )
        before = _heading(subject) + "".join(f"{_asked(row)} {row[2]}\n\n" for row in shots)
        for index, row in enumerate(rows):
            sample = _sample(subject, index, row, before)
            found.append(replace(sample, plain=True, options=tuple(f" {name}" for name in LETTERS)))
    return found


def generative_samples(source: Source) -> list[Sample]:
    """Every test question by itself."""
    found = []
    for subject, rows in _read(source, "test").items():
        found += [_sample(subject, index, row, _heading(subject)) for index, row in enumerate(rows)]
    return found


def likelihood(sample: Sample, answer: Answer) -> Verdict:
    """The likeliest letter: lm-eval's `acc`."""
    name = letter(likeliest(sample, answer))
    return Verdict(name, name in sample.golds)


def exact(sample: Sample, answer: Answer) -> Verdict:
    """The first line is the letter and nothing else, but for case and punctuation: lm-eval's `exact_match`."""
    line = answer.text.strip().partition("\n")[0].strip().upper()
    said = line.translate(str.maketrans("", "", string.punctuation))
    return Verdict(said if said in tuple(LETTERS) else None, said in sample.golds)


def _sample(subject: str, index: int, row: Row, before: str) -> Sample:
    if subject not in CATEGORY:
        raise MediaError(f"'{subject}' is no subject of MMLU; give the benchmark's own files, under their own names")
    return Sample(
        id=f"{subject}/{index}",
        text=before + _asked(row),
        golds=(row[2],),
        choices=row[1],
        group={"category": CATEGORY[subject], "subject": subject},
        kind=subject,
    )


def _heading(subject: str) -> str:
    return f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"


def _asked(row: Row) -> str:
    question, choices, _ = row
    options = "\n".join(f"{name}. {choice}" for name, choice in zip(LETTERS, choices, strict=True))
    return f"{question.strip()}\n{options}\nAnswer:"


def _read(source: Source, split: str) -> dict[str, list[Row]]:
    """Questions of a split by subject, in the files' order."""
    found = {"csv": source.find("test/*_test.csv"), "hub": source.find("all/test-*.parquet")}
    variant, _ = choose_variant("mmlu", source, found)
    if variant == "hub":
        return _read_hub(source, split)
    subjects = [path.name.removesuffix("_test.csv") for path in sorted(source.data.glob("test/*_test.csv"))]
    return {subject: _read_csv(source, source.need(f"{split}/{subject}_{split}.csv")) for subject in subjects}


def _read_csv(source: Source, path: Path) -> list[Row]:
    rows = []
    for index, row in enumerate(source.rows(path)):
        with fields(path, index):
            question, *choices, gold = row
            rows.append(_row(question, choices, gold))
    return rows


def _read_hub(source: Source, split: str) -> dict[str, list[Row]]:
    source.need(f"all/{split}-*.parquet")
    subjects: dict[str, list[Row]] = {}
    for path in sorted(source.data.glob(f"all/{split}-*.parquet")):
        for index, row in enumerate(source.rows(path)):
            with fields(path, index):
                gold = LETTERS[range(len(LETTERS)).index(row["answer"])]
                subjects.setdefault(row["subject"], []).append(_row(row["question"], row["choices"], gold))
    return subjects


def _row(question: str, choices: list[str], gold: str) -> Row:
    if len(choices) != len(LETTERS) or gold not in tuple(LETTERS):
        raise ValueError(f"{len(choices)} options and the answer '{gold}'")
    return question, tuple(choices), gold


BENCHMARK = Benchmark(
    name="mmlu",
    summary="knowledge, 57 subjects, 5 examples, likeliest letter (text only)",
    samples=samples,
    rules={"likelihood": likelihood},
    files="test/<subject>_test.csv and dev/<subject>_dev.csv (hendrycks/test), or the hub's all/{test,dev}-*.parquet",
    variants=("csv", "hub"),
    hub="cais/mmlu",
)

GENERATIVE = Benchmark(
    name="mmlu_generative",
    summary="knowledge, 57 subjects, no examples, answered in words (text only)",
    samples=generative_samples,
    rules={"robust": robust_letter, "exact": exact},
    files="test/<subject>_test.csv (hendrycks/test), or the hub's all/test-*.parquet",
    variants=("csv", "hub"),
    hub="cais/mmlu",
    max_new_tokens=32,
)

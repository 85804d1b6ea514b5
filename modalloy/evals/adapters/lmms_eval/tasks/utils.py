"""What the task files beside this one call. A document is a line that `export` wrote."""

from typing import Any

from modalloy.evals import find_benchmark
from modalloy.evals.benchmark import Answer, Sample


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """The question."""
    return str(doc["question"])


def doc_to_messages(
    doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """One user turn; media stand where the question has placeholders. `point` is a type of ours only."""
    media = [{"type": modality, "url": path} for modality, path in doc["media"]]
    return [{"role": "user", "content": [*media, {"type": "text", "text": doc["question"]}]}]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 or 0 by each of the benchmark's rules."""
    sample, answer = Sample.from_dict(doc), Answer(text=results[0].strip())
    return {name: float(rule(sample, answer).correct) for name, rule in find_benchmark(doc["task"]).rules.items()}

"""What of a benchmark's media is missing or broken, found out before any model is loaded."""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from modalloy.errors import MediaError
from modalloy.evals.benchmark import Benchmark, Source, questions
from modalloy.evals.files import OUTSIDE, leads_out
from modalloy.report.text import printable_lines
from modalloy.senses import media

LOADERS: dict[str, Callable[[str], Any]] = {
    "image": media.load_image,
    "audio": media.load_audio,
    "video": partial(media.load_video, n_frames=8),
    "point": media.load_points,
}


@dataclass(frozen=True)
class Problem:
    """A medium that cannot be shown."""

    modality: str
    path: str
    kind: str  # "missing" or "broken"
    reason: str
    samples: tuple[str, ...]  # ids of the questions that show it


@dataclass(frozen=True)
class Diagnosis:
    """What of a benchmark could be asked."""

    task: str
    quick: bool  # files were not decoded
    n: int  # questions
    n_askable: int  # those whose media are all fine
    media: dict[str, int]  # modality → distinct media
    unchecked: tuple[str, ...]  # modalities of which no file could be decoded, for want of a decoder
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether every question can be asked."""
        return not self.problems

    def count(self, modality: str, kind: str) -> int:
        """How many media of a modality are missing (or broken)."""
        return sum(problem.modality == modality and problem.kind == kind for problem in self.problems)

    def to_dict(self) -> dict[str, Any]:
        """The diagnosis as JSON has it, with all problems."""
        return {
            "task": self.task,
            "ok": self.ok,
            "quick": self.quick,
            "n": self.n,
            "n_askable": self.n_askable,
            "share_askable": self.n_askable / self.n,
            "media": {
                modality: {
                    "distinct": distinct,
                    "missing": self.count(modality, "missing"),
                    "broken": self.count(modality, "broken"),
                    "decoded": not self.quick and modality not in self.unchecked,
                }
                for modality, distinct in self.media.items()
            },
            "problems": [vars(problem) | {"samples": list(problem.samples)} for problem in self.problems],
        }

    def text(self, shown: int = 20) -> str:
        """The diagnosis as lines for a terminal, naming the first `shown` problems of each modality and kind."""
        lines = [f"{'modality':10} {'media':>7} {'missing':>8} {'broken':>7}"]
        for modality, distinct in self.media.items():
            missing, broken = self.count(modality, "missing"), self.count(modality, "broken")
            how = "  not decoded: its reader is not part of modalloy" if modality in self.unchecked else ""
            lines.append(f"{modality:10} {distinct:7} {missing:8} {broken:7}{how}")
        named: Counter[tuple[str, str]] = Counter()
        for problem in self.problems:
            key = (problem.modality, problem.kind)
            named[key] += 1
            if named[key] <= shown:
                questions = f"{len(problem.samples)} question{'s' if len(problem.samples) > 1 else ''}"
                reason = f": {problem.reason}" if problem.kind == "broken" else ""
                lines.append(f"{problem.kind:8} {problem.modality}  {problem.path}{reason} ({questions})")
        lines += [
            f"{kind:8} {modality}  … and {number - shown} more; --json lists all"
            for (modality, kind), number in named.items()
            if number > shown
        ]
        checked = "every file is there; they were not decoded (--quick)" if self.quick else "every medium can be read"
        share = f"{self.n_askable} of {self.n} questions ({100 * self.n_askable / self.n:.1f} %) can be asked"
        return printable_lines([*lines, f"{self.task}: {share}" + (f"; {checked}" if self.ok and self.media else "")])


def doctor(
    benchmark: Benchmark,
    source: Source,
    *,
    quick: bool = False,
    on_medium: Callable[[int, int], None] = lambda done, total: None,
) -> Diagnosis:
    """Which media of a benchmark's questions are missing or broken, and how many questions can be asked without them.

    Every distinct medium is decoded as a model's processor would; with `quick` only its existence and size are looked
    at. `on_medium` is called with (done, total).
    """
    samples, folders = questions(benchmark, source), source.folders
    asked: dict[tuple[str, str], list[int]] = {}
    for index, sample in enumerate(samples):
        for medium in dict.fromkeys(sample.media):
            asked.setdefault(medium, []).append(index)
    problems, lost = [], set()
    for done, ((modality, path), indices) in enumerate(asked.items(), 1):
        if found := _problem(modality, path, quick, folders):
            problems.append(Problem(modality, path, *found, tuple(samples[index].id for index in indices)))
            lost.update(indices)
        on_medium(done, len(asked))
    distinct = Counter(modality for modality, _ in asked)
    return Diagnosis(
        task=benchmark.name,
        quick=quick,
        n=len(samples),
        n_askable=len(samples) - len(lost),
        media=dict(distinct),
        unchecked=() if quick else tuple(modality for modality in distinct if modality not in LOADERS),
        problems=tuple(problems),
    )


def _problem(modality: str, path: str, quick: bool, folders: tuple[str, ...]) -> tuple[str, str] | None:
    """The kind of problem and its reason, if there is one."""
    if leads_out(path, folders):
        return "broken", OUTSIDE
    if not os.path.exists(path):
        return "missing", "no such file"
    if not os.path.isfile(path):
        return "broken", "not a file"
    if not os.path.getsize(path):
        return "broken", "the file is empty"
    if not quick and modality in LOADERS:
        try:
            LOADERS[modality](path)
        except MediaError as error:
            return "broken", " ".join(str(error).removeprefix(f"{path}: ").split())
    return None

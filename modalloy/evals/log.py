"""A run's folder: `run.json` says what was asked of which model, `preds.jsonl` has one line an answer. Nothing else is kept.

Every figure is computed from these two files, so a rule that changed, or a table that was lost, costs no second run."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modalloy._version import __version__
from modalloy.errors import ModalloyError, OutputError, plain
from modalloy.evals import find_benchmark
from modalloy.evals.benchmark import Answer, Benchmark, Sample, Scoring, Source, Verdict
from modalloy.evals.files import MAX_FILE_BYTES, parse_json, read_bytes
from modalloy.files import is_file, replace_text
from modalloy.storage.journal import Journal, read_lines

RUN, PREDS = "run.json", "preds.jsonl"
SCHEMA = 1
STATUSES = ("ok", "media_error", "too_long", "oom", "missing")
# what must be the same for answers to stand in one log
IDENTITY = ("schema", "task", "variant", "modalities", "model", "data", "generation")


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


KINDS: dict[str, Callable[[Any], bool]] = {  # what each entry of `run.json` must be
    "schema": lambda value: type(value) is int,
    "task": lambda value: isinstance(value, str),
    "variant": lambda value: isinstance(value, str | None),
    "modalities": lambda value: value is None or _is_texts(value),
    "n_samples": lambda value: type(value) is int and value >= 0,
    "folders": _is_texts,
    **dict.fromkeys(("model", "data", "generation", "environment"), lambda value: isinstance(value, dict)),
}


@dataclass(frozen=True)
class Entry:
    """One line of the log.

    `status` is "ok", "media_error" (a medium could not be read), "too_long" (for the model's context), "oom" (it did not
    fit the memory) or "missing" (from a file of answers).
    """

    index: int  # of the sample in its benchmark
    sample: Sample
    answer: Answer
    status: str
    error: str | None
    seconds: float
    prompt_tokens: int
    new_tokens: int
    prompt_sha256: str

    def verdict(self, rule: Scoring) -> Verdict:
        """What a rule makes of the answer; one that could not be given is wrong."""
        return rule(self.sample, self.answer) if self.status == "ok" else Verdict(None, False)


@dataclass(frozen=True)
class Run:
    """What a folder holds."""

    folder: Path
    meta: dict[str, Any]
    entries: list[Entry]

    @property
    def benchmark(self) -> Benchmark:
        return find_benchmark(self.meta["task"])

    @property
    def folders(self) -> tuple[str, ...] | None:
        """Where its media may lie; None: anywhere, as runs of earlier versions do not say."""
        return None if "folders" not in self.meta else tuple(self.meta["folders"])

    def verdicts(self, rule: str) -> list[Verdict]:
        """What a rule makes of every answer; ModalloyError where one does not have what the rule looks at."""
        apply = self.benchmark.rules[rule]
        found = []
        for entry in self.entries:
            try:
                found.append(entry.verdict(apply))
            except LookupError as error:
                raise ModalloyError(
                    f"{self.folder / PREDS}: question {entry.index} is none of {self.benchmark.name} ({error!r}); "
                    "run the evaluation again"
                ) from error
        return found


def described(
    benchmark: Benchmark,
    source: Source,
    n_samples: int,
    model: dict[str, Any],
    generation: dict[str, Any],
    **versions: str,
) -> dict[str, Any]:
    """What `run.json` says of a run: its questions, the files they came from, and the model that answered them."""
    return {
        "schema": SCHEMA,
        "task": benchmark.name,
        "variant": source.variant,
        "modalities": None if source.modalities is None else sorted(source.modalities),
        "n_samples": n_samples,
        "model": model,
        "data": {"files": [{"path": name, **facts} for name, facts in sorted(source.read.items())]},
        "folders": list(source.folders),
        "generation": generation,
        "environment": {"modalloy": __version__, **versions},
    }


def line(entry: Entry, benchmark: Benchmark) -> dict[str, Any]:
    """An entry as the log has it. `pred` and `scores` are there for readers; tables are made from `raw` again."""
    verdicts = {name: entry.verdict(rule) for name, rule in benchmark.rules.items()}
    headline = next(iter(verdicts.values()))
    unparsed = entry.status == "ok" and headline.prediction is None
    return {
        "i": entry.index,
        "task": benchmark.name,
        **entry.sample.to_dict(),
        "prompt_sha": entry.prompt_sha256,
        "raw": entry.answer.text,
        "likelihoods": list(entry.answer.likelihoods),
        "pred": headline.prediction,
        "scores": {name: verdict.correct for name, verdict in verdicts.items()},
        "status": "unparsed" if unparsed else entry.status,
        "err": entry.error,
        "n_in": entry.prompt_tokens,
        "n_out": entry.new_tokens,
        "sec": round(entry.seconds, 4),
    }


def entry(line: dict[str, Any]) -> Entry:
    """The entry of a line; ValueError, KeyError, TypeError, AttributeError or OverflowError where it is none."""
    found = Entry(
        index=line["i"],
        sample=Sample.from_dict(line),
        answer=Answer(line["raw"], tuple(line["likelihoods"])),
        status="ok" if line["status"] == "unparsed" else line["status"],
        error=line["err"],
        seconds=line["sec"],
        prompt_tokens=line["n_in"],
        new_tokens=line["n_out"],
        prompt_sha256=line["prompt_sha"],
    )
    nats = found.answer.likelihoods
    if not found.sample.is_well_typed or not isinstance(found.answer.text, str):
        raise ValueError("a field is not text")
    if not isinstance(found.error, str | None) or not isinstance(found.prompt_sha256, str):
        raise ValueError("a field is not text")
    if not all(type(count) is int for count in (found.index, found.prompt_tokens, found.new_tokens)):
        raise ValueError("a field is not a whole number")
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in (found.seconds, *nats)):
        raise ValueError("a field is not a finite number")
    if found.status not in STATUSES or (found.status == "ok" and len(nats) != len(found.sample.options)):
        raise ValueError(f"the status {found.status} with {len(nats)} likelihoods")
    return found


class Log:
    """Appends lines that outlive a crash. What a killed run left of a line is cut off; a run without answers leaves nothing."""

    def __init__(self, folder: Path, meta: dict[str, Any], *, resume: bool) -> None:
        """Open the log of a run.

        Raises:
            OutputError: the folder holds answers already and `resume` is not given, or they are of another model, data or
                prompt; another process writes there; it cannot be written.
        """
        self.folder = folder
        self.path = folder / PREDS
        try:
            self.made = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            is_new = _is_empty(folder)
            if not is_new and not is_file(folder / RUN):
                raise OutputError(f"{folder}: holds other files, and no run; choose another folder")
            if not is_new:
                _read_meta(folder)  # a file of another program is refused
            self.journal = Journal(self.path)
        except BlockingIOError as error:
            raise OutputError(
                f"{folder}: another process writes this run; wait for it, or choose another folder"
            ) from error
        except OSError as error:
            raise OutputError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from error
        try:
            self._begin(meta, resume)
        except BaseException:
            if is_new:
                self._leave_nothing()
            self.journal.close()
            raise

    def _begin(self, meta: dict[str, Any], resume: bool) -> None:
        folder = self.folder
        if not self.journal.is_empty:
            if not resume:
                raise OutputError(f"{folder}: holds a run already; go on with --resume, or choose another folder")
            if change := _change(_read_meta(folder), meta):
                raise OutputError(f"{folder}: is a run of another {change}; choose another folder")
        self.entries = self.journal.read(_Entries(), MAX_FILE_BYTES)
        write_text(folder / RUN, json.dumps(meta, indent=1) + "\n")

    def add(self, benchmark: Benchmark, *entries: Entry) -> None:
        """Append entries; they are on the disk when this returns."""
        self.entries += entries
        self.journal.add(*(line(entry, benchmark) for entry in entries))

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        if not self.entries:
            self._leave_nothing()
        self.journal.close()

    def _leave_nothing(self) -> None:
        (self.folder / RUN).unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
        if self.made:
            with suppress(OSError):  # something was put into it
                self.folder.rmdir()


def write_text(path: Path, text: str) -> None:
    """Write a file of a run, whole or not at all."""
    try:
        replace_text(path, text)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}); copy the run to a folder of yours") from error


def _is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing, or only what a run leaves that is killed before it has begun."""
    return all(
        (path.name == PREDS and is_file(path) and not path.lstat().st_size) or path.name.startswith(f".{RUN}.partial-")
        for path in folder.iterdir()
    )


def load_run(folder: str | Path) -> Run:
    """The run in a folder (or of its `preds.jsonl`), entries in the order of the benchmark.

    Raises:
        ModalloyError: there is none, or a line of it is damaged.
    """
    folder = Path(folder)
    folder = folder.parent if folder.name == PREDS else folder
    if not (folder / RUN).is_file():
        raise ModalloyError(f"{folder}: holds no {RUN}; give a folder that `modalloy eval -o` wrote")
    meta = _read_meta(folder)
    preds = folder / PREDS
    entries = read_lines(preds, _Entries(), MAX_FILE_BYTES)[0] if preds.is_file() else []
    if not entries:
        raise ModalloyError(f"{folder}: has no answers yet; run `modalloy eval` with --resume first")
    return Run(folder, meta, sorted(entries, key=lambda entry: entry.index))


def _change(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """What of a run's identity has changed, if anything has. A model that was moved is the same."""
    for key in IDENTITY:
        was, wanted = before.get(key), now[key]
        if key == "model" and isinstance(was, dict):
            differing = sorted(name for name in was.keys() | wanted.keys() if was.get(name) != wanted.get(name))
            if name := next((name for name in differing if name != "path"), None):
                return f"model ({name}: {was.get(name)}, now {wanted.get(name)})"
        elif was != wanted:
            return "data, by the hashes of its files" if key == "data" else f"{key} ({was}, now {wanted})"
    return None


def _read_meta(folder: Path) -> dict[str, Any]:
    try:
        meta: dict[str, Any] = parse_json(read_bytes(folder / RUN))
    except ValueError as error:
        raise ModalloyError(f"{folder / RUN}: cannot be read ({plain(error)}); run the evaluation again") from error
    if not isinstance(meta, dict) or not meta.keys() >= {*IDENTITY, "n_samples", "environment"}:
        raise ModalloyError(f"{folder / RUN}: does not describe a run; run the evaluation again")
    if wrong := [name for name, fits in KINDS.items() if name in meta and not fits(meta[name])]:
        raise ModalloyError(f'{folder / RUN}: "{wrong[0]}" is {plain(repr(meta[wrong[0]]))}; run the evaluation again')
    if meta["schema"] != SCHEMA:
        raise ModalloyError(f"{folder / RUN}: is of format {meta['schema']}, this version reads {SCHEMA}; run it again")
    return meta


class _Entries:
    """Makes entries of lines, each of another question."""

    def __init__(self) -> None:
        self.lines: dict[int, int] = {}

    def __call__(self, line: Any) -> Entry:
        """The entry of the next line; an error where it is none."""
        made, number = entry(line), len(self.lines) + 1
        first = self.lines.setdefault(made.index, number)
        if first != number:
            raise ValueError(f"it answers question {made.index} again, as line {first} does")
        return made


def prompts_sha256(entries: Iterable[Entry]) -> str:
    """One hash of all prompts, in the benchmark's order."""
    return hashlib.sha256("\n".join(entry.prompt_sha256 for entry in entries).encode()).hexdigest()

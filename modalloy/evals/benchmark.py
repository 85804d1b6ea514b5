"""What a benchmark is: samples to ask, rules that score answers, and where its files are.

A benchmark is one file with one `Benchmark`, and one line in `modalloy.evals.BENCHMARKS`.
"""

import csv
import hashlib
import io
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modalloy.errors import MediaError, ModalloyError, plain
from modalloy.evals.files import MAX_FILE_BYTES, leads_out, own_folders, parquet_rows, parse_json, read_bytes

LETTERS = "ABCDEFGHIJKL"
READ = 8  # of them are read out of free text, where "I" is a word


@dataclass(frozen=True)
class Sample:
    """One question.

    `media` are (modality, path) in reading order. They stand where `text` has placeholders (`<image>`, `<video>`, …), else
    before it. A path need not exist: an unreadable medium is a counted outcome of the run.
    """

    id: str
    text: str
    golds: tuple[
        str, ...
    ]  # every answer that counts, as the benchmark's file has it: a letter, a word, an option's text
    media: tuple[tuple[str, str], ...] = ()
    choices: tuple[str, ...] = ()  # texts of the options; () where any answer may be given
    options: tuple[str, ...] = ()  # continuations to score by likelihood, one a choice; () to have an answer generated
    plain: bool = False  # `text` is the whole prompt: no chat template around it
    group: dict[str, str] = field(
        default_factory=dict
    )  # what scores are broken down by, for example {"type": "Counting"}
    kind: str = (
        ""  # the question's template; the baseline `majority_by_kind` always gives a template's most frequent answer
    )
    cluster: tuple[str, ...] = ()  # what is not independent of other samples, from coarse to fine: (concept, file)

    def to_dict(self) -> dict[str, Any]:
        """What a line of the log holds of it."""
        return {
            "id": self.id,
            "question": self.text,
            "media": [list(medium) for medium in self.media],
            "choices": list(self.choices),
            "options": list(self.options),
            "gold": list(self.golds),
            "group": self.group,
            "kind": self.kind,
            "cluster": list(self.cluster),
        }

    @classmethod
    def from_dict(cls, line: dict[str, Any]) -> "Sample":
        """The sample of a line of the log."""
        return cls(
            id=line["id"],
            text=line["question"],
            golds=tuple(line["gold"]),
            media=tuple((modality, path) for modality, path in line["media"]),
            choices=tuple(line["choices"]),
            options=tuple(line["options"]),
            group=line["group"],
            kind=line["kind"],
            cluster=tuple(line["cluster"]),
        )

    @property
    def is_well_typed(self) -> bool:
        """Whether all that should be text is text; files may hold anything."""
        given = [self.id, self.text, self.kind, *self.golds, *self.choices, *self.options, *self.cluster]
        given += [*self.group, *self.group.values(), *(part for medium in self.media for part in medium)]
        return all(isinstance(one, str) for one in given)


@dataclass(frozen=True)
class Answer:
    """What a model gave: generated text (stripped, "" if nothing was generated), and nats of each of `Sample.options`, or at
    every place of the first of them `predicted` tokens and their nats, that of all others together behind each place's."""

    text: str = ""
    likelihoods: tuple[float, ...] = ()
    predicted: tuple[int, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What a rule makes of an answer: the prediction it reads in it (None: it finds none), and whether that is right."""

    prediction: str | None
    correct: bool


Scoring = Callable[[Sample, Answer], Verdict]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of the field, or our own.

    `rules` holds the scoring protocols, the headline's first: "compose" is the rule of ModelCompose's published scripts.
    """

    name: str
    summary: str
    samples: Callable[["Source"], list[Sample]]
    rules: dict[str, Scoring]
    files: str  # what `--data` must hold, for --list and for messages
    modalities: tuple[str, ...] = ()  # senses that it asks about
    variants: tuple[str, ...] = ()  # the file formats it reads; `Source.variant` chooses where several are there
    hub: str | None = None  # data set on the hub: "owner/name"
    max_new_tokens: int = 128


@dataclass
class Source:
    """Where a benchmark's files and media are, and which of its samples are wanted. Remembers the files that were read."""

    data: Path
    roots: dict[str, Path] = field(default_factory=dict)  # by name; "" holds what has none
    variant: str | None = None
    modalities: tuple[str, ...] | None = None  # shown; None: all
    read: dict[str, dict[str, Any]] = field(default_factory=dict)  # name → {"sha256", "rows"} of every file read

    def find(self, *names: str) -> Path | None:
        """The first of the files (relative names or globs, in order of preference) that the data folder has, if any."""
        for name in names:
            if found := sorted(self.data.glob(name)):
                return found[0]
        return None

    def need(self, *names: str) -> Path:
        """As `find`; refused where there is none."""
        if not self.data.is_dir():
            raise MediaError(f"{self.data}: no such folder; give the benchmark's files with --data")
        found = self.find(*names)
        if found is None:
            raise MediaError(f"{self.data}: holds none of {', '.join(names)}; give the benchmark's files with --data")
        return found

    def rows(self, path: Path) -> list[Any]:
        """The rows of a JSON list, JSON lines, a Parquet table, or CSV without a header (lists of strings)."""
        if leads_out(path, self.folders):
            raise MediaError(f"{path}: leads out of the data's folder; copy the file there")
        try:
            if path.suffix == ".parquet":
                raw = read_bytes(path, MAX_FILE_BYTES)
                rows: Any = parquet_rows(raw)
            else:
                raw = read_bytes(path)
                if path.suffix == ".csv":
                    rows = list(csv.reader(io.StringIO(raw.decode("utf-8-sig"), newline="")))
                elif path.suffix == ".jsonl":
                    rows = [parse_json(line) for line in raw.splitlines() if line.strip()]
                else:
                    rows = parse_json(raw.decode("utf-8-sig"))
        except (ValueError, csv.Error) as error:
            raise MediaError(f"{path}: cannot be read ({plain(error)}); download it again") from error
        if not isinstance(rows, list):
            raise MediaError(
                f"{path}: holds a {type(rows).__name__}, not a list of rows; give the benchmark's own file"
            )
        name = path.relative_to(self.data).as_posix() if path.is_relative_to(self.data) else path.name
        self.read[name] = {"sha256": hashlib.sha256(raw).hexdigest(), "rows": len(rows)}
        return rows

    @property
    def folders(self) -> tuple[str, ...]:
        """Folders that media may lie in; a file that leads out of them is not read (`modalloy.evals.files.leads_out`)."""
        return own_folders(self.data, self.roots.values())

    def shows(self, modality: str) -> bool:
        """Whether media of this modality are to be shown."""
        return self.modalities is None or modality in self.modalities

    def medium(self, path: str, root: str = "") -> str:
        """Where the medium is that a benchmark's file calls `path`.

        An absolute path is taken as it is; where it leads out of `folders`, it is never read. Else, where a root is named
        like one of its folders (in any case), what follows that folder is looked for in that root; else it starts at the
        root of the given name, the general root, or the data folder.
        """
        if os.path.isabs(path):
            return path
        parts = Path(path).parts
        for index in range(len(parts) - 2, -1, -1):
            if named := self.roots.get(parts[index].lower()):
                return str(named.joinpath(*parts[index + 1 :]))
        start = self.roots.get(root) or self.roots.get("") or self.data
        return str(start / path)


def data_folder(benchmark: Benchmark, given: Path | None, *, download: bool = False) -> Path:
    """Where a benchmark's files are: as given, else $MODALLOY_DATA/NAME, else its data set in the hub's cache.

    Raises:
        MediaError: nowhere, and `download` is not set.
    """
    if given is not None:
        return given
    root = os.environ.get("MODALLOY_DATA")
    if root and (Path(root) / benchmark.name).is_dir():
        return Path(root) / benchmark.name
    if benchmark.hub is None:
        raise MediaError(f"{benchmark.name}: give the folder of its files with --data ({benchmark.files})")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(benchmark.hub, repo_type="dataset", local_files_only=not download))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        where = "cannot be had from the hub" if download else "is not in the hub's cache"
        reason = f" ({str(error).splitlines()[0]})" if download else "; add --download"
        raise MediaError(
            f"{benchmark.name}: its data set {benchmark.hub} {where}{reason}, or give its files with --data ({benchmark.files})"
        ) from error


@contextmanager
def fields(path: Path, index: int) -> Iterator[None]:
    """One line for a row of a benchmark's file that lacks a field, or has one of another type."""
    try:
        yield
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        what = (
            f"lacks {plain(error)}" if isinstance(error, KeyError) else f"has a field of another form ({plain(error)})"
        )
        raise MediaError(f"{path}: row {index} {what}; give the benchmark's own file") from error


def questions(benchmark: Benchmark, source: Source) -> list[Sample]:
    """The samples of a source, at least one.

    Raises:
        ModalloyError: there is none, or the source's variant or modalities are not the benchmark's.
    """
    if source.variant is not None and source.variant not in benchmark.variants:
        known = f"known: {', '.join(benchmark.variants)}" if benchmark.variants else "it has none; leave out --variant"
        raise ModalloyError(f"{benchmark.name}: no variant '{source.variant}'; {known}")
    if unknown := [name for name in source.modalities or () if name not in benchmark.modalities]:
        shown = "+".join(benchmark.modalities)
        remedy = f"it shows {shown}; choose of these" if shown else "it is text only; leave out --modalities"
        raise ModalloyError(f"{benchmark.name}: its questions never show {', '.join(unknown)}; {remedy}")
    samples = benchmark.samples(source)
    if not samples:
        raise ModalloyError(f"{source.data}: holds no question of {benchmark.name}; check --data and --modalities")
    if odd := [sample for sample in samples if not sample.is_well_typed]:
        raise MediaError(
            f"{source.data}: question {odd[0].id} has a field that is not text; give the benchmark's own files"
        )
    return samples


def choose_variant(benchmark: str, source: Source, found: dict[str, Path | None]) -> tuple[str, Path]:
    """The variant (name → its file, if the folder has it) that is asked for, or the only one there is, which is noted."""
    there = {name: path for name, path in found.items() if path is not None}
    if source.variant is not None:
        there = {name: path for name, path in there.items() if name == source.variant}
    if len(there) > 1:
        raise ModalloyError(
            f"{source.data}: holds several variants of {benchmark}; choose one with --variant: {', '.join(there)}"
        )
    if not there:
        wanted = source.variant or " or ".join(found)
        raise MediaError(f"{source.data}: holds no file of {benchmark} ({wanted}); give its files with --data")
    source.variant, path = next(iter(there.items()))
    return source.variant, path


def check_letters(count: int) -> None:
    """Raise ValueError if a question has more options than letters that answers are read by."""
    if count > READ:
        raise ValueError(f"{count} options, of which {READ} have letters that answers are read by")


def letter(index: int) -> str:
    """ "A" for 0, "B" for 1, …"""
    return LETTERS[index]


def likeliest(sample: Sample, answer: Answer) -> int:
    """Index of the option of highest likelihood, the first of equals."""
    return max(range(len(sample.options)), key=lambda index: (answer.likelihoods[index], -index))


def wilson(correct: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """95 % Wilson interval of a share `correct` of `n` (E. B. Wilson, 1927); (0, 1) of none."""
    if not n:
        return 0.0, 1.0
    share, spread = correct / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    # at the ends the bounds are exact, but for rounding
    return max(0.0, middle - half) if correct else 0.0, min(1.0, middle + half) if correct < n else 1.0


def by_group(samples: Iterable[Sample]) -> dict[tuple[str, str], list[int]]:
    """(key, value) → indices of the samples whose `group` has it, in order of appearance."""
    groups: dict[tuple[str, str], list[int]] = {}
    for index, sample in enumerate(samples):
        for pair in sample.group.items():
            groups.setdefault(pair, []).append(index)
    return groups

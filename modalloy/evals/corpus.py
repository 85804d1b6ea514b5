"""The files of the `senses` data, typed and checked: pictures, speech, sounds and shapes, each in one split.

`make data` builds a folder of files and `manifest.json`, a list with one record a file:

| field | |
|---|---|
| `file` | path in the folder |
| `kind`, `modality` | picture (image), speech (audio), sound (audio) or shape (point) |
| `concept`, `phrase`, `plural` | "horse", "a horse", false; "" where speech names no concept |
| `category`, `subgroup` | "animal" (a key of `CATEGORIES`, or "other"), "mammal" |
| `also` | concepts that are right, or arguable, for it, too: no question may count them as wrong |
| `split` | train, validation, test, or human (recordings of people, a tier of their own) |
| `family` | the artist, voice or collection; one of pictures or of speech is never in two splits |
| `form`, `text` | of speech: one of `spoken.FORMS`, and exactly what is said |
| `source`, `package`, `licence`, `sha256` | where it is from, and what it must be |

Moving pictures are not stored: `modalloy.evals.motion` makes them of stills.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from modalloy.errors import MediaError, plain
from modalloy.evals.benchmark import Source, fields
from modalloy.evals.files import leads_out
from modalloy.evals.spoken import FORMS
from modalloy.senses.media.limits import opened

MODALITY = {"picture": "image", "speech": "audio", "sound": "audio", "shape": "point"}  # by kind
SPLITS = ("train", "validation", "test", "human")
CATEGORIES = {  # with the article that the noun takes; "other" is asked about by no question
    "animal": "an animal",
    "plant": "a plant",
    "food": "food",
    "drink": "a drink",
    "vehicle": "a vehicle",
    "building": "a building",
    "clothing": "clothing",
    "instrument": "an instrument",
    "tool": "a tool",
    "device": "a device",
    "furniture": "furniture",
}
OTHER = "other"
_TEXTS = ("concept", "phrase", "subgroup", "family", "text", "source", "package", "licence")


@dataclass(frozen=True)
class Clip:
    """One file of the data; see the module's table."""

    path: Path
    kind: str
    concept: str
    phrase: str
    plural: bool
    category: str
    subgroup: str
    also: tuple[str, ...]
    split: str
    family: str
    form: str
    text: str
    source: str
    package: str
    licence: str
    sha256: str

    @property
    def modality(self) -> str:
        """The sense that takes the file."""
        return MODALITY[self.kind]


def load(data: str | Path | Source) -> list[Clip]:
    """All files of the data folder (or source) `data`.

    Raises:
        MediaError: there is no manifest, it is an older build's, a record describes no file of the folder, or a family of
            pictures or of speech is in two splits.
    """
    source = data if isinstance(data, Source) else Source(Path(data))
    manifest = source.data / "manifest.json"
    if not manifest.is_file():
        raise MediaError(f"{manifest}: no such file; run `make data`, or point --data at the folder that holds it")
    rows = source.rows(manifest)
    if any(isinstance(row, dict) and "source" in row and "split" not in row for row in rows):
        raise MediaError(f"{manifest}: is of an older build, whose files have no split; run `make data` again")
    clips, folders = [], source.folders  # worked out once: there are thousands of files
    for index, row in enumerate(rows):
        with fields(manifest, index):
            clips.append(_clip(source.data, folders, row))
    _refuse_straddling(manifest, clips)
    return clips


def _clip(data: Path, folders: tuple[str, ...], row: dict[str, Any]) -> Clip:
    """The file that a record describes; ValueError, TypeError or KeyError where it describes none."""
    texts = {name: _text(row[name]) for name in _TEXTS}
    chosen = {
        name: _one_of(name, row[name], known)
        for name, known in (
            ("kind", MODALITY),
            ("split", SPLITS),
            ("category", ("", OTHER, *CATEGORIES)),
            ("form", ("", *FORMS)),
        )
    }
    path = data / _text(row["file"])
    if leads_out(path, folders):
        raise ValueError(f"{row['file']!r} leads out of the data's folder")
    if bool(texts["text"]) != bool(chosen["form"]) or bool(chosen["form"]) != (chosen["kind"] == "speech"):
        raise ValueError("a text and a form are what speech has, and nothing else")
    if not (texts["concept"] or chosen["kind"] == "speech"):
        raise ValueError("no concept")
    if not isinstance(row["plural"], bool):
        raise TypeError(f"plural: {row['plural']!r}")
    also = tuple(_text(name) for name in row["also"])
    return Clip(path=path, plural=row["plural"], also=also, sha256=_digest(row["sha256"]), **texts, **chosen)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _one_of(name: str, value: Any, known: Iterable[str]) -> str:
    if value not in tuple(known):
        raise ValueError(f"{name} {value!r}")
    return str(value)


def _digest(value: Any) -> str:
    if len(bytes.fromhex(_text(value))) != 32:
        raise ValueError(f"sha256 {value!r}")
    return str(value)


def _refuse_straddling(manifest: Path, clips: list[Clip]) -> None:
    """No artist and no voice is trained on and tested."""
    splits: dict[tuple[str, str], str] = {}
    for clip in clips:
        if clip.kind in ("picture", "speech") and splits.setdefault((clip.kind, clip.family), clip.split) != clip.split:
            found = f"{splits[clip.kind, clip.family]} and {clip.split}"
            raise MediaError(
                f"{manifest}: {clip.kind} by {clip.family} is in two splits, {found}; run `make data` again"
            )


def verify(clips: Iterable[Clip]) -> None:
    """Read every file, and refuse the first that is not what the manifest says.

    Raises:
        MediaError: a file is missing, or its sha256 differs.
    """
    for clip in clips:
        digest = sha256()
        with opened(clip.path) as file:
            while block := file.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != clip.sha256:
            raise MediaError(
                f"{plain(clip.path)}: its sha256 is {digest.hexdigest()[:12]}…, the manifest says {clip.sha256[:12]}…; "
                "run `make data` again"
            )

"""Reads the tables that say what the data set is made of: packages, concepts, files taken one by one, and voices.

A *source* such as `tux:animals/birds/duck.ogg` is a prefix and a path. The prefix names a package, and says where in it
the path is found: the *member* of the package and, where that member is itself an archive, the *inner* file. It also says
who made the files (their *family*) and which split they belong to.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from modalloy.evals.corpus import CATEGORIES, MODALITY, OTHER, SPLITS

SUFFIXES = {"picture": "webp", "speech": "ogg", "sound": "flac", "shape": "npy"}  # of the built files, by kind
HELD_BACK = {"sound": 3, "shape": 2}  # kind → files of a concept from which on one of them is kept for validation
REGISTRIES = {"debian": "Debian", "npm": "npm", "pypi": "PyPI"}
Record = dict[str, Any]


class DataError(Exception):
    """Something the user can see and act on; the message is one line."""


@dataclass(frozen=True)
class Package:
    """One pinned package."""

    name: str
    kind: str  # a key of REGISTRIES
    version: str
    bytes: int
    sha256: str
    licence: str
    takes: str

    @property
    def label(self) -> str:
        return f"{self.name} {self.version} ({REGISTRIES[self.kind]})"

    @property
    def slug(self) -> str:
        """A folder name of its own."""
        return re.sub(r"[^A-Za-z0-9.+-]+", "_", f"{self.kind}-{self.name}-{self.version}")


@dataclass(frozen=True)
class Location:
    """A file inside a package."""

    member: str
    inner: str | None  # a file inside the member, when the member is an archive

    @property
    def key(self) -> str:
        return self.member if self.inner is None else f"{self.member}!{self.inner}"


@dataclass(frozen=True)
class Source:
    """What a prefix means. The package's licence holds unless a pattern says otherwise."""

    prefix: str
    package: Package
    member: str  # template: {path}, {top} its first folder, {code} in lower case, {bare} without -FE0F
    inner: str | None
    family: str
    split: dict[str, str]  # kind of files → split
    holds: str = ""  # "names" or "codes": it draws concepts of concepts.yaml, under these
    files: int = 0  # how many drawings of concepts it holds
    others: tuple[str, ...] = ()  # names that mean something else in it
    note: str = ""
    licences: tuple[tuple[str, str], ...] = ()  # (pattern of paths, licence), first match wins
    z_up: tuple[str, ...] = ()  # patterns of meshes whose z axis points up

    def locate(self, path: str) -> Location:
        parts = {"path": path, "top": path.split("/")[0], "code": path.lower(), "bare": path.removesuffix("-FE0F")}
        location = Location(self.member.format(**parts), None if self.inner is None else self.inner.format(**parts))
        if ".." in location.key.split("/") or location.key.startswith("/"):
            raise DataError(f"{self.prefix}:{path} leads out of its package")
        return location

    def licence(self, path: str) -> str:
        return next((name for pattern, name in self.licences if fnmatchcase(path, pattern)), self.package.licence)

    def is_z_up(self, path: str) -> bool:
        return any(fnmatchcase(path, pattern) for pattern in self.z_up)


@dataclass(frozen=True)
class Concept:
    """What a picture shows and a word names."""

    name: str
    category: str
    subgroup: str
    phrase: str
    plural: bool
    also: tuple[str, ...]
    codes: tuple[str, ...]
    names: tuple[str, ...]

    @property
    def folder(self) -> str:
        return re.sub(r"[^A-Za-z0-9-]+", "_", self.name)

    def record(self) -> Record:
        return {
            "concept": self.name,
            "phrase": self.phrase,
            "plural": self.plural,
            "category": self.category,
            "subgroup": self.subgroup,
            "also": list(self.also),
        }


@dataclass(frozen=True)
class Entry:
    """One file to take out of a package and convert."""

    file: str
    kind: str
    concept: Concept
    source: Source
    path: str
    split: str
    optional: bool = False  # the package may lack it; how many it holds is pinned by the source

    @property
    def spec(self) -> str:
        return f"{self.source.prefix}:{self.path}"

    @property
    def location(self) -> Location:
        return self.source.locate(self.path)

    def record(self) -> Record:
        """Its line in the manifest, still without the hash."""
        label = self.source.package.label
        return {
            "file": self.file,
            "kind": self.kind,
            "modality": MODALITY[self.kind],
            **self.concept.record(),
            "split": self.split,
            "family": self.source.family,
            "form": "",
            "text": "",
            "source": self.spec,
            "package": f"{label}, {self.source.note}" if self.source.note else label,
            "licence": self.source.licence(self.path),
        }


@dataclass(frozen=True)
class Tables:
    """All that the tables say about files that are taken out of packages."""

    sources: dict[str, Source]
    packages: dict[str, Package]  # by name
    concepts: dict[str, Concept]
    entries: list[Entry]
    gaps: dict[str, str] = field(default_factory=dict)  # source that may fail → reason


def read_yaml(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise DataError(f"{path.name} is not a table")
    return content


def load_packages(path: Path) -> tuple[dict[str, Source], dict[str, Package]]:
    """Prefix → source, and name → package, from `packages.yaml`."""
    content = read_yaml(path)
    packages: dict[str, Package] = {}
    for row in content["packages"]:
        package = Package(**row)
        if package.kind not in REGISTRIES:
            raise DataError(f"{package.name}: kind {package.kind!r} is none of {', '.join(REGISTRIES)}")
        if not re.fullmatch(r"[0-9a-f]{64}", package.sha256):
            raise DataError(f"{package.name}: sha256 {package.sha256!r} is not 64 hexadecimal digits")
        packages[package.name] = package
    sources: dict[str, Source] = {}
    for prefix, row in content["sources"].items():
        name = row["package"]
        if name not in packages:
            raise DataError(f"source {prefix} names the package {name}, which {path.name} does not pin")
        unknown = [
            f"{kind}: {split}" for kind, split in row["split"].items() if kind not in MODALITY or split not in SPLITS
        ]
        if unknown:
            raise DataError(
                f"source {prefix}: its split {unknown[0]!r} is of no kind, or to none of {', '.join(SPLITS)}"
            )
        sources[prefix] = Source(
            prefix=prefix,
            package=packages[name],
            member=row["member"],
            inner=row.get("inner"),
            family=row["family"],
            split=row["split"],
            holds=row.get("holds", ""),
            files=row.get("files", 0),
            others=tuple(row.get("others", ())),
            note=row.get("note", ""),
            licences=tuple(row.get("licences", {}).items()),
            z_up=tuple(row.get("z_up", ())),
        )
    refuse_straddling(
        ((kind, source.family), split, prefix)
        for prefix, source in sources.items()
        for kind, split in source.split.items()
    )
    return sources, packages


def refuse_straddling(rows: Any) -> None:
    """Refuses a family of artists or of voices that is in two splits; rows are (family, split, who says so)."""
    splits: dict[tuple[str, str], str] = {}
    for family, split, who in rows:
        if family[0] in ("picture", "speech") and splits.setdefault(family, split) != split:
            raise DataError(f"{who}: {' by '.join(family)} is in two splits, {splits[family]} and {split}")


def load_concepts(path: Path) -> dict[str, Concept]:
    """Name → concept, from `concepts.yaml`."""
    concepts = {}
    rows = read_yaml(path)["concepts"]
    for name, row in rows.items():
        category, _, subgroup = row["kind"].partition("/")
        if category not in CATEGORIES and category != OTHER:
            raise DataError(f"{name}: the category {category!r} is none of {', '.join(CATEGORIES)} or {OTHER}")
        if unknown := [other for other in row.get("also", ()) if other not in rows]:
            raise DataError(f"{name}: also names {unknown[0]!r}, which is no concept")
        concepts[name] = Concept(
            name=name,
            category=category,
            subgroup=subgroup,
            phrase=row.get("phrase", f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"),
            plural=row.get("plural", False),
            also=tuple(row.get("also", ())),
            codes=tuple(row.get("codes", ())),
            names=tuple(row.get("names", ())),
        )
    return concepts


def load_tables(folder: Path) -> Tables:
    """The tables `packages.yaml`, `concepts.yaml` and `files.yaml` of a folder, joined."""
    sources, packages = load_packages(folder / "packages.yaml")
    concepts = load_concepts(folder / "concepts.yaml")
    entries: list[Entry] = []
    for concept in concepts.values():
        for prefix, source in sources.items():
            if source.holds:
                paths = concept.names if source.holds == "names" else concept.codes
                for number, path in enumerate(paths):
                    if path in source.others:
                        continue
                    file = f"picture/{concept.folder}/{prefix}_{number}.{SUFFIXES['picture']}"
                    entries.append(
                        Entry(file, "picture", concept, source, path, source.split["picture"], optional=True)
                    )
    content = read_yaml(folder / "files.yaml")
    for name, row in content["files"].items():
        if name not in concepts:
            raise DataError(f"files.yaml: {name!r} is no concept of concepts.yaml")
        for kind, files in row.items():
            for number, spec in files.items():
                prefix, _, path = spec.partition(":")
                if prefix not in sources or kind not in sources[prefix].split:
                    raise DataError(f"{name}: the prefix of {spec!r} is none of the sources of a {kind}")
                file = f"{kind}/{concepts[name].folder}/{prefix}_{number}.{SUFFIXES[kind]}"
                entries.append(Entry(file, kind, concepts[name], sources[prefix], path, sources[prefix].split[kind]))
    return Tables(sources, packages, concepts, held_back(entries), dict(content.get("known_gaps") or {}))


def held_back(entries: list[Entry]) -> list[Entry]:
    """The same files with some of training's kept for validation, of kinds whose families are too few to keep a whole one.

    Of every concept that at least `HELD_BACK[kind]` files would train, it is the last file of the source with most.
    """
    training: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        if entry.kind in HELD_BACK and entry.split == "train":
            training.setdefault((entry.kind, entry.concept.name), []).append(entry)
    back = set()
    for (kind, _), group in training.items():
        if len(group) >= HELD_BACK[kind]:
            prefixes = [entry.source.prefix for entry in group]
            most = max(prefixes, key=prefixes.count)
            back.add([entry.file for entry in group if entry.source.prefix == most][-1])
    return [replace(entry, split="validation") if entry.file in back else entry for entry in entries]

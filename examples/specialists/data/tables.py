"""Reads the two tables that say what the data set is made of: `packages.yaml` and `concepts.yaml`.

A *source* such as `tux:animals/birds/duck.ogg` is a prefix and a path. The prefix names one or more packages, and
says where in them the path is found: the *member* of the package and, where that member is itself an archive, the
*inner* file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

MODALITIES = {"image": "webp", "audio": "flac", "video": "webp", "pointcloud": "npy"}  # -> suffix of the built files
REGISTRIES = {"debian": "Debian", "npm": "npm", "pypi": "PyPI"}


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
    """What a prefix means. A file is in one of the packages; their licence holds unless a pattern says otherwise."""

    prefix: str
    packages: tuple[Package, ...]
    member: str  # template: {path}, {top} its first folder; for paths `left!right` also {left} and {right}
    inner: str | None
    label: str
    licences: tuple[tuple[str, str], ...]  # (pattern of paths, licence), first match wins
    z_up: tuple[str, ...]  # patterns of meshes whose z axis points up

    def locate(self, path: str) -> Location:
        left, _, right = path.partition("!")
        parts = {"path": path, "top": path.split("/")[0], "left": left, "right": right}
        location = Location(self.member.format(**parts), None if self.inner is None else self.inner.format(**parts))
        if ".." in location.key.split("/") or location.key.startswith("/"):
            raise DataError(f"{self.prefix}:{path} leads out of its package")
        return location

    def licence(self, path: str) -> str:
        matching = (licence for pattern, licence in self.licences if fnmatchcase(path, pattern))
        return next(matching, self.packages[0].licence)

    def is_z_up(self, path: str) -> bool:
        return any(fnmatchcase(path, pattern) for pattern in self.z_up)


@dataclass(frozen=True)
class Entry:
    """One file to build."""

    file: str
    concept: str
    category: str
    modality: str
    source: Source
    path: str

    @property
    def spec(self) -> str:
        return f"{self.source.prefix}:{self.path}"

    @property
    def location(self) -> Location:
        return self.source.locate(self.path)

    def record(self) -> dict[str, str]:
        """Its line in the manifest, still without the hash."""
        return {
            "file": self.file,
            "concept": self.concept,
            "category": self.category,
            "modality": self.modality,
            "source": self.spec,
            "package": self.source.label,
            "licence": self.source.licence(self.path),
        }


def _read_yaml(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise DataError(f"{path.name} is not a table")
    return content


def load_sources(path: Path) -> dict[str, Source]:
    """Prefix -> source, from `packages.yaml`."""
    content = _read_yaml(path)
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
        unknown = [name for name in row["packages"] if name not in packages]
        if unknown:
            raise DataError(f"source {prefix} names the package {unknown[0]}, which {path.name} does not pin")
        used = tuple(packages[name] for name in row["packages"])
        label = row.get("label", used[0].label)
        sources[prefix] = Source(
            prefix=prefix,
            packages=used,
            member=row["member"],
            inner=row.get("inner"),
            label=f"{label}, {row['note']}" if "note" in row else label,
            licences=tuple((pattern, licence) for pattern, licence in row.get("licences", {}).items()),
            z_up=tuple(row.get("z_up", ())),
        )
    return sources


def load_entries(path: Path, sources: dict[str, Source]) -> tuple[list[Entry], dict[str, str]]:
    """Every file of the data set in order, and the known gaps (source -> reason), from `concepts.yaml`."""
    content = _read_yaml(path)
    entries: list[Entry] = []
    for concept, row in content["concepts"].items():
        folder = concept.replace(" ", "_")
        for modality, suffix in MODALITIES.items():
            for number, spec in row.get(modality, {}).items():
                prefix, _, inside = spec.partition(":")
                if prefix not in sources:
                    raise DataError(f"{concept}: the prefix of {spec!r} is none of {', '.join(sources)}")
                file = f"{modality}/{folder}/{prefix}_{number}.{suffix}"
                entries.append(Entry(file, concept, row["category"], modality, sources[prefix], inside))
    return entries, dict(content.get("known_gaps") or {})

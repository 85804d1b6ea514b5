"""Downloads pinned packages with the ordinary clients and takes single files out of them.

The cache holds two folders: `packages/`, downloads that were verified and not yet unpacked, and `files/`, the files
taken out of each package beside an `index.json` with their hashes. A package whose wanted files are all in the index
is not downloaded again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rcc import RccFile
from tables import DataError, Location, Package

Report = Callable[[str], None]
_BLOCK_BYTES = 1 << 20


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """The file appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(content)
    os.replace(beside, path)


def verify(package: Package, path: Path) -> None:
    """Refuses a download whose content is not the pinned one."""
    found = file_sha256(path)
    if found != package.sha256:
        raise DataError(
            f"{package.label}: sha256 of {path.name} is {found}, packages.yaml pins {package.sha256}; the download is damaged "
            f"or the registry serves another file, so it is not used; --without {package.name} builds all that needs no such file"
        )


def _pip() -> list[str]:
    """This environment's pip, or the one on the path where the environment has none."""
    return [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else ["pip"]


def client_command(package: Package) -> list[str]:
    """The command that downloads a package into the current folder."""
    if package.kind == "debian":
        return ["apt-get", "download", "-q", f"{package.name}={package.version}"]
    if package.kind == "npm":
        return ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
    return [*_pip(), "download", "-q", "--no-deps", "--only-binary", ":all:", f"{package.name}=={package.version}"]


_HINTS = {
    "debian": "the versions are Debian 12's (bookworm); `apt-get update` refreshes the lists",
    "npm": "is the npm registry reachable?",
    "pypi": "is the Python package index reachable?",
}


def download(package: Package, cache: Path, report: Report) -> Path:
    """Path of the verified package file; from the cache if it is there."""
    folder = cache / "packages" / package.slug
    if folder.is_dir():
        for kept in sorted(folder.iterdir()):
            verify(package, kept)
            return kept
    report(f"download {package.label}, {package.bytes / 1e6:.1f} MB")
    command = client_command(package)
    if shutil.which(command[0]) is None:
        raise DataError(f"{package.label}: {command[0]} is needed to download it and was not found")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as name:
        fresh = Path(name)
        result = subprocess.run(command, cwd=fresh, capture_output=True, text=True, check=False)
        files = [path for path in fresh.iterdir() if path.is_file()]
        if result.returncode != 0 or len(files) != 1:
            said = (result.stderr or result.stdout).strip().splitlines()
            reason = said[-1] if said else f"exit code {result.returncode}, {len(files)} files"
            raise DataError(
                f"{package.label}: {command[0]} failed: {reason} ({_HINTS[package.kind]}); "
                f"--without {package.name} builds all that needs no such file"
            )
        verify(package, files[0])
        ready = fresh / "ready"
        ready.mkdir()
        os.replace(files[0], ready / files[0].name)
        os.replace(ready, folder)
    return folder / files[0].name


@contextmanager
def _package_members(package: Package, path: Path) -> Iterator[Iterator[tuple[str, IO[bytes]]]]:
    """The regular files of a package in the order they are stored, each as (name, stream)."""

    def from_tar(archive: tarfile.TarFile) -> Iterator[tuple[str, IO[bytes]]]:
        for member in archive:
            stream = archive.extractfile(member) if member.isfile() else None
            if stream is not None:
                yield member.name.removeprefix("./"), stream

    def from_zip(archive: zipfile.ZipFile) -> Iterator[tuple[str, IO[bytes]]]:
        for name in archive.namelist():
            with archive.open(name) as stream:
                yield name, stream

    if package.kind == "debian":
        if shutil.which("dpkg-deb") is None:
            raise DataError(f"{package.label}: dpkg-deb is needed to unpack it and was not found")
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(path)], stdout=subprocess.PIPE) as process:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                yield from_tar(archive)
            process.kill()  # the rest of the archive is not needed
    elif package.kind == "npm":
        with tarfile.open(path, mode="r|gz") as archive:
            yield from_tar(archive)
    else:
        with zipfile.ZipFile(path) as wheel:
            yield from_zip(wheel)


class IconSet:
    """A set of icons in Iconify's JSON, as an archive of SVG files."""

    def __init__(self, content: dict[str, Any]) -> None:
        self._content = content

    def names(self) -> list[str]:
        """Names of the icons' files; aliases are not among them."""
        return [f"{name}.svg" for name in self._content["icons"]]

    def read(self, name: str) -> bytes:
        """One icon as an SVG file; its size is the set's where it has none of its own."""
        icon = self._content["icons"][name.removesuffix(".svg")]
        left, top, width, height = (
            icon.get(side, self._content.get(side, default))
            for side, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
        )
        head = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{width}"'
        return f'{head} height="{height}" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'.encode()


@contextmanager
def _open_container(
    name: str, stream: IO[bytes], scratch: Path
) -> Iterator[tuple[Collection[str], Callable[[str], bytes]]]:
    """The names in an archive that is itself a member of a package, and a function that reads one of them."""
    if name.endswith(".rcc"):
        resources = RccFile(stream.read())
        yield resources.names(), resources.read
        return
    if name.endswith("icons.json"):
        icons = IconSet(json.loads(stream.read()))
        yield icons.names(), icons.read
        return
    with scratch.open("wb") as spooled:  # a zip is read from its end, which a stream does not allow
        shutil.copyfileobj(stream, spooled, _BLOCK_BYTES)
    with zipfile.ZipFile(scratch) as archive:
        yield archive.namelist(), archive.read


def extract(package: Package, path: Path, wanted: set[Location], folder: Path) -> dict[str, str | None]:
    """Writes those wanted files that the package holds below `folder`; key -> sha256, None for one it does not hold."""
    by_member: dict[str, list[Location]] = {}
    for location in sorted(wanted, key=lambda item: item.key):
        by_member.setdefault(location.member, []).append(location)
    index: dict[str, str | None] = {location.key: None for location in wanted}

    def keep(location: Location, content: bytes) -> None:
        write_atomically(stored_path(folder, location), content)
        index[location.key] = hashlib.sha256(content).hexdigest()

    with _package_members(package, path) as members, tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        for name, stream in members:
            locations = by_member.pop(name, [])
            if locations and locations[0].inner is None:
                keep(locations[0], stream.read())
            elif locations:
                with _open_container(name, stream, Path(scratch) / "container") as (names, read):
                    for location in locations:
                        if location.inner is not None and location.inner in names:
                            keep(location, read(location.inner))
            if not by_member:
                break
    return index


def stored_path(folder: Path, location: Location) -> Path:
    """Where a file taken out of a package is kept; an archive inside the package becomes a folder."""
    return folder / location.member if location.inner is None else folder / location.member / location.inner


def provide(package: Package, wanted: set[Location], cache: Path, keep: bool, report: Report) -> dict[str, Path]:
    """Key -> path of those wanted files that the package holds, downloading and unpacking it if need be."""
    folder = cache / "files" / package.slug
    index_path = folder / "index.json"
    index: dict[str, str | None] = {}
    if index_path.is_file():
        known = json.loads(index_path.read_text(encoding="utf-8"))
        if known.get("package_sha256") == package.sha256:
            index = known["files"]
    missing = {item for item in wanted if item.key not in index or not _intact(folder, item, index[item.key])}
    if missing:
        archive = download(package, cache, report)
        report(f"unpack   {package.label}")
        folder.mkdir(parents=True, exist_ok=True)
        index.update(extract(package, archive, missing, folder))
        content = {"package_sha256": package.sha256, "files": dict(sorted(index.items()))}
        write_atomically(index_path, json.dumps(content, indent=1).encode())
        if not keep:
            shutil.rmtree(archive.parent)
    return {item.key: stored_path(folder, item) for item in wanted if index[item.key] is not None}


def unpack(package: Package, cache: Path, keep: bool, report: Report) -> Path:
    """The folder that holds all files of a package, in their places, downloading and unpacking it if need be."""
    folder = cache / "tools" / package.slug
    if folder.is_dir():
        return folder
    archive = download(package, cache, report)
    report(f"unpack   {package.label}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as name:
        fresh = Path(name) / "files"
        if package.kind == "debian":
            subprocess.run(["dpkg-deb", "--extract", str(archive), str(fresh)], check=True)
        else:
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(fresh)
        os.replace(fresh, folder)
    if not keep:
        shutil.rmtree(archive.parent)
    return folder


def _intact(folder: Path, location: Location, sha256: str | None) -> bool:
    """Whether the cache still holds what the index says; a file known not to be in the package needs nothing."""
    if sha256 is None:
        return True
    path = stored_path(folder, location)
    return path.is_file() and file_sha256(path) == sha256

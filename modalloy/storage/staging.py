"""A result appears when it is whole: the folder beside it that takes its place, the log of that, and what may be replaced."""

import ctypes
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from modalloy.errors import CheckpointError, ModalloyError, OutputError, PassingError
from modalloy.files import disk_errors, is_file, is_folder, is_mount, kind, open_log, read_file
from modalloy.storage.folder import read_json

HEAD = b'{"modalloy merge": '  # how every log of ours begins
LOG_BYTES = 64 << 20
SIGNATURE = "model.sig"
MANIFEST, SOURCES = "manifest.json", "sources.json"  # what a result has beside the files that the manifest lists
AT_FDCWD, RENAME_EXCHANGE = -100, 2


class Staging:
    """A folder beside `out` that takes its place only if everything went well.

    Usage: `with Staging(out).begin(fingerprint) as folder: …`. After any exception the folder is removed and `out` is as
    it was. An existing `out` is refused unless `overwrite`, and then replaced in one step, if it is a result and holds
    nothing else.

    The folder is new and its name drawn, `.OUT.partial-XXXXXXXX`, so it is nobody else's. A process that is killed leaves
    it, and its log `.OUT.partial.log` (JSON lines: what was being made, and where; every finished file with its hash).
    With `resume` the next run goes on from there, if it makes the same (`fingerprint`); without, it starts again. What
    else has the log's name is refused, links too. `finished` then holds the hashes of the finished files, and `facts`
    what was noted with them. The log is locked while a process works on it. A PassingError leaves both as a kill does, and
    so do a refusal before a resumed run has written (`is_untouched`), and whatever fails once the result is to be put in
    place with others (`is_whole`).
    """

    def __init__(
        self, out: Path, *, overwrite: bool = False, resume: bool = False, remedy: str = "replace it with --overwrite"
    ) -> None:
        """Refuse, before any work, what cannot be written to; `remedy`: what else than another folder helps then.

        Raises:
            OutputError: `out` exists (or with `overwrite` is not a result alone), is a link or a mount point.
        """
        self.out, self.overwrite, self.resume, self.remedy = out, overwrite, resume, remedy
        self.is_untouched = self.is_whole = False
        self.finished: dict[str, str] = {}
        self.facts: dict[str, float] = {}
        self.replaces: int | None = None  # the inode of the folder whose place is taken
        if out.name in ("", ".."):
            raise OutputError(f"{out}: cannot be replaced as a whole; name a folder in it")
        if overwrite and resume:
            raise OutputError("--overwrite starts again and --resume goes on; give one of them")
        self.log = out.parent / f".{out.name}.partial.log"
        self._name(secrets.token_hex(4))
        with disk_errors(out):
            _check_place(out)
            if not resume:
                self._check_target()
            self.interrupted = self._was_interrupted()
            self.new_parents = [parent for parent in out.parents if not parent.exists()]  # innermost first

    def begin(self, fingerprint: str, source: str | None = None) -> "Staging":
        """Say what is being made, and the hash of what else finished files are of; to be called before entering."""
        self.fingerprint, self.source = fingerprint, source
        return self

    def note(self, name: str, sha256: str, facts: dict[str, float]) -> None:
        """Record a finished file, and what is known of its making, so that a resumed run keeps both."""
        self._record({"file": name, "sha256": sha256, "facts": facts})

    def check_free(self) -> None:
        """Refuse a place that was taken meanwhile.

        Raises:
            OutputError: it was.
        """
        if os.path.lexists(self.out) and not self.overwrite:
            raise OutputError(
                f"{self.out}: was made by something else during the merge; choose another folder, or {self.remedy}"
            )

    def clean(self) -> None:
        """Remove what a process left that was killed after the result was in place."""
        with disk_errors(self.out):
            if os.path.lexists(self.log):
                self._lock()
                try:
                    self._recover()
                    self.log.unlink()
                finally:
                    os.close(self.lock)

    def __enter__(self) -> Path:
        with disk_errors(self.out):
            try:
                self.out.parent.mkdir(parents=True, exist_ok=True)
                self._lock()
            except BaseException:
                self._remove_parents()
                raise
            try:
                self._recover()
                if not (self.resume and self._continues()):
                    self._start_again()
                if self.source is not None:
                    self._record({"from": self.source})
            except OutputError:
                if not os.fstat(self.lock).st_size:  # nobody's log, opened just now
                    self.log.unlink()
                os.close(self.lock)
                raise
            except BaseException:
                self._remove()
                os.close(self.lock)
                raise
        return self.folder

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, PassingError):  # as a kill does, it leaves what `resume` goes on from
                return
            if kind is not None:
                refused = self.is_untouched and isinstance(error, ModalloyError)
                if not (refused or self.is_whole):
                    self._remove()
                return
            with disk_errors(self.out):
                if self.overwrite and os.path.lexists(self.out):
                    self._check_again()
                try:
                    old = self._take_place()
                except BaseException:
                    if not self.is_whole:
                        self._remove()
                    raise
                try:
                    if old is not None:
                        self._discard(old)
                finally:
                    self.log.unlink(missing_ok=True)
        finally:
            os.close(self.lock)

    def _name(self, token: str) -> None:
        """The folder, and where the old result is while the two change places, if the system cannot do that in one step."""
        self.folder = self.out.parent / f".{self.out.name}.partial-{token}"
        self.replaced = self.out.parent / f".{self.out.name}.replaced-{token}"
        self.token = token

    def _lock(self) -> None:
        """Lock the log and read it; again if another process removed it meanwhile, whose successor would lock a new one."""
        while True:
            try:
                self.lock = open_log(self.log)
            except BlockingIOError as error:
                raise OutputError(f"{self.out}: another merge is writing it now; wait for it or stop it") from error
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self.lock), self.log.lstat()):
                    break
            os.close(self.lock)
        try:
            self.records = self._read()
        except BaseException:
            os.close(self.lock)
            raise

    def _read(self) -> list[dict[str, Any]]:
        """The whole lines of the log, which names the folder; a log that is not ours is refused."""
        raw = read_file(self.log, LOG_BYTES)
        if not (raw.startswith(HEAD) or HEAD.startswith(raw)):
            raise OutputError(f"{self.log}: is not the log of a merge; move it away, or choose another folder")
        records: list[dict[str, Any]] = []
        self.whole = 0
        for line in raw.splitlines(keepends=True):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not line.endswith(b"\n") or not _is_record(record, first=not records):
                break
            records.append(record)
            self.whole += len(line)
        if records:
            self._name(records[0]["token"])
            self.replaces = next((record["replaces"] for record in records if "replaces" in record), None)
        return records

    def _record(self, record: dict[str, Any]) -> None:
        left = (json.dumps(record) + "\n").encode()
        while left:
            left = left[os.write(self.lock, left) :]
        os.fsync(self.lock)

    def _was_interrupted(self) -> bool:
        """Whether a killed run left a folder that is not in its place yet."""
        if os.path.lexists(self.log) and not is_file(self.log):
            raise OutputError(f"{self.log}: is {kind(self.log)}, not the log of a merge; move it away")
        return is_file(self.log) and bool(self._read()) and is_folder(self.folder) and not self._is_old()

    def _is_old(self) -> bool:
        """Whether the two folders have changed places, and the staging's name is the old result's now."""
        return self.replaces is not None and is_folder(self.folder) and self.folder.lstat().st_ino == self.replaces

    def _recover(self) -> None:
        """End what a process began that was killed while the folders changed places, or thereafter."""
        if self._is_old():
            self._discard(self.folder)
        if not (self.records and is_folder(self.replaced)):
            return
        if not is_folder(self.folder):  # the new one is in place, or was moved from there
            self._discard(self.replaced)
        elif os.path.lexists(self.out):
            raise OutputError(
                f"{self.out}: was made by something else after a merge was killed; the result that was there before is in "
                f"{self.replaced.name}: move one of them away"
            )
        else:
            self.replaced.rename(self.out)

    def _continues(self) -> bool:
        """Whether an interrupted run was found to go on from; one of something else is refused."""
        if not self.records or not is_folder(self.folder):
            return False
        head, *files = self.records
        if head["modalloy merge"] != self.fingerprint:
            raise OutputError(
                f"{self.out}: the interrupted merge was of another recipe or of inputs that changed since; "
                "start again without --resume"
            )
        if any(record["from"] != self.source for record in files if "from" in record):
            raise OutputError(
                f"{self.out}: the interrupted merge took over tensors of an earlier result; give the same --from, or start again "
                "without --resume"
            )
        self.overwrite = head["overwrite"]
        self._check_target()
        self.is_untouched = True
        os.ftruncate(self.lock, self.whole)  # what the kill cut would spoil the next record
        for record in files:
            if "file" in record:
                self.finished[record["file"]] = record["sha256"]
                self.facts |= record["facts"]
        for path in list(self.folder.iterdir()):  # half a file, or what is written again
            if not (path.name in self.finished and is_file(path)):
                _remove(path)
        return True

    def _start_again(self) -> None:
        self._check_target()
        if self.records:
            _remove(self.folder)
            self._name(secrets.token_hex(4))
        os.ftruncate(self.lock, 0)
        while os.path.lexists(self.folder):
            self._name(secrets.token_hex(4))
        self.replaces = None
        self._record({"modalloy merge": self.fingerprint, "token": self.token, "overwrite": self.overwrite})
        self.folder.mkdir()

    def _check_target(self) -> None:
        if not os.path.lexists(self.out):
            return
        if not self.overwrite:
            raise OutputError(f"{self.out}: already exists; choose another folder, or {self.remedy}")
        if found := next(_strangers(self.out), None):
            raise OutputError(
                f"{self.out}: holds {found}, which its manifest.json does not list, so --overwrite will not replace it; "
                "move it away, or choose another folder"
            )

    def _check_again(self) -> None:
        """What appeared in the old result during the merge is not lost, nor is the merge."""
        try:
            self._check_target()
        except OutputError as error:
            raise OutputError(f"{error}; the merge itself is done and kept: then go on with --resume") from error

    def _take_place(self) -> Path | None:
        """Give the folder its name; returns where the old result is now."""
        self.check_free()
        if not os.path.lexists(self.out):
            self.folder.rename(self.out)
            return None
        self.replaces = self.out.lstat().st_ino
        self._record({"replaces": self.replaces})
        if exchange(self.folder, self.out):
            return self.folder
        self.out.rename(self.replaced)
        self.folder.rename(self.out)
        return self.replaced

    def _discard(self, old: Path) -> None:
        """Remove an old result's own files, the manifest last; anything else, put there in the last moment, is kept."""
        for path in sorted(_own_files(old), key=lambda path: path.name == MANIFEST):
            path.unlink(missing_ok=True)
        for place, _, _ in os.walk(old, topdown=False):
            with suppress(OSError):
                os.rmdir(place)
        if os.path.lexists(old):
            raise OutputError(
                f"{self.out}: is in place; what was put into the result that it replaced is kept in {old}: move it away"
            )

    def _remove(self) -> None:
        """Leave everything as it was: without the unfinished folder, its log, and the parents that were made for it."""
        with suppress(OSError):
            if is_folder(self.replaced) and not os.path.lexists(self.out):
                self.replaced.rename(self.out)
        if self._is_old():
            self._discard(self.folder)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            self.log.unlink()
        self._remove_parents()

    def _remove_parents(self) -> None:
        for parent in self.new_parents:
            with suppress(OSError):
                parent.rmdir()


def exchange(one: Path, other: Path) -> bool:
    """Let two folders exchange their names in one step; False, and nothing done, where the system or the disk cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # Linux
    names = os.fsencode(one), os.fsencode(other)
    return rename is not None and rename(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0


def _check_place(out: Path) -> None:
    """Refuse what no folder can take the place of."""
    if out.is_symlink():
        raise OutputError(
            f"{out}: is a link, which a result does not replace; give {os.path.realpath(out)}, or another"
        )
    if is_mount(out):
        raise OutputError(
            f"{out}: is a mount point, which a result cannot take the place of; name a folder in it: {out / 'merged'}"
        )
    for parent in out.parents:
        if parent.is_symlink() and not parent.exists():
            raise OutputError(f"{out}: {parent} is a link that leads nowhere; choose another folder")


def _own_files(folder: Path) -> list[Path]:
    """The files that a result is made of; none where its manifest is not there or not of modalloy."""
    if not is_file(folder / MANIFEST):
        return []
    try:
        manifest = read_json(folder / MANIFEST)
    except CheckpointError:
        return []
    listed = manifest.get("outputs")
    if not isinstance(manifest.get("modalloy"), str) or not isinstance(listed, dict):
        return []
    names = {name for name, sha256 in listed.items() if re.fullmatch("[0-9a-f]{64}", str(sha256))}
    found = (path for path in all_below(folder) if is_file(path))
    return [path for path in found if path.relative_to(folder).as_posix() in names | {MANIFEST, SOURCES, SIGNATURE}]


def _strangers(out: Path) -> Iterator[str]:
    """What of a result's folder modalloy did not write; the folder itself is refused if it is no result."""
    own = set(_own_files(out)) if is_folder(out) else set()
    if not own and not (is_folder(out) and not any(out.iterdir())):
        raise OutputError(
            f"{out}: is not a folder that modalloy wrote, so --overwrite will not replace it; remove it yourself"
        )
    folders = {parent for path in own for parent in path.parents}
    for path in all_below(out):
        if path not in own and not (path in folders and not is_mount(path)):
            yield str(path.relative_to(out))


def all_below(folder: Path) -> Iterator[Path]:
    """Everything in a folder and its folders, not through links."""
    for place, folders, files in os.walk(folder):
        yield from (Path(place, name) for name in sorted(folders + files))


def _is_record(record: Any, *, first: bool) -> bool:
    """Whether a line of the log says what it must."""
    if not isinstance(record, dict):
        return False
    if first:
        token = record.get("token")
        named = isinstance(token, str) and re.fullmatch("[0-9a-f]{8}", token)
        made = record.get("modalloy merge")
        return bool(named and isinstance(made, str) and isinstance(record.get("overwrite"), bool))
    if "replaces" in record:
        return isinstance(record["replaces"], int)
    if "from" in record:
        return isinstance(record["from"], str)
    facts = record.get("facts")
    return (
        all(isinstance(record.get(key), str) for key in ("file", "sha256"))
        and isinstance(facts, dict)
        and all(isinstance(value, int | float) for value in facts.values())
    )


def _remove(path: Path) -> None:
    """Remove a file, a link or a whole folder of ours; where a link leads to is left alone."""
    if is_folder(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

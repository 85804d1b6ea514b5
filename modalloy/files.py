"""Writing files so that nothing else is touched: never through a link, whole or not at all, a disk's error as one line."""

import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from modalloy.errors import OutputError

HERE = "choose another folder"
REASONS = {
    errno.ENOSPC: f"the disk is full; free space or {HERE}",
    errno.EDQUOT: f"your disk quota is used up; free space or {HERE}",
    errno.ENOLCK: f"the file system cannot lock files; {HERE}",
    errno.EFBIG: f"the file system takes no file this large; set output.max_shard_size or {HERE}",
    errno.EACCES: f"permission denied; {HERE}",
    errno.EPERM: f"the file system does not permit it; {HERE}",
    errno.EROFS: f"the file system is read-only; {HERE}",
    errno.ENAMETOOLONG: f"the name is too long; {HERE}",
    errno.ENOENT: f"its folder was removed meanwhile; make it again, or {HERE}",
    errno.ENOTEMPTY: f"was made by something else meanwhile; {HERE}",
    errno.ENOTDIR: f"a part of the path is a file, not a folder; {HERE}",
    errno.EEXIST: f"a part of the path is a file, not a folder; {HERE}",
    errno.ELOOP: f"a part of the path is a link that leads nowhere; {HERE}",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n) and try again",
    errno.ENFILE: "too many files are open on this machine; close some and try again",
    errno.EBUSY: f"something else uses it; wait for it, or {HERE}",
}
PAGE = b"<title>modalloy "  # in the first bytes of every page that modalloy writes
APPEND = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def cache_folder() -> Path:
    """Where is kept what can be made or fetched again: `MODALLOY_CACHE`, else in the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "modalloy"
    return Path(os.environ.get("MODALLOY_CACHE") or default).absolute()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a forbidden folder, a lost connection and the like into one OutputError line that names `path`."""
    try:
        yield
    except BrokenPipeError:  # of who reads what is printed, not of a disk
        raise
    except OSError as error:
        if error.errno in (None, errno.ENOMEM):  # of no system call, or of memory
            raise
        reason = REASONS.get(error.errno, f"{os.strerror(error.errno)}; see to the disk, or {HERE}")
        raise OutputError(f"{path}: {reason}; nothing was written") from error


def create(path: Path, flags: int = 0) -> int:
    """The descriptor of a new, empty file at `path`; FileExistsError where there is anything, a link too."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o666)


def write_text(path: Path, text: str) -> None:
    """Write a new text file; FileExistsError where there is anything."""
    with _open(create(path)) as descriptor:
        _write(descriptor, text.encode())


def replace_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all. A link at `path` is replaced; where it leads to is left alone."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, data: bytes) -> None:
    """The same for any file."""
    partial = _beside(path)
    try:
        with _open(create(partial)) as descriptor:
            _write(descriptor, data)
            os.fsync(descriptor)
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


@contextmanager
def new_file(path: Path, *, overwrite: bool = False) -> Iterator[Callable[[str], None]]:
    """A function that writes a page to `path`, which appears when the block ends well and else is as it was.

    Raises:
        OutputError: `path` is a folder or a link, exists without `overwrite`, is no page of modalloy's, or cannot be
            written; before the block is entered.
    """
    with disk_errors(path):
        _check_page(path, overwrite)
        partial = _beside(path)
        if not path.parent.is_dir():
            raise OutputError(f"{path}: the folder {path.parent} does not exist; make it first")
        try:
            made = create(partial)
        except FileNotFoundError as error:  # a folder that takes no files, as some of the system's
            raise OutputError(f"{path}: no file can be made in {path.parent}; {HERE}") from error

    def write(content: str) -> None:
        with disk_errors(path):
            _write(made, content.encode())
            os.fsync(made)

    try:
        with _open(made):
            yield write
        with disk_errors(path):
            _check_page(path, overwrite)  # it may have been made meanwhile
            os.replace(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink()


def open_log(path: Path) -> int:
    """The descriptor of a file that is read and appended to, made if it is not there, and locked by this process.

    Raises:
        BlockingIOError: another process has locked it.
        OutputError: it is a link, a folder or another thing than a file.
    """
    if os.path.lexists(path) and not is_file(path):
        raise OutputError(f"{path}: is {kind(path)}, not a log of modalloy's; move it away, or {HERE}")
    descriptor = os.open(path, APPEND, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OutputError(f"{path}: is no file; move it away, or {HERE}")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_file(path: Path, limit: int) -> bytes:
    """The content of a regular file, not through a link, up to `limit` bytes."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        return file.read(limit) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b""


def is_file(path: Path) -> bool:
    """Whether there is a regular file at `path` itself, not behind a link."""
    return path.is_file() and not path.is_symlink()


def is_folder(path: Path) -> bool:
    """Whether there is a folder at `path` itself, not behind a link."""
    return path.is_dir() and not path.is_symlink()


def is_page(path: Path) -> bool:
    """Whether a file is a page that modalloy wrote."""
    begin = read_file(path, 4096)
    return begin.startswith(b"<!DOCTYPE html>") and PAGE in begin


def kind(path: Path) -> str:
    """What there is at a path, in words."""
    return "a link" if path.is_symlink() else "a folder" if path.is_dir() else "a file" if path.is_file() else "no file"


def is_mount(path: Path) -> bool:
    """Whether a folder is where a file system begins, or a part of the same one that is mounted again (Linux)."""
    if os.path.ismount(path):
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:  # another system
        return False
    place = os.path.realpath(os.fsencode(path))
    for line in lines:
        mounted = line.split(b" ")[4]
        for octal, plain in ((b"\\040", b" "), (b"\\011", b"\t"), (b"\\012", b"\n"), (b"\\134", b"\\")):
            mounted = mounted.replace(octal, plain)
        if mounted == place:
            return True
    return False


@contextmanager
def _open(descriptor: int) -> Iterator[int]:
    """Closes a descriptor at the end."""
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _check_page(path: Path, overwrite: bool) -> None:
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; name a file in it, for example {path / 'report.html'}")
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise OutputError(f"{path}: already exists; choose another file, or replace it with --overwrite")
    if not is_file(path):
        raise OutputError(f"{path}: is {kind(path)}, which --overwrite does not replace; choose another file")
    if path.stat().st_size and not is_page(path):
        raise OutputError(
            f"{path}: is not a page that modalloy wrote, so --overwrite will not replace it; choose another file"
        )


def _beside(path: Path) -> Path:
    """A name in the same folder that nothing has."""
    return path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")

"""Files of evaluations, which may be a stranger's: how much of them is read, and which media they may lead to."""

import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from modalloy.errors import MediaError, ModalloyError, plain
from modalloy.senses.media.limits import opened

MAX_FILE_BYTES = 1_000_000_000  # of a table with its pictures
MAX_TEXT_BYTES = 200_000_000  # of JSON, JSON lines or CSV
MAX_ROWS = 1_000_000  # of a Parquet table, which can be packed much smaller than it is
OUTSIDE = "leads out of the data's folder, and is in no media root; give its folder with --media-root"


def read_bytes(path: Path, limit: int = MAX_TEXT_BYTES) -> bytes:
    """A regular file of at most `limit` bytes.

    Raises:
        MediaError: it is none, or cannot be read.
    """
    with opened(path, limit) as file:
        try:
            return file.read()
        except OSError as error:
            raise MediaError(f"{plain(path)}: cannot be read ({error.strerror}); get it again") from error


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; ValueError where it is none, or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def parquet_rows(raw: bytes) -> list[Any]:
    """The rows of a Parquet table; ValueError where it is damaged or too large."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ModalloyError("Parquet files are read by pyarrow, which is missing; run `pip install pyarrow`") from error
    try:
        file = parquet.ParquetFile(io.BytesIO(raw))
        groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
        if file.metadata.num_rows > MAX_ROWS or sum(group.total_byte_size for group in groups) > MAX_FILE_BYTES:
            raise ValueError(f"it has more than {MAX_ROWS:,} rows, or unpacks to more than {MAX_FILE_BYTES:,} bytes")
        return list(file.read().to_pylist())
    except (pyarrow.ArrowException, OSError, MemoryError) as error:
        raise ValueError(plain(error)) from error


def leads_out(path: str | Path, folders: Iterable[str | Path]) -> bool:
    """Whether a file, all links followed, lies in none of the folders."""
    try:
        real = Path(os.path.realpath(path))
        return not any(real.is_relative_to(os.path.realpath(folder)) for folder in folders)
    except ValueError:  # a name that no file can have
        return True


def own_folders(data: Path, roots: Iterable[Path]) -> tuple[str, ...]:
    """Where the media of a data folder may lie: in it, in the roots, and in the hub's cache where that holds the data.

    There, the files of a data set are links into the folder "blobs".
    """
    blobs = data.absolute().parent.parent / "blobs"
    cached = [blobs] if data.absolute().parent.name == "snapshots" and blobs.is_dir() else []
    return tuple(os.path.realpath(folder) for folder in (data, *roots, *cached))

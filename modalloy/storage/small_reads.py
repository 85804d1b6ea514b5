"""A file in place of a stranger's: no more of it is read at once than a list of a model's tensors takes."""

import io
import zipfile
from typing import BinaryIO

MAX_DIRECTORY_BYTES = 16 << 20  # of a zip's list of records, about 100 bytes each


class SmallReads(io.BufferedIOBase):
    """A file for `zipfile`, which reads a zip's list of records at once however long it says that it is."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def read(self, size: int | None = -1, /) -> bytes:
        """At most MAX_DIRECTORY_BYTES; more is an error, as it is no list of a model's tensors."""
        wanted = MAX_DIRECTORY_BYTES + 1 if size is None or size < 0 else size
        if wanted > MAX_DIRECTORY_BYTES and size is not None and size >= 0:
            raise zipfile.BadZipFile("too many records")
        return self.file.read(wanted)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """As a file does."""
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        """As a file does."""
        return self.file.tell()

    def seekable(self) -> bool:
        """Yes."""
        return True

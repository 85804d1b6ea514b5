"""Media as other programs hand them on: files, `data:` URLs and objects in memory."""

import base64
import binascii
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modalloy.errors import MediaError

DATA = re.compile(r"data:[^,]*;base64,")
MAX_BYTES = 64_000_000  # of a medium in a message


@contextmanager
def as_file(medium: Any) -> Iterator[Any]:
    """A medium as an encoder takes it; what a `data:` URL holds is in a file meanwhile."""
    if not isinstance(medium, str) or not (found := DATA.match(medium)):
        if isinstance(medium, str) and "://" in medium:
            raise MediaError("media are not fetched from other hosts; give a file, or data:TYPE;base64,…")
        yield medium
        return
    if len(medium) > MAX_BYTES * 4 // 3:
        raise MediaError(f"a medium has more than {MAX_BYTES} bytes; use a smaller one")
    try:
        data = base64.b64decode(medium[found.end() :], validate=True)
    except binascii.Error as error:
        raise MediaError(f"a medium's base64 is damaged ({error}); send it again") from error
    with tempfile.TemporaryDirectory(prefix="modalloy-") as folder:
        path = Path(folder) / "medium"
        path.write_bytes(data)
        yield str(path)


def listed(found: Any) -> list[Any]:
    """Media as a flat list, whether one, several, or several for each text were given."""
    if not isinstance(found, (list, tuple)):
        return [found]
    return [one for item in found for one in (item if isinstance(item, (list, tuple)) else [item])]

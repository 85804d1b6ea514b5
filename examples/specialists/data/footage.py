"""Makes the moving pictures that the `senses` benchmark asks about, of its own still pictures.

    python examples/specialists/data/footage.py --data data/senses

Training moves its pictures itself. A file's name tells the picture and the motion, so files that are there are kept, and
those of pictures that are gone are removed.
"""

import argparse
import io
import sys
from pathlib import Path

from fetch import write_atomically
from PIL import Image

from modalloy.errors import ModalloyError
from modalloy.evals.corpus import Clip, load
from modalloy.evals.motion import move
from modalloy.evals.senses import motion_of, moved_file
from modalloy.senses.media import load_image

MILLISECONDS = 100  # a frame
QUALITY = 85


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder made by build.py")
    data = parser.parse_args().data
    try:
        stills = [clip for clip in load(data) if clip.kind == "picture" and clip.split in ("validation", "test")]
    except ModalloyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    wanted = {moved_file(data, clip): clip for clip in stills}
    for path in (data / "moved").rglob("*.webp"):
        if path not in wanted:
            path.unlink()
    made = 0
    for path, clip in wanted.items():
        if not path.is_file():
            write_atomically(path, moving(clip))
            made += 1
    print(f"{len(wanted)} moving pictures, {made} of them new")
    return 0


def moving(clip: Clip) -> bytes:
    """A picture that moves, as an animated WebP."""
    frames = [
        Image.fromarray(frame) for frame in move(load_image(clip.path), motion_of(clip), int(clip.sha256[8:16], 16))
    ]
    buffer = io.BytesIO()
    frames[0].save(
        buffer, "WEBP", save_all=True, append_images=frames[1:], duration=MILLISECONDS, loop=0, quality=QUALITY
    )
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(main())

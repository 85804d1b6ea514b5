"""Adds videos made of other media to the data set 'senses': pictures that move, and point clouds that turn.

    python examples/specialists/data/footage.py --data data/senses

The animations come from one collection; these give the videos other sources. A still picture is panned, zoomed, swung
or bobbed, with a seed of its own; a point cloud is shown on a turntable, as depth maps. Each keeps the licence, package
and tier of what it was made of. A second run has nothing to do.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
import zlib
from hashlib import sha256
from pathlib import Path

import numpy as np
from convert import VIDEO_FRAME_MS, VIDEO_FRAMES, VIDEO_PX
from PIL import Image

from modalloy.evals import clips as clips_of
from modalloy.evals.clips import Clip
from modalloy.senses.encoders.depth_views import depth_maps
from modalloy.senses.media import load_image, load_points

STILLS = ("om", "tux", "a4a")  # not f3, whose animations are there already
TIERS = ("train", "new source")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by build.py")
    data = parser.parse_args().data
    manifest = data / "manifest.json"
    rows = json.loads(manifest.read_text())
    present = {row["file"] for row in rows}
    added = 0
    for clip in chosen(clips_of.load(data)):
        row, verb = record(clip, data), "moving" if clip.modality == "image" else "turning"
        if row["file"] in present:
            continue
        rng = np.random.default_rng(zlib.crc32(row["file"].encode()))
        content = animated(moving(load_image(clip.path), rng) if verb == "moving" else turning(clip.path, rng))
        (data / row["file"]).parent.mkdir(parents=True, exist_ok=True)
        (data / row["file"]).write_bytes(content)
        rows.append(row | {"sha256": sha256(content).hexdigest()})
        added += 1
    manifest.write_text(json.dumps(rows, indent=0))
    print(f"footage  {added} videos added", file=sys.stderr)


def chosen(clips: list[Clip]) -> list[Clip]:
    """The stills of STILLS; of the point clouds, one for training of each concept, and all of a new source."""
    pictures = [c for c in clips if c.modality == "image" and c.tier in TIERS]
    stills = [c for c in pictures if c.path.name.split("_")[0] in STILLS]
    solids = [c for c in clips if c.modality == "point" and c.tier == "new source"]
    first = {c.concept: c for c in reversed(clips) if c.modality == "point" and c.tier == "train"}
    return [*stills, *solids, *first.values()]


def record(clip: Clip, data: Path) -> dict[str, str]:
    """The manifest's line, without the hash, of the video made of `clip`."""
    verb = "moving" if clip.modality == "image" else "turning"
    return {
        "file": f"video/{clip.path.parent.name}/{verb}-{clip.path.stem}.webp",
        "concept": clip.concept,
        "category": clip.category,
        "modality": "video",
        "source": f"{verb}:{clip.source}",
        "package": clip.package,
        "licence": clip.licence,
    }


def moving(picture: Image.Image, rng: np.random.Generator) -> list[Image.Image]:
    """Frames of a still under a smooth motion: pan and zoom go one way, swing and bob return."""
    picture = picture.resize((VIDEO_PX, VIDEO_PX), Image.Resampling.LANCZOS)
    kinds = rng.permutation(["pan", "zoom", "swing", "bob"])[: rng.integers(1, 3)]
    heading, phase = rng.uniform(0, 2 * math.pi, 2)
    far, turn = rng.uniform(0.08, 0.18) * VIDEO_PX, rng.uniform(10, 30)
    grow = rng.choice([-1, 1]) * rng.uniform(0.15, 0.35)
    cycles = rng.integers(1, 3)
    frames = []
    for time in np.linspace(0, 1, VIDEO_FRAMES):
        wave = math.sin(2 * math.pi * cycles * time + phase)
        x = far * (2 * time - 1) * math.cos(heading) if "pan" in kinds else 0.0
        y = far * (2 * time - 1) * math.sin(heading) if "pan" in kinds else 0.0
        y += 0.6 * far * wave if "bob" in kinds else 0.0
        angle = math.radians(turn * wave) if "swing" in kinds else 0.0
        scale = 1 + grow * (time - 0.5) * 2 if "zoom" in kinds else 1.0
        cos, sin, centre = math.cos(angle) / scale, math.sin(angle) / scale, VIDEO_PX / 2
        back = (
            cos, sin, centre - cos * (centre + x) - sin * (centre + y),
            -sin, cos, centre + sin * (centre + x) - cos * (centre + y),
        )  # fmt: skip
        frames.append(
            picture.transform(
                picture.size, Image.Transform.AFFINE, back, Image.Resampling.BICUBIC, fillcolor=(255, 255, 255)
            )
        )
    return frames


def turning(path: Path, rng: np.random.Generator) -> list[Image.Image]:
    """Frames of a point cloud's depths on a turntable that goes round once."""
    start, above, sense = rng.uniform(0, 360), rng.uniform(5, 25), rng.choice([-1, 1])
    views = tuple((start + sense * 360 * step / VIDEO_FRAMES, above) for step in range(VIDEO_FRAMES))
    depths = (depth_maps(load_points(path), views) * 255).byte().numpy()
    size = (VIDEO_PX, VIDEO_PX)
    return [Image.fromarray(depth).resize(size, Image.Resampling.BILINEAR).convert("RGB") for depth in depths]


def animated(frames: list[Image.Image]) -> bytes:
    """Animated WebP."""
    buffer = io.BytesIO()
    frames[0].save(buffer, format="WEBP", save_all=True, append_images=frames[1:], duration=VIDEO_FRAME_MS, quality=80)
    return buffer.getvalue()


if __name__ == "__main__":
    main()

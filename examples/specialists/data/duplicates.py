"""Drawings that are nearly the same in two splits, found by perceptual hashes; training gives way to tests."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import imagehash
from PIL import Image

HASH_SIDE = 8  # 64 bits
NEAR = 6  # bits that differ between copies of one drawing, at most
ORDER = ("test", "validation", "train")  # earlier ones stay


def fingerprint(path: Path) -> int:
    """Perceptual hash of a picture: the signs of its lowest frequencies (imagehash.phash), as 64 bits."""
    with Image.open(path) as picture:
        bits = imagehash.phash(picture, hash_size=HASH_SIDE).hash
    return int("".join("1" if bit else "0" for bit in bits.flatten()), 2)


def near_copies(pictures: Iterable[tuple[str, str, str, Path]]) -> dict[str, tuple[str, int]]:
    """File → (the file of an earlier split that it nearly copies, bits that differ), of those to be dropped.

    Args:
        pictures: (file, concept, split, path). Only pictures of one concept are compared.
    """
    by_concept: dict[str, list[tuple[int, str, int]]] = {}
    for file, concept, split, path in pictures:
        by_concept.setdefault(concept, []).append((ORDER.index(split), file, fingerprint(path)))
    dropped: dict[str, tuple[str, int]] = {}
    for group in by_concept.values():
        for place, file, mark in group:
            for other_place, other, other_mark in group:
                bits = (mark ^ other_mark).bit_count()
                if other_place < place and other not in dropped and bits <= NEAR:
                    dropped.setdefault(file, (other, bits))
    return dropped

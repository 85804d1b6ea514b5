"""The questions that candidates are asked: JSON lines with text and media, and answers where there are labels."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from modalloy.errors import MediaError, ModalloyError, nearest, plain
from modalloy.evals.benchmark import LETTERS, Sample
from modalloy.evals.files import parse_json, read_bytes
from modalloy.evals.log import PREDS
from modalloy.names import modality_name
from modalloy.senses.media.limits import opened
from modalloy.storage.folder import file_sha256

KEYS = ("id", "text", "media", "choices", "gold")


def read_probes(path: Path) -> list[Sample]:
    """The probes of a file, or the questions of a folder that `modalloy eval` wrote.

    A line is {"text": …, "media": {"image": PATH, …} or [[modality, PATH], …], "choices": […], "gold": …}; all but the
    text may be left out, which is "" where a sound asks the question. Paths start at the file. A sample's `id` is a hash of
    all that is shown and asked, and its group the senses.

    Raises:
        MediaError: the file cannot be read, or a medium of it is missing.
        ModalloyError: a line is no probe, there is none, or one is there twice.
    """
    path = path / PREDS if os.path.isdir(path) else path
    try:
        lines = read_bytes(path).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise MediaError(f"{path}: cannot be read ({error}); give a file of JSON lines with --probe") from error
    probes: dict[str, Sample] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        probe = _probe(line, f"{path}: line {number}", path.parent)
        if probe.id in probes:
            raise ModalloyError(f"{path}: line {number} asks what an earlier line asks; remove one")
        probes[probe.id] = probe
    if not probes:
        raise ModalloyError(
            f'{path}: holds no probe; write one a line, for example {{"text": "What is this?", "media": {{"image": "dog.png"}}}}'
        )
    return list(probes.values())


def _probe(line: str, where: str, folder: Path) -> Sample:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise ModalloyError(f"{where} is not JSON ({plain(error)}); correct it") from error
    if not isinstance(row, dict):
        raise ModalloyError(f"{where} is a {type(row).__name__}, not an object with text and media; correct it")
    if "question" in row and "prompt_sha" in row:  # of a run's log
        row = {"text": row["question"]} | {key: row.get(key) for key in ("media", "choices", "gold")}
    if unknown := [key for key in row if key not in KEYS]:
        raise ModalloyError(f"{where} has an unknown key '{plain(unknown[0])}'; {nearest(plain(unknown[0]), KEYS)}")
    text = row.get("text")
    media = tuple((modality, str(folder / file)) for modality, file in _media(row.get("media") or [], where))
    aloud = text == "" and any(modality == "audio" for modality, _ in media)
    if not aloud and (not isinstance(text, str) or not text.strip()):
        raise ModalloyError(f'{where} has no "text"; write the question there, or "" where a sound asks it')
    choices, golds = row.get("choices") or [], row.get("gold")
    golds = [] if golds is None else golds if isinstance(golds, list) else [golds]
    for name, values in (("choices", choices), ("gold", golds)):
        if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
            raise ModalloyError(f'{where}: "{name}" must hold texts; correct it')
    if len(choices) > len(LETTERS):
        raise ModalloyError(f"{where} has {len(choices)} choices; give at most {len(LETTERS)}")
    hashes = []
    for modality, file in media:
        try:
            with opened(file):
                pass
        except MediaError as error:
            raise MediaError(f"{where}: {error}; paths start at the probe file's folder") from error
        hashes.append([modality, file_sha256(Path(file))])
    return Sample(
        id=hashlib.sha256(json.dumps([text, hashes, choices]).encode()).hexdigest()[:16],
        text=text,
        golds=tuple(golds),
        media=media,
        choices=tuple(choices),
        group={"senses": "+".join(modality for modality, _ in media) or "text"},
    )


def _media(given: Any, where: str) -> list[tuple[str, str]]:
    """(modality, file) in reading order."""
    pairs = list(given.items()) if isinstance(given, dict) else given
    if not isinstance(pairs, list):
        raise ModalloyError(f'{where}: "media" is a {type(given).__name__}; write {{"image": "dog.png"}}')
    found = []
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(one, str) for one in pair):
            raise ModalloyError(f'{where}: "media" holds {plain(repr(pair))}; write {{"image": "dog.png"}}')
        found.append((modality_name(pair[0]), pair[1]))
    return found

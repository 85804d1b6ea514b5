"""The loader of the `senses` data, the texts that are spoken, and motion. No data set is needed."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from modalloy.errors import MediaError
from modalloy.evals import corpus, motion, spoken
from modalloy.evals.benchmark import Source

PICTURE = {
    "file": "picture/grapes/noto_0.webp",
    "kind": "picture",
    "modality": "image",
    "concept": "grapes",
    "phrase": "grapes",
    "plural": True,
    "category": "food",
    "subgroup": "fruit",
    "also": ["cherries"],
    "split": "train",
    "family": "noto",
    "form": "",
    "text": "",
    "source": "noto:grapes",
    "package": "noto 1 (npm)",
    "licence": "Apache-2.0",
    "sha256": sha256(b"drawn").hexdigest(),
}
SPEECH = PICTURE | {
    "file": "speech/fixed/What_is_it/joe_0.ogg",
    "kind": "speech",
    "modality": "audio",
    **dict.fromkeys(("concept", "phrase", "category", "subgroup"), ""),
    "plural": False,
    "also": [],
    "split": "test",
    "family": "piper:joe",
    "form": "fixed",
    "text": "What is it?",
    "sha256": sha256(b"said").hexdigest(),
}


def write(folder: Path, *rows: Any) -> Path:
    """A data folder with these records, and files that fit the first two."""
    for record, content in ((PICTURE, b"drawn"), (SPEECH, b"said")):
        path = folder / str(record["file"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / "manifest.json").write_text(json.dumps(rows))
    return folder


def test_records_become_clips(tmp_path: Path) -> None:
    source = Source(write(tmp_path, PICTURE, SPEECH))
    drawn, said = corpus.load(source)
    assert (drawn.modality, drawn.phrase, drawn.plural, drawn.also) == ("image", "grapes", True, ("cherries",))
    assert (said.modality, said.text, said.form, said.concept) == ("audio", "What is it?", "fixed", "")
    assert said.path.read_bytes() == b"said"
    assert source.read["manifest.json"]["rows"] == 2
    corpus.verify([drawn, said])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "smell"}, "kind 'smell'"),
        ({"split": "held out"}, "split 'held out'"),
        ({"category": "mineral"}, "category 'mineral'"),
        ({"form": "word"}, "a text and a form are what speech has"),
        ({"concept": ""}, "no concept"),
        ({"concept": 7}, "7 is not text"),
        ({"plural": "no"}, "plural: 'no'"),
        ({"sha256": "abc"}, "non-hexadecimal|sha256"),
        ({"file": "../secret.webp"}, "leads out of the data's folder"),
        ({"also": 3}, "not iterable"),
    ],
)
def test_a_record_that_describes_no_file_is_one_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=message) as refused:
        corpus.load(write(tmp_path, SPEECH, PICTURE | change))
    assert "row 1 " in str(refused.value) and "\n" not in str(refused.value)


def test_a_record_without_a_field_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"row 0 lacks .*licence"):
        corpus.load(write(tmp_path, {name: value for name, value in PICTURE.items() if name != "licence"}))


def test_no_data_and_data_of_an_older_build_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"manifest\.json: no such file; run `make data`, or point"):
        corpus.load(tmp_path / "nowhere")
    older = {
        name: PICTURE[name] for name in ("file", "concept", "category", "modality", "source", "package", "licence")
    }
    with pytest.raises(MediaError, match="is of an older build, whose files have no split; run `make data` again"):
        corpus.load(write(tmp_path, older))


@pytest.mark.parametrize("record", [PICTURE, SPEECH])
def test_no_artist_and_no_voice_is_in_two_splits(record: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=f"{record['kind']} by {record['family']} is in two splits, "):
        corpus.load(write(tmp_path, record, record | {"file": "other", "split": "validation"}))


def test_a_file_that_is_not_the_manifests_is_named(tmp_path: Path) -> None:
    clips = corpus.load(write(tmp_path, PICTURE, SPEECH))
    clips[1].path.write_bytes(b"something else")
    with pytest.raises(
        MediaError, match=r"joe_0\.ogg: its sha256 is .*…, the manifest says .*…; run `make data` again"
    ):
        corpus.verify(clips)
    clips[0].path.unlink()
    with pytest.raises(MediaError, match=r"noto_0\.webp: no such file"):
        corpus.verify(clips)


def test_texts_agree_in_number() -> None:
    assert spoken.is_this("an owl") == "Is this an owl?"
    assert spoken.is_this("grapes", plural=True) == "Are these grapes?"
    assert spoken.in_picture("bread") == "Is bread in the picture?"
    assert spoken.in_picture("scissors", plural=True) == "Are scissors in the picture?"
    assert spoken.capital_question("the United States") == "What is the capital of the United States?"
    assert len(spoken.countries()) == len(set(spoken.countries())) > 100


@pytest.fixture(scope="module")
def drawing() -> Image.Image:
    """A black disc with a red sector, on white: no movement leaves it as it is."""
    y, x = np.mgrid[:64, :64] - 31.5
    disc = np.full((64, 64, 3), 255, np.uint8)
    disc[np.hypot(x, y) < 20] = 0
    disc[(np.hypot(x, y) < 20) & (x > 0) & (np.abs(y) < 8)] = (255, 0, 0)
    return Image.fromarray(disc)


def measured(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every frame: (x, y) of what is drawn, in pixels from the left and the top, the drawn area, and where red points."""
    drawn = (frames < 128).any(-1)
    red = (frames[..., 0] > 128) & (frames[..., 1] < 128)
    rows, columns = np.mgrid[: frames.shape[1], : frames.shape[2]]
    centres = np.array([[columns[mask].mean(), rows[mask].mean()] for mask in drawn])
    points = np.array([[columns[mask].mean(), rows[mask].mean()] for mask in red]) - centres
    return centres, drawn.sum((1, 2)).astype(float), np.unwrap(np.arctan2(points[:, 1], points[:, 0]))


@pytest.mark.parametrize("name", motion.MOTIONS)
@pytest.mark.parametrize("seed", range(6))
def test_every_motion_does_what_its_name_says(name: str, seed: int, drawing: Image.Image) -> None:
    frames = motion.move(drawing, name, seed)
    assert frames.shape == (16, 128, 128, 3) and frames.dtype == np.uint8
    centres, areas, angles = measured(frames)
    (dx, dy), swelling = centres[-1] - centres[0], areas[-1] / areas[0]
    wander = np.abs(np.diff(centres, axis=0)).max()
    far = 0.3 * 128  # at least 0.16 frames before and after the middle
    assert {"left": dx < -far, "right": dx > far}.get(name, abs(dx) < far)
    assert {"up": dy < -far, "down": dy > far}.get(name, abs(dy) < far)
    assert {"growing": swelling > 1.3, "shrinking": swelling < 1 / 1.3}.get(name, 0.9 < swelling < 1.1)
    assert (name == "turning") == (np.ptp(angles) > np.radians(60))
    assert (name == "still") == (not np.diff(frames.astype(int), axis=0).any())
    if name == "shaking":
        assert np.ptp(centres[:, 0]) > 5 and wander > 1


def test_motion_is_seeded_and_takes_arrays(drawing: Image.Image) -> None:
    first = motion.move(drawing, "left", 3)
    np.testing.assert_array_equal(first, motion.move(np.asarray(drawing), "left", 3))
    assert not np.array_equal(first, motion.move(drawing, "left", 4))
    assert motion.move(drawing, "left", 3, frames=5, side=32).shape == (5, 32, 32, 3)
    with pytest.raises(KeyError):
        motion.move(drawing, "sideways", 0)

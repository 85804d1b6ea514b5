"""Puts the sample media of the package together, out of a data folder that `make data` built.

    python examples/specialists/data/samples.py --data build/senses

`NAMED` are the files that documentation and tests show. The demo's questions are drawn from the test split with one seed, in
the numbers of `ASKED`, and nobody picks among them: spoken questions (by a voice that training never heard) about drawings,
movements and shapes. The two pictures of a group are of two categories, where the benchmark's are of one subgroup. Of shapes,
only concepts that training shapes have are drawn. Files under licences that reach further than the file (GPL, and the
share-alike ones) are left out.

Writes modalloy/builtin/samples: media, `demo/questions.json`, `LICENSES.md`.
"""

import argparse
import json
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import soundfile

from modalloy import builtin
from modalloy.evals import senses
from modalloy.evals.benchmark import Sample
from modalloy.evals.corpus import Clip, load
from modalloy.evals.motion import MOTIONS
from modalloy.evals.senses import HOW, Questions, yesno

SEED = 20261128
ASKED = {"pictures": 8, "movements": 6, "shapes": 6}
MAY_SHIP = ("CC-BY-", "CC0-", "Apache-2.0", "MIT", "BSD-3-Clause")
HEAD = Path(__file__).with_name("samples.md")
AUTHORS = {
    "twemoji": "Twitter, Inc. and other contributors",
    "fxemoji": "Mozilla Foundation",
    "streamline": "Streamline (Webalys LLC)",
    "katorlegaz": "Andrew Kator and Jennifer Legaz",
    "assimp": "assimp's authors",
    "scopia": "Scopia Visual Interfaces Systems, s.l., packaged by eTeks",
    "blendswap": "Blend Swap's contributors, packaged by eTeks",
    "piper": "spoken by Piper's voice joe",
}
# file of the package → kind, concept (or what is said), family
NAMED = {
    **{
        f"{name}.webp": ("picture", name, "twemoji")
        for name in ("camel", "camera", "cat", "cow", "dog", "horse", "violin")
    },
    **{f"{name}-animated.webp": ("moved", name, "twemoji") for name in ("cow", "elephant", "horse", "umbrella")},
    **{f"{name}.flac": ("speech", name, "piper") for name in ("cat", "cow", "dog", "horse")},
    "what-is-this.flac": ("speech", "What is this?", "piper"),
    "what-is-in-the-picture.flac": ("speech", "What is in the picture?", "piper"),
    "how-does-it-move.flac": ("speech", HOW, "piper"),
    "is-this-a-horse.flac": ("speech", "Is this a horse?", "piper"),
    "car.npy": ("shape", "car", "katorlegaz"),
    "dog.npy": ("shape", "dog", "scopia"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder made by `make data`")
    parser.add_argument("--out", type=Path, default=builtin.SAMPLES, metavar="DIR", help="default: %(default)s")
    args = parser.parse_args()
    clips = load(args.data)
    shutil.rmtree(args.out, ignore_errors=True)
    (args.out / "demo").mkdir(parents=True)
    rows = [(name, place(found(clips, args.data, *wanted), args.out / name)) for name, wanted in NAMED.items()]
    questions = []
    for sample, said, kind in drawn(args.data, clips):
        media = {}
        for modality, path in sample.media:
            clip = clip_of(clips, args.data, Path(path))
            name = f"demo/{file_name(clip, modality, Path(path))}"
            if not (args.out / name).is_file():
                rows.append((name, place((clip, Path(path)), args.out / name)))
            media[modality] = name
        questions.append(
            {"about": kind, "media": media, "said": said, "options": sample.choices, "right": sample.golds[0]}
        )
    (args.out / "demo" / "questions.json").write_text(json.dumps(questions, indent=1) + "\n")
    (args.out / "LICENSES.md").write_text(HEAD.read_text().format(rows="\n".join(licence(*row) for row in rows)))
    print(f"{len(rows)} files, {sum(path.stat().st_size for path in args.out.rglob('*') if path.is_file())} bytes")
    return 0


def may_ship(clip: Clip) -> bool:
    """Whether a file may be handed on under its own licence without reaching what it stands beside."""
    return clip.licence.startswith(MAY_SHIP) and "-SA-" not in clip.licence


def drawn(data: Path, clips: Sequence[Clip]) -> Iterator[tuple[Sample, str, str]]:
    """The demo's questions: samples of the benchmark's form, what is said in each, and what they are about."""
    fit = [clip for clip in clips if clip.split != "test" or clip.kind == "speech" or may_ship(clip)]
    questions, draw = Questions(data, fit, "test", SEED), random.Random(SEED)
    text_of = {str(clip.path): clip.text for clip in clips}

    def said(sample: Sample) -> str:
        return text_of[sample.media[-1][1]]

    groups = questions.spoken_yesno(near=False)
    for group in draw.sample(groups, ASKED["pictures"] // len(groups[0])):
        yield from ((sample, said(sample), "picture") for sample in group)
    for clip in draw.sample(questions.moved, ASKED["movements"]):
        answers = tuple(MOTIONS.values())
        right = MOTIONS[senses.motion_of(clip)]
        yield questions.aloud("video+audio", "motion", [("video", clip)], HOW, answers, right, clip), HOW, "movement"
    trained = {clip.concept for clip in clips if clip.kind == "shape" and clip.split == "train"}
    about, form = questions.about_shapes.about, senses.YESNO["point"][0]
    known = {concept for concept in trained & set(about) if questions.said_all(yesno(form, about[concept]))}
    for clip in draw.sample([clip for clip in questions.shapes if clip.concept in known], ASKED["shapes"] // 2):
        others = sorted(known - {clip.concept, *clip.also})
        for concept, right in ((clip.concept, "yes"), (draw.choice(others), "no")):
            text = yesno(form, about[concept])
            yield (
                questions.aloud("point+audio", "yesno", [("point", clip)], text, ("yes", "no"), right, clip),
                text,
                "shape",
            )


def found(clips: Sequence[Clip], data: Path, kind: str, name: str, family: str) -> tuple[Clip, Path]:
    """A clip that no training file is, and its file: the moving one where the kind is "moved"."""
    held = "picture" if kind == "moved" else kind
    own = [clip for clip in clips if clip.kind == held and clip.split != "train" and clip.family.startswith(family)]
    clip = next(clip for clip in own if name in ((clip.text,) if held == "speech" else (clip.concept,)))
    return clip, senses.moved_file(data, clip) if kind == "moved" else clip.path


def clip_of(clips: Sequence[Clip], data: Path, path: Path) -> Clip:
    """The clip that a medium of a question was made of."""
    return next(clip for clip in clips if path in (clip.path, clip.kind == "picture" and senses.moved_file(data, clip)))


def file_name(clip: Clip, modality: str, path: Path) -> str:
    """A name that tells what is in the file: "horse-twemoji.webp", "is-this-a-horse.ogg"."""
    if modality == "audio":
        return "".join(c if c.isalnum() else "-" for c in clip.text.lower()).strip("-") + ".ogg"
    moves = "-moving" if modality == "video" else ""
    return f"{clip.concept.replace(' ', '-')}-{path.name.split('-')[0].split('.')[0]}{moves}{path.suffix}"


def place(given: tuple[Clip, Path], target: Path) -> tuple[Clip, Path]:
    """Copy a file, or decode its sound where the target is FLAC; gives back what was given."""
    path = given[1]
    if target.suffix == ".flac":
        samples, rate = soundfile.read(path, dtype="int16")
        soundfile.write(target, samples, rate)
    else:
        shutil.copyfile(path, target)
    return given


def licence(name: str, given: tuple[Clip, Path]) -> str:
    """A row of LICENSES.md."""
    clip, _ = given
    author = next((who for prefix, who in AUTHORS.items() if clip.family.startswith(prefix)), "see the package")
    return f"| {name} | {clip.source} | {clip.package} | {author} | {clip.licence} |"


if __name__ == "__main__":
    sys.exit(main())

"""The files of the `senses` data, and how they are split into what is trained on and what is asked about."""

from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from modalloy.errors import MediaError
from modalloy.evals.benchmark import Source, fields
from modalloy.evals.modelcompose import text_of
from modalloy.names import MODALITIES, modality_name

# Packages kept out of training, by the prefix of their file names. Each modality's are its *new source* tier.
NEW_SOURCE = {
    "image": {"a4a"},
    "audio": {"gc", "ovos"},
    "video": {"moving-a4a", "turning-sc", "turning-fg", "turning-hd", "turning-assimp", "turning-sar"},
    "point": {"sc", "fg", "hd", "assimp", "sar"},
}
ART4APPS_IN_GCOMPRIS = "gc:lang/resource/words_sample/"  # many are the same drawings as a4a's
SAMPLE = "pointcloud/horse/sh3f_1.npy"  # held back for `modalloy demo`, though a picture of it is trained on
CATEGORIES = ("animal", "vehicle", "instrument", "object")


@dataclass(frozen=True)
class Clip:
    """One file of the data: an image, a sound, a video or a point cloud."""

    path: Path
    concept: str
    category: str  # one of CATEGORIES, or "other" (which no category question is asked about)
    modality: str
    source: str  # "prefix:file in the package"
    package: str
    licence: str
    tier: str  # "train", "new source", "new file", or "unseen" (a held-out file of a concept that training lacks)

    @property
    def prefix(self) -> str:
        """Short name of the file's package; pictures that GCompris took from Art4Apps count as Art4Apps' (a4a)."""
        return "a4a" if self.source.startswith(ART4APPS_IN_GCOMPRIS) else self.path.name.split("_")[0]

    @property
    def artwork(self) -> str:
        """Name of what is shown, shared by files of several modalities that show the very same drawing or mesh.

        The animated and the still Fluent emoji are such pairs, Sweet Home 3D's icons and meshes, and every video that
        was made of a still picture or of a point cloud.
        """
        prefix, _, inside = self.source.removeprefix("moving:").removeprefix("turning:").partition(":")
        if prefix in ("f3", "fa"):
            return f"fluent:{inside}"
        if prefix == "sh3f":  # an icon is library/chair.png, its mesh library/chair/chair.obj
            return f"sh3f:{inside.removesuffix('.png') if inside.endswith('.png') else inside.rpartition('/')[0]}"
        return f"{prefix}:{inside}"


def load(data: str | Path | Source) -> list[Clip]:
    """All files of the data folder (or source) `data`, each with its tier.

    Raises:
        MediaError: it has no manifest, or one with a row that describes no file.
    """
    source = data if isinstance(data, Source) else Source(Path(data))
    manifest = source.data / "manifest.json"
    if not manifest.is_file():
        raise MediaError(f"{manifest}: no such file; run `make data`, or point --data at the folder that holds it")
    clips = []
    for index, row in enumerate(source.rows(manifest)):
        with fields(manifest, index):
            texts = {name: text_of(row[name]) for name in ("concept", "category", "source", "package", "licence")}
            modality = modality_name(text_of(row["modality"]))
            if not texts["concept"] or modality not in MODALITIES:
                raise ValueError(f"the concept {texts['concept']!r} and the modality {modality!r}")
            clips.append(Clip(path=source.data / text_of(row["file"]), modality=modality, tier="train", **texts))
    return split(clips)


def split(clips: list[Clip]) -> list[Clip]:
    """The same files with their tier set; no randomness.

    Of every concept and modality that three or more files would train (two or more point clouds, of which there are
    few), one is held back as *new file*: the last one of the package that gives the concept most of its files. A file
    whose artwork an earlier modality shows, too, takes the tier that it has there: no artwork is trained on by one
    sense and tested by another.
    """
    result: list[Clip] = []
    sides: dict[str, str] = {}  # tier by artwork
    for modality in ("image", "audio", "point", "video"):  # videos are made of pictures and of point clouds
        by_concept: dict[str, list[Clip]] = defaultdict(list)
        for clip in sorted(clips, key=lambda clip: (clip.concept, str(clip.path))):
            if clip.modality == modality:
                by_concept[clip.concept].append(clip)
        shown: dict[str, str] = {}
        for group in by_concept.values():
            twins = [clip for clip in group if clip.artwork in sides]
            free = [clip for clip in group if clip.artwork not in sides]
            held_out = [clip for clip in free if clip.prefix in NEW_SOURCE[modality]]
            kept = [clip for clip in free if clip.prefix not in NEW_SOURCE[modality]]
            by_package: dict[str, list[Clip]] = defaultdict(list)
            for clip in kept:
                by_package[clip.prefix].append(clip)
            largest = max(by_package.values(), key=len, default=[])
            back = largest[-1:] if len(kept) >= (2 if modality == "point" else 3) else []
            tiered = [replace(clip, tier="new source") for clip in held_out]
            tiered += [replace(clip, tier="new file" if clip in back else "train") for clip in kept]
            tiered += [
                replace(clip, tier="new file" if clip.path.as_posix().endswith(SAMPLE) else sides[clip.artwork])
                for clip in twins
            ]
            shown |= {clip.artwork: clip.tier for clip in tiered}
            trained = any(clip.tier == "train" for clip in tiered)
            result += [clip if trained else replace(clip, tier="unseen") for clip in tiered]
        sides |= shown
    return result

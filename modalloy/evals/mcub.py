"""MCUB: what three (mcub3) or four (mcub4) things of different modalities have in common, out of four options.

Source: ModelCompose (Chen et al., ACL 2024, arXiv 2402.12750). mcub3 has four subsets; its answers and mcub4's share a file.
"""

from dataclasses import replace

from modalloy.evals.benchmark import Benchmark, Sample, Scoring, Source, choose_variant
from modalloy.evals.modelcompose import HUB, places, read
from modalloy.evals.scoring import first_letter, robust_letter
from modalloy.names import MODALITIES

ANSWERS = "MCUB-answer.json"
SUBSETS = {
    "I+A+V": "MCUB-3-image-audio-video.json",
    "A+V+P": "MCUB-3-audio-video-pointcloud.json",
    "I+A+P": "MCUB-3-image-audio-pointcloud.json",
    "I+V+P": "MCUB-3-image-video-pointcloud.json",
}
ALL = "MCUB-4.json"


def three(source: Source) -> list[Sample]:
    """The questions of the four subsets; ids start with the subset's name, for subsets may share ids."""
    choose_variant("mcub3", source, {"modelcompose": source.find(*places("MCUB-3-*.json"))})
    answers = source.need(*places(ANSWERS))
    return [
        replace(sample, id=f"{subset}/{sample.id}", group={"subset": subset})
        for subset, name in SUBSETS.items()
        for sample in read(source, source.need(*places(name)), answers, shared=True)
    ]


def four(source: Source) -> list[Sample]:
    """The questions about all four modalities."""
    _, path = choose_variant("mcub4", source, {"modelcompose": source.find(*places(ALL))})
    return read(source, path, source.need(*places(ANSWERS)), shared=True)


RULES: dict[str, Scoring] = {"compose": first_letter, "robust": robust_letter}

MCUB3 = Benchmark(
    name="mcub3",
    summary="MCUB-3: what three things of different modalities have in common",
    samples=three,
    rules=RULES,
    files=f"{', '.join(SUBSETS.values())} and {ANSWERS} (ModelCompose)",
    modalities=MODALITIES,
    variants=("modelcompose",),
    hub=HUB,
)

MCUB4 = Benchmark(
    name="mcub4",
    summary="MCUB-4: what an image, a sound, a video and a point cloud have in common",
    samples=four,
    rules=RULES,
    files=f"{ALL} and {ANSWERS} (ModelCompose)",
    modalities=MODALITIES,
    variants=("modelcompose",),
    hub=HUB,
)

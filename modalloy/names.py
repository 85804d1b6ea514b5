"""Names: modalities (one spelling inside, the ModelCompose spelling on disk, aliases that are read), embeddings, patterns."""

import re

MODALITIES = ("image", "audio", "video", "point")
ALIASES = {"vision": "image", "point_cloud": "point", "pointcloud": "point"}
ON_DISK = {"image": "vision"}
# input and output embeddings, whose rows belong to tokens: kept as the base has them, never merged
EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight", "wte.weight", "embed_in.weight", "embed_out.weight")
NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|(?<=\[)\d+(?=\])")  # of a layer or an expert


def modality_name(name: str) -> str:
    """The house's name of a modality given any of its aliases: "vision" → "image"."""
    return ALIASES.get(name, name)


def disk_name(modality: str) -> str:
    """The name of a modality in tensor names and config keys of the ModelCompose layout: "image" → "vision"."""
    return ON_DISK.get(modality, modality)


def pattern_of(name: str) -> str:
    """A tensor's name with * for its numbers: tensors at one place of every layer share it."""
    return NUMBER.sub("*", name)

"""Modality names: one spelling inside, the ModelCompose spelling on disk, and the aliases that are read."""

MODALITIES = ("image", "audio", "video", "point")
ALIASES = {"vision": "image", "point_cloud": "point", "pointcloud": "point"}
ON_DISK = {"image": "vision"}


def modality_name(name: str) -> str:
    """The house's name of a modality given any of its aliases: "vision" → "image"."""
    return ALIASES.get(name, name)


def disk_name(modality: str) -> str:
    """The name of a modality in tensor names and config keys of the ModelCompose layout: "image" → "vision"."""
    return ON_DISK.get(modality, modality)

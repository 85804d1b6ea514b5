"""The encoders and projectors of an exported model by name; in an export, those classes stand here that it uses."""

from typing import Any

from modalloy.senses.encoders import encoder_class
from modalloy.senses.projectors import projector_class


def encoder(name: str) -> Any:
    """An encoder's class."""
    return encoder_class(name)


def projector(name: str) -> Any:
    """A projector's class."""
    return projector_class(name)

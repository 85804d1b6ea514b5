"""The contract of a form's writer."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modalloy.planning.plan import Plan


@dataclass(frozen=True)
class Writer:
    """How one form of result is written beside its weights, and what of that `verify` works out again."""

    write: Callable[[Plan, Path], None]  # everything that the form needs to be loaded, into the result's folder
    config: str  # the file that says how the weights are loaded: it scales them
    promised: Callable[[Plan, str], dict[str, Any]]  # what recipe and inputs give of it; the base's recorded name
    is_promised: Callable[[str], bool]  # which of the file's keys these are
    library: str  # of the model card
    relation: str  # to its base, of the model card
    use: str  # how it is loaded, for the model card: {base}, {options}
    pipeline: str | None = None  # of the model card

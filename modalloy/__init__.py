"""modalloy: several specialist multimodal LLMs into one model that takes any combination of inputs."""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from modalloy._moved import Package, install
from modalloy._version import __version__
from modalloy.errors import missing_package

if TYPE_CHECKING:
    from modalloy.auditing.audit import audit
    from modalloy.delta import LowRank
    from modalloy.merging import merge
    from modalloy.methods.apply import merge_deltas
    from modalloy.model import load_model
    from modalloy.planning.planner import plan
    from modalloy.recipe import load_recipe


__all__ = ["LowRank", "__version__", "audit", "load_model", "load_recipe", "merge", "merge_deltas", "plan"]

# public name → its module, imported when the name is first used: torch takes seconds, which `modalloy --help` has not
HOMES = {
    "LowRank": "delta",
    "audit": "auditing.audit",
    "load_model": "model",  # the only one that needs transformers
    "load_recipe": "recipe",
    "merge": "merging",
    "merge_deltas": "methods.apply",
    "plan": "planning.planner",
}

sys.modules[__name__].__class__ = Package
install()


def __getattr__(name: str) -> Any:
    if name in HOMES:
        try:
            return getattr(importlib.import_module(f"modalloy.{HOMES[name]}"), name)
        except ModuleNotFoundError as error:
            raise missing_package(error) or error from error
    raise AttributeError(f"module 'modalloy' has no attribute '{name}'")

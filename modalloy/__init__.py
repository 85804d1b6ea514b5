"""modalloy: several specialist multimodal LLMs into one model that takes any combination of inputs."""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from modalloy._version import __version__

if TYPE_CHECKING:
    from modalloy.delta import LowRank
    from modalloy.merge import merge
    from modalloy.methods import merge_deltas
    from modalloy.model import load_model
    from modalloy.plan import plan
    from modalloy.recipe import load_recipe


__all__ = ["LowRank", "__version__", "load_model", "load_recipe", "merge", "merge_deltas", "plan"]

# public name → its module, imported when the name is first used: torch takes seconds, which `modalloy --help` has not
HOMES = {
    "LowRank": "delta",
    "load_model": "model",  # the only one that needs transformers
    "load_recipe": "recipe",
    "merge": "merge",
    "merge_deltas": "methods",
    "plan": "plan",
}


class _Package(ModuleType):
    """This package, in which `merge` and `plan` are the functions, not the modules that have the same names."""

    def __setattr__(self, name: str, value: Any) -> None:
        if HOMES.get(name) == name and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(importlib.import_module(f"modalloy.{HOMES[name]}"), name)
    raise AttributeError(f"module 'modalloy' has no attribute '{name}'")

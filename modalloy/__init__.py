"""modalloy: several specialist multimodal LLMs into one model that takes any combination of inputs."""

from typing import TYPE_CHECKING, Any

from modalloy._version import __version__
from modalloy.delta import LowRank
from modalloy.merge import merge
from modalloy.methods import merge_deltas
from modalloy.plan import plan
from modalloy.recipe import load_recipe

if TYPE_CHECKING:
    from modalloy.model import load_model


__all__ = ["LowRank", "__version__", "load_model", "load_recipe", "merge", "merge_deltas", "plan"]


def __getattr__(name: str) -> Any:
    if name == "load_model":  # the only public name that needs transformers
        from modalloy.model import load_model

        return load_model
    raise AttributeError(f"module 'modalloy' has no attribute '{name}'")

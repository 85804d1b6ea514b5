"""Modules by the names that they had: `import modalloy.merge` still works, and `modalloy.merge` stays the function."""

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {"modalloy.merge": "modalloy.merging", "modalloy.plan": "modalloy.planning.planner"}


class Package(ModuleType):
    """The package `modalloy`, in which the functions keep their names when a module of the same old name is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if f"modalloy.{name}" not in MOVED or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


class _Finder:
    """Finds the modules that moved."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        loader: Any = self  # a finder that loads too
        return ModuleSpec(name, loader) if name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """A module with all that the moved one holds."""
        moved = importlib.import_module(MOVED[spec.name])
        module = ModuleType(spec.name, moved.__doc__)
        module.__dict__.update({name: value for name, value in vars(moved).items() if not name.startswith("__")})
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to do."""


def install() -> None:
    """Make old names importable."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())

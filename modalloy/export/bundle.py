"""The parts of this package that a class needs, as files that stand beside a checkpoint and import nothing of the package.

transformers loads code of a checkpoint's own from files in one folder that import each other relatively. A file here is one
of our modules, cut down to the definitions that are needed: whatever a definition names is needed too.
"""

import ast
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

PACKAGE = "modalloy"
# of encoders and projectors: how published files are read, which a checkpoint of its own has done with
READERS = ("settings", "weights", "own_name")
OF_PARTS = (f"{PACKAGE}.senses.encoders", f"{PACKAGE}.senses.projectors")
INNER = re.compile(rf"^([ \t]+)from {PACKAGE}\.([\w.]+) import", re.MULTILINE)  # inside a function
THIS = "THIS_MODULE"  # in a file that another one uses as a module

Statement = ast.stmt


@dataclass
class Source:
    """A module of the package, and which of its names are needed."""

    name: str
    text: str
    is_whole: bool = False  # it is used as a module
    needed: set[str] = field(default_factory=set)

    @cached_property
    def tree(self) -> ast.Module:
        """The whole of it."""
        return ast.parse(self.text)

    @cached_property
    def cut(self) -> set[int]:
        """Numbers of the lines of methods that a checkpoint does without."""
        classes = [one for one in self.tree.body if isinstance(one, ast.ClassDef) and self.name.startswith(OF_PARTS)]
        readers = [part for one in classes for part in one.body if _is_reader(part)]
        return {line for one in readers for line in range(_begin(one), (one.end_lineno or 0) + 1)}

    @cached_property
    def body(self) -> list[Statement]:
        """Its statements, without these methods."""
        for one in self.tree.body:
            if isinstance(one, ast.ClassDef):
                one.body = [part for part in one.body if part.lineno not in self.cut]
        return self.tree.body

    @cached_property
    def definitions(self) -> dict[str, Statement]:
        """The statement that gives each name of the module."""
        return {name: one for one in self.body for name in _names(one)}


def bundle(root: str, replaced: Mapping[str, str]) -> dict[str, str]:
    """Texts of the files that hold all of the module `root`, by their names without `.py`.

    Args:
        root: the module's name.
        replaced: texts that stand for modules.
    """
    sources: dict[str, Source] = {}

    def opened(name: str) -> Source:
        if name not in sources:
            sources[name] = Source(
                name, replaced[name] if name in replaced else _path(name).read_text(encoding="utf-8")
            )
        return sources[name]

    left: list[tuple[str, str | None]] = [(root, None)]  # (module, one of its names, or None for all)
    while left:
        module, name = left.pop()
        source = opened(module)
        if name is None:
            source.is_whole = True
            left += [(module, one) for one in source.definitions if one != "__all__"]
            continue
        if name in source.needed or name not in source.definitions:
            continue
        source.needed.add(name)
        statement = source.definitions[name]
        left += [(module, one.id) for one in ast.walk(statement) if isinstance(one, ast.Name)]
        for imported, original in _imports(statement, name):
            whole = f"{imported}.{original}"
            left.append((whole, None) if _is_module(whole, replaced) else (imported, original))
    return {
        _file(name): _written(source, replaced)
        for name, source in sorted(sources.items())
        if source.needed or source.is_whole
    }


def _written(source: Source, replaced: Mapping[str, str]) -> str:
    """A module's text, cut down to what is needed of it."""
    parts = [f'"""{(ast.get_docstring(source.tree) or source.name).splitlines()[0]}"""\n']
    if source.is_whole:
        parts.append("import sys\n")
    wanted = source.needed
    for one in source.body:
        if isinstance(one, ast.ImportFrom) and one.module == "__future__":
            parts.insert(1, ast.unparse(one))
            continue
        names = set(_names(one))
        if not (wanted & names or (source.is_whole and not names and isinstance(one, ast.If))):
            continue
        if isinstance(one, ast.ImportFrom) and (one.module or "").startswith(PACKAGE):
            for alias in one.names:
                if (alias.asname or alias.name) in wanted:
                    parts.append(_import(one.module or "", alias, replaced))
        elif isinstance(one, (ast.Import, ast.ImportFrom)):
            one.names = [alias for alias in one.names if (alias.asname or alias.name.partition(".")[0]) in wanted]
            parts.append(ast.unparse(one))
        else:
            parts.append("\n" + _segment(source, one))
    if source.is_whole:
        parts.append(f"\n{THIS} = sys.modules[__name__]")
    text = INNER.sub(lambda found: f"{found[1]}from .{_file(f'{PACKAGE}.{found[2]}')} import", "\n".join(parts))
    return text + "\n"


def _segment(source: Source, statement: Statement) -> str:
    """The lines of a statement, with the comment above it and without the methods that are cut."""
    lines, begin = source.text.splitlines(), _begin(statement)
    while begin > 1 and lines[begin - 2].startswith("#"):
        begin -= 1
    numbers = range(begin, (statement.end_lineno or 0) + 1)
    return "\n".join(lines[number - 1] for number in numbers if number not in source.cut)


def _begin(part: Statement) -> int:
    return min(one.lineno for one in (part, *getattr(part, "decorator_list", ())))


def _is_reader(part: Statement) -> bool:
    return isinstance(part, ast.FunctionDef) and part.name in READERS and bool(part.decorator_list)


def _names(statement: Statement) -> Iterator[str]:
    """The names that a statement at the top of a module gives."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        yield statement.name
    elif isinstance(statement, (ast.Import, ast.ImportFrom)):
        yield from (alias.asname or alias.name.partition(".")[0] for alias in statement.names)
    elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        names = (one for target in targets for one in ast.walk(target) if isinstance(one, ast.Name))
        yield from (one.id for one in names if isinstance(one.ctx, ast.Store))


def _imports(statement: Statement, name: str) -> Iterator[tuple[str, str]]:
    """What of the package a statement imports: under this name, where it is an import itself, or anywhere inside."""
    for one in ast.walk(statement):
        if isinstance(one, ast.ImportFrom) and (one.module or "").startswith(PACKAGE):
            for alias in one.names:
                if one is not statement or (alias.asname or alias.name) == name:
                    yield one.module or "", alias.name


def _import(module: str, alias: ast.alias, replaced: Mapping[str, str]) -> str:
    whole = f"{module}.{alias.name}"
    if _is_module(whole, replaced):
        return f"from .{_file(whole)} import {THIS} as {alias.asname or alias.name}"
    return f"from .{_file(module)} import {alias.name}" + (f" as {alias.asname}" if alias.asname else "")


def _file(module: str) -> str:
    return module.replace(".", "_")


def _is_module(name: str, replaced: Mapping[str, str]) -> bool:
    return name in replaced or _path(name, missing=True).is_file()


def _path(module: str, *, missing: bool = False) -> Path:
    """Where a module of the package is; with `missing`, perhaps nothing is there."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None and spec.origin is not None
    place = Path(spec.origin).parent.joinpath(*module.split(".")[1:])
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")

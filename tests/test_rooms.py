"""Rooms import downwards only: each floor knows those above it in this list, and none below."""

import ast
from collections.abc import Iterator
from pathlib import Path

import modalloy

PACKAGE = Path(modalloy.__file__).parent
FLOORS = [
    {"_moved", "_version", "errors", "names", "machine", "mergekit", "report"},
    {"files", "forms", "linalg", "yaml_text"},
    {"builtin", "delta"},
    {"methods", "storage"},
    {"families", "recompute", "senses"},
    {"encoders", "media", "recipe", "specialists"},
    {"planning", "updates"},
    {"engines", "outputs", "promise"},
    {"compute", "model", "verify"},
    {"evals", "inspection", "merging"},
    {"demo", "search"},
    {"cli"},
]
MAX_LINES = 420


def imports(tree: ast.Module) -> Iterator[str]:
    """Every module of the package that a file imports, wherever it does, but for types only."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "modalloy":
            yield from (f"modalloy.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_rooms_import_downwards_only() -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for module in imports(ast.parse(path.read_text())) if room != "__init__" else ():
            first, _, rest = module.partition(".")
            other = rest.partition(".")[0]
            if first == "modalloy" and other not in ("", room, *modalloy.__all__) and floor[other] >= floor[room]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {module}")
    assert not wrong


def test_no_file_is_longer_than_a_reader_holds() -> None:
    lines = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert not {name for name, count in lines.items() if count > MAX_LINES}

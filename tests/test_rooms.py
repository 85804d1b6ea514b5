"""Rooms import downwards only: each floor knows those above it in this list, and none below."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import modalloy

PACKAGE = Path(modalloy.__file__).parent
FLOORS = [
    {"_moved", "_version", "errors", "names", "machine", "report"},
    {"files", "forms", "linalg", "llamacpp", "settings", "yaml_text"},
    {"builtin", "subspaces"},
    {"delta"},
    {"methods", "storage"},
    {"families", "mergekit", "recompute", "senses"},
    {"encoders", "media", "recipe", "specialists"},
    {"planning", "updates"},
    {"engines", "outputs", "promise"},
    {"compute", "model", "verify"},
    {"auditing", "bom", "evals", "export", "inspection", "merging", "signing"},
    {"demo", "search", "serve"},
    {"cli"},
]
MAX_LINES, MAX_PARAMETERS = 420, 8
MANY = {("merging.py", "merge"), ("search/sweep.py", "sweep"), ("evals/ask.py", "evaluate"), ("evals/ask.py", "_entry")}


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


def test_no_function_has_more_parameters_than_a_reader_holds() -> None:
    many = set()
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and not name.startswith(("cli/", "methods/", "senses/encoders/")):
                given = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                if len([one for one in given if one not in ("self", "cls")]) > MAX_PARAMETERS:
                    many.add((name, node.name))
    assert many <= MANY


@pytest.mark.parametrize(
    ("words", "rooms", "most"),
    [
        (r"\bform (==|!=) ['\"]", ("forms.py", "outputs/"), 0),
        (r"\blayout (==|!=) ", ("specialists/",), 0),
        (r"across is |target is (not )?None", ("planning/", "recipe.py"), 3),
    ],
)
def test_what_one_room_decides_no_other_asks(words: str, rooms: tuple[str, ...], most: int) -> None:
    asked = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith(rooms):
            asked += [f"{name}: {line.strip()}" for line in path.read_text().splitlines() if re.search(words, line)]
    assert len(asked) <= most, asked

"""Every command with every kind of user's mistake: one line on stderr that cannot act, exit code 2, nothing on stdout."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from modalloy import cli

KINDS: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "folder": lambda path: path.mkdir(),
    "empty file": lambda path: path.write_bytes(b""),
    "bytes": lambda path: path.write_bytes(bytes(range(256))),
    "link to itself": lambda path: path.symlink_to(path),
    "list": lambda path: path.write_text("[]\n"),
    "number": lambda path: path.write_text("3\n"),
    "null": lambda path: path.write_text("null\n"),
    "object": lambda path: path.write_text("{}\n"),
    "other encoding": lambda path: path.write_text('{"a": 1}', encoding="utf-16"),
}
FILES = {  # command → the argument {it} takes each kind in turn
    "plan {it}": KINDS,
    "merge {it} -o {new}": KINDS,
    "inspect {it}": KINDS,
    "verify {it}": KINDS,
    "chat {it} -p what": KINDS,
    "chat {folder} -p what --image {it}": ["missing", "folder", "link to itself"],
    "chat {folder} -p what --media smell={it}": ["missing", "folder", "link to itself"],
    "eval {folder} --task mmlu --data {it} -o {new}": KINDS,
    "eval-doctor --task ocrbench --data {it}": KINDS,
    "eval-doctor --task avqa --data {folder} --media-root {it}": set(KINDS) - {"folder"},
    "eval-score {it}": KINDS,
    "eval-compare {it} {it}": KINDS,
    "eval-score {it} --task mcub4 -o {new} --data {folder}": KINDS,
    "search {recipe} --probe {it} -o {new}": KINDS,
    "search {it} --probe {file} -o {new}": KINDS,
    "search {recipe} --probe {probe} -o {new} --vary {it}": KINDS,
}
PLACES = {  # where nothing can be written
    "a file": "{file}",
    "below a file": "{file}/out",
    "a link to itself": "{loop}",
    "below a link to itself": "{loop}/out",
    "a name that is too long": "{folder}/" + "n" * 300,
    "a path that is too long": "{folder}/" + "/".join(["n" * 200] * 30),
    "the root": "/",
    "nothing": "",
    "a foreign folder": "{kept}",
}
WRITERS = ["merge {recipe} -o {it}", "inspect {recipe} -o {it}", "search {recipe} --probe {probe} -o {it}"]
OPTIONS = [
    "merge {recipe} -o {new} --device tpu",
    "merge {recipe} -o {new} --max-memory lots",
    "merge {recipe} -o {new} --max-memory -1",
    "merge {recipe} -o {new} --max-memory 1",
    "merge {recipe} -o {new} --max-memory nanGB",
    "merge {recipe} -o {new} --max-memory infGB",
    "merge {recipe} -o {new} --overwrite --resume",
    "merge {recipe} -o {new} --private",
    "merge {recipe} -o {new} --push-to-hub a/b/c/d",
    "chat {folder} -p what --device tpu",
    "chat {folder} -p what --dtype int8",
    "chat {folder} -p what --max-new-tokens 0",
    "chat {folder} --json",
    "chat {folder} -p what --media depth",
    "chat {folder} -p what --media =x",
    "eval",
    "eval {folder} --task nothing -o {new}",
    "eval {folder} --task mmlu -o {new} --dtype int8 --data {folder}",
    "eval-doctor --task nothing",
    "eval-doctor --task avqa --data {folder} --modalities smell",
    "eval-doctor --task avqa --data {folder} --media-root x=",
    "eval-score {folder} --data {folder}",
    "eval-score {folder} --task avqa",
    "eval-score {file} --task nothing -o {new}",
    "search {recipe} --probe {probe} -o {new} --objective luck",
    "search {recipe} --probe {probe} -o {new} --variant odd",
    "search {recipe} --probe {probe} -o {new} --match odd",
    "search {recipe} --probe {probe} -o {new} --aggregate odd",
    "search {recipe} --probe {probe} -o {new} --strategy odd",
    "search {recipe} --probe {probe} -o {new} --trials 0",
    "search {recipe} --probe {probe} -o {new} --vary scale",
    "search {recipe} --probe {probe} -o {new} --vary scale=",
    "search {recipe} --probe {probe} -o {new} --vary scale=a:b:c",
    "search {recipe} --probe {probe} -o {new} --vary scale=0:1:0",
    "search {recipe} --probe {probe} -o {new} --vary nothing=1,2",
    "demo -o {file}",
]
OTHER_BYTES = os.fsdecode(b"no-\xff-utf8\x1b[2J")


class Refused:
    """Runs commands that must fail as a user's mistake, with names of files in a folder of their own."""

    def __init__(self, folder: Path, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys
        self.names = {name: str(folder / name) for name in ("new", "file", "folder", "loop", "kept", "probe", "it")}
        self.names["recipe"] = str(recipe)
        (folder / "folder").mkdir()
        (folder / "kept").mkdir()
        (folder / "kept" / "notes.txt").write_text("mine")
        (folder / "file").write_text("text")
        (folder / "loop").symlink_to("loop")
        (folder / "probe").write_text('{"question": "what is this", "answer": "dog"}\n')

    def __call__(self, command: str, monkeypatch: pytest.MonkeyPatch, **names: str) -> str:
        words = [word.format(**self.names | names) for word in command.split(" ")]
        monkeypatch.setattr(sys, "argv", ["modalloy", *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = self.capsys.readouterr()
        assert stopped.value.code == 2 and not out, (out, err)
        assert err.startswith("error: ") and err.count("\n") == 1 and err[:-1].isprintable(), err
        assert len(err) < 2000
        assert not (self.folder / "new").exists() and (self.folder / "kept" / "notes.txt").read_text() == "mine"
        return err


@pytest.fixture
def refused(tmp_path: Path, write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> Refused:
    folder = tmp_path / "case"
    folder.mkdir()
    return Refused(folder, write_recipe(output={"form": "omni"}), capsys)


@pytest.mark.parametrize("command", FILES)
def test_a_file_that_is_none_of_its_kind_is_refused(
    command: str, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in FILES[command]:
        path = refused.folder / f"a {kind}"
        KINDS[kind](path)
        refused(command, monkeypatch, it=str(path))
    refused(command, monkeypatch, it=str(refused.folder / OTHER_BYTES))
    refused(command, monkeypatch, it=str(refused.folder / ("n" * 300)))


@pytest.mark.parametrize("command", WRITERS)
def test_a_place_where_nothing_can_be_written_is_refused(
    command: str, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in PLACES.values():
        refused(command, monkeypatch, it=place.format(**refused.names))


@pytest.mark.parametrize("command", OPTIONS)
def test_a_wrong_option_is_refused(command: str, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(command, monkeypatch)

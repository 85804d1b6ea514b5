"""What every other writer does: pages, runs, searches, caches. Nothing through links, nothing of others', nothing by halves."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_run import question, write_run

from modalloy.errors import MediaError, ModalloyError, OutputError
from modalloy.evals.benchmark import Source
from modalloy.evals.log import Log, load_run
from modalloy.evals.ocrbench import _unpacked
from modalloy.files import create, new_file, open_log, replace_text, write_text
from modalloy.search.folder import check_out
from modalloy.search.trials import Trials

OURS = "<!DOCTYPE html>\n<html><head><title>modalloy eval · old</title>"


@pytest.fixture
def victim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that links lead to."""
    path = tmp_path_factory.mktemp("private") / "precious.txt"
    path.write_text("years of work\n")
    return path


def failing(number: int) -> Callable[..., Any]:
    def call(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


# ------------------------------------------------------------------------------------------------ files


def test_a_text_is_replaced_beside_links_and_leftovers(victim: Path, tmp_path: Path) -> None:
    (tmp_path / ".result.json.partial").symlink_to(victim)
    (tmp_path / "result.json").symlink_to(victim)
    replace_text(tmp_path / "result.json", "new")
    assert victim.read_text() == "years of work\n" and not (tmp_path / "result.json").is_symlink()
    assert (tmp_path / "result.json").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".result.json.partial", "result.json"]


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_text_that_cannot_be_replaced_is_as_it_was(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "result.json").write_text("old")
    monkeypatch.setattr(os, call, failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        replace_text(tmp_path / "result.json", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert (tmp_path / "result.json").read_text() == "old"


def test_a_new_file_is_made_where_nothing_is(victim: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(victim)
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for name in ("link", "nowhere"):
        with pytest.raises(FileExistsError):
            write_text(tmp_path / name, "new")
        with pytest.raises(FileExistsError):
            create(tmp_path / name)
    assert victim.read_text() == "years of work\n" and not (tmp_path / "gone").exists()


# ------------------------------------------------------------------------------------------------ pages


@pytest.mark.parametrize("what", ["link", "dangling link", "recipe", "page of another", "pipe"])
def test_only_a_page_of_ours_is_replaced(what: str, victim: Path, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    if what in ("link", "dangling link"):
        path.symlink_to(victim if what == "link" else tmp_path / "gone")
    elif what == "pipe":
        os.mkfifo(path)
    else:
        path.write_text("base_model: b\n" if what == "recipe" else "<!DOCTYPE html><title>My modalloy page</title>")
    with pytest.raises(OutputError, match=r"page\.html: (already exists|is )"), new_file(path):
        pytest.fail("entered")
    message = (
        r"page\.html: is .*(which --overwrite does not replace|not a page that modalloy wrote).*choose another file"
    )
    with pytest.raises(OutputError, match=message), new_file(path, overwrite=True):
        pytest.fail("entered")
    assert victim.read_text() == "years of work\n" and [one.name for one in tmp_path.iterdir()] == ["page.html"]
    assert path.is_symlink() == ("link" in what)


def test_a_page_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    with pytest.raises(OutputError, match="already exists"), new_file(path) as write:
        write("new")
        path.write_text("theirs")
    assert path.read_text() == "theirs" and [one.name for one in tmp_path.iterdir()] == ["page.html"]
    path.write_text(OURS)
    with new_file(path, overwrite=True) as write:
        write("new")
    assert path.read_text() == "new"


# ------------------------------------------------------------------------------------------------ runs


META: dict[str, Any] = {
    **{"schema": 1, "task": "fake", "variant": None, "modalities": ["image"], "model": {"path": "m"}},
    **{"data": {"files": {}}, "generation": {}, "environment": {}, "n_samples": 1},
}


def begin(folder: Path, *, resume: bool = False) -> None:
    with Log(folder, META, resume=resume):
        pass


def test_a_runs_log_is_no_link(victim: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "run", [question(0)], ["yes"])
    preds = tmp_path / "run" / "preds.jsonl"
    preds.rename(tmp_path / "elsewhere")
    for target in (victim, tmp_path / "gone"):
        preds.symlink_to(target)
        for resume in (False, True):
            with pytest.raises(OutputError, match=r"preds\.jsonl: is a link, not a log of modalloy's; move it away"):
                begin(tmp_path / "run", resume=resume)
        preds.unlink()
    assert victim.read_text() == "years of work\n" and not (tmp_path / "gone").exists()


@pytest.mark.parametrize("resume", [False, True])
def test_files_of_other_programs_are_no_run(resume: bool, tmp_path: Path) -> None:
    """By the same names: they are neither replaced nor cut."""
    folder = tmp_path / "run"
    folder.mkdir()
    for files in (
        {"run.json": '{"id": "a run of another program"}'},
        {"run.json": '{"id": 7}', "preds.jsonl": '{"i": 0}\n{"i": 1'},
        {"run.json": "[]", "preds.jsonl": ""},
        {"preds.jsonl": '{"i": 0}'},
        {"run.json": json.dumps(META), "preds.jsonl": "notes\nof mine, unfinished"},
    ):
        for name, text in files.items():
            (folder / name).write_text(text)
        with pytest.raises(ModalloyError):
            begin(folder, resume=resume)
        assert {path.name: path.read_text() for path in folder.iterdir()} == files
        for path in folder.iterdir():
            path.unlink()


def test_a_run_that_was_killed_before_it_began_begins(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "preds.jsonl").touch()
    (folder / ".run.json.partial-0123abcd").write_text("{")
    write_run(folder, [question(0)], ["yes"])
    assert len(load_run(folder).entries) == 1


def test_a_run_that_cannot_begin_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
    with pytest.raises(OutputError, match=r"cannot be written .No space left"):
        begin(tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_run_without_answers_leaves_what_others_put_there(tmp_path: Path) -> None:
    with Log(tmp_path / "run", META, resume=False):
        (tmp_path / "run" / "notes.txt").write_text("mine")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


# ------------------------------------------------------------------------------------------------ searches


HEADER = '{"schema": 1, "inputs": "0"}\n'
SERVED = '{"key": "served {}", "sketch": [0.5], "seconds": 1.0}\n'


def search(folder: Path, *, resume: bool = False) -> dict[str, Any]:
    with Trials(folder, {"inputs": "0"}, resume=resume) as log:
        return dict(log.lines)


def test_a_searchs_log_is_no_link(victim: Path, tmp_path: Path) -> None:
    for target in (victim, tmp_path / "gone"):
        (tmp_path / "trials.jsonl").symlink_to(target)
        for resume in (False, True):
            with pytest.raises(OutputError, match=r"trials\.jsonl: is a link, not a log of modalloy's"):
                search(tmp_path, resume=resume)
        (tmp_path / "trials.jsonl").unlink()
    assert victim.read_text() == "years of work\n" and not (tmp_path / "gone").exists()


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    "text", ["my notes", '{"trial": 0}\n{"trial": 1', "[]\n", "7\n", HEADER + "[]\n", HEADER + '"a"\n7']
)
def test_a_log_of_another_program_is_no_search(text: str, resume: bool, tmp_path: Path) -> None:
    (tmp_path / "trials.jsonl").write_text(text)
    with pytest.raises(ModalloyError):
        search(tmp_path, resume=resume)
    assert (tmp_path / "trials.jsonl").read_text() == text


@pytest.mark.parametrize(
    "line",
    [
        '{"key": 7}',
        '{"key": "loaded", "load_s": "long", "features_s": 1, "checkpoint_bytes": 1}',
        '{"key": "served {}", "sketch": "0.5", "seconds": 1}',
        '{"key": "served {}", "sketch": ["0.5"], "seconds": 1}',
        '{"key": "q", "model": "{}", "probe": "p", "text": null, "likelihoods": [], "n_out": 1, "seconds": 1}',
        '{"key": "q", "model": "{}", "probe": "p", "text": "t", "likelihoods": {}, "n_out": 1, "seconds": 1}',
        '{"key": "q", "model": "{}", "probe": "p", "text": "t", "likelihoods": [], "seconds": 1}',
        "[" * 100_000,
    ],
)
def test_a_line_of_other_types_is_damaged(line: str, tmp_path: Path) -> None:
    (tmp_path / "trials.jsonl").write_text(f"{HEADER}{SERVED}{line}\n")
    with pytest.raises(ModalloyError, match="line 3 is damaged"):
        search(tmp_path, resume=True)


def test_what_a_kill_left_of_a_line_is_cut_off(tmp_path: Path) -> None:
    (tmp_path / "trials.jsonl").write_text(HEADER + SERVED + SERVED[:20])
    assert list(search(tmp_path, resume=True)) == ["served {}"]
    assert (tmp_path / "trials.jsonl").read_text() == HEADER + SERVED
    (tmp_path / "trials.jsonl").write_text(HEADER[:15])
    assert search(tmp_path) == {} and (tmp_path / "trials.jsonl").read_text() == HEADER


def test_two_searches_in_one_folder_are_refused(tmp_path: Path) -> None:
    with Trials(tmp_path, {"inputs": "0"}, resume=False):
        with pytest.raises(OutputError, match="another process writes this search"):
            search(tmp_path, resume=True)
        with pytest.raises(BlockingIOError):
            open_log(tmp_path / "trials.jsonl")
    search(tmp_path, resume=True)


def test_a_search_whose_disk_is_full_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Trials(tmp_path, {"inputs": "0"}, resume=False) as log:
        monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
        with pytest.raises(OutputError, match=r"trials\.jsonl: cannot be written .No space left.*go on with --resume"):
            log.add("loaded", {})


def test_a_search_replaces_only_what_one_wrote(victim: Path, tmp_path: Path) -> None:
    recipe, probe = tmp_path / "recipe.yaml", tmp_path / "probes.jsonl"
    probe.write_text("{}")
    recipe.write_text("# Chosen by modalloy search (labels): k = 2\nbase_model: b\n")
    check_out(tmp_path, [probe])
    (tmp_path / "link.yaml").symlink_to(recipe)
    for given in (recipe, tmp_path / "link.yaml"):
        with pytest.raises(OutputError, match=r"recipe\.yaml: is what the search is asked with"):
            check_out(tmp_path, [given, probe])
    recipe.write_text("base_model: mine\n")
    with pytest.raises(OutputError, match=r"recipe\.yaml: is a file that no search wrote; move it away"):
        check_out(tmp_path, [probe])
    recipe.unlink()
    for name in ("search.json", "index.html"):
        (tmp_path / name).write_text("{}" if name == "search.json" else "<!DOCTYPE html><title>my page</title>")
        with pytest.raises(OutputError, match="is a file that no search wrote"):
            check_out(tmp_path, [probe])
        (tmp_path / name).unlink()
    (tmp_path / "index.html").symlink_to(victim)
    with pytest.raises(OutputError, match=r"index\.html: is a link that no search wrote"):
        check_out(tmp_path, [probe])


# ------------------------------------------------------------------------------------------------ caches


def test_pictures_of_a_table_are_not_unpacked_through_a_link(victim: Path, tmp_path: Path) -> None:
    picture = {"bytes": b"pixels", "path": "a.png"}
    (tmp_path / "images").symlink_to(victim.parent)
    with pytest.raises(MediaError, match=r"images: (is a link|leads out)"):
        _unpacked(Source(tmp_path), picture)
    assert list(victim.parent.iterdir()) == [victim]
    (tmp_path / "images").unlink()
    assert Path(_unpacked(Source(tmp_path), picture)).read_bytes() == b"pixels"


def test_a_locked_log_is_closed_with_its_descriptor(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    first = open_log(tmp_path / "log")
    with pytest.raises(BlockingIOError):
        open_log(tmp_path / "log")
    os.close(first)
    again = open_log(tmp_path / "log")
    fcntl.flock(again, fcntl.LOCK_UN)
    os.close(again)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_log_that_the_disk_refuses_is_one_error(tmp_path: Path) -> None:
    """A write that fails is not tried again when the log is closed: nothing hides the line that says what to do."""
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from modalloy.errors import OutputError; from modalloy.storage.journal import Journal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "try: journal.add({'text': 'x' * 500})\n"
        "except OutputError as error: print(error)\n"
        "journal.close()"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "log"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("cannot be written (File too large); see to it, then go on with --resume\n")

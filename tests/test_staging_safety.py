"""The user's files are safe: nothing but a result and its own staging is written, emptied or deleted, whatever lies there."""

import errno
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from synthetic import write_base, write_lora
from test_resume import killed_at

import modalloy
from modalloy.errors import CheckpointError, OutputError
from modalloy.files import is_mount
from modalloy.storage import staging
from modalloy.storage.apart import check_apart
from modalloy.storage.staging import Staging, exchange
from modalloy.verify import verify


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A merge of two adapters into a model of several shards."""
    models = tmp_path / "models"
    base = write_base(models / "base", layers=2)
    for seed in (1, 2):
        write_lora(models / f"lora-{seed}", base, seed=seed)
    return write(models / "recipe.yaml")


def write(path: Path, **changes: Any) -> Path:
    content: dict[str, Any] = {
        "base_model": "base",
        "models": [{"model": "lora-1"}, {"model": "lora-2"}],
        "output": {"form": "full", "max_shard_size": "4KB"},
    }
    path.write_text(yaml.safe_dump(content | changes))
    return path


def snapshot(folder: Path) -> dict[str, bytes | str]:
    """Everything in a folder: the bytes of files, where links lead to."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A folder of the user's that must stay as it is."""
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work\n")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


# ------------------------------------------------------------------------------------------------ beside the result


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}], ids=["", "resume", "overwrite"])
@pytest.mark.parametrize("what", ["link to a file", "dangling link", "link to a folder", "folder", "notes", "pipe"])
def test_what_has_the_name_of_the_log_is_refused_and_kept(
    what: str, options: dict[str, bool], recipe: Path, precious: Path, tmp_path: Path
) -> None:
    log = tmp_path / ".out.partial.log"
    if what == "folder":
        log.mkdir()
        (log / "mine.txt").write_text("mine")
    elif what == "notes":
        log.write_text('{"fingerprint": "of another program"}\n')
    elif what == "pipe":
        os.mkfifo(log)
    else:
        targets = {"link to a file": precious / "thesis.txt", "link to a folder": precious}
        log.symlink_to(targets.get(what, tmp_path / "nowhere"))
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match=r"\.out\.partial\.log: is .*move it away"):
        modalloy.merge(recipe, tmp_path / "out", **options)
    assert snapshot(tmp_path) == before and not (tmp_path / "nowhere").exists()


def test_folders_with_names_like_the_stagings_are_left_alone(recipe: Path, precious: Path, tmp_path: Path) -> None:
    for name in (".out.partial", ".out.replaced", ".out.partial-0123abcd", ".out.partial-mine"):
        shutil.copytree(precious, tmp_path / name)
    (tmp_path / ".out.partial-89abcdef").symlink_to(precious)
    (tmp_path / ".out.replaced-89abcdef").symlink_to(precious)
    before, out = snapshot(tmp_path), tmp_path / "out"
    modalloy.merge(recipe, out)
    modalloy.merge(recipe, out, overwrite=True)
    assert killed_at([30], recipe, out, overwrite=True)[0][0] == "killed"
    modalloy.merge(recipe, out, resume=True)
    shutil.rmtree(out)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_a_log_from_a_stranger_leads_nowhere(kind: str, recipe: Path, precious: Path, tmp_path: Path) -> None:
    """A log in our own words, that names a folder of the user's, or a link to one, as its staging."""
    log, place = tmp_path / ".out.partial.log", tmp_path / ".out.partial-0123abcd"
    for token in ("../precious", "0123abcd/../../precious"):
        log.write_text(json.dumps({"modalloy merge": "x", "token": token, "overwrite": False}) + "\n")
        modalloy.merge(recipe, tmp_path / "out", resume=True)
        shutil.rmtree(tmp_path / "out")
    if kind == "link":
        place.symlink_to(precious)
    else:
        place.mkdir()
        for name in ("model-00001-of-00009.safetensors", "config.json", "manifest.json", "base"):
            (place / name).symlink_to(precious / "thesis.txt" if name != "base" else precious)
    log.write_text(json.dumps({"modalloy merge": "x", "token": "0123abcd", "overwrite": True}) + "\n")
    before = snapshot(precious)
    modalloy.merge(recipe, tmp_path / "out")
    assert snapshot(precious) == before and verify(tmp_path / "out").files > 5


def test_links_put_into_a_killed_merges_folder_are_not_written_through(
    recipe: Path, precious: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    modalloy.merge(recipe, tmp_path / "undisturbed")
    assert killed_at([30], recipe, out)[0][0] == "killed"
    (folder,) = (path for path in tmp_path.iterdir() if path.name.startswith(".out.partial-"))
    for name in snapshot(tmp_path / "undisturbed"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(precious / "thesis.txt")
    (folder / "base").symlink_to(precious)
    before = snapshot(precious)
    modalloy.merge(recipe, out, resume=True)
    assert snapshot(precious) == before
    found, wanted = snapshot(out), snapshot(tmp_path / "undisturbed")
    assert found.keys() == wanted.keys()
    assert [name for name in found if found[name] != wanted[name]] == ["sources.json"]  # when the files were written


# ------------------------------------------------------------------------------------------------ what is replaced


ADDITIONS: dict[str, Callable[[Path, Path], object]] = {
    "notes.txt": lambda out, _: (out / "notes.txt").write_text("mine"),
    ".git": lambda out, _: shutil.copytree(out, out / ".git"),
    "empty": lambda out, _: (out / "empty").mkdir(),
    "link": lambda out, precious: (out / "link").symlink_to(precious),
    "config.json": lambda out, precious: (
        (out / "config.json").unlink(),
        (out / "config.json").symlink_to(precious / "thesis.txt"),
    ),
    "README.md.bak": lambda out, _: shutil.copyfile(out / "README.md", out / "README.md.bak"),
}


@pytest.mark.parametrize("name", ADDITIONS)
def test_overwrite_refuses_a_result_that_holds_something_else(
    name: str, recipe: Path, precious: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    modalloy.merge(recipe, out)
    ADDITIONS[name](out, precious)
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match=rf"out: holds {name}, which its manifest.json does not list, .*move it away"):
        modalloy.merge(recipe, out, overwrite=True)
    assert snapshot(tmp_path) == before and (out / name).exists()


MANIFESTS = {
    "none of ours": '{"name": "my web page", "icons": []}',
    "no object": "[]",
    "no JSON": "{",
    "no hashes": '{"modalloy": "0.1", "outputs": {"thesis.txt": "mine"}}',
    "outputs of another kind": '{"modalloy": "0.1", "outputs": ["thesis.txt"]}',
}


@pytest.mark.parametrize("manifest", MANIFESTS.values(), ids=MANIFESTS)
def test_overwrite_knows_a_result_by_what_its_manifest_says(
    manifest: str, recipe: Path, precious: Path, tmp_path: Path
) -> None:
    (precious / "manifest.json").write_text(manifest)
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match=r"precious: (is not a folder that modalloy wrote|holds model\.safetensors)"):
        modalloy.merge(recipe, precious, overwrite=True)
    assert snapshot(tmp_path) == before


def test_what_appears_in_the_old_result_during_the_merge_is_kept_and_so_is_the_merge(
    recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    modalloy.merge(write(recipe, merge_method="average"), out)
    write(recipe)
    with pytest.raises(OutputError, match=r"holds notes\.txt.*move it away.* kept: then go on with --resume"):
        modalloy.merge(recipe, out, overwrite=True, on_job=lambda *_: (out / "notes.txt").write_text("mine") and None)
    assert (out / "notes.txt").read_text() == "mine" and "average" in (out / "manifest.json").read_text()
    (out / "notes.txt").rename(tmp_path / "notes.txt")
    modalloy.merge(recipe, out, resume=True)
    assert "ssam" in (out / "manifest.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "notes.txt", "out"]


@pytest.mark.parametrize("in_one_step", [True, False])
def test_what_appears_in_the_last_moment_is_kept(
    in_one_step: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def late(one: Path, other: Path) -> bool:
        (out / "notes.txt").write_text("mine")
        return in_one_step and exchange(one, other)

    stage(out, "old")
    monkeypatch.setattr(staging, "exchange", late)
    with pytest.raises(OutputError, match="is in place; what was put into the result that it replaced is kept in"):
        stage(out, "new", overwrite=True)
    assert (out / "weights").read_text() == "new"
    (kept,) = (path for path in tmp_path.iterdir() if path != out)
    assert [path.read_text() for path in kept.iterdir()] == ["mine"]


def stage(out: Path, text: str, **options: bool) -> None:
    """A result of one file."""
    with Staging(out, **options).begin(text) as folder:
        (folder / "manifest.json").write_text(json.dumps({"modalloy": "0.1", "outputs": {"weights": "0" * 64}}))
        (folder / "weights").write_text(text)


# ------------------------------------------------------------------------------------------------ inputs


def test_out_that_is_holds_or_lies_in_an_input_is_refused(recipe: Path, tmp_path: Path) -> None:
    """On real merges: a result that is the base of the next, its own recipe, a folder in a model's."""
    out, again = tmp_path / "out", recipe.parent / "again.yaml"
    modalloy.merge(recipe, out)
    shutil.copytree(recipe.parent / "lora-1", tmp_path / "other")
    (tmp_path / "link").symlink_to(tmp_path)
    places = ["../out", "../models/../link/out", str(tmp_path / "link" / "out")]
    before = snapshot(tmp_path)
    for place in places:
        write(again, base_model=place, models=[{"model": "lora-1"}])
        for name in ("out", "link/out", "models/../out"):
            with pytest.raises(OutputError, match=r"out: is the base .*which is only read; choose another folder"):
                modalloy.merge(again, tmp_path / name, overwrite=True)
    again.unlink()
    with pytest.raises(OutputError, match=r"out: holds the recipe .*which would be lost"):
        modalloy.merge(
            write(out / "recipe.yaml", base_model="../models/base", models=[{"model": "../other"}]), out, overwrite=True
        )
    shutil.copyfile(recipe, out / "recipe.yaml")
    for folder in ("base/out", "lora-2/deep/er", "base/../lora-1/x"):
        with pytest.raises(OutputError, match=r"lies in the (base|model) .*which is only read"):
            modalloy.merge(recipe, recipe.parent / folder)
    assert snapshot(tmp_path) == before


def test_every_kind_of_input_is_compared(recipe: Path, tmp_path: Path) -> None:
    """Files that lead into the folder by links, hard links, or as a part of it."""
    out, models = tmp_path / "out", recipe.parent
    modalloy.merge(recipe, out)
    inputs = {
        "a file in it": out / "config.json",
        "a folder in it": out / "encoders",
        "a folder above it": tmp_path,
        "a folder with a link into it": models / "linked",
        "a link to it": models / "link",
        "a hard link": models / "hard.safetensors",
        "a link to a link": models / "chain",
    }
    (out / "encoders").mkdir()
    (models / "linked").mkdir()
    (models / "linked" / "model.safetensors").symlink_to(out / "model-00001-of-00002.safetensors")
    (models / "link").symlink_to(out)
    (models / "chain").symlink_to(models / "link")
    os.link(out / "config.json", models / "hard.safetensors")
    for what, path in inputs.items():
        for place in (out, models / "link", models / ".." / "out"):
            with pytest.raises(OutputError, match=r"(is|holds|lies in) the encoder of image"):
                check_apart(place, [("the base", models / "base"), ("the encoder of image", path)])
                pytest.fail(what)
    check_apart(out, [("the base", models / "base"), ("the recipe", recipe), ("gone", tmp_path / "gone")])
    check_apart(tmp_path / "new" / "out", [("the base", models / "base"), ("a Fisher file", recipe)])


def test_a_folder_mounted_twice_is_the_same_folder(tmp_path: Path) -> None:
    (tmp_path / "base" / "inner").mkdir(parents=True)
    (tmp_path / "twice").mkdir()
    with mounted("--bind", tmp_path / "base", tmp_path / "twice"):
        for out in ("twice/out", "twice/inner"):
            with pytest.raises(OutputError, match="lies in the base"):
                check_apart(tmp_path / out, [("the base", tmp_path / "base")])
        with pytest.raises(OutputError, match="holds the base"):
            check_apart(tmp_path / "base", [("the base", tmp_path / "twice" / "inner")])


# ------------------------------------------------------------------------------------------------ places


@contextmanager
def mounted(*arguments: object) -> Iterator[None]:
    """Something mounted at the last argument, where this process may."""
    if shutil.which("mount") is None or subprocess.run(["mount", *map(str, arguments)], capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(arguments[-1])], check=True)


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}], ids=["", "resume", "overwrite"])
@pytest.mark.parametrize("target", ["precious", "an earlier result", "nowhere", "itself"])
def test_out_that_is_a_link_is_refused_before_the_work(
    target: str, options: dict[str, bool], precious: Path, tmp_path: Path
) -> None:
    stage(tmp_path / "an earlier result", "old")
    (tmp_path / "itself").symlink_to(tmp_path / target)
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match="itself: is a link, which a result does not replace; give /"):
        Staging(tmp_path / "itself", **options)
    (tmp_path / "up").symlink_to(tmp_path / "nowhere" / "deep")
    with pytest.raises(OutputError, match="up is a link that leads nowhere; choose another folder"):
        Staging(tmp_path / "up" / "out", **options)
    (tmp_path / "up").unlink()
    assert snapshot(tmp_path) == before


def test_a_parent_that_is_a_link_is_followed(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    modalloy.merge(recipe, tmp_path / "link" / "deep" / "out")
    assert verify(tmp_path / "disk" / "deep" / "out").files > 5


@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
def test_out_that_is_a_mount_point_is_refused_before_the_work(kind: str, precious: Path, tmp_path: Path) -> None:
    out = tmp_path / "a b"
    out.mkdir()
    assert not is_mount(out)
    arguments = ("-t", "tmpfs", "tmpfs", out) if kind == "tmpfs" else ("--bind", precious, out)
    with mounted(*arguments):
        assert is_mount(out) and not is_mount(precious)
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(OutputError, match=r"a b: is a mount point, .*; name a folder in it: .*a b/merged"):
                Staging(out, **options)


def test_a_mount_point_in_an_earlier_result_is_not_emptied(precious: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Staging(out).begin("old") as folder:
        (folder / "base").mkdir()
        (folder / "base" / "thesis.txt").write_text("ours")
        outputs = {"base/thesis.txt": "0" * 64, "base/model.safetensors": "0" * 64}
        (folder / "manifest.json").write_text(json.dumps({"modalloy": "0.1", "outputs": outputs}))
    message = "out: holds base, which its manifest.json does not list"
    with mounted("--bind", precious, out / "base"), pytest.raises(OutputError, match=message):
        Staging(out, overwrite=True)
    assert (precious / "thesis.txt").read_text() == "years of work\n"


# ------------------------------------------------------------------------------------------------ errors of disks


ERRORS = [
    errno.EIO,
    errno.ESTALE,
    errno.EPERM,
    errno.EBUSY,
    errno.ETIMEDOUT,
    errno.ENOTCONN,
    errno.EREMOTEIO,
    errno.ENXIO,
]
CALLS = [
    ("write", 3),
    ("write", 12),
    ("fsync", 2),
    ("fsync", 12),
    ("ftruncate", 1),
    ("mkdir", 1),
    ("rename", 1),
    ("open", 9),
]


@pytest.mark.parametrize(("call", "nth"), CALLS)
def test_any_error_of_the_disk_is_one_line_and_leaves_nothing(
    call: str, nth: int, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, count = getattr(os, call), [0]
    number = ERRORS[nth % len(ERRORS)]

    def failing(*arguments: Any, **options: Any) -> Any:
        ours = call not in ("open", "mkdir") or ".out.partial" in str(arguments[0])
        count[0] += ours
        if ours and count[0] == nth:
            raise OSError(number, os.strerror(number))
        return done(*arguments, **options)

    before, threads = snapshot(tmp_path), threading.active_count()
    monkeypatch.setattr(os, call, failing)
    with pytest.raises(OutputError, match=r"out: .+; .*nothing was written$"):
        modalloy.merge(recipe, tmp_path / "deep" / "out")
    monkeypatch.undo()
    assert count[0] >= nth and snapshot(tmp_path) == before and not (tmp_path / "deep").exists()
    assert threading.active_count() == threads


def test_an_input_that_cannot_be_copied_is_named_itself(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the result, whose disk is well."""
    tokenizer = recipe.parent / "base" / "tokenizer.json"
    tokenizer.write_text("{}")
    opened = Path.open

    def failing(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == tokenizer:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", failing)
    with pytest.raises(CheckpointError, match=r"base/tokenizer\.json: cannot be read \(Input/output error\)"):
        modalloy.merge(recipe, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models"]


def test_a_parent_that_is_removed_during_the_merge_is_one_line(recipe: Path, tmp_path: Path) -> None:
    def remove(done: int, _: int) -> None:
        if done == 5:
            shutil.rmtree(tmp_path / "deep")

    with pytest.raises(OutputError, match="out: its folder was removed meanwhile; make it again"):
        modalloy.merge(recipe, tmp_path / "deep" / "out", on_job=remove)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models"]


def test_without_the_exchange_two_renames_do(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    stage(out, "old")
    monkeypatch.setattr(staging, "exchange", lambda *_: False)
    modalloy.merge(recipe, out, overwrite=True)
    assert verify(out).layers > 0 and sorted(path.name for path in tmp_path.iterdir()) == ["models", "out"]


@pytest.mark.parametrize("in_one_step", [True, False])
def test_killed_between_the_results_changing_places_and_the_end(in_one_step: bool, tmp_path: Path) -> None:
    """The next run, whatever it is, removes what is left of the old result, and keeps the new one."""
    for options in ({"resume": True}, {"overwrite": True}):
        out = tmp_path / "out"
        stage(out, "old")
        killed = Staging(out, overwrite=True).begin("new")
        folder = killed.__enter__()
        (folder / "manifest.json").write_text(json.dumps({"modalloy": "0.1", "outputs": {}}))
        if not in_one_step:
            killed._record({"replaces": out.stat().st_ino})
            out.rename(killed.replaced)
            folder.rename(out)
        else:
            killed._take_place()
        os.close(killed.lock)
        following = Staging(out, **options)
        assert not following.interrupted
        if "resume" in options:
            following.clean()
        else:
            with following.begin("newer") as folder:
                (folder / "manifest.json").write_text(json.dumps({"modalloy": "0.1", "outputs": {}}))
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        shutil.rmtree(out)

"""README and docs: short, their links resolve, and the commands that need no download run."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from modalloy.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")
RUN = re.compile(r"^```sh\n(.*?)^```$", re.M | re.S)  # blocks of commands that need no download: they are run


def test_the_readme_is_one_screen() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 8192


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    assert not [link for link in links if not (page.parent / link).exists()]


def test_generated_pages_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "docs/generate.py", "--check"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_commands_in_docs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process, but for scripts: most of a command's time is spent on importing torch and transformers."""
    commands = [line for page in PAGES for block in RUN.findall(page.read_text()) for line in block.splitlines()]
    assert len(commands) >= 5
    monkeypatch.chdir(ROOT)
    for command in commands:
        name, *argv = shlex.split(command.replace("build/", f"{tmp_path}/"))
        if name == "modalloy":
            told = CliRunner().invoke(app, argv)
            assert told.exit_code == 0 and told.stdout, (command, told.output)
            continue
        assert name == "python"
        done = subprocess.run([sys.executable, *argv], capture_output=True, check=False)
        assert done.returncode == 0 and done.stdout, (command, done.stderr)

"""README and docs: short, their links resolve, and the commands that need no download run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")
OFFLINE = re.compile(r"modalloy (?:methods|plan recipes/senses-\S+|--version)(?: --json)?")


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


def test_commands_in_docs_run() -> None:
    found = {found[0] for page in PAGES for found in OFFLINE.finditer(page.read_text())}
    assert len(found) >= 2
    for command in sorted(found):
        done = subprocess.run(
            [sys.executable, "-m", "modalloy.cli", *command.split()[1:]], cwd=ROOT, capture_output=True, check=False
        )
        assert done.returncode == 0 and done.stdout, command

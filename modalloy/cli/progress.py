"""Progress of long work, on stderr."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

EVERY = 30.0  # seconds between lines of progress where stderr is no terminal
ENOUGH = 10  # done by this run, or a twentieth of all, before its rate says anything of the rest


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Progress on stderr with rate and time left: a bar on a terminal, else a line every 30 s. Call it with (done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns: list[Any] = [TextColumn(label), BarColumn(), MofNCompleteColumn()]
    columns += [TextColumn("{task.fields[rate]}"), TimeRemainingColumn()]
    console = Console(stderr=True)
    with Progress(
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as bar:
        task = bar.add_task(label, total=None, rate="")
        begun = printed = time.monotonic()
        before: int | None = None  # done when it began, by an earlier run

        def report(done: int, total: int) -> None:
            nonlocal before, printed
            now = time.monotonic()
            before = done - 1 if before is None else before
            rate = (done - before) / max(now - begun, 1e-9)
            bar.update(task, completed=done, total=total, rate=f"{rate:.2f}/s")
            if bar.disable and now - printed >= EVERY:
                printed = now
                told = done > before and done - before >= min(ENOUGH, total / 20)
                left = f", {timedelta(seconds=round((total - done) / rate))} left" if told else ""
                print(f"{label}: {done}/{total}, {rate:.2f}/s{left}", file=sys.stderr, flush=True)

        yield report

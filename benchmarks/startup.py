"""CPU seconds that modalloy's quick commands take, beside Python's own start: a table, then one JSON line."""

import argparse
import json
import os
import subprocess
import sys

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import modalloy": ["-c", "import modalloy"],
    **{
        f"modalloy {words}": ["-m", "modalloy.cli", *words.split()]
        for words in ("--help", "--version", "merge --help", "methods", "mrege", "merge")
    },
}


def cpu_seconds(arguments: list[str]) -> float:
    """User and system seconds of one run of Python with these arguments."""
    before = os.times()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="runs of each command, of which the fastest counts")
    runs = parser.parse_args().runs
    best = {name: min(cpu_seconds(arguments) for _ in range(runs)) for name, arguments in COMMANDS.items()}
    for name, seconds in best.items():
        print(f"{name:24}{seconds:6.2f} s")
    print(json.dumps({"runs": runs, "cpu_seconds": {name: round(seconds, 3) for name, seconds in best.items()}}))


if __name__ == "__main__":
    main()

"""Runs every fuzz target (tests/test_fuzz_*.py) for longer than the suite does, and counts what was tried.

The suite tries the same examples every time; here they are drawn anew, TIMES as many. A table of targets is printed, then
one JSON document as the last line. Exit code 1 if a target failed; what it failed on is in pytest's own output, above.

    python benchmarks/fuzz.py --times 20 > build/fuzz.txt
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests"
NAMED = re.compile(r"^tests/(test_fuzz_\w+)\.py::(\w+)(?:\[.*\])?:$")
COUNTED = re.compile(r"- (\d+) passing(?: examples)?, (\d+) failing(?: examples)?,")  # as of Hypothesis 6


def run(path: Path, times: int) -> tuple[dict[str, dict[str, int]], str, bool]:
    """The counts of a file's targets by Hypothesis' own statistics, what pytest printed, and whether all passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--hypothesis-show-statistics"]
    done = subprocess.run(
        [*command, f"tests/{path.name}"],
        cwd=TESTS.parent,
        env=os.environ | {"MODALLOY_FUZZ_TIMES": str(times)},
        capture_output=True,
        text=True,
        check=False,
    )
    targets: dict[str, dict[str, int]] = {}
    name = ""
    for line in done.stdout.splitlines():
        if found := NAMED.match(line.strip()):
            name = f"{found[1].removeprefix('test_fuzz_')}: {found[2].removeprefix('test_').replace('_', ' ')}"
        elif (counts := COUNTED.search(line)) and name:
            before = targets.setdefault(name, {"examples": 0, "failures": 0})
            before["examples"] += int(counts[1]) + int(counts[2])
            before["failures"] += int(counts[2])
    return targets, done.stdout + done.stderr, done.returncode == 0


def main() -> int:
    """Print the table and the document; 0 if no target failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--times", type=int, default=10, help="factor of the suite's number of examples")
    times = max(2, parser.parse_args().times)  # with 1, the suite's own examples would be tried again
    targets: dict[str, dict[str, int]] = {}
    passed, begun = True, time.monotonic()
    for path in sorted(TESTS.glob("test_fuzz_*.py")):
        found, output, fine = run(path, times)
        targets |= found
        if not fine:
            passed = False
            print(output)
    width = max(map(len, targets), default=6)
    print(f"{'target':{width}}  examples  failures")
    for name, counts in targets.items():
        print(f"{name:{width}}  {counts['examples']:8,}  {counts['failures']:8,}")
    total = sum(counts["examples"] for counts in targets.values())
    minutes = round((time.monotonic() - begun) / 60, 1)
    print(f"{len(targets)} targets, {total:,} examples, {minutes} min")
    print(json.dumps({"times": times, "passed": passed, "examples": total, "minutes": minutes, "targets": targets}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

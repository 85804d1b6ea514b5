"""Regular expressions of a stranger's config: matched by a child process whose time and memory are bounded.

A pattern of a few characters can keep Python's matcher busy for years, and nothing but the end of a process stops it.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from modalloy.errors import CheckpointError, plain, shown

MAX_SECONDS, MAX_MEMORY = 2, 1 << 30  # of the child
MAX_PATTERN = 1_000  # characters
MAX_PAIRS = 2_000_000  # names × patterns: about 2 s
PLAIN = re.compile(r"[A-Za-z0-9_.]+")  # matched here: such a pattern repeats nothing
CHILD = f"""
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({MAX_SECONDS}, {MAX_SECONDS}))
resource.setrlimit(resource.RLIMIT_AS, ({MAX_MEMORY}, {MAX_MEMORY}))
patterns, names = json.load(sys.stdin)
compiled = []
for pattern in patterns:
    try:
        compiled.append(re.compile(rf"(.*\\.)?({{pattern}})"))
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        print(json.dumps([len(compiled), str(error)]))
        sys.exit()
print(json.dumps([None, [next((i for i, p in enumerate(compiled) if p.fullmatch(n)), None) for n in names]]))
"""


def first_matches(patterns: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """For each name the index of the first pattern that matches it, or its end after a dot, as PEFT matches; None if none.

    Raises:
        CheckpointError: a pattern is none, or matching takes too long; the message begins with the pattern.
    """
    if long := next((pattern for pattern in patterns if len(pattern) > MAX_PATTERN), None):
        raise CheckpointError(f"{shown(long)} is longer than {MAX_PATTERN} characters; correct the file")
    if len(patterns) * len(names) > MAX_PAIRS:
        raise CheckpointError(f"{len(patterns):,} patterns are too many for {len(names):,} weights; correct the file")
    if all(PLAIN.fullmatch(pattern) for pattern in patterns):
        compiled = [re.compile(rf"(.*\.)?({pattern})") for pattern in patterns]
        return [next((i for i, one in enumerate(compiled) if one.fullmatch(name)), None) for name in names]
    odd = shown(next(pattern for pattern in patterns if not PLAIN.fullmatch(pattern)))
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", CHILD],
            input=json.dumps([patterns, names]).encode(),
            capture_output=True,
            timeout=30 * MAX_SECONDS,  # of a busy machine
            check=True,
        )
        index, found = json.loads(done.stdout)
    except (subprocess.SubprocessError, ValueError) as error:
        raise CheckpointError(
            f"{odd} or a pattern beside it takes more than {MAX_SECONDS} s to match; write plainer patterns"
        ) from error
    if index is not None:
        raise CheckpointError(f"{shown(patterns[index])} is not a pattern ({plain(found)}); correct the file")
    return [None if match is None else int(match) for match in found]

"""How long does `modalloy check` take on the built-in four-way merge, and what does it find? A table, then one JSON line."""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from modalloy.demo import _recipe
from modalloy.evals.check import check
from modalloy.evals.check_card import text
from modalloy.merging import merge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--thorough", action="store_true", help="all probes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="check-") as folder:
        out = Path(folder) / "merged"
        merge(_recipe(), out)
        cpu = time.process_time()
        found = check(out, thorough=arguments.thorough)
        cpu = time.process_time() - cpu
    print(text(found))
    about = {"cpu_s": round(cpu, 1), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    print(json.dumps(about | found.to_dict()))


if __name__ == "__main__":
    main()

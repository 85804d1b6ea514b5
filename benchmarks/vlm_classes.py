"""Are merges of whole multimodal models right for every class? Two fine-tunes, two all-linear LoRAs, four methods, two spellings.

Into a base in the hub's names by every method, into one in the class's own names by task arithmetic.

    python benchmarks/vlm_classes.py [--only NAME …]

The checks are those of `tests/test_vlm_classes.py`, of which the suite runs one for each class: tiny models of random weights;
every tensor of a result, loaded by transformers with no missing and no unexpected key, against float64 arithmetic on the class's
own modules. Prints a table, then one JSON document as its last line.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from measuring import table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
import transformers
from native_models import MAKERS
from test_vlm_classes import METHODS, check

torch.set_num_threads(1)
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--only", nargs="+", default=list(MAKERS), choices=list(MAKERS), metavar="NAME")
args = parser.parse_args()

found = {}
for name in args.only:
    model = MAKERS[name]()[0]
    entry = {"class": type(model).__name__, "decoder": model.config.get_text_config().model_type}
    for kind in ("full", "lora"):
        for hub in (True, False):
            with tempfile.TemporaryDirectory() as folder:
                methods = list(METHODS) if hub else ["task_arithmetic"]
                spelling = f"{kind}, {'hub' if hub else 'own'} names"
                entry[spelling] = check(name, Path(folder), kind, methods, hub=hub)
    found[name] = entry
    print(f"{name} done", file=sys.stderr, flush=True)

columns = ("class", "decoder", "full, hub names", "full, own names", "lora, hub names", "lora, own names")
print(table(columns, [[str(one[column]) for column in columns] for one in found.values()]))
print(json.dumps({"methods": METHODS, "transformers": transformers.__version__, "models": found}))

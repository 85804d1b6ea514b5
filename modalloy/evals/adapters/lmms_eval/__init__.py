"""A merged model, and MUSIC-AVQA, AVQA and MCUB, for lmms-eval, which has none of these.

lmms-eval pins versions that conflict with ours (`av<16`, `wandb==0.25.0` and some fifty more packages), so it needs an
environment of its own: install modalloy there, then `pip install --no-deps lmms-eval==0.7.3` and the few packages that
its import asks for. Our tests run this against a stand-in of its interface; version 0.7.3 itself has run the MCUB task
with a model that always answers "B".

Its tasks read what our benchmarks made of the official files:

    python -c "from modalloy.evals.adapters.lmms_eval import export; export('music_avqa', 'data', '.')"
    python -m lmms_eval --model modalloy --model_args pretrained=out --tasks modalloy_music_avqa \\
        --include_path $(python -c "from modalloy.evals.adapters.lmms_eval import TASKS; print(TASKS)")

in one folder: the tasks look for `music_avqa.jsonl` in the current one.
"""

import json
import os
from pathlib import Path
from typing import Any

from modalloy.errors import MediaError, OutputError
from modalloy.evals import find_benchmark
from modalloy.evals.benchmark import Source
from modalloy.evals.files import leads_out
from modalloy.files import disk_errors, is_file, kind, read_file, replace_text

TASKS = Path(__file__).parent / "tasks"


def manifest() -> Any:
    """What lmms-eval's entry point is given: `--model modalloy` is our chat model."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="modalloy", chat_class_path=f"{__name__}.model.ModalloyChat")


def export(task: str, data: str | Path, out: str | Path, **source: Any) -> Path:
    """Write the samples of a benchmark as `<task>.jsonl` in the folder `out`, with absolute paths of media.

    `source` may have `roots`, `variant` and `modalities`, as `Source`.

    Raises:
        MediaError: a medium leads out of the data's folder and of the roots.
    """
    lines, given = [], Source(Path(data), **source)
    for sample in find_benchmark(task).samples(given):
        if outside := [path for _, path in sample.media if leads_out(path, given.folders)]:
            raise MediaError(f"{outside[0]}: leads out of the data's folder, and is in no root; add its root")
        line = {"task": task, **sample.to_dict()}
        line["media"] = [[modality, os.path.abspath(path)] for modality, path in sample.media]
        lines.append(json.dumps(line, ensure_ascii=False))
    path, begin = Path(out) / f"{task}.jsonl", f'{{"task": {json.dumps(task)}, '
    with disk_errors(path):
        if os.path.lexists(path) and not (is_file(path) and read_file(path, 200).startswith(begin.encode())):
            raise OutputError(f"{path}: is {kind(path)} that modalloy did not export; choose another folder")
        replace_text(path, "\n".join(lines) + "\n")
    return path

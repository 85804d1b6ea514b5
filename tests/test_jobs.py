"""A job is all that its tensors are made of: computed alone, in another process, it gives the same bytes."""

import dataclasses
import hashlib
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import write_omni
from synthetic import write_lora

import modalloy
from modalloy.compute import compute, survey
from modalloy.planning.planner import plan
from modalloy.recipe import load_recipe
from modalloy.senses.anatomy import OF_TEXT
from modalloy.storage.tensors import Checkpoint

ELSEWHERE = """
import hashlib, pickle, sys
import torch
from modalloy.compute import compute
jobs, inputs, surveys = pickle.load(sys.stdin.buffer)
torch.set_num_threads(1)
for job in jobs:
    for tensor in compute(job, inputs.read, surveys=surveys).tensors:
        print(hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest())
assert not {"modalloy.planning.plan", "modalloy.planning.jobs", "modalloy.recipe"} & set(sys.modules)
"""

# The command line ends by SystemExit, whatever it did.
MERGING = """
import sys
from modalloy.cli import main
try:
    main()
finally:
    print("transformers" in sys.modules, "torch" in sys.modules)
"""


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"output": {"form": "full"}},
        {"merge_method": "metagpt", "output": {"form": "full", "dtype": "bfloat16"}},
        {"merge_method": "ties", "output": {"form": "adapter", "compress_rank": 2}},
    ],
    ids=lambda changes: str(changes.get("merge_method", changes.get("output", "adapter"))),
)
def test_jobs_computed_in_another_process_give_the_bytes_of_the_merge(
    changes: dict[str, Any], write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = write_recipe(**changes)
    planned = plan(load_recipe(recipe))
    surveys = survey(planned.merges(), planned.inputs.read)
    sent = pickle.dumps((planned.jobs, planned.inputs, surveys))
    done = subprocess.run([sys.executable, "-c", ELSEWHERE], input=sent, capture_output=True, check=False)
    assert not done.returncode, done.stderr.decode()
    modalloy.merge(recipe, tmp_path / "out")
    written = Checkpoint(tmp_path / "out", ("adapter_model", "model"))
    specs = [spec for job in planned.jobs for spec in job.outputs]
    tensors = [written.read(written.refs[spec.name]).contiguous().reshape(-1) for spec in specs]
    wanted = [hashlib.sha256(t.view(torch.uint8).numpy().tobytes()).hexdigest() for t in tensors]
    assert done.stdout.decode().split() == wanted and len(wanted) > 14


def test_merging_adapters_of_a_text_decoder_imports_no_transformers(base: Path, tmp_path: Path) -> None:
    """Which takes a second."""
    loras = [write_lora(tmp_path / str(seed), base, seed=seed) for seed in (1, 2)]
    models = [{"model": str(one)} for one in loras]
    recipe = tmp_path / "recipe.yaml"
    for form in ("adapter", "full"):
        content = {"base_model": str(base), "merge_method": "ssam", "models": models, "output": {"form": form}}
        recipe.write_text(yaml.safe_dump(content))
        arguments = ["merge", str(recipe), "-o", str(tmp_path / form)]
        done = subprocess.run([sys.executable, "-c", MERGING, *arguments], capture_output=True, text=True, check=False)
        assert not done.returncode and done.stdout.splitlines()[-1] == "False True", done.stderr


def test_decoders_of_text_have_no_multimodal_class() -> None:
    from transformers.models.auto import modeling_auto as tables

    assert set(tables.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) >= OF_TEXT
    assert not set(tables.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES) & OF_TEXT


def test_a_job_pickles_small(base: Path, tmp_path: Path) -> None:
    write_omni(tmp_path / "omni", base)
    for job in plan(load_recipe(tmp_path / "omni" / "recipe.yaml")).jobs:
        assert len(pickle.dumps(job)) < 4096


def test_a_plan_is_read_and_never_written(write_recipe: Callable[..., Path]) -> None:
    planned = plan(load_recipe(write_recipe()))
    with pytest.raises(dataclasses.FrozenInstanceError):
        planned.jobs = []  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        planned.jobs[0].weights = ()  # type: ignore[misc]
    job = planned.jobs[0]
    first = compute(job, planned.inputs.read)
    assert all(a.equal(b) for a, b in zip(first.tensors, compute(job, planned.inputs.read).tensors, strict=True))

"""merge(recipe, out): plan → run → write → verify → card. Read this file first."""

import json
import os
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modalloy.checkpoints import Staging, WeightWriter, read_json
from modalloy.checkpoints.writer import disk_errors
from modalloy.delta import Delta, LowRank
from modalloy.encoders import encoder_sizes
from modalloy.engines import local
from modalloy.errors import CheckpointError, MethodError, OutputError
from modalloy.manifest import SOURCES, build_manifest
from modalloy.methods import apply
from modalloy.plan import Job, Plan, plan
from modalloy.recipe import Recipe, load_recipe
from modalloy.report.card import model_card
from modalloy.verify import Verification, verify_folder

STEMS = {"adapter": "adapter_model", "omni": "adapter_model", "full": "model"}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True)
class MergeReport:
    """What a merge did. Times in seconds of wall clock, memory as the process's peak resident size."""

    out: Path
    plan: Plan
    verification: Verification
    merge_s: float
    total_s: float
    peak_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Everything but the list of tensors, for `--json`."""
        planned = {key: value for key, value in self.plan.to_dict().items() if key != "tensors"}
        return planned | {
            "out": str(self.out),
            "merge_seconds": round(self.merge_s, 3),
            "total_seconds": round(self.total_s, 3),
            "peak_bytes": self.peak_bytes,
            "verify": self.verification.to_dict(),
        }


def merge(
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    jobs: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
    allow_base_mismatch: bool = False,
    on_job: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Merge as `recipe` says and write the result to the folder `out`, which appears only when it is complete.

    Args:
        recipe: a Recipe, or the path of its YAML file.
        out: folder to make; an existing one is refused unless `overwrite`.
        jobs: workers (default: one per core). The bytes written do not depend on it.
        device: "cpu", "cuda" or "auto" (cuda where there is one).
        overwrite: replace an earlier result at `out`.
        allow_base_mismatch: merge specialists that record another base than the recipe's.
        on_job: called with (jobs done, jobs in all).

    Raises:
        ModalloyError: a mistake in the recipe, the inputs or the target; `out` is then as it was.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    out = Path(out)
    staging = Staging(out, overwrite=overwrite)
    start = time.perf_counter()
    planned = plan(recipe, allow_base_mismatch=allow_base_mismatch)
    chosen_device = resolve_device(device)
    with staging as folder, disk_errors(out):
        begin = time.perf_counter()
        hashes = _write_weights(planned, folder, jobs, chosen_device, on_job)
        merge_s = time.perf_counter() - begin
        _write_configs(planned, folder)
        (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        (folder / "README.md").write_text(model_card(planned), encoding="utf-8")
        manifest = build_manifest(planned, folder, hashes)
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        (folder / SOURCES).write_text(json.dumps(_sources(planned), indent=1) + "\n", encoding="utf-8")
        verification = verify_folder(folder, planned, manifest, rehash=False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return MergeReport(out, planned, verification, merge_s, time.perf_counter() - start, peak)


def resolve_device(device: str) -> str:
    """ "auto" as "cuda" where there is one, else "cpu"; "cuda" without one is refused."""
    if device == "cuda" and not torch.cuda.is_available():
        raise OutputError("--device cuda: no CUDA device is available here; use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def compute(planned: Plan, job: Job, device: str = "cpu") -> list[Tensor]:
    """The tensors that one job writes, in the order and type of `job.outputs`."""
    if job.kind == "carry":
        assert job.ref is not None
        return [planned.specialists[job.specialist].read(job.ref)]
    if job.kind == "keep":
        return [_read_base(planned, job.slot).to(job.outputs[0].dtype)]
    if job.kind == "average":
        having = [s for s in planned.specialists if job.slot in s.full]
        total = sum(s.read(s.full[job.slot]).to(torch.float64) for s in having)
        assert isinstance(total, Tensor)
        return [(total / len(having)).to(job.outputs[0].dtype)]
    merged = merged_delta(planned, job, device)
    if planned.recipe.output.form == "full":
        base = _read_base(planned, job.slot)
        update = merged.dense() if isinstance(merged, LowRank) else merged
        return [(base.to(update.dtype) + update.cpu()).to(job.outputs[0].dtype)]
    assert isinstance(merged, LowRank) and planned.rank is not None
    fill = planned.rank - merged.rank  # zero columns and rows, so that every layer has the adapter's one rank
    up = torch.nn.functional.pad(merged.up, (0, fill))
    down = torch.nn.functional.pad(merged.down, (0, 0, 0, fill))
    return [down.cpu().to(job.outputs[0].dtype), up.cpu().to(job.outputs[1].dtype)]


def merged_delta(planned: Plan, job: Job, device: str = "cpu", dtype: torch.dtype | None = None) -> Delta:
    """The merged update of one linear weight; a specialist without one contributes zero but counts in λ = 1/n.

    With `dtype`, everything is computed on dense matrices of that type instead (the literal algorithm, for checking).
    """
    deltas: list[Delta] = []
    shape = planned.base.refs[job.slot].shape
    for entry, specialist in zip(planned.recipe.models, planned.specialists, strict=True):
        weight = entry.parameters.weight
        if job.slot in specialist.text:
            low_rank = specialist.delta(job.slot)
            moved = LowRank(low_rank.up.to(device), low_rank.down.to(device))
            deltas.append(weight * (moved if dtype is None else moved.to(dtype).dense()))
        elif job.slot in specialist.full:
            tuned = specialist.read(specialist.full[job.slot])
            base = _read_base(planned, job.slot)
            wide = dtype or torch.promote_types(tuned.dtype, torch.float32)
            deltas.append(weight * (tuned.to(device, wide) - base.to(device, wide)))
    try:
        return apply(planned.recipe.merge_method, deltas, planned.parameters, (shape[0], shape[1]))
    except MethodError as error:
        raise MethodError(f"{job.slot}: {error}") from error


def _read_base(planned: Plan, slot: str) -> Tensor:
    """A tensor of the base; NaN or infinity in it is refused."""
    ref = planned.base.refs[slot]
    tensor = planned.base.read(ref)
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"base: {slot} holds NaN or infinite values ({ref.file}); download the base again")
    return tensor


def _write_weights(
    planned: Plan, folder: Path, jobs: int | None, device: str, on_job: Callable[[int, int], None] | None
) -> dict[str, str]:
    """Run all jobs and stream their tensors to disk; returns the sha256 of every file written."""
    specs = [spec for job in planned.jobs for spec in job.outputs]
    form = planned.recipe.output.form
    limit = planned.recipe.output.max_shard_size if form == "full" else None  # adapters are always one file (PEFT)
    writer = WeightWriter(folder, STEMS[form], specs, limit)
    n_workers = 1 if device == "cuda" else jobs or len(os.sched_getaffinity(0))
    results = local.run(planned.jobs, lambda job: compute(planned, job, device), n_workers)
    try:
        for done, (job, tensors) in enumerate(results, 1):
            for spec, tensor in zip(job.outputs, tensors, strict=True):
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    raise MethodError(
                        f"{spec.name}: the merged values do not fit {spec.dtype}; choose a wider output.dtype or a smaller scale"
                    )
                writer.add(spec.name, tensor)
            if on_job is not None:
                on_job(done, len(planned.jobs))
        writer.close()
    finally:
        writer.abort()
        results.close()
    return writer.sha256


def _write_configs(planned: Plan, folder: Path) -> None:
    """Everything beside the weights that the form needs to be loaded."""
    recipe, base = planned.recipe, planned.base_folder
    if recipe.output.form == "adapter":
        config = _peft_config(planned)
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        return
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    if recipe.output.form == "full":
        config = read_json(base / "config.json")
        config.pop("_name_or_path", None)  # where the base was on someone's machine
        if recipe.output.dtype != "auto":
            config["dtype"] = recipe.output.dtype
            config.pop("torch_dtype", None)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        return
    (folder / "config.json").write_text(json.dumps(_omni_config(planned), indent=2) + "\n")
    if planned.chat_template is not None:
        (folder / "chat_template.jinja").write_text(planned.chat_template, encoding="utf-8")
    if not planned.base_is_portable:
        (folder / "base").mkdir()
        for name in ["config.json", *(file.path.name for file in planned.base.files)]:
            shutil.copyfile(base / name, folder / "base" / name)
        for index in base.glob("*.index.json"):
            shutil.copyfile(index, folder / "base" / index.name)


def _peft_config(planned: Plan) -> dict[str, Any]:
    stems = [job.slot.removesuffix(".weight") for job in planned.jobs]
    leaves = {stem.rpartition(".")[2] for stem in stems}
    same_leaf = {
        n.removesuffix(".weight") for n in planned.base.refs if n.removesuffix(".weight").rpartition(".")[2] in leaves
    }
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": planned.base_name,
        "r": planned.rank,
        "lora_alpha": planned.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": sorted(leaves if same_leaf == set(stems) else stems),
    }


def _omni_config(planned: Plan) -> dict[str, Any]:
    """config.json of the merged model (see `modalloy.model.config.ModalloyConfig`)."""
    modalities = {}
    for specialist in planned.specialists:
        encoder = planned.encoders[specialist.modality or ""]
        modalities[specialist.modality] = specialist.modality_settings(encoder, *encoder_sizes(encoder))
    return {
        "architectures": ["ModalloyForConditionalGeneration"],
        "model_type": "modalloy",
        "base_model": planned.base_name if planned.base_is_portable else "base",
        "text_config": read_json(planned.base_folder / "config.json"),
        "text_rank": planned.rank,
        "modalities": modalities,
    }


def _sources(planned: Plan) -> dict[str, Any]:
    """Where the inputs were on this machine, so that `verify` can merge again; not part of what is hashed."""
    return {
        "base": str(planned.base_folder.resolve()),
        "specialists": [str(s.checkpoint.folder.resolve()) for s in planned.specialists],
    }

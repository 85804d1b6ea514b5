"""Merging whole models: every output form loads where users load it and computes what the recipe says."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import SLOTS, compose_tensors, edit_tensors, write_compose
from safetensors.torch import load_file, save_file
from synthetic import write_base, write_lora

import modalloy
from modalloy.errors import CheckpointError
from modalloy.methods import METHODS
from modalloy.planning.cost import read_bytes
from modalloy.storage.folder import file_sha256
from modalloy.verify import verify

WriteRecipe = Callable[..., Path]


def literal_ssam(deltas: list[torch.Tensor], rank: int, scale: float) -> torch.Tensor:
    """Algorithm 1 as the paper writes it, on dense float64 matrices."""
    left = sum(d @ d.T for d in deltas)
    right = sum(d.T @ d for d in deltas)
    u = torch.linalg.eigh(left).eigenvectors[:, -rank:]
    v = torch.linalg.eigh(right).eigenvectors[:, -rank:]
    return scale * u @ u.T @ sum(deltas) @ v @ v.T


def text_delta(folder: Path, stem: str, scale: float = 2.0) -> torch.Tensor:
    tensors = load_file(folder / "adapter_model.safetensors")
    up, down = tensors[f"{stem}.lora_B.default.weight"], tensors[f"{stem}.lora_A.default.weight"]
    return scale * up.double() @ down.double()


def test_adapter_holds_algorithm_1(write_recipe: WriteRecipe, specialists: dict[str, Path], tmp_path: Path) -> None:
    modalloy.merge(write_recipe(), tmp_path / "out")
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(written) == 2 * len(SLOTS)
    for stem in SLOTS:
        name = f"base_model.model.{stem}"
        found = written[f"{name}.lora_B.weight"].double() @ written[f"{name}.lora_A.weight"].double()
        wanted = literal_ssam([text_delta(path, stem) for path in specialists.values()], rank=4, scale=0.5)
        assert torch.linalg.norm(found - wanted) <= 2e-5 * torch.linalg.norm(wanted)


def test_peft_loads_the_adapter_with_the_same_logits(write_recipe: WriteRecipe, base: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    modalloy.merge(write_recipe(), tmp_path / "adapter")
    modalloy.merge(write_recipe(output={"form": "full"}), tmp_path / "full")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    ids = torch.tensor([[1, 5, 7, 9, 3]])
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base)(ids).logits
        torch.testing.assert_close(adapted(ids).logits, full(ids).logits, atol=1e-5, rtol=1e-5)
    assert (plain - full(ids).logits).abs().max() > 1e-2  # the merge changes something


def test_full_is_sharded_and_keeps_every_base_tensor(write_recipe: WriteRecipe, base: Path, tmp_path: Path) -> None:
    report = modalloy.merge(write_recipe(output={"form": "full", "max_shard_size": "20KB"}), tmp_path / "full")
    shards = sorted((tmp_path / "full").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "full" / "model.safetensors.index.json").read_text())
    assert len(shards) > 1
    assert all(path.stat().st_size < 20_000 + 4_000 for path in shards)  # data, and a header
    original, merged = load_file(base / "model.safetensors"), {k: v for p in shards for k, v in load_file(p).items()}
    assert merged.keys() == original.keys() == index["weight_map"].keys()
    for name in original.keys() - {f"{stem}.weight" for stem in SLOTS}:
        assert torch.equal(merged[name], original[name])
    assert report.plan.merged_weights() == len(SLOTS)


def test_plan_accounts_for_every_tensor(write_recipe: WriteRecipe, base: Path, specialists: dict[str, Path]) -> None:
    planned = modalloy.plan(modalloy.load_recipe(write_recipe(output={"form": "omni"})))
    inputs = {("base", name) for name in load_file(base / "model.safetensors")}
    for label, path in specialists.items():
        inputs |= {(label, name) for name in load_file(path / "adapter_model.safetensors")}
    fates = {(fate.source, fate.tensor): fate for fate in planned.fates}
    assert fates.keys() == inputs and len(planned.fates) == len(inputs)
    assert fates["image", "prefix_tokens.vision"].fate == "carried"
    assert fates["image", "prefix_tokens.default"].fate == "left out"
    assert fates["base", "model.embed_tokens.weight"].fate == "kept"
    assert fates["audio", "model.layers.0.mlp.up_proj.lora_A.default.weight"].fate == "merged"
    assert fates["audio", "model.layers.0.mlp.up_proj.lora_A.audio.weight"].fate == "carried"


def test_plan_reads_headers_only(write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    from modalloy.storage.tensors import WeightFile

    recipe = modalloy.load_recipe(write_recipe())
    monkeypatch.setattr(WeightFile, "read", lambda *_: pytest.fail("plan read a tensor's data"))
    assert read_bytes(modalloy.plan(recipe)) > 0


def test_full_models_average_norms_and_merge_dense_weights(
    base: Path, tmp_path: Path, write_recipe: WriteRecipe
) -> None:
    original = load_file(base / "model.safetensors")
    tuned = []
    for index in range(2):
        folder = tmp_path / f"tuned{index}"
        folder.mkdir()
        torch.manual_seed(index)
        changed = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in original.items()}
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text((base / "config.json").read_text())
        tuned.append(changed)
    models = [{"model": str(tmp_path / f"tuned{index}")} for index in range(2)]
    recipe = write_recipe(models=models, merge_method="ssam", parameters={"rank": 6}, output={"form": "full"})
    modalloy.merge(recipe, tmp_path / "full")
    merged = load_file(tmp_path / "full" / "model.safetensors")
    norm = "model.layers.0.input_layernorm.weight"
    torch.testing.assert_close(merged[norm], (tuned[0][norm] + tuned[1][norm]) / 2)
    weight = "model.layers.1.mlp.gate_proj.weight"
    deltas = [t[weight].double() - original[weight].double() for t in tuned]
    wanted = original[weight].double() + literal_ssam(deltas, rank=6, scale=0.5)
    torch.testing.assert_close(merged[weight].double(), wanted, atol=1e-6, rtol=1e-5)
    assert torch.equal(merged["model.embed_tokens.weight"], original["model.embed_tokens.weight"])
    assert verify(tmp_path / "full").layers > 0


def test_linear_methods_sum_the_deltas(write_recipe: WriteRecipe, specialists: dict[str, Path], tmp_path: Path) -> None:
    models = [
        {"model": str(specialists["image"]), "parameters": {"weight": 0.25}},
        {"model": str(specialists["audio"]), "parameters": {"weight": 2.0}},
    ]
    stem = "model.layers.1.self_attn.v_proj"
    image, audio = (text_delta(path, stem) for path in specialists.values())
    wanted = {"average": (0.25 * image + 2 * audio) / 2, "task_arithmetic": 0.25 * image + 2 * audio}
    for method, expected in (wanted | {"damc": wanted["average"]}).items():
        modalloy.merge(write_recipe(models=models, merge_method=method), tmp_path / method)
        written = load_file(tmp_path / method / "adapter_model.safetensors")
        name = f"base_model.model.{stem}"
        found = written[f"{name}.lora_B.weight"].double() @ written[f"{name}.lora_A.weight"].double()
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_bin_and_safetensors_specialists_give_the_same_bytes(tmp_path: Path, write_recipe: WriteRecipe) -> None:
    for kind in ("bin", "safetensors"):
        models = [
            {
                "model": str(write_compose(tmp_path / kind / disk, disk, as_bin=kind == "bin", seed=seed)),
                "modality": disk,
            }
            for seed, disk in enumerate(("vision", "audio"))
        ]
        modalloy.merge(write_recipe(models=models), tmp_path / f"out-{kind}")
    first, second = (tmp_path / f"out-{kind}" / "adapter_model.safetensors" for kind in ("bin", "safetensors"))
    assert first.read_bytes() == second.read_bytes()


def test_a_peft_adapter_is_a_specialist(write_recipe: WriteRecipe, base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"up_proj": 2},
        alpha_pattern={"layers.1.self_attn.q_proj": 7},
        use_rslora=True,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(tmp_path / "peft")
    recipe = write_recipe(models=[{"model": str(tmp_path / "peft")}], merge_method="average", output={"form": "full"})
    modalloy.merge(recipe, tmp_path / "full")
    folded = model.merge_and_unload()
    ids = torch.tensor([[1, 5, 7, 9, 3]])
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "full")(ids).logits
        torch.testing.assert_close(found, folded(ids).logits, atol=1e-5, rtol=1e-5)


def test_an_adapter_on_a_local_base_records_the_hub_id_that_its_specialists_record(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    for seed, recorded in ((1, "owner/name"), (2, "owner/name"), (3, "owner/other")):
        folder = write_lora(tmp_path / f"lora{seed}", tmp_path / "base", seed=seed)
        config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": recorded}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    for seeds, wanted in (((1, 2), "owner/name"), ((1, 3), "base")):
        models = [{"model": f"lora{seed}"} for seed in seeds]
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"base_model": "base", "models": models}))
        modalloy.merge(tmp_path / "recipe.yaml", tmp_path / f"out{seeds}")
        written = json.loads((tmp_path / f"out{seeds}" / "adapter_config.json").read_text())
        assert written["base_model_name_or_path"] == wanted


def test_a_specialist_without_an_update_counts_as_zero_only_on_request(
    write_recipe: WriteRecipe, specialists: dict[str, Path], tmp_path: Path
) -> None:
    stem = "model.layers.0.mlp.down_proj"

    def remove(tensors: dict[str, torch.Tensor]) -> None:
        for side in "AB":
            del tensors[f"{stem}.lora_{side}.default.weight"]

    edit_tensors(specialists["audio"], remove)
    with pytest.raises(
        CheckpointError, match=rf"audio specialist: has no update of {stem}.*the image specialist has; say `miss"
    ):
        modalloy.merge(write_recipe(), tmp_path / "out")
    modalloy.merge(write_recipe(missing="zero"), tmp_path / "out")
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    name = f"base_model.model.{stem}"
    found = written[f"{name}.lora_B.weight"].double() @ written[f"{name}.lora_A.weight"].double()
    torch.testing.assert_close(found, 0.5 * text_delta(specialists["image"], stem), atol=1e-5, rtol=1e-5)


def test_same_bytes_for_any_number_of_jobs(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe(output={"form": "omni"})
    folders = [tmp_path / f"jobs{jobs}" for jobs in (1, 2, 5)]
    for folder, jobs in zip(folders, (1, 2, 5), strict=True):
        modalloy.merge(recipe, folder, jobs=jobs)
    names = sorted(path.name for path in folders[0].iterdir() if path.is_file())
    for name in (name for name in names if name != "sources.json"):  # which says when the files were written
        contents = {(folder / name).read_bytes() for folder in folders}
        assert len(contents) == 1, name


def test_omni_carries_modality_tensors_bit_for_bit(
    write_recipe: WriteRecipe, specialists: dict[str, Path], tmp_path: Path
) -> None:
    modalloy.merge(write_recipe(output={"form": "omni"}), tmp_path / "omni")
    written = load_file(tmp_path / "omni" / "adapter_model.safetensors")
    for disk, modality in (("vision", "image"), ("audio", "audio")):
        given = load_file(specialists[modality] / "adapter_model.safetensors")
        own = [name for name in given if ".default" not in name]
        assert len(own) == 2 * len(SLOTS) + 4 + 2
        for name in own:
            assert torch.equal(written[name], given[name])
            assert disk in name
    text = (tmp_path / "omni" / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: modalloy\n") and "merge_method: ssam" in text


def test_verify_finds_every_kind_of_damage(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = modalloy.merge(write_recipe(), out)
    assert report.verification.share == 1 and report.verification.worst_error < 1e-5
    assert verify(out).worst_error == report.verification.worst_error
    weights = out / "adapter_model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(modalloy.errors.CheckpointError, match="sha256"):
        verify(out)
    weights.write_bytes(good)
    (out / "extra.txt").write_text("x")
    with pytest.raises(modalloy.errors.CheckpointError, match="not listed"):
        verify(out)
    (out / "extra.txt").unlink()
    (out / "README.md").unlink()
    with pytest.raises(modalloy.errors.CheckpointError, match="missing"):
        verify(out)


def test_verify_names_an_input_that_changed(
    write_recipe: WriteRecipe, specialists: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    modalloy.merge(write_recipe(), out)
    save_file(compose_tensors("vision", seed=99), specialists["image"] / "adapter_model.safetensors")
    with pytest.raises(modalloy.errors.CheckpointError, match="image specialist has changed since the merge"):
        verify(out)


def test_verify_merges_sampled_layers_again(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """A result whose hashes are right but whose layers are not what the recipe gives."""
    out = tmp_path / "out"
    modalloy.merge(write_recipe(), out)
    edit_tensors(out, lambda tensors: tensors["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"].mul_(1.01))
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["outputs"]["adapter_model.safetensors"] = file_sha256(out / "adapter_model.safetensors")
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(modalloy.errors.CheckpointError, match="differs from what the recipe gives"):
        verify(out)


def forged(out: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a result, and its manifest with them, so that only its layers can tell."""
    weights = next(out.glob("*model.safetensors"))
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["outputs"][weights.name] = file_sha256(weights)
    (out / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("form", ["adapter", "full"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_verify_finds_an_update_that_is_one_percent_too_large(
    dtype: str, form: str, base: Path, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    """In the last layer, and in any precision."""
    out, stem = tmp_path / "out", "model.layers.1.self_attn.v_proj"  # the last by name
    recipe = write_recipe(output={"form": form, "dtype": dtype})
    modalloy.merge(recipe, out)
    if form == "adapter":
        forged(out, lambda tensors: tensors[f"base_model.model.{stem}.lora_B.weight"].mul_(1.01))
    else:
        stem = "model.layers.1.mlp.down_proj"  # the last in the base
        original = load_file(base / "model.safetensors")[f"{stem}.weight"].double()
        modalloy.merge(write_recipe(), tmp_path / "exact")
        factors = load_file(tmp_path / "exact" / "adapter_model.safetensors")
        up, down = (factors[f"base_model.model.{stem}.lora_{side}.weight"].double() for side in "BA")
        update = 1.01 * up @ down
        forged(out, lambda tensors: tensors[f"{stem}.weight"].copy_(original + update))
    with pytest.raises(CheckpointError, match=f"{stem}.weight differs from what the recipe gives"):
        verify(out)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0])
def test_verify_finds_a_small_update_that_was_left_out(
    size: float, dtype: str, base: Path, specialists: dict[str, Path], write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    for folder in specialists.values():
        edit_tensors(folder, lambda tensors: [t.mul_(size / 100) for n, t in tensors.items() if "lora_B" in n])
    out, name = tmp_path / "out", "model.layers.1.mlp.down_proj.weight"
    modalloy.merge(write_recipe(output={"form": "full", "dtype": dtype}), out)
    original = load_file(base / "model.safetensors")[name]
    assert not torch.equal(load_file(out / "model.safetensors")[name], original.to(getattr(torch, dtype)))
    forged(out, lambda tensors: tensors[name].copy_(original))
    with pytest.raises(CheckpointError, match=f"{name} differs from what the recipe gives"):
        verify(out)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_verify_allows_for_rounding_where_updates_nearly_cancel(
    dtype: str, specialists: dict[str, Path], write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    image = load_file(specialists["image"] / "adapter_model.safetensors")
    edit_tensors(
        specialists["audio"],
        lambda tensors: [
            tensors[name].copy_(-0.95 * tensor if "lora_B" in name else tensor)
            for name, tensor in image.items()
            if ".default." in name
        ],
    )
    recipe = write_recipe(merge_method="task_arithmetic", output={"form": "adapter", "dtype": dtype})
    error = modalloy.merge(recipe, tmp_path / "out").verification.worst_error
    assert error is not None and error > 10 * torch.finfo(getattr(torch, dtype)).eps / 4


def test_verify_finds_fisher_files_that_are_named_from_the_recipe(
    write_recipe: WriteRecipe, specialists: dict[str, Path], tmp_path: Path
) -> None:
    save_file({f"{stem}.weight": torch.ones(shape) for stem, shape in SLOTS.items()}, tmp_path / "ones.safetensors")
    models = [{"model": str(path), "parameters": {"fisher": "ones.safetensors"}} for path in specialists.values()]
    recipe = write_recipe(models=models, merge_method="fisher", output={"form": "full"})
    modalloy.merge(recipe, tmp_path / "out")
    assert verify(tmp_path / "out").share == 1


@pytest.mark.gpu
def test_cuda_gives_what_the_cpu_gives(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        modalloy.merge(write_recipe(), tmp_path / device, device=device)
    for stem in SLOTS:
        found = []
        for device in ("cpu", "cuda"):
            written = load_file(tmp_path / device / "adapter_model.safetensors")
            name = f"base_model.model.{stem}"
            found.append(written[f"{name}.lora_B.weight"] @ written[f"{name}.lora_A.weight"])
        torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", sorted(name for name in METHODS if METHODS[name].gets({}) != "dense"))
def test_every_low_rank_method_makes_a_verified_adapter(method: str, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    modalloy.merge(write_recipe(merge_method=method), tmp_path / "out")
    assert verify(tmp_path / "out").worst_error < 2e-5
    rank = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"]
    assert rank == (4 if METHODS[method].one_rank or method == "ssam" else 8)

"""Inspecting a merge: every figure against dense float64 NumPy, every finding provoked and absent, the page by itself."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import SLOTS, edit_tensors, write_compose
from safetensors.torch import load_file, save_file
from test_cli import run

import modalloy
import modalloy.inspection.page as report
import modalloy.inspection.text as tables
from modalloy.errors import CheckpointError, ModalloyError, OutputError
from modalloy.files import new_file
from modalloy.inspection import measure as module
from modalloy.inspection.advice import advise
from modalloy.inspection.figures import Finding, Inspection
from modalloy.inspection.findings import findings
from modalloy.inspection.measure import inspect
from modalloy.inspection.outliers import outliers

WriteRecipe = Callable[..., Path]
Run = Callable[..., str]

__all__ = ["run"]  # the fixture


def dense(folder: Path, stem: str) -> np.ndarray:
    tensors = load_file(folder / "adapter_model.safetensors")
    up, down = tensors[f"{stem}.lora_B.default.weight"], tensors[f"{stem}.lora_A.default.weight"]
    return 2.0 * up.double().numpy() @ down.double().numpy()  # alpha / r


def scale_up(factor: float, stem: str = "") -> Callable[[dict[str, torch.Tensor]], None]:
    """An edit that multiplies a specialist's text updates, all or of one weight."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.startswith(stem) and ".lora_B.default." in name:
                tensors[name] = tensors[name] * factor

    return change


def three_of_rank(k: int, tmp_path: Path, write_recipe: WriteRecipe, **changes: Any) -> tuple[Path, dict[str, Path]]:
    """A recipe for three specialists of ranks 4, 3 and 5."""
    folders = {}
    for index, rank in enumerate((4, 3, 5)):
        folders[f"s{index}"] = write_compose(tmp_path / f"s{index}", "vision", seed=10 + index, rank=rank)
    models = [{"model": str(path), "parameters": {"weight": 1.0 + i}} for i, path in enumerate(folders.values())]
    return write_recipe(models=models, parameters={"rank": k}, **changes), folders


@pytest.mark.parametrize("k", [2, 6])
def test_figures_are_those_of_the_dense_updates(k: int, tmp_path: Path, write_recipe: WriteRecipe) -> None:
    recipe, folders = three_of_rank(k, tmp_path, write_recipe)
    inspection = inspect(recipe)
    assert {slot.name for slot in inspection.slots} == {f"{stem}.weight" for stem in SLOTS}
    for slot in inspection.slots:
        stem = slot.name.removesuffix(".weight")
        updates = [(1.0 + i) * dense(path, stem) for i, path in enumerate(folders.values())]
        u = np.linalg.svd(sum(d @ d.T for d in updates))[0][:, :k]
        v = np.linalg.svd(sum(d.T @ d for d in updates))[0][:, :k]
        svds = [np.linalg.svd(d) for d in updates]
        norms = [np.sqrt((d**2).sum()) for d in updates]
        for found, d, norm, svd in zip(slot.updates, updates, norms, svds, strict=True):
            values = svd[1][: found.rank]
            p = values / values.sum()
            close(found.norm, norm)
            close(found.singular_values, values)
            close(found.stable_rank, (values**2).sum() / values[0] ** 2)
            close(found.effective_rank, np.exp(-(p * np.log(p)).sum()))
            close(found.kept, ((u @ u.T @ d @ v @ v.T) ** 2).sum() / norm**2)
        for pair, (i, j) in zip(slot.pairs, [(0, 1), (0, 2), (1, 2)], strict=True):
            ranks = [min(k, slot.updates[x].rank or 0) for x in (i, j)]
            left = [svds[x][0][:, :r] for x, r in zip((i, j), ranks, strict=True)]
            right = [svds[x][2][:r].T for x, r in zip((i, j), ranks, strict=True)]
            close(pair.cosine, (updates[i] * updates[j]).sum() / (norms[i] * norms[j]))
            close(pair.left_overlap, ((left[0].T @ left[1]) ** 2).sum() / min(ranks))
            close(pair.right_overlap, ((right[0].T @ right[1]) ** 2).sum() / min(ranks))
            assert (pair.left_chance, pair.right_chance) == (max(ranks) / slot.shape[0], max(ranks) / slot.shape[1])
            product = updates[i] * updates[j]  # all rows: these weights have fewer than SAMPLED_ROWS
            assert pair.sign_conflict == pytest.approx((product < 0).mean(), abs=2 / product.size)
            assert pair.sign_conflict_mass == pytest.approx(-product[product < 0].sum() / abs(product).sum(), rel=1e-5)
        total = sum(updates)
        assert isinstance(total, np.ndarray)
        close(slot.coherence, np.linalg.norm(total) / sum(norms))
        close(slot.merged_norm, np.linalg.norm(u @ u.T @ total @ v @ v.T) / 3)
        close(slot.merged_over_mean, np.linalg.norm(u @ u.T @ total @ v @ v.T) / np.linalg.norm(total))


def close(found: Any, wanted: Any) -> None:
    """To float32's precision, in which factors are scaled by their specialist's weight."""
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)


def test_energy_curves_are_those_of_a_and_b(tmp_path: Path, write_recipe: WriteRecipe) -> None:
    recipe, folders = three_of_rank(3, tmp_path, write_recipe)
    for slot in inspect(recipe).slots:
        stem = slot.name.removesuffix(".weight")
        updates = [(1.0 + i) * dense(path, stem) for i, path in enumerate(folders.values())]
        gram_a, gram_b = sum(d @ d.T for d in updates), sum(d.T @ d for d in updates)
        u, a, _ = np.linalg.svd(gram_a)
        v, b, _ = np.linalg.svd(gram_b)
        assert slot.curve_k == tuple(range(1, 13)) and slot.k_for_energy is not None
        close(slot.left_energy, (a.cumsum() / a.sum())[:12])
        close(slot.right_energy, (b.cumsum() / b.sum())[:12])
        for share, needed in slot.k_for_energy.items():
            wanted = max(int((e.cumsum() / e.sum() >= float(share)).argmax()) + 1 for e in (a, b))
            assert needed == wanted
        for found, d in zip(slot.updates, updates, strict=True):
            kept = [np.linalg.norm(u[:, :k].T @ d @ v[:, :k]) ** 2 / np.linalg.norm(d) ** 2 for k in slot.curve_k]
            close(found.kept_curve, kept)


def test_k_may_be_chosen_by_energy_per_layer(write_recipe: WriteRecipe, specialists: dict[str, Path]) -> None:
    for slot in inspect(write_recipe(parameters={"rank": {"energy": 0.9}})).slots:
        assert slot.k_for_energy is not None and slot.k == slot.k_for_energy["0.90"] < 8


def test_balanced_and_matched_merges_are_measured(
    tmp_path: Path, write_recipe: WriteRecipe, specialists: dict[str, Path]
) -> None:
    edit_tensors(specialists["audio"], scale_up(20.0))
    rank = {"energy": 0.7}
    for balance, match in (("subspace", "none"), ("updates", "none"), ("subspace", "norm"), ("updates", "norm")):
        recipe = write_recipe(parameters={"rank": rank, "balance": balance, "match": match})
        inspection = inspect(recipe)
        assert ("dominates" in codes(inspection)) == (balance == "subspace")
        for slot in inspection.slots:
            deltas = [dense(path, slot.name.removesuffix(".weight")) for path in specialists.values()]
            scale = 1.0 if match == "norm" else 0.5
            close(slot.merged_norm, np.linalg.norm(reference.ssam(deltas, 0.7, scale, balance, match)))
            units = [d / np.linalg.norm(d) for d in deltas]
            u, v = (reference.top(a, slot.k or 0) for a in (sum(d @ d.T for d in units), sum(d.T @ d for d in units)))
            close([update.kept for update in slot.updates], [np.linalg.norm(u.T @ d @ v) ** 2 for d in units])
            assert slot.k == max(
                reference.energy_rank(a, 0.7) for a in (sum(d @ d.T for d in units), sum(d.T @ d for d in units))
            )
    merged = modalloy.merge(recipe, tmp_path / "out")
    assert merged.verification.worst_error is not None and merged.verification.worst_error < 1e-5
    planned = modalloy.plan(modalloy.load_recipe(recipe))
    assert "balance=updates, match=norm" in planned.summary() and "λ=1," in planned.summary()


def test_another_method_is_measured_at_ssams_k(write_recipe: WriteRecipe, specialists: dict[str, Path]) -> None:
    inspection = inspect(write_recipe(merge_method="task_arithmetic"))
    assert "task_arithmetic projects nothing" in inspection.k_of
    for slot in inspection.slots:
        total = sum(dense(path, slot.name.removesuffix(".weight")) for path in specialists.values())
        assert slot.k == 4
        close(slot.merged_norm, np.linalg.norm(total))
        close(slot.merged_over_mean, 2.0)


def test_full_models_are_measured_on_their_dense_deltas(base: Path, tmp_path: Path, write_recipe: WriteRecipe) -> None:
    original = load_file(base / "model.safetensors")
    tuned = []
    for index in range(2):
        folder = tmp_path / f"tuned{index}"
        folder.mkdir()
        torch.manual_seed(index)
        tuned.append({name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in original.items()})
        save_file(tuned[-1], folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text((base / "config.json").read_text())
    models = [{"model": str(tmp_path / f"tuned{index}")} for index in range(2)]
    recipe = write_recipe(models=models, parameters={"rank": 6}, output={"form": "full"})
    for slot in inspect(recipe).slots:
        updates = [(t[slot.name].double() - original[slot.name].double()).numpy() for t in tuned]
        u = np.linalg.svd(sum(d @ d.T for d in updates))[0][:, :6]
        v = np.linalg.svd(sum(d.T @ d for d in updates))[0][:, :6]
        for found, d in zip(slot.updates, updates, strict=True):
            assert found.rank is None
            np.testing.assert_allclose(found.singular_values, np.linalg.svd(d)[1], rtol=1e-4)
            np.testing.assert_allclose(found.kept, np.linalg.norm(u.T @ d @ v) ** 2 / np.linalg.norm(d) ** 2, rtol=1e-4)
        assert slot.merged_norm == pytest.approx(np.linalg.norm(u.T @ sum(updates) @ v) / 2, rel=1e-4)


def test_dense_weights_above_the_limit_keep_norms_and_say_so(
    base: Path, tmp_path: Path, write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DENSE_LIMIT", 40)  # below the 48 of the feed-forward weights
    folder = tmp_path / "tuned"
    folder.mkdir()
    original = load_file(base / "model.safetensors")
    tuned = {name: tensor + 0.1 for name, tensor in original.items()}
    save_file(tuned, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((base / "config.json").read_text())
    inspection = inspect(write_recipe(models=[{"model": str(folder)}], output={"form": "full"}))
    omitted = [slot for slot in inspection.slots if slot.k is None]
    assert {slot.module.rpartition(".")[2] for slot in omitted} == {"gate_proj", "up_proj", "down_proj"}
    for slot in omitted:
        assert slot.updates[0].norm == pytest.approx(0.1 * np.sqrt(np.prod(slot.shape)), rel=1e-4)
        assert slot.updates[0].singular_values is None and slot.merged_norm is None
    assert codes(inspection)["spectra_omitted"].slots == tuple(slot.name for slot in omitted)
    assert "–" in tables.text(inspection) and "figures" in report.page(inspection)


def test_rows_are_sampled_by_the_weights_name(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = module._sampled_rows("model.layers.0.mlp.up_proj.weight", 1000)
    assert len(rows) == 256 == len(set(rows.tolist())) and rows.tolist() == sorted(rows.tolist()) and rows.max() < 1000
    assert torch.equal(rows, module._sampled_rows("model.layers.0.mlp.up_proj.weight", 1000))
    assert not torch.equal(rows, module._sampled_rows("model.layers.1.mlp.up_proj.weight", 1000))
    assert module._sampled_rows("any", 7).tolist() == list(range(7))


# --- findings


def codes(inspection: Inspection) -> dict[str, Finding]:
    assert len({f.code for f in inspection.findings}) == len(inspection.findings)
    return {finding.code: finding for finding in inspection.findings}


def test_a_usual_merge_has_no_findings(write_recipe: WriteRecipe) -> None:
    inspection = inspect(write_recipe(parameters={"rank": 6}))
    assert inspection.findings == () and inspection.verdict == "nothing looks wrong"


def test_advice_follows_the_cosine(tmp_path: Path, write_recipe: WriteRecipe, specialists: dict[str, Path]) -> None:
    """Updates with little in common are not to be thinned; what is shared is not to be counted twice."""
    apart = inspect(write_recipe(parameters={"rank": 6}))
    advice = advise(apart.slots)
    assert advice is not None and advice.method == "tsv, or ssam with match: norm" and "thins" in advice.reasons[0]
    assert apart.to_dict()["advice"]["scale"] == advice.scale and advice.sureness in advice.line
    assert f"advice   {advice.line}" in tables.text(apart) and "<b>advice</b>" in report.page(apart)
    models = [{"model": str(specialists["image"])}, {"model": str(write_compose(tmp_path / "one", "vision", seed=1))}]
    shared = advise(inspect(write_recipe(models=models)).slots)
    assert shared is not None and shared.scale == "λ = 1/2" and "2 times" in shared.reasons[0]
    assert advise(inspect(write_recipe(models=models[:1])).slots) is None


@pytest.mark.parametrize(("factor", "found"), [(4.0, False), (20.0, True), (-20.0, True)])
def test_dominating_specialist(
    factor: float, found: bool, write_recipe: WriteRecipe, specialists: dict[str, Path]
) -> None:
    edit_tensors(specialists["audio"], scale_up(factor))
    inspection = inspect(write_recipe(parameters={"rank": 6}))
    assert ("dominates" in codes(inspection)) == found
    if found:
        ratio = inspection.specialists[1].norm / inspection.specialists[0].norm
        assert codes(inspection)["dominates"].specialists == ("audio",)
        assert f"{ratio:.1f} times as large" in codes(inspection)["dominates"].message
        assert "warning" in inspection.verdict


def test_copies_and_opposites(tmp_path: Path, write_recipe: WriteRecipe, specialists: dict[str, Path]) -> None:
    one = write_compose(tmp_path / "one", "vision", seed=1)
    models = [{"model": str(specialists["image"])}, {"model": str(one)}]
    finding = codes(inspect(write_recipe(models=models)))["near_duplicate"]
    assert finding.specialists == ("vision-damc", "one") and len(finding.slots) == 14
    edit_tensors(one, scale_up(-1.0, "model.layers.1.mlp.up_proj"))
    found = codes(inspect(write_recipe(models=models)))
    assert len(found["near_duplicate"].slots) == 13
    assert found["opposed"].slots == ("model.layers.1.mlp.up_proj.weight",) and "-1.00" in found["opposed"].message
    edit_tensors(one, scale_up(-1.0))  # exact cancellation of 13 weights
    inspection = inspect(write_recipe(models=models))
    assert min(slot.coherence for slot in inspection.slots if slot.coherence is not None) == 0


def test_k_that_loses_or_keeps_everything(write_recipe: WriteRecipe, specialists: dict[str, Path]) -> None:
    edit_tensors(specialists["audio"], scale_up(3.0))
    found = codes(inspect(write_recipe(parameters={"rank": 2})))
    assert found["k_loses"].specialists == ("image",) and "k_keeps_all" not in found
    slots = {slot.name: slot for slot in inspect(write_recipe(parameters={"rank": 2})).slots}
    kept = [slots[name].updates[0].kept or 0.0 for name in found["k_loses"].slots]
    assert kept == sorted(kept) and kept[-1] < 0.5
    assert "k_loses" not in codes(inspect(write_recipe(parameters={}, merge_method="average")))  # nothing is projected
    assert len(codes(inspect(write_recipe(parameters={"rank": 8})))["k_keeps_all"].slots) == 14


def test_untrained_and_absent_updates(write_recipe: WriteRecipe, specialists: dict[str, Path]) -> None:
    edit_tensors(specialists["audio"], scale_up(0.0, "model.layers.0"))

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.1.mlp.up_proj.")]:
            del tensors[name]

    edit_tensors(specialists["audio"], drop)
    inspection = inspect(write_recipe(missing="zero", parameters={"rank": 6}))
    found = codes(inspection)
    assert found["zero_update"].specialists == ("audio",) and len(found["zero_update"].slots) == 7
    assert found["no_update"].slots == ("model.layers.1.mlp.up_proj.weight",)
    zero = next(slot for slot in inspection.slots if slot.layer == 0)
    assert zero.updates[1].norm == 0 and zero.updates[1].kept is None and zero.pairs[0].cosine is None
    assert json.dumps(inspection.to_dict(), allow_nan=False) and report.page(inspection)


def test_all_updates_zero(write_recipe: WriteRecipe, specialists: dict[str, Path]) -> None:
    for folder in specialists.values():
        edit_tensors(folder, scale_up(0.0))
    inspection = inspect(write_recipe())
    assert [f.code for f in inspection.findings] == ["zero_update", "zero_update"]
    assert all(slot.merged_norm == 0 and slot.coherence is None for slot in inspection.slots)
    assert report.page(inspection) and tables.text(inspection)


def test_uneven_layers(write_recipe: WriteRecipe, specialists: dict[str, Path]) -> None:
    slots = list(inspect(write_recipe(parameters={"rank": 6})).slots)
    layers = [replace(slot, name=f"{slot.name}.{copy}") for slot in slots for copy in range(3)]
    facts = inspect(write_recipe(parameters={"rank": 6})).specialists
    assert findings(facts, layers, projects=True) == []
    far = replace(layers[0], updates=tuple(replace(u, norm=u.norm / 11) for u in layers[0].updates))
    found = findings(facts, [far, *layers[1:]], projects=True)
    assert [f.code for f in found] == ["uneven_layers"] * 2 and found[0].slots == (layers[0].name,)


def test_what_is_unlike_a_training_is_found(write_recipe: WriteRecipe, specialists: dict[str, Path]) -> None:
    inspection = inspect(write_recipe(parameters={"rank": 6}))
    facts, slots = inspection.specialists, list(inspection.slots)
    assert outliers(facts, slots) == []
    large = replace(slots[3], updates=tuple(replace(u, norm=20 * u.norm) for u in slots[3].updates))
    found = outliers(facts, [*slots[:3], large, *slots[4:]])
    assert [one.code for one in found] == ["single_weight"] * 2 and found[0].slots == (slots[3].name,)
    broad = [replace(s, updates=tuple(replace(u, stable_rank=3.0) for u in s.updates)) for s in slots]
    sharp = replace(broad[0], updates=(replace(broad[0].updates[0], stable_rank=1.05), *broad[0].updates[1:]))
    (one,) = outliers(facts, [sharp, *broad[1:]])
    assert one.code == "single_direction" and one.specialists == (facts[0].label,) and "95%" in one.message
    edges = [replace(s, updates=tuple(replace(u, stable_rank=1.0) for u in s.updates)) for s in slots]
    assert outliers(facts, edges) == []  # of rank 1 by design
    three = (*facts, replace(facts[0], label="third", norm=facts[0].norm / 9))
    assert [one.code for one in outliers(three, slots)] == ["faint"]


def test_a_model_that_changes_only_its_embeddings_is_found(
    base: Path, tmp_path: Path, write_recipe: WriteRecipe
) -> None:
    folders = {}
    for name, part in {"table": "embed_tokens", "tuned": "proj"}.items():
        folders[name] = tmp_path / name
        shutil.copytree(base, folders[name])
        tensors = load_file(base / "model.safetensors")
        changed = {key: one + 0.01 if part in key else one for key, one in tensors.items()}
        save_file(changed, folders[name] / "model.safetensors", {"format": "pt"})
    models = [{"model": str(folder)} for folder in folders.values()]
    found = codes(
        inspect(write_recipe(models=models, merge_method="task_arithmetic", parameters={}, output={"form": "full"}))
    )
    assert found["only_tokens"].specialists == ("table",)
    assert found["only_tokens"].slots == ("model.embed_tokens.weight",)


def test_one_specialist(write_recipe: WriteRecipe, specialists: dict[str, Path]) -> None:
    inspection = inspect(write_recipe(models=[{"model": str(specialists["image"])}]))
    assert all(slot.pairs == () and slot.updates[0].kept == pytest.approx(1) for slot in inspection.slots)
    assert "pair" not in tables.text(inspection) and "Conflict between" not in report.page(inspection)


def test_damaged_input_is_refused(write_recipe: WriteRecipe, specialists: dict[str, Path]) -> None:
    edit_tensors(specialists["image"], scale_up(float("nan")))
    with pytest.raises(CheckpointError, match=r"image specialist.*NaN"):
        inspect(write_recipe())


# --- the report


def test_json_has_a_stable_schema(run: Run, write_recipe: WriteRecipe) -> None:
    found = json.loads(run("inspect", write_recipe(parameters={"rank": 2}), "--json"))
    assert found.keys() == {
        "method", "parameters", "base", "k_of", "specialists", "slots", "findings", "advice", "verdict"
    }  # fmt: skip
    assert found["specialists"][0].keys() == {"label", "modality", "layout", "rank", "weight", "norm"}
    slot = found["slots"][0]
    assert slot.keys() == {
        "name", "layer", "module", "shape", "k", "updates", "pairs", "curve_k", "left_energy", "right_energy",
        "k_for_energy", "coherence", "merged_norm", "merged_over_mean",
    }  # fmt: skip
    assert slot["updates"][0].keys() == {
        "specialist", "rank", "norm", "singular_values", "stable_rank", "effective_rank", "kept", "kept_curve"
    }  # fmt: skip
    assert slot["pairs"][0].keys() == {
        "specialists", "cosine", "left_overlap", "left_chance", "right_overlap", "right_chance", "sign_conflict",
        "sign_conflict_mass",
    }  # fmt: skip
    assert found["findings"][0].keys() == {"level", "code", "message", "specialists", "slots"}
    assert found["advice"].keys() == {"method", "scale", "rank", "reasons", "sureness"}
    assert (slot["name"], slot["layer"]) == ("model.layers.0.self_attn.q_proj.weight", 0)
    assert slot["module"] == "model.layers.*.self_attn.q_proj"


def test_figures_do_not_depend_on_workers(write_recipe: WriteRecipe) -> None:
    recipe = write_recipe()
    one, three = inspect(recipe, jobs=1), inspect(recipe, jobs=3)
    assert one == three
    assert report.page(one) == report.page(three)


def test_page_holds_everything_and_loads_nothing(write_recipe: WriteRecipe) -> None:
    from plotly.offline import get_plotlyjs

    inspection = inspect(write_recipe())
    page = report.page(inspection)
    assert page.count(get_plotlyjs()) == 1
    own = page.replace(get_plotlyjs(), "")
    assert "default-src 'none'" in own and "http://" not in own and "https://" not in own
    assert "form-action 'none'" in own and "modeBarButtons" in own  # plotly's usual buttons would upload the chart
    assert not re.search(r"<(link|img|iframe|script)[^>]*\b(src|href)=", own)
    figures, _ = json.JSONDecoder().raw_decode(own, own.index('id="figures">') + len('id="figures">'))
    drawn = [number for figure in figures for view in figure["views"].values() for number in numbers(view["data"])]
    for slot in inspection.slots:
        wanted = [u.norm for u in slot.updates] + [p.cosine for p in slot.pairs] + [p.left_overlap for p in slot.pairs]
        wanted += [value for u in slot.updates for value in (*(u.singular_values or ()), *(u.kept_curve or ()))]
        assert {float(f"{value:.5g}") for value in wanted if value is not None} <= set(drawn)
    for figure in figures:  # every choice that can be made for these weights has its view
        sizes = [len(choice["options"]) for choice in figure["choices"]]
        assert len(figure["views"]) == np.prod(sizes)


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [value] if isinstance(value, float) else []


def test_names_cannot_become_markup(tmp_path: Path, write_recipe: WriteRecipe) -> None:
    names = ["<script>x()</script>", "<b>a</b>"]  # "/" makes these nested folders
    models = [{"model": str(write_compose(tmp_path / name, "vision", seed=i))} for i, name in enumerate(names)]
    inspection = inspect(write_recipe(models=models))
    label = replace(inspection.specialists[0], label="<img src=x></script><!--")
    own = report.page(replace(inspection, specialists=(label, inspection.specialists[1]), slots=()))
    assert "<img src=x>" not in own and "</script><!--" not in own


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("", "is a folder; name a file in it"),
        ("there.html", "already exists; choose another file, or replace it with --overwrite"),
        ("missing/report.html", "the folder .*missing does not exist"),
        ("there.html/report.html", "a part of the path is a file|does not exist"),
        (f"{'x' * 300}.html", "the name is too long"),
        ("/proc/report.html", "no file can be made in /proc|permission denied"),
    ],
)
def test_targets_that_are_refused(place: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "there.html").write_text("mine")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OutputError, match=message), new_file(tmp_path / place):
        pytest.fail("entered")
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "there.html").read_text() == "mine"


def test_a_failure_leaves_the_old_page(tmp_path: Path) -> None:
    path, old = tmp_path / "report.html", "<!DOCTYPE html><title>modalloy inspect · old</title>"
    path.write_text(old)
    with pytest.raises(ModalloyError), new_file(path, overwrite=True) as write:
        write("new")
        raise ModalloyError("stop")
    assert path.read_text() == old and list(tmp_path.iterdir()) == [path]
    with new_file(path, overwrite=True) as write:
        write("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with pytest.raises(OutputError, match="the disk is full"), new_file(tmp_path / "report.html") as write:
        monkeypatch.setattr(os, "write", full)
        write("new")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(PermissionError), new_file(tmp_path / "report.html"):
        raise PermissionError(errno.EACCES, "of an input: not to be blamed on the page")


def test_without_plotly_only_the_page_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    report.require_plotly()
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OutputError, match=r"pip install 'modalloy\[report\]'"):
        report.require_plotly()


def test_command(run: Run, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe, page = write_recipe(parameters={"rank": 2}), tmp_path / "report.html"
    shown = run("inspect", recipe)
    rows = [line.split()[:2] for line in shown.splitlines()]
    assert ["self_attn.q_proj", "image"] in rows and ["mlp.down_proj", "audio"] in rows
    assert "warning  image: k keeps less than 50% of its energy" in shown and "verdict  " in shown
    assert run("inspect", recipe, "-o", page).endswith(f"wrote    {page}\n")
    first = page.read_bytes()
    assert json.loads(run("inspect", recipe, "-o", page, "--overwrite", "--json"))["slots"]
    assert page.read_bytes() == first


def test_tables_hold_medians(write_recipe: WriteRecipe) -> None:
    inspection = inspect(write_recipe())
    (_, updates), (_, pairs) = tables.tables(inspection)
    assert len(updates) == 14 and len(pairs) == 7
    slots = [slot for slot in inspection.slots if slot.module.endswith("v_proj")]
    norms = [slot.updates[1].norm for slot in slots]
    row = next(row for row in updates if row[:2] == ["self_attn.v_proj", "audio"])
    assert row[2:4] == ["2", f"{np.median(norms):.3g} ({min(norms):.3g}–{max(norms):.3g})"]


def test_kinds_of_weight_are_named_without_what_they_share() -> None:
    assert module._layer("model.layers.11.mlp.up_proj.weight") == (11, "model.layers.*.mlp.up_proj")
    assert module._layer("blocks.2.experts.5.w1.weight") == (2, "blocks.*.experts.5.w1")
    assert module._layer("head.dense.weight") == (None, "head.dense")

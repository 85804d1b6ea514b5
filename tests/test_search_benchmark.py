"""benchmarks/search.py on tiny models: its merges, its figures against numbers worked out by hand, its one document, its page."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import LINEARS, SLOTS, write_compose
from PIL import Image
from safetensors.torch import load_file, save_file

from modalloy.evals.benchmark import Sample
from modalloy.planning.planner import plan
from modalloy.recipe import load_recipe
from modalloy.search.comparing import DEFAULT
from modalloy.search.found import Found, Sweep
from modalloy.search.space import Axis
from modalloy.specialists.layouts import open_specialist

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import search

    return search


@pytest.fixture
def folder(tmp_path: Path, base: Path) -> Path:
    """A recipe of two specialists, pictures, and a LoRA of text alone."""
    models = [
        {"model": str(write_compose(tmp_path / f"{disk}-damc", disk, seed=seed)), "modality": modality}
        for seed, (disk, modality) in enumerate({"vision": "image", "audio": "audio"}.items())
    ]
    recipe = {"base_model": str(base), "merge_method": "ssam", "models": models, "output": {"form": "omni"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for index in range(6):
        pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    (tmp_path / "lora").mkdir()
    draw = torch.Generator().manual_seed(3)
    tensors = {
        f"base_model.model.{slot}.lora_{side}.weight": torch.randn(shape, generator=draw)
        for slot, (rows, columns) in SLOTS.items()
        for side, shape in (("A", (2, columns)), ("B", (rows, 2)))
    }
    save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": [name.split(".")[1] for name in LINEARS]}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    return tmp_path


def test_a_skill_is_added_to_a_specialists_text_update(bench: Any, folder: Path) -> None:
    made = bench.skilled(folder / "vision-damc", folder / "lora", folder / "skilled")
    own, skill, both = (open_specialist(folder / name) for name in ("vision-damc", "lora", "skilled"))
    for slot, update in both.text_lora.items():
        one, other, sum_of = (s.text_lora[slot] for s in (own, skill, both))
        wanted = sum(
            update.scale * (s.read(update.b).double() @ s.read(update.a).double())
            for s, update in ((own, one), (skill, other))
        )
        found = sum_of.scale * (both.read(sum_of.b).double() @ both.read(sum_of.a).double())
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6), slot
    for slot, update in both.modality_lora.items():
        one = own.modality_lora[slot]
        found = update.scale * (both.read(update.b) @ both.read(update.a))
        assert torch.allclose(found, one.scale * (own.read(one.b) @ own.read(one.a)), rtol=1e-5, atol=1e-7)
    assert (
        load_file(made / "adapter_model.safetensors").keys()
        == load_file(folder / "vision-damc" / "adapter_model.safetensors").keys()
    )


def test_the_merges(bench: Any, folder: Path) -> None:
    recipe = load_recipe(folder / "recipe.yaml")
    merges = {name: plan(bench.merge_of(name, recipe, folder / "lora", folder / "out")) for name in bench.MERGES}
    assert [len(one.specialists) for one in merges.values()] == [2, 2, 2, 1, 2]
    assert [one.specialists[0].rank for one in merges.values()] == [4, 4, 6, 4, 4]
    assert merges["unequal norms"].merges()[0].weights == (4.0, 1.0) != merges["recipe"].merges()[0].weights
    with pytest.raises(bench.ModalloyError, match=r"gone: no such folder; make it with benchmarks/elements\.py --rank"):
        bench.merge_of("with a skill", recipe, folder / "gone", folder / "out")


def test_figures_are_of_the_labelled_questions(bench: Any, tmp_path: Path) -> None:
    axis = Axis("scale", (0.5, 1.0, 2.0))
    candidates, points = [{"scale": value} for value in axis.values], [(0,), (1,), (2,)]
    wrong = np.array([[0.0, 0, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1]])

    def sweep(loss: np.ndarray, **options: Any) -> Sweep:
        return Sweep([axis], candidates, points, loss, (1,), groups=["image"] * loss.shape[1], **options)

    truth = sweep(wrong.copy(), accuracy=[0.75, 0.5, 0.0])
    share = sweep(np.array([[0.4], [0.3], [0.9]]))
    cost = {"seconds": {"all": 2.0}}
    losses = {
        "kl": [[0.3], [0.2], [0.4]],
        "labels of the probes": [[0.1], [0.2], [0.3]],
        "consistency, sum": [[np.nan]] * 3,
    }
    found = {label: Found(tmp_path, {}, {}, [sweep(np.array(loss))], True, {}, cost) for label, loss in losses.items()}
    told = bench.compared("scale", truth, share, found, [("dog",), ("dog",), ("cat",), ()])
    assert told["best"] == 0.5 and told["default"] == 1.0
    kl, labels, none = told["objectives"].values()
    assert (
        kl["chosen"] == 1.0
        and kl["regret"] == 0.25
        and kl["over_default"] == 0
        and kl["spearman"] == pytest.approx(0.5)
    )
    assert kl["spearman_probability"] == pytest.approx(1) and kl["regret_ci95"][0] == 0 < kl["regret_ci95"][1]
    assert labels["regret"] == 0 and labels["over_default"] == 0.25 and none["chosen"] is None
    whole = bench.overall({"recipe": {"scale": told, "rank": told}})
    assert whole["kl"] == {"regret": 0.25, "over_default": 0, "spearman": pytest.approx(0.5), "spearman_probability":
                           pytest.approx(1), "worst_regret": 0.25, "seconds": 4.0}  # fmt: skip
    assert whole["consistency, sum"]["regret"] == 0.25  # the default is kept
    assert whole["consistency, sum"]["spearman"] is None
    assert len({len(row) for row in bench.rows_of(told)}) == 1


def test_from_questions_to_one_document(
    bench: Any, folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [
        Sample(
            id=f"{index} {text}",
            text=text,
            golds=("dog",),
            media=(("image", str(folder / f"{index}.png")),),
            choices=("dog", "cat", "yes"),
            options=("dog", "cat", "yes"),
            group={"cell": text},
            cluster=(str(index),),
        )
        for index in range(6)
        for text in ("what is this ?", "what do you see ?")
    ]
    unseen = [
        Sample(
            id="p",
            text="?",
            golds=("dog",),
            media=(("point", "gone.png"),),
            choices=("dog", "cat"),
            group={"cell": "p"},
        )
    ]
    monkeypatch.setattr(bench, "samples", lambda source: asked + unseen if source.variant == "validation" else [])
    objectives = ["kl", "option_agreement, weighted", "labels of the probes"]
    given = ["--data", folder, "--out", folder / "out", "--recipe", folder / "recipe.yaml", "--embedder", base]
    given += ["--merges", "recipe", "--axes", "scale", "--probes", 2, "--labelled", 3, "--objectives", *objectives]
    monkeypatch.setattr(sys, "argv", ["search.py", *map(str, given)])
    bench.main()
    first = capsys.readouterr().out
    document = json.loads(first.splitlines()[-1])
    scale = document["merges"]["recipe"]["scale"]
    assert scale["labelled"] == 2 * 3 and scale["default"] == 0.5 and list(scale["objectives"]) == objectives
    assert [value for value, _ in scale["accuracy"]] == [0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0]
    assert scale["objectives"]["kl"]["cost"]["scored"] == 4 + 7 * 4  # the specialist once, each candidate once
    assert document["best"] in objectives[:2] and set(document["overall"]) == set(objectives)

    monkeypatch.setattr("modalloy.search.asking.RoutedBench", None)  # a finished one loads no model
    bench.main()
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["merges"] == document["merges"]

    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import search_results

    page = search_results.page(document)
    kl = scale["objectives"]["kl"]
    assert f"**{document['best']}** loses least" in page and f"`--objective auto` is `{DEFAULT}`" in page
    assert f"| kl | {kl['chosen']:.4g} ({kl['in_bootstrap']:.0%}) | {kl['accuracy']:.3f} | {kl['regret']:.3f} (" in page
    assert page.count("\n| kl |") == page.count("\n| labels of the probes |") == 2 and "## recipe: λ" in page
    assert {len(line.split(" | ")) for line in page.splitlines() if line.startswith("| kl")} == {6, 7}

"""The reference models of `senses`: batches are drawn in turn, and the joint model's four folders average to the joint model."""

import hashlib
import json
import shutil
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import modalloy
from modalloy import builtin
from modalloy.evals import corpus, spoken
from modalloy.model import load_model
from modalloy.specialists.layouts import open_specialist

ROOT = Path(__file__).parents[1]
SENSES = ("image", "audio", "video", "point")
MEDIA = {"picture": ("image", "{}.webp"), "speech": ("audio", "{}.flac"), "shape": ("point", "{}.npy")}


def write_data(folder: Path) -> Path:
    """A `senses` data folder of two training files a kind; of speech, all that a lesson needs is said by the same two."""
    rows = []
    for kind, (modality, name) in MEDIA.items():
        for concept in ("cat", "cow") if kind != "shape" else ("car", "dog"):
            sample = builtin.SAMPLES / name.format(concept)
            path = Path(kind) / concept / f"own{sample.suffix}"
            (folder / path).parent.mkdir(parents=True)
            shutil.copyfile(sample, folder / path)
            phrase = f"a {concept}"
            texts = {concept: "word", spoken.is_this(phrase): "this", spoken.in_picture(phrase): "picture"}
            texts |= dict.fromkeys(spoken.FIXED, "fixed")
            for text, form in texts.items() if kind == "speech" else [("", "")]:
                rows.append(
                    {
                        **{"file": str(path), "kind": kind, "modality": modality, "split": "train", "family": "own"},
                        **{
                            "concept": concept,
                            "phrase": phrase,
                            "plural": False,
                            "also": [],
                            "text": text,
                            "form": form,
                        },
                        **{"category": "animal", "subgroup": "mammal", "source": f"own:{path}"},
                        **{
                            "package": "own",
                            "licence": "MIT",
                            "sha256": hashlib.sha256(str(path).encode()).hexdigest(),
                        },
                    }
                )
    (folder / "manifest.json").write_text(json.dumps(rows))
    return folder


def test_the_joint_models_folders_average_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "specialists"))
    import single_path

    data, out, start = write_data(tmp_path / "data"), tmp_path / "references" / "joint", tmp_path / "start"
    untrained, _ = single_path.build(SENSES, corpus.load(data))
    for modality in SENSES:
        single_path.save_specialist(untrained, modality, start / modality)
    options = (
        f"--modality all --data {data} --specialists {start} --out {out} --work {tmp_path / 'work'} --steps 2 --batch 1"
    )
    monkeypatch.setattr(sys, "argv", ["single_path.py", *options.split()])
    monkeypatch.setattr(single_path, "VIEWS", dict.fromkeys(SENSES, 1))
    trainers, loss = [], single_path.SinglePath.loss

    def noted(self: single_path.SinglePath, batch: list[Any]) -> torch.Tensor:
        trainers.append(self)
        return loss(self, batch)

    monkeypatch.setattr(single_path.SinglePath, "loss", noted)
    single_path.main()
    assert len(trainers) == 2
    batches = list(islice(trainers[0].batches(2, 0), 9))
    assert [batch[0].modality for batch in batches[:5]] == [*SENSES, "image"]
    assert list(islice(trainers[0].batches(2, 6), 3)) == batches[6:]  # where a run resumes

    parts = {modality: load_file(out / modality / "adapter_model.safetensors") for modality in SENSES}
    update = {name: tensor for name, tensor in parts["image"].items() if ".lora_" in name}
    assert len(update) == 2 * 210 and all(".default." in name for name in update)
    for modality, tensors in parts.items():
        specialist = open_specialist(out / modality)
        assert specialist.modality == modality and not specialist.modality_lora and specialist.rank == 8
        assert all(torch.equal(tensors[name], tensor) for name, tensor in update.items())
        shipped = load_file(start / modality / "adapter_model.safetensors")
        projector = [name for name in tensors if ".modal_projectors." in name]
        assert projector and all(torch.equal(tensors[name], shipped[name]) for name in projector)

    recipe = tmp_path / "recipes" / "joint.yaml"
    recipe.parent.mkdir()
    recipe.write_text((ROOT / "recipes" / "senses-joint.yaml").read_text().replace("../build/", "../"))
    modalloy.merge(recipe, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "adapter_model.safetensors")
    for stem in ("model.layers.0.self_attn.q_proj", "model.layers.29.mlp.down_proj"):
        up, down = (update[f"{stem}.lora_{side}.default.weight"].double() for side in "BA")
        found = merged[f"{stem}.lora_B.default.weight"].double() @ merged[f"{stem}.lora_A.default.weight"].double()
        assert up.norm() and (found - 2 * up @ down).norm() <= 1e-6 * (2 * up @ down).norm()

    question = [{"role": "user", "content": [{"type": "image", "path": str(builtin.SAMPLES / "cat.webp")}]}]
    alone, joint = (load_model(folder) for folder in (out / "image", tmp_path / "merged"))
    assert joint.modalities == SENSES and not any(joint.model.config.modalities[m]["update"] for m in SENSES)
    scores = alone.score_options(question, ["a cat", "a cow"])
    assert joint.score_options(question, ["a cat", "a cow"]) == pytest.approx(scores, abs=1e-3)
    assert alone.chat(question, max_new_tokens=2) == joint.chat(question, max_new_tokens=2)


def test_a_specialist_starts_from_writing_on_both_its_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`start.py` reads words alone, and what it trained is where a specialist's text and its own tokens begin."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "specialists"))
    import start
    import train

    data, out = write_data(tmp_path / "data"), tmp_path / "start.safetensors"
    for path in data.rglob("own*"):
        path.unlink()  # no medium is read
    options = f"--data {data} --out {out} --work {tmp_path / 'work'} --steps 3 --batch 1"
    monkeypatch.setattr(sys, "argv", ["start.py", *options.split()])
    start.main()
    stored = load_file(out)
    assert all(stored[name].abs().sum() > 0 for name in stored if ".lora_B." in name)
    for modality, around in (("point", "vision"), ("audio", "audio")):
        model, _ = train.build([modality], corpus.load(data))
        train.start_from(out, model, modality)
        for name, linear in model.linears.items():
            for side, letter in (("down", "A"), ("up", "B")):
                begun = stored[f"{name.removesuffix('.weight')}.lora_{letter}.default.weight"]
                assert torch.equal(getattr(linear, f"{side}_text"), begun)
                assert torch.equal(getattr(linear, f"{side}_{modality}"), begun)
        assert torch.equal(model.prefix_tokens[modality], stored[f"prefix_tokens.{around}"])

"""The built-in specialists: what ships, that they merge exactly, and that training resumes to the same bytes."""

import hashlib
import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from reference import ssam
from safetensors.torch import load_file

import modalloy
from modalloy import builtin
from modalloy.demo import questions
from modalloy.evals import senses
from modalloy.specialists.layouts import open_specialist
from modalloy.verify import verify

RECIPE = Path(__file__).parents[1] / "recipes" / "senses-ssam.yaml"
FREE = ("| MIT |", "| CC-BY-4.0 |", "| CC-BY-3.0 |", "| CC-BY-3.0-US |", "| Apache-2.0 |")
EXAMPLES = Path(__file__).parents[1] / "examples" / "specialists"


def test_what_ships_is_complete_and_small() -> None:
    assert builtin.specialists() == ["image", "audio", "video", "point"]
    total = 0
    for modality in builtin.specialists():
        folder = builtin.specialist(modality)
        specialist = open_specialist(folder)
        assert specialist.modality == modality and specialist.base_name == builtin.BASE
        assert len(specialist.text_lora) == len(specialist.modality_lora) == 210 and specialist.rank == 8
        assert {ref.dtype for ref in specialist.checkpoint.refs.values()} == {torch.bfloat16}
        card = (folder / "README.md").read_text()
        assert "## Held-out accuracy" in card and "| licence |" in card
        total += sum(path.stat().st_size for path in folder.iterdir())
    assert total < 60_000_000


def test_samples_are_attributed_and_free() -> None:
    listed = (builtin.SAMPLES / "LICENSES.md").read_text()
    samples = {path.relative_to(builtin.SAMPLES).as_posix() for path in builtin.SAMPLES.rglob("*.*")}
    rows = {line.split("|")[1].strip(): line for line in listed.splitlines() if line.startswith("| ")}
    media = samples - {"LICENSES.md", "demo/questions.json"}
    assert media and all(rows[name].rstrip().endswith(FREE) for name in media)


def test_the_demo_asks_aloud_and_no_sense_alone_tells() -> None:
    """What is asked is in the speech, and of yes and no as many are right; what is listed is there, in an encoder's length."""
    asked = questions()
    assert Counter(one.about for one in asked) == {"picture": 8, "movement": 6, "shape": 6}
    for one in asked:
        shown, heard = one.media
        assert heard == "audio" and shown in ("image", "video", "point")
        assert all((builtin.SAMPLES / name).is_file() for name in one.media.values())
        assert one.right in one.options and one.answered(f"{one.right}.") and not one.answered(" or ".join(one.options))
    for about in ("picture", "shape"):
        right = [one.right for one in asked if one.about == about]
        assert right.count("yes") == right.count("no") == len(right) // 2
        shown = {tuple(one.media.items())[:1]: one.right for one in asked if one.about == about}
        assert len(shown) == len(right) // 2  # each is shown twice, once with each answer


def test_the_real_merge_is_algorithm_1(tmp_path: Path) -> None:
    report = modalloy.merge(RECIPE, tmp_path / "merged")
    assert report.plan.merged_weights() == 210 and report.verification.worst_error < 1e-5
    assert verify(tmp_path / "merged").layers == 12
    written = load_file(tmp_path / "merged" / "adapter_model.safetensors")
    for slot in ("model.layers.0.self_attn.k_proj", "model.layers.29.self_attn.o_proj"):
        deltas = []
        for modality in builtin.specialists():
            stored = load_file(builtin.specialist(modality) / "adapter_model.safetensors")
            up, down = (stored[f"{slot}.lora_{side}.default.weight"].double() for side in "BA")
            deltas.append((2.0 * up @ down).numpy())
        wanted = torch.from_numpy(ssam(deltas, rank=8, scale=0.25))
        found = written[f"{slot}.lora_B.default.weight"].double() @ written[f"{slot}.lora_A.default.weight"].double()
        assert (found - wanted).norm() <= 2e-5 * wanted.norm()


def write_senses_data(folder: Path) -> Path:
    """A tiny `senses` data folder made of the samples: pictures and spoken questions, each to train on and to validate with."""
    kinds = {"picture": ("{}.webp", "{}"), "speech": ("{}.flac", "Is this a {}?")}
    rows = []
    for kind, (name, text) in kinds.items():
        for concept in ("cat", "cow", "dog", "horse"):
            sample = builtin.SAMPLES / name.format(concept)
            for split in ("train", "validation"):
                path = Path(kind) / concept / f"{split}{sample.suffix}"
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(sample, folder / path)
                rows.append(row(path, kind, concept, split, text.format(concept) if kind == "speech" else ""))
                if kind == "speech" and split == "train":  # the word alone
                    rows.append(row(path, kind, concept, split, concept, "word"))
    fixed = Path("speech/what-is-this.flac")
    shutil.copyfile(builtin.SAMPLES / fixed.name, folder / fixed)
    rows += [row(fixed, "speech", "", "train", text, "fixed") for text in ("What is this?", senses.HOW, senses.KIND)]
    (folder / "manifest.json").write_text(json.dumps(rows))
    return folder


def row(path: Path, kind: str, concept: str, split: str, text: str, form: str = "this") -> dict[str, object]:
    if not concept:
        return row(path, kind, "cat", split, text, form) | dict.fromkeys(
            ("concept", "phrase", "category", "subgroup"), ""
        )
    return {
        "file": str(path),
        "kind": kind,
        "modality": {"picture": "image", "speech": "audio"}[kind],
        **{"concept": concept, "phrase": f"a {concept}", "plural": False, "also": []},
        **{"category": "animal", "subgroup": "mammal", "split": split},
        "family": f"{kind} {split} {'one' if concept in ('cat', 'cow') else 'two'}",
        **{"form": form if text else "", "text": text, "source": f"own:{path}", "package": "own", "licence": "MIT"},
        "sha256": hashlib.sha256(str(path).encode()).hexdigest(),
    }


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_training_resumes_to_the_same_bytes(modality: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import train

    data = write_senses_data(tmp_path / "data")

    def run(name: str) -> bytes:
        out = tmp_path / name
        options = f"--modality {modality} --data {data} --out {out} --work {tmp_path / 'work' / name}"
        settings = "--align 3 --steps 1 2 --batch 2 --views 2 --save-every 1"
        monkeypatch.setattr(sys, "argv", ["train.py", *options.split(), *settings.split()])
        train.main()
        if modality == "image":
            assert "| choose | " in (out / "README.md").read_text()
            taught = sorted(path.name for path in (tmp_path / "work" / name).glob("without-*"))
            assert taught == ["without-picture train one.safetensors", "without-picture train two.safetensors"]
        return (out / "adapter_model.safetensors").read_bytes()

    undisturbed = run("undisturbed")
    steps = iter([False, False, True])
    loss = train.Trainer.loss

    def stop_at_third(self: train.Trainer, batch: list[object]) -> torch.Tensor:
        if next(steps, False):
            raise KeyboardInterrupt
        return loss(self, batch)

    monkeypatch.setattr(train.Trainer, "loss", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        run("interrupted")
    assert not (tmp_path / "interrupted").exists()
    assert run("interrupted") == undisturbed

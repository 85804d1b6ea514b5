"""A user's mistake is one line on stderr that names it and says what to do, exit code 2, and no trace on disk."""

import errno
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import SLOTS, edit_tensors, write_compose
from safetensors.torch import load_file, save_file
from torch import Tensor

import modalloy
from modalloy import cli
from modalloy.errors import CheckpointError, MediaError, OutputError
from modalloy.senses.media import load_audio, load_image
from modalloy.storage import staging
from modalloy.storage.inputs import Inputs
from modalloy.verify import verify

WriteRecipe = Callable[..., Path]
Refused = Callable[..., str]
Specialists = dict[str, Path]

STEM = "model.layers.1.mlp.down_proj"
LORA_A, LORA_B = (f"{STEM}.lora_{side}.default.weight" for side in "AB")


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every path below `folder`, hidden ones too, with the bytes of files."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def earlier_result(out: Path) -> None:
    out.mkdir()
    manifest = {"modalloy": "0.1", "outputs": {"adapter_model.safetensors": "0" * 64}}
    (out / "manifest.json").write_text(json.dumps(manifest))
    (out / "adapter_model.safetensors").write_bytes(b"earlier")


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must fail as a user's mistake and leave every file as it was; returns its one line."""

    def run(*arguments: object) -> str:
        before = snapshot(tmp_path)
        monkeypatch.setattr(sys, "argv", ["modalloy", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        printed = capsys.readouterr()
        assert stopped.value.code == 2
        assert printed.out == ""
        lines = printed.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), printed.err
        assert snapshot(tmp_path) == before
        return lines[0]

    return run


@pytest.fixture
def merge_refused(refused: Refused, tmp_path: Path) -> Refused:
    """`modalloy merge RECIPE` is refused with one line, with no OUT yet and with an earlier OUT to be replaced."""

    def run(recipe: Path, *options: str) -> str:
        out = tmp_path / "out"
        first = refused("merge", recipe, "-o", out, *options)
        earlier_result(out)
        assert refused("merge", recipe, "-o", out, "--overwrite", *options) == first
        return first

    return run


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def edit_config(folder: Path, name: str = "config.json", **changes: Any) -> None:
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(config | changes))


# ---------------------------------------------------------------------------------------------------------- recipes


def models(**changes: Any) -> dict[str, Any]:
    return {"models": [{"model": "vision-damc"} | changes]}


RECIPES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"merge_metod": "ssam"}, r"unknown key 'merge_metod'; did you mean 'merge_method'\? known here: "),
    "internal key": ({"folder": "."}, r"unknown key 'folder'; .*known here: base_model"),
    "unknown key of a model": (
        models(modallity="image"),
        r"unknown key 'models\.0\.modallity'; did you mean 'modality'",
    ),
    "unknown key of output": ({"output": {"from": "full"}}, r"unknown key 'output\.from'; did you mean 'form'"),
    "unknown parameter of a model": (
        models(parameters={"weigth": 1}),
        r"unknown key 'models\.0\.parameters\.weigth'; did you mean 'weight'",
    ),
    "unknown method": (
        {"merge_method": "sam"},
        r"unknown merge method 'sam'; did you mean 'ssam'\? known: arcee_fusion, average",
    ),
    "unknown parameter": ({"parameters": {"rnak": 4}}, r"method 'ssam' has no parameter 'rnak'; did you mean 'rank'"),
    "parameter of another method": (
        {"merge_method": "average", "parameters": {"rank": 4}},
        r"method 'average' has no parameter 'rank'; known: scale",
    ),
    "rank 0": ({"parameters": {"rank": 0}}, r"rank: 0 is not a whole number of at least 1"),
    "rank −1": ({"parameters": {"rank": -1}}, r"rank: -1 is not a whole number of at least 1"),
    "rank 1.5": ({"parameters": {"rank": 1.5}}, r"rank: 1\.5 is not a whole number"),
    "rank true": ({"parameters": {"rank": True}}, r"rank: True is not a whole number"),
    "rank x": ({"parameters": {"rank": "x"}}, r"rank: 'x' is not a whole number"),
    "rank list": ({"parameters": {"rank": [4, "x"]}}, r"rank: 'x' is not a whole number"),
    "rank energy 2": ({"parameters": {"rank": {"energy": 2}}}, r"energy 2 is not between 0 and 1; for example"),
    "rank energy nan": ({"parameters": {"rank": {"energy": float("nan")}}}, r"energy nan is not between 0 and 1"),
    "rank of another kind": (
        {"parameters": {"rank": {"enrgy": 0.9}}},
        r"rank: \{'enrgy': 0\.9\} is not a whole number",
    ),
    "scale nan": ({"parameters": {"scale": float("nan")}}, r"scale: nan is not a finite number; write for example"),
    "scale inf": ({"parameters": {"scale": float("inf")}}, r"scale: inf is not a finite number"),
    "scale x": ({"parameters": {"scale": "x"}}, r"scale: 'x' is not a finite number"),
    "scale without a point": (
        {"parameters": {"scale": "1e-3"}},
        r"scale: '1e-3' is not a finite number; .*in YAML 1\.0e-3",
    ),
    "scale beyond float64": (
        {"parameters": {"scale": 10**400}},
        r"not valid YAML \('10+…0+' is longer than any value, line",
    ),
    "scale true": ({"parameters": {"scale": True}}, r"scale: True is not a finite number"),
    "weight nan": (models(parameters={"weight": float("nan")}), r"models\.0\.parameters\.weight: .*finite"),
    "weight true": (models(parameters={"weight": True}), r"models\.0\.parameters\.weight: True is not a finite number"),
    "no models": ({"models": []}, r"models: .*at least 1 item"),
    "models that are no list": ({"models": "vision"}, r"models: .*found 'vision'"),
    "model without a place": ({"models": [{"modality": "image"}]}, r"the key 'models\.0\.model' is missing; add it"),
    "unknown modality": (models(modality="smell"), r"models\.0\.modality: unknown modality 'smell'; known: image"),
    "unknown form": ({"output": {"form": "gguf"}}, r"output\.form: no form 'gguf'; known: adapter, auto, full, omni"),
    "unknown dtype": ({"output": {"dtype": "int4"}}, r"output\.dtype: .*'bfloat16'.*found 'int4'"),
    "shard size 0": (
        {"output": {"max_shard_size": 0}},
        r"output\.max_shard_size: 0 is not a size; write for example 5GB",
    ),
    "shard size −1GB": ({"output": {"max_shard_size": "-1GB"}}, r"'-1GB' is not a size"),
    "shard size in words": ({"output": {"max_shard_size": "big"}}, r"'big' is not a size"),
    "base that is a number": ({"base_model": 7}, r"base_model: .*string.*found 7"),
}


@pytest.mark.parametrize(("changes", "message"), RECIPES.values(), ids=RECIPES)
def test_wrong_recipe(changes: dict[str, Any], message: str, write_recipe: WriteRecipe, merge_refused: Refused) -> None:
    assert_says(merge_refused(write_recipe(**changes)), rf"recipe\.yaml: .*{message}")


def assert_says(line: str, message: str) -> None:
    assert re.search(message, line), line


FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", r"not a recipe; it needs at least base_model: and models:"),
    "list": (b"- base_model\n- models\n", r"not a recipe; it needs at least"),
    "number": (b"7\n", r"not a recipe"),
    "invalid YAML": (b"base_model: [a, b\nmodels: }", r"not valid YAML \(.*line 2.*\); correct the file"),
    "tab": (b"models:\n\t- a\n", r"not valid YAML \(.*line 2"),
    "control character": (b"base_model: \x00\n", r"not valid YAML"),
    "tag": (
        b"base_model: !!python/object/apply:os.system [true]\n",
        r"not valid YAML \(the tag '!!python/\S+' does not fit",
    ),
    "impossible date": (
        b"base_model: 2024-13-45\n",
        r"not valid YAML \('2024-13-45' is read as a date; put",
    ),
    "key given twice": (b"models: []\nmodels: []\n", r"not valid YAML \('models' is given twice, line 2"),
    "too deep": (b"base_model: " + b"[" * 999, r"not valid YAML"),
    "not UTF-8": ("base_model: modèle\n".encode("latin-1"), r"cannot be read \(.*utf-8.*\); give a YAML file"),
    "key that is no word": (b"7: a\n", r"keys must be words"),
    "no base": (b"models: [{model: a}]\n", r"the key 'base_model' is missing; add it"),
}


@pytest.mark.parametrize(("content", "message"), FILES.values(), ids=FILES)
def test_file_that_is_no_recipe(content: bytes, message: str, tmp_path: Path, merge_refused: Refused) -> None:
    (tmp_path / "recipe.yaml").write_bytes(content)
    assert_says(merge_refused(tmp_path / "recipe.yaml"), rf"recipe\.yaml: .*{message}")


def test_missing_recipe(tmp_path: Path, merge_refused: Refused) -> None:
    assert_says(merge_refused(tmp_path / "absent.yaml"), r"absent\.yaml: no such recipe; check the path")


def test_recipe_that_is_a_folder(tmp_path: Path, merge_refused: Refused) -> None:
    (tmp_path / "folder").mkdir()
    assert_says(merge_refused(tmp_path / "folder"), r"folder: is a folder, where a file is expected")


# ------------------------------------------------------------------------------------------------------------- base


@pytest.fixture
def own_base(base: Path, tmp_path: Path) -> Path:
    """A copy of the base that a test may damage, as two shards and an index."""
    folder = tmp_path / "own-base"
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for part, chosen in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{part:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in chosen}, folder / file)
        weight_map |= dict.fromkeys(chosen, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def index_more(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.extra.weight"] = "model-00001-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def store_twice(folder: Path) -> None:
    first, second = (folder / f"model-{part:05d}-of-00002.safetensors" for part in (1, 2))
    tensors, others = load_file(first), load_file(second)
    name = next(iter(others))
    save_file(tensors | {name: others[name]}, first)


def poison_norm(folder: Path) -> None:
    for path in folder.glob("model-*.safetensors"):
        tensors = load_file(path)
        if "model.norm.weight" in tensors:
            tensors["model.norm.weight"][3] = float("nan")
            save_file(tensors, path)


BASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing folder": (shutil.rmtree, r"own-base: no such folder; correct the path in the recipe"),
    "no weights": (
        lambda folder: [path.unlink() for path in folder.glob("model*")],
        r"own-base: holds no weights \(looked for model\.safetensors / \.bin, pytorch_model",
    ),
    "missing shard": (
        lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(),
        r"model-00002-of-00002\.safetensors: listed in model\.safetensors\.index\.json but missing; download",
    ),
    "tensor in no shard": (index_more, r"the index lists model\.extra\.weight, which no shard holds; download"),
    "tensor in two shards": (store_twice, r"model-00002-of-00002\.safetensors: \S+ is also in model-00001-of-00002"),
    "index without a map": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}'),
        r"model\.safetensors\.index\.json: has no weight_map of file names; download",
    ),
    "index that is no JSON": (
        lambda folder: rewrite(folder / "model.safetensors.index.json", lambda data: data[:-5]),
        r"model\.safetensors\.index\.json: not valid JSON \(.*\); download the file again",
    ),
    "config that is no JSON": (
        lambda folder: (folder / "config.json").write_text("{'a': 1}"),
        r"own-base/config\.json: not valid JSON \(.*\); download the file again",
    ),
    "config that is a list": (
        lambda folder: (folder / "config.json").write_text("[]"),
        r"config\.json: not a JSON object",
    ),
    "config too deep": (
        lambda folder: (folder / "config.json").write_text("[" * 99999),
        r"config\.json: not valid JSON",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"own-base/config\.json: no such file; download"),
    "NaN": (
        poison_norm,
        r"base: model\.norm\.weight holds NaN or infinite values \(.*safetensors\); .*download it again",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BASES.values(), ids=BASES)
def test_damaged_base(
    damage: Callable[[Path], object], message: str, own_base: Path, write_recipe: WriteRecipe, merge_refused: Refused
) -> None:
    damage(own_base)
    recipe = write_recipe(base_model=str(own_base), output={"form": "full", "max_shard_size": "20KB"})
    assert_says(merge_refused(recipe), message)


def test_base_of_an_unknown_user(write_recipe: WriteRecipe, merge_refused: Refused) -> None:
    recipe = write_recipe(base_model="~no-such-user-here/base")
    assert_says(merge_refused(recipe), r"~no-such-user-here/base: no such folder; correct the path in the recipe")


def test_unknown_builtin(write_recipe: WriteRecipe, merge_refused: Refused) -> None:
    recipe = write_recipe(base_model="builtin:smollm")
    assert_says(
        merge_refused(recipe), r"no built-in model 'builtin:smollm'; did you mean 'builtin:smollm2-135m-instruct'"
    )


# ------------------------------------------------------------------------------------------------------ specialists


def weights(folder: Path) -> Path:
    return folder / "adapter_model.safetensors"


def cut(keep: Callable[[bytes], int]) -> Callable[[Path], None]:
    return lambda folder: rewrite(weights(folder), lambda data: data[: keep(data)])


def header_bytes(data: bytes) -> int:
    return 8 + int(struct.unpack("<Q", data[:8])[0])


def with_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Rewrites the JSON header of the weights and leaves the data."""

    def damage(folder: Path) -> None:
        data = weights(folder).read_bytes()
        header = json.loads(data[8 : header_bytes(data)])
        change(header)
        text = json.dumps(header).encode()
        weights(folder).write_bytes(struct.pack("<Q", len(text)) + text + data[header_bytes(data) :])

    return damage


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, change)


def poison(name: str, value: float) -> Callable[[Path], None]:
    return tensors(lambda stored: stored[name].view(-1).__setitem__(5, value))


def as_bin(content: object, **options: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        weights(folder).unlink()
        torch.save(content, folder / "adapter_model.bin", **options)

    return damage


SPECIALISTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing folder": (shutil.rmtree, r"vision-damc: no such folder; correct the path"),
    "folder that is a file": (
        lambda folder: (shutil.rmtree(folder), folder.write_text("x")),
        r"vision-damc: no such folder; correct the path of the image specialist in the recipe",
    ),
    "missing weights": (
        lambda folder: weights(folder).unlink(),
        r"vision-damc: holds no weights \(looked for .*adapter_model\.safetensors / \.bin\); correct the path",
    ),
    "missing config": (
        lambda folder: (folder / "config.json").unlink(),
        r"vision-damc/config\.json: no such file; download the folder again",
    ),
    "config that is no JSON": (
        lambda folder: (folder / "config.json").write_text('{"lora_r": 4'),
        r"vision-damc/config\.json: not valid JSON \(.*\); download the file again",
    ),
    "config that is not UTF-8": (
        lambda folder: (folder / "config.json").write_bytes(b'{"a": "\xe9"}'),
        r"vision-damc/config\.json: not valid JSON \(.*utf-8.*\); download the file again",
    ),
    "lora_r 0": (
        lambda folder: edit_config(folder, lora_r=0),
        r"config\.json: lora_r is 0, not a positive number; correct the file",
    ),
    "lora_alpha text": (
        lambda folder: edit_config(folder, lora_alpha="8"),
        r"config\.json: lora_alpha is '8', not a positive number",
    ),
    "lora_alpha inf": (
        lambda folder: edit_config(folder, lora_alpha=float("inf")),
        r"config\.json: lora_alpha is inf, not a positive number",
    ),
    "lora_r of another adapter": (
        lambda folder: edit_config(folder, lora_r=8),
        r"image specialist: \S+lora_A\S+ has rank 4, \S+config\.json implies 8; the two files do not belong together",
    ),
    "strategy of another file": (
        lambda folder: edit_config(folder, lora_strategy="same"),
        r"config\.json says lora_strategy 'same' but the file has a modality adapter; use matching files",
    ),
    "another width": (
        lambda folder: edit_config(folder, hidden_size=4096),
        r"image specialist was trained from a base with hidden_size 4096, .* has 32; use the right base",
    ),
    "0 bytes": (cut(lambda data: 0), r"adapter_model\.safetensors: not a complete safetensors file \(0 bytes\); download"),
    "7 bytes": (cut(lambda data: 7), r"adapter_model\.safetensors: not a complete safetensors file \(7 bytes\); download"),
    "8 bytes": (cut(lambda data: 8), r"adapter_model\.safetensors: not a complete safetensors file \(8 bytes\); download"),
    "cut in the header": (cut(lambda data: 100), r"not a complete safetensors file \(100 bytes\); download or copy it again"),
    "cut after the header": (cut(header_bytes), r"truncated: the header describes \d+ bytes, the file has \d+; download"),
    "cut in the data": (cut(lambda data: len(data) // 2), r"truncated: the header describes \d+ bytes, the file has \d+"),
    "last byte missing": (cut(lambda data: len(data) - 1), r"truncated: the header describes \d+ bytes, the file has \d+"),
    "one byte too many": (
        lambda folder: rewrite(weights(folder), lambda data: data + b"x"),
        r"too long: the header describes \d+ bytes, the file has \d+; download or copy it again",
    ),
    "text instead of weights": (
        lambda folder: weights(folder).write_text("version https://git-lfs.github.com/spec/v1\n"),
        r"adapter_model\.safetensors: not a complete safetensors file",
    ),
    "garbage header": (
        lambda folder: rewrite(weights(folder), lambda data: data[:8] + b"\xff" * (len(data) - 8)),
        r"adapter_model\.safetensors: the safetensors header is damaged \(.*\); download it again",
    ),
    "header that is a list": (
        lambda folder: weights(folder).write_bytes(struct.pack("<Q", 2) + b"[]"),
        r"the safetensors header is damaged",
    ),
    "header too deep": (
        lambda folder: weights(folder).write_bytes(struct.pack("<Q", 99999) + b"[" * 99999),
        r"the safetensors header is damaged",
    ),
    "negative shape": (
        with_header(lambda header: header[LORA_A].update(shape=[-4, -48])),
        r"the safetensors header is damaged \(shape or offsets of \S+down_proj\.lora_A\S+ are not whole numbers\)",
    ),
    "shape that is not the data's": (
        with_header(lambda header: header[LORA_A].update(shape=[4, 47])),
        r"header is damaged \(\S+down_proj\.lora_A\S+ is 752 bytes by its shape, 768 by its offsets\)",
    ),
    "fractional offsets": (
        with_header(lambda header: header[LORA_A].update(data_offsets=[0.5, 768.5])),
        r"header is damaged \(shape or offsets of \S+ are not whole numbers\)",
    ),
    "overlapping tensors": (
        with_header(lambda header: header[LORA_A].update(data_offsets=[0, 768])),
        r"header is damaged \(\S+ overlaps another tensor or leaves a gap\); download it again",
    ),
    "entry without a type": (with_header(lambda header: header[LORA_A].pop("dtype")), r"header is damaged \('dtype'\)"),
    "unknown type": (
        with_header(lambda header: header[LORA_A].update(dtype="F4")),
        r"adapter_model\.safetensors: \S+ is stored as F4, which cannot be merged; convert it to bfloat16",
    ),
    "list instead of tensors": (
        as_bin([torch.ones(2)]),
        r"adapter_model\.bin: is not a dictionary of tensors; give the file that holds the weights",
    ),
    "nested dictionary": (as_bin({"model": {"a": torch.ones(2)}}), r"adapter_model\.bin: is not a dictionary of tensors"),
    "names that are numbers": (as_bin({1: torch.ones(2)}), r"adapter_model\.bin: is not a dictionary of tensors"),
    "complex tensor": (
        as_bin({"a": torch.ones(2, dtype=torch.complex64)}),
        r"adapter_model\.bin: a is a .* tensor of torch\.complex64, which cannot be merged; convert it",
    ),
    "sparse tensor": (as_bin({"a": torch.eye(2).to_sparse()}), r"adapter_model\.bin: a is a torch\.sparse_coo tensor"),
    "a .bin of 0 bytes": (
        lambda folder: (weights(folder).unlink(), (folder / "adapter_model.bin").write_bytes(b"")),
        r"adapter_model\.bin: not a readable \.bin file; download or copy it again",
    ),
    "a .bin of text": (
        lambda folder: (weights(folder).unlink(), (folder / "adapter_model.bin").write_text("hello")),
        r"adapter_model\.bin: not a readable \.bin file; download or copy it again",
    ),
    "update wider than the base's weight": (
        tensors(lambda stored: stored.update({LORA_A: torch.ones(4, 50)})),
        r"image specialist: \S+lora_A\S+ updates a 32 × 50 weight, but \S+down_proj\.weight of the base is 32 × 48 "
        r"\(.*safetensors\); use the base it was trained from",
    ),
    "halves that disagree": (
        tensors(lambda stored: stored.update({LORA_A: torch.ones(3, 48)})),
        r"image specialist: \S+down_proj\.weight: lora_A has 3 rows, lora_B has 4 columns \(adapter_model\.safetensors\); "
        r"the file is damaged or mixes two adapters",
    ),
    "lora_B missing": (
        tensors(lambda stored: stored.pop(LORA_B)),
        r"image specialist: \S+lora_A\.default\.weight has no matching lora_B \(adapter_model\.safetensors\)",
    ),
    "factor of one dimension": (
        tensors(lambda stored: stored.update({LORA_A: torch.ones(4)})),
        r"\S+lora_A\S+ is \(4,\) of torch\.float32, not a floating-point matrix \(adapter_model\.safetensors\)",
    ),
    "integer factor": (
        tensors(lambda stored: stored.update({LORA_A: torch.ones(4, 48, dtype=torch.int8)})),
        r"\S+lora_A\S+ is \(4, 48\) of torch\.int8, not a floating-point matrix",
    ),
    "update of a layer that the base lacks": (
        tensors(lambda stored: stored.update({LORA_A.replace(".1.", ".9."): torch.ones(4, 48),
                                              LORA_B.replace(".1.", ".9."): torch.ones(32, 4)})),
        r"updates model\.layers\.9\.mlp\.down_proj\.weight, which the base \S+ does not have .*; use the base",
    ),
    "unknown tensor": (
        tensors(lambda stored: stored.update({"model.surprise": torch.ones(2)})),
        r"image specialist: no rule for tensor model\.surprise \(2,\) \(.*safetensors\); known here: .* `ignore:`",
    ),
    "tensor of another modality": (
        tensors(lambda stored: stored.update({"model.modal_projectors.audio.0.bias": torch.ones(2)})),
        r"holds tensors of two modalities \(.*\); give one specialist per folder",
    ),
    "tensor of an unknown modality": (
        tensors(lambda stored: stored.update({"model.modal_projectors.smell.0.bias": torch.ones(2)})),
        r"model\.modal_projectors\.smell\.0\.bias names modality 'smell'; known: vision, audio, video, point",
    ),
    "no text adapter": (
        tensors(lambda stored: [stored.pop(name) for name in list(stored) if "default.weight" in name]),
        r"has no text adapter \('default'\), so there is nothing to merge",
    ),
    "NaN": (poison(LORA_A, float("nan")), r"image specialist: \S+lora_A\S+ holds NaN or infinite values \(.*\); .*download"),
    "inf": (poison(LORA_B, float("inf")), r"image specialist: \S+lora_B\S+ holds NaN or infinite values \(.*\); .*download"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), SPECIALISTS.values(), ids=SPECIALISTS)
def test_damaged_specialist(
    damage: Callable[[Path], object],
    message: str,
    specialists: Specialists,
    write_recipe: WriteRecipe,
    merge_refused: Refused,
) -> None:
    damage(specialists["image"])
    assert_says(merge_refused(write_recipe()), message)


def test_nan_in_a_carried_tensor(specialists: Specialists, write_recipe: WriteRecipe, merge_refused: Refused) -> None:
    poison("model.modal_projectors.vision.2.weight", float("nan"))(specialists["image"])
    message = r"image specialist: model\.modal_projectors\.vision\.2\.weight holds NaN or infinite values"
    assert_says(merge_refused(write_recipe(output={"form": "omni"})), message)


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.marker, "w")


@pytest.mark.parametrize("kind", ["zip", "before torch 1.6", "plain pickle", "as base"])
def test_pickles_run_no_code(
    kind: str,
    tmp_path: Path,
    own_base: Path,
    specialists: Specialists,
    write_recipe: WriteRecipe,
    merge_refused: Refused,
) -> None:
    marker, content = tmp_path / "marker", {"a": torch.ones(2), "b": Evil(tmp_path / "marker")}
    folder, name, changes = specialists["image"], "adapter_model.bin", {}
    if kind == "as base":
        folder, name, changes = own_base, "pytorch_model.bin", {"base_model": str(own_base)}
    for path in folder.glob("*model*"):
        path.unlink()
    if kind == "plain pickle":
        (folder / name).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, folder / name, _use_new_zipfile_serialization=kind != "before torch 1.6")
    line = merge_refused(write_recipe(**changes))
    assert_says(
        line, rf"{name}: refused: it holds more than tensors and could run code when loaded; ask .* safetensors"
    )
    assert not marker.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_pickles_are_refused_or_read(zipped: bool, tmp_path: Path) -> None:
    from modalloy.storage.tensors import WeightFile

    path, draw = tmp_path / "adapter_model.bin", np.random.default_rng(0)
    torch.save({"a": torch.ones(3, 4), "b": torch.ones(2)}, path, _use_new_zipfile_serialization=zipped)
    good = path.read_bytes()
    for _ in range(150):
        data = bytearray(good)
        data[int(draw.integers(min(len(data), 600)))] = int(draw.integers(256))
        path.write_bytes(data)
        try:
            WeightFile(path)
        except CheckpointError as error:
            assert str(path) in str(error)


def test_modality_that_the_tensors_contradict(
    specialists: Specialists, write_recipe: WriteRecipe, merge_refused: Refused
) -> None:
    recipe = write_recipe(models=[{"model": str(specialists["image"]), "modality": "audio"}])
    message = r"vision-damc: its tensors belong to modality 'image', the recipe says 'audio'; correct the recipe"
    assert_says(merge_refused(recipe), message)


OMNI: dict[str, tuple[Callable[[Path], object], str]] = {
    "encoder of another modality": (
        lambda folder: edit_config(folder, mm_vision_encoder="builtin:whisper-tiny.en"),
        r"encoder 'builtin:whisper-tiny\.en' is of modality 'audio', not 'image'; name another",
    ),
    "unknown encoder": (
        lambda folder: edit_config(folder, mm_vision_encoder="openai/clip-vit-large-patch14"),
        r"no encoder for modality 'image'; add `encoder:` to the image specialist",
    ),
    "projector of another base": (
        tensors(lambda stored: stored.update({"model.modal_projectors.vision.0.weight": torch.ones(64, 1280)})),
        r"image specialist: its projector is of no known kind \(mlp: 0\.bias is \(32,\), not \(64,\)",
    ),
    "no projector": (
        tensors(lambda stored: [stored.pop(name) for name in list(stored) if "projectors" in name]),
        r"needs a projector from every specialist, but 'image' has none; write form: adapter or full",
    ),
    "prefix of another width": (
        tensors(lambda stored: stored.update({"prefix_tokens.vision": torch.ones(1, 1, 64)})),
        r"image specialist: prefix_tokens\.vision is \(1, 1, 64\), not \(1, tokens, 32\)",
    ),
    "prefix of one dimension": (
        tensors(lambda stored: stored.update({"prefix_tokens.vision": torch.ones(32)})),
        r"image specialist: prefix_tokens\.vision is \(32,\), not \(1, tokens, 32\)",
    ),
    "two names of one tensor": (
        tensors(lambda stored: stored.update({"prefix_tokens.image": torch.ones(1, 1, 32)})),
        r"prefix_tokens\.\w+ and prefix_tokens\.\w+ are two names of one tensor; list one under `ignore:`",
    ),
}


@pytest.mark.parametrize(("damage", "message"), OMNI.values(), ids=OMNI)
def test_specialist_that_cannot_chat(
    damage: Callable[[Path], object],
    message: str,
    specialists: Specialists,
    write_recipe: WriteRecipe,
    merge_refused: Refused,
) -> None:
    damage(specialists["image"])
    assert_says(merge_refused(write_recipe(output={"form": "omni"})), message)


def test_two_specialists_of_one_modality(
    tmp_path: Path, specialists: Specialists, write_recipe: WriteRecipe, merge_refused: Refused
) -> None:
    second = write_compose(tmp_path / "second", "vision", seed=7)
    both = [{"model": str(specialists["image"])}, {"model": str(second)}]
    line = merge_refused(write_recipe(models=both, output={"form": "omni"}))
    assert_says(
        line, r"two specialists claim modality 'image' \(second\); .* remove one, or write form: adapter or full"
    )
    modalloy.merge(write_recipe(models=both), tmp_path / "adapter")


def test_full_model_in_an_adapter(
    base: Path, write_recipe: WriteRecipe, merge_refused: Refused, tmp_path: Path
) -> None:
    shutil.copytree(base, tmp_path / "copy")
    recipe = write_recipe(models=[{"model": str(tmp_path / "copy")}], output={"form": "adapter"})
    message = r"output\.form 'adapter' needs low-rank specialists, but 'copy' is a full model; write form: full"
    assert_says(merge_refused(recipe), message)


@pytest.mark.parametrize("layout", ["modelcompose", "peft"])
def test_recorded_base_that_contradicts_the_recipe(
    layout: str,
    base: Path,
    tmp_path: Path,
    specialists: Specialists,
    write_recipe: WriteRecipe,
    merge_refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = specialists["image"]
    if layout == "peft":
        folder = peft_folder(tmp_path / "peft", base_model_name_or_path="lmsys/vicuna-7b-v1.3")
    else:
        edit_config(folder, _name_or_path="lmsys/vicuna-7b-v1.3")
    monkeypatch.setattr(
        "modalloy.planning.planner.locate",
        lambda name, _: base if name.startswith("lmsys/") else Path(name),
    )
    recipe = write_recipe(base_model="lmsys/vicuna-7b-v1.5@main", models=[{"model": str(folder)}])
    line = merge_refused(recipe)
    assert_says(
        line, r"was trained from 'lmsys/vicuna-7b-v1\.3', the recipe's base_model is 'lmsys/vicuna-7b-v1\.5@main'; "
    )
    assert_says(line, r"use the right base, or say --allow-base-mismatch")
    modalloy.merge(recipe, tmp_path / "allowed", allow_base_mismatch=True)
    same = write_recipe(base_model="lmsys/Vicuna-7b-v1.3@abc", models=[{"model": str(folder)}])
    assert modalloy.plan(modalloy.load_recipe(same)).base_name == "lmsys/Vicuna-7b-v1.3@abc"


def test_recorded_local_path_is_no_contradiction(
    specialists: Specialists, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    edit_config(specialists["image"], _name_or_path="/elsewhere/vicuna")
    modalloy.merge(write_recipe(), tmp_path / "out")


def test_relative_base_is_no_hub_id(
    base: Path, specialists: Specialists, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    shutil.copytree(base, tmp_path / "models" / "base")  # "models/base" looks like owner/name
    planned = modalloy.plan(modalloy.load_recipe(write_recipe(base_model="models/base")))
    assert not planned.target_is_portable and planned.target_name == "base"


def peft_folder(folder: Path, **config: Any) -> Path:
    """A plain PEFT adapter of one layer."""
    folder.mkdir()
    stem = f"base_model.model.{STEM}"
    save_file({f"{stem}.lora_A.weight": torch.ones(4, 48), f"{stem}.lora_B.weight": torch.ones(32, 4)}, weights(folder))
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8} | config))
    return folder


PEFT: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": (
        {"use_dora": True},
        r"adapter_config\.json: DoRA rescales whole weights, .*; merge it into a full model first",
    ),
    "not LoRA": ({"peft_type": "IA3"}, r"adapter_config\.json: peft_type IA3 is not LoRA; only LoRA adapters"),
    "PiSSA": (
        {"init_lora_weights": "pissa_niter_4"},
        r"init_lora_weights 'pissa_niter_4' is not known to leave the base as it was; convert",
    ),
    "transposed": ({"fan_in_fan_out": True}, r"adapter_config\.json: fan_in_fan_out stores transposed weights"),
    "rank of another adapter": (
        {"r": 16},
        r"lora_A\.weight has rank 4, \S+adapter_config\.json implies 16; the two files",
    ),
    "rank 0": ({"r": 0}, r"adapter_config\.json: r is 0, not a positive number"),
    "pattern that is no table": (
        {"rank_pattern": "x"},
        r"adapter_config\.json: rank_pattern is 'x', not a table of patterns",
    ),
    "pattern that is no pattern": (
        {"alpha_pattern": {"(": 1}},
        r"alpha_pattern: '\(' is not a pattern \(.*\); correct",
    ),
    "pattern of text": ({"alpha_pattern": {"down_proj": "x"}}, r"down_proj is 'x', not a positive number"),
}


@pytest.mark.parametrize(("config", "message"), PEFT.values(), ids=PEFT)
def test_peft_adapter_that_cannot_be_merged(
    config: dict[str, Any], message: str, tmp_path: Path, write_recipe: WriteRecipe, merge_refused: Refused
) -> None:
    recipe = write_recipe(models=[{"model": str(peft_folder(tmp_path / "peft", **config))}])
    assert_says(merge_refused(recipe), message)


def test_peft_adapter_with_other_tensors(tmp_path: Path, write_recipe: WriteRecipe, merge_refused: Refused) -> None:
    folder = peft_folder(tmp_path / "peft")
    edit_tensors(folder, lambda stored: stored.update({"base_model.model.lm_head.weight": torch.ones(2, 2)}))
    line = merge_refused(write_recipe(models=[{"model": str(folder)}]))
    assert_says(line, r"peft specialist: base_model\.model\.lm_head\.weight \(.*\) is a head of its own, .*`ignore:`")


def test_everything_ignored(tmp_path: Path, write_recipe: WriteRecipe, merge_refused: Refused) -> None:
    folder = peft_folder(tmp_path / "peft")
    line = merge_refused(write_recipe(models=[{"model": str(folder)}], ignore=["*"]))
    assert_says(line, r"peft: has no lora_A and lora_B, so there is nothing to merge")


def test_values_that_the_output_type_cannot_hold(write_recipe: WriteRecipe, merge_refused: Refused) -> None:
    recipe = write_recipe(parameters={"scale": 1.0e9}, output={"dtype": "float16"})
    message = r"lora_\w\.weight: the merged values do not fit torch\.float16; choose a wider output\.dtype or a smaller"
    assert_says(merge_refused(recipe), message)


# ----------------------------------------------------------------------------------------------------------- output


def test_existing_out_is_kept(write_recipe: WriteRecipe, refused: Refused, tmp_path: Path) -> None:
    earlier_result(tmp_path / "out")
    line = refused("merge", write_recipe(), "-o", tmp_path / "out")
    assert_says(line, r"out: already exists; choose another folder, or replace it with --overwrite")


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_overwrite_spares_what_modalloy_did_not_write(
    kind: str, write_recipe: WriteRecipe, refused: Refused, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")
    else:
        out.write_text("years of work")
    line = refused("merge", write_recipe(), "-o", out, "--overwrite")
    assert_says(
        line, r"out: is not a folder that modalloy wrote, so --overwrite will not replace it; remove it yourself"
    )


def test_overwrite_replaces_an_earlier_result(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    earlier_result(out)
    modalloy.merge(write_recipe(), out, overwrite=True)
    assert verify(out).layers > 0
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


OUTS = {
    "below a file": (
        "recipe.yaml/out",
        r"recipe\.yaml/out: a part of the path is a file, not a folder; choose another",
    ),
    "name too long": ("x" * 300, r"x+: the name is too long; choose another folder"),
    "name too long for its staging": ("x" * 250, r"x+: the name is too long; choose another folder"),
    "here": (".", r"already exists|cannot be replaced as a whole; name a folder in it"),
    "above": ("models/..", r"cannot be replaced as a whole; name a folder in it"),
}


@pytest.mark.parametrize(("out", "message"), OUTS.values(), ids=OUTS)
def test_impossible_out(out: str, message: str, write_recipe: WriteRecipe, refused: Refused, tmp_path: Path) -> None:
    assert_says(refused("merge", write_recipe(), "-o", f"{tmp_path}/{out}"), message)


def test_current_folder_as_out(
    write_recipe: WriteRecipe, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert_says(
        refused("merge", recipe, "-o", ".", "--overwrite"), r"cannot be replaced as a whole; name a folder in it"
    )


def patch_weight_writes(monkeypatch: pytest.MonkeyPatch, write: Callable[[int, Any], int]) -> None:
    """Send every write to a weight file through `write`."""
    original = os.write

    def routed(descriptor: int, data: Any) -> int:
        target = os.readlink(f"/proc/self/fd/{descriptor}")
        return (write if target.endswith(".safetensors") else original)(descriptor, data)

    monkeypatch.setattr(os, "write", routed)


@pytest.mark.parametrize("room", [0, 1, 5_000, 10_000])
def test_full_disk(
    room: int, write_recipe: WriteRecipe, merge_refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, left = os.write, [room]

    def write(descriptor: int, data: Any) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = original(descriptor, data[: left[0]])
        left[0] -= count
        return count

    patch_weight_writes(monkeypatch, write)
    message = r"out: the disk is full; free space or choose another folder; nothing was written"
    assert_says(merge_refused(write_recipe()), message)


def test_a_disk_that_is_too_small_is_refused_before_the_merge(
    write_recipe: WriteRecipe, merge_refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(Inputs, "read", lambda *_: pytest.fail("something was read"))
    message = r"out: the disk is full: [\d.]+ GB are needed, 0\.00 GB are free; free space"
    assert_says(merge_refused(write_recipe()), message)


def test_disk_that_fills_up_at_the_last_file(
    write_recipe: WriteRecipe, merge_refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["modalloy.merging"]
    write_text = module.write_text

    def write(path: Path, text: str) -> None:
        if path.name == "manifest.json" and "partial" in path.parent.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_text(path, text)

    recipe = write_recipe()
    monkeypatch.setattr(module, "write_text", write)
    assert_says(
        merge_refused(recipe), r"out: the disk is full; free space or choose another folder; nothing was written"
    )


def test_short_writes_lose_nothing(write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modalloy.merge(write_recipe(), tmp_path / "plain")
    original = os.write
    patch_weight_writes(monkeypatch, lambda descriptor, data: original(descriptor, data[:999]))
    modalloy.merge(write_recipe(), tmp_path / "slow")
    assert verify(tmp_path / "slow").files == verify(tmp_path / "plain").files
    assert weights(tmp_path / "slow").read_bytes() == weights(tmp_path / "plain").read_bytes()


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EACCES, "permission denied"),
        (errno.EROFS, "the file system is read-only"),
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "your disk quota is used up"),
    ],
)
def test_parent_that_cannot_be_written(
    number: int,
    message: str,
    write_recipe: WriteRecipe,
    refused: Refused,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mkdir = Path.mkdir

    def make(path: Path, *arguments: Any, **options: Any) -> None:
        if "partial" in path.name:
            raise OSError(number, os.strerror(number))
        mkdir(path, *arguments, **options)

    recipe = write_recipe()
    monkeypatch.setattr(Path, "mkdir", make)
    line = refused("merge", recipe, "-o", tmp_path / "new" / "out")
    assert_says(line, rf"new/out: {message}; .*choose another folder; nothing was written")


def test_input_that_cannot_be_read(
    write_recipe: WriteRecipe, merge_refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message blames the input, not the target."""

    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    message = r"adapter_model\.safetensors: cannot be read \(Input/output error\); check its permissions and the disk"
    assert_says(merge_refused(write_recipe()), message)


@pytest.mark.parametrize("nested", [False, True])
def test_failure_midway_leaves_no_trace(
    nested: bool, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modalloy.compute import compute

    def fail_late(job: Any, *rest: Any, **more: Any) -> Any:
        if job.name.startswith("model.layers.1."):
            raise RuntimeError("a bug")
        return compute(job, *rest, **more)

    recipe, out = write_recipe(), tmp_path / "new" / "deep" / "out" if nested else tmp_path / "out"
    monkeypatch.setattr("modalloy.merging.compute", fail_late)
    before = snapshot(tmp_path)
    for jobs in (1, 3):
        with pytest.raises(RuntimeError, match="a bug"):
            modalloy.merge(recipe, out, jobs=jobs)
        assert snapshot(tmp_path) == before
    if not nested:
        earlier_result(out)
        before = snapshot(tmp_path)
        with pytest.raises(RuntimeError, match="a bug"):
            modalloy.merge(recipe, out, overwrite=True)
        assert snapshot(tmp_path) == before


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT interrupts, also where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_leaves_no_trace(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    def interrupt(done: int, _: int) -> None:
        if done == 5:
            os.kill(os.getpid(), signal.SIGINT)

    recipe, out = write_recipe(), tmp_path / "out"
    before = snapshot(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        modalloy.merge(recipe, out, on_job=interrupt)
    assert snapshot(tmp_path) == before
    earlier_result(out)
    before = snapshot(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        modalloy.merge(recipe, out, overwrite=True, on_job=interrupt)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("stopped_at", ["first rename", "second rename"])
def test_failed_rename_puts_the_earlier_result_back(
    stopped_at: str, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name == "out" if stopped_at == "first rename" else ".partial" in path.name:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return rename(path, target)

    recipe, out = write_recipe(), tmp_path / "out"
    earlier_result(out)
    before = snapshot(tmp_path)
    monkeypatch.setattr(Path, "rename", fail)
    monkeypatch.setattr(staging, "exchange", lambda *_: False)  # as a disk that cannot do it in one step
    with pytest.raises(OutputError, match="out: permission denied; choose another folder; nothing was written"):
        modalloy.merge(recipe, out, overwrite=True)
    assert snapshot(tmp_path) == before


def test_out_that_appears_during_the_merge_is_kept(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def appear(done: int, _: int) -> None:
        if done == 1:
            earlier_result(out)

    with pytest.raises(OutputError, match="out: was made by something else during the merge; choose another folder"):
        modalloy.merge(write_recipe(), out, on_job=appear)
    assert weights(out).read_bytes() == b"earlier"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_command_itself(write_recipe: WriteRecipe, specialists: Specialists, tmp_path: Path) -> None:
    """As a user runs it: the exit code, and nothing on stderr but the line."""
    rewrite(weights(specialists["audio"]), lambda data: data[:-9])
    command = [sys.executable, "-m", "modalloy.cli", "merge", str(write_recipe()), "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"NO_COLOR": "1"}, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert_says(
        done.stderr, r"^error: .*audio-damc/adapter_model\.safetensors: truncated: .*; download or copy it again\n$"
    )
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------- other commands, and media


def test_unknown_device(write_recipe: WriteRecipe, merge_refused: Refused) -> None:
    assert_says(merge_refused(write_recipe(), "--device", "tpu"), r"--device tpu: not a device; known: auto, cpu, cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_cuda_without_a_device(write_recipe: WriteRecipe, merge_refused: Refused) -> None:
    assert_says(
        merge_refused(write_recipe(), "--device", "cuda"), r"no CUDA device is available here; use --device cpu"
    )


MANIFESTS = {
    "no manifest": (lambda out: (out / "manifest.json").unlink(), r"out: has no manifest\.json, so it is no result"),
    "empty manifest": (
        lambda out: (out / "manifest.json").write_text("{}"),
        r"manifest\.json: has no modalloy; merge again",
    ),
    "manifest that is no JSON": (
        lambda out: (out / "manifest.json").write_text("x"),
        r"manifest\.json: not valid JSON",
    ),
    "no recipe": (lambda out: (out / "recipe.yaml").unlink(), r"recipe\.yaml: listed in manifest\.json but missing"),
    "another recipe": (lambda out: (out / "recipe.yaml").write_text("x"), r"recipe\.yaml: its sha256 is not the one"),
    "sources that are no sources": (
        lambda out: (out / "sources.json").write_text("{}"),
        r"sources\.json: has no specialists; ",
    ),
    "weights cut": (
        lambda out: rewrite(weights(out), lambda data: data[:-1]),
        r"safetensors: its sha256 is not the one",
    ),
}


@pytest.mark.parametrize(("damage", "message"), MANIFESTS.values(), ids=MANIFESTS)
def test_verify_of_a_damaged_result(
    damage: Callable[[Path], object], message: str, write_recipe: WriteRecipe, refused: Refused, tmp_path: Path
) -> None:
    modalloy.merge(write_recipe(), tmp_path / "out")
    damage(tmp_path / "out")
    assert_says(refused("verify", tmp_path / "out"), message)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_verify_misses_no_small_update(
    dtype: str, base: Path, specialists: Specialists, write_recipe: WriteRecipe, refused: Refused, tmp_path: Path
) -> None:
    """The base in place of the merge, with a manifest that agrees, when updates are some hundredths of the weights."""
    for folder in specialists.values():
        edit_tensors(folder, lambda stored: [stored[name].mul_(0.003) for name in stored if "lora_B.default" in name])
    out = tmp_path / "out"
    modalloy.merge(write_recipe(output={"form": "full", "dtype": dtype}), out)
    assert verify(out).worst_error < 1e-3
    plain = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(plain, out / "model.safetensors", metadata={"format": "pt"})
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["outputs"]["model.safetensors"] = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert_says(refused("verify", out), r"out: \S+\.weight differs from what the recipe gives by .*; merge again")


def test_verify_without_the_inputs(write_recipe: WriteRecipe, specialists: Specialists, tmp_path: Path) -> None:
    modalloy.merge(write_recipe(), tmp_path / "out")
    shutil.rmtree(specialists["audio"])
    checked = verify(tmp_path / "out")
    assert checked.layers == 0 and "audio-damc is gone" in checked.summary()
    (tmp_path / "out" / "sources.json").unlink()
    assert "no sources.json" in verify(tmp_path / "out").summary()


@pytest.mark.parametrize("option", ["--image", "--audio", "--video", "--point"])
def test_chat_about_a_missing_file(option: str, refused: Refused, tmp_path: Path) -> None:
    line = refused("chat", tmp_path, option, tmp_path / "absent.png", "-p", "what is this?")
    assert_says(line, r"absent\.png: no such file; check the path")


def test_chat_with_a_folder_that_is_no_model(refused: Refused, tmp_path: Path) -> None:
    assert_says(
        refused("chat", tmp_path, "-p", "hello"), r"has no config\.json; give a folder written with output\.form"
    )


def png() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(buffer, "PNG")
    return buffer.getvalue()


def wav(samples: np.ndarray) -> bytes:
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 16_000, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


MEDIA: dict[str, tuple[Callable[[Path], object], str, bytes, str]] = {
    "text as image": (load_image, "a.png", b"hello", r"a\.png: not a readable image \(.*\); give a PNG"),
    "empty image": (load_image, "a.png", b"", r"a\.png: not a readable image"),
    "truncated image": (load_image, "a.png", png()[:-30], r"a\.png: not a readable image"),
    "huge image": (
        load_image,
        "a.png",
        png()[:16] + struct.pack(">II", 60_000, 60_000) + png()[24:],
        r"a\.png: not a readable image",
    ),
    "text as sound": (load_audio, "a.wav", b"hello", r"a\.wav: not a readable sound \(.*\); give a WAV"),
    "empty sound": (load_audio, "a.wav", b"", r"a\.wav: not a readable sound"),
    "headerless sound": (
        load_audio,
        "a.raw",
        b"hello" * 9,
        r"a\.raw: (not a readable sound|the file has no sound track)",
    ),
    "sound without samples": (load_audio, "a.wav", wav(np.zeros(0)), r"a\.wav: the sound has no samples; give a file"),
    "sound with NaN": (
        load_audio,
        "a.wav",
        wav(np.full(9, np.nan)),
        r"a\.wav: the sound holds NaN or infinite samples",
    ),
    "image as sound": (load_audio, "a.png", png(), r"a\.png: (not a readable sound|the file has no sound track)"),
}


@pytest.mark.parametrize(("load", "name", "content", "message"), MEDIA.values(), ids=MEDIA)
def test_unreadable_media(
    load: Callable[[Path], object], name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MediaError, match=message):
        load(tmp_path / name)


@pytest.mark.parametrize("load", [load_image, load_audio])
@pytest.mark.parametrize(("name", "found"), [("absent.png", "no such file"), (".", "is a folder, not a file")])
def test_missing_media(load: Callable[[Path], object], name: str, found: str, tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=f"{found}; check the path"):
        load(tmp_path / name)


def test_grey_of_16_bits_is_not_clipped_to_white(tmp_path: Path) -> None:
    from PIL import Image

    values = np.array([[0, 257, 32_896, 65_535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "depth.png")
    assert np.asarray(load_image(tmp_path / "depth.png"))[0, :, 0].tolist() == [0, 1, 128, 255]


# ------------------------------------------------------------------- awkward but right: every rank is defined


@pytest.mark.parametrize("ranks", [(0,), (0, 0), (0, 3), (1, 4), (4, 40)])
@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ssam", {"rank": 1}),
        ("ssam", {"rank": 1000}),
        ("ssam", {"rank": {"energy": 0.9}}),
        ("ssam", {}),
        ("average", {}),
        ("task_arithmetic", {}),
    ],
)
@pytest.mark.parametrize("zero", [False, True])
def test_every_rank_is_merged(
    method: str,
    parameters: dict[str, Any],
    ranks: tuple[int, ...],
    zero: bool,
    write_recipe: WriteRecipe,
    tmp_path: Path,
) -> None:
    entries = []
    for index, own in enumerate(ranks):
        folder = write_compose(tmp_path / f"s{index}", "vision", rank=own or 4, seed=index)
        if own == 0 or zero:  # B = 0, as training starts
            edit_tensors(folder, lambda stored: [stored[name].zero_() for name in stored if "lora_B.default" in name])
        entries.append({"model": str(folder)})
    recipe = write_recipe(models=entries, merge_method=method, parameters=parameters)
    report = modalloy.merge(recipe, tmp_path / "out")
    assert report.verification.worst_error is not None and report.verification.worst_error < 1e-5
    written = load_file(weights(tmp_path / "out"))
    assert len(written) == 2 * len(SLOTS)
    config = yaml.safe_load((tmp_path / "out" / "adapter_config.json").read_text())
    assert {tensor.shape[0] for name, tensor in written.items() if "lora_A" in name} == {config["r"]}
    assert config["r"] >= 1

"""Whatever a file of a stranger holds: it is read, or refused in one printable line, and nothing else happens."""

import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_run import question, write_run
from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st
from tiny_inputs import CONFIG, LORA, SHAPES, lora_tensors, with_header, write_base, write_lora, write_recipe

from modalloy import merge, plan
from modalloy.errors import ModalloyError
from modalloy.evals.log import RUN, load_run
from modalloy.families.vocabulary import read_tokens
from modalloy.recipe import load_recipe
from modalloy.search.probes import read_probes
from modalloy.search.space import parse_axes
from modalloy.search.trials import Trials
from modalloy.specialists.layouts import open_specialist
from modalloy.storage.config import read_config
from modalloy.storage.pickled import unpickle
from modalloy.storage.tensors import Checkpoint, WeightFile
from modalloy.verify import verify

ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(
        [-1, 0, 2**31, 2**63, 2**64, 10**400, 1e308, float("inf"), float("nan"), "", "\0", "\x1b[2J", "x" * 5000]
    )
    | st.floats()
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
ODD_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def tried(attempt: Callable[[], Any]) -> Any:
    """What the attempt returns; None where it is refused in one printable line."""
    try:
        return attempt()
    except ModalloyError as error:
        line = str(error)
        assert line and len(line) < 2000, line[:3000]
        assert line.isprintable(), ascii(line)
        return None


@st.composite
def changed(draw: st.DrawFn, good: bytes) -> bytes:
    """A file some of whose bytes are others, are missing, or are there twice."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        end = draw(st.integers(place, min(place + 12, len(data))))
        data[place:end] = draw(st.binary(max_size=12) | st.just(bytes(data[place:end] * 2)))
    return bytes(data)


@st.composite
def edited(draw: st.DrawFn, good: dict[str, Any]) -> dict[str, Any]:
    """A table with odd values under some of its keys, or in the tables and lists under them."""
    content: dict[str, Any] = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(1, 3))):
        place: Any = content
        while True:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], (dict, list)) and place[key] and draw(st.booleans()):
                place = place[key]
                continue
            place[key] = draw(ODD)
            break
    if draw(st.booleans()):
        content[draw(ODD_TEXT)] = draw(ODD)
    return content


def dumped(content: Any) -> str:
    """JSON of this content, as Python writes it: with NaN, and with halves of surrogate pairs escaped."""
    return json.dumps(content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def header() -> dict[str, Any]:
    """A good header of three tensors, 44 bytes of data in all."""
    return {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [2], "data_offsets": [24, 28]},
        "c": {"dtype": "I64", "shape": [2], "data_offsets": [28, 44]},
    }


def read_all(path: Path) -> None:
    """Open a file of weights and read each tensor."""
    file = WeightFile(path)
    for ref in file.refs.values():
        assert tuple(file.read(ref).shape) == ref.shape


@examples(150)
@given(st.data())
def test_headers(folder: Path, data: st.DataObject) -> None:
    path, good = folder / "model.safetensors", with_header(header(), bytes(44))
    path.write_bytes(
        data.draw(
            changed(good) | edited(header()).map(lambda content: with_header(dumped(content).encode(), bytes(44)))
        )
    )
    tried(lambda: read_all(path))


@examples(80)
@given(st.data())
def test_index_files(folder: Path, data: st.DataObject) -> None:
    place = folder / "shards"
    place.mkdir(exist_ok=True)
    (place / "model-1.safetensors").write_bytes(with_header(header(), bytes(44)))
    shard = st.sampled_from(
        ["model-1.safetensors", "./model-1.safetensors", "../model.safetensors", "/etc/hosts", ".", ""]
    )
    names = st.dictionaries(st.sampled_from(["a", "b", "c", "d"]), shard | ODD_TEXT | ODD, max_size=4)
    index = data.draw(st.builds(lambda names: {"weight_map": names}, names | ODD) | ODD)
    (place / "model.safetensors.index.json").write_text(dumped(index))
    tried(lambda: Checkpoint(place, ["model"]))


PIECES = [
    *(
        "&a ",
        "*a",
        "<<: *a",
        "!!int ",
        "!!float ",
        "!!bool ",
        "!!map ",
        "!!set ",
        "!!binary ",
        "!x ",
        "[",
        "]",
        "{",
        "}",
        ", ",
    ),
    *(
        ": ",
        "- ",
        "\n",
        "  ",
        "? ",
        "| \n",
        "'",
        '"',
        "#",
        "%TAG",
        "---",
        "...",
        "\\ud800",
        '"\\ud800"',
        '"\\0"',
        "2024-13-45",
    ),
    *(
        "9" * 400,
        "0x" + "f" * 90,
        "1:60:3",
        ".nan",
        ".inf",
        "1.0e+400",
        "0b_",
        "models",
        "base_model",
        "output",
        "parameters",
    ),
    *("scale", "weight", "modules", "ignore", "a" * 5000, "[" * 50, "{a: " * 30),
]


@examples(250)
@given(st.data())
def test_recipes(folder: Path, data: st.DataObject) -> None:
    good = write_recipe(folder).read_text()
    path = folder / "odd.yaml"
    odd = st.lists(st.sampled_from(PIECES) | ODD_TEXT, max_size=8).map("".join)
    place = data.draw(st.integers(0, len(good)))
    path.write_text(good[:place] + data.draw(odd) + good[place + data.draw(st.integers(0, 9)) :], encoding="utf-8")
    recipe = tried(lambda: load_recipe(path))
    if recipe is not None:
        assert recipe.to_yaml() == path.read_bytes().decode()
        tried(lambda: plan(recipe))


@examples(150)
@given(st.data())
def test_adapter_configs(folder: Path, data: st.DataObject) -> None:
    place = folder / "adapter"
    if not place.exists():
        write_lora(place)
    patterned = LORA | {
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"up_proj": 2},
        "use_rslora": False,
        "bias": "none",
    }
    (place / "adapter_config.json").write_text(dumped(data.draw(edited(patterned) | ODD)))
    opened = tried(lambda: open_specialist(place))
    if opened is not None:
        assert all(factors.scale > 0 for factors in opened.text_lora.values())


@examples(80)
@given(st.data())
def test_model_configs(folder: Path, data: st.DataObject) -> None:
    recipe = load_recipe(write_recipe(folder / "models"))
    config = folder / "models/base/config.json"
    nested = CONFIG | {
        "text_config": {"model_type": "llama", "hidden_size": 8},
        "rope_scaling": {"rope_type": "default"},
    }
    config.write_text(dumped(data.draw(edited(nested) | ODD)))
    tried(lambda: read_config(config.parent))
    tried(lambda: plan(recipe))


@examples(40)
@given(st.data())
def test_manifests(folder: Path, data: st.DataObject) -> None:
    place = folder / "merged"
    if not place.exists():
        merge(load_recipe(write_recipe(folder / "verified")), place)
        shutil.copytree(place, folder / "good")
    for name in ("manifest.json", "sources.json"):
        good = json.loads((folder / "good" / name).read_text())
        (place / name).write_text(dumped(data.draw(st.just(good) | edited(good) | ODD)))
    tried(lambda: verify(place))


@examples(80)
@given(st.data())
def test_run_folders(folder: Path, data: st.DataObject) -> None:
    place = folder / "run"
    if not place.exists():
        write_run(place, [question(0), question(1)], ["yes", "no"])
        shutil.copytree(place, folder / "good run")
    for path in (folder / "good run").iterdir():
        good = path.read_bytes()
        texts = st.just(good) | changed(good)
        if path.name == RUN:
            texts |= edited(json.loads(good)).map(lambda content: dumped(content).encode())
        (place / path.name).write_bytes(data.draw(texts))
    tried(lambda: load_run(place))


@examples(80)
@given(st.data())
def test_logs_of_searches(folder: Path, data: st.DataObject) -> None:
    place = folder / "search"
    place.mkdir(exist_ok=True)
    good = b'{"schema": 1, "recipe": "x"}\n{"key": "a", "answer": "y"}\n'
    (place / "trials.jsonl").write_bytes(data.draw(changed(good)))
    opened = tried(lambda: Trials(place, {"recipe": "x"}, resume=True))
    if opened is not None:
        opened.__exit__()


@examples(150)
@given(st.data())
def test_probes(folder: Path, data: st.DataObject) -> None:
    (folder / "a.png").write_bytes(b"x")
    good = {"id": "1", "text": "What?", "media": {"image": "a.png"}, "choices": ["a", "b"], "gold": "a"}
    path = folder / "probes.jsonl"
    path.write_text("\n".join(dumped(data.draw(edited(good) | ODD)) for _ in range(2)))
    tried(lambda: read_probes(path))


@examples(100)
@given(st.data())
def test_axes(folder: Path, data: st.DataObject) -> None:
    number = st.sampled_from(["0", "1", "-1", "1e-9", "1e99999", "0.1", "9" * 50, ""]) | st.floats().map(str)
    values = st.tuples(number, number, number).map(":".join) | st.lists(st.sampled_from(PIECES) | number).map(",".join)
    name = st.sampled_from(["scale", "rank", "weight.one", "x" * 5000, "\x1b"])
    recipe = load_recipe(write_recipe(folder))
    tried(lambda: parse_axes([f"{data.draw(name)}={data.draw(values)}"], recipe))


@examples(80)
@given(st.data())
def test_tokenizers(folder: Path, data: st.DataObject) -> None:
    place = folder / "tokens"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    good = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"content": "c", "id": 2}]}
    if data.draw(st.booleans()):
        (place / "tokenizer.json").write_text(dumped(data.draw(edited(good) | ODD)))
    else:
        (place / "tokenizer.model").write_bytes(
            data.draw(changed(b"\x0a\x05\x0a\x03abc\x0a\x05\x0a\x03def") | st.binary())
        )
    more = {"added_tokens_decoder": {"3": {"content": "d"}}}
    (place / "tokenizer_config.json").write_text(dumped(data.draw(st.just(more) | edited(more))))
    tried(lambda: read_tokens(place))


@cache  # torch names storages by their addresses, which differ from call to call
def saved(zipped: bool) -> bytes:
    """What torch writes of three tensors, one of which is a transposed view."""
    file, wide = io.BytesIO(), torch.arange(6.0).reshape(2, 3)
    torch.save(
        {"a": wide, "b": wide.T, "c": torch.ones(3, dtype=torch.int64)}, file, _use_new_zipfile_serialization=zipped
    )
    return file.getvalue()


@examples(150)
@given(st.data())
def test_damaged_pickles(folder: Path, data: st.DataObject) -> None:
    path = folder / "damaged.bin"
    path.write_bytes(data.draw(changed(saved(True)) | changed(saved(False))))
    tried(lambda: read_all(path))
    tried(lambda: unpickle(path))


class Called:
    """Pickled as a call of a function that the file names."""

    def __init__(self, function: Any, arguments: tuple[Any, ...]) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


FUNCTIONS = [
    bytearray,
    list,
    eval,
    torch.zeros,
    torch.Size,
    torch._utils._rebuild_tensor_v2,
    torch._utils._rebuild_parameter,
]
STEPS = [
    b"}",
    b"]",
    b")",
    b"(",
    b"u",
    b"s",
    b"a",
    b"e",
    b"t",
    b"\x85",
    b"\x86",
    b"q\0",
    b"h\0",
    b"R",
    b"b",
    b"K\1",
    b"0",
    b"2",
]
STEPS += [
    b"ctorch\nFloatStorage\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ccollections\nOrderedDict\n",
    b"X\1\0\0\0a",
    b"Q",
]


@examples(150)
@given(st.data())
def test_made_up_pickles(folder: Path, data: st.DataObject) -> None:
    calls = st.builds(Called, st.sampled_from(FUNCTIONS), st.lists(ODD, max_size=4).map(tuple))
    whole = st.dictionaries(st.text(max_size=3), ODD | calls, max_size=3).map(lambda content: pickle.dumps(content, 2))
    steps = st.lists(st.sampled_from(STEPS), max_size=25).map(lambda parts: b"\x80\2" + b"".join(parts) + b".")
    path = folder / "made.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data.draw(whole | steps))
        archive.writestr("archive/data/0", bytes(8))
    tried(lambda: read_all(path))
    tried(lambda: unpickle(path))


def test_what_is_fuzzed_is_read_when_it_is_good(folder: Path) -> None:
    """The targets would pass if nothing were ever read."""
    place = folder / "as it should be"
    recipe = load_recipe(write_recipe(place))
    assert len(plan(recipe).jobs) == len(SHAPES)
    assert set(WeightFile(place / "one/adapter_model.safetensors").refs) == set(lora_tensors())
    for zipped in (True, False):
        (place / "saved.bin").write_bytes(saved(zipped))
        file = WeightFile(place / "saved.bin")
        assert torch.equal(file.read(file.refs["b"]), torch.arange(6.0).reshape(2, 3).T)
        assert torch.equal(unpickle(place / "saved.bin")["b"], torch.arange(6.0).reshape(2, 3).T)
    assert write_base(place / "another").exists()

"""What a model's folder may hold: regular files inside it, of bounded size, depth and types; patterns that end."""

import io
import json
import os
import pickle
import socket
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_inputs import CONFIG, SLOTS, lora_tensors, with_header, write_base, write_lora, write_recipe

from modalloy import merge, plan
from modalloy.errors import CheckpointError, MediaError, ModalloyError, RecipeError, shown
from modalloy.families import vocabulary
from modalloy.families.vocabulary import read_tokens
from modalloy.recipe import Recipe, load_recipe, parse_bytes
from modalloy.search.probes import read_probes
from modalloy.search.space import parse_axes
from modalloy.specialists.layouts import open_specialist
from modalloy.storage.config import read_config
from modalloy.storage.folder import parse_json, present, read_json
from modalloy.storage.patterns import first_matches
from modalloy.storage.pickled import unpickle
from modalloy.storage.tensors import Checkpoint, WeightFile
from modalloy.yaml_text import MAX_VALUES, parse_yaml


@contextmanager
def refused(message: str, kind: type[ModalloyError] = CheckpointError) -> Iterator[None]:
    """The block raises one printable line of less than 1000 characters."""
    with pytest.raises(kind, match=message) as caught:
        yield
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


# ---------------------------------------------------------------------------------------- special files and links
def put_pipe(path: Path) -> None:
    os.mkfifo(path)


def put_socket(path: Path) -> None:
    before = os.getcwd()
    os.chdir(path.parent)  # the name of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)


SPECIAL: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (put_pipe, "is a named pipe, where a file is expected"),
    "socket": (put_socket, "is a socket, where a file is expected"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device, where a file is expected"),
    "folder": (lambda path: path.mkdir(), "is a folder, where a file is expected"),
    "link to nothing": (lambda path: path.symlink_to("absent"), "is a link to a file that is missing"),
    "link in a circle": (lambda path: path.symlink_to(path.name), "it is a link in a circle"),
    "link out of the folder": (
        lambda path: path.symlink_to("/etc/passwd"),
        r"is a link out of the model's folder, to /etc/passwd",
    ),
}
NAMES = ("base/config.json", "base/model.safetensors", "one/adapter_config.json", "one/adapter_model.safetensors")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("put", "message"), SPECIAL.values(), ids=SPECIAL)
def test_what_is_no_file_of_the_folder_is_refused_at_once(
    put: Callable[[Path], object], message: str, name: str, tmp_path: Path
) -> None:
    recipe = load_recipe(write_recipe(tmp_path))
    (tmp_path / name).unlink()
    put(tmp_path / name)
    with refused(message):
        plan(recipe)


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "generation_config.json"])
def test_a_pipe_does_not_count_as_an_absent_file(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with refused(f"{name}: is a named pipe"):
        present(tmp_path, [name])


def test_a_recipe_and_probes_that_are_pipes_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    with refused(r"pipe\.yaml: is a named pipe", RecipeError):
        load_recipe(tmp_path / "pipe.yaml")
    with refused(r"pipe\.yaml: is a named pipe", RecipeError):
        parse_axes([str(tmp_path / "pipe.yaml")], load_recipe(write_recipe(tmp_path)))
    with refused(r"pipe\.yaml: is a pipe or a device, not a file", MediaError):
        read_probes(tmp_path / "pipe.yaml")
    (tmp_path / "probes.jsonl").write_text('{"text": "What?", "media": {"image": "pipe.yaml"}}')
    with refused(r"line 1: \S+pipe\.yaml: is a pipe or a device, not a file", MediaError):
        read_probes(tmp_path / "probes.jsonl")


def test_links_of_the_hubs_cache_and_within_the_folder_are_read(tmp_path: Path) -> None:
    cache = tmp_path / "models--owner--name"
    write_base(cache / "snapshots" / ("a" * 40))
    snapshot = next((cache / "snapshots").iterdir())
    (cache / "blobs").mkdir()
    for index, path in enumerate(list(snapshot.iterdir())):
        path.rename(cache / "blobs" / str(index))
        path.symlink_to(f"../../blobs/{index}")
    assert Checkpoint(snapshot, ["model"]).refs and read_config(snapshot) == CONFIG
    (tmp_path / "own").mkdir()
    (tmp_path / "own/real.json").write_text("{}")
    (tmp_path / "own/config.json").symlink_to("real.json")
    assert read_json(tmp_path / "own/config.json") == {}


def test_a_private_file_that_a_folder_links_to_is_not_copied_into_a_result(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    (tmp_path / "private.json").write_text('{"secret": 1}')
    (tmp_path / "base/tokenizer_config.json").symlink_to("../private.json")
    with refused("is a link out of the model's folder"):
        merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------- JSON and configs
JSON = {
    "memory": (b"[" + b"{}," * 3_000_000 + b"0]", r"would take 1\.5 GB of memory, more than 0\.6 GB"),
    "depth": (b"[" * 70 + b"]" * 70, "is nested more than 64 deep"),
    "great depth": (b"[" * 100_000, "is nested too deeply"),
    "a key twice": (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' is there twice"),
    "half a surrogate pair": (b'{"a": [["\\ud800x"]]}', r"'\\ud800x' is half a surrogate pair"),
    "half of one as key": (b'{"a": {"\\uDFFF": 1}}', "is half a surrogate pair"),
    "long number": (b"1" * 5000, "4300"),
}


@pytest.mark.parametrize(("text", "message"), JSON.values(), ids=JSON)
def test_json_is_bounded(text: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_json_that_is_well_formed_is_read() -> None:
    assert parse_json(rb'{"a": "\ud83d\ude00 \\ud800", "b": [1, {"c": null}]}') == {
        "a": "😀 \\ud800",
        "b": [1, {"c": None}],
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "8"}, "hidden_size is '8', not a positive whole number"),
        ({"hidden_size": [8]}, r"hidden_size is \[8\], not a positive whole number"),
        ({"num_hidden_layers": 10**400}, "num_hidden_layers is 1000"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"text_config": ["a"]}, r"text_config is \['a'\], not a table"),
        ({"text_config": {"hidden_size": {}}}, r"text_config\.hidden_size is \{\}"),
        ({"architectures": [["a"]]}, "architectures is .*, not a list of texts"),
        ({"model_type": 7}, "model_type is 7, not a text"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', not true or false"),
    ],
)
def test_a_config_with_values_of_other_types_is_refused_by_file_and_key(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    recipe = load_recipe(write_recipe(tmp_path))
    (tmp_path / "base/config.json").write_text(json.dumps(CONFIG | change))
    with refused(rf"base/config\.json: {message}.*; correct the file"):
        plan(recipe)


def test_long_and_deep_values_are_cut_in_messages() -> None:
    nested: Any = [1]
    for _ in range(40):
        nested = [nested, nested, nested, nested]
    for value in ("x" * 10**6, "\x1b[2J" * 500, nested, {"k" * 999: nested}, 10**5000, [10**4000], b"x" * 999):
        assert len(shown(value)) < 700 and shown(value).isprintable()
    assert shown("it") == "'it'" and shown({"a": [1, 2.5]}) == "{'a': [1, 2.5]}"


# ---------------------------------------------------------------------------------------- headers and index files
HEADERS: dict[str, tuple[Any, str]] = {
    "no object": ([1], "is no JSON object"),
    "a tensor that is no object": ({"a": 1}, "header is damaged"),
    "a shape that is a table": ({"a": {"dtype": "F32", "shape": {}, "data_offsets": [0, 4]}}, "not whole numbers"),
    "a size beyond 64 bits": (
        {"a": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}},
        "no tensor has the shape",
    ),
    "sizes whose product is": (
        {"a": {"dtype": "U8", "shape": [0, 2**40, 2**40], "data_offsets": [0, 0]}},
        "no tensor has the shape",
    ),
    "100 dimensions": ({"a": {"dtype": "U8", "shape": [1] * 100, "data_offsets": [0, 1]}}, "no tensor has the shape"),
    "a name of 5,000 characters": (
        {"a" * 5000: {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}},
        r"'a+…a+' is no name of a tensor",
    ),
    "a name with a terminal's escape": (
        {"\x1b[2J": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}},
        r"'\\x1b\[2J' is no name of a tensor",
    ),
    "a name that is there twice": (
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        "'a' is there twice",
    ),
    "a type of 9,000 characters": (
        {"a": {"dtype": "F" * 9000, "shape": [1], "data_offsets": [0, 1]}},
        "is stored as F+…F+,",
    ),
}


@pytest.mark.parametrize(("header", "message"), HEADERS.values(), ids=HEADERS)
def test_odd_headers_are_refused_in_one_line(header: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(with_header(header, b"\0"))
    with refused(message):
        WeightFile(tmp_path / "model.safetensors")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A base whose weights are one shard with an index."""
    write_base(tmp_path / "base")
    (tmp_path / "base/model.safetensors").rename(tmp_path / "base/shard")
    return tmp_path / "base"


def write_index(folder: Path, names: dict[str, Any], other: str = "shard") -> None:
    stored = dict.fromkeys(load_file(folder / "shard"), other)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": stored | names}))


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../base/shard",
        "..",
        ".",
        "",
        "sub/shard",
        "shard\0",
        "\x1b[2J",
        "x" * 300,
        "x" * 5000,
        "sh\nard",
    ],
)
def test_shards_outside_the_folder_or_without_a_name_are_refused(name: str, shards: Path) -> None:
    (shards / "sub").mkdir()
    write_index(shards, {"model.norm.weight": name})
    with refused("no file of this folder; correct the index|no such file|missing"):
        Checkpoint(shards, ["model"])


def test_a_shard_that_is_a_link_out_of_the_folder_is_refused(shards: Path) -> None:
    (shards / "shard").rename(shards.parent / "private")
    (shards / "shard").symlink_to("../private")
    (shards / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": "shard"}}')
    with refused(r"shard: is a link out of the model's folder, to \S+private; put the file itself there"):
        Checkpoint(shards, ["model"])


def test_a_path_in_the_folder_is_the_shard_that_it_names(shards: Path) -> None:
    write_index(shards, {"model.norm.weight": "shard"}, "./shard")
    assert len(Checkpoint(shards, ["model"]).files) == 1


def test_a_tensor_that_the_index_does_not_list_can_be_added_as_the_message_says(shards: Path) -> None:
    save_file(load_file(shards / "shard") | {"extra": torch.zeros(1)}, shards / "more")
    write_index(shards, {}, "more")
    (shards / "shard").unlink()
    with refused(r'more: holds extra, which the index does not list; .* add "extra": "more" to its weight_map'):
        Checkpoint(shards, ["model"])
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    index["weight_map"]["extra"] = "more"
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "extra" in Checkpoint(shards, ["model"]).refs


# ---------------------------------------------------------------------------------------- pickles
class Called:
    """Pickled as a call of a function that the file names."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def zipped(content: bytes, records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip as torch writes it, with this pickle and these records."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in {"data.pkl": content, "version": b"3\n", **records}.items():
            archive.writestr(f"archive/{name}", data)
    return file.getvalue()


def torch_saved(content: Any, *, new: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=new)
    return file.getvalue()


deep: Any = []
for _ in range(200):
    deep = [deep]
wide: Any = {}
for _ in range(60):
    wide = {"a": wide, "b": wide}
MORE = "refused: it holds more than tensors and could run code"
PICKLES: dict[str, tuple[bytes, str]] = {
    "a function of torch that makes tensors": (zipped(pickle.dumps({"a": Called(torch.zeros, 10**9)}, 2), {}), MORE),
    "a set of bytes": (zipped(pickle.dumps({"a": Called(bytearray, 2**50)}, 2), {}), MORE),
    "a place in the memo beyond memory": (
        zipped(b"\x80\2}r\xff\xff\xff\x7fX\1\0\0\0aK\1s.", {}),
        "not a dictionary of tensors",
    ),
    "a text longer than the file": (zipped(b"\x80\4}\x8d" + b"\xff" * 7 + b"\x0fa.", {}), "not a readable .bin"),
    "an expanded tensor": (
        torch_saved({"a": torch.zeros(1).expand(10**6, 10**6)}),
        r"repeats 1 stored ones .*contiguous",
    ),
    "an expanded tensor, as before torch 1.6": (
        torch_saved({"a": torch.zeros(2).expand(9, 2)}, new=False),
        "repeats 2 stored",
    ),
    "records that are compressed": (
        zipped(pickle.dumps({}, 2), {"byteorder": bytes(10**7)}, zipfile.ZIP_DEFLATED),
        "its tensors are compressed",
    ),
    "a byte order of 10 MB": (
        zipped(pickle.dumps({}, 2), {"byteorder": bytes(10**7)}),
        r"has 10,000,000 bytes, at most 16",
    ),
    "a pickle of millions of steps": (
        zipped(b"\x80\2]" + b"N0" * 3 + b"h\0" * 1 + b".", {}),
        "not a readable|more than tensors",
    ),
    "too many steps": (zipped(b"\x80\2(" + b"N" * 2_100_000 + b"t.", {}), "more than 2,000,000 steps"),
    "tables in tables": (zipped(pickle.dumps(wide, 2), {}), "not a dictionary of tensors"),
    "lists in lists": (zipped(pickle.dumps({"a": deep}, 2), {}), "not a dictionary of tensors"),
    "a key that is no text": (zipped(b"\x80\2})K\1s.", {}), "not a readable .bin"),
    "a tensor of 8 bits": (torch_saved({"a": torch.ones(2).to(torch.float8_e4m3fn)}), "which cannot be merged"),
    "a conjugated view": (
        torch_saved({"a": torch.ones(2, dtype=torch.complex64).conj()}),
        "a is a negated or conjugated",
    ),
}


@pytest.mark.parametrize(("content", "message"), PICKLES.values(), ids=PICKLES)
def test_pickles_hold_tensors_and_nothing_else(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.bin"
    path.write_bytes(content)
    with refused(message):
        WeightFile(path)


def test_an_encoders_file_of_nested_tables_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(zipped(pickle.dumps(deep, 2), {}))
    with refused("is nested more than 64 deep"):
        unpickle(tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes(zipped(pickle.dumps(wide, 2), {}))
    assert len(unpickle(tmp_path / "a.pt")) == 2  # of 2^60 paths, each table once
    (tmp_path / "a.pt").write_bytes(zipped(b"\x80\2]q\0h\0a.", {}))
    with refused("is nested more than 64 deep"):
        unpickle(tmp_path / "a.pt")


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_torch_saves_is_read_as_torch_reads_it(new: bool, protocol: int, tmp_path: Path) -> None:
    model, whole = torch.nn.Linear(3, 2), torch.arange(24.0).reshape(2, 3, 4)
    content = dict(model.state_dict()) | {
        "view": whole[1, 1:],
        "columns": whole.transpose(0, 2),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "whole numbers": torch.tensor([1, -1]),
        "truth": torch.tensor([True]),
        "nothing": torch.zeros(0, 5),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    torch.save(content, tmp_path / "a.bin", pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    file, mapped = WeightFile(tmp_path / "a.bin"), unpickle(tmp_path / "a.bin")
    assert set(file.refs) == set(content)
    for name, tensor in content.items():
        for found in (file.read(file.refs[name]), mapped[name]):
            assert found.dtype == tensor.dtype and torch.equal(found, tensor.detach()), name


def test_a_module_of_several_layers_keeps_its_versions_out_of_the_tensors(tmp_path: Path) -> None:
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2)).state_dict(), tmp_path / "a.pt")
    assert set(WeightFile(tmp_path / "a.pt").refs) == {"0.weight", "0.bias", "1.weight", "1.bias"}


# ---------------------------------------------------------------------------------------- patterns
@pytest.mark.parametrize("pattern", [r"((\w+\.?)+)+\$", r"(?:\S\S|\S|\S\S\S)*#"])
def test_patterns_that_would_not_end_are_stopped(pattern: str, tmp_path: Path) -> None:
    write_lora(tmp_path / "one", alpha_pattern={pattern: 2})
    with refused(r"adapter_config\.json: alpha_pattern: .* takes more than 2 s to match; write plainer patterns"):
        open_specialist(tmp_path / "one")


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["x", "("], r"'\(' is not a pattern"),
        (["a" * 2000], "is longer than 1000 characters"),
        (["a"] * 10**6, "too many"),
    ],
)
def test_patterns_that_are_none_are_refused(patterns: list[str], message: str) -> None:
    with refused(message):
        first_matches(patterns, ["model.a", "b", "c"])


def test_patterns_match_as_pefts_do() -> None:
    names = ["model.layers.0.q_proj", "model.layers.10.q_proj", "q_proj", "xq_proj"]
    assert first_matches(["layers.0.q_proj", "q_proj"], names) == [0, 1, 1, None]
    assert first_matches([r"layers\.\d{2}\..*", "q_proj|v_proj"], names) == [1, 0, 1, None]


def test_rank_patterns_set_each_modules_scale(tmp_path: Path) -> None:
    opened = open_specialist(write_lora(tmp_path / "one", alpha_pattern={r".*mlp\.(up|down)_proj": 8, "q_proj": 2}))
    scales = {slot.split(".")[-2]: factors.scale for slot, factors in opened.text_lora.items()}
    assert scales == dict.fromkeys(["k_proj", "v_proj", "o_proj", "gate_proj"], 2.0) | {
        "up_proj": 4,
        "down_proj": 4,
        "q_proj": 1,
    }


def test_an_adapter_beside_a_full_model_is_refused_by_both_names(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path))
    (tmp_path / "base/model.safetensors").rename(tmp_path / "one/model.safetensors")
    write_base(tmp_path / "other")
    (tmp_path / "other/model.safetensors").rename(tmp_path / "base/model.safetensors")
    with refused(
        r"one: holds an adapter \(adapter_model\.safetensors\) and a full model \(model\.safetensors\); give a folder"
    ):
        plan(recipe)


def test_flags_of_an_adapter_must_be_true_or_false(tmp_path: Path) -> None:
    with refused("use_rslora is 'false', not true or false"):
        open_specialist(write_lora(tmp_path / "one", use_rslora="false"))


# ---------------------------------------------------------------------------------------- YAML and sizes
def bomb(depth: int, text: str = "x") -> str:
    inner = f"&b0 [{text}]"
    for level in range(1, depth):
        inner = f"&b{level} [{inner}, {', '.join([f'*b{level - 1}'] * 7)}]"
    return inner


YAML = {
    "aliases that multiply": (bomb(9), f"more than {MAX_VALUES:,} values, aliased ones counted"),
    "aliases in keys": (f"? {bomb(3)}\n: 1", "is no word, and keys must be words"),
    "merge keys that multiply": (
        "a0: &a0 {x: 1, y: 2, z: 3}\n"
        + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 12)}]}}\n" for i in range(1, 7)),
        f"more than {MAX_VALUES:,} values",
    ),
    "an alias of what holds it": ("&a {b: *a}", r"\*a stands inside what it names"),
    "many values": ("[" + "1, " * 30_000 + "]", f"more than {MAX_VALUES:,} values"),
    "depth": ("[" * 40 + "]" * 40, "nested more than 20 deep"),
    "size": ("#" * 1_100_000, "larger than 1,000,000 characters"),
    "a long word": ("a: " + "x" * 5000, "is longer than any value"),
    "a long number": ("a: " + "7" * 150, "is longer than any value"),
    "a number beyond 64 bits": ("a: 99999999999999999999", "is larger than any number here"),
    "a hexadecimal one": ("a: 0x" + "f" * 60, "is larger than any number here"),
    "a float beyond 64 bits": ("a: 1.0e+400", "is larger than any number here"),
    "half a surrogate pair": (r'a: "\udfff"', "holds characters that are no text"),
    "a terminal's escape": (r'a: "\e[2J"', r"'\\x1b\[2J' holds characters that are no text"),
    "a null character": (r'a: "b\0c"', "holds characters that are no text"),
    "a date": ("a: 2024-02-30", "'2024-02-30' is read as a date; put it between quotes"),
    "a tag that does not fit": ("a: !!float dog", "'dog' is no float"),
    "null of something": ("a: !!null dog", "'dog' is no null"),
    "a list as text": ("a: !!str [b]", "the tag '!!str' does not fit"),
    "pairs": ("a: !!omap [b: 1]", "the tag '!!omap' does not fit"),
    "bytes": ("a: !!binary AAAA", "the tag '!!binary' does not fit"),
    "a truth value as key": ("on: 1", "the key 'on' is no word, and keys must be words"),
    "a key twice": ("b: {a: 1, 'a': 2}", "'a' is given twice, line 1, column 11"),
}


@pytest.mark.parametrize(("text", "message"), YAML.values(), ids=YAML)
def test_yaml_is_bounded(text: str, message: str) -> None:
    with refused(message, RecipeError):
        parse_yaml(text)


def test_anchors_merge_keys_and_tags_that_fit_are_read() -> None:
    text = "a: &a {x: 1, y: [2, 3.5]}\nb: {<<: *a, x: !!int '4'}\nc: [*a, !!float 1, !!str 5, .inf, -0b11, yes, ~, '2024-01-01']"
    a = {"x": 1, "y": [2, 3.5]}
    assert parse_yaml(text) == {
        "a": a,
        "b": {"x": 4, "y": [2, 3.5]},
        "c": [a, 1.0, "5", float("inf"), -3, True, None, "2024-01-01"],
    }


def test_distinct_keys_are_read_in_time_that_grows_with_their_number() -> None:
    assert len(parse_yaml("{" + ", ".join(f"k{i}: 1" for i in range(MAX_VALUES // 2 - 1)) + "}")) == MAX_VALUES // 2 - 1


@pytest.mark.parametrize("value", ["9" * 400 + "GB", 10**30, -1, True, "²GB", "1e3GB", "..GB", ".GB", [1], 0, "0GB"])
def test_sizes_that_no_file_has_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="is not a size; write for example 5GB or 500MB"):
        parse_bytes(value)


def test_sizes_are_read() -> None:
    assert [parse_bytes(text) for text in ("5GB", "1.5 kb", ".5MiB", 7)] == [5 * 10**9, 1500, 2**19, 7]


@pytest.mark.parametrize("weight", [10**400, 1e300, float("inf"), [1, float("nan")]])
def test_weights_beyond_float32_are_refused(weight: Any) -> None:
    with pytest.raises(ValueError, match="is not a finite number"):
        Recipe(base_model="a", models=[{"model": "b", "parameters": {"weight": weight}}])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ("scale=0:1:1e-8", "100,000,001 values; write a larger step, at most 1,000 are tried"),
        ("rank=1:2000:1", "2,000 values"),
        ("scale=1e999:1e999:1", "a number beyond 1e30"),
        ("scale=0:1e-99:1e-100", "or below 1e-30"),
        ("scale=" + "0.1," * 2000, "2,001 values; at most 1,000 are tried"),
        ("scale=" + "{" * 500, "cannot be read"),
        ("scale=!!float x,1", "cannot be read .*'x' is no float"),
        ("scale=2024-01-01,1", "is read as a date"),
        ("y" * 9000 + "=1,2", "'ssam' has no such parameter"),
        ("\x1b[2J", "not of the form NAME=VALUES"),
    ],
)
def test_axes_are_bounded(axis: str, message: str, tmp_path: Path) -> None:
    with refused(message, RecipeError):
        parse_axes([axis], load_recipe(write_recipe(tmp_path)))


@pytest.mark.parametrize(
    "model",
    [b"\x80" * 10_000, b"\x0a\x00" * 300, b"\x0a\x03\x12\x01a", b"\x0b", b"\x0a\x7f"],
    ids=lambda data: data[:4].hex(),
)
def test_sentencepiece_models_are_bounded(model: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "MAX_PIECES", 200)
    (tmp_path / "tokenizer.model").write_bytes(model)
    if model == b"\x0a\x03\x12\x01a":  # a piece without a name
        assert read_tokens(tmp_path) == {"": 0}
        return
    with refused("holds no vocabulary that can be read"):
        read_tokens(tmp_path)


def test_the_inputs_of_these_tests_are_merged_when_nothing_is_wrong(tmp_path: Path) -> None:
    merge(write_recipe(tmp_path), tmp_path / "out")
    assert set(SLOTS) < set(load_file(tmp_path / "out/model.safetensors"))
    assert set(lora_tensors()) == set(WeightFile(tmp_path / "one/adapter_model.safetensors").refs)

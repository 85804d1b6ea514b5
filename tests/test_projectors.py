"""Projectors that take features for entries of tables: their equations, by hand in float64; their settings; what is refused."""

import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_compose, write_omni
from published_clip import write_clip
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from modalloy.errors import CheckpointError, ModalloyError
from modalloy.machine.memory import peak_bytes
from modalloy.model import load_model
from modalloy.planning.planner import plan
from modalloy.recipe import Output, Recipe, SpecialistEntry
from modalloy.senses.projectors import build_projector, recognise
from modalloy.senses.projectors.embedding_table import EmbeddingTable
from modalloy.senses.projectors.qformer import QFormer, published_name
from modalloy.senses.projectors.reader import SHARPNESS, Reader

TABLES = {"dim": 6, "width": 5, "entries": [7, 3]}
READER = {
    "entries": 9,
    "n_queries": 3,
    "n_layers": 1,
    "n_positions": 4,
    "dim": 6,
    "hidden": 64,
    "heads": 1,
    "ffn": 8,
    "width": 5,
}


def filled(kind: str, settings: dict[str, Any]) -> Any:
    projector = build_projector({"type": kind, **settings})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return projector.requires_grad_(False)


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(x / x.sum(-1, keepdims=True))


def test_a_token_is_the_mean_of_the_embeddings_that_a_feature_is_taken_for() -> None:
    projector = filled("embedding_table", TABLES)
    x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))
    state = {name: tensor.double().numpy() for name, tensor in projector.state_dict().items()}
    parts = [
        softmax(x.double().numpy() @ state[f"heads.{i}.weight"].T + state[f"heads.{i}.bias"])
        @ state[f"tables.{i}.weight"]
        for i in (0, 1)
    ]
    tokens = projector(x)
    assert tokens.shape == (2, projector.n_tokens(4), projector.width)
    np.testing.assert_allclose(tokens.numpy(), (parts[0] + parts[1]) / 2, atol=1e-5)
    np.testing.assert_allclose(projector.told(x, 1).sum(-1).numpy(), 1, atol=1e-6)


def test_a_reader_gives_the_embeddings_that_its_queries_are_like() -> None:
    projector = filled("reader", READER)
    x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))
    alone = QFormer(**{name: size for name, size in READER.items() if name != "entries"})
    alone.load_state_dict({name: tensor for name, tensor in projector.state_dict().items() if name != "table.weight"})
    with torch.no_grad():
        queried = alone(x)
    torch.testing.assert_close(projector.queried(x), queried)
    given, table = queried.double().numpy(), projector.table.weight.double().numpy()
    like = given @ table.T / np.linalg.norm(given, axis=-1, keepdims=True) / np.linalg.norm(table, axis=-1)
    np.testing.assert_allclose(projector(x).numpy(), softmax(SHARPNESS * like) @ table, atol=1e-4)


@pytest.mark.parametrize(("kind", "settings"), [("embedding_table", TABLES), ("reader", READER)])
def test_a_projector_is_known_by_its_tensors(kind: str, settings: dict[str, Any]) -> None:
    projector = build_projector({"type": kind, **settings}, meta=True)
    name = published_name if kind == "reader" else str
    shapes = {name(own): tuple(tensor.shape) for own, tensor in projector.state_dict().items()}
    assert recognise(shapes, "image") == {"type": kind, **settings}
    assert {type(projector).own_name(published) for published in shapes} == set(projector.state_dict())


@pytest.mark.parametrize(
    ("changed", "shape", "reason"),
    [
        ("heads.1.weight", None, r"heads\.1\.weight is missing, not \(3, 6\)"),
        ("heads.0.weight", None, r"it has no heads\.0\.weight"),
        ("heads.1.bias", (4,), r"heads\.1\.bias is \(4,\), not \(3,\)"),
        ("tables.1.weight", (3, 4), r"tables\.1\.weight is \(3, 4\), not \(3, 5\)"),
        ("tables.0.weight", (7,), r"tables\.0\.weight is \(7,\), not of 2 dimensions"),
        ("heads.2.weight", (3, 6), r"heads\.2\.weight is \(3, 6\), not known"),
    ],
)
def test_tables_that_do_not_fit_are_refused_by_name(changed: str, shape: tuple[int, ...] | None, reason: str) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in EmbeddingTable(**TABLES).state_dict().items()}  # type: ignore[arg-type]
    shapes.pop(changed, None)
    if shape is not None:
        shapes[changed] = shape
    with pytest.raises(CheckpointError, match=f"image specialist: its projector is of no known kind .*{reason}"):
        recognise(shapes, "image")


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"tables.0.weight": (0, 5), "heads.0.weight": (0, 6)}, r"heads\.0\.weight is \(0, 6\), which holds no number"),
        ({"0.weight": (0, 1 << 40, 1 << 40)}, r"0\.weight is .*, which holds no number"),
        ({"0.weight": ()}, r"mlp: 0\.weight is \(\), not of 2 dimensions"),
        ({"0.weight": (5, 6), "2.weight": ()}, r"mlp: 2\.weight is \(\), not of 2 dimensions"),
        ({"audio_query_tokens": (3, 64)}, r"qformer: audio_query_tokens is \(3, 64\), not of 3 dimensions"),
    ],
)
def test_shapes_of_no_projector_are_refused_by_name(shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        recognise(shapes, "image")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "foo"}, r"a projector of type 'foo'; known are mlp, "),
        ({"type": ["mlp"]}, r"a projector of type \['mlp'\]"),
        ({"type": "embedding_table", **TABLES, "entries": 5}, r"'entries' of a projector is 5, not a size"),
        ({"type": "embedding_table", **TABLES, "entries": [True]}, r"'entries' of a projector is \[True\], not a size"),
        ({"type": "embedding_table", **TABLES, "entries": None}, r"'entries' of a projector is None, not a size"),
        ({"type": "embedding_table", **TABLES, "dim": -1}, r"'dim' of a projector is -1, not a size"),
        (
            {"type": "embedding_table", **TABLES, "foo": 1},
            r"not its own \(.*got an unexpected keyword argument 'foo'\)",
        ),
        ({"type": "embedding_table", "dim": 6}, r"not its own \(.*missing 2 required positional arguments"),
        ({"type": "reader", **READER, "foo": 1}, r"not its own \(.*unexpected keyword argument 'foo'\)"),
        ({"type": "reader", **READER, "self": 1}, r"not its own"),
        ({"type": "reader", **READER, "heads": 4}, r"a Q-Former of width 64 with 4 heads and 1 layers"),
        ({"type": "reader", **READER, "n_layers": 2000}, r"a Q-Former of width 64 with 1 heads and 2000 layers"),
        ({"type": "reader", **READER, "n_layers": 10**9}, r"'n_layers' of a projector is 1000000000, not a size"),
    ],
)
def test_settings_of_no_projector_are_refused(settings: dict[str, Any], message: str) -> None:
    """They stand in a config, which a stranger may have written."""
    with pytest.raises(CheckpointError, match=f"^config.json: .*{message}"):
        build_projector(settings, meta=True)


@pytest.mark.parametrize("shape", [(9,), (9, 4)])
def test_a_readers_table_of_another_width_is_refused(shape: tuple[int, ...]) -> None:
    shapes = {published_name(own): tuple(tensor.shape) for own, tensor in Reader(**READER).state_dict().items()}
    with pytest.raises(CheckpointError, match=r"table\.weight is .*, not (\(entries, 5\)|of 2 dimensions)"):
        recognise(shapes | {"table.weight": shape}, "audio")


def of_one(folder: Path, base: Path) -> Recipe:
    """A merge of one image specialist."""
    entry = SpecialistEntry(model=str(folder), modality="image")
    return Recipe(base_model=str(base), models=(entry,), output=Output(form="omni"))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_codes_without_scales_are_refused(dtype: torch.dtype, base: Path, tmp_path: Path) -> None:
    """Taken for numbers they would give a projector that says something else."""
    folder = write_compose(tmp_path / "one", "vision")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("modal_projectors.vision.0.weight"))
    save_file(tensors | {name: tensors[name].to(dtype)}, file)
    with pytest.raises(
        CheckpointError, match=rf"image specialist: {re.escape(name)} of its projector is stored as .*8"
    ):
        plan(of_one(folder, base))


@pytest.mark.parametrize(
    ("altered", "message"),
    [
        ({"n_tokens": 3}, r"config\.json: image has n_tokens 3, but its projector makes 4 of"),
        ({"projector": {"type": "foo"}}, r"config\.json: a projector of type 'foo'"),
        (
            {"projector": {"type": "mlp", "widths": [1280, 7, 32]}},
            r"projectors\.image\.0\.bias \(stored as \(32,\), not \(7,\)\)",
        ),
        (
            {"encoder": {"name": "builtin:efficientnet-lite0", "settings": {"foo": 1}}},
            r"the settings of encoder .*'foo'",
        ),
    ],
)
def test_an_altered_config_is_refused(altered: dict[str, Any], message: str, base: Path, tmp_path: Path) -> None:
    """Fewer tokens would be the first ones of what a projector makes, and the rest lost."""
    config = write_omni(tmp_path, base) / "config.json"
    told = json.loads(config.read_text())
    told["modalities"]["image"] |= altered
    config.write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match=message):
        load_model(config.parent)


def test_a_config_gets_no_memory_for_more_than_is_stored(base: Path, tmp_path: Path) -> None:
    config = write_omni(tmp_path, base) / "config.json"
    told = json.loads(config.read_text())
    told["modalities"]["image"]["update"]["rank"] = 1 << 19  # two gigabytes of factors
    config.write_text(json.dumps(told))
    load_model(base)  # what libraries take once
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak_bytes()
    with pytest.raises(CheckpointError, match=r"mismatched tensor .*down_image \(stored as \(4, \d+\), not \(524288, "):
        load_model(config.parent)
    assert peak_bytes() - before < 200e6


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "clip",
            {"hidden_size": 1 << 15, "num_attention_heads": 1},
            r"clip: .* is of shape \(32,\), not \(32768,\) as config\.json says",
        ),
        ("clip", {"num_hidden_layers": 10**6}, r"omni: num_hidden_layers is 1000000 in config\.json"),
        ("clip", {"patch_size": 0}, r"the settings of encoder 'clip' are not its own \(.*zero"),
        ("clip", {"hidden_act": 5}, r"the settings of encoder 'clip' are not its own"),
        ("clip", {"image_size": 1e300}, r"the settings of encoder 'clip' are not its own"),
        ("beats", {"width": 12 * 10**30}, r"the settings of encoder 'beats' are not its own"),
        ("pointbert", {"points": 10**12}, r"PointBert: 1000000000000 points"),
        ("pointbert", {"points": "many"}, r"the settings of encoder 'pointbert' are not its own"),
    ],
)
def test_an_encoder_gets_no_memory_for_more_than_is_stored(
    name: str, settings: dict[str, Any], message: str, base: Path, tmp_path: Path
) -> None:
    config = write_omni(tmp_path, base) / "config.json"
    told = json.loads(config.read_text())
    sense, clip = told["modalities"]["image"], write_clip(tmp_path / "clip", image_size=28)
    sense |= {"encoder": {"name": name, "settings": settings}, "source": str(clip), "n_tokens": 576}
    config.write_text(json.dumps(told))
    load_model(base)  # what libraries take once
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak_bytes()
    with pytest.raises(ModalloyError, match=message):
        load_model(config.parent)
    assert peak_bytes() - before < 200e6


def test_a_projector_with_a_nan_is_not_asked(base: Path, tmp_path: Path) -> None:
    """Its answers would be empty."""
    folder = write_omni(tmp_path, base)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("modal_projectors.vision.0.weight"))
    tensors[name][0, 0] = float("nan")
    with safe_open(file, "pt") as stored:
        save_file(tensors, file, stored.metadata())
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} holds NaN or infinite values"):
        load_model(folder)


@pytest.mark.parametrize(("said", "refused"), [("reader", True), (["reader"], False), ("mlp2x_gelu", False)])
def test_a_config_that_names_another_projector_is_refused(said: Any, refused: bool, base: Path, tmp_path: Path) -> None:
    """The tensors of a table say nothing of how it is used; those of an MLP do, whatever its name."""
    folder = write_compose(tmp_path / "one", "vision")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mm_vision_projector_type": said}))
    message = r"its config says that its projector is 'reader', but its tensors are those of mlp"
    with pytest.raises(CheckpointError, match=message) if refused else nullcontext():
        plan(of_one(folder, base))

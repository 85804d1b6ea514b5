"""The Q-Former of ModelCompose: the authors' tokens from their tensors, their keys at full size, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from published_beats import QFORMER, TINY_QFORMER, qformer_shapes, qformer_tensors

from modalloy.errors import CheckpointError
from modalloy.senses.projectors import build_projector, recognise
from modalloy.senses.projectors.qformer import QFormer

GOLDEN = Path(__file__).parent / "golden"
LAYER = "audio_Qformer.bert.encoder.layer"


@pytest.fixture(scope="module")
def projector() -> QFormer:
    tensors = qformer_tensors(seed=2)
    projector = QFormer(**QFormer.settings({name: tuple(tensor.shape) for name, tensor in tensors.items()}))
    projector.load_state_dict({QFormer.own_name(name): tensor for name, tensor in tensors.items()})
    return projector.requires_grad_(False)


def test_tokens_are_those_of_the_published_code(projector: QFormer) -> None:
    """Golden: VideoLlamaAudioQformer of THUNLP-MT/ModelCompose 7846997 (modelcompose/model/multimodal_projector/builder.py) with
    transformers 4.31, eval mode, float32, its BertConfig and last layer replaced by those of the tiny sizes."""
    features = np.random.default_rng(6).standard_normal((2, 50, 24)).astype(np.float32)
    golden = torch.from_numpy(np.load(GOLDEN / "qformer.npz")["tokens"])
    tokens = projector(torch.from_numpy(features))
    assert tokens.shape == (2, projector.n_tokens(50), projector.width) == golden.shape
    torch.testing.assert_close(tokens, golden, atol=1e-5, rtol=0)


def test_every_published_tensor_of_the_full_size_has_its_place() -> None:
    """The list: named_parameters() of the same class with 32 queries and 2 layers, the layers folded into {i}."""
    listed = json.loads((GOLDEN / "qformer_keys.json").read_text())
    published = {
        key.replace("{i}", str(i)): tuple(shape)
        for key, shape in listed["tensors"].items()
        for i in range(listed["layers"] if "{i}" in key else 1)
    }
    assert published == qformer_shapes(**QFORMER) and len(published) == 58
    settings = recognise(published, "audio")
    assert settings == {"type": "qformer", "heads": 12, **QFORMER}
    full = build_projector(settings, meta=True)
    ours = {name: tuple(tensor.shape) for name, tensor in full.state_dict().items()}
    assert {QFormer.own_name(name): shape for name, shape in published.items()} == ours
    assert len(ours) == 58 and sum(map(np.prod, ours.values())) == 22_865_920
    assert not list(full.buffers()) and (full.dim, full.width, full.n_tokens(512)) == (768, 4096, 32)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("audio_query_tokens", None, "it has no audio_query_tokens"),
        ("audio_query_tokens", (4, 128), r"audio_query_tokens is \(4, 128\), not of 3 dimensions"),
        ("audio_llama_proj.bias", None, r"audio_llama_proj\.bias is missing, not \(32,\)"),
        ("audio_llama_proj.bias", (31,), r"audio_llama_proj\.bias is \(31,\), not \(32,\)"),
        (f"{LAYER}.1.crossattention.self.key.weight", (128, 25), r"key\.weight is \(128, 25\), not \(128, 24\)"),
        (f"{LAYER}.3.output_query.dense.bias", (128,), r"layer\.2\.attention\.output\.LayerNorm\.bias is missing"),
        (f"{LAYER}.0.output.dense.bias", (128,), r"layer\.0\.output\.dense\.bias is \(128,\), not known"),
        ("audio_Qformer.bert.embeddings.position_ids", (1, 512), r"position_ids is \(1, 512\), not known"),
        ("linear.bias", (32,), r"linear\.bias is \(32,\), not known"),
        ("audio_query_tokens", (1, 4, 0), "are impossible"),
        ("audio_query_tokens", (1, 4, 193), "'hidden': 193, 'heads': 3.* are impossible"),
    ],
)
def test_what_is_not_the_published_layout_is_refused(name: str, shape: tuple[int, ...] | None, message: str) -> None:
    shapes = {**qformer_shapes(**TINY_QFORMER), name: shape}
    with pytest.raises(ValueError, match=message):
        QFormer.settings({key: value for key, value in shapes.items() if value is not None})


def test_heads_are_64_wide_where_they_can_be() -> None:
    heads = {
        hidden: QFormer.settings(qformer_shapes(**{**TINY_QFORMER, "hidden": hidden}))["heads"]
        for hidden in (32, 64, 192)
    }
    assert heads == {32: 1, 64: 1, 192: 3}


def test_more_features_than_positions_are_refused(projector: QFormer) -> None:
    assert projector.n_tokens(520) == 4
    with pytest.raises(CheckpointError, match="positions for 520 features of a medium, but the encoder gives 521"):
        projector.n_tokens(521)


def test_training_mode_changes_nothing(projector: QFormer) -> None:
    features = torch.from_numpy(np.random.default_rng(6).standard_normal((1, 7, 24)).astype(np.float32))
    tokens = projector.eval()(features)
    assert torch.equal(projector.train()(features), tokens)

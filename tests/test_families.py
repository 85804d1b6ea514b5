"""Families: every published name finds one slot and comes back, and every pair of AdaMMS is mapped without a rest."""

import math
from dataclasses import replace
from typing import Any

import native_models
import pytest
from family_keys import MODELS, published

from modalloy.errors import CheckpointError
from modalloy.families import FAMILIES, family_of
from modalloy.families.ancestors import ancestor, check_ancestors
from modalloy.families.mapping import ModelMap, map_models
from modalloy.families.rules import Place, Spelling, remaining, rows_of
from modalloy.families.vocabulary import same_rows, shared_tokens

# donor, target, tokens that both tokenizers have: the pairs of the paper's tables
PAIRS = [
    ("llava-onevision-qwen2-7b", "qwen2-vl-7b", None),
    ("llava-v1.5-7b", "cogvlm-chat", 32000),
    ("mplug-owl2", "llava-v1.5-7b", 32000),
    ("llava-v1.5-7b", "mplug-owl2", 32000),
    ("cogvlm-chat", "mplug-owl2", 32000),
    ("mplug-owl2", "cogvlm-chat", 32000),
    ("qwen2-vl-7b", "llava-onevision-qwen2-7b", None),
    ("yi-vl-34b", "cambrian-34b", None),
]
LAYER = "model.layers.7."


def mapped(donor: str, target: str, tokens: int | None = None, **options: Any) -> ModelMap:
    shared = None if tokens is None else same_rows(tokens)
    return map_models(*published(target), *published(donor), shared_tokens=shared, **options)


@pytest.mark.parametrize("model", MODELS)
def test_every_name_finds_its_slot_and_comes_back(model: str) -> None:
    header, config = published(model)
    family = family_of(config)
    spelling = family.spelling(header)
    slots = []
    for name in header:
        found = family.find(name, spelling)
        assert found is not None and family.native(found, spelling) == name
        others = replace(family, rules=tuple(rule for rule in family.rules if rule is not found.rule))
        assert found.layer or others.find(name, spelling) is None  # one rule only
        slots += found.slots
    assert len(slots) == len(set(slots))
    geometry = family.geometry(config)
    roles = {(slot.role, slot.part) for slot in slots if slot.layer is not None and slot.owner == "language"}
    expected = {"q", "k", "v", "o", "gate", "up", "down", "input_norm", "post_norm"}
    assert {role for role, part in roles if part == "weight"} == expected
    assert {slot.layer for slot in slots} == {None, *range(geometry.layers)}


def test_all_families_have_a_key_list() -> None:
    listed = {family_of(published(model)[1]).name for model in MODELS}
    assert listed.union(*CLASSES.values()) == set(FAMILIES)


# classes of transformers whose names are those of a tiny model, their family and the language model inside
CLASSES = {
    "qwen2_5_vl": ("qwen2_vl", "qwen2"),
    "qwen3_vl": ("qwen3_vl", "qwen3"),
    "gemma3": ("gemma3", "gemma3"),
    "internvl": ("beside_qwen2", "qwen2"),
    "qwen2_audio": ("beside_qwen2", "qwen2"),
    "audioflamingo3": ("beside_qwen2", "qwen2"),
    "internvl_on_qwen3": ("beside_qwen3", "qwen3"),
    "mistral3": ("mistral", "mistral"),
}


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_of_transformers_is_mapped_from_its_language_model(name: str) -> None:
    """Every weight of the decoder has its like in the language model, in both directions; what is outside is kept."""
    family, inner = CLASSES[name]
    model = native_models.internvl_on_qwen3()[0] if name == "internvl_on_qwen3" else native_models.MAKERS[name]()[0]
    header = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    assert family_of(config).name == family
    text = model.config.get_text_config().to_dict() | {"model_type": inner}
    names = {"qwen2": "Qwen2", "qwen3": "Qwen3", "gemma3": "Gemma3", "mistral": "Mistral"}
    plain = text | {"architectures": [f"{names[inner]}ForCausalLM"]}
    inside = f"{next(path for path, one in model.named_modules() if one is model.get_decoder())}."
    alone = {
        "model." + key.removeprefix(inside) if key.startswith(inside) else key: shape for key, shape in header.items()
    }
    donor = {
        key: shape
        for key, shape in alone.items()
        if key.startswith(("model.layers", "model.norm", "model.embed", "lm_"))
    }
    for result in (map_models(header, config, donor, plain), map_models(donor, plain, header, config)):
        merged = {key for key, tensor in result.tensors.items() if tensor.pieces}
        layers = {key for key in result.tensors if key.startswith((inside + "layers.", "model.layers."))}
        assert layers and layers <= merged
        assert not [key for key in result.dropped if key.startswith(("model.layers.", inside + "layers."))]


@pytest.mark.parametrize(("donor", "target", "tokens"), PAIRS)
def test_pairs_are_covered(donor: str, target: str, tokens: int | None) -> None:
    result = mapped(donor, target, tokens)
    target_header, donor_header = published(target)[0], published(donor)[0]
    assert list(result.tensors) == list(target_header)
    used = {piece.source for tensor in result.tensors.values() for piece in tensor.pieces}
    assert used | result.dropped.keys() == donor_header.keys() and not used & result.dropped.keys()
    counts = result.coverage()
    at_target = [counts[fate] for fate in ("merged", "duplicated", "kept")]
    assert sum(count["tensors"] for count in at_target) == len(target_header)
    assert sum(count["parameters"] for count in at_target) == sum(map(math.prod, target_header.values()))
    for tensor in result.tensors.values():
        for piece in tensor.pieces:
            assert piece.height == sum(end - begin for begin, end in piece.source_rows) > 0
    kept = {name for name, tensor in result.tensors.items() if not tensor.pieces}
    decoder = {name for name in kept if ".layers." in name and name.startswith("model.layers.")}
    assert all(name.endswith("inv_freq") for name in decoder)
    assert ("lm_head.weight" in kept) == ("model.embed_tokens.weight" in kept) == (tokens is None)
    assert result.page().count("\n") < 30


def test_counts_of_the_papers_pairs() -> None:
    into_cogvlm = mapped("mplug-owl2", "cogvlm-chat", 32000)
    counts = into_cogvlm.coverage()
    assert counts["merged"]["tensors"] == 3 + 32 * 7 and counts["duplicated"]["tensors"] == 32 * 5
    into_qwen = mapped("llava-onevision-qwen2-7b", "qwen2-vl-7b").coverage()
    assert into_qwen["merged"]["tensors"] == 1 + 28 * 12 and into_qwen["duplicated"]["tensors"] == 0
    # of a fused tensor whose vision queries have no place, the rows are counted as left out
    from_cogvlm = mapped("cogvlm-chat", "mplug-owl2", 32000)
    q = "model.layers.{i}.self_attn.vision_expert_query_key_value.weight"
    assert from_cogvlm.partly[q.format(i=7).replace("{i}", "7")][0] == 4096 * 4096
    donor = sum(map(math.prod, published("cogvlm-chat")[0].values()))
    used = {(piece.source, piece.source_rows) for t in from_cogvlm.tensors.values() for piece in t.pieces}
    sizes = {name: math.prod(shape[1:]) for name, shape in published("cogvlm-chat")[0].items()}
    rows = sum((end - begin) * sizes[name] for name, stretches in used for begin, end in stretches)
    assert rows + from_cogvlm.coverage()["dropped"]["parameters"] == donor


def test_mplug_owl2_into_cogvlm_is_the_published_map() -> None:
    tensors = mapped("mplug-owl2", "cogvlm-chat", 32000).tensors

    def sources(name: str) -> list[str]:
        return [piece.source.removeprefix(LAYER) for piece in tensors[LAYER + name].pieces]

    assert sources("input_layernorm.weight") == ["input_layernorm.multiway.0.weight"]
    for expert, way in (("language", 0), ("vision", 1)):
        qkv = ["self_attn.q_proj.weight", *(f"self_attn.{x}_proj.multiway.{way}.weight" for x in "kv")]
        assert sources(f"self_attn.{expert}_expert_query_key_value.weight") == qkv
        assert sources(f"self_attn.{expert}_expert_dense.weight") == ["self_attn.o_proj.weight"]
        for name in ("gate", "up", "down"):
            assert sources(f"mlp.{expert}_mlp.{name}_proj.weight") == [f"mlp.{name}_proj.weight"]
    qkv = tensors[LAYER + "self_attn.vision_expert_query_key_value.weight"]
    assert [piece.rows for piece in qkv.pieces] == [((0, 4096),), ((4096, 8192),), ((8192, 12288),)]
    assert [piece.duplicated for piece in qkv.pieces] == [True, False, False]
    assert {tensor.operation for tensor in tensors.values()} == {"same", "rename", "dup", "cat", "none"}
    assert tensors["model.vision.boi"].reason == "image separator"


def test_llava_into_mplug_owl2_goes_to_both_ways() -> None:
    tensors = mapped("llava-v1.5-7b", "mplug-owl2", 32000).tensors
    for name in ("self_attn.k_proj", "self_attn.v_proj", "input_layernorm", "post_attention_layernorm"):
        for way, operation in ((0, "rename"), (1, "dup")):
            tensor = tensors[f"{LAYER}{name}.multiway.{way}.weight"]
            assert [piece.source for piece in tensor.pieces] == [f"{LAYER}{name}.weight"]
            assert tensor.operation == operation


def test_fused_donors_are_split() -> None:
    result = mapped("cogvlm-chat", "mplug-owl2", 32000)
    (piece,) = result.tensors[LAYER + "self_attn.v_proj.multiway.1.weight"].pieces
    assert piece.source == LAYER + "self_attn.vision_expert_query_key_value.weight"
    assert piece.source_rows == ((8192, 12288),) and not piece.duplicated
    assert result.tensors[LAYER + "self_attn.v_proj.multiway.1.weight"].operation == "split"


def test_both_spellings_are_one_model() -> None:
    for old, new in (("qwen2-vl-7b", "qwen2-vl-7b-new"), ("llava-1.5-7b-hf", "llava-1.5-7b-hf-new")):
        result = mapped(old, new, 1000)
        decoder = [tensor for tensor in result.tensors.values() if tensor.pieces]
        assert {tensor.operation for tensor in decoder} <= {"same", "rename"}
        assert len(decoder) == len(published("qwen2-7b" if "qwen" in old else "vicuna-7b-v1.5")[0])


def test_interleaved_rows_of_internlm() -> None:
    family, (header, config) = FAMILIES["internvl2_5_internlm"], published("internvl2_5-8b")
    name = "language_model.model.layers.0.attention.wqkv.weight"
    found = family.find(name, family.spelling(header))
    assert found is not None
    q, k, v = rows_of(found, family.geometry(config), 6144)
    # eight groups of four queries, a key and a value, 128 rows each
    assert q[:2] == ((0, 512), (768, 1280)) and k[:2] == ((512, 640), (1280, 1408)) and v[-1] == (6016, 6144)
    assert sorted(stretch for rows in (q, k, v) for stretch in rows)[-1] == v[-1]


def test_vocabulary() -> None:
    # kept where the tokenizers differ, never matched by row
    kept = mapped("llava-onevision-qwen2-7b", "qwen2-vl-7b").tensors["model.embed_tokens.weight"]
    assert (kept.policy, kept.operation, kept.pieces) == ("keep_target", "none", ())
    # one is padded to 32064 rows: the 32000 of tokens are merged
    padded = mapped("llava-1.5-7b-hf", "llava-v1.5-7b", 32000).tensors["lm_head.weight"]
    assert padded.operation == "slice_rows" and padded.pieces[0].source_rows == ((0, 32000),)
    padded = mapped("llava-v1.5-7b", "llava-1.5-7b-hf", 32000)
    assert padded.tensors["language_model.lm_head.weight"].pieces[0].rows == ((0, 32000),)
    assert padded.coverage()["kept"]["parameters"] >= 2 * 64 * 4096
    with pytest.raises(
        CheckpointError,
        match=r"target: its tokenizer has a token in row 32000, but model.embed_tokens.weight has 32000 rows",
    ):
        mapped("llava-1.5-7b-hf", "llava-v1.5-7b", 32001)
    assert remaining([((2, 3), (5, 6)), ((3, 4),)], 8) == ((0, 2), (4, 5), (6, 8)) and remaining([((0, 8),)], 8) == ()


def test_shared_tokens() -> None:
    same = shared_tokens({"a": 0, "b": 1}, {"b": 1, "a": 0})
    assert same.same and same.rows == same.source_rows == ((0, 2),)
    swapped = shared_tokens({"a": 0, "b": 1}, {"a": 1, "b": 0})
    assert not swapped.same and (swapped.rows, swapped.source_rows) == (((0, 1), (1, 2)), ((1, 2), (0, 1)))
    # one stretch as long as both go on; "x" and "y" are one model's only
    found = shared_tokens({"x": 0, "a": 1, "b": 2, "c": 3}, {"a": 5, "b": 6, "c": 8, "y": 9})
    assert (found.rows, found.source_rows) == (((1, 3), (3, 4)), ((5, 7), (8, 9)))
    assert (found.count, found.sizes, found.heights) == (3, (4, 4), (4, 10))
    more = shared_tokens({"a": 0}, {"a": 0, "y": 1})
    assert more.rows == more.source_rows and not more.same
    assert shared_tokens({"Ġa": 0}, {"▁a": 0}).count == 0


def test_policies() -> None:
    result = mapped(
        "llava-v1.5-7b", "cogvlm-chat", 32000, policies={"*.vision_mlp.*": "keep_target", "*dense*": "take_source"}
    )
    assert result.tensors[LAYER + "mlp.vision_mlp.up_proj.weight"].policy == "keep_target"
    assert result.tensors[LAYER + "mlp.language_mlp.up_proj.weight"].policy == "merge"
    assert result.tensors[LAYER + "self_attn.vision_expert_dense.weight"].policy == "take_source"
    # without its copies for image tokens the donor gives the weights that they were made from
    result = mapped("mplug-owl2", "cogvlm-chat", 32000, policies={"*.multiway.1.*": "drop_source"})
    pieces = result.tensors[LAYER + "self_attn.vision_expert_query_key_value.weight"].pieces
    assert pieces[1].source.endswith("k_proj.multiway.0.weight") and pieces[1].duplicated
    assert result.dropped[LAYER + "self_attn.k_proj.multiway.1.weight"] == "the recipe leaves it out"
    with pytest.raises(CheckpointError, match=r"target: model\.vision\.boi is there"):
        mapped("llava-v1.5-7b", "cogvlm-chat", 32000, policies={"model.vision.*": "error"})


def changed(model: str, config: dict[str, Any] | None = None, **tensors: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    header, settings = published(model)
    return header | tensors, settings | (config or {})


@pytest.mark.parametrize(
    ("donor", "message"),
    [
        (published("llava-onevision-qwen2-7b"), r"donor: layers 28, but 32 in target"),
        (published("llava-v1.6-mistral-7b"), r"donor: intermediate size 14336, but 11008 in target"),
        (changed("llava-v1.5-7b", {"rope_theta": 5e5}), r"donor: rope theta 500000.0, but 10000.0 in target"),
        (changed("llava-v1.5-7b", {"rms_norm_eps": 1e-6}), r"donor: norm epsilon 1e-06, but 1e-05"),
        (changed("llava-v1.5-7b", {"num_key_value_heads": 8}), r"donor: key heads 8, but 32"),
        (changed("llava-v1.5-7b", {"tie_word_embeddings": True}), r"donor: tied embeddings True, but False"),
        (
            changed("llava-v1.5-7b", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
            r"rope scaling linear × 2.0, but none",
        ),
        (changed("llava-v1.5-7b", {"num_hidden_layers": 31}), r"config.json says 31 layers, but its tensors are of 32"),
        (changed("llava-v1.5-7b", {"hidden_size": "wide"}), r"hidden_size is 'wide', not a positive number"),
        (
            changed("llava-v1.5-7b", {"architectures": ["GPT2LMHeadModel"]}),
            r"names GPT2LMHeadModel .* which no family maps",
        ),
        (
            changed("llava-v1.5-7b", **{"model.layers.3.mlp.extra.weight": (4, 4)}),
            r"donor: no rule of family llama has model\.layers\.3\.mlp\.extra\.weight \(4, 4\)",
        ),
        (
            changed("llava-v1.5-7b", **{"model.layers.3.mlp.up_proj.weight": (11009, 4096)}),
            r"language up weight of layer 3 is \(11009, 4096\) .* but \(11008, 4096\) in",
        ),
        (
            changed("cogvlm-chat", **{"model.layers.3.self_attn.vision_expert_query_key_value.weight": (12287, 4096)}),
            r"query_key_value.weight has 12287 rows, but its config splits it into q 4096 \+ k 4096 \+ v 4096 = 12288",
        ),
    ],
)
def test_what_does_not_fit_is_refused(donor: tuple[dict[str, Any], dict[str, Any]], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        map_models(*published("llava-v1.5-7b"), *donor, shared_tokens=same_rows(32000))
    assert "\n" not in str(caught.value)


def test_missing_and_unclaimed_tensors_are_refused() -> None:
    header, config = published("llava-v1.5-7b")
    lacking = {name: shape for name, shape in header.items() if name != LAYER + "mlp.up_proj.weight"}
    with pytest.raises(
        CheckpointError, match=r"donor: has no language up weight of layer 7 .*, which target has as model\.layers\.7"
    ):
        map_models(header, config, lacking, config)
    with pytest.raises(
        CheckpointError, match=r"donor: model\.layers\.7\.mlp\.up_proj\.weight is the .* which target has not"
    ):
        map_models(lacking, config, header, config)
    without = {name: shape for name, shape in header.items() if "embed_tokens" not in name}
    with pytest.raises(CheckpointError, match=r"target: no model\.embed_tokens\.weight or language_model"):
        map_models(without, config, header, config)
    assert str(Place("q", 3, "vision", "bias")) == "vision q bias of layer 3" and Spelling() == Spelling("model.", "")


def test_ancestors() -> None:
    llama = "meta-llama/Llama-2-7b-hf"
    assert ancestor({"_name_or_path": "/data/models/llava-v1.5-7b/"}) == llama
    assert ancestor({"_name_or_path": r"C:\models\llava-v1.5-7b"}) == llama
    assert ancestor({"_name_or_path": "./out", "text_config": {"_name_or_path": "lmsys/vicuna-7b-v1.5"}}) == llama
    assert ancestor({}, "MAGAer13/mplug-owl2-llama2-7b@main") == llama == ancestor({}, llama)
    assert ancestor({"_name_or_path": "/cache/hub/models--lmsys--vicuna-7b-v1.5/snapshots/3321f76"}) == llama
    # a folder looks like a hub id, and an unknown model may be of any ancestor: its weights will tell
    assert ancestor({"_name_or_path": "output/vicuna-ft"}) is None and ancestor({"_name_or_path": 3}, "y/z") is None
    assert check_ancestors(("target", llama), ("donor", llama)) == llama
    with pytest.raises(
        CheckpointError, match=r"donor descends from 'Qwen/Qwen2-7B', target from 'meta-llama.* --allow-base-mismatch"
    ):
        check_ancestors(("target", llama), ("donor", "Qwen/Qwen2-7B"))
    for pair in ((llama, None), (None, llama), (None, None)):
        assert "compares weights" in check_ancestors(("target", pair[0]), ("donor", pair[1]))

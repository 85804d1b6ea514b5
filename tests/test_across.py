"""Merges across architectures: tiny models of two families made here, and the recipes of AdaMMS's pairs on true shapes."""

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from family_keys import published
from safetensors.torch import load_file, save_file
from torch import Tensor

from modalloy import load_recipe, merge, plan
from modalloy.errors import CheckpointError, ModalloyError, RecipeError
from modalloy.families import FAMILIES
from modalloy.families.rules import rows_of
from modalloy.families.vocabulary import shared_tokens
from modalloy.inspection.measure import inspect
from modalloy.inspection.page import page as inspection_page
from modalloy.methods import METHODS
from modalloy.recipe import Recipe
from modalloy.storage.folder import file_sha256
from modalloy.storage.tensors import TensorRef
from modalloy.storage.views import MappedRef, assembled
from modalloy.verify import verify

WIDTH, FFN, LAYERS, HEADS, TOKENS = 16, 24, 2, 4, 11
RECIPES = Path(__file__).parents[1] / "recipes" / "adamms"
KEYS = {
    "lmms-lab/llava-onevision-qwen2-7b-si": "llava-onevision-qwen2-7b",
    "Qwen/Qwen2-VL-7B-Instruct": "qwen2-vl-7b",
    "liuhaotian/llava-v1.5-7b": "llava-v1.5-7b",
    "THUDM/cogvlm-chat-hf": "cogvlm-chat",
    "MAGAer13/mplug-owl2-llama2-7b": "mplug-owl2",
    "01-ai/Yi-VL-34B": "yi-vl-34b",
    "nyu-visionx/cambrian-34b": "cambrian-34b",
}
Models = Callable[..., Path]


def small(model: str) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """The names of a published model with two layers and small sizes."""
    sizes = {4096: WIDTH, 11008: FFN, 12288: 3 * WIDTH, 32000: TOKENS, 64: 2}
    header, config = published(model)
    few = {
        name: tuple(sizes.get(size, 3) for size in shape)
        for name, shape in header.items()
        if ".layers." not in name or int(name.split(".layers.")[1].split(".")[0]) < LAYERS
    }
    changes = {
        "hidden_size": WIDTH,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
    }
    keys = {"num_key_value_heads": HEADS, "_name_or_path": "acme/ancestor", "vocab_size": TOKENS}
    return few, config | changes | keys


def ancestor_of(shape: tuple[int, ...]) -> Tensor:
    """A weight that is the same in all models, whether it stands alone or in a fused one."""
    block = torch.randn(WIDTH, *shape[1:], generator=torch.Generator().manual_seed(0))
    return block.repeat(-(-shape[0] // WIDTH), *(1 for _ in shape[1:]))[: shape[0]]


def write(
    folder: Path, model: str, seed: int, dtype: torch.dtype = torch.float32, related: float = 1.0, **config: Any
) -> Path:
    header, settings = small(model)
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir()
    noise = {name: torch.randn(*shape, generator=generator) for name, shape in header.items()}
    tensors = {name: (tensor + related * ancestor_of(tuple(tensor.shape))).to(dtype) for name, tensor in noise.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings | config))
    vocabulary = {f"t{row}": row for row in range(TOKENS)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
    return folder


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    def make(into: Path, *donors: Path, alpha: Any = 0.3, **more: Any) -> Path:
        content = {
            "target": str(into),
            "merge_method": "linear",
            "parameters": {"alpha": alpha},
            "models": [{"model": str(donor)} for donor in donors],
            "output": {"form": "full"},
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(content | more))
        return path

    return make


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def counterpart(name: str, donor: dict[str, Tensor]) -> Tensor | None:
    """AdaMMS's published map of a LLaVA into CogVLM, written out again."""
    layer = name.rpartition(".self_attn.")[0] or name.rpartition(".mlp.")[0]
    if name.endswith("query_key_value.weight") and ".vision.transformer" not in name:
        return torch.cat([donor[f"{layer}.self_attn.{x}_proj.weight"] for x in "qkv"])
    if name.endswith("expert_dense.weight"):
        return donor[f"{layer}.self_attn.o_proj.weight"]
    if "_mlp." in name:
        return donor[f"{layer}.mlp.{name.rpartition('_mlp.')[2]}"]
    return None if "inv_freq" in name else donor.get(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llava_into_cogvlm_is_interpolated(tmp_path: Path, recipe: Models, dtype: torch.dtype) -> None:
    target = write(tmp_path / "cogvlm", "cogvlm-chat", 1, dtype)
    donor = write(tmp_path / "llava", "llava-v1.5-7b", 2, dtype)
    out = tmp_path / "out"
    report = merge(recipe(target, donor), out)
    before, other, after = weights(target), weights(donor), weights(out)
    assert before.keys() == after.keys()
    moved = 0
    for name, tensor in after.items():
        found = counterpart(name, other)
        if found is None:  # byte for byte, neither shrunk nor grown (B1)
            assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8))
            continue
        moved += 1
        # α is the donor's weight (B3), accumulated wide (B10)
        exact = 0.7 * before[name].double() + 0.3 * found.double()
        tolerance = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 3e-7
        assert torch.allclose(
            tensor.double(), exact, rtol=tolerance, atol=tolerance * 2 if dtype == torch.float32 else 1e-7
        )
    # embeddings and norms (B1, B2), both experts' attention and both MLPs (B4)
    assert moved == 3 + LAYERS * 12
    assert f"{3 + LAYERS * 10 - 1} linear weights merged" in report.plan.summary()
    assert f"{1 + LAYERS * 2} norms and biases too" in report.plan.summary()
    counts = report.to_dict()["coverage"]["llava"]
    assert counts["family"] == "llama" and counts["duplicated"]["tensors"] == LAYERS * 5
    assert report.verification.share == 1 and verify(out).share == 1
    assert (out / "config.json").is_file() and (out / "tokenizer.json").is_file()
    card = (out / "README.md").read_text()
    assert (
        "α is the weight of the donor, 0 = target unchanged" in card
        and "| llava | llama | 17 (0.0M) | 10 (0.0M) |" in card
    )
    manifest = json.loads((out / "manifest.json").read_text())
    rows = {(source, name): (fate, why) for source, name, fate, why in manifest["tensors"]}
    assert rows["target", "model.vision.boi"] == ("kept", "image separator")
    assert rows["llava", "model.mm_projector.0.weight"] == ("left out", "projector (the donor's)")
    fate, why = rows["llava", "model.layers.1.self_attn.q_proj.weight"]
    assert fate == "merged" and "language_expert" in why and "vision_expert" in why


def test_alpha_zero_is_the_target_bit_for_bit(tmp_path: Path, recipe: Models) -> None:
    target, donor = write(tmp_path / "t", "cogvlm-chat", 1), write(tmp_path / "d", "mplug-owl2", 2)
    tensors = weights(target)
    tensors["model.norm.weight"][0] = -0.0  # which adding nothing would turn into 0
    save_file(tensors, target / "model.safetensors")
    merge(recipe(target, donor, alpha=0), tmp_path / "out")
    after = weights(tmp_path / "out")
    assert all(torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)) for name, tensor in tensors.items())


@pytest.mark.parametrize("model", ["cogvlm-chat", "mplug-owl2", "llava-v1.5-7b"])
def test_a_model_merged_with_itself_is_itself(tmp_path: Path, recipe: Models, model: str) -> None:
    target = write(tmp_path / "m", model, 1, torch.bfloat16)
    merge(recipe(target, target, alpha=0.37), tmp_path / "out")
    before, after = weights(target), weights(tmp_path / "out")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_interleaved_rows_are_assembled() -> None:
    family = FAMILIES["internvl2_5_internlm"]
    found = family.find("language_model.model.layers.0.attention.wqkv.weight", family.spellings[0])
    assert found is not None
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 8, "intermediate_size": 9}
    places = rows_of(found, family.geometry(sizes | {"num_hidden_layers": 1}), 16)
    stored = {name: torch.randn(rows, 3) for name, rows in (("q", 8), ("k", 4), ("v", 4))}
    refs = {name: TensorRef(name, torch.float32, tuple(t.shape), Path(name), 0) for name, t in stored.items()}
    parts = tuple((ref, ((0, ref.shape[0]),), rows) for ref, rows in zip(refs.values(), places, strict=True))
    fused = assembled(MappedRef("qkv", torch.float32, (16, 3), Path(), -1, parts), lambda ref: stored[ref.name])
    for group, block in enumerate(fused.split(8)):  # each: the group's queries, its key, its value
        q, k, v = block.split([4, 2, 2])
        assert torch.equal(q, stored["q"][4 * group : 4 * group + 4])
        assert torch.equal(k, stored["k"][2 * group : 2 * group + 2])
        assert torch.equal(v, stored["v"][2 * group : 2 * group + 2])
    # and taken apart again
    back = (refs["q"], places[0], ((0, 8),))
    apart = MappedRef("q", torch.float32, (8, 3), Path(), -1, (back,))
    assert torch.equal(assembled(apart, lambda ref: fused), stored["q"])


def test_both_directions_agree_on_what_is_shared(tmp_path: Path, recipe: Models) -> None:
    llava, owl = write(tmp_path / "a", "llava-v1.5-7b", 1), write(tmp_path / "b", "mplug-owl2", 2)
    merge(recipe(llava, owl, alpha=0.25), tmp_path / "one")
    merge(recipe(owl, llava, alpha=0.75), tmp_path / "other")
    one, other = weights(tmp_path / "one"), weights(tmp_path / "other")
    shared = [name for name in one.keys() & other.keys() if "inv_freq" not in name]
    assert len(shared) == 3 + LAYERS * 5
    for name in shared:
        assert torch.allclose(one[name], other[name], atol=1e-6)
    # a fused donor is split: CogVLM's vision keys go to mPLUG-Owl2's, its language keys to LLaVA's
    cog = write(tmp_path / "c", "cogvlm-chat", 3)
    merge(recipe(owl, cog, alpha=1.0), tmp_path / "split")
    split, fused = weights(tmp_path / "split"), weights(cog)
    for way, expert in ((0, "language"), (1, "vision")):
        rows = fused[f"model.layers.1.self_attn.{expert}_expert_query_key_value.weight"][WIDTH : 2 * WIDTH]
        assert torch.allclose(split[f"model.layers.1.self_attn.k_proj.multiway.{way}.weight"], rows, atol=1e-6)


def test_rules_of_recipes(tmp_path: Path, recipe: Models) -> None:
    target, donor = write(tmp_path / "t", "mplug-owl2", 1), write(tmp_path / "d", "llava-v1.5-7b", 2)
    rules = {"*layernorm*": {"policy": "keep"}, "*.mlp.*": {"parameters": {"alpha": [0.0, 0.4]}}}
    merge(recipe(target, donor, modules=rules, vocabulary="keep"), tmp_path / "out")
    before, other, after = weights(target), weights(donor), weights(tmp_path / "out")
    for name in before:
        if (
            "layernorm" in name
            or "embed_tokens" in name
            or name.endswith(("lm_head.weight", "layers.0.mlp.up_proj.weight"))
        ):
            assert torch.equal(after[name], before[name]), name  # keeping norms leaves them as they were (B2)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.allclose(after[name], 0.6 * before[name] + 0.4 * other[name], atol=1e-6)
    two = write(tmp_path / "e", "cogvlm-chat", 3)
    merge(recipe(target, donor, two), tmp_path / "two")
    mean = (other["model.norm.weight"] + weights(two)["model.norm.weight"]) / 2
    assert torch.allclose(
        weights(tmp_path / "two")["model.norm.weight"], 0.7 * before["model.norm.weight"] + 0.3 * mean
    )


def test_weights_over_the_layers_need_no_value_for_what_is_kept(tmp_path: Path, recipe: Models) -> None:
    target, donor = write(tmp_path / "t", "mplug-owl2", 1), write(tmp_path / "d", "llava-v1.5-7b", 2)
    models = [{"model": str(donor), "parameters": {"weight": [0, 1]}}]
    written = recipe(target, modules={"model.norm.weight": {"policy": "keep"}}, vocabulary="keep", models=models)
    merge(written, tmp_path / "out")
    before, other, after = weights(target), weights(donor), weights(tmp_path / "out")
    name = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(after[name.format(0)], before[name.format(0)])
    moved = 0.7 * before[name.format(1)] + 0.3 * other[name.format(1)]
    assert torch.allclose(after[name.format(1)], moved, atol=1e-6)


def test_tokenizers_that_differ_keep_the_targets_rows(tmp_path: Path, recipe: Models) -> None:
    target, donor = write(tmp_path / "t", "cogvlm-chat", 1), write(tmp_path / "d", "llava-v1.5-7b", 2)
    swapped = {f"t{row}": (row + 1) % TOKENS for row in range(TOKENS)}
    (donor / "tokenizer.json").write_text(json.dumps({"model": {"vocab": swapped}}))
    planned = plan(load_recipe(recipe(target, donor)))
    rows = {(fate.source, fate.tensor): (fate.fate, fate.detail) for fate in planned.fates}
    kept = ("kept", "the tokenizers are not known to be the same")
    assert rows["target", "model.embed_tokens.weight"] == rows["target", "lm_head.weight"] == kept
    assert rows["d", "lm_head.weight"] == ("left out", kept[1])
    merge(recipe(target, donor), tmp_path / "out")
    assert torch.equal(weights(tmp_path / "out")["lm_head.weight"], weights(target)["lm_head.weight"])
    (donor / "tokenizer.json").unlink()  # none: not known, unless the recipe says so
    none = plan(load_recipe(recipe(target, donor)))
    assert none.to_dict()["coverage"]["d"]["tokens"] is None and "the target's are kept" in none.maps["d"].page()
    said = plan(load_recipe(recipe(target, donor, vocabulary="same")))
    assert "lm_head.weight" in {job.name for job in said.jobs if job.kind == "merge"}


def test_padded_vocabularies_are_merged_to_the_last_token(tmp_path: Path, recipe: Models) -> None:
    target, donor = write(tmp_path / "t", "llava-v1.5-7b", 1), write(tmp_path / "d", "llava-v1.5-7b", 2)
    tensors = weights(target)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[name] = torch.cat([tensors[name], torch.ones(5, WIDTH)])
    save_file(tensors, target / "model.safetensors")
    merge(recipe(target, donor, alpha=1.0), tmp_path / "out")
    head = weights(tmp_path / "out")["lm_head.weight"]
    assert torch.allclose(head[:TOKENS], weights(donor)["lm_head.weight"], atol=1e-6)
    assert torch.equal(head[TOKENS:], torch.ones(5, WIDTH))


EMBEDDED = ("model.embed_tokens.weight", "lm_head.weight")


def speaking(folder: Path, tokens: list[str], *, padding: int = 0, tied: bool = False) -> Path:
    """The model with other tokens, in the order of their rows, after which there are rows without one."""
    tensors = weights(folder)
    for seed, name in enumerate(EMBEDDED):
        generator = torch.Generator().manual_seed(seed + len(tokens))
        noise = torch.randn(len(tokens) + padding, WIDTH, generator=generator)
        tensors[name] = noise.to(tensors[name].dtype)
        tensors[name][::4, 0] = -0.0  # which adding nothing would turn into 0
    if tied:
        del tensors["lm_head.weight"]
        config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
        (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    vocabulary = {"model": {"vocab": {token: row for row, token in enumerate(tokens)}}}
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    return folder


@pytest.mark.parametrize(("dtype", "tied"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
@pytest.mark.parametrize("seed", [0, 1])
def test_rows_are_merged_by_token(tmp_path: Path, recipe: Models, dtype: torch.dtype, tied: bool, seed: int) -> None:
    dice = random.Random(seed)
    words = [f"w{index}" for index in range(40)]
    here, there = dice.sample(words, 25), dice.sample(words, 30)
    # of the same height in one of the cases: rows of other tokens must not meet
    target = speaking(write(tmp_path / "t", "llava-v1.5-7b", 1, dtype), here, padding=3 + 2 * seed, tied=tied)
    donor = speaking(write(tmp_path / "d", "vicuna-7b-v1.5", 2, torch.float16), there, tied=tied)
    out = tmp_path / "out"
    report = merge(recipe(target, donor, vocabulary="by_token"), out)
    before, other, after = weights(target), weights(donor), weights(out)
    common = [token for token in here if token in there]
    for name in EMBEDDED[: 1 if tied else 2]:
        for row, token in enumerate([*here, *[""] * (3 + 2 * seed)]):
            if token not in common:
                assert torch.equal(after[name][row].view(torch.uint8), before[name][row].view(torch.uint8))
                continue
            exact = 0.7 * before[name][row].double() + 0.3 * other[name][there.index(token)].double()
            assert torch.allclose(after[name][row].double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6), token
            assert not torch.equal(after[name][row], before[name][row])
    found = report.to_dict()["coverage"]["d"]
    assert found["tokens"] == {"shared": len(common), "target": 25, "donor": 30}
    line = f"{len(common)} of 25 merged, the donor has 30"
    assert f"tokens: {line}" in report.plan.maps["d"].page() and f"| {line} |" in (out / "README.md").read_text()
    rows = {(fate.source, fate.tensor): fate.detail for fate in report.plan.fates}
    assert "some rows: tokens that the target does not have" in rows["d", EMBEDDED[0]]
    assert found["dropped"]["parameters"] == (2 - tied) * (30 - len(common)) * WIDTH
    assert verify(out).share == 1


def test_permuted_vocabularies_give_the_same_merge(tmp_path: Path, recipe: Models) -> None:
    tokens, order = [f"t{row}" for row in range(TOKENS)], torch.randperm(TOKENS).tolist()
    target, donor = write(tmp_path / "t", "cogvlm-chat", 1), write(tmp_path / "d", "llava-v1.5-7b", 2)
    merge(recipe(target, donor), tmp_path / "straight")
    assert plan(load_recipe(recipe(target, donor))).maps["d"].tensors["lm_head.weight"].operation == "same"
    merge(recipe(target, donor, vocabulary="by_token"), tmp_path / "same")  # as auto does
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "same" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    permuted = shutil.copytree(donor, tmp_path / "p")
    tensors = weights(donor)
    save_file(tensors | {name: tensors[name][order] for name in EMBEDDED}, permuted / "model.safetensors")
    vocabulary = {"model": {"vocab": {tokens[old]: new for new, old in enumerate(order)}}}
    (permuted / "tokenizer.json").write_text(json.dumps(vocabulary))
    report = merge(recipe(target, permuted, vocabulary="by_token"), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "straight" / "model.safetensors"
    ).read_bytes()
    assert report.plan.maps["p"].tensors["lm_head.weight"].operation == "slice_rows"
    # the tokenizer decides what is merged with what, so it belongs to the inputs
    (permuted / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"t1": 3}}}))
    with pytest.raises(CheckpointError, match="the p specialist has changed since the merge"):
        verify(tmp_path / "out")


def test_averages_keep_rows_of_other_tokens(family_of_three: dict[str, Path], recipe: Models, tmp_path: Path) -> None:
    target = speaking(shutil.copytree(family_of_three["target"], tmp_path / "t"), ["a", "b", "c", "d"], padding=2)
    donor = speaking(shutil.copytree(family_of_three["donor"], tmp_path / "d"), ["x", "c", "b"])
    base = {"base_model": str(family_of_three["base"]), "merge_method": "task_arithmetic", "parameters": {}}
    merge(recipe(target, donor, vocabulary="by_token", **base), tmp_path / "out")
    before, other, after = weights(target), weights(donor), weights(tmp_path / "out")
    for name in EMBEDDED:
        mean = (before[name][[1, 2]].double() + other[name][[2, 1]].double()) / 2
        assert torch.equal(after[name][[1, 2]], mean.float())
        for row in (0, 3, 4, 5):
            assert torch.equal(after[name][row].view(torch.uint8), before[name][row].view(torch.uint8))


def test_vocabularies_that_cannot_be_aligned(tmp_path: Path, recipe: Models) -> None:
    target, donor = write(tmp_path / "t", "llava-v1.5-7b", 1), write(tmp_path / "d", "vicuna-7b-v1.5", 2)
    asked = recipe(target, donor, vocabulary="by_token")

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message) as caught:
            plan(load_recipe(asked))
        assert "\n" not in str(caught.value)

    def donor_has(*tokens: str) -> None:
        vocabulary = {token: row for row, token in enumerate(tokens)}
        (donor / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))

    donor_has(*[f"Ġ{row}" for row in range(TOKENS)])
    refused(r"d: its tokenizer \(11 tokens\) and the target's \(11\) have no token in common; write vocabulary: keep")
    donor_has(*[f"t{row}" for row in range(TOKENS + 2)])
    refused("d: its tokenizer has a token in row 12, but .* has 11 rows")
    (donor / "tokenizer.json").unlink()
    refused(r"d: holds no tokenizer\.json or tokenizer\.model, .* write vocabulary: keep")


def test_vocabularies_of_many_stretches_are_assembled_fast() -> None:
    n = 150_000
    order = torch.randperm(n + 1)[:n].tolist()
    shared = shared_tokens({f"t{row}": row for row in range(n)}, {f"t{row}": place for row, place in enumerate(order)})
    assert shared.count == n and len(shared.rows) > n - 100
    data = torch.randn(n + 1, 8)
    source = TensorRef("a", torch.float32, (n + 1, 8), Path("a"), 0)
    ref = MappedRef("b", torch.float32, (n, 8), Path(), -1, ((source, shared.source_rows, shared.rows),))
    start = time.process_time()
    assert torch.equal(assembled(ref, lambda _: data), data[order])
    assert time.process_time() - start < 2


def test_weights_decide_where_no_ancestor_is_recorded(tmp_path: Path, recipe: Models) -> None:
    """A merge refuses models whose weights have nothing in common, before it writes anything; a plan reads none."""
    target, donor = write(tmp_path / "t", "cogvlm-chat", 1), write(tmp_path / "d", "llava-v1.5-7b", 2)
    stranger = write(tmp_path / "s", "llava-v1.5-7b", 3, related=0.0)
    planned = plan(load_recipe(recipe(target, donor)))
    wanted = "not known by name; the merge compares weights"
    assert (
        planned.to_dict()["coverage"]["d"]["ancestor"] == wanted and f"ancestor: {wanted}" in planned.maps["d"].page()
    )
    report = merge(recipe(target, donor), tmp_path / "out")
    measured = report.to_dict()["kinship"]["d"]
    assert 0.4 < measured["cosine"] < 0.6 and 0.8 < measured["distance"] < 1.2
    assert measured["weight"].endswith("self_attn.language_expert_dense.weight")  # the smallest, and no copy
    both = recipe(target, donor, stranger)
    assert plan(load_recipe(both)).maps["s"].ancestry == wanted
    message = (
        r"s and target are unrelated: the cosine of their weights is -?0\.\d+ \(model\.layers\.\d\.self_attn\."
        r"language_expert_dense\.weight, the median of 2\), at least 0\.2 .* --allow-base-mismatch"
    )
    with pytest.raises(CheckpointError, match=message) as caught:
        merge(both, tmp_path / "none")
    assert "\n" not in str(caught.value) and not (tmp_path / "none").exists()
    assert not merge(both, tmp_path / "forced", allow_base_mismatch=True).kinship
    based = {"base_model": str(stranger), "merge_method": "average", "parameters": {}}
    with pytest.raises(CheckpointError, match="base and target are unrelated"):
        merge(recipe(target, donor, **based), tmp_path / "none")


def test_names_that_contradict_each_other_are_refused_before(tmp_path: Path, recipe: Models) -> None:
    target = write(
        tmp_path / "t", "cogvlm-chat", 1, _name_or_path="/data/hub/models--lmsys--vicuna-7b-v1.5/snapshots/a1"
    )
    donor = write(tmp_path / "d", "llava-v1.5-7b", 2, _name_or_path="Qwen/Qwen2-7B@main")
    message = "d descends from 'Qwen/Qwen2-7B', target from 'meta-llama/Llama-2-7b-hf'.*--allow-base-mismatch"
    with pytest.raises(CheckpointError, match=message):
        plan(load_recipe(recipe(target, donor)))
    forced = plan(load_recipe(recipe(target, donor)), allow_base_mismatch=True)
    assert forced.merged_weights() == 2 + LAYERS * 10 and forced.maps["d"].ancestry == "not checked"


def test_results_shards_and_types_are_mixed(tmp_path: Path, recipe: Models) -> None:
    """A result of ours is a target and a donor; donors are shards, .bin files and other types."""
    target, donor = write(tmp_path / "t", "mplug-owl2", 1), write(tmp_path / "d", "llava-v1.5-7b", 2, torch.float16)
    merge(recipe(target, donor, output={"form": "full", "max_shard_size": 4000}), tmp_path / "first")
    assert len(list((tmp_path / "first").glob("model-*.safetensors"))) > 3
    cog = write(tmp_path / "c", "cogvlm-chat", 3, torch.bfloat16)
    tensors = weights(cog)
    torch.save(tensors, cog / "pytorch_model.bin")
    (cog / "model.safetensors").unlink()
    merge(recipe(cog, tmp_path / "first", donor, alpha=0.5), tmp_path / "second")
    merge(recipe(tmp_path / "first", cog, alpha=0.5), tmp_path / "third")
    first = {
        name: tensor for file in (tmp_path / "first").glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    name = "self_attn.{}_expert_query_key_value.weight"
    for way, owner in enumerate(("language", "vision")):
        layer = "model.layers.1.self_attn."
        qkv = [f"{layer}q_proj.weight", *(f"{layer}{x}_proj.multiway.{way}.weight" for x in "kv")]
        mine = torch.cat([first[part] for part in qkv]).double()
        its = torch.cat([weights(donor)[f"{layer}{x}_proj.weight"] for x in "qkv"]).double()
        own = tensors[f"model.layers.1.{name.format(owner)}"].double()
        fused = weights(tmp_path / "second")[f"model.layers.1.{name.format(owner)}"]
        assert torch.allclose(fused.double(), own / 2 + (mine + its) / 4, rtol=2**-8, atol=1e-6)
        key = weights(tmp_path / "third")[qkv[1]].double()
        assert torch.allclose(key, (mine + own)[WIDTH : 2 * WIDTH] / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model": "x/y"}, "linear interpolates between target and donors, without a base: remove base_model"),
        (
            {"merge_method": "ssam", "parameters": {}},
            "ssam merges updates of a base, but there is none: add base_model",
        ),
        (
            {"merge_method": "factorwise", "parameters": {}, "base_model": "x/y"},
            "factorwise merges LoRA factors, but a target is a whole model",
        ),
        ({"merge_method": "fisher", "parameters": {}, "base_model": "x/y"}, "fisher needs Fisher files in the target"),
        (
            {"models": [{"model": "x", "parameters": {"fisher": "f.safetensors"}}]},
            r"no method weighs donors .* by Fisher files",
        ),
        (
            {
                "target": None,
                "base_model": "x",
                "modules": {"*": {"policy": "error"}},
                "merge_method": "average",
                "parameters": {},
            },
            "policy error is of merges with a target",
        ),
        ({"output": {"form": "adapter"}}, r"output\.form is adapter; write form: full"),
        ({"modules": {"*": {"policy": "average"}}}, "has no policy average"),
        ({"models": [{"model": "x", "modality": "image"}]}, "donors have no modality or encoder"),
        ({"target": None}, "the key 'base_model' is missing; add it"),
        ({"target": None, "base_model": "x", "vocabulary": "same"}, "vocabulary: same is of merges with a target"),
    ],
)
def test_recipes_that_cannot_be(tmp_path: Path, recipe: Models, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(recipe(tmp_path, tmp_path, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_attention_heads": 2, "num_key_value_heads": 2}, "d: attention heads 2, but 4 in target"),
        ({"architectures": ["BertModel"]}, "d: config.json: architectures names BertModel"),
    ],
)
def test_donors_that_do_not_fit(tmp_path: Path, recipe: Models, config: dict[str, Any], message: str) -> None:
    target, donor = write(tmp_path / "t", "cogvlm-chat", 1), write(tmp_path / "d", "llava-v1.5-7b", 2, **config)
    with pytest.raises(ModalloyError, match=message) as caught:
        merge(recipe(target, donor), tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_there_is_a_recipe_for_every_pair_of_the_paper() -> None:
    assert len(list(RECIPES.glob("*.yaml"))) == 8


def without_data(folder: Path, keys: str) -> Path:
    """A published model's config, and a file of its true names and shapes without data, which takes no room."""
    header, config = published(keys)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    entries, end = {}, 0
    for tensor, shape in header.items():
        size = 2 * int(torch.Size(shape).numel())
        entries[tensor] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)  # sparse
    return folder


@pytest.mark.parametrize("method", ["linear", "ssam"])
@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_plans_of_the_paper_cover_all_tensors(
    path: Path, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(path)
    models = {name: KEYS[name] for name in (str(recipe.target), recipe.models[0].model)}
    if method != "linear":
        bases = {"Qwen": ("Qwen/Qwen2-7B", "qwen2-7b"), "34b": ("nyu-visionx/cambrian-34b", "cambrian-34b")}
        base = next((keys for part, keys in bases.items() if part in "".join(models)), None)
        name, models[name] = base or ("meta-llama/Llama-2-7b-hf", "vicuna-7b-v1.5")
        content = recipe.model_dump() | {"base_model": name, "merge_method": method, "parameters": {"rank": 128}}
        recipe = Recipe(**content)
    places = {name: without_data(tmp_path / keys, keys) for name, keys in models.items()}
    monkeypatch.setattr("modalloy.planning.planner.locate", lambda location, folder: places[location])
    planned = plan(recipe)
    target = published(KEYS[str(recipe.target)])[0]
    assert [spec.name for job in planned.jobs for spec in job.outputs] == list(target)
    assert [tuple(spec.shape) for job in planned.jobs for spec in job.outputs] == list(target.values())
    donor = published(KEYS[recipe.models[0].model])[0]
    base_tensors = 0 if method == "linear" else len(published(models[recipe.base_model])[0])
    assert len(planned.fates) == len(target) + len(donor) + base_tensors
    changing = {job.name for job in planned.jobs if job.kind != "keep"}
    assert ("lm_head.weight" in changing) == (recipe.vocabulary == "same")
    moved = {name for name in target if name.startswith("model.layers.") and "inv_freq" not in name}
    assert changing >= moved
    if method == "ssam":
        n_layers = {"Qwen": 28, "llava": 32, "mplug": 32, "cogvlm": 32, "cambrian": 60}
        experts = {"cogvlm-chat": 14, "mplug-owl2": 9}.get(KEYS[str(recipe.target)], 7)
        layers = next(n for part, n in n_layers.items() if part in "".join(models))
        assert planned.merged_weights() == layers * experts


LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
# masks belong to a weight's name; weights to the whole model
NOT_ALONE = ("dare_linear", "dare_ties", "della", "della_linear", "metagpt")
UPDATE_METHODS = [
    name for name in METHODS if name not in ("linear", "fisher", "factorwise", "core_space", "do_merging")
]
UPDATE_METHODS = [
    name for name in UPDATE_METHODS if METHODS[name].models[1] != 1
]  # which go between the base and one model


def expert(cog: dict[str, Tensor], name: str, owner: str) -> Tensor:
    """A weight of a plain decoder as one of CogVLM's experts has it."""
    layer, leaf = name.rsplit(".", 3)[0], name.rsplit(".", 2)[1].removesuffix("_proj")
    if leaf in ("q", "k", "v"):
        fused = cog[f"{layer}.self_attn.{owner}_expert_query_key_value.weight"]
        return fused[WIDTH * "qkv".index(leaf) :][:WIDTH].clone()
    return cog[
        f"{layer}.self_attn.{owner}_expert_dense.weight"
        if leaf == "o"
        else f"{layer}.mlp.{owner}_mlp.{leaf}_proj.weight"
    ]


def plain_copy(folder: Path, cog: Path, like: Path, owner: str) -> Path:
    """One of CogVLM's two decoders as a plain one of its own."""
    fused, tensors = weights(cog), weights(like)
    for name in tensors:
        if name.rsplit(".", 2)[-2].removesuffix("_proj") in LINEARS and name.startswith("model.layers."):
            tensors[name] = expert(fused, name, owner)
        elif name in fused:
            tensors[name] = fused[name].clone()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    for file in ("config.json", "tokenizer.json"):
        (folder / file).write_text((like / file).read_text())
    return folder


@pytest.fixture(scope="module")
def family_of_three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, a donor of its architecture, a CogVLM as target, and its two decoders as plain models."""
    folder = tmp_path_factory.mktemp("three")
    base = write(folder / "base", "vicuna-7b-v1.5", 1)
    donor, target = write(folder / "donor", "vicuna-7b-v1.5", 2), write(folder / "target", "cogvlm-chat", 3)
    for tuned in (donor, target):  # relatives, not strangers
        tensors = weights(tuned)
        for name, tensor in tensors.items():
            if (origin := counterpart(name, weights(base))) is not None:
                tensors[name] = origin + tensor / 2
        save_file(tensors, tuned / "model.safetensors")
    copies = {owner: plain_copy(folder / owner, target, base, owner) for owner in ("language", "vision")}
    return {"base": base, "donor": donor, "target": target, **copies}


@pytest.mark.parametrize("method", UPDATE_METHODS)
def test_methods_merge_mapped_updates_as_those_of_one_architecture(
    family_of_three: dict[str, Path], recipe: Models, tmp_path: Path, method: str
) -> None:
    models = family_of_three
    across = recipe(
        models["target"], models["donor"], base_model=str(models["base"]), merge_method=method, parameters={}
    )
    report = merge(across, tmp_path / "across")
    assert report.verification.share == 1 and verify(tmp_path / "across").share == 1
    before, after = weights(models["target"]), weights(tmp_path / "across")
    for owner in ("language", "vision"):
        content = {
            "base_model": str(models["base"]),
            "merge_method": method,
            "models": [{"model": str(models[owner])}, {"model": str(models["donor"])}],
            "output": {"form": "full"},
        }
        (tmp_path / "plain.yaml").write_text(yaml.safe_dump(content))
        merge(tmp_path / "plain.yaml", tmp_path / owner)
        alone = weights(tmp_path / owner)
        for name, tensor in alone.items():
            if "norm" in name:  # averaged in both
                assert torch.equal(after[name], tensor)
            elif name.startswith("model.layers.") and method not in NOT_ALONE:
                assert torch.equal(expert(after, name, owner), tensor), name
                assert not torch.equal(tensor, expert(before, name, owner))
    mean = (before["lm_head.weight"].double() + weights(models["donor"])["lm_head.weight"].double()) / 2
    assert torch.equal(after["lm_head.weight"], mean.float())  # the same tensors whatever the method (B4)
    kept = [name for name in before if name.startswith("model.vision.")]
    assert kept and all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in kept)


def test_metagpt_counts_duplicates_as_weights_of_their_own(
    family_of_three: dict[str, Path], recipe: Models, tmp_path: Path
) -> None:
    models = family_of_three
    more = {"base_model": str(models["base"]), "merge_method": "metagpt", "parameters": {}}
    merge(recipe(models["target"], models["donor"], **more), tmp_path / "out")
    base, donor, target = (weights(models[name]) for name in ("base", "donor", "target"))
    names = [name for name in base if name.startswith("model.layers.") and "norm" not in name]
    own = sum(
        float((expert(target, n, o).double() - base[n]).square().sum()) for n in names for o in ("language", "vision")
    )
    other = 2 * sum(float((donor[name].double() - base[name]).square().sum()) for name in names)
    after, share = weights(tmp_path / "out"), own / (own + other)
    for name in names:
        wanted = (
            base[name]
            + share * (expert(target, name, "vision") - base[name])
            + (1 - share) * (donor[name] - base[name])
        )
        assert torch.allclose(expert(after, name, "vision"), wanted, atol=1e-5)


def test_scale_and_weight_reach_norms(family_of_three: dict[str, Path], recipe: Models, tmp_path: Path) -> None:
    models, name = family_of_three, "model.norm.weight"
    start, target, donor = (weights(models[one])[name].double() for one in ("base", "target", "donor"))
    base = {"base_model": str(models["base"]), "merge_method": "task_arithmetic"}
    merge(recipe(models["target"], models["donor"], **base, parameters={"scale": 0}), tmp_path / "zero")
    assert torch.equal(weights(tmp_path / "zero")[name].double(), start)
    changes = {"models": [{"model": str(models["donor"]), "parameters": {"weight": -2}}], "parameters": {"scale": 0.5}}
    merge(recipe(models["target"], models["donor"], **base | changes), tmp_path / "weighted")
    wanted = start + 0.5 * ((target - start) - 2 * (donor - start)) / 2
    torch.testing.assert_close(weights(tmp_path / "weighted")[name].double(), wanted, atol=1e-6, rtol=0)


def test_a_base_is_accounted_for(family_of_three: dict[str, Path], recipe: Models, tmp_path: Path) -> None:
    models = family_of_three
    base = {"base_model": str(models["base"]), "merge_method": "ssam", "parameters": {"rank": 3}}
    report = merge(recipe(models["target"], models["donor"], **base), tmp_path / "out")
    planned = report.plan
    assert report.to_dict()["parameters"]["scale"] == 0.5  # 1/n: the target counts
    assert (
        f"{LAYERS * 14} linear weights merged (ssam, k=3, λ=1/2" in planned.summary() and "α" not in planned.summary()
    )
    rows = {(fate.source, fate.tensor): (fate.fate, fate.detail) for fate in planned.fates}
    q = "model.layers.1.self_attn.q_proj.weight"
    both = " and ".join(
        f"model.layers.1.self_attn.{owner}_expert_query_key_value.weight" for owner in ("language", "vision")
    )
    assert (
        set(rows["base", q][1].split()) == set(f"the updates of {both} start there".split())
        and rows["base", q][0] == "merged"
    )
    start = "the updates of model.norm.weight start there"
    assert rows["base", "model.norm.weight"] == ("averaged", start)
    embeddings = rows["base", "model.embed_tokens.weight"]
    assert embeddings[0] == "left out"
    assert rows["target", "model.norm.weight"] == ("averaged", "mean of target and donors, same")
    assert rows["donor", "model.norm.weight"] == ("averaged", "into model.norm.weight")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert list(manifest["inputs"]) == ["target", "base", "donor"] and manifest["inputs"]["base"]["name"] == "base"
    assert manifest["inputs"]["base"]["sha256"].keys() == {"model.safetensors", "config.json"}
    # one linear weight changed by hand, where others were fused around it
    tensors = weights(tmp_path / "out")
    tensors["model.layers.0.self_attn.vision_expert_query_key_value.weight"][WIDTH] += 1
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    manifest["outputs"]["model.safetensors"] = file_sha256(tmp_path / "out" / "model.safetensors")
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        CheckpointError, match=r"vision_expert_query_key_value\.weight:k differs from what the recipe gives"
    ):
        verify(tmp_path / "out")


def test_inspect_shows_mapped_updates(family_of_three: dict[str, Path], recipe: Models, tmp_path: Path) -> None:
    models = family_of_three
    with pytest.raises(RecipeError, match="inspect shows updates of a base, but linear has none"):
        inspect(recipe(models["target"], models["donor"]))
    more = {"merge_method": "ssam", "parameters": {"rank": 4}}
    found = inspect(recipe(models["target"], models["donor"], base_model=str(models["base"]), **more))
    assert [one.label for one in found.specialists] == ["target", "donor"] and found.base == "base"
    assert len(found.slots) == LAYERS * 14 and inspection_page(found).startswith("<!DOCTYPE html>")
    content = more | {"base_model": str(models["base"]), "output": {"form": "full"}}
    content["models"] = [{"model": str(models["language"])}, {"model": str(models["donor"])}]
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(content))
    plain = {slot.name: slot for slot in inspect(tmp_path / "plain.yaml").slots}
    across = {slot.name: slot for slot in found.slots}
    layer = "model.layers.1.self_attn."
    one, other = across[f"{layer}language_expert_query_key_value.weight:v"], plain[f"{layer}v_proj.weight"]
    assert one.merged_norm == other.merged_norm and one.pairs[0].cosine == other.pairs[0].cosine


def test_updates_of_a_base_give_the_interpolation_too(
    family_of_three: dict[str, Path], recipe: Models, tmp_path: Path
) -> None:
    models, alpha = family_of_three, 0.3  # θ_0 + (1 − α) τ_1 + α τ_2 = (1 − α) θ_1 + α θ_2
    merge(recipe(models["target"], models["donor"], alpha=alpha), tmp_path / "linear")
    content = yaml.safe_load(
        recipe(
            models["target"],
            models["donor"],
            base_model=str(models["base"]),
            merge_method="task_arithmetic",
            parameters={"scale": 1 - alpha},
        ).read_text()
    )
    content["models"][0]["parameters"] = {"weight": alpha / (1 - alpha)}
    (tmp_path / "sum.yaml").write_text(yaml.safe_dump(content))
    merge(tmp_path / "sum.yaml", tmp_path / "sum")
    linear, summed = weights(tmp_path / "linear"), weights(tmp_path / "sum")
    for name in linear:
        if "expert" in name or "_mlp." in name:
            assert torch.allclose(linear[name], summed[name], atol=1e-5)


@pytest.mark.parametrize("form", ["plain", "fused"])
def test_bases_are_mapped_in_either_form(
    family_of_three: dict[str, Path], recipe: Models, tmp_path: Path, form: str
) -> None:
    """A base that stores its attention fused gives the same as one that does not; a target merged with itself stays itself."""
    models = family_of_three
    base = models["language"] if form == "plain" else models["target"]
    more = {"base_model": str(base), "merge_method": "average", "parameters": {}}
    merge(recipe(models["donor"], models["donor"], **more), tmp_path / "out")
    after, before = weights(tmp_path / "out"), weights(models["donor"])
    assert all(torch.allclose(after[name], before[name], atol=1e-6) for name in before)
    more = {"base_model": str(base), "merge_method": "tsv", "parameters": {}}
    merge(recipe(models["base"], models["donor"], **more), tmp_path / "tsv")
    other = {"base_model": str(models["language"]), "merge_method": "tsv", "parameters": {}}
    merge(recipe(models["base"], models["donor"], **other), tmp_path / "reference")
    assert all(
        torch.equal(tensor, weights(tmp_path / "reference")[name]) for name, tensor in weights(tmp_path / "tsv").items()
    )


def write_adapter(folder: Path, base: Path, weights_of: Callable[[str], bool]) -> tuple[Path, dict[str, Tensor]]:
    """A LoRA of some linear weights, and the updates that it holds."""
    generator, tensors, updates = torch.Generator().manual_seed(9), {}, {}
    for name, tensor in weights(base).items():
        if name.startswith("model.layers.") and tensor.ndim == 2 and weights_of(name):
            a, b = (
                torch.randn(2, tensor.shape[1], generator=generator),
                torch.randn(len(tensor), 2, generator=generator),
            )
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            tensors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
            updates[name] = 4 / 2 * b @ a
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    leaves = sorted({name.rsplit(".", 2)[1] for name in updates})
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": leaves,
        "base_model_name_or_path": str(base),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder, updates


@pytest.mark.parametrize("base", ["base", "target"])
def test_an_adapter_of_the_base_is_a_donor(
    family_of_three: dict[str, Path], recipe: Models, tmp_path: Path, base: str
) -> None:
    """A LoRA of a plain decoder into both experts of a CogVLM; a LoRA of a CogVLM into a plain decoder."""
    models = family_of_three
    target = models["target" if base == "base" else "donor"]
    adapter, updates = write_adapter(tmp_path / "lora", models[base], lambda name: "vision.transformer" not in name)
    more = {"base_model": str(models[base]), "merge_method": "task_arithmetic", "parameters": {}}
    merge(recipe(target, adapter, **more), tmp_path / "out")
    assert verify(tmp_path / "out").share == 1
    before, after = weights(target), weights(tmp_path / "out")
    plain = weights(models["donor"])
    for name in (n for n in plain if n.startswith("model.layers.") and plain[n].ndim == 2):
        for owner in ("language", "vision"):
            if base == "base":
                wanted, found = expert(before, name, owner) + updates[name], expert(after, name, owner)
            else:
                wanted, found = before[name] + expert(updates, name, "language"), after[name]
            assert torch.allclose(found, wanted, atol=1e-5), name
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed and all(before[name].ndim == 2 and "embed" not in name and "head" not in name for name in changed)
    rows = {(fate.source, fate.tensor): fate for fate in plan(load_recipe(tmp_path / "out" / "recipe.yaml")).fates}
    stem = next(iter(updates)).removesuffix(".weight")
    for side in "AB":
        assert rows["lora", f"base_model.model.{stem}.lora_{side}.weight"].fate == "merged"
    if base == "target":  # what is updated for image tokens only has no place in a plain decoder
        stem = "base_model.model.model.layers.0.mlp.vision_mlp.up_proj"
        assert rows["lora", f"{stem}.lora_A.weight"].detail == "updates what the target keeps"


def test_adapters_that_cannot_be_donors(family_of_three: dict[str, Path], recipe: Models, tmp_path: Path) -> None:
    models = family_of_three
    adapter, _ = write_adapter(tmp_path / "lora", models["base"], lambda name: "q_proj" in name)
    with pytest.raises(RecipeError, match="lora is an adapter, an update of a base: add base_model"):
        plan(load_recipe(recipe(models["target"], adapter)))
    more = {"base_model": str(models["base"]), "merge_method": "ssam", "parameters": {}}
    message = (
        r"lora specialist: has no update of model\.layers\.0\.mlp\.language_mlp\..* the target has; say `missing: zero`"
    )
    with pytest.raises(CheckpointError, match=message):
        plan(load_recipe(recipe(models["target"], adapter, **more)))
    planned = plan(load_recipe(recipe(models["target"], adapter, **more, missing="zero")))
    changing = {job.name for job in planned.jobs if job.kind != "keep"}
    assert changing == {
        f"model.layers.{i}.self_attn.{o}_expert_query_key_value.weight"
        for i in range(LAYERS)
        for o in ("language", "vision")
    }
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        tensors | {"base_model.model.model.norm.weight": torch.ones(WIDTH)}, adapter / "adapter_model.safetensors"
    )
    with pytest.raises(
        CheckpointError, match=r"lora: .*norm\.weight is a whole tensor beside the adapter's; merge the adapter"
    ):
        plan(load_recipe(recipe(models["target"], adapter, **more, missing="zero")))
    with pytest.raises(
        CheckpointError, match=r"none of its 2 updates names a weight of the base target: \S+q_proj\.lora_A\.weight"
    ):
        plan(load_recipe(recipe(models["donor"], adapter, **more | {"base_model": str(models["target"])})))


def test_policies_across_architectures(family_of_three: dict[str, Path], recipe: Models, tmp_path: Path) -> None:
    models = family_of_three
    rules = {
        "*vision_expert_query*": {"policy": "take_source"},
        "*.mlp.*": {"policy": "keep"},
        "*nothing*": {"policy": "error"},
    }
    source = recipe(models["target"], models["donor"], modules=rules)
    with pytest.raises(RecipeError, match=r"modules: no tensor matches '\*nothing\*'"):
        plan(load_recipe(source))
    del rules["*nothing*"]
    merge(recipe(models["target"], models["donor"], modules=rules), tmp_path / "out")
    before, donor, after = weights(models["target"]), weights(models["donor"]), weights(tmp_path / "out")
    layer = "model.layers.1."
    fused = torch.cat([donor[f"{layer}self_attn.{x}_proj.weight"] for x in "qkv"])
    assert torch.equal(after[f"{layer}self_attn.vision_expert_query_key_value.weight"], fused)
    assert torch.equal(after[f"{layer}mlp.vision_mlp.up_proj.weight"], before[f"{layer}mlp.vision_mlp.up_proj.weight"])
    fates = {
        (fate.source, fate.tensor): fate.fate for fate in plan(load_recipe(tmp_path / "out" / "recipe.yaml")).fates
    }
    assert fates["target", f"{layer}self_attn.vision_expert_query_key_value.weight"] == "left out"
    assert fates["donor", f"{layer}self_attn.q_proj.weight"] == "merged"  # into the language expert
    with pytest.raises(RecipeError, match=r"policy take_source of .*vision_expert.* needs one donor, 2 have it"):
        plan(load_recipe(recipe(models["target"], models["donor"], models["base"], modules=rules)))
    with pytest.raises(CheckpointError, match=r"target: model\.vision\.boi is there, which the recipe forbids"):
        plan(load_recipe(recipe(models["target"], models["donor"], modules={"*.boi": {"policy": "error"}})))


def test_rules_for_what_is_no_linear_weight(family_of_three: dict[str, Path], recipe: Models, tmp_path: Path) -> None:
    """A list over the layers leaves values for the rest to `modules:`, the last norm among them; unused rules are refused."""
    models = family_of_three
    alone = {name: {"parameters": {"alpha": 0.5}} for name in ("lm_head.weight", "*embed_tokens*", "model.norm.weight")}
    merge(recipe(models["target"], models["donor"], alpha=[0, 1], modules=alone), tmp_path / "out")
    before, other, after = weights(models["target"]), weights(models["donor"]), weights(tmp_path / "out")
    name = "model.norm.weight"
    assert torch.allclose(after[name], (before[name] + other[name]) / 2)
    name = "model.layers.{}.post_attention_layernorm.weight"
    assert torch.equal(after[name.format(0)], before[name.format(0)])
    assert torch.equal(after[name.format(1)], other[name.format(1)])
    unmoved = {"*layers.0.*norm*": {"parameters": {"alpha": 0}}}  # says what it does, though nothing is merged
    plan(load_recipe(recipe(models["target"], models["donor"], modules=unmoved)))
    base = {"base_model": str(models["base"]), "merge_method": "ssam", "parameters": {}}
    idle = {"*vision.transformer*": {"policy": "average"}}
    with pytest.raises(RecipeError, match=r"'\*vision\.transformer\*' is to be averaged, but no other model has what"):
        plan(load_recipe(recipe(models["target"], models["donor"], modules=idle, **base)))
    taken = {"*": {"policy": "take_source"}}
    with pytest.raises(RecipeError, match=r"inv_freq needs one donor, 0 have it; keep the target's by a rule above it"):
        plan(load_recipe(recipe(models["target"], models["donor"], modules=taken)))


def changed(source: Path, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    shutil.copytree(source, folder)
    tensors = weights(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_whole_numbers_are_not_merged(family_of_three: dict[str, Path], recipe: Models, tmp_path: Path) -> None:
    models, name = family_of_three, "model.layers.0.mlp.up_proj.weight"
    own = "model.layers.0.mlp.language_mlp.up_proj.weight"
    base = changed(models["base"], tmp_path / "b", lambda found: found.update({name: found[name].to(torch.int8)}))
    target = changed(models["target"], tmp_path / "t", lambda found: found.update({own: found[own].to(torch.int8)}))
    more = {"merge_method": "ssam", "parameters": {}}
    for source in (
        load_recipe(recipe(target, models["donor"])),
        load_recipe(recipe(models["target"], models["donor"], base_model=str(base), **more)),
    ):
        with pytest.raises(CheckpointError, match=r"up_proj\.weight is stored as torch\.int8, which cannot be merged"):
            plan(source)


def test_tensors_of_the_base_are_ignored_too(family_of_three: dict[str, Path], recipe: Models, tmp_path: Path) -> None:
    """One that no rule has, as its message advises; and embeddings, of which no update is merged."""
    models = family_of_three
    base = changed(models["base"], tmp_path / "b", lambda found: found.update({"extra.weight": torch.zeros(2)}))
    more = {"base_model": str(base), "merge_method": "ssam", "parameters": {}}
    with pytest.raises(CheckpointError, match=r"base: no rule of family llama has extra\.weight .*`ignore:`"):
        plan(load_recipe(recipe(models["target"], models["donor"], **more)))
    ignored = {"ignore": ["extra*"], **more}
    planned = plan(load_recipe(recipe(models["target"], models["donor"], **ignored)))
    assert ("base", "extra.weight", "left out") in [(fate.source, fate.tensor, fate.fate) for fate in planned.fates]
    adapter, _ = write_adapter(tmp_path / "lora", models["base"], lambda name: True)
    tensors = load_file(adapter / "adapter_model.safetensors")
    saved = {"base_model.model.model.embed_tokens.weight": torch.ones(TOKENS, WIDTH)}
    save_file(tensors | saved, adapter / "adapter_model.safetensors")
    ignored["ignore"] = ["extra*", "*embed_tokens*"]
    assert plan(load_recipe(recipe(models["target"], adapter, **ignored))).merged_weights() == LAYERS * 14


@pytest.mark.parametrize("label", ["target", "base"])
def test_verify_names_the_model_that_changed(
    family_of_three: dict[str, Path], recipe: Models, tmp_path: Path, label: str
) -> None:
    """Even where it changed in what no layer that is merged again shows."""
    models = family_of_three | {label: shutil.copytree(family_of_three[label], tmp_path / label)}
    base = {"base_model": str(models["base"]), "merge_method": "average", "parameters": {}}
    merge(recipe(models["target"], models["donor"], **base), tmp_path / "out")
    tensors = weights(models[label])
    tensors["model.embed_tokens.weight"] += 1
    save_file(tensors, models[label] / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{label}: the {label} has changed since the merge"):
        verify(tmp_path / "out")

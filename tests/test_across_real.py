"""A real pair of architectures: the first layer of the built-in decoder and its specialists, as a CogVLM and as Llamas."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modalloy import builtin, merge, plan
from modalloy.compute import compute
from modalloy.model import ChatModel, load_model
from modalloy.recipe import Output, Recipe, SpecialistEntry
from modalloy.storage.folder import read_json
from modalloy.storage.locate import open_base

LAYERS, TOKENS = 1, 64
WIDTH, KEYS = 576, 192  # rows of the queries, and of keys or values: three heads share one
PROJECTOR = ("heads.0.weight", "heads.0.bias", "tables.0.weight")  # the image specialist's
Merge = Callable[..., dict[str, Tensor]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """The image specialist as a CogVLM; as a Llama, its own and the audio specialist's text path; one path as a LLaVA."""
    folder = tmp_path_factory.mktemp("models")
    base = cut_base(folder / "base")
    image = cut(builtin.specialist("image"), folder / "image", base)
    audio = cut(builtin.specialist("audio"), folder / "audio", base)
    single = cut(builtin.specialist("image"), folder / "single", base, same=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        import experts

        yield {
            "base": base,
            "specialist": image,
            "single": single,
            "cogvlm": experts.write_cogvlm(image, folder / "cogvlm"),
            "own": experts.write_llava(image, folder / "own"),
            "llama": experts.write_llava(audio, folder / "llama"),
            "llava": experts.write_llava(single, folder / "llava"),
        }


@pytest.fixture
def merged(models: dict[str, Path], tmp_path: Path) -> Merge:
    """The tensors of a merge of a donor into a target."""

    def run(*chosen: Any, **parameters: Any) -> dict[str, Tensor]:
        merge(recipe_of(models, *chosen, **parameters), tmp_path / "out", overwrite=True)
        return weights(tmp_path / "out")

    return run


def recipe_of(
    models: dict[str, Path],
    target: str,
    donor: str,
    alpha: float | None = None,
    method: str = "linear",
    **parameters: Any,
) -> Recipe:
    return Recipe(
        base_model="" if method == "linear" else str(models["base"]),
        target=str(models[target]),
        merge_method=method,
        parameters=parameters if alpha is None else {"alpha": alpha},
        models=(SpecialistEntry(model=str(models[donor])),),
        output=Output(form="full"),
    )


def cut_base(folder: Path) -> Path:
    """The first layer of the built-in base, and its first tokens."""
    folder.mkdir()
    source = builtin.base()
    base = open_base(source)
    names = [name for name in base.refs if ".layers." not in name or int(name.split(".")[2]) < LAYERS]
    tensors = {name: base.read(base.refs[name]) for name in names}
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:TOKENS].clone()
    save_file(tensors, folder / "model.safetensors")
    config = read_json(source / "config.json") | {"num_hidden_layers": LAYERS, "vocab_size": TOKENS}
    config["_name_or_path"] = builtin.BASE
    (folder / "config.json").write_text(json.dumps(config))
    vocabulary = {f"t{row}": row for row in range(TOKENS)}
    tokenizer = {"version": "1.0", "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"added_tokens": []}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def cut(source: Path, folder: Path, base: Path, *, same: bool = False) -> Path:
    """The same layers of a specialist; with `same`, without its modality's own update."""
    folder.mkdir()
    tensors = {
        name: tensor
        for name, tensor in load_file(source / "adapter_model.safetensors").items()
        if (".layers." not in name or int(name.split(".")[2]) < LAYERS)
        and not (same and ("lora_" in name or "_tokens." in name) and ".default" not in name)
    }
    if same:  # whose tokens are its modality's
        stored = load_file(source / "adapter_model.safetensors")
        tensors |= {name: stored[name] for name in ("prefix_tokens.vision", "suffix_tokens.vision")}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = read_json(source / "config.json") | {"_name_or_path": str(base), "num_hidden_layers": LAYERS}
    (folder / "config.json").write_text(json.dumps(config | ({"lora_strategy": "same"} if same else {})))
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


@torch.no_grad()
def logits(chat: ChatModel) -> Tensor:
    """Of some text, a picture in it, and more text."""
    generator = torch.Generator().manual_seed(0)
    sizes = chat.model.config.modalities["image"]
    features = torch.randn(1, sizes["n_tokens"], chat.model.projectors["image"].dim, generator=generator)
    owners = [0] * 3 + [1] * (sizes["n_prefix"] + sizes["n_tokens"] + sizes["n_suffix"]) + [0] * 4
    ids = torch.randint(TOKENS, (1, len(owners)), generator=generator)
    found: Tensor = chat.model(input_ids=ids, owners=torch.tensor([owners]), features={"image": features}).logits
    return found


@pytest.mark.parametrize(("converted", "specialist"), [("cogvlm", "specialist"), ("llava", "single")])
def test_a_specialist_in_another_layout_is_the_same_model(
    models: dict[str, Path], converted: str, specialist: str
) -> None:
    import experts

    before, after = logits(load_model(models[specialist])), logits(experts.load(models[converted]))
    assert torch.allclose(before, after, atol=1e-5 * float(before.abs().max()))


def test_pictures_and_text_use_weights_of_their_own(models: dict[str, Path]) -> None:
    import experts

    tensors, config = weights(models["cogvlm"]), read_json(models["cogvlm"] / "config.json")
    chat = experts.load(models["cogvlm"])
    before = logits(chat)
    for one, other in (("language", "vision"), ("vision", "language")):
        swapped = ((n, tensors[n.replace(one, other)] if ".layers." in n else t) for n, t in tensors.items())
        experts.set_weights(chat, swapped, config)
        assert not torch.allclose(logits(chat), before, atol=1e-3 * float(before.abs().max()))


def test_the_target_is_of_another_architecture(models: dict[str, Path]) -> None:
    found = plan(recipe_of(models, "cogvlm", "llava", 0.3)).maps["llava"]
    assert (found.target, found.donor) == ("cogvlm", "llama")
    fused = found.tensors["model.layers.0.self_attn.vision_expert_query_key_value.weight"]
    assert [(piece.source.rpartition("self_attn.")[2], piece.rows[0]) for piece in fused.pieces] == [
        ("q_proj.weight", (0, WIDTH)),
        ("k_proj.weight", (WIDTH, WIDTH + KEYS)),
        ("v_proj.weight", (WIDTH + KEYS, WIDTH + 2 * KEYS)),
    ]
    assert {name for name, mapped in found.tensors.items() if not mapped.pieces} == {
        "model.vision.boi",
        "model.vision.eoi",
        *(f"model.vision.linear_proj.{part}" for part in PROJECTOR),
    }
    counts = found.coverage()
    assert (counts["duplicated"]["tensors"], counts["merged"]["tensors"]) == (5 * LAYERS, 5 * LAYERS + 2 * LAYERS + 2)
    back = plan(recipe_of(models, "llava", "cogvlm", 0.3)).maps["cogvlm"]
    assert {name for name in back.dropped if ".layers." in name} == {
        name for name in weights(models["cogvlm"]) if ".vision_" in name
    }


@pytest.mark.parametrize(("target", "donor"), [("cogvlm", "llama"), ("llava", "cogvlm")])
def test_alpha_zero_is_the_target_bit_for_bit(models: dict[str, Path], merged: Merge, target: str, donor: str) -> None:
    assert bits(merged(target, donor, 0.0)) == bits(weights(models[target]))


def test_a_model_merged_with_itself_in_another_layout_is_itself(models: dict[str, Path], merged: Merge) -> None:
    before = weights(models["cogvlm"])
    assert bits(merged("cogvlm", "cogvlm", 0.37)) == bits(before)
    after = merged("cogvlm", "own", 0.37)
    vision = {name for name in before if ".vision_" in name}
    assert {name for name in before if not torch.equal(before[name], after[name])} == vision
    for name in vision:  # they move towards the language weight that they are a copy of
        own = before[name.replace("vision", "language")]
        assert torch.allclose(after[name], 0.63 * before[name] + 0.37 * own, atol=1e-6)
    assert bits(merged("own", "cogvlm", 0.37)) == bits(weights(models["own"]))


def test_alpha_one_is_the_donors_decoder_with_the_targets_eyes(models: dict[str, Path], merged: Merge) -> None:
    donor, before, after = weights(models["llama"]), weights(models["cogvlm"]), merged("cogvlm", "llama", 1.0)
    for layer in range(LAYERS):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        joined = torch.cat([donor[f"{attention}.{one}_proj.weight"] for one in "qkv"])
        for expert in ("language", "vision"):
            assert torch.allclose(after[f"{attention}.{expert}_expert_query_key_value.weight"], joined, atol=1e-7)
            dense, own = after[f"{attention}.{expert}_expert_dense.weight"], donor[f"{attention}.o_proj.weight"]
            assert torch.allclose(dense, own, atol=1e-7)
            for one in ("gate", "up", "down"):
                weight, own = after[f"{mlp}.{expert}_mlp.{one}_proj.weight"], donor[f"{mlp}.{one}_proj.weight"]
                assert torch.allclose(weight, own, atol=1e-7)
    eyes = [name for name in before if name.startswith("model.vision.")]
    assert len(eyes) == 2 + len(PROJECTOR)
    assert bits({name: before[name] for name in eyes}) == bits({name: after[name] for name in eyes})


def test_both_directions_agree_on_what_is_shared(models: dict[str, Path], merged: Merge) -> None:
    into_cogvlm, into_llama = merged("cogvlm", "llama", 0.25), merged("llama", "cogvlm", 0.75)
    compared = 0
    for name, weight in into_llama.items():
        block, _, leaf = name.removesuffix(".weight").rpartition(".")
        other = into_cogvlm.get(name)
        if leaf in ("q_proj", "k_proj", "v_proj"):
            rows = into_cogvlm[f"{block}.language_expert_query_key_value.weight"].split([WIDTH, KEYS, KEYS])
            other = rows["qkv".index(leaf[0])]
        elif leaf == "o_proj":
            other = into_cogvlm[f"{block}.language_expert_dense.weight"]
        elif other is None:
            other = into_cogvlm[f"{block}.language_mlp.{leaf}.weight"]
        assert torch.allclose(weight, other, atol=1e-7), name
        compared += 1
    assert compared == len(weights(models["llama"])) == 9 * LAYERS + 2


def test_methods_merge_updates_of_the_base(models: dict[str, Path], merged: Merge) -> None:
    between, after = merged("cogvlm", "llama", 0.5), merged("cogvlm", "llama", method="average")
    assert all(torch.allclose(after[name], weight, atol=1e-6) for name, weight in between.items())
    planned = plan(recipe_of(models, "cogvlm", "llama", method="ssam", rank=16))  # of two updates of rank 8
    job = next(job for job in planned.jobs if job.kind == "fuse")
    assert torch.allclose(compute(job, planned.inputs.read).tensors[0], between[job.name], atol=1e-6)
    target, donor, start = weights(models["cogvlm"]), weights(models["llama"]), weights(models["base"])
    after, block = merged("cogvlm", "llama", method="task_arithmetic"), "model.layers.0"
    for expert in ("language", "vision"):  # both start from the one weight that the base has
        name, plain = f"{block}.mlp.{expert}_mlp.up_proj.weight", f"{block}.mlp.up_proj.weight"
        assert torch.allclose(after[name], target[name] + donor[plain] - start[plain], atol=1e-6)
    fused = f"{block}.self_attn.vision_expert_query_key_value.weight"
    keys, plain = slice(WIDTH, WIDTH + KEYS), f"{block}.self_attn.k_proj.weight"
    assert torch.allclose(after[fused][keys], target[fused][keys] + donor[plain] - start[plain], atol=1e-6)


def test_a_merge_in_memory_is_the_one_in_files(models: dict[str, Path], tmp_path: Path) -> None:
    import across
    import experts

    recipe = recipe_of(models, "cogvlm", "llama", 0.3)
    report = merge(recipe, tmp_path / "out")
    assert report.verification.layers == 11
    assert bits(dict(across.merged(plan(recipe)))) == bits(weights(tmp_path / "out"))
    chat, config = experts.load(models["cogvlm"]), read_json(tmp_path / "out" / "config.json")
    before = logits(chat)
    experts.set_weights(chat, across.merged(plan(recipe)), config)
    after = logits(chat)
    assert torch.equal(after, logits(experts.load(tmp_path / "out"))) and not torch.equal(after, before)
    experts.set_weights(chat, weights(models["cogvlm"]).items(), config)
    assert torch.equal(logits(chat), before)

"""Every layout that is read, written by PEFT and transformers where they can, and what of each is refused and why."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import FFN, HEADS, KV_HEADS, LAYERS, SLOTS, WIDTH, compose_tensors, edit_tensors, write_compose
from safetensors.torch import load_file, save_file
from torch import Tensor

import modalloy
from modalloy.errors import CheckpointError, RecipeError
from modalloy.planning.plan import Plan
from modalloy.specialists.layouts import open_specialist
from modalloy.storage.locate import hub_commit, is_portable, locate
from modalloy.storage.tensors import Checkpoint
from modalloy.verify import verify

VOCABULARY = 30
ENCODER = "builtin:efficientnet-lite0"
PROJECTOR = {"0.weight": (WIDTH, 1280), "0.bias": (WIDTH,), "2.weight": (WIDTH, WIDTH), "2.bias": (WIDTH,)}


def draw(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.2 * torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def write_base(folder: Path, **config: Any) -> Path:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(llama_config(**config)).save_pretrained(folder)
    return folder


def llama_config(**config: Any) -> Any:
    from transformers import LlamaConfig

    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": FFN, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    return LlamaConfig(**sizes | heads | {"tie_word_embeddings": False} | config)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a head of its own and biases in attention."""
    return write_base(tmp_path_factory.mktemp("models") / "untied", attention_bias=True)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("models") / "tied", tie_word_embeddings=True)


def plan_one(base: Path, model: Path, **changes: Any) -> Plan:
    """The plan of one specialist's merge; keyword arguments replace the recipe's keys."""
    return modalloy.plan(modalloy.load_recipe(recipe_of_one(base, model, **changes)))


def recipe_of_one(base: Path, model: Path, **changes: Any) -> Path:
    entry = {"model": str(model)} | changes.pop("entry", {})
    content = {
        "base_model": str(base),
        "merge_method": "task_arithmetic",
        "models": [entry],
        "output": {"form": "full"},
    }
    path = model.parent / "recipe.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return path


def merge_one(base: Path, model: Path, **changes: Any) -> dict[str, Tensor]:
    """Every tensor of the full model that task arithmetic at λ = 1 makes of one specialist, in float64."""
    recipe = recipe_of_one(base, model, **changes)
    out = model.parent / "merged"
    modalloy.merge(recipe, out)
    verify(out)
    return {name: tensor.double() for name, tensor in load_file(out / "model.safetensors").items()}


def fates(planned: Plan, source: str) -> dict[str, tuple[str, str]]:
    return {fate.tensor: (fate.fate, fate.detail) for fate in planned.fates if fate.source == source}


def refused(message: str) -> Any:
    return pytest.raises(CheckpointError, match=message)


# ------------------------------------------------------------------------------------------------------------- PEFT


def train_peft(base: Path, folder: Path, *, config: Any = None, safe: bool = True, **options: Any) -> Path:
    """An adapter as PEFT writes it, all its trainable tensors moved from where they started."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    config = config or LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]} | options)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder, safe_serialization=safe)
    return folder


def merged_by_peft(base: Path, folder: Path) -> dict[str, Tensor]:
    """PEFT's own merge of the adapter, in float64."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    merged: dict[str, Tensor] = PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()
    return merged


ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 6},
        "alpha_pattern": {"^model.layers.0.mlp.down_proj": 5, r".*\.1\..*q_proj": 7},
    },
    "rsLoRA with patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 5}},
    "linears and norms saved whole": {"modules_to_save": ["k_proj", "norm", "input_layernorm"]},
    "blocks saved whole": {"modules_to_save": ["self_attn"], "target_modules": ["down_proj"]},
    "biases of the adapted layers": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "not from zero": {"init_lora_weights": False},
    "orthogonal start": {"init_lora_weights": "orthogonal"},
    "all linears": {"target_modules": "all-linear"},
    "torch's format": {"safe": False, "modules_to_save": ["up_proj"]},
}


@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_peft_adapter(options: dict[str, Any], untied: Path, tmp_path: Path) -> None:
    folder = train_peft(untied, tmp_path / "peft", **options)
    before = {name: tensor.double() for name, tensor in load_file(untied / "model.safetensors").items()}
    wanted = merged_by_peft(untied, folder)
    found = merge_one(untied, folder)
    assert found.keys() == wanted.keys()
    changed = [name for name in wanted if not torch.equal(wanted[name], before[name])]
    for name in wanted:
        torch.testing.assert_close(found[name] - before[name], wanted[name] - before[name], atol=3e-7, rtol=1e-5)
    specialist = open_specialist(folder)
    assert specialist.layout == "peft" and specialist.text_lora.keys() | specialist.tuned.keys() >= set(changed)
    for slot in specialist.text_lora:
        delta = specialist.text_lora[slot].delta(specialist.read).to(torch.float64).dense()
        torch.testing.assert_close(delta, wanted[slot] - before[slot], atol=3e-7, rtol=1e-5)


def test_a_block_saved_whole_fits_no_adapter(untied: Path, tmp_path: Path) -> None:
    folder = train_peft(untied, tmp_path / "peft", modules_to_save=["norm"])
    message = r"holds low-rank updates only, but model\.\S*norm\.weight would be averaged; write form: full"
    with pytest.raises(RecipeError, match=message):
        plan_one(untied, folder, output={"form": "adapter"})
    kept = plan_one(untied, folder, output={"form": "adapter"}, ignore=["*norm.weight"])
    assert fates(kept, "peft")["base_model.model.model.norm.weight"] == ("left out", "ignore: *norm.weight")


@pytest.mark.parametrize("form", ["full", "adapter"])
def test_embeddings_saved_whole_need_a_rule(form: str, untied: Path, tmp_path: Path) -> None:
    folder = train_peft(untied, tmp_path / "peft", modules_to_save=["embed_tokens", "lm_head"])
    with refused(
        r"base_model\.model\.lm_head\.weight was trained \(\S+\), but embeddings are kept as the base has them; write "
        r'modules: \{"lm_head\.weight": \{policy: average\}\} to merge it, or policy: keep to do without'
    ):
        plan_one(untied, folder, output={"form": form})
    names = ("model.embed_tokens.weight", "lm_head.weight")
    kept = plan_one(untied, folder, output={"form": form}, modules={name: {"policy": "keep"} for name in names})
    for name in names:
        assert fates(kept, "peft")[f"base_model.model.{name}"][0] == "left out"
        assert fates(kept, "base")[name][0] == "kept"


@pytest.mark.parametrize("rule", [{"policy": "average"}, {"merge_method": "average"}])
def test_embeddings_saved_whole_are_merged_by_rule(rule: dict[str, str], untied: Path, tmp_path: Path) -> None:
    folder = train_peft(untied, tmp_path / "peft", modules_to_save=["embed_tokens", "lm_head"])
    found = merge_one(untied, folder, modules={"*embed_tokens.weight": rule, "lm_head.weight": rule})
    stored = load_file(folder / "adapter_model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        torch.testing.assert_close(found[name], stored[f"base_model.model.{name}"].double(), atol=1e-7, rtol=0)


@pytest.mark.filterwarnings("ignore")  # PEFT advises to tie them
def test_head_of_an_adapter_on_a_base_that_ties_it(tied: Path, tmp_path: Path) -> None:
    keep = {"model.embed_tokens.weight": {"policy": "keep"}}
    apart = train_peft(tied, tmp_path / "apart", modules_to_save=["embed_tokens", "lm_head"])
    message = r"apart specialist: base_model\.model\.lm_head\.weight \(.*\) is a head of its own, but the base ties"
    with refused(message):
        plan_one(tied, apart)
    assert plan_one(tied, apart, ignore=["*lm_head.weight"], modules=keep).specialists[0].text_lora
    together = train_peft(tied, tmp_path / "together", modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    listed = fates(plan_one(tied, together, modules=keep), "together")
    assert listed["base_model.model.lm_head.weight"] == ("left out", "the base ties it to its embeddings")


VOCABULARY_ROWS = r"trains the embeddings, which are kept as the base has them \(.*\); list it under `ignore:`"
PEFT_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, r"adapter_config\.json: DoRA rescales whole weights, .*; merge it into a full model"),
    "bias of the update": (
        {"lora_bias": True, "target_modules": ["q_proj"]},
        r"peft specialist: \S+q_proj\.lora_B\.bias is a bias of the update itself \(lora_bias\) \(.*\); list it under",
    ),
    "embeddings": (
        {"target_modules": ["q_proj", "embed_tokens"]},
        rf"peft specialist: base_model\.model\.model\.embed_tokens\.\S+ {VOCABULARY_ROWS}",
    ),
    "single tokens": (
        {"trainable_token_indices": [1, 3]},
        rf"peft specialist: \S+embed_tokens\.token_adapter\.trainable_tokens_delta {VOCABULARY_ROWS}",
    ),
    "more layers than the base": (
        {"layer_replication": [[0, 2], [1, 2]]},
        r"adapter_config\.json: layer_replication makes a deeper model than the base; merge it into a full model first",
    ),
}


@pytest.mark.filterwarnings("ignore")  # PEFT warns of several of these
@pytest.mark.parametrize(("options", "message"), PEFT_REFUSED.values(), ids=PEFT_REFUSED)
def test_peft_adapter_that_is_no_update_of_linear_weights(
    options: dict[str, Any], message: str, untied: Path, tmp_path: Path
) -> None:
    folder = train_peft(untied, tmp_path / "peft", **options)
    with refused(message):
        plan_one(untied, folder)


@pytest.mark.filterwarnings("ignore")
def test_adapter_of_the_head(untied: Path, tmp_path: Path) -> None:
    folder = train_peft(untied, tmp_path / "peft", target_modules=["q_proj", "lm_head"])
    with refused(rf"lm_head\.base_layer\.weight {VOCABULARY_ROWS}"):
        plan_one(untied, folder)
    with refused(
        r"lora_A\.weight updates lm_head\.weight, but embeddings are kept .*; list '\*lm_head\.\*' under `ignore:`"
    ):
        plan_one(untied, folder, ignore=["*.base_layer.weight"])
    found = merge_one(untied, folder, ignore=["*lm_head.*"])
    wanted = merged_by_peft(untied, folder)
    slot = "model.layers.1.self_attn.q_proj.weight"
    torch.testing.assert_close(found[slot], wanted[slot], atol=3e-7, rtol=1e-5)
    assert torch.equal(found["lm_head.weight"], load_file(untied / "model.safetensors")["lm_head.weight"].double())


def test_vera_is_refused(untied: Path, tmp_path: Path) -> None:
    from peft import VeraConfig

    folder = train_peft(untied, tmp_path / "peft", config=VeraConfig(r=4, target_modules=["q_proj"]))
    with refused(r"adapter_config\.json: peft_type VERA is not LoRA; only LoRA adapters can be merged"):
        plan_one(untied, folder)


def test_no_variant_of_lora_is_taken_for_a_plain_one() -> None:
    """PEFT marks the options that change what an adapter means; VeLoRA changes only how gradients are stored."""
    from peft import LoraConfig

    from modalloy.specialists.peft import OTHER_UPDATES

    variants = {field.name for field in dataclasses.fields(LoraConfig) if field.metadata.get("is_lora_variant")}
    assert variants - {"velora_config"} <= OTHER_UPDATES.keys()
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    assert OTHER_UPDATES.keys() <= known


def edit_config(folder: Path, name: str = "adapter_config.json", **changes: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def add(**tensors: Tensor) -> Callable[[Path], None]:
    """Adds tensors to an adapter, `__` in their names standing for a dot."""
    more = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return lambda folder: edit_tensors(folder, lambda stored: stored.update(more))


Q = "base_model__model__model__layers__0__self_attn__q_proj__"
PEFT_DAMAGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "QALoRA": (lambda folder: edit_config(folder, use_qalora=True), r"QALoRA pools a layer's inputs"),
    "BD-LoRA": (lambda folder: edit_config(folder, use_bdlora={"nblocks": 2}), r"BD-LoRA stores blocks of its factors"),
    "KaSA": (lambda folder: edit_config(folder, kasa_config={"beta": 1e-4}), r"KaSA also cuts the base's small singular"),
    "MonteCLoRA": (lambda folder: edit_config(folder, monteclora_config={"a": 1}), r"MonteCLoRA samples its factors"),
    "Arrow": (lambda folder: edit_config(folder, arrow_config={"top_k": 2}), r"Arrow chooses between adapters"),
    "aLoRA": (lambda folder: edit_config(folder, alora_invocation_tokens=[1]), r"aLoRA updates only the tokens after"),
    "LoRA-GA": (
        lambda folder: edit_config(folder, init_lora_weights="lora_ga"),
        r"init_lora_weights 'lora_ga' is not known to leave the base as it was; convert the adapter to a plain LoRA",
    ),
    "DoRA in the weights only": (
        add(**{f"{Q}lora_magnitude_vector": torch.ones(WIDTH)}),
        r"q_proj\.lora_magnitude_vector: DoRA rescales whole weights, .*; merge it into a full model first",
    ),
    "factors with an adapter's name": (
        add(**{f"{Q}lora_A__default__weight": torch.ones(4, WIDTH)}),
        r"q_proj\.lora_A(\.default)?\.weight and \S+q_proj\.lora_A(\.default)?\.weight are two names of one tensor",
    ),
    "no prefix": (add(model__norm__weight=torch.ones(WIDTH)), r"no rule for tensor model\.norm\.weight \(32,\)"),
    "no tensor of the base": (
        add(base_model__model__score__weight=torch.ones(2, WIDTH)),
        r"peft specialist: base_model\.model\.score\.weight \(.*\) is not in the base; use the base it was trained from",
    ),
    "updated and saved whole": (
        add(**{f"{Q}weight": torch.ones(WIDTH, WIDTH)}),
        r"q_proj\.weight and \S+lora_A\.weight are two names of one tensor; list one under `ignore:`",
    ),
    "whole tensor of another shape": (
        add(base_model__model__model__norm__weight=torch.ones(31)),
        r"peft specialist: base_model\.model\.model\.norm\.weight is \(31,\), the base's is \(32,\) .*; use the base",
    ),
    "embeddings of another vocabulary": (
        add(base_model__model__model__embed_tokens__weight=torch.ones(32, WIDTH)),
        r"peft specialist: its vocabulary has 32 tokens, the base's has 30 \(base_model\S+embed_tokens\.weight in .*\); .* "
        r"list base_model\.model\.model\.embed_tokens\.weight under `ignore:` to keep the base's",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), PEFT_DAMAGED.values(), ids=PEFT_DAMAGED)
def test_peft_adapter_that_cannot_be_read(
    damage: Callable[[Path], None], message: str, untied: Path, tmp_path: Path
) -> None:
    folder = train_peft(untied, tmp_path / "peft")
    plan_one(untied, folder)
    damage(folder)
    with refused(message):
        plan_one(untied, folder)


# ------------------------------------------------------------------------------------------------------------ LLaVA


def write_llava_lora(base: Path, folder: Path, *, safe: bool = True, more: dict[str, Tensor] | None = None) -> Path:
    """What LLaVA's training script leaves: PEFT's two files, the other trained tensors with PEFT's prefix, the config."""
    train_peft(base, folder, safe=safe)
    trained = {f"base_model.model.model.mm_projector.{name}": tensor for name, tensor in draw(PROJECTOR).items()}
    torch.save(trained | (more or {}), folder / "non_lora_trainables.bin")
    config = json.loads((base / "config.json").read_text())
    tower = {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_projector_type": "mlp2x_gelu"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llava_llama"} | tower))
    return folder


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_llava_lora(safe: bool, untied: Path, tmp_path: Path) -> None:
    folder = write_llava_lora(untied, tmp_path / "llava-lora", safe=safe)
    planned = plan_one(untied, folder, entry={"modality": "image"})
    (specialist,) = planned.specialists
    assert specialist.layout == "llava" and specialist.modality == "image"
    assert [file.path.name for file in specialist.checkpoint.files][1:] == ["non_lora_trainables.bin"]
    assert {name: ref.shape for name, ref in specialist.projector.items()} == PROJECTOR
    name = "base_model.model.model.mm_projector.0.bias"
    assert fates(planned, "image")[name] == ("left out", "form: full holds the text path only")
    assert torch.equal(specialist.read(specialist.projector["0.bias"]), draw(PROJECTOR)["0.bias"])
    wanted = merged_by_peft(untied, folder)
    for name, tensor in merge_one(untied, folder).items():
        torch.testing.assert_close(tensor, wanted[name], atol=3e-7, rtol=1e-5)


def test_llava_lora_in_omni(base: Path, tmp_path: Path) -> None:
    folder = write_llava_lora(base, tmp_path / "llava-lora")
    entry = {"modality": "image", "encoder": ENCODER}
    modalloy.merge(recipe_of_one(base, folder, entry=entry, output={"form": "omni"}), tmp_path / "omni")
    state = modalloy.load_model(tmp_path / "omni").model.projectors["image"].state_dict()
    for name, tensor in draw(PROJECTOR).items():
        assert torch.equal(state[name], tensor)
    with pytest.raises(RecipeError, match="needs the modality of every specialist, but 'llava-lora' records none"):
        plan_one(base, folder, output={"form": "omni"})


def test_llava_lora_with_tuned_embeddings(untied: Path, tmp_path: Path) -> None:
    name = "base_model.model.model.embed_tokens.weight"
    folder = write_llava_lora(untied, tmp_path / "llava", more={name: torch.ones(VOCABULARY, WIDTH)})
    with refused(
        rf"{re.escape(name)} was trained \(\S+\), but embeddings are kept as the base has them; write modules"
    ):
        plan_one(untied, folder, output={"form": "adapter"})
    keep = {"model.embed_tokens.weight": {"policy": "keep"}}
    planned = plan_one(untied, folder, output={"form": "adapter"}, modules=keep)
    assert fates(planned, "llava")[name] == ("left out", "modules: model.embed_tokens.weight keeps the base's")
    larger = write_llava_lora(untied, tmp_path / "larger", more={name: torch.ones(VOCABULARY + 3, WIDTH)})
    edit_config(larger, "config.json", vocab_size=VOCABULARY + 3)
    with refused(rf"its vocabulary has 33 tokens, the base's has 30 \({re.escape(name)} in \S+\.bin\)"):
        plan_one(untied, larger)
    assert plan_one(untied, larger, ignore=[name]).merged_weights() == 2 * LAYERS


def test_llava_lora_with_a_trained_tower(untied: Path, tmp_path: Path) -> None:
    """What is saved beside an adapter was trained, whatever the config says."""
    name = "base_model.model.model.vision_tower.vision_tower.post_layernorm.weight"
    folder = write_llava_lora(untied, tmp_path / "llava", more={name: torch.ones(3)})
    edit_config(folder, "config.json", unfreeze_mm_vision_tower=False)
    with refused(r"may have been trained .*; list 'base_model\.model\.model\.vision_tower\.\*' under `ignore:`"):
        plan_one(untied, folder)
    listed = fates(plan_one(untied, folder, ignore=["base_model.model.model.vision_tower.*"]), "llava")
    assert listed[name][0] == "left out"


def test_llava_lora_of_another_base(untied: Path, tmp_path: Path) -> None:
    folder = write_llava_lora(untied, tmp_path / "llava")
    edit_config(folder, "config.json", hidden_size=4096)
    with refused("llava specialist was trained from a base with hidden_size 4096, .* has 32; use the right base"):
        plan_one(untied, folder)
    (folder / "config.json").unlink()
    with refused(r"llava/config\.json: no such file; download the folder again"):
        plan_one(untied, folder)


@pytest.mark.parametrize("layout", ["llava", "modelcompose"])
def test_projector_of_the_first_stage(layout: str, base: Path, tmp_path: Path) -> None:
    """`mm_projector.bin` counts beside an adapter, and cannot be merged alone."""
    folder = tmp_path / layout
    if layout == "llava":
        train_peft(base, folder)
        shutil.copy(base / "config.json", folder)
        prefix = "model.mm_projector."
    else:
        write_compose(folder, "vision")
        edit_tensors(folder, lambda stored: [stored.pop(name) for name in list(stored) if "projector" in name])
        prefix = "model.modal_projectors.vision."
    projector = {prefix + name: tensor for name, tensor in draw(PROJECTOR).items()}
    torch.save(projector, folder / "mm_projector.bin")
    (specialist,) = plan_one(base, folder, output={"form": "adapter"}).specialists
    assert specialist.layout == layout
    assert torch.equal(specialist.read(specialist.projector["2.weight"]), projector[prefix + "2.weight"])
    torch.save({f"base_model.model.{n}": t for n, t in projector.items()}, folder / "non_lora_trainables.bin")
    with refused(r"\.bin: \S+0\.weight and \S+0\.weight are two names of one tensor; list one under `ignore:`"):
        plan_one(base, folder)
    torch.save(projector, folder / "non_lora_trainables.bin")
    with refused(r"mm_projector\.bin: \S+0\.weight is also in non_lora_trainables\.bin; keep one of them"):
        plan_one(base, folder)
    for path in folder.glob("adapter_*"):
        path.unlink()
    with refused(
        rf"{layout}: holds only the projector of a pretraining stage \(mm_projector\.bin\), .*; give the folder of"
    ):
        plan_one(base, folder)


def tuned(base: Path, seed: int = 1) -> dict[str, Tensor]:
    """Every tensor of the base, moved."""
    before = load_file(base / "model.safetensors")
    moves = draw({name: tuple(tensor.shape) for name, tensor in before.items()}, seed)
    return {name: tensor + 0.1 * moves[name] for name, tensor in before.items()}


def shard(folder: Path, tensors: dict[str, Tensor], suffix: str = "safetensors") -> Path:
    """Write tensors as two shards and their index."""
    folder.mkdir(exist_ok=True)
    stem, names, weight_map = {"safetensors": "model", "bin": "pytorch_model"}[suffix], sorted(tensors), {}
    for part, chosen in enumerate((names[::2], names[1::2]), 1):
        file = f"{stem}-{part:05d}-of-00002.{suffix}"
        save_weights(folder / file, {name: tensors[name].clone() for name in chosen})
        weight_map |= dict.fromkeys(chosen, file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def save_weights(path: Path, tensors: dict[str, Tensor]) -> None:
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)


def load_weights(path: Path) -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = torch.load(path, weights_only=True) if path.suffix == ".bin" else load_file(path)
    return loaded


def assert_is_tuned(found: dict[str, Tensor], base: Path, wanted: dict[str, Tensor]) -> None:
    """The merge of one full model at λ = 1: its own linears and norms, the base's embeddings."""
    before = load_file(base / "model.safetensors")
    assert found.keys() == before.keys()
    for name, tensor in found.items():
        source = before if name.endswith(("embed_tokens.weight", "lm_head.weight")) else wanted
        torch.testing.assert_close(tensor, source[name].double(), atol=3e-7, rtol=1e-6)


TOWER = {"model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": torch.ones(3, 5)}


def write_llava(base: Path, folder: Path, **config: Any) -> Path:
    """A full model in LLaVA's own layout, as `.bin` shards."""
    projector = {f"model.mm_projector.{name}": tensor for name, tensor in draw(PROJECTOR).items()}
    shard(folder, tuned(base) | projector | TOWER, "bin")
    settings = json.loads((base / "config.json").read_text()) | {
        "model_type": "llava",
        "mm_vision_tower": "openai/clip",
    }
    (folder / "config.json").write_text(json.dumps(settings | {"unfreeze_mm_vision_tower": False} | config))
    return folder


def test_full_llava(untied: Path, tmp_path: Path) -> None:
    folder = write_llava(untied, tmp_path / "llava")
    planned = plan_one(untied, folder, entry={"modality": "image"})
    listed = fates(planned, "image")
    assert listed[next(iter(TOWER))] == ("left out", "frozen encoder; named by `encoder:`")
    assert listed["model.mm_projector.0.weight"] == ("left out", "form: full holds the text path only")
    assert listed["model.norm.weight"][0] == "averaged" and listed["lm_head.weight"][0] == "left out"
    (specialist,) = planned.specialists
    assert torch.equal(specialist.read(specialist.projector["2.bias"]), draw(PROJECTOR)["2.bias"])
    assert_is_tuned(merge_one(untied, folder), untied, tuned(untied))


@pytest.mark.parametrize(
    "config", [{"unfreeze_mm_vision_tower": True}, {"unfreeze_mm_vision_tower": None}, {"mm_vision_tower": None}]
)
def test_tower_that_may_have_been_trained(config: dict[str, Any], untied: Path, tmp_path: Path) -> None:
    folder = write_llava(untied, tmp_path / "llava", **config)
    with refused(
        r"llava specialist: model\.vision_tower\.\S+fc1\.weight \(.*\) may have been trained \(only a full LLaVA's .*\); "
        r"list 'model\.vision_tower\.\*' under `ignore:` to leave the encoder out"
    ):
        plan_one(untied, folder)
    assert_is_tuned(merge_one(untied, folder, ignore=["model.vision_tower.*"]), untied, tuned(untied))


@pytest.mark.parametrize("renamed", ["as transformers writes it", "before 4.52", "since 4.52"])
def test_full_llava_of_hugging_face(renamed: str, untied: Path, tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=4, patch_size=2
    )
    config = LlavaConfig(vision_config=vision, text_config=llama_config(attention_bias=True), tie_word_embeddings=False)
    torch.manual_seed(5)
    folder = tmp_path / "hf"
    model, base = LlavaForConditionalGeneration(config), load_file(untied / "model.safetensors")
    with torch.no_grad():
        for name, parameter in model.get_decoder().named_parameters():
            parameter.mul_(0.1).add_(base[f"model.{name}"])
    model.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    plain = {name.replace("model.language_model.", "model.").replace("language_model.model.", "model."): tensor
             for name, tensor in stored.items()}  # fmt: skip
    wanted = {name.replace("language_model.lm_head", "lm_head"): tensor for name, tensor in plain.items()}
    if renamed != "as transformers writes it":
        new = renamed == "since 4.52"
        rows = {}
        for name, tensor in wanted.items():
            part = name.removeprefix("model.")
            if part.startswith(("vision_tower.", "multi_modal_projector.")):
                rows[f"model.{part}" if new else part] = tensor
            elif new:
                rows[name if name == "lm_head.weight" else f"model.language_model.{part}"] = tensor
            else:
                rows[f"language_model.{name}"] = tensor
        save_file(rows, folder / "model.safetensors")
    (specialist,) = plan_one(untied, folder).specialists
    assert specialist.layout == "native" and specialist.native is not None
    carried = specialist.native.carried("image")
    first = next(tensor for name, tensor in stored.items() if name.endswith("linear_1.weight"))
    kept = carried["senses.image.model.model.multi_modal_projector.linear_1.weight"]
    assert torch.equal(specialist.read(kept), first)
    assert_is_tuned(merge_one(untied, folder), untied, wanted)


@pytest.mark.parametrize("inside", ["language_model.model", "model.language_model"])
def test_adapter_trained_on_hugging_face_llava(inside: str, untied: Path, tmp_path: Path) -> None:
    folder = train_peft(untied, tmp_path / "peft")
    wanted = merge_one(untied, folder)
    shutil.rmtree(tmp_path / "merged")
    stored = load_file(folder / "adapter_model.safetensors")
    inner = {
        name.replace("base_model.model.model", f"base_model.model.{inside}"): tensor for name, tensor in stored.items()
    }
    save_file(inner, folder / "adapter_model.safetensors")
    found = merge_one(untied, folder)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    save_file(inner | {name: tensor.clone() for name, tensor in stored.items()}, folder / "adapter_model.safetensors")
    with refused(r"lora_A\.weight and \S+lora_A\.weight are two names of one tensor"):
        plan_one(untied, folder)


# ----------------------------------------------------------------------------------------------------- ModelCompose


COMPOSE: dict[str, tuple[dict[str, Any], str]] = {
    "another rank of its modality": (
        {"vision_lora_r": 8},
        r"config\.json: vision_lora_r is 8, lora_r is 4, and ModelCompose reads only the latter; make them the same",
    ),
    "another alpha of its modality": ({"vision_lora_alpha": 1}, r"vision_lora_alpha is 1, lora_alpha is 8, and"),
    "merged online": (
        {"reset_scaling_weights": "default-video=0.5,default-vision=0.5"},
        r"config\.json: reset_scaling_weights marks a merge of several specialists; give the specialists themselves",
    ),
    "merged otherwise": (
        {"merge_default_weights": "a=1"},
        r"merge_default_weights marks a merge of several specialists",
    ),
}


@pytest.mark.parametrize(("config", "message"), COMPOSE.values(), ids=COMPOSE)
def test_modelcompose_config_that_misleads(config: dict[str, Any], message: str, base: Path, tmp_path: Path) -> None:
    folder = write_compose(tmp_path / "vision", "vision")
    edit_config(folder, "config.json", vision_lora_r=4, vision_lora_alpha=8)
    plan_one(base, folder)
    edit_config(folder, "config.json", **config)
    with refused(message):
        plan_one(base, folder)


def test_modelcompose_without_its_rank(base: Path, tmp_path: Path) -> None:
    """The published default is rank 128, alpha 256; other tensors would be scaled wrongly by it."""
    folder = write_compose(tmp_path / "vision", "vision")
    config = json.loads((folder / "config.json").read_text())
    del config["lora_r"], config["lora_alpha"]
    (folder / "config.json").write_text(json.dumps(config))
    with refused(r"has rank 4, \S+config\.json implies 128; the two files do not belong together"):
        plan_one(base, folder)
    usual = write_compose(tmp_path / "usual", "vision", rank=128)
    (usual / "config.json").write_text(json.dumps(config))
    assert open_specialist(usual).text_lora["model.layers.0.mlp.up_proj.weight"].scale == 2.0


@pytest.mark.parametrize("as_bin", [False, True])
def test_modelcompose_delta(as_bin: bool, base: Path, tmp_path: Path) -> None:
    folder = write_compose(tmp_path / "vision", "vision", as_bin=as_bin, seed=4)
    stored = compose_tensors("vision", seed=4)
    before = load_file(base / "model.safetensors")
    found = merge_one(base, folder)
    for stem in SLOTS:
        up, down = (stored[f"{stem}.lora_{side}.default.weight"].double() for side in "BA")
        delta = found[f"{stem}.weight"] - before[f"{stem}.weight"].double()
        torch.testing.assert_close(delta, 2 * up @ down, atol=3e-7, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------ full models


@pytest.mark.parametrize("kind", ["safetensors", "bin", "bin before torch 1.6", "one file"])
def test_full_model(kind: str, untied: Path, tmp_path: Path) -> None:
    wanted, folder = tuned(untied), tmp_path / "full"
    if kind == "one file":
        folder.mkdir()
        save_file(wanted, folder / "model.safetensors")
    else:
        shard(folder, wanted, kind.split()[0])
    if "1.6" in kind:
        for path in folder.glob("*.bin"):
            torch.save(load_weights(path), path, _use_new_zipfile_serialization=False)
            assert path.read_bytes()[:2] != b"PK"
    shutil.copy(untied / "config.json", folder)
    assert_is_tuned(merge_one(untied, folder), untied, wanted)


TIES: dict[str, tuple[Any, Any, bool]] = {  # what the specialist's config and the base's say, and whether it is a copy
    "tied": (True, True, True),
    "tied on a silent base": (True, None, True),
    "both silent": (None, None, True),
    "untied": (False, True, False),
    "silent on a tied base": (None, True, False),
    "untied on a silent base": (False, None, False),
}


@pytest.mark.parametrize(("own", "wanted", "copy"), TIES.values(), ids=TIES)
def test_head_of_a_full_model_on_a_base_that_ties_it(
    own: Any, wanted: Any, copy: bool, tied: Path, tmp_path: Path
) -> None:
    base, folder = tmp_path / "base", tmp_path / "full"
    shutil.copytree(tied, base)
    weights = tuned(tied)
    shard(folder, weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}, "bin")
    for place, value in ((base, wanted), (folder, own)):
        config = json.loads((tied / "config.json").read_text()) | {"tie_word_embeddings": value}
        if value is None:
            del config["tie_word_embeddings"]
        (place / "config.json").write_text(json.dumps(config))
    if copy:
        listed = fates(plan_one(base, folder), "full")
        assert listed["lm_head.weight"] == ("left out", "the base ties it to its embeddings")
    else:
        with refused(
            r"full specialist: lm_head\.weight \(.*\) is a head of its own, but the base ties its head .*`ignore:`"
        ):
            plan_one(base, folder)
    found = merge_one(base, folder, ignore=[] if copy else ["lm_head.weight"])
    assert_is_tuned(found, tied, weights)
    assert "lm_head.weight" not in found


def test_vocabulary_of_another_size(untied: Path, tmp_path: Path) -> None:
    weights = tuned(untied)
    rows = {
        name: torch.cat([weights[name], torch.ones(2, WIDTH)])
        for name in ("lm_head.weight", "model.embed_tokens.weight")
    }
    folder = shard(tmp_path / "full", weights | rows)
    shutil.copy(untied / "config.json", folder)
    edit_config(folder, "config.json", vocab_size=VOCABULARY + 2)
    with refused(
        r"full specialist: its vocabulary has 32 tokens, the base's has 30 \(lm_head\.weight in .*safetensors\); use the base "
        r"it was trained from, write vocabulary: union for the tokens of all, or list lm_head\.weight and "
        r"model\.embed_tokens\.weight under `ignore:` to keep the base's$"
    ):
        plan_one(untied, folder)
    with refused(r"has 30 \(model\.embed_tokens\.weight in .* list model\.embed_tokens\.weight under"):
        plan_one(untied, folder, ignore=["lm_head.weight"])
    assert_is_tuned(merge_one(untied, folder, ignore=["lm_head.weight", "*embed_tokens.weight"]), untied, weights)


def test_vocabulary_that_only_the_config_knows(untied: Path, tmp_path: Path) -> None:
    weights = {name: tensor for name, tensor in tuned(untied).items() if "embed" not in name and "lm_head" not in name}
    folder = shard(tmp_path / "full", weights)
    shutil.copy(untied / "config.json", folder)
    edit_config(folder, "config.json", vocab_size=VOCABULARY + 2)
    with refused(r"full specialist was trained from a base with vocab_size 32, '.*' has 30; use the right base"):
        plan_one(untied, folder)


FULL: dict[str, tuple[dict[str, Tensor], str]] = {
    "tensor of another architecture": (
        {"visual.merger.mlp.1.bias": torch.ones(2)},
        r"full specialist: visual\.merger\.mlp\.1\.bias \(.*\) is not in the base; .* or list the tensor under `ignore:`",
    ),
    "one tensor under two names": (
        {"language_model.model.norm.weight": torch.ones(WIDTH)},
        r"language_model\.model\.norm\.weight and model\.norm\.weight are two names of one tensor",
    ),
    "another shape": ({"model.norm.weight": torch.ones(31)}, r"model\.norm\.weight is \(31,\), the base's is \(32,\)"),
}


@pytest.mark.parametrize(("more", "message"), FULL.values(), ids=FULL)
def test_full_model_that_does_not_fit(more: dict[str, Tensor], message: str, untied: Path, tmp_path: Path) -> None:
    folder = shard(tmp_path / "full", tuned(untied) | more)
    shutil.copy(untied / "config.json", folder)
    with refused(message):
        plan_one(untied, folder)


def test_rotary_constants_are_left_out(untied: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = shard(tmp_path / "full", tuned(untied) | {name: torch.ones(4)})
    shutil.copy(untied / "config.json", folder)
    listed = fates(plan_one(untied, folder), "full")
    assert listed[name] == ("left out", "computed from the config when a model is loaded")


# ----------------------------------------------------------------------------------------------------------- shards


def part(folder: Path, number: int) -> Path:
    return next(folder.glob(f"*-{number:05d}-of-00002.*"))


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = next(folder.glob("*.index.json"))
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def add_to_first(folder: Path, *, from_second: bool) -> None:
    stored, others = load_weights(part(folder, 1)), load_weights(part(folder, 2))
    name = next(iter(others)) if from_second else "model.extra.weight"
    save_weights(part(folder, 1), stored | {name: others.get(name, torch.ones(2))})


def swap(folder: Path) -> None:
    first, second = part(folder, 1), part(folder, 2)
    stored, others = load_weights(first), load_weights(second)
    save_weights(first, others)
    save_weights(second, stored)


SHARDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "tensor in no shard": (
        lambda folder: edit_index(folder, lambda index: index.update({"model.extra.weight": part(folder, 1).name})),
        r"full: the index lists model\.extra\.weight, which no shard holds; download the folder again",
    ),
    "tensor in two shards": (
        lambda folder: add_to_first(folder, from_second=True),
        r"00002-of-00002\.\w+: \S+ is also in \w+-00001-of-00002\.\w+; keep one of them",
    ),
    "tensor that the index does not list": (
        lambda folder: add_to_first(folder, from_second=False),
        r"00001-of-00002\.\w+: holds model\.extra\.weight, which the index does not list; download the folder again",
    ),
    "tensor in another shard": (
        swap,
        r"00001-of-00002\.\w+: holds \S+, which the index places in \w+-00002-of-00002\.\w+; download the folder again",
    ),
    "missing shard": (
        lambda folder: part(folder, 2).unlink(),
        r"00002-of-00002\.\w+: listed in \S+\.index\.json but missing; download the folder again",
    ),
    "shard above the folder": (
        lambda folder: edit_index(folder, lambda index: index.update({"a": f"../full/{part(folder, 1).name}"})),
        r"index\.json: names the shard '\.\./full/\S+', which is no file of this folder; correct the index",
    ),
    "shard anywhere": (
        lambda folder: edit_index(folder, lambda index: index.update({"a": str(part(folder, 1))})),
        r"index\.json: names the shard '/\S+', which is no file of this folder; correct the index",
    ),
    "folder as shard": (
        lambda folder: edit_index(folder, lambda index: index.update({"a": ".."})),
        r"names the shard '\.\.', which is no file of this folder",
    ),
    "shard without a name": (
        lambda folder: edit_index(folder, lambda index: index.update({"a": ""})),
        r"names the shard '', which is no file of this folder",
    ),
    "shard that is a number": (
        lambda folder: edit_index(folder, lambda index: index.update({"a": 1})),
        r"index\.json: has no weight_map of file names; download the file again",
    ),
    "empty index": (
        lambda folder: edit_index(folder, lambda index: index.clear()),
        r"index\.json: has no weight_map of file names; download the file again",
    ),
}


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize(("damage", "message"), SHARDS.values(), ids=SHARDS)
def test_damaged_shards(
    damage: Callable[[Path], object], message: str, suffix: str, untied: Path, tmp_path: Path
) -> None:
    folder = shard(tmp_path / "full", tuned(untied), suffix)
    shutil.copy(untied / "config.json", folder)
    plan_one(untied, folder)
    damage(folder)
    with refused(message):
        plan_one(untied, folder)


def test_further_files(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    torch.save({"b": torch.zeros(3)}, tmp_path / "more.bin")
    opened = Checkpoint(tmp_path, ["adapter_model"], ["more.bin", "absent.bin"])
    assert [file.path.name for file in opened.files] == ["adapter_model.safetensors", "more.bin"]
    assert torch.equal(opened.read(opened.refs["b"]), torch.zeros(3))
    assert opened.header_sha256() != Checkpoint(tmp_path, ["adapter_model"]).header_sha256()
    torch.save({"a": torch.zeros(3)}, tmp_path / "more.bin")
    with refused(r"more\.bin: a is also in adapter_model\.safetensors; keep one of them"):
        Checkpoint(tmp_path, ["adapter_model"], ["more.bin"])


# -------------------------------------------------------------------------------------------------------------- hub


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Stands in for the hub: one repository's files, downloaded into a folder laid out as the hub's cache."""

    def __init__(self, cache: Path, names: list[str]) -> None:
        self.folder, self.names, self.asked = cache / "models--owner--name" / "snapshots" / COMMIT, names, []

    def snapshot_download(self, repo_id: str, *, revision: str | None, **patterns: Any) -> str:
        from huggingface_hub.utils import filter_repo_objects

        self.asked.append((repo_id, revision))
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in filter_repo_objects(self.names, **patterns):
            (self.folder / name).write_bytes(b"")
        return str(self.folder)

    def fetched(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}


CONFIGS = {"README.md", "config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja"}
OTHERS = [
    "logo.png",
    "training_args.bin",
    "consolidated.safetensors",
    "onnx/config.json",
    "onnx/model.onnx",
]
BIN = {"pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"}
REPOSITORIES: dict[str, tuple[list[str], set[str]]] = {
    "both formats": (["model.safetensors", "pytorch_model.bin"], {"model.safetensors"}),
    "shards": (
        ["model-00001-of-00001.safetensors", "model.safetensors.index.json", "pytorch_model.bin"],
        {"model-00001-of-00001.safetensors", "model.safetensors.index.json"},
    ),
    "only .bin": ([*BIN, "original/model.safetensors"], BIN),
    "an adapter": (
        ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"],
        {"adapter_config.json", "adapter_model.safetensors"},
    ),
    "LLaVA's adapter": (
        ["adapter_config.json", "adapter_model.bin", "non_lora_trainables.bin", "mm_projector.bin"],
        {"adapter_config.json", "adapter_model.bin", "non_lora_trainables.bin", "mm_projector.bin"},
    ),
}


@pytest.mark.parametrize(("names", "wanted"), REPOSITORIES.values(), ids=REPOSITORIES)
def test_hub_download_fetches_what_is_read(
    names: list[str], wanted: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(tmp_path, [*CONFIGS, *OTHERS, *names])
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    folder = locate("owner/name@v1.0")
    assert hub.fetched() == CONFIGS | wanted
    assert set(hub.asked) == {("owner/name", "v1.0")}
    assert hub_commit(folder) == COMMIT
    locate("owner/name")
    assert hub.asked[-1] == ("owner/name", None)


def test_other_folders_are_no_commit(tmp_path: Path) -> None:
    assert hub_commit(tmp_path) is None
    assert hub_commit(tmp_path / COMMIT) is None
    assert hub_commit(tmp_path / "snapshots" / "main") is None


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache in a folder of its own, and no way to the network."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return cache


def cached(cache: Path, source: Path) -> Path:
    """A repository in the hub's cache as downloads leave it: refs, snapshots."""
    repository = cache / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(source, repository / "snapshots" / COMMIT)
    return repository / "snapshots" / COMMIT


@pytest.mark.parametrize("location", ["owner/name", "owner/name@main", f"owner/name@{COMMIT}"])
def test_cached_repository_without_network(location: str, hub_cache: Path, untied: Path, tmp_path: Path) -> None:
    snapshot = cached(hub_cache, untied)
    adapter = train_peft(untied, tmp_path / "peft")
    edit_config(adapter, base_model_name_or_path="Owner/Name")
    recipe = recipe_of_one(untied, adapter, base_model=location, output={"form": "adapter"})
    planned = modalloy.merge(recipe, tmp_path / "out").plan
    assert planned.target.folder == snapshot and planned.target_name == location and planned.target_is_portable
    inputs = json.loads((tmp_path / "out" / "manifest.json").read_text())["inputs"]
    assert inputs["base"]["revision"] == COMMIT and "revision" not in inputs["peft"]


@pytest.mark.parametrize("location", ["owner/other", "owner/name@v2"])
def test_repository_that_is_not_cached(location: str, hub_cache: Path, untied: Path) -> None:
    cached(hub_cache, untied)
    with refused(
        rf"'{location}' is neither a folder here nor to be had from the hub \(.*\); correct the path, or download"
    ):
        locate(location)


def test_places_inside_a_repository(hub_cache: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "vision-damc").mkdir(parents=True)
    (source / "vision-damc" / "adapter_model.bin").write_bytes(b"1")
    (source / "BEATs.pt").write_bytes(b"2")
    snapshot = cached(hub_cache, source)
    assert locate("owner/name/vision-damc") == locate("owner/name@main/vision-damc") == snapshot / "vision-damc"
    assert locate(f"owner/name@{COMMIT}/BEATs.pt").read_bytes() == b"2"
    assert hub_commit(snapshot / "vision-damc") == hub_commit(snapshot / "BEATs.pt") == COMMIT
    assert is_portable("owner/name/BEATs.pt") and not is_portable("./name/BEATs.pt")
    assert locate("owner/name", whole=True) == snapshot
    assert locate("owner/name/vision-damc", whole=True) == snapshot / "vision-damc"
    with refused(r"'owner/name/audio-damc': the hub's 'owner/name' has no folder 'audio-damc'"):
        locate("owner/name/audio-damc")
    with refused(r"'owner/name/none\.pt' is neither a folder here nor to be had from the hub"):
        locate("owner/name/none.pt")


def hub_errors() -> dict[str, tuple[Exception, str]]:
    from huggingface_hub import errors

    network = errors.HfHubHTTPError.__bases__[0]
    return {
        "no such revision": (
            _http(errors.RevisionNotFoundError),
            r"'owner/name@v9': the hub's 'owner/name' has no revision 'v9'; correct what follows the @",
        ),
        "gated": (
            _http(errors.GatedRepoError),
            r"authors grant access on the hub; accept their terms there and log in",
        ),
        "no such repository": (
            _http(errors.RepositoryNotFoundError),
            r"nor to be had from the hub \(404\); correct the path",
        ),
        "lost connection": (network("connection reset"), r"nor to be had from the hub \(connection reset\); correct"),
        "bad name": (errors.HFValidationError("bad id"), r"nor to be had from the hub \(bad id\); correct the path"),
    }


def _http(kind: type[Exception]) -> Exception:
    """An error of the hub without the response that it came with."""
    error = kind.__new__(kind)
    error.args = ("404\nRequest ID",)
    return error


HUB_ERRORS = ["no such revision", "gated", "no such repository", "lost connection", "bad name"]


@pytest.mark.parametrize("kind", HUB_ERRORS)
def test_errors_of_the_hub_are_one_line(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, message = hub_errors()[kind]

    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with refused(message) as caught:
        locate("owner/name@v9")
    assert "\n" not in str(caught.value)

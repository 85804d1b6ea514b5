"""Native specialists that do not fit are refused before any arithmetic, in one line that says what is wrong."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import native_models
import pytest
import torch
import transformers
from native_models import SIGN
from safetensors.torch import load_file, save_file
from test_native import EXACT, take_base, write_base, write_recipe, write_specialist

from modalloy import merge
from modalloy.errors import ModalloyError
from modalloy.model.load import load_model
from modalloy.senses.anatomy import anatomy
from modalloy.specialists.licences import heeded, licence_of


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a specialist of it."""
    root = tmp_path_factory.mktemp("native")
    model, _ = native_models.llava_on_qwen2()
    write_base(root / "base", model)
    write_specialist(root / "see", model)
    return root


def refused(root: Path, models: list[dict[str, Any]], match: str, **more: Any) -> None:
    """The merge is refused by one line, and leaves nothing behind."""
    before = sorted(path.name for path in root.iterdir())
    recipe = write_recipe(root, models, **EXACT, **more)
    with pytest.raises(ModalloyError, match=match) as error:
        merge(recipe, root / "out")
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in root.iterdir()) == sorted({*before, "recipe.yaml"})


def copied(native: Path, tmp_path: Path) -> Path:
    for name in ("base", "see"):
        shutil.copytree(native / name, tmp_path / name)
    return tmp_path / "see"


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


FIELDS = {
    "rope": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}},
        r"rope_theta 123\.0, the base 10000\.0",
    ),
    "scaled rope": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
        r"factor 2\.0, the base None",
    ),
    "norm": ({"rms_norm_eps": 1e-3}, r"rms_norm_eps 0\.001, the base 1e-06"),
    "activation": ({"hidden_act": "gelu"}, r"hidden_act 'gelu', the base 'silu'"),
    "heads": ({"num_attention_heads": 8, "num_key_value_heads": 4}, r"num_attention_heads 8, the base 4"),
    "window": (
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 0,
            "layer_types": ["sliding_attention"] * 2,
        },
        r"sliding_window 8, the base None",
    ),
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_config_field_that_no_tensor_shows(native: Path, tmp_path: Path, field: str) -> None:
    changed, said = FIELDS[field]
    see = copied(native, tmp_path)
    edit(see / "config.json", lambda content: content["text_config"].update(changed))
    refused(
        tmp_path,
        [{"model": "see"}],
        rf"see specialist: its decoder has {said}, which no tensor shows \(.*config\.json\); use the base it was trained from, or "
        "say --allow-base-mismatch",
    )
    assert merge(tmp_path / "recipe.yaml", tmp_path / "out", allow_base_mismatch=True).plan.merged_weights() == 14


def test_multipliers_of_the_decoder(tmp_path: Path) -> None:
    model, _ = native_models.granite_speech()
    write_base(tmp_path / "base", model)
    write_specialist(tmp_path / "hear", model)
    edit(tmp_path / "base" / "config.json", lambda content: content.update(residual_multiplier=0.5))
    refused(tmp_path, [{"model": "hear"}], r"its decoder has residual_multiplier 0\.22, the base 0\.5")


def test_another_width(native: Path, tmp_path: Path) -> None:
    see = copied(native, tmp_path)
    config = native_models.text("Qwen2", hidden_size=32)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    assert see.is_dir()
    refused(tmp_path, [{"model": "see"}], r"see specialist: its decoder has hidden_size 64, the base 32; use the base")


def test_a_base_and_its_chat_model(native: Path, tmp_path: Path) -> None:
    """What the configs record tells them apart; weights of the two are near kin."""
    see = copied(native, tmp_path)
    shutil.copytree(see, tmp_path / "other")
    edit(see / "config.json", lambda content: content["text_config"].update(_name_or_path="Qwen/Qwen2.5-7B"))
    edit(
        tmp_path / "other" / "config.json",
        lambda content: content["text_config"].update(_name_or_path="Qwen/Qwen2.5-7B-Instruct"),
    )
    refused(
        tmp_path,
        [{"model": "see"}, {"model": "other"}],
        r"the see specialist was trained from 'Qwen/Qwen2.5-7B', the other specialist from 'Qwen/Qwen2.5-7B-Instruct'; merge "
        "specialists of one base",
    )


def test_weights_that_are_no_kin(native: Path, tmp_path: Path) -> None:
    copied(native, tmp_path)
    stranger = native_models.built(native_models.text("Qwen2"), "Qwen2ForCausalLM", seed=99)
    stranger.save_pretrained(tmp_path / "base")
    refused(tmp_path, [{"model": "see"}], r"see and base are unrelated: the cosine of their weights is -?0\.0\d\d")


def test_a_vocabulary_whose_shared_rows_are_other_tokens(native: Path, tmp_path: Path) -> None:
    see = copied(native, tmp_path)

    def swap(content: dict[str, Any]) -> None:
        words = content["model"]["vocab"]
        words["w40"], words["w41"] = words["w41"], words["w40"]

    edit(see / "tokenizer.json", swap)
    refused(tmp_path, [{"model": "see"}], r"see specialist: its token 41 is 'w40', the base's is 'w41'; use the base")


@pytest.mark.parametrize("file", ["preprocessor_config.json", "tokenizer.json"])
def test_missing_processor_files(native: Path, tmp_path: Path, file: str) -> None:
    see = copied(native, tmp_path)
    for path in see.glob("tokenizer*" if file == "tokenizer.json" else file):
        path.unlink()
    refused(tmp_path, [{"model": "see"}], rf"see: has no {file}.*; add th(ose|at) of the published model")


def test_an_encoder_of_another(native: Path, tmp_path: Path) -> None:
    copied(native, tmp_path)
    refused(
        tmp_path,
        [{"model": "see", "encoder": "clip"}],
        r"see specialist: its encoder is its own \(LlavaForConditionalGeneration\); remove `encoder:`",
    )


def test_several_modalities_and_none_chosen(tmp_path: Path) -> None:
    model, _ = native_models.llava_onevision()
    write_base(tmp_path / "base", model)
    write_specialist(tmp_path / "see", model)
    refused(
        tmp_path, [{"model": "see"}], r"LlavaOnevisionForConditionalGeneration takes image and video; add `modality:`"
    )
    refused(tmp_path, [{"model": "see", "modality": "audio"}], r"takes image and video, the recipe says 'audio'")


def tiny_mllama() -> Any:
    text = {**native_models.TEXT, "cross_attention_layers": [1], "num_hidden_layers": 2}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
        "max_num_tiles": 1,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 64,
        "supported_aspect_ratios": [[1, 1]],
    }
    config = transformers.MllamaConfig(vision_config=vision, text_config=text, image_token_index=SIGN)
    return native_models.built(config, "MllamaForConditionalGeneration")


def tiny_paligemma() -> Any:
    config = transformers.PaliGemmaConfig(
        vision_config={**native_models.TOWER, "image_size": 28, "patch_size": 14, "projection_dim": 64},
        text_config={**native_models.TEXT, "model_type": "gemma", "head_dim": 16, "hidden_act": "silu"},
        image_token_index=SIGN,
        projection_dim=64,
    )
    return native_models.built(config, "PaliGemmaForConditionalGeneration")


DEEPER = {
    "cross-attention": (
        tiny_mllama,
        r"Mllama\w+ hands its decoder cross_attention_mask, cross_attention_states, full_text_row_masked_out_mask beside the t",
    ),
    "masks over the question": (
        tiny_paligemma,
        r"PaliGemma\w+ makes attention masks of its own, which are not known here",
    ),
}


@pytest.mark.parametrize("kind", DEEPER)
def test_a_class_that_reaches_into_the_decoder(native: Path, tmp_path: Path, kind: str) -> None:
    make, said = DEEPER[kind]
    shutil.copytree(native / "base", tmp_path / "base")
    write_specialist(tmp_path / "see", make())
    refused(tmp_path, [{"model": "see"}], rf"see specialist: {said}.*; use it as base_model, or another specialist")


@pytest.mark.parametrize("change", ["lacks", "unknown", "shape"])
def test_tensors_that_are_not_the_class_s(native: Path, tmp_path: Path, change: str) -> None:
    see = copied(native, tmp_path)
    rows = load_file(see / "model.safetensors")
    name = next(name for name in rows if name.endswith("linear_1.weight"))
    if change == "lacks":
        del rows[name]
    elif change == "unknown":
        rows["model.further.weight"] = torch.zeros(2, 2)
    else:
        rows[name] = torch.zeros(3, 3)
    save_file(rows, see / "model.safetensors", metadata={"format": "pt"})
    said = {
        "lacks": r"lacks model\.multi_modal_projector\.linear_1\.weight of a LlavaForConditionalGeneration",
        "unknown": r"model\.further\.weight \(.*\) is no tensor of a LlavaForConditionalGeneration",
        "shape": r"linear_1\.weight is \(3, 3\), but its config\.json makes it \(64, 32\)",
    }
    refused(tmp_path, [{"model": "see"}], rf"see specialist: .*{said[change]}")


def test_a_sense_without_some_of_its_tensors(native: Path, tmp_path: Path) -> None:
    copied(native, tmp_path)
    refused(
        tmp_path,
        [{"model": "see"}],
        r"ignore: leaves out \S*vision_tower\S* of the see specialist, which its sense needs",
        ignore=["*vision_tower*"],
    )


@pytest.mark.parametrize("entry", [{"own": "same"}, {"frame": "{}"}], ids=["own", "frame"])
def test_options_of_other_specialists(tmp_path: Path, entry: dict[str, Any]) -> None:
    """`own: same` is of a LoRA, `frame:` of a native specialist."""
    if "own" in entry:
        model, _ = native_models.llava_on_qwen2()
        write_base(tmp_path / "base", model)
        write_specialist(tmp_path / "see", model)
        refused(tmp_path, [{"model": "see"} | entry], r"own: same is of a LoRA .* it has none; write own: \{rank: r\}")
    else:
        recipe = tmp_path / "recipe.yaml"
        content = {
            "base_model": "builtin:smollm2-135m-instruct",
            "models": [{"model": "builtin:image", "modality": "image"} | entry],
            "output": {"form": "omni"},
        }
        recipe.write_text(json.dumps(content))
        with pytest.raises(ModalloyError, match=r"`frame:` is of multimodal models of transformers; remove it"):
            merge(recipe, tmp_path / "out")


def test_a_lora_whose_model_is_not_the_base(tmp_path: Path) -> None:
    from test_native import lora

    model, _ = native_models.granite_speech()
    write_base(tmp_path / "base", model)  # the model beside the adapter is another
    write_specialist(tmp_path / "hear", model)
    lora(model, tmp_path / "hear", r".*language_model\.layers\.\d+\.self_attn\.q_proj", 7)
    refused(
        tmp_path,
        [{"model": "hear"}],
        r"hear specialist: \S+ differs from the base's, though the adapter beside it is its update",
    )


def test_an_adapter_s_folder_that_is_not_there(native: Path, tmp_path: Path) -> None:
    copied(native, tmp_path)
    for location in ("see#speech-lora", "see#../base", "see#"):
        refused(tmp_path, [{"model": location}], r"has no folder '.*'; correct the recipe")


def test_two_decoders_that_place_media_differently(tmp_path: Path) -> None:
    (old, _), (new, _) = native_models.qwen2_vl(), native_models.qwen2_5_vl()
    base = write_base(tmp_path / "base", old)
    take_base(new, base, seed=6)
    edit_eps = {"rms_norm_eps": 1e-5}
    write_specialist(tmp_path / "old", old)
    write_specialist(tmp_path / "new", new)
    for folder in ("old", "new", "base"):
        edit(tmp_path / folder / "config.json", lambda content: content.get("text_config", content).update(edit_eps))
    refused(
        tmp_path,
        [{"model": "old", "modality": "image"}, {"model": "new", "modality": "video"}],
        r"image needs a qwen2_vl_text decoder and video a qwen2_5_vl_text, which place media differently",
    )


def test_a_template_of_a_specialist_that_is_not_there(native: Path, tmp_path: Path) -> None:
    copied(native, tmp_path)
    refused(
        tmp_path,
        [{"model": "see"}],
        r"no specialist is called 'sea'; did you mean 'see'\?",
        output={"chat_template": "sea"},
    )


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layers"])
def test_a_config_that_asks_for_more_modules_than_any_model_has(native: Path, tmp_path: Path, key: str) -> None:
    see = copied(native, tmp_path)
    edit(see / "config.json", lambda content: content["vision_config"].update({key: 10**9}))
    refused(tmp_path, [{"model": "see"}], rf"{key} is 1000000000 in config\.json, more than any model has")


def test_a_config_of_another_class(native: Path, tmp_path: Path) -> None:
    see = copied(native, tmp_path)
    edit(see / "config.json", lambda content: content["vision_config"].update(num_attention_heads="four"))
    refused(
        tmp_path,
        [{"model": "see"}],
        r"its config\.json makes no LlavaForConditionalGeneration \(\w+: .*\); download it again",
    )


def test_a_damaged_sense_in_a_result(native: Path, tmp_path: Path) -> None:
    copied(native, tmp_path)
    merge(write_recipe(tmp_path, [{"model": "see"}], **EXACT), tmp_path / "out")
    edit(tmp_path / "out" / "config.json", lambda content: content["modalities"]["image"]["native"].update(rows="all"))
    with pytest.raises(ModalloyError, match=r"the entries of modality 'image' are damaged"):
        load_model(tmp_path / "out")

    def grow(content: dict[str, Any]) -> None:
        native = content["modalities"]["image"]["native"]
        native["rows"] = []
        native["config"]["vision_config"]["num_hidden_layers"] = 10**9

    edit(tmp_path / "out" / "config.json", grow)
    with pytest.raises(
        ModalloyError, match=r"num_hidden_layers is 1000000000 in config\.json, more than any model has"
    ):
        load_model(tmp_path / "out")


CARDS = {
    "plain": ("license: apache-2.0", []),
    "noncommercial": ("license: cc-by-nc-4.0", ["may not be used commercially"]),
    "named": ("license: other\nlicense_name: nvidia-noncommercial", ["may not be used commercially"]),
    "no derivatives": ("license: cc-by-nd-4.0", ["allows no derivatives"]),
    "copyleft": ("license: gpl-3.0", ["asks for the same licence again, but base is mit"]),
    "damaged": ("license: [", []),
    "none": ("tags: [a]", []),
}


@pytest.mark.parametrize("kind", CARDS)
def test_licences_that_do_not_go_together(tmp_path: Path, kind: str) -> None:
    front, wanted = CARDS[kind]
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# Model\n")
    found = licence_of(tmp_path)
    said = heeded([("base", "mit"), ("own", found)]) if found is not None else []
    assert len(said) == len(wanted) and all(re.search(words, line) for words, line in zip(wanted, said, strict=True))


def test_the_card_names_all_parents_and_their_licences(native: Path, tmp_path: Path) -> None:
    see = copied(native, tmp_path)
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (see / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    report = merge(write_recipe(tmp_path, [{"model": "see"}], **EXACT), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model:\n- base\n- see\nbase_model_relation: merge" in card
    assert "license: other" in card and "see: cc-by-nc-4.0" in card.replace("\\", "")
    assert any("may not be used commercially" in notice for notice in report.plan.notices)


def test_every_multimodal_class_is_placed_without_code_of_its_own() -> None:
    """What each class hands over is read from its source: a class that is not known here is judged, too."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES as NAMES

    wanted = {
        "refused": {"idefics", "florence2", "gemma4", "voxtral_realtime", "molmo2", "kosmos-2", "ernie4_5_vl_moe"},
        "deepstack": {"qwen3_vl", "granite_docling"},
        "three": {"qwen2_5_omni_thinker", "glm_ocr"},
        "plain": {"aria", "ovis2", "musicflamingo", "vibevoice_asr", "exaone4_5", "gemma4_unified"},
    }
    for sort, kinds in wanted.items():
        for kind in sorted(kinds):
            name = NAMES.get(kind, "MusicFlamingoForConditionalGeneration")
            found = anatomy(transformers.CONFIG_MAPPING[kind]().to_dict() | {"architectures": [name]}, kind)
            if sort == "refused":
                with pytest.raises(ModalloyError, match=r"; use it as base_model, or another specialist"):
                    found.check_supported(kind)
                continue
            found.check_supported(kind)
            assert ("deepstack" if found.has_deepstack else "three" if found.has_three_positions else "plain") == sort

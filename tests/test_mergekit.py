"""Recipes as people paste them from mergekit: what means something else here is refused, with what to write."""

import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import modalloy
from modalloy.errors import RecipeError

MODELS = [{"model": "one"}, {"model": "two"}]
PASTED: dict[str, tuple[dict[str, Any], str]] = {
    "a parameter of a model that the method takes once": (
        {
            "merge_method": "ssam",
            "models": [
                {"model": "one", "parameters": {"rank": 4}},
                {"model": "two", "parameters": {"rank": 8}},
            ],
        },
        r"models\.0\.parameters\.rank: ssam takes one rank for all models; write rank once, under the recipe's own parameters",
    ),
    "a parameter of a model, out of range": (
        {"merge_method": "ties", "models": [{"model": "one", "parameters": {"density": 2}}, {"model": "two"}]},
        r"models\.0\.parameters\.density: 2 is out of range",
    ),
    "normalize": (
        {"merge_method": "ssam", "parameters": {"normalize": False}},
        r"parameters\.normalize: weights are factors and never normalised",
    ),
    "lambda and scale": (
        {"merge_method": "ties", "parameters": {"lambda": 1, "scale": 2}},
        r"parameters\.lambda: λ is called scale here",
    ),
    "rescale": (
        {"merge_method": "ties", "parameters": {"rescale": True}},
        r"parameters\.rescale: ties does not rescale; remove it",
    ),
    "no rescale of several densities": (
        {
            "merge_method": "dare_linear",
            "parameters": {"rescale": False},
            "models": [{"model": "one", "parameters": {"density": 0.5}}, {"model": "two"}],
        },
        r"parameters\.rescale: DARE divides by the density",
    ),
    "no slices": (
        {"slices": [], "models": []},
        r"slices: \[\] is no list of layers; list whole models under `models:`",
    ),
    "slices and models": ({"slices": [{"sources": []}]}, r"slices: the models are listed under `models:` too"),
    "a slice of nothing": (
        {"slices": [{"sources": []}], "models": None},
        r"slices\.0\.sources: \[\] is no list of models",
    ),
    "a slice without a range": (
        {"slices": [{"sources": [{"model": "one"}]}], "models": None},
        r"slices: layers None are not all layers of each model in order",
    ),
    "parts that differ": (
        {"models": None, "modules": {"text": {"models": [{"model": "one"}]}, "vision": {"models": [{"model": "two"}]}}},
        r"modules: these parts of a model are merged from different models",
    ),
    "a part and models": (
        {"modules": {"default": {"models": [{"model": "one"}]}}},
        r"modules: the models are listed twice",
    ),
    "tokens": (
        {"tokenizer": {"source": "union", "tokens": {"<|im_end|>": {"source": "one"}}}},
        r"tokenizer\.tokens: the row of '<\|im_end\|>' cannot be set here; .*remove tokens",
    ),
    "padding": (
        {"tokenizer": {"source": "base", "pad_to_multiple_of": 64}},
        r"tokenizer\.pad_to_multiple_of: rows are added for tokens only; remove it",
    ),
    "an odd key of the tokenizer": (
        {"tokenizer": {"sauce": "union"}},
        r"unknown key 'tokenizer\.sauce'; known here: source",
    ),
    "two tokenizers": (
        {"tokenizer": {"source": "union"}, "tokenizer_source": "base"},
        r"tokenizer_source and tokenizer are two answers",
    ),
    "a tokenizer of no model": (
        {"tokenizer_source": "three"},
        r"tokenizer: 'three' is none of the models; write base_model's",
    ),
    "a template's name": (
        {"chat_template": "chatml"},
        r"chat_template: 'chatml' is a template of mergekit's own; write the",
    ),
    "filters that are none": (
        {"models": [{"model": "one", "parameters": {"weight": [{"filter": 7, "value": 1}, {"value": 0}]}}]},
        r"\{'filter': 7, 'value': 1\} is no entry by name; write - \{filter: mlp, value: 0\.5\}",
    ),
    "a filter of text": (
        {"models": [{"model": "one", "parameters": {"weight": [{"filter": "mlp", "value": "much"}, {"value": 0}]}}]},
        r"'much' is not a finite number",
    ),
    "a filter out of range": (
        {"merge_method": "ties", "parameters": {"density": [{"filter": "mlp", "value": [0.5, 3]}, {"value": 0.5}]}},
        r"density: 3 is out of range",
    ),
    "a weighted mean without its base": (
        {"merge_method": "linear", "dtype": "bfloat16"},
        r"linear is the weighted mean of the models, and 'base' is none of them; list it under `models:` with its weight",
    ),
    "a weighted sum": (
        {
            "merge_method": "linear",
            "base_model": None,
            "parameters": {"normalize": False},
            "models": [{"model": "one", "parameters": {"weight": 1}}, {"model": "two", "parameters": {"weight": 1}}],
        },
        r"normalize: false: weights of 1 \+ 1 give no mean of the models",
    ),
    "an unknown method": ({"merge_method": "tiess"}, r"unknown merge method 'tiess'; did you mean 'ties'\?"),
    "passthrough": (
        {"merge_method": "passthrough"},
        r"there is no passthrough here, which stacks layers; .*with mergekit",
    ),
    "several merges": ({"merge_slices": []}, r"unknown key 'merge_slices': one recipe makes one model"),
    "a model and its adapter": (
        {"models": [{"model": "org/one+org/lora"}]},
        r"'org/one\+org/lora' joins a model and an adapter.* model: org/lora, with base_model: org/one",
    ),
}


@pytest.mark.parametrize(("changes", "message"), PASTED.values(), ids=PASTED)
def test_a_pasted_recipe_is_told_what_to_write(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump({"base_model": "base", "merge_method": "task_arithmetic", "models": MODELS} | changes)
    )
    with pytest.raises(RecipeError) as error:
        modalloy.load_recipe(path)
    assert re.search(message, str(error.value)) and "\n" not in str(error.value), error.value


def test_a_folder_with_a_plus_in_its_name_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a+b").mkdir()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"base_model": "base", "models": [{"model": "a+b"}]}))
    assert modalloy.load_recipe(tmp_path / "recipe.yaml").models[0].model == "a+b"


FIRST = {"outside_layers": "first"}  # what every recipe of mergekit's has
SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dtype": ({"dtype": "bfloat16"}, {"out_dtype": "bfloat16"}),
    "two types": ({"dtype": "bfloat16", "out_dtype": "float32"}, {"out_dtype": "float32"}),
    "tokenizer and template": ({"tokenizer_source": "base", "chat_template": "auto"}, {}),
    "the other tokenizer key": ({"tokenizer": {"source": "base"}}, {}),
    "the base's tokenizer by name": ({"tokenizer": {"source": "base"}, "chat_template": "auto"}, {}),
    "union": ({"tokenizer_source": "union"}, {"vocabulary": "union"}),
    "the default of the other key": ({"tokenizer": {"pad_to_multiple_of": None}}, {"vocabulary": "union"}),
    "a model's tokenizer": ({"tokenizer": {"source": "two"}}, {"tokenizer": "two"}),
    "a template": ({"chat_template": "{{ messages }}"}, {"output": {"chat_template": "{{ messages }}"}}),
    "lambda and mask": ({"parameters": {"lambda": 0.5, "int8_mask": True}}, {"parameters": {"scale": 0.5}}),
    "weights as they are": ({"parameters": {"normalize": False}}, {}),
    "weights by their sum": ({"parameters": {"normalize": True}}, {"weights": "shares"}),
    "the weight of all": (
        {"parameters": {"weight": 0.5}, "models": [{"model": "one", "parameters": {"weight": 3}}, {"model": "two"}]},
        {"models": [{"model": "one", "parameters": {"weight": 3}}, {"model": "two", "parameters": {"weight": 0.5}}]},
    ),
    "the weight of the others": (
        {
            "parameters": {"weight": [0.1, 0.9]},
            "models": [{"model": "one", "parameters": {"weight": {"filter": "mlp", "value": 3}}}],
        },
        {
            "models": [
                {"model": "one", "parameters": {"weight": [{"filter": "mlp", "value": 3}, {"value": [0.1, 0.9]}]}}
            ]
        },
    ),
    "dare": (
        {
            "merge_method": "dare_linear",
            "parameters": {"rescale": True},
            "models": [
                {"model": "one", "parameters": {"density": 0.5, "weight": 0.4}},
                {"model": "two", "parameters": {"density": 0.5}},
            ],
        },
        {
            "merge_method": "dare_linear",
            "parameters": {"density": 0.5},
            "models": [{"model": "one", "parameters": {"weight": 0.4}}, {"model": "two"}],
        },
    ),
    "dare that does not rescale": (
        {"merge_method": "dare_linear", "parameters": {"rescale": False, "density": 0.5, "lambda": 3}},
        {"merge_method": "dare_linear", "parameters": {"density": 0.5, "scale": 1.5}},
    ),
    "dare's defaults": (
        {"merge_method": "dare_ties", "dtype": "float16"},
        {
            "merge_method": "dare_ties",
            "parameters": {"density": 1.0, "trim_density": 1.0, "combine": "sum"},
            "out_dtype": "float16",
        },
    ),
    "ties' defaults": (
        {"merge_method": "ties", "models": [{"model": "base"}, *MODELS], "dtype": "float16"},
        {"merge_method": "ties", "parameters": {"density": 1.0, "combine": "weighted_mean"}, "out_dtype": "float16"},
    ),
    "densities": (
        {
            "merge_method": "ties",
            "parameters": {"density": 0.25},
            "models": [
                {"model": "one", "parameters": {"density": [{"filter": "mlp", "value": 0.5}]}},
                {"model": "two"},
            ],
        },
        {
            "merge_method": "ties",
            "parameters": {"density": 0.25, "combine": "weighted_mean"},
            "models": [
                {"model": "one", "parameters": {"density": [{"filter": "mlp", "value": 0.5}]}},
                {"model": "two"},
            ],
        },
    ),
    "a mean of models": (
        {"merge_method": "linear", "base_model": None, "dtype": "float16"},
        {
            "merge_method": "average",
            "base_model": "one",
            "parameters": {"scale": 1.0},
            "weights": "shares",
            "out_dtype": "float16",
        },
    ),
    "a mean that is one": (
        {
            "merge_method": "linear",
            "base_model": "one",
            "parameters": {"normalize": False, "weight": 0.5},
        },
        {
            "merge_method": "average",
            "base_model": "one",
            "parameters": {"scale": 1.0},
            "models": [
                {"model": "one", "parameters": {"weight": 0.5}},
                {"model": "two", "parameters": {"weight": 0.5}},
            ],
        },
    ),
    "slices of all layers": (
        {
            "models": None,
            "parameters": {"lambda": 2},
            "slices": [
                {
                    "sources": [
                        {"model": "one", "layer_range": [0, 32], "parameters": {"weight": 2}},
                        {"model": "two", "layer_range": [0, 32]},
                    ],
                    "parameters": {"lambda": [{"filter": "mlp", "value": 3}]},
                }
            ],
        },
        {
            "layers": 32,
            "models": [{"model": "one", "parameters": {"weight": 2}}, {"model": "two"}],
            "parameters": {"scale": [{"filter": "mlp", "value": 3}, {"value": 2}]},
        },
    ),
    "a part of a model": (
        {"models": None, "modules": {"default": {"models": MODELS, "parameters": {"lambda": 2}}}},
        {"parameters": {"scale": 2}},
    ),
    "an adapter on the base": (
        {"models": [{"model": "base+org/lora"}], "dtype": "float16"},
        {"models": [{"model": "org/lora"}], "out_dtype": "float16", "missing": "zero"},
    ),
    "an adapter as a table": (
        {"models": [{"model": {"model": "base", "lora": "org/lora"}}], "dtype": "float16"},
        {"models": [{"model": "org/lora"}], "out_dtype": "float16", "missing": "zero"},
    ),
}


@pytest.mark.parametrize(("pasted", "ours"), SAME.values(), ids=SAME)
def test_what_means_the_same_is_read_as_it_is(pasted: dict[str, Any], ours: dict[str, Any], tmp_path: Path) -> None:
    start = {"base_model": "base", "merge_method": "task_arithmetic", "models": MODELS}
    found = []
    for name, changes in (("pasted", pasted), ("ours", FIRST | ours)):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in (start | changes).items() if value is not None}))
        found.append(modalloy.load_recipe(path).model_copy(update={"text": ""}))
    assert found[0] == found[1]
    kept = tmp_path / "pasted.yaml"
    assert modalloy.load_recipe(kept).to_yaml() == kept.read_text()


VALUES: list[Any] = [
    None, True, 0, 1, -2.5, "", "base", "one", "union", "linear", "ties", [], [0, 32], [0.1, 0.9], ["one"], {}, {"value": 1},
    [{"filter": "mlp", "value": 1}, 3], [{"filter": ["mlp"], "value": [1]}], {"model": "one"}, [{"model": "one"}], [{"model": 7}],
    [{"model": "one", "parameters": [1]}], [{"model": "one", "parameters": {"weight": [{"filter": "mlp", "value": 2}]}}],
    [{"sources": [{"model": "one", "layer_range": [0, 2]}]}], [{"sources": 3}], {"default": {"models": 3}},
    {"default": {"slices": [{"sources": []}]}}, {"weight": {}, "normalize": "yes"}, {"lambda": [], "rescale": 0, "density": {}},
    {"source": 4}, {"tokens": 4}, {"tokens": {"a": None}}, {"source": "base", 4: 5},
]  # fmt: skip
PLACES = ("models", "slices", "modules", "parameters", "merge_method", "base_model", "dtype", "tokenizer", "tokenizer_source",
          "chat_template", "output", "target")  # fmt: skip


def test_whatever_stands_at_a_key_is_read_or_refused_in_one_line(tmp_path: Path) -> None:
    draw, path, read = random.Random(0), tmp_path / "recipe.yaml", 0
    start = {"base_model": "base", "merge_method": "linear", "models": MODELS, "dtype": "float16"}
    for _ in range(3000):
        changes = {key: draw.choice(VALUES) for key in draw.sample(PLACES, draw.randint(1, 4))}
        path.write_text(yaml.safe_dump(start | changes, sort_keys=False))
        try:
            assert modalloy.load_recipe(path).models
            read += 1
        except RecipeError as error:
            assert "\n" not in str(error) and len(str(error)) < 1500, changes
    assert read > 5


def test_a_recipe_without_a_key_of_mergekits_is_ours(tmp_path: Path) -> None:
    """Weights are factors then, the mean is over the models that agree, and a list over the depth says nothing of the rest."""
    path = tmp_path / "recipe.yaml"
    models = [{"model": "one", "parameters": {"weight": 0.5}}, {"model": "two", "parameters": {"weight": 0.5}}]
    path.write_text(
        yaml.safe_dump({"base_model": "base", "merge_method": "ties", "models": models, "dtype": "float32"})
    )
    recipe = modalloy.load_recipe(path)
    assert recipe.weights == "factors" and recipe.outside_layers == "refuse" and not recipe.parameters
    path.write_text(path.read_text() + "parameters: {int8_mask: true}\n")
    recipe = modalloy.load_recipe(path)
    assert recipe.outside_layers == "first" and recipe.parameters == {"density": 1.0, "combine": "weighted_mean"}

"""Recipes as people paste them from mergekit: what means something else here is refused, with what to write."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import modalloy
from modalloy.errors import RecipeError

MODELS = [{"model": "one"}, {"model": "two"}]
PASTED: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": (
        {"dtype": "float16", "out_dtype": "float32"},
        r"dtype: float16: .*write out_dtype: float16",
    ),
    "a parameter of a model": (
        {
            "merge_method": "ties",
            "models": [
                {"model": "one", "parameters": {"density": 0.5}},
                {"model": "two", "parameters": {"density": 0.7}},
            ],
        },
        r"models\.0\.parameters\.density: .*write density once, under the recipe's own parameters",
    ),
    "normalize": (
        {"merge_method": "dare_ties", "parameters": {"normalize": False}},
        r"parameters\.normalize: weights are factors and never normalised",
    ),
    "lambda and scale": (
        {"merge_method": "ties", "parameters": {"lambda": 1, "scale": 2}},
        r"parameters\.lambda: λ is called scale here",
    ),
    "slices": ({"slices": [], "models": []}, r"unknown key 'slices': slices of layers are not to be had"),
    "tokenizer": ({"tokenizer": {"source": "union"}}, r"unknown key 'tokenizer': the result has the base's tokenizer"),
    "filters": (
        {"models": [{"model": "one", "parameters": {"weight": [{"filter": "mlp", "value": 1}, {"value": 0}]}}]},
        r"models\.0\.parameters\.weight: filters are not read; .*`modules:`",
    ),
    "passthrough": ({"merge_method": "passthrough"}, r"there is no passthrough here; modalloy keeps the base's layers"),
    "a model and its adapter": (
        {"models": [{"model": "org/one+org/lora"}]},
        r"'org/one\+org/lora' joins a model and an adapter.* model: org/lora, with base_model: org/one",
    ),
}


@pytest.mark.parametrize(("changes", "message"), PASTED.values(), ids=PASTED)
def test_a_pasted_recipe_is_told_what_to_write(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"base_model": "base", "merge_method": "linear", "models": MODELS} | changes))
    with pytest.raises(RecipeError) as error:
        modalloy.load_recipe(path)
    assert re.search(message, str(error.value)) and "\n" not in str(error.value), error.value


def test_a_folder_with_a_plus_in_its_name_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a+b").mkdir()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"base_model": "base", "models": [{"model": "a+b"}]}))
    assert modalloy.load_recipe(tmp_path / "recipe.yaml").models[0].model == "a+b"


SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dtype": ({"dtype": "bfloat16"}, {"out_dtype": "bfloat16"}),
    "tokenizer and template": ({"tokenizer_source": "base", "chat_template": "auto"}, {}),
    "the other tokenizer key": ({"tokenizer": {"source": "base"}}, {}),
    "lambda and mask": ({"parameters": {"lambda": 0.5, "int8_mask": True}}, {"parameters": {"scale": 0.5}}),
    "weights as they are": ({"parameters": {"normalize": False}}, {}),
    "weights by their sum": (
        {
            "parameters": {"normalize": True},
            "models": [{"model": "one", "parameters": {"weight": 3}}, {"model": "two", "parameters": {"weight": 1}}],
        },
        {
            "models": [
                {"model": "one", "parameters": {"weight": 0.75}},
                {"model": "two", "parameters": {"weight": 0.25}},
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
    "an adapter on the base": ({"models": [{"model": "base+org/lora"}]}, {"models": [{"model": "org/lora"}]}),
}


@pytest.mark.parametrize(("pasted", "ours"), SAME.values(), ids=SAME)
def test_what_means_the_same_is_read_as_it_is(pasted: dict[str, Any], ours: dict[str, Any], tmp_path: Path) -> None:
    start = {"base_model": "base", "merge_method": "task_arithmetic", "models": MODELS}
    found = []
    for name, changes in (("pasted", pasted), ("ours", ours)):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(start | changes))
        found.append(modalloy.load_recipe(path).model_copy(update={"text": ""}))
    assert found[0] == found[1]
    kept = tmp_path / "pasted.yaml"
    assert modalloy.load_recipe(kept).to_yaml() == kept.read_text()

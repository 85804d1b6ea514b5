"""mergekit's own examples, with the same keys, run in both tools on the same small models, tensor by tensor.

Of `examples/` and `docs/multimerge.md` of mergekit, and of its README on tokenizers. Where modalloy differs on purpose, the
comparison says so: norms are weighted means of the models' (mergekit merges every tensor by the method), embeddings and heads
stay the base's unless a rule speaks of them, and a share of the entries is rounded where mergekit truncates it.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import base_tokenizer
from safetensors.torch import load_file
from torch import Tensor

import modalloy
from modalloy import cli
from modalloy.errors import RecipeError
from modalloy.methods import METHODS
from modalloy.methods.dare import drop
from modalloy.methods.parameters import is_per_model, schema

LAYERS = 4
TOKENS = ("model.embed_tokens.weight", "lm_head.weight")
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and three fine-tunes of it: Llama's shape, and Mistral's under m_base, m_one, m_two."""
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    folder = tmp_path_factory.mktemp("examples")
    sizes = {"vocab_size": 40, "hidden_size": 40, "intermediate_size": 80, "num_hidden_layers": LAYERS}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 64}
    for prefix, config, kind in (
        ("", LlamaConfig(**sizes, tie_word_embeddings=False), LlamaForCausalLM),
        ("m_", MistralConfig(**sizes, tie_word_embeddings=False), MistralForCausalLM),
    ):
        torch.manual_seed(0)
        model = kind(config)
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for seed, name in enumerate(("base", "one", "two", "three")):
            torch.manual_seed(seed)
            model.load_state_dict({key: one + (seed > 0) * 0.02 * torch.randn_like(one) for key, one in start.items()})
            model.save_pretrained(folder / f"{prefix}{name}")
            base_tokenizer().save_pretrained(folder / f"{prefix}{name}")
    return folder


def entry(model: str, **parameters: Any) -> dict[str, Any]:
    return {"model": model} | ({"parameters": parameters} if parameters else {})


def whole(*names: str) -> dict[str, Any]:
    return {"slices": [{"sources": [{"model": name, "layer_range": [0, LAYERS]} for name in names]}]}


T_BY_NAME = [
    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
    {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
    {"value": 0.5},
]
EXAMPLES: dict[str, dict[str, Any]] = {
    "arcee_fusion.yml": {
        "models": [entry("one"), entry("two")],
        "merge_method": "arcee_fusion",
        "base_model": "one",
        "dtype": "float32",
    },
    "bio-merge.yml": {
        "models": [entry("m_one", density=0.5, weight=0.5), entry("m_two", density=0.5, weight=0.5)],
        "merge_method": "ties",
        "base_model": "m_base",
        "parameters": {"normalize": False, "int8_mask": True},
        "dtype": "float32",
        "tokenizer_source": "base",
    },
    "gradient-slerp.yml": {
        **whole("one", "two"),
        "merge_method": "slerp",
        "base_model": "one",
        "parameters": {"t": T_BY_NAME},
        "dtype": "float32",
    },
    "gradient-slerp.yml, as models": {
        "models": [entry("one"), entry("two")],
        "merge_method": "slerp",
        "base_model": "one",
        "parameters": {"t": T_BY_NAME},
        "dtype": "float32",
    },
    "linear.yml": {
        "models": [entry("one", weight=1.0), entry("two", weight=0.3), entry("three", weight=0.5)],
        "merge_method": "linear",
        "dtype": "float32",
    },
    "ties.yml": {
        "models": [
            entry("one", density=[1, 0.70015, 0.1], weight=1.0),
            entry("two", density=0.5, weight=[0, 0.3, 0.7, 1]),
            entry("three", density=0.33, weight=[{"filter": "mlp", "value": 0.5}, {"value": 0}]),
        ],
        "merge_method": "ties",
        "base_model": "base",
        "parameters": {"normalize": True, "int8_mask": True},
        "dtype": "float32",
    },
    "multimerge.md, first": {
        "models": [entry("m_one"), entry("m_two")],
        "merge_method": "linear",
        "parameters": {"weight": 0.5},
    },
    "multimerge.md, second": {
        "models": [entry("one")],
        "merge_method": "slerp",
        "base_model": "base",
        "parameters": {"t": 0.5},
    },
    "multimerge.md, final": {
        "models": [entry("one", density=0.6, weight=0.5), entry("two", density=0.8, weight=0.25)],
        "merge_method": "dare_ties",
        "base_model": "base",
        "dtype": "float32",
    },
    "create_a_merge_method.md": {
        "models": [entry("base", weight=0.2), entry("one", weight=0.3), entry("two", weight=0.7)],
        "merge_method": "linear",
        "base_model": "base",
        "parameters": {"normalize": True},
        "dtype": "float32",
    },
    "linear of slices": {
        **whole("one", "two"),
        "merge_method": "linear",
        "parameters": {"weight": [{"filter": "mlp", "value": [0.2, 0.9]}, {"value": 0.5}]},
        "dtype": "float32",
    },
    "task_arithmetic": {
        "models": [entry("base"), entry("one", weight=0.5), entry("two", weight=-0.25)],
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "parameters": {"normalize": True, "lambda": 0.8},
        "dtype": "float32",
    },
    "modules": {
        "modules": {"default": {"models": [entry("one", weight=1), entry("two", weight=[0.5, 0.25])]}},
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "dtype": "float32",
    },
    **{
        method: {
            "models": [entry("one", weight=0.75), entry("two", weight=0.5)],
            "merge_method": method,
            "base_model": "base",
            "dtype": "float32",
        }
        for method in ("nuslerp", "multislerp")
    },
    **{
        method: {
            "models": [entry("one"), entry("two")],
            "merge_method": method,
            "base_model": "base",
            "dtype": "float32",
        }
        for method in ("model_stock", "sce", "ram")
    },
    **{
        f"{method}, {normalize}": {
            "models": [
                entry("one", weight=0.75, density=0.5, gamma=0.02),
                entry("two", weight=0.5, density=0.9, gamma=0.01),
            ],
            "merge_method": method,
            "base_model": "base",
            "parameters": {"normalize": normalize, "lambda": 0.5},
            "dtype": "float32",
        }
        for method in ("breadcrumbs", "breadcrumbs_ties")
        for normalize in (True, False)
    },
    "karcher": {
        "models": [entry("one"), entry("two")],
        "merge_method": "karcher",
        "base_model": "base",
        "dtype": "float32",
        "tokenizer_source": "base",
    },
    **{
        f"{method} without a base": {
            "models": [
                entry("one", **weights),
                entry("two", **weights),
                *([] if method == "nuslerp" else [entry("three", **weights)]),
            ],
            "merge_method": method,
            "dtype": "float32",
            "tokenizer_source": "base",
        }
        for method, weights in (("karcher", {}), ("nuslerp", {"weight": 0.5}), ("multislerp", {"weight": 0.5}))
    },
}


def is_to_be_had(recipe: dict[str, Any]) -> bool:
    """Whether the catalogue has the method, and it takes for each model what models have of their own."""
    if recipe["merge_method"] not in METHODS:
        return False
    known = schema(METHODS[recipe["merge_method"]].function)
    own = {name for one in recipe.get("models", ()) for name in one.get("parameters", ())} - {"weight"}
    return all(is_per_model(known[name][0]) for name in own)


COLLECTED = {name: one for name, one in EXAMPLES.items() if is_to_be_had(one)}
PICKS = ("arcee_fusion",)  # entries by a threshold, near which rounding decides
TOLERANCE = {"model_stock": 1e-3, "karcher": 1e-3}  # of small angles in float32
RANDOM = ("dare_ties",)  # masks: compared below


def placed(recipe: Any, folder: Path) -> Any:
    """The recipe with the folders of its models."""
    if isinstance(recipe, dict):
        named = {key: str(folder / recipe[key]) for key in ("model", "base_model") if key in recipe}
        return {key: placed(value, folder) for key, value in recipe.items()} | named
    return [placed(value, folder) for value in recipe] if isinstance(recipe, list) else recipe


def tensors_of(folder: Path) -> Tensors:
    return {name: one for path in sorted(folder.glob("*.safetensors")) for name, one in load_file(path).items()}


def theirs(recipe: dict[str, Any], out: Path) -> Tensors:
    """What mergekit writes."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    options = MergeOptions(quiet=True, write_model_card=False, copy_tokenizer=True, random_seed=0)
    run_merge(MergeConfiguration.model_validate(recipe), str(out), options)
    return tensors_of(out)


def ours(recipe: dict[str, Any], folder: Path) -> Tensors:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    modalloy.merge(path, folder / "ours")
    assert (folder / "ours" / "recipe.yaml").read_text() == path.read_text()
    return tensors_of(folder / "ours")


def distance(one: Tensor, other: Tensor, base: Tensor) -> float:
    """Relative to how far the other is from the base."""
    return float((one - other).double().norm() / (other - base).double().norm().clamp(min=1e-12))


@pytest.mark.parametrize("name", [name for name, one in COLLECTED.items() if one["merge_method"] not in RANDOM])
def test_linear_weights_are_mergekits(name: str, models: Path, tmp_path: Path) -> None:
    recipe = placed(COLLECTED[name], models)
    wanted, found = theirs(recipe, tmp_path / "theirs"), ours(recipe, tmp_path)
    assert wanted.keys() == found.keys()
    read = modalloy.load_recipe(tmp_path / "recipe.yaml")
    base = tensors_of(Path(read.base_model))
    compared = 0
    for key, tensor in wanted.items():
        if key in TOKENS:  # kept, where mergekit merges them: no rule speaks of them
            assert torch.equal(found[key], base[key])
        elif tensor.dim() == 2:
            compared += 1
            if recipe["merge_method"] in PICKS:
                assert ((found[key] - tensor).abs() > 1e-6).double().mean() < 0.01, key
            else:
                assert distance(found[key], tensor, base[key]) < TOLERANCE.get(recipe["merge_method"], 1e-5), key
        elif read.merge_method == "average":  # mergekit's linear: norms are weighted means in both
            assert distance(found[key], tensor, base[key]) < 1e-5, key
    assert compared == 7 * LAYERS


def test_norms_are_means_of_the_weighted_updates(models: Path, tmp_path: Path) -> None:
    """Not trimmed and elected, as mergekit's are: a norm has too few entries for that, and each has its own meaning."""
    recipe = placed(COLLECTED["bio-merge.yml"], models)
    wanted, found = theirs(recipe, tmp_path / "theirs"), ours(recipe, tmp_path)
    base, one, two = (tensors_of(models / name) for name in ("m_base", "m_one", "m_two"))
    for key in (key for key in found if "norm" in key):
        mean = base[key] + (0.5 * (one[key] - base[key]) + 0.5 * (two[key] - base[key])) / 2
        assert torch.allclose(found[key], mean, rtol=1e-6)
        assert distance(found[key], wanted[key], base[key]) > 0.1


def test_norms_are_divided_by_the_weights_where_the_merge_is(models: Path, tmp_path: Path) -> None:
    recipe = placed(COLLECTED["bio-merge.yml"], models)
    recipe["parameters"]["normalize"] = True
    recipe["models"][1]["parameters"]["weight"] = 0.25
    found = ours(recipe, tmp_path)
    base, one, two = (tensors_of(models / name) for name in ("m_base", "m_one", "m_two"))
    for key in (key for key in found if "norm" in key):
        mean = base[key] + (0.5 * (one[key] - base[key]) + 0.25 * (two[key] - base[key])) / 0.75
        assert torch.allclose(found[key], mean, rtol=1e-6)


def test_embeddings_are_mergekits_by_a_rule(models: Path, tmp_path: Path) -> None:
    recipe = placed(COLLECTED["task_arithmetic"], models)
    wanted = theirs(recipe, tmp_path / "theirs")
    rule = {"merge_method": "task_arithmetic", "parameters": {"scale": 0.8}}
    found = ours(recipe | {"modules": {"*embed_tokens*": rule, "lm_head*": rule}}, tmp_path)
    base = tensors_of(models / "base")
    assert all(distance(found[key], wanted[key], base[key]) < 1e-5 for key in TOKENS)


def test_dare_is_mergekits_given_the_masks_and_the_papers_scale(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mergekit rescales to the update's L1 norm, modalloy by 1 / density as the paper; the masks are of different numbers."""
    recipe = placed(COLLECTED["multimerge.md, final"], models)
    base, *others = (tensors_of(models / name) for name in ("base", "one", "two"))
    known = {
        tuple((other[key] - base[key]).flatten()[:4].tolist()): (index, key)
        for index, other in enumerate(others)
        for key in base
    }

    def sparsify(delta: Tensor, density: float, method: Any, **_: Any) -> Tensor:
        index, key = known[tuple(delta.flatten()[:4].tolist())]
        return drop(delta, density, 42, index, key) if delta.dim() == 2 else delta

    monkeypatch.setattr("mergekit.merge_methods.generalized_task_arithmetic.sparsify", sparsify)
    wanted, found = theirs(recipe, tmp_path / "theirs"), ours(recipe, tmp_path)
    linears = [key for key, one in wanted.items() if one.dim() == 2 and key not in TOKENS]
    assert len(linears) == 7 * LAYERS
    assert all(distance(found[key], wanted[key], base[key]) < 1e-5 for key in linears)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "orcamini-platy-44layer.yml": (
        {
            "slices": [
                {"sources": [{"model": "one", "layer_range": [0, 3]}]},
                {"sources": [{"model": "two", "layer_range": [1, 4]}]},
            ],
            "merge_method": "passthrough",
            "dtype": "float16",
        },
        r"slices: 2 stretches of layers make another stack .*list whole models under `models:`.*stack layers with mergekit",
    ),
    "slices of some layers": (
        {
            "slices": [{"sources": [{"model": "one", "layer_range": [0, 2]}, {"model": "two", "layer_range": [2, 4]}]}],
            "merge_method": "linear",
        },
        r"slices: layers \[0, 2\] and \[2, 4\] are not all layers of each model in order; list whole models",
    ),
    "slices of the first layers": (
        {
            "slices": [{"sources": [{"model": "one", "layer_range": [0, 3]}, {"model": "two", "layer_range": [0, 3]}]}],
            "merge_method": "linear",
        },
        r"slices of layers 0 to 3 are not all 4 of one.*list whole models under `models:`",
    ),
    "a filter of nothing": (
        {
            "models": [entry("one", weight=[{"filter": "feed_forward", "value": 1}, {"value": 0.5}])],
            "merge_method": "task_arithmetic",
            "base_model": "base",
        },
        r"models\.0\.parameters\.weight: the filter 'feed_forward' is in no tensor's name; write a part of one",
    ),
    "a filter of a method's parameter": (
        {
            "models": [entry("one"), entry("two")],
            "merge_method": "ties",
            "base_model": "base",
            "parameters": {"density": [{"filter": "attention_output", "value": 0.5}]},
        },
        r"parameters\.density: the filter 'attention_output' is in no tensor's name",
    ),
    "filters that say nothing of some": (
        {
            "models": [entry("one", weight=[{"filter": "mlp", "value": 1}])],
            "merge_method": "task_arithmetic",
            "base_model": "base",
        },
        r"models\.0\.parameters\.weight: no filter matches model\..*; end the list with - value: … for all other names",
    ),
    "weights that sum to 0": (
        {"models": [entry("one", weight=1), entry("two", weight=-1)], "merge_method": "linear"},
        r"the weights of model\..* sum to 0, so none is a share of them",
    ),
    "weights that sum to 0 in a layer": (
        {
            "models": [entry("one", weight=1), entry("two", weight=[1, -1])],
            "merge_method": "task_arithmetic",
            "base_model": "base",
            "parameters": {"normalize": True},
        },
        r"the weights of model\.layers\.3\..* sum to 0",
    ),
    "an adapter of another base": (
        {"models": [entry("one+lora"), entry("two")], "merge_method": "task_arithmetic", "base_model": "base"},
        r"'one\+lora' joins a model and an adapter.* write the adapter alone, model: lora, with base_model: one",
    ),
    "an unknown key": (
        {"models": [entry("one")], "merge_method": "ties", "base_model": "base", "allow_crimes": True},
        r"unknown key 'allow_crimes'; known here:",
    ),
    "an unknown key of a model": (
        {"models": [entry("one", wieght=1)], "merge_method": "ties", "base_model": "base"},
        r"unknown key 'models\.0\.parameters\.wieght'; did you mean 'weight'\?",
    ),
}
if "slerp" in METHODS:
    for value in (1.5, -0.1, [0, 2], [{"filter": "mlp", "value": 7}, {"value": 0.5}]):
        pasted = {"models": [entry("one"), entry("two")], "merge_method": "slerp", "base_model": "one"}
        REFUSED[f"t: {value}"] = (pasted | {"parameters": {"t": value}}, r"t: .* is out of range; it must be")


@pytest.mark.parametrize(("recipe", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line(
    recipe: dict[str, Any],
    message: str,
    models: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(placed(recipe, models)))
    monkeypatch.setattr("sys.argv", ["modalloy", "merge", str(path), "-o", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as code:
        cli.main()
    assert code.value.code == 2
    said = capfd.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("error: ") and re.search(message, said[0].replace(f"{models}/", "")), (
        said
    )
    assert not (tmp_path / "out").exists()


def test_mergekit_ignores_a_filter_that_matches_nothing(models: Path, tmp_path: Path) -> None:
    """The habit that is refused here: a word that was spelled wrongly changes nothing there, without a word."""
    start = {"merge_method": "task_arithmetic", "base_model": "base", "dtype": "float32"}
    found = []
    for index, weight in enumerate(([{"filter": "mpl", "value": 1}, {"value": 0.5}], 0.5)):
        recipe = start | {"models": [entry("one", weight=weight)]}
        found.append(theirs(placed(recipe, models), tmp_path / str(index)))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    with pytest.raises(RecipeError, match="is in no tensor's name"):
        ours(
            placed(start | {"models": [entry("one", weight=[{"filter": "mpl", "value": 1}, {"value": 0.5}])]}, models),
            tmp_path,
        )

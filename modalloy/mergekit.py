"""What people paste from mergekit's recipes, and what to write here instead.

mergekit's keys are read where they mean the same. Where they mean something else, or nothing, the refusal says so: the
same words with another meaning would be a merge of another size.
"""

import os
from collections.abc import Mapping
from math import fsum
from pathlib import Path
from typing import Any

METHODS = {
    "slerp": "it goes between two models on a sphere: write linear with two models, or use mergekit",
    "nuslerp": "it goes between two models on a sphere: write linear with two models, or use mergekit",
    "multislerp": "it goes between models on a sphere: write average, or use mergekit",
    "della": "write dare_ties, which drops entries at random too, or use mergekit",
    "della_linear": "write dare_linear, which drops entries at random too, or use mergekit",
    "breadcrumbs": "write ties with a density, or use mergekit",
    "breadcrumbs_ties": "write ties with a density, or use mergekit",
    "passthrough": "modalloy keeps the base's layers as they are; stack layers with mergekit",
    "model_stock": "write average, or use mergekit",
    "arcee_fusion": "use mergekit",
    "karcher": "write average, or use mergekit",
    "sce": "write ties, or use mergekit",
    "nearswap": "use mergekit",
}
KEYS = {
    "slices": "slices of layers are not to be had: every layer is merged with its like; list whole models under `models:`, and "
    "give values over the depth as lists, for example scale: [0.2, 0.8]",
    "merge_slices": "one recipe makes one model; write one recipe for each",
    "tokenizer_source": "the result has the base's tokenizer; leave the key out (models whose vocabulary was resized are "
    "refused, or left out by `ignore:`)",
    "tokenizer": "the result has the base's tokenizer; leave the key out",
    "chat_template": "leave the key out: the base's template is copied, or that which all models share where it has none",
    "modules_by_name": "write `modules:` with patterns of tensor names",
}
PARAMETERS = {
    "normalize": "weights are factors and never normalised here, as with mergekit's normalize: false; for mergekit's mean over "
    "models leave every weight at 1 and write merge_method: average, or parameters: {scale: 1/n} as a number",
    "int8_mask": "it saves memory in mergekit; remove it",
    "lambda": "λ is called scale here: write parameters: {scale: …}",
    "t": "it is slerp's place between two models; linear has alpha",
    "rescale": "remove it: dare rescales as its paper says, ties does not",
    "epsilon": "it is della's; dare_ties has density",
    "gamma": "it is breadcrumbs'; ties has density",
    "select_topk": "it is sce's; ties has density",
}
SUMS = ("task_arithmetic", "dare_linear")  # whose result is a sum of weighted updates, in mergekit too
RESCALES = ("dare_linear", "dare_ties")
OF_A_MODEL = ("density", "gamma", "epsilon", "lambda", "rescale", "normalize", "t", "scale", "alpha", "rank")


def translated(content: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe whose keys of mergekit that mean the same here have this house's names; everything else is as it was.

    - `dtype: bfloat16`: the type that is written; the arithmetic is float32
    - `tokenizer_source: base`, `chat_template: auto`, `int8_mask`: what happens anyway
    - `lambda` is `scale`; `rescale: true` is DARE's own; `normalize: false` leaves weights factors, and `normalize: true` of a
      method that is a sum divides them by their sum
    - a parameter that every model has with one value is the recipe's; `MODEL+ADAPTER` on the base MODEL is the adapter
    """
    found = dict(content)
    if found.get("dtype") in ("bfloat16", "float16") and "out_dtype" not in found:
        found["out_dtype"] = found.pop("dtype")
    for key, same in (("tokenizer_source", "base"), ("tokenizer", {"source": "base"}), ("chat_template", "auto")):
        if key in found and found[key] == same:
            del found[key]
    models = found.get("models")
    if isinstance(models, list) and all(isinstance(entry, Mapping) for entry in models):
        found["models"] = [_entry(entry, found.get("base_model")) for entry in models]
    parameters = found.get("parameters")
    if isinstance(parameters, Mapping) or parameters is None:
        shared, found["models"] = _shared(found.get("models"))
        merged = shared | dict(parameters or {})
        found["parameters"] = _renamed(merged, found)
        if not found["parameters"] and parameters is None:
            del found["parameters"]
    if found["models"] is None:
        del found["models"]
    return found


def _entry(entry: Mapping[str, Any], base: Any) -> dict[str, Any]:
    """A model without what it says of the base."""
    found, model = dict(entry), entry.get("model")
    if isinstance(model, str) and isinstance(base, str) and base and model.startswith(f"{base}+"):
        found["model"] = model.removeprefix(f"{base}+")
    return found


def _shared(models: Any) -> tuple[dict[str, Any], Any]:
    """Parameters that every model with any has, and with one value; and the models without them."""
    if not isinstance(models, list) or not all(isinstance(entry, Mapping) for entry in models):
        return {}, models
    having = [entry["parameters"] for entry in models if isinstance(entry.get("parameters"), Mapping)]
    names = set.intersection(*(set(one) for one in having)) & set(OF_A_MODEL) if having else set()
    shared = {name: having[0][name] for name in sorted(names) if all(one[name] == having[0][name] for one in having)}
    rest = []
    for entry in models:
        own = entry.get("parameters")
        if isinstance(own, Mapping) and shared:
            kept = {name: value for name, value in own.items() if name not in shared}
            entry = {key: value for key, value in entry.items() if key != "parameters"} | (
                {"parameters": kept} if kept else {}
            )
        rest.append(entry)
    return shared, rest


def _renamed(parameters: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The recipe's parameters by this house's names; weights of `normalize: true` are divided in `found`."""
    method = found.get("merge_method")
    parameters.pop("int8_mask", None)
    if "lambda" in parameters and "scale" not in parameters:
        parameters["scale"] = parameters.pop("lambda")
    if parameters.get("rescale") is True and method in RESCALES:
        del parameters["rescale"]
    normalize = parameters.get("normalize")
    if normalize is False and method in SUMS:
        del parameters["normalize"]
    elif normalize is True and method in SUMS and isinstance(found.get("models"), list):
        weights = [_weight(entry) for entry in found["models"]]
        numbers = [float(one) for one in weights if isinstance(one, (int, float)) and not isinstance(one, bool)]
        total = fsum(numbers)
        if len(numbers) == len(weights) and total:
            del parameters["normalize"]
            found["models"] = [
                entry | {"parameters": dict(entry.get("parameters") or {}) | {"weight": number / total}}
                for entry, number in zip(found["models"], numbers, strict=True)
            ]
    return parameters


def _weight(entry: Mapping[str, Any]) -> Any:
    own = entry.get("parameters")
    return own.get("weight", 1.0) if isinstance(own, Mapping) else 1.0


def advice(content: Mapping[str, Any]) -> str | None:
    """One line on the first of mergekit's habits in a recipe that means something else here; None if there is none.

    `content` is the recipe as parsed from YAML, of any shape.
    """
    for key, remedy in KEYS.items():
        if key in content:
            return f"unknown key '{key}': {remedy}"
    method = content.get("merge_method")
    if isinstance(method, str) and method in METHODS:
        return f"there is no {method} here; {METHODS[method]}"
    if content.get("dtype") in ("bfloat16", "float16"):
        return (
            f"dtype: {content['dtype']}: dtype is the type of the arithmetic (float32 or float64); for the type of the written "
            f"weights write out_dtype: {content['dtype']}"
        )
    return _of_parameters(content.get("parameters"), PARAMETERS) or _of_models(content.get("models"))


def joined_adapter(model: str, folder: Path) -> str | None:
    """One line on a model that is written as mergekit writes a model and its adapter, MODEL+ADAPTER; None of any other."""
    if "+" not in model or os.path.exists(folder / model):
        return None
    base, _, adapter = model.partition("+")
    return (
        f"model: '{model}' joins a model and an adapter, as mergekit does; write the adapter alone, model: {adapter}, "
        f"with base_model: {base}"
    )


def _of_models(models: Any) -> str | None:
    for index, entry in enumerate(models if isinstance(models, list) else ()):
        if not isinstance(entry, Mapping):
            continue
        parameters = entry.get("parameters")
        if isinstance(parameters, Mapping):
            weight = parameters.get("weight")
            if isinstance(weight, list) and any(isinstance(one, Mapping) for one in weight):
                return (
                    f"models.{index}.parameters.weight: filters are not read; write one number (or a list over the depth), and "
                    "`modules:` with patterns of tensor names for what is merged otherwise"
                )
            for name in OF_A_MODEL:
                if name in parameters:
                    return (
                        f"models.{index}.parameters.{name}: models have only weight and fisher here; write {name} once, under the "
                        f"recipe's own parameters: {{{name}: …}}"
                    )
    return None


def _of_parameters(parameters: Any, known: Mapping[str, str]) -> str | None:
    for name, remedy in known.items():
        if isinstance(parameters, Mapping) and name in parameters:
            return f"parameters.{name}: {remedy}"
    return None

"""mergekit's recipes, read as mergekit 0.1.5 means them: its keys and defaults become this house's own.

A recipe that has one of mergekit's own keys is read with mergekit's defaults too. Where its words mean something that is not to
be had, one line says what to write: the same words with another meaning would be a merge of another size.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modalloy.errors import RecipeError, nearest, shown
from modalloy.methods import METHODS
from modalloy.settings import followed_by, is_case

HALF = ("bfloat16", "float16")
DTYPES = (*HALF, "float32")
KEYS = (
    "slices",
    "tokenizer_source",
    "chat_template",
)  # beside dtype: bfloat16 and the like, only mergekit's recipes have
PARAMETERS = ("normalize", "int8_mask", "lambda", "rescale", "weight")
GENERAL = {  # mergekit's general task arithmetic: whether it normalises by default
    "task_arithmetic": False,
    "ties": True,
    "dare_linear": False,
    "dare_ties": False,
    "breadcrumbs": False,
    "breadcrumbs_ties": False,
    "della": True,
    "della_linear": False,
}
DEFAULTS = {
    "density": 1.0,
    "gamma": 0.01,
    "epsilon": 0.15,
    "trim_density": 1.0,
}  # of these, where the method here has them
SUMS = ("task_arithmetic", "dare_linear", "breadcrumbs", "della_linear")  # sums of what is left of weighted updates
WITHOUT_BASE = ("karcher", "nuslerp", "multislerp")  # merge the weights themselves where no base is named
OWN = ("weight", "fisher")  # what a model's parameters are that no method has
STACKS = "list whole models under `models:`, every layer is merged with its like"


def translated(content: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe in this house's words; one that has none of mergekit's is as it was, and so is what no rule below reads.

    - `slices` of all layers, and `modules` that name mergekit's parts, are `models`
    - `dtype: bfloat16`: the type that is written; the arithmetic is float32
    - `tokenizer_source`, `tokenizer: {source: …}` are `vocabulary: union` or `tokenizer: MODEL`
    - `linear` is the weighted mean of the models, from the first of them on where no base is named
    - `lambda` is `scale`, `normalize` is `weights: shares`, or `combine` of methods that elect signs
    - a parameter that every model has with one value is the recipe's; `MODEL+ADAPTER` on the base MODEL is the adapter, with
      zero for what it does not update

    Raises:
        RecipeError: a key of mergekit's asks for what is not to be had, with what to write instead.
    """
    found = dict(content)
    theirs = _is_mergekits(found)
    _read_modules(found)
    _read_slices(found)
    if found.get("dtype") in DTYPES and theirs:
        written = found.pop("dtype")
        found.setdefault("out_dtype", written)
    _read_tokenizer(found)
    _read_template(found)
    if theirs:
        found.setdefault("outside_layers", "first")
    models = found.get("models")
    if not (isinstance(models, list) and all(isinstance(entry, Mapping) for entry in models)):
        return found
    found["models"] = [_entry(entry, found.get("base_model")) for entry in models]
    if any(one.get("model") != entry.get("model") for one, entry in zip(found["models"], models, strict=True)):
        found.setdefault(
            "missing", "zero"
        )  # a base with an adapter is a whole model there, the base's where that is silent
    parameters = found.get("parameters")
    if isinstance(parameters, Mapping) or parameters is None:
        found["parameters"] = _listed(dict(parameters or {}))
        _share_out(found)
        _read_linear(found, theirs)
        _read_parameters(found, theirs)
        if not found["parameters"] and not parameters:
            del found["parameters"]
    return found


def _is_mergekits(content: Mapping[str, Any]) -> bool:
    """Whether a recipe has a key that only mergekit's have."""
    parameters = content.get("parameters")
    of_theirs = isinstance(parameters, Mapping) and any(
        name in PARAMETERS and not isinstance(value, str)  # methods of our own have a word for `rescale`
        for name, value in parameters.items()
    )
    parts = isinstance(content.get("tokenizer"), Mapping) or bool(_parts(content))
    models = content.get("models")
    entries = [one for one in models if isinstance(one, Mapping)] if isinstance(models, list) else []
    given = [one["parameters"] for one in entries if isinstance(one.get("parameters"), Mapping)]
    parts = parts or any(not own.keys() <= set(OWN) for own in given)  # a model's own density
    return of_theirs or parts or content.get("dtype") in HALF or any(key in content for key in KEYS)


def _parts(content: Mapping[str, Any]) -> list[Any]:
    """What `modules` holds where it names parts of a model, as mergekit's does, and not patterns of tensor names."""
    modules = content.get("modules")
    parts = list(modules.values()) if isinstance(modules, Mapping) else []
    is_theirs = any(isinstance(part, Mapping) and not part.keys().isdisjoint(("models", "slices")) for part in parts)
    return parts if is_theirs else []


def _listed(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of which one that a single filter chooses is a list of one."""
    return {name: [value] if is_case(value) else value for name, value in parameters.items()}


def _entry(entry: Mapping[str, Any], base: Any) -> dict[str, Any]:
    """A model without what it says of the base."""
    found, model = dict(entry), entry.get("model")
    if isinstance(model, Mapping) and isinstance(model.get("model"), str):  # {model: M, lora: A}
        lora = model.get("lora")
        model = found["model"] = f"{model['model']}+{lora}" if isinstance(lora, str) else model["model"]
    if isinstance(model, str) and isinstance(base, str) and base and model.startswith(f"{base}+"):
        found["model"] = model.removeprefix(f"{base}+")
    if isinstance(found.get("parameters"), Mapping):
        found["parameters"] = _listed(found["parameters"])
    elif "parameters" in found and found["parameters"] is None:
        del found["parameters"]
    return found


def _read_modules(found: dict[str, Any]) -> None:
    """mergekit's parts of a model, which hold models or slices: one, or several that say the same."""
    parts = _parts(found)
    if not parts:
        return
    if any(part != parts[0] for part in parts):
        raise RecipeError(
            "modules: these parts of a model are merged from different models or by different parameters; write models: once, and "
            "modules: with patterns of tensor names for what is merged otherwise, such as '*vision_tower*': {policy: keep}"
        )
    if "models" in found or "slices" in found:
        raise RecipeError("modules: the models are listed twice; write them under `models:`, once")
    del found["modules"]
    _lift(found, parts[0])


def _lift(found: dict[str, Any], part: Mapping[str, Any]) -> None:
    """Put a part's keys beside the recipe's; its parameters come before the recipe's."""
    own, outer = part.get("parameters"), found.get("parameters")
    found.update({key: value for key, value in part.items() if key != "parameters"})
    if isinstance(own, Mapping):
        outer = outer if isinstance(outer, Mapping) else {}
        before = _listed(own)
        found["parameters"] = {**outer, **{name: followed_by(one, outer.get(name)) for name, one in before.items()}}


def _read_slices(found: dict[str, Any]) -> None:
    """`slices` that hold all layers of each model in order, which are its `models`."""
    if "slices" not in found:
        return
    slices = found.pop("slices")
    if found.get("models"):
        raise RecipeError("slices: the models are listed under `models:` too; write one of the two")
    if not isinstance(slices, list) or not slices or not all(isinstance(one, Mapping) for one in slices):
        raise RecipeError(f"slices: {shown(slices)} is no list of layers; {STACKS}")
    if len(slices) > 1:
        raise RecipeError(
            f"slices: {len(slices)} stretches of layers make another stack of layers, which is not to be had; {STACKS}, with "
            "values over the depth as lists, for example scale: [0.2, 0.8]; stack layers with mergekit"
        )
    sources = slices[0].get("sources")
    if not isinstance(sources, list) or not sources or not all(isinstance(one, Mapping) for one in sources):
        raise RecipeError(f"slices.0.sources: {shown(sources)} is no list of models; {STACKS}")
    ranges = [one.get("layer_range") for one in sources]
    first = ranges[0]
    is_range = isinstance(first, list) and len(first) == 2 and all(type(one) is int for one in first)
    if not is_range or first[0] != 0 or first[1] < 1 or any(one != first for one in ranges):
        raise RecipeError(
            f"slices: layers {' and '.join(shown(one) for one in ranges)} are not all layers of each model in order; {STACKS}, "
            "with `modules:` and policy: keep for layers to leave as they are"
        )
    found["layers"] = first[1]
    rest = {key: value for key, value in slices[0].items() if key != "sources"}
    _lift(found, rest)
    found["models"] = [{key: value for key, value in one.items() if key != "layer_range"} for one in sources]


def _read_tokenizer(found: dict[str, Any]) -> None:
    """Whose tokens the result has."""
    source = found.get("tokenizer_source")
    if "tokenizer_source" in found and found.get("tokenizer") is not None:
        raise RecipeError("tokenizer_source and tokenizer are two answers to one question; write one of them")
    tokenizer = found.get("tokenizer")
    if isinstance(tokenizer, Mapping):
        if tokenizer.get("tokens"):
            tokens = tokenizer["tokens"]
            token = shown(next(iter(tokens)) if isinstance(tokens, Mapping) else tokens)
            raise RecipeError(
                f"tokenizer.tokens: the row of {token} cannot be set here; a new token has the mean of the rows of those models "
                "that have it: remove tokens"
            )
        if tokenizer.get("pad_to_multiple_of") is not None:
            raise RecipeError("tokenizer.pad_to_multiple_of: rows are added for tokens only; remove it")
        if odd := tokenizer.keys() - {"source", "tokens", "pad_to_multiple_of"}:
            raise RecipeError(f"unknown key 'tokenizer.{min(odd)}'; known here: source")
        source = tokenizer.get("source", "union")
        del found["tokenizer"]
    found.pop("tokenizer_source", None)
    if source == "union":
        found["vocabulary"] = "union"
    elif isinstance(source, str) and source not in ("base", found.get("base_model")):
        found["tokenizer"] = source
    elif source is not None and not isinstance(source, str):
        raise RecipeError(f"tokenizer: {shown(source)} is no model; write union, base or the name of a model")


def _read_template(found: dict[str, Any]) -> None:
    """The chat template: what is copied anyway, or the text itself."""
    template = found.pop("chat_template", None)
    if template is None or template == "auto":
        return
    if not isinstance(template, str) or "{" not in template:
        raise RecipeError(
            f"chat_template: {shown(template)} is a template of mergekit's own; write the template itself, or output: "
            "{chat_template: …} with base or the name of the model whose template it is"
        )
    output = found.get("output")
    found["output"] = {**(output if isinstance(output, Mapping) else {}), "chat_template": template}


def _share_out(found: dict[str, Any]) -> None:
    """Give models what the recipe says of every model's weight, and the recipe what all models say alike."""
    weight = found["parameters"].pop("weight", None)
    entries = found["models"]
    others = [entry for entry in entries if entry.get("model") != found.get("base_model")]
    if weight is not None:
        for entry in entries:
            own = entry.get("parameters")
            if isinstance(own, Mapping) or own is None:
                entry["parameters"] = {**(own or {}), "weight": followed_by((own or {}).get("weight"), weight)}
    having = [entry["parameters"] for entry in others if isinstance(entry.get("parameters"), Mapping)]
    if not having or len(having) < len(others):
        return
    method = found.get("merge_method", "ssam")
    known = {*METHODS[method].parameters, *PARAMETERS} if isinstance(method, str) and method in METHODS else set()
    for name in [name for name in having[0] if name in known and name not in OWN]:
        if all(name in one and one[name] == having[0][name] for one in having):
            found["parameters"][name] = followed_by(having[0][name], found["parameters"].get(name))
            for entry in entries:
                if isinstance(entry.get("parameters"), Mapping):
                    entry["parameters"].pop(name, None)
                    if not entry["parameters"]:
                        del entry["parameters"]


def _read_linear(found: dict[str, Any], theirs: bool) -> None:
    """`linear` as mergekit has it: the weighted mean of the models, among which the base is if it is listed; and the base of
    methods that need none."""
    base, method = found.get("base_model"), found.get("merge_method")
    if method in WITHOUT_BASE and method in METHODS and not base and not found.get("target") and found["models"]:
        found["base_model"] = found["models"][0].get("model")  # whose config and tokenizer the result has
        if "origin" in METHODS[method].parameters:
            found["parameters"].setdefault("origin", "zero")
    if method == "karcher" and base and theirs and base not in [one.get("model") for one in found["models"]]:
        found["models"] = [*found["models"], {"model": base}]  # one of the points there, listed or not
    if method != "linear" or "alpha" in found["parameters"] or found.get("target") or (base and not theirs):
        return
    names = [entry.get("model") for entry in found["models"]]
    if not base:
        base = found["base_model"] = names[0] if names else None
    elif base not in names:
        raise RecipeError(
            f"linear is the weighted mean of the models, and {shown(base)} is none of them; list it under `models:` with its "
            "weight, or leave base_model out"
        )
    found["merge_method"] = "average"
    parameters = found["parameters"]
    parameters["scale"] = 1.0
    if parameters.pop("normalize", True) is not False:
        found["weights"] = "shares"
        return
    given = [entry.get("parameters") for entry in found["models"]]
    weights = [own.get("weight", 1.0) if isinstance(own, Mapping) else 1.0 for own in given]
    if not all(isinstance(one, (int, float)) for one in weights) or abs(sum(weights) - 1) > 1e-6:
        raise RecipeError(
            f"normalize: false: weights of {' + '.join(map(shown, weights))} give no mean of the models; let them sum to 1, "
            "or normalize: true"
        )


def _read_parameters(found: dict[str, Any], theirs: bool) -> None:
    """The method's parameters by this house's names, with mergekit's defaults where the recipe is one of mergekit's."""
    method, parameters = found.get("merge_method", "ssam"), found["parameters"]
    if not isinstance(method, str) or method not in METHODS:
        return
    known = METHODS[method].parameters
    parameters.pop("int8_mask", None)
    if "lambda" in parameters and "scale" in known:
        if "scale" in parameters:
            raise RecipeError("parameters.lambda: λ is called scale here, and is written too; write one of them")
        parameters["scale"] = parameters.pop("lambda")
    if not theirs or method not in GENERAL:
        return
    if found.get("base_model"):  # which is no specialist, and whose weight is counted by linear only
        found["models"] = [one for one in found["models"] if one.get("model") != found["base_model"]] or found["models"]
    own = {name for entry in found["models"] for name in entry.get("parameters") or {}}
    for name, value in DEFAULTS.items():
        if name in known and name not in parameters and name not in own:
            parameters[name] = value
        elif name in known and (name in parameters or name in own):
            parameters[name] = followed_by(parameters.get(name), value)
    _read_rescale(method, parameters, known, own)
    normalize = parameters.get("normalize", GENERAL[method])
    if "normalize" in known or not isinstance(normalize, bool):
        return
    if "combine" in known and "combine" not in parameters:
        parameters.pop("normalize", None)
        parameters["combine"] = "weighted_mean" if normalize else "sum"
    elif method in SUMS:
        parameters.pop("normalize", None)
        if normalize:
            found["weights"] = "shares"


def _read_rescale(method: str, parameters: dict[str, Any], known: Mapping[str, Any], own: set[str]) -> None:
    """`rescale` of methods that rescale as their paper says: true is that, and false divides nothing."""
    rescale = parameters.get("rescale")
    if "rescale" in known and isinstance(rescale, bool):
        parameters["rescale"] = "norm" if rescale else "none"
    if "rescale" in known or rescale is None:
        return
    if rescale is True and method in ("ties", "task_arithmetic"):
        raise RecipeError(f"parameters.rescale: {method} does not rescale; remove it")
    if rescale is False and method in ("dare_linear", "dare_ties"):
        scale, density = parameters.get("scale", 1.0), parameters["density"]
        if not isinstance(scale, (int, float)) or not isinstance(density, (int, float)) or "density" in own:
            raise RecipeError(
                "parameters.rescale: DARE divides by the density; write rescale: true, or density as one number"
            )
        parameters["scale"] = scale * density
    del parameters["rescale"]


def advice(content: Mapping[str, Any]) -> str | None:
    """One line on the first of mergekit's habits in a recipe that has no meaning here; None if there is none.

    `content` is the recipe as parsed from YAML, of any shape.
    """
    if "merge_slices" in content:
        return "unknown key 'merge_slices': one recipe makes one model; write one recipe for each"
    method = content.get("merge_method")
    if method == "passthrough":
        return f"there is no passthrough here, which stacks layers; {STACKS}; stack layers with mergekit"
    if isinstance(method, str) and method not in METHODS:
        name = shown(method)
        return f"there is no {name[1:-1]} here: unknown merge method {name}; {nearest(method, METHODS)}"
    if content.get("dtype") in HALF:
        return (
            f"dtype: {content['dtype']}: dtype is the type of the arithmetic; write out_dtype: {content['dtype']} for what is "
            "written"
        )
    parameters = content.get("parameters")
    for name, remedy in REMEDIES.items():
        if isinstance(parameters, Mapping) and name in parameters:
            return f"parameters.{name}: {remedy}"
    return None


REMEDIES = {
    "normalize": "weights are factors and never normalised here, as with mergekit's normalize: false; for mergekit's mean over "
    "models write weights: shares with average",
    "lambda": "λ is called scale here: write parameters: {scale: …}",
    "rescale": "remove it: dare rescales as its paper says, ties does not",
}


def joined_adapter(model: str, folder: Path) -> str | None:
    """One line on a model that is written as mergekit writes a model and its adapter, MODEL+ADAPTER; None of any other."""
    if "+" not in model or os.path.exists(folder / model):
        return None
    base, _, adapter = model.partition("+")
    return (
        f"model: '{model}' joins a model and an adapter, as mergekit does; write the adapter alone, model: {adapter}, "
        f"with base_model: {base}"
    )

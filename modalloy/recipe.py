"""Recipes: what to merge, how, and what to write. YAML with the names the ecosystem knows; unknown keys are refused."""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from modalloy import mergekit
from modalloy.errors import CheckpointError, RecipeError, cut, shown
from modalloy.forms import AUTO, FORMS, Form, known_form
from modalloy.methods import METHODS
from modalloy.methods.apply import check_method
from modalloy.methods.parameters import is_per_model, schema
from modalloy.names import modality_name
from modalloy.senses.encoders import modalities
from modalloy.settings import followed_by, numbers
from modalloy.storage.folder import read_bytes
from modalloy.yaml_text import MAX_BYTES, parse_yaml

MAX_PATTERNS = 1_000  # of tensor names, each of which is tried on every name
SIZE = re.compile(r"(?=[.]?[0-9])[0-9]{0,15}[.]?[0-9]{0,15}")
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(value: Any) -> int:
    """A size as recipes write it ("5GB", "300MB", "2GiB" or a number of bytes) in bytes."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**63:
        return value
    text = value.strip().upper() if isinstance(value, str) else ""
    for unit in sorted(UNITS, key=len, reverse=True):
        number = text.removesuffix(unit).strip()
        if text.endswith(unit) and SIZE.fullmatch(number) and float(number) > 0:
            return int(float(number) * UNITS[unit])
    raise ValueError(f"{shown(value)} is not a size; write for example 5GB or 500MB")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SpecialistParameters(_Strict):
    """Per-specialist parameters: the factor of its text update, applied first of all (a list goes over the depth of the
    model, entries {filter, value} are for the names that hold the filter), its Fisher file, for methods that weigh by it, and
    parameters of the method that may differ between specialists (`density`)."""

    model_config = ConfigDict(extra="allow", frozen=True)

    weight: Annotated[float | tuple[float, ...] | tuple[dict[str, Any], ...], BeforeValidator(numbers)] = 1.0
    fisher: str | None = None

    @property
    def of_method(self) -> dict[str, Any]:
        """The method's parameters that this specialist has of its own."""
        return dict(self.model_extra or {})


class OwnRank(_Strict):
    """The rank that a fine-tuned model's update is cut to for its own media's tokens."""

    rank: Annotated[int, Field(strict=True, ge=1)]


class SpecialistEntry(_Strict):
    """One specialist: where it is, what it senses, and where its encoder is (for `form: omni`; see `encoders.choose`).

    `own` is what the tokens of its media use in place of the merged text path: `same`, its own LoRA as it is; or {rank: r},
    what its full fine-tune changed, cut to that rank. `frame` is the text around a medium, with {} for its sign, where its
    chat template does not say.
    """

    model: str
    modality: str | None = None
    encoder: str | dict[str, Any] | None = None
    own: Literal["same"] | OwnRank | None = None
    frame: str | None = None
    parameters: SpecialistParameters = SpecialistParameters()

    def encoder_at(self, place: str) -> dict[str, Any]:
        """`encoder` with its location replaced, and its options kept."""
        return (self.encoder if isinstance(self.encoder, dict) else {}) | {"path": place}

    @field_validator("modality")
    @classmethod
    def _known_modality(cls, value: str | None) -> str | None:
        if value is not None and modality_name(value) not in modalities():
            raise ValueError(f"unknown modality '{value}'; known: {', '.join(modalities())}")
        return None if value is None else modality_name(value)


class WeightRule(_Strict):
    """What `modules:` says of the weights that match its pattern: a policy, or another method or parameters.

    Across architectures, `take_source` takes the donor's counterpart as it is, and `error` refuses a target that has such a weight.
    """

    policy: Literal["keep", "average", "take_source", "error"] | None = None
    merge_method: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_thing(self) -> "WeightRule":
        if self.policy is not None and (self.merge_method is not None or self.parameters):
            raise ValueError(f"policy '{self.policy}' takes no merge_method or parameters; write one or the other")
        if self.policy is None and self.merge_method is None and not self.parameters:
            raise ValueError("says nothing; write policy: keep, policy: average, merge_method: or parameters:")
        return self


class Output(_Strict):
    """What to write: a PEFT adapter, a full model, or an omni folder that chats; by itself (`auto`) an adapter of adapters, and
    a full model where any of the models is one.

    `compress_rank` makes an adapter out of the full matrices that some methods give, by their best approximation of that
    rank; what it loses is measured and reported. `requantize` writes what the base stores as FP8 codes and scales so again,
    and what that loses is reported; else it is bfloat16. `chat_template` is the one that the specialists share, or with `base`
    the base's whatever they have, or else that of the specialist with this label. `same_modality` says what becomes of two
    specialists of one modality in an omni model: their tokens of a medium may stand side by side (VisionFuse,
    arXiv 2412.01289).
    """

    form: Annotated[str, AfterValidator(known_form)] = AUTO
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_shard_size: Annotated[int, BeforeValidator(parse_bytes)] = 5 * 10**9
    compress_rank: Annotated[int, Field(strict=True, ge=1)] | None = None
    requantize: Annotated[bool, Field(strict=True)] = False
    chat_template: str = "auto"
    same_modality: Literal["refuse", "side_by_side"] = "refuse"


class Recipe(_Strict):
    """A whole merge. `folder` is where its relative paths start, `text` the file as it was written.

    `modules` and `ignore` hold patterns of tensor names (`*`, `?`, `[…]`); of several that match, the first counts.
    `towers` is what becomes of everything beside the decoder of a multimodal base, where no rule speaks of it.
    `missing` is what a specialist without a weight that others update contributes. `dtype` is the arithmetic's,
    `out_dtype` another spelling of `output.dtype`. `target` is the model whose architecture is kept, and `models` are then
    donors of other architectures, which `linear` needs no base for; `vocabulary` says whether their tokens are the
    target's: `auto` merges rows of embeddings where the tokenizers are the same, `by_token` those of equal token strings.
    Without a target, `vocabulary: union` gives the result every model's tokens, and `tokenizer` that model's; a row is the
    base's where it has the token, else the mean of those that have it.
    `weights` are factors as they are, or `shares`, each divided by the sum of all that are listed. `outside_layers` is what a
    list over the depth gives for tensors in no layer, `layers` how many the models must have.
    """

    base_model: str = ""
    target: str | None = None
    vocabulary: Literal["auto", "same", "keep", "by_token", "union"] = "auto"
    tokenizer: str | None = None
    merge_method: str = "ssam"
    parameters: dict[str, Any] = Field(default_factory=dict)
    models: tuple[SpecialistEntry, ...] = Field(min_length=1)
    modules: dict[str, WeightRule] = Field(default_factory=dict, max_length=MAX_PATTERNS)
    ignore: tuple[str, ...] = Field(default=(), max_length=MAX_PATTERNS)
    weights: Literal["factors", "shares"] = "factors"
    outside_layers: Literal["refuse", "first"] = "refuse"
    layers: Annotated[int, Field(strict=True, ge=1)] | None = None
    missing: Literal["refuse", "zero"] = "refuse"
    towers: Literal["merge", "keep"] = "merge"
    dtype: Literal["float32", "float64"] = "float32"
    out_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    output: Output = Output()
    folder: Path = Field(default=Path(), exclude=True)
    text: str = Field(default="", exclude=True)

    @model_validator(mode="after")
    def _known_method(self) -> "Recipe":
        check_method(self.merge_method, self.parameters, gradients=True)
        for pattern, rule in self.modules.items():
            try:
                check_method(rule.merge_method or self.merge_method, rule.parameters, gradients=True)
            except RecipeError as error:
                raise RecipeError(f"modules.{pattern}: {error}") from error
        self._check_of_models()
        if self.out_dtype is not None and self.output.dtype not in ("auto", self.out_dtype):
            raise ValueError(
                f"out_dtype {self.out_dtype} contradicts output.dtype {self.output.dtype}; write one of them"
            )
        if self.target is None:
            if not self.base_model:
                raise ValueError("the key 'base_model' is missing; add it")
            if self.vocabulary not in ("auto", "union"):
                raise ValueError(f"vocabulary: {self.vocabulary} is of merges with a target: add it, or remove the key")
            for rule in self.modules.values():
                if rule.policy in ("take_source", "error"):
                    raise ValueError(
                        f"policy {rule.policy} is of merges with a target: add it, or write keep or average"
                    )
        else:
            self._check_target()
        if self.form.is_whole and self.output.compress_rank is not None:
            raise ValueError(
                f"output.compress_rank is of adapters, but form: {self.form.name} holds full matrices; remove it"
            )
        if self.output.requantize and (self.is_across or self.written_dtype != "auto"):
            other = "a target" if self.is_across else f"dtype {self.written_dtype}"
            raise ValueError(
                f"output.requantize writes the base's own FP8 scheme, and {other} another; remove one of them"
            )
        return self

    def _check_of_models(self) -> None:
        """What models have of their own must be what the method takes for each."""
        known = schema(METHODS[self.merge_method].function)
        for index, entry in enumerate(self.models):
            for name, value in entry.parameters.of_method.items():
                place = f"models.{index}.parameters"
                if name not in known:
                    raise RecipeError(_unknown_key(("models", index, "parameters"), name))
                if not is_per_model(known[name][0]):
                    raise RecipeError(
                        f"{place}.{name}: {self.merge_method} takes one {name} for all models; write {name} once, under the "
                        f"recipe's own parameters: {{{name}: …}}"
                    )
                if self.target is not None:
                    raise RecipeError(f"{place}.{name}: a merge with a target takes one for all models; write it once")
                try:
                    check_method(self.merge_method, {name: value}, gradients=True)
                except RecipeError as error:
                    raise RecipeError(f"{place}.{error}") from error
        if self.vocabulary == "union" and self.tokenizer is not None:
            raise ValueError("vocabulary: union and tokenizer: are two answers to one question; write one of them")
        if self.tokenizer is not None and self.tokenizer not in (self.base_model, *(one.model for one in self.models)):
            raise ValueError(
                f"tokenizer: {shown(self.tokenizer)} is none of the models; write base_model's name, or one of models:"
            )

    def _check_target(self) -> None:
        """What a merge across architectures cannot have."""
        if self.vocabulary == "union" or self.tokenizer is not None:
            raise ValueError("a target keeps its own vocabulary: write vocabulary: by_token, or remove target")
        methods = {self.merge_method, *(rule.merge_method for rule in self.modules.values() if rule.merge_method)}
        for method in sorted(methods):
            if self.base_model and method == "linear":
                raise ValueError("linear interpolates between target and donors, without a base: remove base_model")
            if not self.base_model and method != "linear":
                raise ValueError(
                    f"{method} merges updates of a base, but there is none: add base_model, or write linear"
                )
            if METHODS[method].needs_factors:
                raise ValueError(f"{method} merges LoRA factors, but a target is a whole model; choose another method")
            if METHODS[method].models[1] == 1:
                raise ValueError(
                    f"{method} goes between the base and one model, but a target and its donors are at least two; write linear "
                    "without a base, or choose another method"
                )
            if METHODS[method].takes("fishers"):
                raise ValueError(f"{method} needs Fisher files in the target's names; choose another method")
        if not self.base_model and any(rule.policy == "average" for rule in self.modules.values()):
            raise ValueError("a merge without a base has no policy average; write keep, or parameters: {alpha: 0.5}")
        if not self.form.is_whole:
            raise ValueError(f"a target is a whole model, but output.form is {self.output.form}; write form: full")
        if any(entry.modality or entry.encoder for entry in self.models):
            raise ValueError("donors have no modality or encoder, the target keeps its own; remove these keys")
        if any(entry.parameters.fisher for entry in self.models):
            raise ValueError("no method weighs donors of other architectures by Fisher files; remove parameters.fisher")

    @property
    def written(self) -> dict[str, Any]:
        """The method's parameters; those that models have of their own as a tuple, one for each model (None: the method's)."""
        names = dict.fromkeys(name for entry in self.models for name in entry.parameters.of_method)
        own = (
            tuple(followed_by(e.parameters.of_method.get(name), self.parameters.get(name)) for e in self.models)
            for name in names
        )
        return self.parameters | dict(zip(names, own, strict=True))

    @property
    def has_own_vocabulary(self) -> bool:
        """Whether the result has other tokens than its base."""
        return self.vocabulary == "union" or self.tokenizer not in (None, self.base_model)

    @property
    def tokenizer_index(self) -> int | None:
        """Which of the models has the tokenizer of the result; None for the base's, or all models'."""
        return next((index for index, entry in enumerate(self.models) if entry.model == self.tokenizer), None)

    @property
    def start(self) -> str:
        """The model that updates are added to: the base, or the target."""
        return self.target or self.base_model

    @property
    def starts(self) -> dict[str, str]:
        """Where the target is, and θ_0 if that is another model, by what messages call them; one model alone is the base."""
        if self.target is None:
            return {"base": self.base_model}
        return {"target": self.target, **({"base": self.base_model} if self.base_model else {})}

    @property
    def is_across(self) -> bool:
        """Whether models of other architectures are merged into a target."""
        return self.target is not None

    @property
    def form(self) -> Form:
        """The form of the result; while it is "auto", what it is without any full model among the specialists."""
        if self.output.form == AUTO:
            return FORMS["full" if self.is_across else "adapter"]
        return FORMS[self.output.form]

    def resolved(self, *, has_whole: bool) -> "Recipe":
        """The recipe with its form, for models of which some are whole or none is."""
        if self.output.form != AUTO:
            return self
        is_full = self.is_across or (has_whole and self.output.compress_rank is None)
        return self.model_copy(
            update={"output": self.output.model_copy(update={"form": "full" if is_full else "adapter"})}
        )

    @property
    def written_dtype(self) -> str:
        """Type of the written weights: "auto" (as stored), or a name."""
        return self.out_dtype or self.output.dtype

    def to_yaml(self) -> str:
        """The recipe as YAML: the file as it was written, or these values if they were changed since."""
        if self.text:
            own = self.model_copy(update={"text": "", "folder": Path()})
            written = Recipe(**mergekit.translated(parse_yaml(self.text)))
            resolved = written.model_copy(
                update={"output": written.output.model_copy(update={"form": own.output.form})}
            )
            if own == written or (written.output.form == AUTO and own == resolved):
                return self.text
        return yaml.safe_dump(self.model_dump(mode="json", exclude_defaults=True), sort_keys=False)


def load_recipe(path: str | Path) -> Recipe:
    """The recipe in a YAML file, which is bounded (see `parse_yaml`).

    Raises:
        RecipeError: the file is missing or not YAML, or a key, method or value in it is wrong.
    """
    path = Path(path)
    try:
        text = read_bytes(path, MAX_BYTES).decode()
    except CheckpointError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise RecipeError(f"{path}: no such recipe; check the path") from None
        raise RecipeError(str(error)) from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: cannot be read ({error}); give a YAML file") from error
    try:
        content = parse_yaml(text)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: not a recipe; it needs at least base_model: and models:")
    for key in ("folder", "text"):
        if key in content:
            raise RecipeError(f"{path}: {_unknown_key((), key)}")
    try:
        content = mergekit.translated(content)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None
    try:
        recipe = Recipe(**content, folder=path.parent, text=text)
    except ValidationError as error:
        raise RecipeError(f"{path}: {mergekit.advice(content) or _explain(error)}") from None
    except RecipeError as error:
        raise RecipeError(f"{path}: {mergekit.advice(content) or error}") from None
    for entry in recipe.models:
        if joined := mergekit.joined_adapter(entry.model, recipe.folder):
            raise RecipeError(f"{path}: {joined}")
    return recipe


def _explain(error: ValidationError) -> str:
    """The first problem of a validation, as one line."""
    problem = error.errors()[0]
    place = _dotted(problem["loc"])
    if problem["type"] == "extra_forbidden":
        return _unknown_key(problem["loc"][:-1], str(problem["loc"][-1]))
    if problem["type"] == "missing":
        return f"the key '{place}' is missing; add it"
    message = problem["msg"].removeprefix("Value error, ")
    given = "" if problem["type"] == "value_error" else f" (found {shown(problem['input'])})"
    return f"{place}: {message}{given}" if place else message


def _unknown_key(parents: tuple[Any, ...], key: str) -> str:
    sections: dict[Any, type[BaseModel]] = {
        "models": SpecialistEntry,
        "modules": WeightRule,
        "output": Output,
        "parameters": SpecialistParameters,
    }
    model: type[BaseModel] = Recipe
    for part in parents:
        model = sections.get(part, model)
    known = sorted(name for name, info in model.model_fields.items() if not info.exclude)
    close = difflib.get_close_matches(key[:100], known, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    place = _dotted((*parents, key))
    return f"unknown key '{place}'; {hint}known here: {', '.join(known)}"


def _dotted(parts: tuple[Any, ...]) -> str:
    """Where in the recipe something is; long keys are cut."""
    return ".".join(cut(str(part)) for part in parts)

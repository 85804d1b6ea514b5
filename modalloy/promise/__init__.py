"""What every tensor of a result must be, said from the recipe, the configs and the raw tensors alone.

`verify` holds a result to this. It shares the arithmetic of `modalloy.methods` with the merge, and nothing of how the merge
was planned: a mistake there is not made here a second time.

- a linear weight: the base's plus the method's merge of all updates of it
- a norm, a bias, a scalar: the base's plus λ/λ_auto times the mean of w_i δ_i over the models that have one
- what belongs to tokens, positions or experts (embeddings, heads, position tables, routers): the base's
- whatever no model changes, or λ = 0 leaves: the base's, bit for bit
- whatever a rule keeps: the base's; what a rule averages: the mean
- what belongs to a modality alone (`omni`): its specialist's, bit for bit
"""

import fnmatch
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from modalloy.errors import CheckpointError
from modalloy.families.union import common_vocabulary
from modalloy.methods import METHODS
from modalloy.methods.apply import resolve
from modalloy.names import disk_name
from modalloy.promise.promise import Promise, Update
from modalloy.promise.words import CHOOSERS, OF_POSITIONS, OF_TOKENS, TABLES, is_numbered, numbers
from modalloy.recipe import Recipe, WeightRule
from modalloy.recompute import parts_of
from modalloy.senses.stored import parts_of_experts
from modalloy.specialists.spelling import canonical, module_names
from modalloy.specialists.stacked import nested_stems
from modalloy.storage.folder import read_json
from modalloy.storage.locate import open_base
from modalloy.storage.tensors import ComposedRef, TensorRef, checked
from modalloy.storage.views import transposed
from modalloy.updates import Model

What = Literal["matrix", "vector", "rows", "numbers", "other"]
EXPERTS = re.compile(r"(?:^|\.)experts\.")
IN_A_LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks?|h)\.(?P<index>\d+)\.")


class Promises:
    """What the result of a recipe must hold. `folders` are those of base and models, in the recipe's order."""

    def __init__(self, recipe: Recipe, base_folder: Path, folders: Sequence[Path], labels: Sequence[str]) -> None:
        self.recipe, self.base = recipe, open_base(base_folder)
        self.config = read_json(base_folder / "config.json")
        self.modules = module_names(self.base, self.config) if recipe.form.names_modules else {}
        self.every = [
            Model(label, folder, recipe, index, self.base)
            for index, (label, folder) in enumerate(zip(labels, folders, strict=True))
        ]
        counted: dict[str, int] = {}
        for model in self.every if recipe.form.carries_senses else ():
            counted[model.sense] = counted.get(model.sense, 0) + 1
            if counted[model.sense] > 1:
                model.renumber(counted[model.sense])
        if recipe.has_own_vocabulary:
            rows = [name for name, ref in self.base.refs.items() if self._what(ref) == "rows"]
            of_models = [(model.label, model.checkpoint.folder, model.tuned) for model in self.every]
            _, self.base = common_vocabulary(self.base, self.config, rows, of_models, recipe.tokenizer_index)
        layers = [int(found["index"]) for found in map(IN_A_LAYER.search, self.base.refs) if found]
        self.depth = 1 + max(layers, default=-1)

    def read(self, ref: TensorRef) -> Tensor:
        """The data of any input tensor."""
        if isinstance(ref, ComposedRef):
            return ref.composed(self.read)
        if self.base.owns(ref):
            return checked(self.base.read(ref), ref, "base")
        owner = next(
            m for m in self.every if m.checkpoint.owns(ref) or (m.fisher is not None and ref.file == m.fisher.path)
        )
        return owner.read(ref)

    @cached_property
    def models(self) -> list[Model]:
        """Those that count: not the base itself, none of weight 0, none whose every update is zero where others' are not; all but
        those of weight 0 where the base is one of the points that the method merges."""
        counts = METHODS[self.recipe.merge_method].lets_base_count(self.recipe.parameters)
        weighed = [model for model in self.every if model.is_weighed]
        others = [model for model in weighed if counts or not model.folder.samefile(self.base.folder)]
        others = [model for model in others if model is self._first(model) or model.is_adapter]
        return others if counts else [model for model in others if self._moves(model)] or others

    def _first(self, model: Model) -> Model:
        """The first entry of the recipe that is the same multimodal model; itself of any other."""
        same = (m for m in self.every if m.is_native and m.checkpoint.folder.samefile(model.checkpoint.folder))
        return next(same, model) if model.is_native else model

    def _moves(self, model: Model) -> bool:
        """Whether a model differs from the base anywhere, in the tensors that the base has."""
        pairs = [(a, b) for a, b, _ in model.factors.values()] + [(one.a, one.b) for one in model.stacked.values()]
        if any(bool(self.read(a).any()) and bool(self.read(b).any()) for a, b in pairs):
            return True
        return any(not self._same(ref, self.base.refs[slot]) for slot, ref in model.tuned.items())

    def _same(self, ref: TensorRef, base: TensorRef) -> bool:
        """Whether two stored tensors hold the same values, read in parts."""
        if ref.shape != base.shape:
            return False
        pairs = zip(parts_of(ref, 1 << 20), parts_of(base, 1 << 20), strict=True)
        wide = torch.promote_types(ref.dtype, base.dtype)
        return all(torch.equal(self.read(one).to(wide), self.read(other).to(wide)) for one, other in pairs)

    @cached_property
    def lora_rank(self) -> int | None:
        """The largest rank of the factors."""
        ranks = [a.shape[0] for model in self.models for a, _, _ in model.factors.values()]
        return max(ranks + [one.rank for model in self.models for one in model.stacked.values()], default=None)

    def all(self) -> Iterator[Promise]:
        """What every tensor of the result must be.

        Raises:
            CheckpointError: a model changes a tensor, and neither method nor rule says what is to become of it.
        """
        form = self.recipe.form
        for slot in self.base.refs if form.is_whole else sorted(self.base.refs):
            if self._holds_experts(slot):
                yield from self._of_experts(slot)
                continue
            promise = self._of(slot)
            if form.is_whole or promise.kind == "merged" or (promise.kind == "averaged" and form.takes_full_updates):
                yield promise
            elif promise.kind == "averaged" and not promise.is_exact:
                raise CheckpointError(
                    f"{slot}: is to be averaged, which form: {form.name} cannot hold; write form: full"
                )
        if form.carries_senses:
            for model in self.every:
                yield from self._own(model)
                for name, ref in model.carried.items():
                    if name.startswith("senses.") and model is not self._first(model):
                        continue
                    yield Promise("carried", name, (name,), ref)

    def _holds_experts(self, slot: str) -> bool:
        """Whether a tensor holds several experts, one after another, that are merged by a method."""
        start, rule = self.base.refs[slot], self._rule(slot)
        having = any(model.has(slot) for model in self.models)
        fused = len(start.shape) == 3 and self._what(start) == "other" and bool(EXPERTS.search(slot))
        low_rank = any(slot in model.stacked for model in self.models)
        policy = None if rule is None else rule.policy
        return fused and having and (policy is None or (low_rank and policy == "average"))

    def _of_experts(self, slot: str) -> Iterator[Promise]:
        """Every expert's matrix is a weight of its own. A method that tells its sides apart gets (out, in)."""
        whole = self.merged(slot, self.base.refs[slot])
        rows, columns = whole.start.shape[1:]
        text = self.config.get("text_config") or self.config
        width, tells = text.get("hidden_size"), METHODS[whole.method].tells_sides(whole.parameters)
        is_down = slot.rpartition(".")[2].startswith(("down", "w2"))
        turned = tells and not whole.method.startswith("dare") and (columns if is_down else rows) == width

        def one(ref: TensorRef, index: int) -> TensorRef:
            found = ref.one(index)
            return transposed(found) if turned else found

        def own(update: Update, index: int) -> Update:
            if update.stacked is not None:
                pair = replace(update.stacked, turned=update.stacked.turned != turned).one(index)
                return replace(update, stacked=None, factors=(pair.a, pair.b, pair.scale))
            return replace(update, tuned=None if update.tuned is None else one(update.tuned, index))

        count, form = whole.start.shape[0], self.recipe.form
        is_pair = not form.is_whole and not form.takes_full_updates
        for index in range(count):
            yield replace(
                whole,
                slot=f"{slot}[{index}]",
                names=form.factors(self._stems[slot]) if is_pair else whole.names,
                start=one(whole.start, index),
                updates=tuple(own(update, index) for update in whole.updates),
                fishers=tuple(one(ref, index) for ref in whole.fishers),
                rows=() if is_pair else ((index * rows, (index + 1) * rows),),
                part=(index, count) if is_pair else None,
            )

    @cached_property
    def _stems(self) -> dict[str, str]:
        """PEFT's names of the modules that wrap experts."""
        return nested_stems(model.stacked for model in self.models)

    def _own(self, model: Model) -> Iterator[Promise]:
        """What the tokens of a full fine-tune's own media use: its update, cut to a rank."""
        own = model.entry.own
        if own is None or own == "same":
            return
        experts = parts_of_experts(self.config, self.base.refs, self.base.folder)
        for slot in sorted(model.tuned.keys() - experts):
            if self._of(slot).kind == "merged" and IN_A_LAYER.search(slot):
                stem, disk = slot.removesuffix(".weight"), disk_name(model.sense)
                names = tuple(f"{stem}.lora_{side}.{disk}.weight" for side in "AB")
                updates = (Update(1.0, model.tuned[slot]),)
                yield Promise(
                    "merged",
                    f"{model.sense}:{slot}",
                    names,
                    self.base.refs[slot],
                    updates,
                    "task_arithmetic",
                    {"scale": 1.0},
                    compress_rank=own.rank,
                )

    def _of(self, slot: str) -> Promise:
        """What a tensor of the base becomes."""
        start, rule = self.base.refs[slot], self._rule(slot)
        having = [model for model in self.models if model.has(slot)]
        what, policy = self._what(start), None if rule is None else rule.policy
        asked = rule is not None and rule.merge_method is not None
        kept = Promise("kept", slot, (slot,), start)
        if policy == "keep" or not having:
            return kept
        if what == "rows" and not asked and policy != "average":
            if trained := next((model for model in having if model.is_adapter), None):
                raise CheckpointError(f"{slot}: was trained by {trained.label}, and no rule says what becomes of it")
            return kept
        is_low_rank = any(slot in model.factors for model in having)
        if is_low_rank or what == "matrix" or (asked and what in ("rows", "other") and len(start.shape) == 2):
            return self.merged(slot, start)
        if what == "vector" and policy is None and METHODS[self._method(slot)[0]].keeps_vectors:
            return kept
        if what == "vector" or (policy == "average" and what != "numbers"):
            weights = [weight for model in having if (weight := self._weight(model, slot)) != 0]
            return self._averaged(slot, start, having, self._strength(slot, weights))
        method, parameters = self._method(slot)
        if METHODS[method].is_sum and what != "numbers":
            n = sum(self._weight(model, slot) != 0 for model in having)
            return self._averaged(slot, start, having, METHODS[method].sum_factor(parameters, n) * n if n else 0.0)
        if changed := next((model for model in having if not self._same(model.tuned[slot], start)), None):
            raise CheckpointError(
                f"{slot}: was changed by {changed.label}, and neither method nor rule says what it becomes"
            )
        return kept

    def merged(self, slot: str, start: TensorRef) -> Promise:
        """Where a weight is 0 at this depth, its model is absent, but for a method that needs the whole model or the weights."""
        method, parameters = self._method(slot)
        everywhere = METHODS[method].needs_survey(parameters) or METHODS[method].takes("weights")
        models = [model for model in self.models if everywhere or self._weight(model, slot) != 0]
        updates = (
            Update(self._weight(model, slot), model.tuned.get(slot), model.factors.get(slot), model.stacked.get(slot))
            for model in models
        )
        fishers: tuple[TensorRef, ...] = ()
        if METHODS[method].takes("fishers"):
            fishers = tuple(model.fisher.refs[slot] for model in models if model.fisher is not None)
        names: tuple[str, ...] = (slot,)
        if not self.recipe.form.is_whole and len(start.shape) == 2:
            names = self.recipe.form.factors(self.modules.get(slot, slot))
        return Promise(
            "merged",
            slot,
            names,
            start,
            tuple(updates),
            method,
            parameters,
            fishers,
            compress_rank=self.recipe.output.compress_rank,
        )

    def _averaged(self, slot: str, start: TensorRef, having: Sequence[Model], factor: float) -> Promise:
        pairs = ((self._weight(model, slot), model.tuned[slot]) for model in having)
        updates = tuple(Update(weight, ref) for weight, ref in pairs if weight != 0)
        return Promise("averaged", slot, (slot,), start, updates, factor=factor)

    def _count(self, slot: str) -> int:
        """How many models are merged at the depth of a tensor; where there are none, n is 1 and multiplies nothing."""
        return max(1, sum(self._weight(model, slot) != 0 for model in self.models))

    def _strength(self, slot: str, weights: Sequence[float] = ()) -> float:
        """λ / λ_auto: how far the recipe goes beside what its method does by itself; α, which has no "auto"; or the method's."""
        rule = self._rule(slot)
        by_rule = rule if rule is not None and rule.policy is None else None
        method, parameters = self._resolved(slot, by_rule)
        if (mean := METHODS[method].mean) is not None:
            every = [weight for model in self.models if (weight := self._weight(model, slot)) != 0]
            return mean(parameters, weights or every)
        if "scale" not in parameters:
            return float(parameters.get("alpha", 1.0))
        factor = float(parameters["scale"] / METHODS[method].automatic_scale(self._count(slot), parameters))
        if parameters.get("combine") == "weighted_mean":
            weights = [weight for model in self.models if (weight := self._weight(model, slot))]
            factor *= len(weights) / (math.fsum(weights) or 1.0)
        return factor

    def _rule(self, slot: str) -> WeightRule | None:
        """The first of the recipe's rules that names a tensor."""
        for pattern, rule in self.recipe.modules.items():
            if fnmatch.fnmatchcase(slot, pattern):
                return rule
        is_beside = not canonical(slot).startswith(("decoder.", "lm_head."))
        return WeightRule(policy="keep") if self.recipe.towers == "keep" and is_beside else None

    def _method(self, slot: str) -> tuple[str, dict[str, Any]]:
        """Method of a weight, and all its parameters at its depth; what a rule averages is averaged as far as λ goes."""
        rule = self._rule(slot)
        if rule is not None and rule.policy == "average":
            return "average", {"scale": self._strength(slot) / self._count(slot)}
        return self._resolved(slot, rule)

    def _resolved(self, slot: str, rule: WeightRule | None) -> tuple[str, dict[str, Any]]:
        """The recipe's method, or a rule's own, with every parameter worked out."""
        recipe = self.recipe
        method, parameters = recipe.merge_method, recipe.written
        if rule is not None:
            if rule.merge_method not in (None, method):
                method, parameters = str(rule.merge_method), {}
            parameters |= rule.parameters
        for name, value in list(parameters.items()):
            if isinstance(value, tuple):  # by model
                default = METHODS[method].parameters
                everywhere = METHODS[method].needs_survey(default | parameters)
                taking = [m for m in self.models if everywhere or self._weight(m, slot) != 0]
                own = [self._at(value[m.index], slot) for m in taking]
                own = [default[name] if one is None else one for one in own]
                found: Any = own[0] if len(set(own)) == 1 else tuple(own) or None
            else:
                found = self._at(value, slot)
            if found is None:
                del parameters[name]
            else:
                whole = isinstance(found, float) and METHODS[method].is_whole(name)
                parameters[name] = round(float(found)) if whole else found
        return method, resolve(method, parameters, n=self._count(slot), lora_rank=self.lora_rank)

    def _weight(self, model: Model, slot: str) -> float:
        """A model's factor; of shares, its part of the sum of all that the recipe lists."""
        weight = float(self._at(model.entry.parameters.weight, slot))
        if self.recipe.weights == "factors":
            return weight
        return weight / math.fsum(self._at(entry.parameters.weight, slot) for entry in self.recipe.models)

    def _at(self, value: Any, slot: str) -> Any:
        """A number; of entries by name, the first whose filter is in it; of a list, the one at the depth of a layer, on
        straight lines from the first layer to the last."""
        if not isinstance(value, (list, tuple)):
            return value
        if any(isinstance(one, dict) for one in value):
            fitting = (one["value"] for one in value if one.get("filter") in (None, "*") or one["filter"] in slot)
            return self._at(next(fitting, None), slot)
        found = IN_A_LAYER.search(slot)
        if found is None and self.recipe.outside_layers == "first":
            return value[0]
        if found is None:
            raise CheckpointError(f"{slot}: is in no layer, so a list over the layers says nothing of it")
        place = int(found["index"]) / max(1, self.depth - 1) * (len(value) - 1)
        left = min(int(place), len(value) - 1)
        right = min(left + 1, len(value) - 1)
        return value[left] + (place - left) * (value[right] - value[left])

    def _what(self, ref: TensorRef) -> What:
        """What a tensor is: a linear weight, a vector, rows of tokens, positions or experts, whole numbers, or else."""
        name, shape = ref.name, ref.shape
        if not ref.dtype.is_floating_point:
            return "numbers"
        stem = name.removesuffix(".weight").removesuffix(".bias")
        parts = stem.split(".")
        module, words = parts[-1], parts[-1].split("_")
        if "router" in parts or any(self._chooses(parts, index) for index in range(len(parts))):
            return "rows"
        if len(shape) < 2:
            return "vector"
        if "experts" in parts and not is_numbered(parts[parts.index("experts") + 1 :]):
            return "other"
        if module in ("wpe", "bias_values") or module.startswith(("embed_positions", "rel_pos")):
            return "rows"
        if any(
            f"{of}{join}{table}" in module for of in OF_POSITIONS for join in ("", "_") for table in ("emb", "bias")
        ):
            return "rows"
        ends = words[-1] in OF_TOKENS or module.endswith(("embed_in", "bos_eos_token")) or "embed_tokens" in module
        if len(shape) < 4 and (module in TABLES or (ends and "patch" not in module)):
            return "rows"
        if len(shape) > 2 or not name.endswith("weight"):
            return "other"
        if not IN_A_LAYER.search(name):
            tokens, positions, widths = self._sizes
            if module in ("output", "head") or set(shape) & (tokens - widths):
                return "rows"
            if shape[0] in positions - widths and f"{stem}.bias" not in self.base.refs:
                return "rows"
        return "matrix"

    def _chooses(self, parts: Sequence[str], index: int) -> bool:
        """Whether the module at this place of a name stands beside experts that it chooses from."""
        return parts[index] in CHOOSERS and ".".join(parts[:index]) in self._mixtures

    @cached_property
    def _mixtures(self) -> set[str]:
        """The modules that hold experts."""
        return {name.split(".experts.")[0] for name in self.base.refs if ".experts." in name}

    @cached_property
    def _sizes(self) -> tuple[set[int], set[int], set[int]]:
        """How many tokens and positions the model knows, and how wide it is, as its config says."""
        tokens: set[int] = set()
        positions: set[int] = set()
        widths: set[int] = set()
        for key, value in numbers(self.config):
            if "vocab" in key or key == "codebook_size":
                tokens.add(value)
            elif key in ("n_positions", "n_ctx") or key.endswith(("position_embeddings", "_positions")):
                positions |= {value, value + 2}  # two rows for padding
            elif key.endswith(("_size", "_dim", "dim", "width")) or key in ("d_model", "n_embd", "d_ff", "n_inner"):
                widths.add(value)
        return tokens, positions, widths

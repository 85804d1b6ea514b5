"""The words that planning, computing and writing have in common: one piece of work, what it gives, and a tensor's fate."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from modalloy.methods import METHODS
from modalloy.specialists.specialist import StoredLora
from modalloy.storage.scaled import ScaledRef
from modalloy.storage.tensors import TensorRef
from modalloy.storage.views import Rows
from modalloy.storage.writer import TensorSpec

Fate = Literal["merged", "kept", "averaged", "carried", "left out"]
Survey = dict[str, Any]  # what a method must know of the whole model before its first weight


@dataclass(frozen=True)
class TensorFate:
    """What becomes of one input tensor: its source ("base", "target" or a specialist's label), its name, its fate and why."""

    source: str
    tensor: str
    fate: Fate
    detail: str


@dataclass(frozen=True)
class Job:
    """One independent piece of a merge: all that is needed to do it, and nothing of the other jobs. It pickles small.

    - merge: the models' updates of a linear weight, by a method
    - average: start + scale · mean of the weighted updates of the models that have the tensor, of any shape
    - interpolate: a norm or bias of a target towards the donors'
    - fuse: several merged weights, `pieces`, that the target stores as one tensor
    - requantise: the weight of its one piece, as codes and scales like `start`'s
    - own: the update of one model, cut to the two factors that its own tokens use
    - keep: the tensor `start`, unchanged
    - carry: a specialist's tensor `start`, bit for bit
    - several: `pieces` of as many merges that have inputs in common, which are read once; `parameters["of"]` numbers the merges
    - reuse: what an earlier result has of the same job, `models`; what was measured then is in `parameters`
    """

    kind: Literal["merge", "average", "interpolate", "fuse", "requantise", "own", "keep", "carry", "several", "reuse"]
    name: str  # the target's tensor, or one linear weight inside a fused one
    outputs: tuple[TensorSpec, ...]
    start: TensorRef | None = None  # what the updates are added to; only a fused tensor has none of its own
    models: tuple[
        StoredLora | TensorRef | None, ...
    ] = ()  # updates of those that take part: factors, a tuned copy, or zero
    weights: tuple[float, ...] = ()  # the updates' factors, one for each of `models`
    labels: tuple[str, ...] = ()  # whose updates they are, for figures; not of averages
    method: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)  # resolved, at this weight's depth
    wide: torch.dtype = torch.float32  # of the arithmetic
    fishers: tuple[TensorRef, ...] = ()
    pieces: tuple["Job", ...] = ()
    rows: Rows = ()  # of a piece, in the tensor of its output

    @property
    def merges(self) -> tuple["Job", ...]:
        """The merged weights that it makes: itself, or its pieces."""
        return (self,) if self.kind == "merge" else tuple(one for piece in self.pieces for one in piece.merges)

    @property
    def has_tuned(self) -> bool:
        """Whether any of the models brings a tuned copy, whose update is a full matrix."""
        return any(isinstance(model, TensorRef) for model in self.models)

    @property
    def stacked_rank(self) -> int:
        """The sum of the ranks of the models' factors."""
        return sum(model.rank for model in self.models if isinstance(model, StoredLora))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that is updated."""
        assert self.start is not None
        return self.start.shape

    @property
    def adds_nothing(self) -> bool:
        """Whether the result is the base: λ, α or t is 0, or no model takes part with a weight other than 0."""
        return 0 in (self.parameters.get(name) for name in ("scale", "alpha", "t")) or not any(self.weights)

    @property
    def takes_base(self) -> bool:
        """Whether its method receives the weight that is updated, beside the updates."""
        return self.method in METHODS and METHODS[self.method].base(self.parameters)

    @property
    def reads(self) -> tuple[TensorRef, ...]:
        """The stored tensors that it reads. Factors of factors are made without the weight that they update, unless
        the method asks for it."""
        refs = [ref for piece in self.pieces for ref in piece.reads]
        if self.kind == "several":
            return tuple(dict.fromkeys(refs))
        by_factors = self.kind == "merge" and len(self.outputs) == 2 and not self.has_tuned and not self.takes_base
        if self.kind == "requantise" and isinstance(self.start, ScaledRef):
            refs += [ref for ref in (self.start.codes, self.start.scales) if ref is not None]
        elif self.start is not None and not by_factors:
            refs.append(self.start)
        for model in self.models:
            refs += [model.a, model.b] if isinstance(model, StoredLora) else [model] if model is not None else []
        return (*refs, *self.fishers)

    @property
    def read_bytes(self) -> int:
        """Size of the tensors that it reads."""
        return sum(ref.n_bytes for ref in self.reads)

    @property
    def write_bytes(self) -> int:
        """Size of the tensors that it writes."""
        return sum(spec.n_bytes for spec in self.outputs)

    @property
    def survey_key(self) -> str:
        """Jobs with the same key share one survey of the whole model; λ, applied last, changes no survey and is left out."""
        return json.dumps([self.method, self.parameters | {"scale": None}], sort_keys=True)


@dataclass(frozen=True)
class Run:
    """What a merge found out beside its tensors."""

    surveys: dict[str, Survey]  # by the jobs' `survey_key`
    compression: dict[str, float]  # relative error of updates that were cut to fit, by weight
    sha256: dict[str, str]  # of the weight files written


@dataclass(frozen=True)
class Done:
    """What a job gives: its tensors, in the order and type of its outputs, and what was measured on the way."""

    tensors: list[Tensor]
    compression: Mapping[str, float] = field(default_factory=dict)  # relative error of updates that were cut, by weight
    parts: tuple["Done", ...] = ()  # what each of several merges gets, whose tensors are not listed again

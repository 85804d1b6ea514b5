"""How a search is made: what is varied, asked, compared and chosen."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from modalloy.evals.features import FeatureCache
from modalloy.search.comparing import Objective
from modalloy.search.embedding import EMBEDDER
from modalloy.search.objective import Aggregate, Match, Variant
from modalloy.search.target import Loader


@dataclass(frozen=True)
class Settings:
    """The options of `search`.

    Attributes:
        vary: axes as `NAME=VALUES` (see `parse_axes`); without any, λ and k of ssam, or α of linear.
        objective: "consistency" chooses the candidate whose answers differ least from its neighbours' (AdaMMS 3.3), with
            no labels; "labels" the most accurate; "agreement" the one to which the specialists' own answers to probes of
            one sense are likeliest (mean nats a token, teacher-forced).
        variant: of consistency, see `objective.inconsistency`.
        match: how consistency compares answers: "normalised" or "exact" (see `objective.compared`), "embedding" (1 − cosine
            of the embeddings of the answers), or "top1", for which nothing but the recipe's own answers is generated: the
            share of their tokens before which neighbours expect another next one, teacher-forced.
        embedder: folder or hub id of the model of `match="embedding"`, see `embedding.Embedder`.
        aggregate: of the losses of probes, see `objective.totals`.
        strategy: "grid" of all combinations; "coordinate": one axis after the other, the others held; "tpe" or "random":
            samplers of Optuna. "auto" is grid for one axis, else coordinate.
        trials: candidates that a sampler may try.
        max_new_tokens: of an answer; one that is as long counts as over-long.
        batch_size: questions that are answered together.
        cache: encoder features shared with other runs.
        device: "cpu" or "cuda".
        dtype: of the model in memory.
        resume: go on with the log in `out`.
        allow_base_mismatch: search with specialists that record another base.
        load: makes a model of a plan and all tensors of its checkpoint by name, for a target whose architecture modalloy
            does not run (see `target.LoadedTarget`).
        on_answer: called with (answers there are, answers that are expected at most).
    """

    vary: Iterable[str] = ()
    objective: Objective = "consistency"
    variant: Variant = "sum"
    match: Match = "normalised"
    embedder: str = EMBEDDER
    aggregate: Aggregate = "probes"
    strategy: str = "auto"
    trials: int = 30
    max_new_tokens: int = 32
    batch_size: int = 1
    cache: FeatureCache | None = None
    device: str = "cpu"
    dtype: str = "float32"
    resume: bool = False
    allow_base_mismatch: bool = False
    load: Loader | None = None
    on_answer: Callable[[int, int], None] = field(default=lambda done, total: None)

    @property
    def compares_meaning(self) -> bool:
        """Whether answers are compared by their embeddings."""
        return self.objective == "consistency" and self.match == "embedding"

    @property
    def lengths(self) -> dict[str, Any]:
        """What answers depend on: others are another search."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "batch_size": self.batch_size,
            "dtype": self.dtype,
            "device": self.device,
        }

"""How a search is made: what is varied, asked, compared and chosen."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from modalloy.evals.features import FeatureCache
from modalloy.search.comparing import Objective
from modalloy.search.embedding import EMBEDDER
from modalloy.search.objective import Aggregate, Match
from modalloy.search.target import Loader


@dataclass(frozen=True)
class Settings:
    """The options of `search`.

    Attributes:
        vary: axes as `NAME=VALUES` (see `parse_axes`); without any, λ and k of ssam, or α of linear.
        objective: "consistency" chooses the candidate whose answers differ least from its neighbours' (AdaMMS 3.3), with
            no labels; "labels" the most accurate. Three ask each specialist the probes of its own sense, without labels:
            "agreement" chooses the candidate to which the specialists' own answers are likeliest (mean nats a token,
            teacher-forced), "kl" the one of least KL(specialist || merged) (see `expected.Expected`), "option_agreement" the
            one whose likeliest option is the specialist's most often. "auto" is `comparing.DEFAULT`, and with a target
            "consistency".
        variant: of consistency, see `objective.inconsistency`; of labels "accuracy" or "probability" (of the gold options
            among all); of option_agreement "share" of the probes, or "weighted" by the probability that the specialist gives
            its option. None is the first of `objective.VARIANTS`.
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
    objective: Objective | Literal["auto"] = "auto"
    variant: str | None = None
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

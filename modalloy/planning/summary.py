"""A plan in one line, for people: what is merged and how, and what models changed that the result does not have."""

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from modalloy.methods import METHODS
from modalloy.planning.kinds import PLURALS
from modalloy.senses.stored import EXPERT

if TYPE_CHECKING:
    from modalloy.planning.plan import Plan


def one_line(planned: "Plan") -> str:
    """One line: what is merged and how, and what is not."""
    chosen = {name: value for name, value in planned.parameters.items() if value != "none"}
    settings = ", ".join(f"{_letter(name)}={_shown(value)}" for name, value in chosen.items())
    fused = [job for job in planned.written() if job.kind == "fuse"] if planned.across is None else []
    experts = sum(len(job.pieces) for job in fused)
    how = ", ".join(filter(None, (planned.recipe.merge_method, settings)))
    parts = [f"{planned.merged_weights() - experts} linear weights merged ({how})"]
    parts += [f"{experts} experts in {len(fused)} tensors merged, each as a weight of its own"] if fused else []
    apart = sum(EXPERT.search(job.name) is not None for job in planned.merges() if not job.rows)
    parts += [f"{apart} of the linear weights are experts'"] if apart else []
    parts += [f"{count} tensors {fate}" for fate, count in planned.counts().items() if fate != "merged"]
    parts += [f"{label} does not count ({reason})" for label, reason in planned.absent.items()]
    if planned.unchanged:
        parts.append(
            f"{', '.join(planned.unchanged)} changes nothing: every update is zero, and the result is the base"
        )
    parts += _said_of_rules(planned)
    if planned.vocabulary is not None:
        vocabulary = planned.vocabulary
        parts.append(
            f"{len(vocabulary.tokens)} tokens, {len(vocabulary.tokens.keys() - vocabulary.base.tokens.keys())} of which the base "
            "lacks: their rows are the mean of the models' that have them"
        )
    if any(set(job.weights) - {None, 1.0} for job in planned.written()):
        parts.append(_said_of_weights(planned))
    if planned.base is None:
        parts.insert(1, f"{sum(job.kind == 'interpolate' for job in planned.jobs)} norms and biases too")
        parts.append("α is the weight of the donor, 0 = target unchanged")
    return " · ".join(parts)


def _said_of_weights(planned: "Plan") -> str:
    """What the models' weights are to the recipe's method."""
    if planned.recipe.weights == "shares":
        return "a model's weight is its share, of the sum of all"
    if planned.parameters.get("combine") == "weighted_mean":
        return "a model's weight is a factor of its update, whose merge is divided by the weights"
    if not METHODS[planned.recipe.merge_method].takes("weights"):
        return "a model's weight is a factor of its update, never normalised"
    if planned.parameters.get("normalize_weights") is False:
        return "a model's weight is its share, as it is"
    return "a model's weight is its share, of the sum of all"


def _said_of_rules(planned: "Plan") -> list[str]:
    """What is not merged by the recipe's method though models changed it, by kind, with its share of the parameters."""
    others = Counter(job.method for job in planned.merges() if job.method != planned.recipe.merge_method)
    said = [f"{count} of the linear weights by {method}" for method, count in others.items()]
    averaged = [job.name for job in planned.written() if job.kind == "average" and not job.method]
    said += _by_kind(
        planned, [name for name in averaged if planned.kinds.get(name, "vector") != "vector"], "averaged by rule"
    )
    who = sorted({label for labels in planned.trained.values() for label in labels})
    return said + _by_kind(planned, list(planned.trained), f"that {', '.join(who)} changed stay the base's")


def _by_kind(planned: "Plan", names: list[str], what: str) -> list[str]:
    """How many tensors of each kind, and their share of the base's parameters."""
    whole = sum(math.prod(ref.shape) for ref in planned.target.refs.values())
    said = []
    for kind, plural in PLURALS.items():
        if chosen := [name for name in names if planned.kinds[name] == kind]:
            share = sum(math.prod(planned.target.refs[name].shape) for name in chosen) / whole
            said.append(f"{len(chosen)} {plural} {what} ({share:.1%} of the parameters)")
    return said


def _letter(parameter: str) -> str:
    return {"rank": "k", "scale": "λ"}.get(parameter, parameter)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        whole = round(1 / value) if 1e-9 < value < 1 else 0
        return f"1/{whole}" if whole and value == 1 / whole else f"{value:g}"
    return str(value)

"""MetaGPT (Zhou et al., arXiv 2406.11385): task arithmetic with one coefficient per model, in closed form."""

from collections.abc import Callable, Iterable
from typing import Any

from modalloy.delta import Delta, norm
from modalloy.methods.method import LINEAR_LAWS, Method
from modalloy.methods.parameters import Number


def metagpt(
    deltas: list[Delta], *, scale: Number, shape: tuple[int, int], whole: dict[str, Any] | None = None
) -> Delta:
    """λ Σ w_i D_i with w_i = ‖τ_i‖² / Σ_j ‖τ_j‖², where τ_i is the update of the whole model (theorem 2 of the paper).

    A model that moved further counts for more. Without data; the weights sum to 1.

    Args:
        deltas: one update (out, in) per specialist, scaling folded in.
        scale: λ, 1 by default.
        shape: of the original weight; unused.
        whole: the weights (`survey_metagpt`).
    """
    assert whole is not None
    weighed = [(scale * weight) * delta for weight, delta in zip(whole["weights"], deltas, strict=True)]
    return sum(weighed[1:], weighed[0])


def survey_metagpt(model: Callable[[], Iterable[tuple[str, list[Delta]]]], **_: Any) -> dict[str, Any]:
    """Every specialist's share of the squared norms over the whole model; 0 each if nothing was updated."""
    squares = [[norm(delta) ** 2 for delta in deltas] for _, deltas in model()]
    sums = [sum(own) for own in zip(*squares, strict=True)]
    return {"weights": [one / (sum(sums) or 1.0) for one in sums]}


METHOD = Method(metagpt, "factors", "arXiv 2406.11385", LINEAR_LAWS, survey=survey_metagpt, rowwise=True)

"""Task arithmetic (Ilharco et al., arXiv 2212.04089): λ times the sum of the task vectors."""

from modalloy.delta import Delta
from modalloy.methods.method import LINEAR_LAWS, Method
from modalloy.methods.parameters import Number


def task_arithmetic(deltas: list[Delta], *, scale: Number, shape: tuple[int, int]) -> Delta:
    """λ Σ D_i. Low-rank updates stay exact: their factors are concatenated.

    Args:
        deltas: one update (out, in) per specialist, scaling folded in.
        scale: λ, 1 by default.
        shape: of the original weight; unused.
    """
    return scale * sum(deltas[1:], deltas[0])


METHOD = Method(task_arithmetic, "factors", "arXiv 2212.04089", LINEAR_LAWS, rowwise=True)

"""DAMC (Chen et al., ACL 2024, arXiv 2402.12750): decoupled parameters, and a weighted sum of the text updates."""

from modalloy.delta import Delta
from modalloy.methods.method import LINEAR_LAWS, Method
from modalloy.methods.parameters import Number


def damc(deltas: list[Delta], *, scale: Number, shape: tuple[int, int]) -> Delta:
    """Σ λ_i D_i over the text updates, with λ_i = scale · weight_i. At equal weights this is `average`.

    Args:
        deltas: one text update (out, in) per specialist; each is already multiplied by its specialist's weight.
        scale: common factor of the λ_i, 1/n by default.
        shape: of the original weight; unused.
    """
    return scale * sum(deltas[1:], deltas[0])


METHOD = Method(damc, "factors", "arXiv 2402.12750", LINEAR_LAWS, mean_scale=True, rowwise=True)

"""Choosing λ, k, weights or any parameter of a method with few or no labels (after AdaMMS, arXiv 2503.23733)."""

from modalloy.search.run import OBJECTIVES, STRATEGIES, search

__all__ = ["OBJECTIVES", "STRATEGIES", "search"]

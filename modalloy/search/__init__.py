"""Choosing λ, k, weights or any parameter of a method with few or no labels (after AdaMMS, arXiv 2503.23733)."""

from modalloy.search.choosing import search
from modalloy.search.comparing import OBJECTIVES
from modalloy.search.strategies import STRATEGIES

__all__ = ["OBJECTIVES", "STRATEGIES", "search"]

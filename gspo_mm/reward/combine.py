"""How the values of parts become one reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence


def weighted_sum(values: Sequence[float], weights: Sequence[float]) -> float:
    # Rounded, so that rewards equal on paper (0.1 + 0.2 and 0.3) are equal: else a group of them would look
    # alive, and normalising it would turn a difference of 1e-17 into advantages of 1.
    return round(math.fsum(value * weight for value, weight in zip(values, weights, strict=True)), 12)


def weighted_product(values: Sequence[float], weights: Sequence[float]) -> float:
    """Each value to the power of its weight, multiplied: one part at 0 makes all 0, weight 0 only measures."""
    return round(math.prod(value**weight for value, weight in zip(values, weights, strict=True)), 12)


def closed_gate(values: Sequence[float], weights: Sequence[float]) -> float:
    """What is left where a gate is closed: penalties only, as breaking the format must not be a way round them."""
    return weighted_sum([min(value, 0.0) for value in values], weights)


# Ways to combine parts: the words of `combine:`.
COMBINE: dict[str, Callable[[Sequence[float], Sequence[float]], float]] = {
    "sum": weighted_sum,
    "product": weighted_product,
}

"""Metrics of micro-batches, made into those of the batch without depending on how it was split."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch

# A number, or a list of one number per sequence: what cannot be merged from parts, such as a quantile, is taken
# of all values at the end.
type Metrics = Mapping[str, float | list[float]]

QUANTILES = {"p01": 0.01, "p50": 0.5, "p99": 0.99}


def reduce_metrics(
    parts: Iterable[Metrics],
    *,
    others: Callable[[Iterable[float]], float] = math.fsum,
) -> Metrics:
    """Merge metrics of micro-batches (or ranks): `*_min` by min, `*_max` by max, lists joined, others added."""
    parts = list(parts)
    if len({frozenset(part) for part in parts}) > 1:
        raise ValueError(f"metrics of micro-batches have different names: {[sorted(part) for part in parts]}")
    merged: dict[str, float | list[float]] = {}
    for name in parts[0] if parts else ():
        values = [part[name] for part in parts]
        numbers = [value for value in values if not isinstance(value, list)]
        if numbers:
            merged[name] = {"_min": min, "_max": max}.get(name[-4:], others)(numbers)
        else:
            merged[name] = [value for values_S in values if isinstance(values_S, list) for value in values_S]
    return merged


def summarize(metrics: Metrics) -> dict[str, float]:
    """Numbers as they are; a list `x` becomes its x_mean, x_min, x_max, x_p01, x_p50 and x_p99.

    The mean is rounded once and quantiles interpolate linearly between order statistics, so neither depends on
    the order of the list.
    """
    flat: dict[str, float] = {}
    for name, values in metrics.items():
        if not isinstance(values, list):
            flat[name] = values
            continue
        flat[f"{name}_mean"] = math.fsum(values) / len(values)
        flat[f"{name}_min"], flat[f"{name}_max"] = min(values), max(values)
        levels = torch.tensor(list(QUANTILES.values()), dtype=torch.float64)
        quantiles = torch.tensor(values, dtype=torch.float64).quantile(levels).tolist()
        flat |= {f"{name}_{level}": value for level, value in zip(QUANTILES, quantiles, strict=True)}
    return flat

"""Metrics of parts become those of the whole: sums, extremes, and exact quantiles of lists."""

import random
from statistics import fmean

import numpy as np
import pytest

from gspo_mm.loss import reduce_metrics, summarize


def test_reduce_metrics_adds_joins_and_takes_extremes():
    parts = [
        {"a": 1.0, "b_min": 2.0, "b_max": 2.0, "c": [3.0, 1.0]},
        {"a": 0.5, "b_min": -1.0, "b_max": 5.0, "c": [2.0]},
    ]
    assert reduce_metrics(parts) == {"a": 1.5, "b_min": -1.0, "b_max": 5.0, "c": [3.0, 1.0, 2.0]}
    assert reduce_metrics(parts, others=fmean) == {**reduce_metrics(parts), "a": 0.75}
    assert reduce_metrics([]) == {}
    with pytest.raises(ValueError, match="different names"):
        reduce_metrics([{"a": 1.0}, {"b": 1.0}])


def test_a_list_is_summarized_exactly_whatever_its_split_and_order():
    rng = random.Random(0)
    values = [rng.lognormvariate(0.0, 3.0) for _ in range(257)]
    expected = {
        "x_min": min(values),
        "x_max": max(values),
        "x_mean": np.mean(values),
        **{f"x_p{q:02}": np.quantile(values, q / 100) for q in (1, 50, 99)},
    }
    whole = summarize({"x": values, "y": 2.0})
    assert whole == pytest.approx({**expected, "y": 2.0}, rel=1e-13)
    rng.shuffle(values)
    parts = [{"x": values[:3]}, {"x": values[3:200]}, {"x": values[200:]}]
    assert summarize({**reduce_metrics(parts), "y": 2.0}) == whole
    halves = np.split(np.sort(values)[:256], 2)  # a mean of their quantiles would be far off
    assert np.mean([np.quantile(half, 0.99) for half in halves]) < 0.6 * whole["x_p99"]


def test_one_value_is_its_own_summary():
    assert set(summarize({"x": [0.25]}).values()) == {0.25}

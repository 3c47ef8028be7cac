"""What a variant of the loss is: a function of log-probs and ratios to a loss per token, or per sequence.

gspo.py does the rest for all of them: ratios, log-probs of the engine, weights a_i, the KL term, metrics. A function of the
user's (`loss.python`) is of the same kind; README.md beside this file has one that is written from nothing.

Suffixes: R packed response tokens, S sequences, U units that have a ratio of their own (S at level sequence, else R).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from gspo_mm.config import LossConfig


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """Sequences laid end to end. Everything is float64; only `logprobs` and `log_ratio` carry a gradient."""

    logprobs: Tensor  # [R] nats, of the policy being trained
    old_logprobs: Tensor  # [R] nats, of the policy that this batch of rollouts started with
    log_ratio: Tensor  # [U] logarithm of the ratio, by loss.level
    advantages: Tensor  # [U]
    lengths: Tensor  # [S] int64 ≥ 1, response tokens of each sequence
    config: LossConfig


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """What is to be made small, before it is averaged by loss.aggregation. A [S] counts for all tokens of its sequence.

    Means over tokens, of a sequence first and then of sequences, become metrics: `clipped` as clip_*_fraction, `metrics`
    as loss/*.
    """

    loss: Tensor  # [R] or [S]
    # [R] or [S] bool, where a bound named low, high or dual acted
    clipped: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, Tensor] = field(default_factory=dict)  # [R] or [S]


class Surrogate(Protocol):
    def __call__(self, inputs: LossInputs) -> LossTerms: ...


def log_bounds(config: LossConfig) -> tuple[float, float]:
    """Logarithms of 1 − clip_low and 1 + clip_high; infinite where there is no bound."""
    low, high = config.clip_low, config.clip_high
    return (
        -math.inf if low is None else math.log1p(-low),
        math.inf if high is None else math.log1p(high),
    )


def clipped_by(inputs: LossInputs) -> dict[str, Tensor]:
    """[U] bool under "low" and "high": ratios below or above their bound whose advantage pushes them on."""
    low, high = log_bounds(inputs.config)
    return {
        "low": (inputs.advantages < 0) & (inputs.log_ratio < low),
        "high": (inputs.advantages > 0) & (inputs.log_ratio > high),
    }


def segment_sum(values_R: Tensor, lengths_S: Tensor) -> Tensor:
    """Sums of consecutive stretches; unlike index_add, neither it nor its gradient adds atomically."""
    return torch.segment_reduce(values_R, "sum", lengths=lengths_S, axis=0)

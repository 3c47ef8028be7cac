"""How far importance ratios spread, by the length of the answer: the argument for normalising them by it."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch


class Ratios:
    """Moments of log-ratios x = log π − log π_old of all updates but those whose policy is still the old one.

    Of each answer three numbers count: its sum Σ x (the ratio of a whole answer), its mean (GSPO's), its tokens' own (GRPO's).
    """

    def __init__(self) -> None:
        # length of an answer -> its number, then Σ and Σ² of sums, means and tokens
        self._moments: dict[int, torch.Tensor] = defaultdict(lambda: torch.zeros(7, dtype=torch.float64))

    def add(self, log_ratio_R: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
        """Those of packed answers: [R] nats, and where they begin and end [S+1]."""
        x_R = log_ratio_R.double().cpu()
        if float(x_R.abs().max()) < 1e-5:  # rounding: the first update of a batch that did not wait
            return
        for x_T in x_R.split(cu_seqlens.diff().tolist()):
            total, square = float(x_T.sum()), float(x_T.square().sum())
            mean = total / len(x_T)
            self._moments[len(x_T)] += torch.tensor(
                [1.0, total, total**2, mean, mean**2, total, square], dtype=torch.float64
            )

    def by_length(self) -> list[dict[str, Any]]:
        """For each length the number of answers and the standard deviations, nats."""
        found: list[dict[str, Any]] = []
        for length, moments in sorted(self._moments.items()):
            number, *sums = moments.tolist()
            spread = [
                math.sqrt(max(squares / count - (values / count) ** 2, 0.0))
                for values, squares, count in zip(
                    sums[::2], sums[1::2], (number, number, number * length), strict=True
                )
            ]
            found.append(
                {
                    "length": length,
                    "answers": int(number),
                    **dict(zip(("sum", "mean", "token"), spread, strict=True)),
                }
            )
        return found

"""Ranks whose device has become slow: each step waits for the slowest, which no number of the step shows."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from gspo_mm.runtime.probe import SLOW, relative

logger = logging.getLogger(__name__)

_TIMES = 3  # looks in a row before it is said: one may have met something else on the machine


class SlowRanks:
    """Takes in what `matmul_rate` says on every rank, and names those that stay behind, once."""

    def __init__(self) -> None:
        self.slowest = 1.0  # the slowest rank's speed over the median rank's, at the last look
        self._seen: dict[int, int] = {}

    def look(self, rates: Sequence[float], nodes: Sequence[str]) -> None:
        """`rates` and names of the nodes by rank."""
        speeds = relative(dict(enumerate(rates)))
        self.slowest = min(speeds.values())
        behind = [rank for rank, speed in speeds.items() if speed < SLOW]
        self._seen = {rank: self._seen.get(rank, 0) + 1 for rank in behind}
        for rank in behind:
            if self._seen[rank] == _TIMES:
                logger.warning(
                    "rank %d on %s computes at %.0f%% of the others' speed, and every step waits for it: look at that "
                    "node, or leave it out (GSPO_EXCLUDE)",
                    rank,
                    nodes[rank],
                    100 * speeds[rank],
                )

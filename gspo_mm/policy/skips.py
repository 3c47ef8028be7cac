"""Updates that are left out: their gradient is not finite, or a spike.

A spike is a gradient norm of more than `spike_factor` times the median of the last WINDOW updates' norms. The weights and
the optimizer stay as they were, and the run goes on with the next update, unless too many in a row are left out. (OLMo
2, arXiv 2501.00656, section 3.3, leaves updates out by standard deviations; a median does not move with the spikes.)
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median

from gspo_mm.config import SkipConfig
from gspo_mm.types import NonFiniteError

logger = logging.getLogger(__name__)

WINDOW = 64
_ENOUGH = 16  # norms before a median is judged by


class SpikeError(NonFiniteError):
    """A gradient norm far above those before."""


class Skips:
    """Judges gradient norms, and counts what is left out. The same on every rank."""

    def __init__(self, config: SkipConfig) -> None:
        self._config = config
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._in_a_row = 0

    def judge(self, norm: float, number: int) -> None:
        """Raises NonFiniteError or SpikeError when update `number` must not be made; else takes its norm in."""
        if not math.isfinite(norm):
            raise NonFiniteError(
                f"the gradient norm of update {number} is {norm}; the weights were left as they were; lower "
                "policy.optimizer.lr, or look at the sequences of this step"
            )
        factor = self._config.spike_factor
        if factor and len(self._norms) >= _ENOUGH and norm > factor * (usual := median(self._norms)):
            raise SpikeError(
                f"the gradient norm of update {number} is {norm:.3g}, more than policy.optimizer.skip.spike_factor="
                f"{factor:g} times the usual {usual:.3g}; the weights were left as they were; lower "
                "policy.optimizer.lr, or look at the sequences of this step"
            )
        self._norms.append(norm)

    def attempt[T](self, update: Callable[[], T]) -> T | None:
        """What `update` returns; None when it is left out. Raises its fault when that is one too many in a row."""
        try:
            done = update()
        except NonFiniteError as fault:
            self._in_a_row += 1
            if self._in_a_row > self._config.in_a_row:
                raise
            logger.warning(
                "an update is left out (%d in a row, of at most policy.optimizer.skip.in_a_row=%d): %s",
                self._in_a_row,
                self._config.in_a_row,
                fault,
            )
            return None
        self._in_a_row = 0
        return done

    def state(self) -> list[float]:
        """Norms of the last updates, for a checkpoint."""
        return list(self._norms)

    def load(self, norms: Sequence[float]) -> None:
        self._norms.extend(norms)

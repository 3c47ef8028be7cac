"""A polite end: SIGTERM (Slurm's preemption, `scancel`), SIGUSR1 (`--signal`) and Ctrl-C ask the loop to stop.

The loop looks at `requested` after each step, saves a checkpoint and returns. A second Ctrl-C stops at once.
"""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Self

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Context manager that turns the first signal into a flag; handlers are restored on exit."""

    def __init__(self, consequence: str = "stopping, with a checkpoint") -> None:
        self.requested = False
        self._consequence = consequence  # what follows, for the log
        self._name = ""
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._on_signal) for s in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._name = signal.Signals(number).name
        logger.warning("%s received: %s", self._name, self._consequence)
        self.requested = True

    def name(self) -> str:
        """Of the signal that asked; "" while none has."""
        return self._name

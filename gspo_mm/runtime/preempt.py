"""A polite end: SIGTERM (Slurm's preemption, `scancel`), SIGUSR1 (`--signal`) and Ctrl-C ask the run to stop.

A command listens before it imports or loads anything. The loop looks at `requested` after each step, saves a checkpoint
and returns; what comes before the first step looks at it in between and has nothing to save. A second Ctrl-C stops at
once.
"""

from __future__ import annotations

import logging
import signal
import threading
from queue import SimpleQueue
from types import FrameType
from typing import Protocol, Self

from gspo_mm.types import GspoError

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StoppedError(GspoError):
    """The run was asked to stop, and did."""


def stopped(when: str) -> StoppedError:
    return StoppedError(f"stopped by a signal {when}; start again with run.resume=auto to continue")


class Ranks(Protocol):
    """What a request needs of `dist.Ranks`."""

    def any(self, flag: bool) -> bool: ...


class StopRequest:
    """Turns the first signal into a flag: until the process ends, or as a context manager, which restores handlers."""

    def __init__(self, consequence: str = "stopping, with a checkpoint") -> None:
        self.requested = False
        self._consequence = consequence  # what follows, for the log
        self._name = ""
        self._before: dict[int, object] = {}
        # its put() may be called from a handler, at any moment
        self._received: SimpleQueue[str] = SimpleQueue()
        self._reporter = threading.Thread(target=self._report, name="signals", daemon=True)

    def listen(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._on_signal) for s in _SIGNALS}
            self._reporter.start()
        return self

    def __enter__(self) -> Self:
        return self.listen()

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        if self._before:
            self._received.put("")
            self._reporter.join(5.0)  # what was received is in the log before what follows

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._name = signal.Signals(number).name
        self._received.put(self._name)
        self.requested = True

    def _report(self) -> None:
        """Not in the handler: the signal may have come while a line was being written, and the log is no place twice."""
        while name := self._received.get():
            logger.warning("%s received: %s", name, self._consequence)

    def obey(self, ranks: Ranks, when: str) -> None:
        """Raise StoppedError on all ranks when one of them was asked to stop. A collective."""
        if ranks.any(self.requested):
            fault = stopped(when)
            fault.on_all_ranks = True
            raise fault

    def name(self) -> str:
        """Of the signal that asked; "" while none has."""
        return self._name

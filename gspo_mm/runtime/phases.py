"""Seconds spent in each phase of a step, and on work that goes on beside it."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gspo_mm.runtime.watchdog import beat


class Phases:
    """`with phases("rollout"): ...` adds to time/rollout; `take()` hands the step's times out and starts again.

    A phase within another counts for itself alone.
    """

    def __init__(self, on_enter: Callable[[str], None] | None = None) -> None:
        self._on_enter = on_enter
        self._seconds: dict[str, float] = defaultdict(float)
        self._began = time.perf_counter()
        self._inside: list[str] = []  # names, the innermost last
        self._within = 0.0  # seconds of phases that the innermost one held

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._inside.append(name)
        self._enter(name)
        before, self._within = self._within, 0.0
        began = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - began
            self._seconds[name] += seconds - self._within
            self._within = before + seconds
            self._inside.pop()
            if self._inside:
                self._enter(self._inside[-1])

    def _enter(self, name: str) -> None:
        if self._on_enter:
            self._on_enter(name)
        beat()

    def take(self) -> dict[str, float]:
        """{"time/<phase>": seconds} since the last call, and "time/step" for all of it."""
        now = time.perf_counter()
        times = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        times["time/step"] = now - self._began
        self._seconds.clear()
        self._began = now
        return times


class Busy:
    """`with busy: ...` by any number of threads or tasks; `take()` says how much of the time one was inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._seconds = 0.0
        self._taken = self._since = time.perf_counter()

    def __enter__(self) -> None:
        self._count(1)

    def __exit__(self, *_: object) -> None:
        self._count(-1)

    def take(self) -> float:
        """The fraction of the time since the last call, 0 to 1."""
        with self._lock:
            self._settle()
            share = self._seconds / max(self._since - self._taken, 1e-9)
            self._seconds, self._taken = 0.0, self._since
        return share

    def _count(self, change: int) -> None:
        with self._lock:
            self._settle()
            self._inside += change

    def _settle(self) -> None:
        now = time.perf_counter()
        if self._inside:
            self._seconds += now - self._since
        self._since = now

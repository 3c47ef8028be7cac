"""Seconds spent in each phase of a step."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Phases:
    """`with phases("rollout"): ...` adds to time/rollout; `take()` hands the step's times out and starts anew."""

    def __init__(self, on_enter: Callable[[str], None] | None = None) -> None:
        self._on_enter = on_enter
        self._seconds: dict[str, float] = defaultdict(float)
        self._began = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self._on_enter:
            self._on_enter(name)
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - began

    def take(self) -> dict[str, float]:
        """{"time/<phase>": seconds} since the last call, and "time/step" for all of it."""
        now = time.perf_counter()
        times = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        times["time/step"] = now - self._began
        self._seconds.clear()
        self._began = now
        return times

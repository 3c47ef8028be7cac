"""Waiting for what other threads and processes do, as long as it takes on a busy machine, and no longer."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE = 60.0  # seconds: only ever waited for in full by a test that fails


def eventually[T](look: Callable[[], T], *, patience: float = PATIENCE) -> T:
    """The first true thing that `look` returns; fails the test when none comes."""
    deadline = time.monotonic() + patience
    while not (found := look()):
        assert time.monotonic() < deadline, f"waited {patience:g} s in vain"
        time.sleep(0.01)
    return found

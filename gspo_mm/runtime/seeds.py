"""A random stream of its own for every purpose and step, so that nothing needs random state to resume."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *labels: int | str) -> int:
    """A 63-bit seed from the run's seed and what it is for; stable over processes and versions."""
    digest = hashlib.sha256(repr((seed, *labels)).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1

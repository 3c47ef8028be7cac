"""Threads for processes that compute on one machine's cores at the same time.

OpenMP's threads wait for each other by turning in circles. Where there are more of them than cores, those that wait keep
the cores from those that are waited for: steps of the quick start beside its server took up to 40 s instead of 1.2 s.
"""

from __future__ import annotations

import os


def share_of_cores(processes: int) -> int:
    """How many threads each of `processes` may have, at least one."""
    return max(1, len(os.sched_getaffinity(0)) // processes)

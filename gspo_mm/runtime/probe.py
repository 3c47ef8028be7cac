"""How fast this rank's device multiplies matrices, alone: what is slow by itself slows every other rank down."""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import median

import torch

from gspo_mm.runtime.dist import device

SLOW = 0.7  # of the median rank's speed
_SIZES = {"cuda": 8192, "cpu": 512}


def relative(rates: Mapping[int, float]) -> dict[int, float]:
    """Each rank's rate over the median of all; below SLOW it holds the others up."""
    usual = median(rates.values()) if rates else 1.0
    return {rank: rate / usual for rank, rate in rates.items()}


def matmul_rate(seconds: float = 0.02, *, rounds: int = 5) -> float:
    """Products of two fixed matrices per second, BF16 on a GPU and float32 on a CPU: the best of `rounds`.

    A CPU's seconds are those that this process had of it.
    """
    where = device()
    size = _SIZES[where.type]
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    matrix = torch.ones(size, size, dtype=dtype, device=where)
    out = matrix @ matrix
    rates = []
    for _ in range(rounds):
        done, passed, began = 0, 0.0, _now(where)
        while passed < seconds / rounds:
            torch.mm(matrix, matrix, out=out)
            done, passed = done + 1, _now(where) - began
        rates.append(done / passed)
    return max(rates)


def _now(where: torch.device) -> float:
    if where.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(where)
    return time.perf_counter()

"""Tokens per second, model-FLOPs utilisation and memory of the policy's passes.

MFU = FLOPs that the model needs for the batch (batch/cost.py: vision tower and active experts only) / (seconds x
devices x the device's dense peak). The peak is that of BF16, or of FP8 where the policy runs in it. Forward only for the
old log-probs; forward and backward of what is trained for the update, recomputation not counted.
"""

from __future__ import annotations

import resource
from collections.abc import Mapping

import torch

from gspo_mm.types import Work

# dense peak, FLOP/s in BF16 (FP8 is twice that), by a part of the device's name; NVIDIA's data sheets
_PEAK = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H800": 989e12,
    "B200": 2250e12,
    "GB200": 2500e12,
}


def peak_flops(*, fp8: bool = False) -> float | None:
    """Of one device, FLOP/s; None where it is not known (a CPU, or a device that is not in the table)."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    found = [peak for part, peak in sorted(_PEAK.items(), key=lambda item: -len(item[0])) if part in name]
    return found[0] * (2 if fp8 else 1) if found else None


def throughput(
    work: Work, times: Mapping[str, float], *, devices: int, peak: float | None
) -> dict[str, float]:
    """Metrics of the policy's passes that `times` ("time/<phase>": seconds) says were run; `peak`: see `peak_flops`."""
    metrics: dict[str, float] = {}
    for phase, amount in {"update": work.update, "old_logprobs": work.forward}.items():
        seconds = times.get(f"time/{phase}", 0.0)
        if seconds <= 0 or amount <= 0:
            continue
        metrics[f"tokens_per_second/{phase}"] = work.tokens / seconds
        metrics[f"tflops_per_device/{phase}"] = amount / seconds / devices / 1e12
        if peak:
            metrics[f"mfu/{phase}"] = amount / seconds / devices / peak
    return metrics


def peak_memory() -> float:
    """Largest use so far, GiB: the device's allocated memory, or this process's resident memory without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

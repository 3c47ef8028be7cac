"""Stage a: machine and versions, memory's own speed, and Transformer Engine's matrix products."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

from tools.bench.card.results import RefusedError, Report


def machine(report: Report) -> None:
    """Findings of `gspo-mm doctor`, what the policy has for its speed, how long Transformer Engine takes to be imported."""
    from gspo_mm.commands.doctor import diagnose
    from gspo_mm.policy.speed import choices_of_run

    for check in diagnose():
        if check.status in ("warning", "error") or check.name.startswith(("cuda", "cores", "memory")):
            report(**{check.name: f"{check.status}: {check.found}"})
    report(on_for_speed=[choice.name for choice in choices_of_run(None, None) if choice.on])
    began = time.perf_counter()
    import transformer_engine.pytorch  # pyright: ignore[reportMissingImports]  # noqa: F401

    report(transformer_engine_import_s=time.perf_counter() - began)


def memcpy(report: Report, gib: float, repeats: int) -> None:
    report(copy_gb_per_s=copy_speed(int(gib * 2**30), repeats))


def copy_speed(size: int, repeats: int) -> float:
    """10^9 bytes per second that a copy within the device's memory moves, each byte counted once."""
    import torch

    from gspo_mm.runtime.dist import device

    source = torch.ones(size, dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    return size / seconds_of(lambda: target.copy_(source), repeats) / 1e9


def gemm(report: Report, recipe: str | None, rows: int, inner: int, outer: int, repeats: int) -> None:
    """Forward of te.Linear, weight quantised once, against torch's product in float32."""
    import torch
    import transformer_engine.pytorch as te  # pyright: ignore[reportMissingImports]
    from transformer_engine.common import recipe as recipes  # pyright: ignore[reportMissingImports]

    from gspo_mm.observe.throughput import peak_flops
    from gspo_mm.runtime.dist import device

    if recipe == "mxfp8" and torch.cuda.get_device_capability() < (10, 0):
        raise RefusedError(f"mxfp8 needs compute capability 10.0; {torch.cuda.get_device_name()} has less")
    kinds = {
        "tensorwise": "Float8CurrentScaling",
        "blockwise": "Float8BlockScaling",
        "mxfp8": "MXFP8BlockScaling",
    }
    made: Any = getattr(recipes, kinds[recipe])() if recipe else None
    generator = torch.Generator().manual_seed(0)
    linear = te.Linear(inner, outer, bias=False, params_dtype=torch.bfloat16, device=str(device()))
    x = torch.randn(rows, inner, generator=generator).to(device(), torch.bfloat16)

    @torch.no_grad()
    def forward(first: bool = False) -> torch.Tensor:
        with te.fp8_autocast(enabled=made is not None, fp8_recipe=made):
            return linear(x, is_first_microbatch=first)

    found, expected = forward(first=True).float(), x.float() @ linear.weight.detach().float().T
    error = float((found - expected).norm() / expected.norm())
    report(relative_error=error)
    report.check(error < (0.06 if recipe else 0.01), f"the product is off by {error:.3g} of its norm")
    seconds = seconds_of(forward, repeats)
    flops = 2.0 * rows * inner * outer / seconds
    report(tflops=flops / 1e12)
    if peak := peak_flops(fp8=recipe is not None):
        report(of_peak=flops / peak)


def seconds_of(function: Callable[[], Any], repeats: int) -> float:
    """Of one call: the median of three rounds of `repeats`, after a round that is not counted."""
    import torch

    def once() -> float:
        began = time.perf_counter()
        for _ in range(repeats):
            function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / repeats

    once()
    return median(once() for _ in range(3))

"""How fast weights reach a real SGLang server, by each sync.mode, next to a plain copy of the same bytes in memory.

    python tools/bench/sync.py --gb 1 --bucket-mb 128

A random Qwen3-VL-MoE of that size is made, a server is started on it, and every mode pushes all weights --pushes times,
in turns with the copy; checksums are compared after each push, and their time counts. Memory is the largest resident size of
this process during a push less that before it, so it holds buckets, gathered tensors and requests. The first push of
a mode is not counted: it connects, and the allocator grows.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
import tempfile
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from gspo_mm.policy.engine import Policy
    from gspo_mm.sync.sglang import SGLangPush

sys.path.insert(0, str(Path(__file__).parents[1]))

GB = 10**9
MIB = 2**20
MODES = ("disk", "distributed", "tensor")


def main(
    gb: Annotated[float, typer.Option(help="size of the random model, float32, in 10^9 bytes")] = 1.0,
    bucket_mb: Annotated[int, typer.Option(help="sync.bucket_mb, in MiB")] = 128,
    pushes: Annotated[int, typer.Option(help="counted pushes of each mode")] = 5,
    modes: Annotated[str, typer.Option(help="comma-separated")] = ",".join(MODES),
) -> None:
    """Print seconds, GB/s, the ratio to a plain copy and the extra memory of each mode."""
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "model", gb)
        rows = measure(Path(folder), modes.split(","), bucket_mb=bucket_mb, pushes=pushes)
    typer.echo(
        f"{platform.machine()}, {os.cpu_count()} cores; sglang {version('sglang')}, torch {version('torch')}"
    )
    typer.echo(f"bucket {bucket_mb} MiB\n")
    typer.echo(
        "| way | seconds | GB/s | of a copy | extra memory (MiB) | in buckets |\n|---|---|---|---|---|---|"
    )
    for row in rows:
        typer.echo("| " + " | ".join(row) + " |")


def make_model(path: Path, gb: float, **text: Any) -> None:
    """Almost all of it are experts of 9.4 MB each, as wide as those of Qwen3-VL-30B-A3B. `text`: over its settings."""
    from make_tiny_model import make_tiny_model

    layers = 4
    experts = max(2, round(gb * GB / (layers * 4 * 3 * 1024 * 768)))
    widths = {"hidden_size": 1024, "moe_intermediate_size": 768, "num_hidden_layers": layers}
    make_tiny_model(path, text={**widths, "num_experts": experts, **text})


def measure(folder: Path, modes: list[str], *, bucket_mb: int, pushes: int) -> list[list[str]]:
    """One row for the copy and one for each mode."""
    from gspo_mm.data.processor import Processor
    from gspo_mm.policy.engine import Policy
    from gspo_mm.rollout.sglang import SGLangEngine
    from gspo_mm.serving.fleet import Fleet
    from gspo_mm.sync.sglang import SGLangPush

    configs = {mode: config_of(folder, mode, bucket_mb) for mode in modes}
    config = configs[modes[0]]
    policy = Policy.from_hf(config.model.path, config.policy, seed=0, total_steps=1)
    size = sum(tensor.nbytes for _, tensor in policy.export())
    engine = SGLangEngine(config, Processor(config.model.path, config.data), Fleet(config))
    seconds: dict[str, list[float]] = defaultdict(list)
    extra: dict[str, list[int]] = defaultdict(list)
    try:
        ways = {mode: SGLangPush(configs[mode], policy, engine) for mode in modes}
        for number in range(pushes + 1):
            seconds["copy"].append(copy_seconds(policy))
            for mode, way in ways.items():
                took, memory = push_once(way, number)
                seconds[mode].append(took)
                extra[mode].append(memory)
        for way in ways.values():
            way.close()
    finally:
        engine.close()
    return [row(way, seconds, extra, size, bucket_mb) for way in ("copy", *modes)]


def config_of(
    folder: Path, mode: str, bucket_mb: int, *, verify: bool = True, dtype: str = "float32", **sglang: Any
) -> Any:
    """Of a run in `folder`. `sglang`: settings of its servers."""
    from gspo_mm.config import parse_config

    server = {"mem_fraction": 0.3, "max_tokens": 4096, "context_length": 512, "start_timeout": 600, **sglang}
    return parse_config(
        {
            "run": {"name": "bench", "dir": str(folder)},
            "model": {"path": str(folder / "model")},
            "data": {"train": ["unused.tar"]},
            "rollout": {"engine": "sglang", "sglang": server},
            "sync": {"mode": mode, "bucket_mb": bucket_mb, "verify": verify},
            "reward": {"file": "unused.yaml"},
            "policy": {"dtype": dtype},
        }
    )


def copy_seconds(policy: Policy) -> float:
    """A copy of all parameters into memory that is there already."""
    import torch

    with torch.no_grad():
        weights = [policy.weights[name] for name in policy.weights.names()]
        targets = [torch.zeros_like(weight) for weight in weights]
        began = time.perf_counter()
        for target, weight in zip(targets, weights, strict=True):
            target.copy_(weight)
        return time.perf_counter() - began


def push_once(push: SGLangPush, number: int) -> tuple[float, int]:
    """Seconds, and bytes of memory above what there was before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not hide what is taken now
    Path("/proc/self/clear_refs").write_text("5")  # forget the largest resident size
    before = memory_of("VmRSS")
    began = time.perf_counter()
    push.push(version=number)
    return time.perf_counter() - began, memory_of("VmHWM") - before


def memory_of(kind: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith(kind)).split()[1]) * 1024


def row(
    way: str, seconds: dict[str, list[float]], extra: dict[str, list[int]], size: int, bucket_mb: int
) -> list[str]:
    took, copied = median(seconds[way][1:]), median(seconds["copy"][1:])
    cells = [way, f"{took:.2f}", f"{size / took / GB:.2f}", f"{copied / took:.2f}"]
    if way not in extra:
        return [*cells, "", ""]
    most = max(extra[way]) / MIB
    return [*cells, f"{most:.0f}", f"{most / bucket_mb:.2f}"]


if __name__ == "__main__":
    typer.run(main)

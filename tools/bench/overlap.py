"""What rollout.max_staleness=1 saves: the SGLang quick start with sampling and training in turn, and side by side.

    OMP_NUM_THREADS=1 python tools/bench/overlap.py --steps 30

Needs what `make quickstart` leaves. In turn, a step takes rollout + training; side by side it can take no less than the
longer of the two. The ratio of the measured step to that bound is printed, and the largest staleness of any token.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

CONFIG = "configs/quickstart_sglang.yaml"


def main(
    steps: Annotated[int, typer.Option(help="steps of each run")] = 30,
    warmup: Annotated[int, typer.Option(help="steps not counted")] = 5,
    mode: Annotated[str, typer.Option(help="sync.mode")] = "distributed",
) -> None:
    """Print medians of both runs and the ratio to the bound."""
    with tempfile.TemporaryDirectory() as folder:
        in_turn = run(folder, 0, steps, mode)[warmup:]
        beside = run(folder, 1, steps, mode)[warmup:]
    rollout = median(line["time/rollout"] for line in in_turn)
    training = median(line["time/step"] - line["time/rollout"] for line in in_turn)
    step = median(line["time/step"] for line in beside)
    typer.echo(
        f"{platform.machine()}, {os.cpu_count()} cores; sglang {version('sglang')}, torch {version('torch')}"
    )
    typer.echo(
        f"in turn      rollout {rollout:.2f} s + training {training:.2f} s, of which sync {sync(in_turn):.2f} s"
    )
    typer.echo(f"side by side {step:.2f} s, sync {sync(beside):.2f} s")
    typer.echo(f"ratio to the longer of the two  {step / max(rollout, training):.2f}")
    typer.echo(f"largest staleness               {max(line['rollout/staleness_max'] for line in beside):.0f}")


def run(folder: str, staleness: int, steps: int, mode: str) -> list[dict[str, float]]:
    """The metrics of each step."""
    settings = {
        "run.dir": folder,
        "run.name": f"staleness-{staleness}",
        "train.steps": steps,
        "train.eval_every": 0,
        "train.eval_prompts": 1,
        "checkpoint.every": 0,
        "checkpoint.export_hf": "false",
        "observe.report": "false",
        "observe.save_rollouts_every": 0,
        "rollout.max_staleness": staleness,
        "sync.mode": mode,
    }
    words = [f"{key}={value}" for key, value in settings.items()]
    subprocess.run([sys.executable, "-m", "gspo_mm.cli", "train", CONFIG, *words], check=True)
    lines = (Path(folder) / f"staleness-{staleness}" / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["step"] > 0]


def sync(lines: list[dict[str, float]]) -> float:
    return median(line["time/sync"] for line in lines)


if __name__ == "__main__":
    typer.run(main)

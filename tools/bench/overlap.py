"""What rollout.max_staleness=1 saves: the SGLang quick start with sampling and training in turn, and side by side.

    OMP_NUM_THREADS=1 python tools/bench/overlap.py --steps 40

Needs what `make quickstart` leaves. In turn, a step takes rollout + training; side by side it can take no less than the
longer of the two. In both runs the trainer has one half of the cores and the server the other, as they have machines of
their own in a large run; with --shared both have all, and each takes longer beside the other than alone. So the ratio
is printed twice: to the longer of rollout and training as they took in turn, and as they took side by side. Beside them
is how busy that kept the cores, and the largest staleness of any token.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated

import psutil
import typer

CONFIG = "configs/quickstart_sglang.yaml"


def main(
    steps: Annotated[int, typer.Option(help="steps of each run")] = 40,
    warmup: Annotated[int, typer.Option(help="steps not counted")] = 5,
    mode: Annotated[str, typer.Option(help="sync.mode")] = "distributed",
    shared: Annotated[bool, typer.Option(help="both use all cores")] = False,
    override: Annotated[list[str] | None, typer.Argument(help="further key=value of both runs")] = None,
) -> None:
    """Print medians of both runs and the ratios to the bounds."""
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, object] = {
            "run.dir": folder,
            "train.steps": steps,
            "sync.mode": mode,
        }
        settings |= {key: value for key, _, value in (word.partition("=") for word in override or [])}
        in_turn = run(settings, 0, warmup, shared)
        beside = run(settings, 1, warmup, shared)
    rollout = in_turn.median("time/rollout")
    training = in_turn.median("time/step") - rollout
    step, cores = beside.median("time/step"), len(os.sched_getaffinity(0))
    typer.echo(f"{platform.machine()}, {cores} cores; sglang {version('sglang')}, torch {version('torch')}")
    typer.echo(
        f"in turn       rollout {rollout:.2f} s + training {training:.2f} s, of which sync "
        f"{in_turn.median('time/sync'):.2f} s; {in_turn.computed:.2f} s of a core"
    )
    typer.echo(
        f"side by side  {step:.2f} s, sync {beside.median('time/sync'):.2f} s; {beside.computed:.2f} s of a core"
    )
    busy = max(beside.mean("busy/trainer"), beside.mean("busy/servers"))
    largest = max(line["rollout/staleness_max"] for line in beside.lines)
    typer.echo(f"ratio to the longer of both, as it takes in turn  {step / max(rollout, training):.2f}")
    typer.echo(f"                             as it takes here     {1 / busy:.2f}")
    typer.echo(f"cores in use       {beside.computed / (cores * beside.mean('time/step')):.0%}")
    typer.echo(f"largest staleness  {largest:.0f}")


@dataclass(frozen=True, kw_only=True)
class Run:
    lines: list[dict[str, float]]  # metrics of the counted steps
    computed: float  # seconds of a core per step, of the trainer and its servers

    def median(self, name: str) -> float:
        return median(line[name] for line in self.lines)

    def mean(self, name: str) -> float:
        return sum(line[name] for line in self.lines) / len(self.lines)


def run(settings: dict[str, object], staleness: int, warmup: int, shared: bool) -> Run:
    """Train, and look on."""
    settings = settings | {
        "run.name": f"staleness-{staleness}",
        "train.eval_every": 0,
        "train.eval_prompts": 1,
        "checkpoint.every": 0,
        "checkpoint.export_hf": "false",
        "observe.report": "false",
        "observe.save_rollouts_every": 0,
        "rollout.max_staleness": staleness,
    }
    words = [f"{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "gspo_mm.cli", "train", CONFIG, *words]
    path = Path(str(settings["run.dir"])) / f"staleness-{staleness}" / "metrics.jsonl"
    looks: dict[int, float] = {}  # by steps done, when first seen: seconds of a core
    with psutil.Popen(command) as trainer:
        while trainer.poll() is None:
            done = path.read_text().count("\n") - 1 if path.exists() else 0
            if done == 1 and not shared:
                give_each_its_half(trainer)
            # the last step evaluates, so it does not count
            if warmup <= done < int(str(settings["train.steps"])) and done not in looks:
                looks[done] = computed(trainer)
            time.sleep(0.02)
    if trainer.returncode:
        raise subprocess.CalledProcessError(trainer.returncode, command)
    first, last = min(looks), max(looks)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return Run(
        lines=[line for line in lines if first < line["step"] <= last],
        computed=(looks[last] - looks[first]) / (last - first),
    )


def give_each_its_half(trainer: psutil.Process) -> None:
    """The first half of the cores to the trainer and its helpers, the other to servers and theirs; now and from now on."""
    cores = sorted(os.sched_getaffinity(0))
    halves = cores[: len(cores) // 2], cores[len(cores) // 2 :]
    guards = [p for p in trainer.children() if "gspo_mm.serving.guard" in p.cmdline()]
    servers = [process for guard in guards for process in [guard, *guard.children(recursive=True)]]
    for process in [trainer, *trainer.children(recursive=True)]:
        for thread in process.threads():
            with suppress(ProcessLookupError):  # it has ended meanwhile
                os.sched_setaffinity(thread.id, halves[process in servers])


def computed(trainer: psutil.Process) -> float:
    """Seconds of a core that a process and its descendants have taken."""
    total = 0.0
    for process in [trainer, *trainer.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


if __name__ == "__main__":
    typer.run(main)

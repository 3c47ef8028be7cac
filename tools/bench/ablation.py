"""Does GSPO do what its paper says, beside other losses, and beside routing replay? An ablation that runs on a laptop.

    python tools/bench/ablation.py --short            # made for 40 minutes of 2 CPU cores, a run on each
    python tools/bench/ablation.py --full --processes 8
    python tools/bench/ablation.py --short --arm gspo --arm grpo

Tiny Qwen3-VL mixtures of 8 and 64 experts read handwritten digits, and say where they are. All arms of a seed begin with the same
supervised start and see the same prompts; ablate/arms.py says which arms there are and with which bounds. Off-policyness is
real: four updates on every batch, and batches that wait for 0, 1 or 4 steps. Measured are

* held-out accuracy, at equal steps, at equal tokens and at equal seconds (of processor time, of training alone), and reward;
* clipped tokens, and the spread of importance ratios by the length of the answer;
* flips: routers' choices of experts that differ between the policy that sampled a batch and the one after its updates;
* collapses: runs that end below their start, or below half of their best, each by more than two standard errors of the
  held-out accuracy; runs that a fault ended, too;
* bytes and seconds of the replay cache, measured, and computed for large models.

OUT/results.json has every number, OUT/*.png the pictures. A run whose file is in OUT/trials is not made again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from tools.bench.ablate.arms import ARMS, FULL, MODELS, SHORT, Run, Scale  # noqa: E402

_LOADED = ["tools.bench.ablate.trial", "gspo_mm.sft"]  # by every process before it starts
_TASKS = "digit,digit,digit,where"  # answers of 4 tokens, and of about 15
_LARGE = ("Qwen3-VL-30B-A3B", "Qwen3-VL-235B-A22B")
_LENGTHS = (8192, 32768)  # tokens of an answer with its prompt


def main(
    short: Annotated[bool, typer.Option("--short/--full", help="How much of it.")] = True,
    out: Annotated[Path | None, typer.Option(help="[default: runs/ablation-short or -full]")] = None,
    arm: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(ARMS)}; all if left out.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Runs side by side, each on one core.")] = 2,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=NUMBER of ablate/arms.py's Scale, to try it: steps=2, lr=2e-4."),
    ] = None,
) -> None:
    """Compare losses under off-policyness; print a table and draw pictures."""
    if unknown := set(arm or ()) - set(ARMS):
        raise typer.BadParameter(f"--arm {min(unknown)}: there is none; use {', '.join(ARMS)}")
    scale = changed(SHORT if short else FULL, set_ or [])
    out = (out or Path("runs") / f"ablation-{'short' if short else 'full'}").resolve()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read where torch is imported
    out.mkdir(parents=True, exist_ok=True)
    prepare(out)
    runs = scale.runs(tuple(arm or ARMS))
    began = time.perf_counter()
    make(runs, scale, out, processes)
    report(runs, scale, out, seconds=time.perf_counter() - began)


def changed(scale: Scale, items: list[str]) -> Scale:
    """With the numbers of KEY=NUMBER; raises BadParameter for others."""
    known = {key: type(value) for key, value in vars(scale).items() if isinstance(value, int | float)}
    values: dict[str, Any] = {}
    for item in items:
        key, _, value = item.partition("=")
        try:
            values[key] = known[key](value)
        except (KeyError, ValueError):
            raise typer.BadParameter(
                f"--set {item}: give KEY=NUMBER, with KEY of {', '.join(known)}"
            ) from None
    return replace(scale, **values)


def prepare(out: Path) -> None:
    """Data and random models, where they are not there yet."""
    tools = ROOT / "tools"
    digits = [str(tools / "make_shards.py"), "digits", str(out / "digits"), f"--tasks={_TASKS}", "--force"]
    wanted = {out / "digits": digits}
    for experts, sizes in MODELS.items():
        folder = out / f"model-{experts}"
        values = [f"--set=text.{key}={value}" for key, value in sizes.items()]
        wanted[folder] = [str(tools / "make_tiny_model.py"), str(folder), *values]
    for folder, command in wanted.items():
        if not list(folder.glob("validation-*.tar")) and not (folder / "config.json").exists():
            subprocess.run([sys.executable, *command], check=True, capture_output=True)


def make(runs: list[Run], scale: Scale, out: Path, processes: int) -> None:
    """All runs that are not there yet, each in a process of its own; first the starts that they share."""
    starts = sorted({(run.experts, run.seed) for run in runs})
    left = [run for run in runs if not is_there(run, scale, out)]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_LOADED)
    with (
        Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress,
        ProcessPoolExecutor(processes, mp_context=context, max_tasks_per_child=1) as pool,
    ):
        shown = progress.add_task("starts", total=len(starts) + len(runs), completed=len(runs) - len(left))

        def follow(under_way: dict[Future[str], str]) -> None:
            for done in as_completed(under_way):
                progress.update(shown, advance=1, description=f"{under_way[done]}: {done.result()}")

        follow({pool.submit(start, *each, scale, out): f"start of {each}" for each in starts})
        follow({pool.submit(one, run, scale, out): str(run) for run in left})


def start(experts: int, seed: int, scale: Scale, out: Path) -> str:
    """The supervised start of all arms with such a model and seed."""
    from gspo_mm.config.load import load_config
    from gspo_mm.runtime.preempt import StopRequest
    from gspo_mm.sft import sft
    from tools.bench.ablate.trial import CONFIGS, settings

    if not (folder := started(experts, seed, scale, out)).exists():
        model = [
            f"model.path={out / f'model-{experts}'}",
            f"sft.steps={scale.warm_steps}",
            "observe.report=false",
        ]
        name = folder.parent.name
        log_to(out / "logs" / f"{name}.txt")
        sft(
            load_config(CONFIGS / "quickstart_sft.yaml", [*settings(out, name, seed, scale), *model]),
            StopRequest(),
        )
    return "ready"


def started(experts: int, seed: int, scale: Scale, out: Path) -> Path:
    return out / "runs" / f"start-{experts}-{seed}-steps{scale.warm_steps}" / "hf"


def one(run: Run, scale: Scale, out: Path) -> str:
    """Make a run and write its file; returns how well it ended."""
    from tools.bench.ablate.trial import trial

    log_to(out / "logs" / f"{run}.txt")
    found = trial(run, scale, out, started(run.experts, run.seed, scale, out))
    file = file_of(run, out)
    file.parent.mkdir(exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps({"scale": scale.of_a_run(), **found}))
    partial.rename(file)
    accuracies = [line["eval/accuracy"] for line in found["lines"] if "eval/accuracy" in line]
    return f"{100 * accuracies[0]:.1f} to {100 * accuracies[-1]:.1f} %"


def file_of(run: Run, out: Path) -> Path:
    return out / "trials" / f"{run}.json"


def is_there(run: Run, scale: Scale, out: Path) -> bool:
    """Whether its file is there; one of another scale ends this."""
    file = file_of(run, out)
    if not file.exists():
        return False
    if (found := json.loads(file.read_text())["scale"]) != scale.of_a_run():
        raise typer.BadParameter(f"{file} was made with {found}, not {scale.of_a_run()}; give another --out")
    return True


def log_to(file: Path) -> None:
    """All that this process prints from now on goes there."""
    file.parent.mkdir(exist_ok=True)
    with file.open("w") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)


def report(runs: list[Run], scale: Scale, out: Path, *, seconds: float) -> None:
    """results.json, the table and the pictures, of the runs that are there."""
    from tools.bench.ablate import plots
    from tools.bench.ablate.replay import cache_of
    from tools.bench.ablate.summary import rows, table

    made = {run: json.loads(file_of(run, out).read_text()) for run in runs}
    summary = rows(made, eval_prompts=scale.eval_prompts)
    caches = [cache_of(model, tokens=tokens) for model in _LARGE for tokens in _LENGTHS]
    result = {
        "scale": vars(scale),
        "summary": summary,
        "caches": caches,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "transformers", "megatron-core")},
        "seconds": seconds,
        "runs": [{**vars(run), **found} for run, found in made.items()],
    }
    (out / "results.json").write_text(json.dumps(result, indent=1))
    typer.echo(table(summary))
    for cache in caches:
        typer.echo(
            f"replay of {cache['model']}, {cache['tokens']} tokens: {cache['uint8'] / 2**20:.1f} MiB an answer in bytes, "
            f"{cache['int32'] / 2**20:.1f} in int32; {1e3 * cache['seconds']:.0f} ms of a core to pack and unpack"
        )
    plots.draw(made, out)
    typer.echo(f"{out}/results.json, and pictures beside it; {seconds / 60:.1f} minutes")


if __name__ == "__main__":
    typer.run(main)

"""The first hour on a card: is it right, how fast is it, and what takes the time. Stages a to e of card/parts.py.

    python tools/bench/gpu.py run --out card          # all stages; again: only what is not there yet
    python tools/bench/gpu.py run --out card --stage c --set layers=4 --minutes 9
    python tools/bench/gpu.py run --out card --markdown
    python tools/bench/gpu.py run --out dry --dry     # the same on a CPU, in small: says nothing about a card

Every part runs in a process of its own and has a deadline; a stage's are 8 minutes together. Each number is printed and
written to OUT/results.jsonl as soon as it is known. A part is not run again while that file has its end for the same card,
versions and settings; one that failed is. What a part's process wrote besides is in OUT/logs. Exit status: 0; 1 when a part
failed or was left for want of time; 2 when there is nothing to measure on.

Taking it to a bare machine
---------------------------
With a network: a CUDA 13 driver, Python 3.12, `pip install -e '.[quickstart,sglang,te,dev]'`. On a machine without network, copy
the wheels. Make a folder of them where there is one, for the same Python and platform:

1. Choose torch first, since the others are bound to it: sglang pins it exactly (0.5.15 to 0.5.17: 2.11, 0.5.23: 2.14.1) and
   Transformer Engine's extension is compiled against it. If torch is there already, take the sglang that pins its version.
2. `pip download megatron-core sglang==VERSION sglang-router scikit-learn pytest -d wheels` with `-c` a file of the versions
   that are there (`pip freeze`), so that nothing large comes twice. megatron-core is 2.4 MB. flashinfer-cubin is large and not
   needed: attention backends `fa3` (Hopper) and `triton` do without (`--set attention_backend='"triton"'`).
3. `pip download --no-deps transformer_engine==V transformer_engine_cu13==V nvdlfw-inspect onnx onnxscript -d wheels`;
   transformer_engine_cu13 2.20.2 is 277 MB and has all kernels.
4. transformer_engine_torch has no wheel; it is C++ that needs CUDA's headers, not a card, and is compiled ahead on a machine
   with the same torch: `NVTE_FRAMEWORK=pytorch NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_PYTORCH_FORCE_BUILD=TRUE pip wheel --no-deps
   --no-build-isolation transformer_engine_torch==V -w wheels`, about 20 minutes of processor time. CPLUS_INCLUDE_PATH must
   have the toolkit's include and include/cccl.

There, `pip install --no-index --no-deps` in this order: torch and what it needs, unless it is there; transformer_engine_cu13,
transformer_engine_torch, transformer_engine; the rest (`wheels/*.whl`); last `--no-build-isolation -e .` in the project's folder.
Without --no-deps a missing package that nothing here uses (flashinfer-cubin) would stop it.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from tools.bench.card.parts import PARTS, STAGES, Part  # noqa: E402
from tools.bench.card.results import Job, Line, RefusedError, Report, Results, markdown, say, summary  # noqa: E402

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)

_PACKAGES = ("torch", "transformers", "megatron-core", "transformer-engine", "sglang", "triton")
_SLOWER = 4  # times the deadline in a dry run, on whatever CPU
_TOLD = 12  # last lines of a failed part's log
# on a CPU Transformer Engine's Python code is where other programs do not see it: tests/te
_TE = Path(sys.prefix) / "te"


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="Folder of results.jsonl and logs.")] = Path("runs/card"),
    stage: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(STAGES)}; all if left out.")] = None,
    part: Annotated[list[str] | None, typer.Option(help="Single parts, by name.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=JSON of all parts with such a setting.")
    ] = None,
    dry: Annotated[bool, typer.Option(help="On a CPU, in small.")] = False,
    again: Annotated[bool, typer.Option(help="Also what has a result.")] = False,
    minutes: Annotated[
        float | None, typer.Option(help="Begin no part that could take longer than what is left of this.")
    ] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print rows for RESULTS.md.")] = False,
) -> None:
    """Measure what has no result yet, and show all results of this card, these versions and settings."""
    parts = chosen(stage or [], part or [])
    settings = changed(parts, set_ or [], dry=dry)
    card, versions = ("CPU", {}) if dry else find_card()
    versions |= find_versions()
    jobs = [
        Job(stage=p.stage, part=p.name, dry=dry, card=card, versions=versions, settings=s)
        for p, s in zip(parts, settings, strict=True)
    ]
    results, began = Results(out), time.monotonic()
    failed = left = 0
    for each, job in zip(parts, jobs, strict=True):
        end = results.end_of(job)
        if end and end["state"] != "failed" and not again:
            continue
        if minutes is not None and time.monotonic() - began + each.deadline > 60 * minutes:
            say(job, f"left for another time: it may take {each.deadline} s", sys.stdout)
            left += 1
            continue
        failed += run_part(each, job, results)["state"] == "failed"
    ends = [end for job in jobs if (end := results.end_of(job))]
    title = f"{'dry run, ' if dry else ''}{card}; {', '.join(f'{k} {v}' for k, v in versions.items())}"
    if as_markdown:
        typer.echo(markdown(ends, title))
    else:
        Console(width=None if sys.stdout.isatty() else 160).print(summary(ends, title))
    raise typer.Exit(int(failed + left > 0))


@app.command(hidden=True)
def one(name: str, out: Path, job: str) -> None:
    """One part, in this process. Called by `run`."""
    from gspo_mm.runtime.parent import die_with_parent

    die_with_parent()
    shown = os.fdopen(os.dup(1), "w")
    results, of = Results(out), Job(**json.loads(job))
    with _log(out, name).open("a") as log:
        for number in (1, 2):
            os.dup2(log.fileno(), number)
    began = time.monotonic()
    (part,) = (p for p in PARTS if p.name == name)
    module, function = part.function.split(".")
    report = Report(of, results, shown)
    try:
        getattr(importlib.import_module(f"tools.bench.card.{module}"), function)(report, **of.settings)
    except RefusedError as refusal:
        results.add(of, "refused", report.numbers, seconds=time.monotonic() - began, error=[str(refusal)])
        say(of, f"refused: {refusal}", shown)
        return
    report.end()
    results.add(of, "done", report.numbers, seconds=time.monotonic() - began)


def run_part(part: Part, job: Job, results: Results) -> Line:
    """The line of its end, whatever that was."""
    log = _log(results.folder, part.name)
    log.parent.mkdir(exist_ok=True)
    log.unlink(missing_ok=True)
    values = {"stage": job.stage, "part": job.part, "dry": job.dry, "card": job.card}
    values |= {"versions": job.versions, "settings": job.settings}
    arguments = (part.name, str(results.folder), json.dumps(values))
    before, began = len(results.lines()), time.monotonic()
    deadline = part.deadline * (_SLOWER if job.dry else 1)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        begin = _fork if job.dry and part.te else _start
        ended = begin(arguments, {"TMPDIR": scratch}, deadline)
    status = f"no end within {deadline} s" if ended is None else f"its process ended with status {ended}"
    mine = [line for line in results.lines()[before:] if job.is_of(line)]
    if mine and mine[-1]["state"] != "known":
        return mine[-1]
    known = {name: value for line in mine for name, value in line["numbers"].items()}
    told = log.read_text(errors="replace").splitlines() if log.exists() else []
    error = [*told[-_TOLD:], *([] if status.endswith("status 1") else [status])]
    say(job, f"failed: {error[-1] if error else status}  (all of it: {log})", sys.stdout)
    return results.add(job, "failed", known, seconds=time.monotonic() - began, error=error)


def _start(arguments: tuple[str, str, str], environment: Mapping[str, str], deadline: float) -> int | None:
    """A part's status from a new process; None: the deadline has passed."""
    paths = [str(ROOT), str(ROOT / "tools"), os.environ.get("PYTHONPATH")]
    env = {**os.environ, **environment, "PYTHONPATH": ":".join(path for path in paths if path)}
    command = [sys.executable, __file__, "one", *arguments]
    with subprocess.Popen(command, env=env, start_new_session=True) as process:
        try:
            return process.wait(deadline)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _kill(process.pid)


def _fork(arguments: tuple[str, str, str], environment: Mapping[str, str], deadline: float) -> int | None:
    """The same from a fork of this process, which holds what a dry run's parts import: once ten seconds, not for each part."""
    load_stand_in_for_te()
    process = multiprocessing.get_context("fork").Process(target=_forked, args=(arguments, environment))
    process.start()
    try:
        process.join(deadline)
        return process.exitcode
    finally:
        _kill(process.pid)
        process.join()


def _forked(arguments: tuple[str, str, str], environment: Mapping[str, str]) -> None:
    os.setsid()
    os.environ.update(environment)
    tempfile.tempdir = None
    name, out, job = arguments
    one(name, Path(out), job)


def _kill(pid: int | None) -> None:
    """With all that it started and left."""
    if pid:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def _log(out: Path, name: str) -> Path:
    return out / "logs" / f"{name}.log"


def chosen(stages: list[str], names: list[str]) -> list[Part]:
    known = {part.name for part in PARTS}
    for option, given, those in (("stage", stages, STAGES), ("part", names, known)):
        for value in given:
            if value not in those:
                raise typer.BadParameter(f"--{option} {value} is none of {', '.join(those)}")
    return [p for p in PARTS if (not stages or p.stage in stages) and (not names or p.name in names)]


def changed(parts: list[Part], changes: list[str], *, dry: bool) -> list[dict[str, Any]]:
    """Each part's settings, with what --set says over them."""
    settings = [part.settings_of(dry=dry) for part in parts]
    for change in changes:
        key, equals, text = change.partition("=")
        try:
            value = json.loads(text)
        except ValueError:
            raise typer.BadParameter(f"--set {change}: write KEY=JSON, texts as '\"fa3\"'") from None
        having = [each for each in settings if key in each]
        if not equals or not having:
            raise typer.BadParameter(f"--set {change}: none of these parts has {key}")
        for each in having:
            each[key] = value
    return settings


def find_versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def find_card() -> tuple[str, dict[str, str]]:
    """Name of the first device, and CUDA's version and the driver's, asked in another process: this one holds no memory there."""
    ask = "import torch; print(torch.cuda.get_device_name() + '|' + torch.version.cuda)"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    if done.returncode:
        typer.secho(
            "no CUDA device on this machine: nothing to measure; --dry runs on a CPU", fg="red", err=True
        )
        raise typer.Exit(2)
    card, cuda = done.stdout.strip().splitlines()[-1].split("|")
    file = Path("/proc/driver/nvidia/version")
    driver = file.read_text().splitlines()[0] if file.exists() else "unknown"
    return card, {"cuda": cuda, "driver": driver}


@cache
def load_stand_in_for_te() -> None:
    """Transformer Engine's Python code with its kernels emulated, its layers in the policy, and what parts import."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # what megatron compiles takes minutes on a CPU
    os.environ["PYTHONPATH"] = str(ROOT)  # servers and tools are started without it
    sys.path.append(str(_TE))
    from tests.te.stand_in import install

    install()
    from gspo_mm.policy import spec

    spec.FUSED = True
    for part in PARTS:
        importlib.import_module(f"tools.bench.card.{part.function.split('.')[0]}")


if __name__ == "__main__":
    app()

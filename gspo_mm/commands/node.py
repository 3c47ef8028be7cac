"""Can this job's nodes train? Run by every rank before the run, as train.sbatch does: `python -m gspo_mm.commands.node`.

Each rank looks at its own GPU (there, idle, not throttled), at its node's memory and limits and at the run folder, multiplies
matrices for half a second, and tells rank 0, which knows by then who is silent and who is slow. Then all of them sum a
buffer in turn for two seconds. Status 4 when a node is bad: why goes to stderr, and the names of all bad ones to stdout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import torch.distributed as dist
import typer

from gspo_mm.runtime.dist import device, ranks_here, world_size
from gspo_mm.runtime.limits import raise_file_limit
from gspo_mm.runtime.net import LOOPBACK, machine_name
from gspo_mm.runtime.probe import SLOW, matmul_rate, relative
from gspo_mm.types import GspoError

STATUS = 4
_IDLE = 2 * 2**30  # bytes that a GPU may hold when nobody uses it
_BUFFER = 2**26  # bytes that are summed

type Report = dict[str, Any]  # node, faults, rate


def own_report(folder: Path | None, *, gpus: bool) -> Report:
    """What this rank finds by itself."""
    faults = [*_gpu_faults()] if gpus else []
    memory = psutil.virtual_memory()
    if memory.available < 0.25 * memory.total:
        faults.append(f"{memory.available / 2**30:.0f} of {memory.total / 2**30:.0f} GiB of memory are free")
    try:
        raise_file_limit(world_size(), gpus=gpus)
    except GspoError as error:
        faults.append(str(error))
    if folder:
        probe = folder / f".node-{os.environ.get('RANK', '0')}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe.write_text("written")
            probe.unlink()
        except OSError as error:
            faults.append(f"{folder} cannot be written: {error.strerror}")
    return {"node": machine_name(), "faults": faults, "rate": 0.0 if faults else matmul_rate(0.5)}


def _gpu_faults() -> list[str]:
    if not torch.cuda.is_available() or torch.cuda.device_count() < ranks_here():
        return [f"{torch.cuda.device_count()} GPUs can be used, and {ranks_here()} ranks need one each"]
    number = device().index
    free, total = torch.cuda.mem_get_info(number)
    faults = []
    if total - free > _IDLE:
        faults.append(f"GPU {number} is in use: {(total - free) / 2**30:.0f} GiB of it are taken")
    with suppress(OSError, subprocess.SubprocessError):  # a machine without the tool is not bad for that
        said = subprocess.run(
            ["nvidia-smi", f"--id={number}", "--format=csv,noheader",
             "--query-gpu=clocks_event_reasons.hw_slowdown,ecc.errors.uncorrected.volatile.total"],
            capture_output=True, text=True, timeout=30, check=True,
        ).stdout.strip()  # fmt: skip
        slowed, errors = (word.strip() for word in said.split(","))
        if slowed == "Active":
            faults.append(f"GPU {number} is slowed down by its hardware (heat or power)")
        if errors.isdecimal() and int(errors):
            faults.append(f"GPU {number} has had {errors} memory errors that were not corrected")
    return faults


def judge(reports: Mapping[int, Report | None], nodes: Sequence[str]) -> dict[str, str]:
    """What is wrong with each bad node. `reports` by rank, None of a silent one; `nodes`: that of each rank, if known."""
    bad: dict[str, str] = {}
    speeds = relative({rank: report["rate"] for rank, report in reports.items() if report and report["rate"]})
    for rank, report in reports.items():
        if report is None:
            bad.setdefault(nodes[rank], f"rank {rank} does not answer")
        elif report["faults"]:
            bad.setdefault(report["node"], "; ".join(report["faults"]))
        elif speeds[rank] < SLOW:
            bad.setdefault(report["node"], f"rank {rank} computes at {speeds[rank]:.0%} of the others' speed")
    return bad


def look(own: Report, *, timeout: float) -> tuple[dict[str, str], float]:
    """The bad nodes; where there are none, how fast the ring is (`ring`). Every rank calls it with its own report.

    Raises DistError where rank 0 does not answer.
    """
    rank, size = _rank(), world_size()
    address, port = os.environ.get("MASTER_ADDR", LOOPBACK), int(os.environ.get("MASTER_PORT", "29500"))
    patience = timedelta(seconds=2 * timeout)  # rank 0 needs some of it to find out who is silent
    store = dist.TCPStore(address, port, size, rank == 0, patience, wait_for_workers=False)
    store.set(f"report {rank}", json.dumps(own))
    if rank == 0:
        _judge_all(store, size, timeout=timeout)
    bad = json.loads(store.get("bad"))
    speed = 0.0 if bad else ring(store, rank, size)
    store.add("left", 1)
    deadline = time.monotonic() + 10
    while rank == 0 and store.add("left", 0) < size and time.monotonic() < deadline:  # the store is there
        time.sleep(0.05)
    return bad, speed


def _judge_all(store: dist.TCPStore, size: int, *, timeout: float) -> None:
    """On rank 0: wait for all reports, and tell everybody."""
    keys = [f"report {rank}" for rank in range(size)]
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and not store.check(keys):
        time.sleep(0.1)
    reports = {r: json.loads(store.get(key)) if store.check([key]) else None for r, key in enumerate(keys)}
    store.set("bad", json.dumps(judge(reports, _nodes_of_ranks(size))))


def _nodes_of_ranks(size: int) -> list[str]:
    """Names by rank, in blocks, where Slurm says which nodes there are."""
    listed = os.environ.get("SLURM_JOB_NODELIST", "")
    nodes: list[str] = []
    with suppress(OSError, subprocess.SubprocessError):
        command = ["scontrol", "show", "hostnames", listed]
        nodes = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()
    if not nodes or size % len(nodes):
        return [f"the node of rank {rank}" for rank in range(size)]
    return [nodes[rank * len(nodes) // size] for rank in range(size)]


def ring(store: dist.Store, rank: int, size: int, *, seconds: float = 2.0) -> float:
    """GiB per second that a sum over all ranks goes through. What hangs raises DistError after a minute."""
    where = device()
    if where.type == "cuda":
        torch.cuda.set_device(where)
    backend, patience = ("nccl" if where.type == "cuda" else "gloo"), timedelta(seconds=60)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
    buffer = torch.ones(_BUFFER // 4, device=where)
    dist.all_reduce(buffer)
    began, passed, done = time.perf_counter(), torch.zeros((), device=where), 0
    while passed < seconds:
        dist.all_reduce(buffer.fill_(1.0))
        done += 1
        passed.fill_(time.perf_counter() - began)
        dist.all_reduce(passed, op=dist.ReduceOp.MAX)  # all of them leave after the same round
    assert float(buffer[0]) == dist.get_world_size(), "a sum over the ranks is wrong"
    dist.destroy_process_group()
    return done * _BUFFER / float(passed) / 2**30


def main(
    folder: Annotated[Path | None, typer.Option(help="run folder, which must be writable")] = None,
    gpus: Annotated[bool, typer.Option(help="each rank needs a GPU")] = True,
    timeout: Annotated[float, typer.Option(help="seconds to wait for silent ranks")] = 120.0,
) -> None:
    """Look at the job's nodes; every rank calls it."""
    speaks = _rank() == 0
    try:
        found, speed = look(own_report(folder, gpus=gpus), timeout=timeout)
    except dist.DistError as error:
        found, speed = {_nodes_of_ranks(world_size())[0]: f"rank 0 does not answer: {error}"}, 0.0
        speaks = _rank() == world_size() - 1
    if speaks and found:
        for node, why in found.items():
            typer.echo(f"bad node {node}: {why}", err=True)
        typer.echo("bad nodes: " + ",".join(found))
    elif speaks:
        typer.echo(f"all nodes are fit; a sum over {world_size()} ranks goes at {speed:.2f} GiB/s")
    sys.stdout.flush()
    os._exit(STATUS if found else 0)  # threads of gloo or NCCL can keep Python from ending


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


if __name__ == "__main__":
    typer.run(main)

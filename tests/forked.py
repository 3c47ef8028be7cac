"""Programs that begin in a fork of a process that has imported torch, megatron and the rest: in a second instead of ten.

What they do after their imports is what they do as `python -m`. Imports themselves, and a seed of hashes for each process, are
not seen here: tests of signals, of lost ranks, of short_run and of Slurm start their programs as a user does.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from gspo_mm.runtime.net import LOOPBACK, free_port

ROOT = Path(__file__).parents[1]
GRACE = 30.0  # seconds that ranks have to end in order when one has failed


@dataclass(frozen=True, kw_only=True)
class Program:
    """What a fork is to run: a script with arguments, or -m and a module with arguments."""

    command: list[str]
    environment: dict[str, str]
    # files for its output
    out: str
    err: str


class Forks:
    """Starts programs in forks of one process that has imported `modules`; they see the places in `path`, too."""

    def __init__(self, *modules: str, path: tuple[str, ...] = ()) -> None:
        self._modules, self._path = modules, os.pathsep.join([str(ROOT), *path])
        self._channel: Connection[Any, Any] | None = None

    def run(
        self, *command: str, ranks: int = 1, timeout: float = 400, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """On so many ranks, of one thread each where there are several; when one fails, the others are ended, as torchrun does.

        The status is the first one that is not 0; output is the ranks', one after the other.
        """
        environment = {**os.environ, "PYTHONPATH": self._path, "COLUMNS": "200", **environment}
        places: list[dict[str, str]] = [{}]
        if ranks > 1:
            shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
            shared |= {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(free_port(LOOPBACK))}
            places = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        with tempfile.TemporaryDirectory() as folder:
            outs, errs = ([f"{folder}/{name}{i}" for i in range(len(places))] for name in ("out", "err"))
            programs = [
                Program(command=list(command), environment=environment | place, out=out, err=err)
                for place, out, err in zip(places, outs, errs, strict=True)
            ]
            status = self._statuses(programs, timeout)
            out, err = ("".join(Path(file).read_text() for file in files) for files in (outs, errs))
        return subprocess.CompletedProcess(command, status, out, err)

    def _statuses(self, programs: list[Program], timeout: float) -> int:
        channel = self._started()
        for program in programs:
            channel.send(program)
        alive, status, end = [channel.recv() for _ in programs], 0, time.monotonic() + timeout
        late = False
        while alive:
            if not late and not channel.poll(max(0.0, end - time.monotonic())):
                late = not status
                _send(signal.SIGKILL, alive)
            pid, found = channel.recv()
            alive.remove(pid)
            if found and not status:
                status, end = found, min(end, time.monotonic() + GRACE)
                _send(signal.SIGTERM, alive)
        if late:
            raise subprocess.TimeoutExpired(programs[0].command, timeout)
        return status

    def _started(self) -> Connection[Any, Any]:
        if self._channel is None:
            self._channel, theirs = Pipe()
            command = [sys.executable, "-m", "tests.forked", str(theirs.fileno()), *self._modules]
            environment = {**os.environ, "PYTHONPATH": self._path, "COLUMNS": "200"}
            subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=[theirs.fileno()])
            theirs.close()
            atexit.register(self._channel.close)
        return self._channel


COMMANDS = Forks("gspo_mm.train", "gspo_mm.sft", "gspo_mm.commands.evaluate", "gspo_mm.commands.preflight")


def _send(number: signal.Signals, pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):  # its end is on the way to us
            os.kill(pid, number)


def serve(channel: Connection[Any, Any]) -> Program | None:
    """A program, in the fork that is to run it; None where no one asks any more."""
    alive: set[int] = set()
    while True:
        try:
            program = channel.recv() if channel.poll(0.01 if alive else None) else None
        except (EOFError, ConnectionResetError):
            _send(signal.SIGKILL, alive)
            return None
        if program is not None:
            if not (pid := os.fork()):
                channel.close()
                return program
            alive.add(pid)
            channel.send(pid)
        elif alive:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                alive.remove(pid)
                channel.send((pid, os.waitstatus_to_exitcode(status)))


def begin(program: Program) -> None:
    import torch

    os.environ.clear()
    os.environ.update(program.environment)
    for number, file in ((1, program.out), (2, program.err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    torch.set_num_threads(int(program.environment.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    sys.path[:0] = program.environment["PYTHONPATH"].split(os.pathsep)
    module, *arguments = program.command
    if module == "-m":
        module, *sys.argv[1:] = arguments
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = program.command
        sys.path.insert(0, str(Path(module).parent))
        runpy.run_path(module, run_name="__main__")


def main() -> None:
    number, *modules = sys.argv[1:]
    gc.disable()
    for module in modules:
        importlib.import_module(module)
    gc.freeze()
    gc.enable()
    program = serve(Connection(int(number)))
    if program is not None:
        begin(program)


if __name__ == "__main__":
    main()

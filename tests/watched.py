"""A run in processes of its own, seen from outside: what its folder says, waiting for it, and its servers killed."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from gspo_mm.observe.metrics import read_metrics
from gspo_mm.serving.registry import registered
from gspo_mm.serving.server import Server


class Watched:
    """`processes`: its ranks, to be filled by whoever starts them."""

    def __init__(self, path: Path, *, patience: float) -> None:
        """`patience`: seconds that anything may take on a busy machine."""
        self.path = path
        self.patience = patience
        self.processes: list[subprocess.Popen[bytes]] = []

    def steps(self) -> int:
        return max((line["step"] for line in read_metrics(self.path)), default=0)

    def log(self) -> str:
        return (self.path / "log.txt").read_text()

    def up(self) -> dict[str, Server]:
        return {s.name: s for s in registered(self.path / "servers") if s.state == "up"}

    def family(self) -> list[psutil.Process]:
        """Its ranks, and all that they have started."""
        found: list[psutil.Process] = []
        for process in self.processes:
            with suppress(psutil.NoSuchProcess):
                rank = psutil.Process(process.pid)
                found += [rank, *rank.children(recursive=True)]
        return found

    def wait(self, what: str, condition: Callable[[], Any]) -> None:
        end = time.monotonic() + self.patience
        while not condition():
            assert all(p.poll() is None for p in self.processes), f"ended in wait of {what}:\n{self.log()}"
            assert time.monotonic() < end, f"waited {self.patience:g} s in vain for {what}:\n{self.log()}"
            time.sleep(0.02)

    def wait_for_steps(self, count: int) -> None:
        goal = self.steps() + count
        self.wait(f"step {goal}", lambda: self.steps() >= goal)


class Gate:
    """An environment that holds answers up between two turns: `Waits`, at first open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            "python": "tests.environments:Waits",
            "args": {"folder": str(folder)},
            "timeout": 600.0,
        }
        self.open()

    def open(self) -> None:
        (self.folder / "go").touch()

    def close(self, run: Watched) -> None:
        """Returns when answers wait between two turns, and none goes on."""
        waiting = self.folder / "waiting"
        (self.folder / "go").unlink()
        waiting.unlink(missing_ok=True)
        run.wait("answers between two turns", waiting.exists)


def kill_server(server: Server) -> None:
    """Whatever listens where it did."""
    port = urlsplit(server.url).port
    listening = psutil.net_connections(kind="tcp")
    for pid in {c.pid for c in listening if c.pid and c.status == "LISTEN" and c.laddr.port == port}:
        os.kill(pid, signal.SIGKILL)

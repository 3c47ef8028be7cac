"""Who serves a run: one small file per server in RUN/servers, written by whoever keeps it running.

A `ServerHost` (in the trainer, or in `gspo-mm serve` on another machine) writes a registration when its server is
ready and changes it when the server is gone; the trainer's fleet reads them. The trainer in turn leaves a heartbeat
there, so that hosts elsewhere know when the run has ended. Files appear by rename, hence always whole, and are for
the owner's eyes: they hold the keys.
"""

from __future__ import annotations

import json
import socket
import time
from dataclasses import asdict
from pathlib import Path

from gspo_mm.runtime.disk import written_whole
from gspo_mm.serving.server import Server

_HEARTBEAT = "trainer.beat"


def servers_folder(run: Path) -> Path:
    """RUN/servers, made for the owner alone."""
    folder = run / "servers"
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    return folder


def register(folder: Path, registration: Server) -> None:
    write_private(folder / f"{registration.name}.json", json.dumps(asdict(registration)))


def registered(folder: Path) -> list[Server]:
    """All registrations, by name."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            found.append(Server(**json.loads(path.read_text())))
        except FileNotFoundError:  # removed while we were looking
            continue
    return found


def beat(folder: Path, *, ended: str = "") -> None:
    """The trainer is alive; or, with a reason, that its run has ended."""
    write_private(folder / _HEARTBEAT, json.dumps({"time": time.time(), "ended": ended}))


def last_beat(folder: Path) -> tuple[float, str] | None:
    """Time of the last heartbeat, by the trainer's clock, and why the run ended ("": it has not); None: no trainer yet."""
    try:
        values = json.loads((folder / _HEARTBEAT).read_text())
    except FileNotFoundError:
        return None
    return values["time"], values["ended"]


def forget_ended(folder: Path) -> None:
    """Remove what earlier runs left: servers that stopped, and those of machines that died without a word."""
    for registration in registered(folder):
        if registration.state == "stopped" or not _listens(registration.url):
            (folder / f"{registration.name}.json").unlink(missing_ok=True)


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, whole or not at all."""
    with written_whole(path, private=True) as file:
        file.write_text(text)


def _listens(url: str) -> bool:
    host, _, port = url.removeprefix("http://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=2.0).close()
    except (OSError, ValueError):
        return False
    return True

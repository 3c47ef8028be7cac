"""`gspo-mm serve`: keeps servers running on this machine for a run whose trainer is elsewhere, until that run ends."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from gspo_mm.config import Config
from gspo_mm.runtime.net import machine_name
from gspo_mm.runtime.preempt import StopRequest
from gspo_mm.serving.host import ServerHost
from gspo_mm.serving.registry import last_beat, servers_folder
from gspo_mm.serving.server import ServerError

logger = logging.getLogger(__name__)

_POLL = 0.5  # seconds


def serve(config: Config, stop: StopRequest) -> str:
    """Run the servers of `config` until the trainer's run has ended; returns the reason.

    Raises ServerError when no trainer shows up or stays within rollout.sglang.down_timeout, or when no server can be
    kept running. A signal ends it in order, one that came before it as well: the trainer sees it.
    """
    folder = servers_folder(config.run.path)
    host = ServerHost(config, folder, prefix=f"{machine_name()}-{os.getpid()}")
    reason = "its keeper failed"
    host.start()
    try:
        reason = _wait(folder, host, patience=config.rollout.sglang.down_timeout, signalled=stop.name)
    except ServerError as error:
        reason = str(error)
        raise
    finally:
        host.stop(reason)
    return reason


def _wait(folder: Path, host: ServerHost, *, patience: float, signalled: Callable[[], str]) -> str:
    """Returns why the servers are not needed any longer."""
    before = last_beat(folder)  # of an earlier trainer: says nothing about the one that we wait for
    beat, heard = None, time.monotonic()
    while True:
        if name := signalled():
            return f"stopped by {name}"
        if not host.running():
            raise ServerError(f"no server can be kept running: {host.reasons()}; see the logs in {folder}")
        now = last_beat(folder)
        if now not in (before, beat):
            if beat is None:
                logger.info("the trainer is there")
            before, beat, heard = None, now, time.monotonic()
        if beat and beat[1]:
            return f"the trainer's run is over: {beat[1]}"
        if time.monotonic() - heard > patience:
            raise ServerError(
                f"{'no sign of the trainer' if beat else 'no trainer came'} for rollout.sglang.down_timeout="
                f"{patience:g} s; start it with the same run.dir and run.name on a file system that both see"
            )
        time.sleep(_POLL)

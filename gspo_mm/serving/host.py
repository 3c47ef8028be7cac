"""Starts SGLang servers on this machine and keeps them running, each under a guard so that none outlives us.

A `ServerHost` has one thread per server: start it, wait until it is ready, report it in RUN/servers, watch it, and start it
again when it is gone. rank 0 runs a host where rollout.sglang.start=here, one rank of each machine where it is beside;
`gspo-mm serve` runs one elsewhere. Every server has its own random keys, listens on one address only, and logs into RUN/servers.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from gspo_mm.config import Config
from gspo_mm.runtime.dist import ranks_here
from gspo_mm.runtime.net import LOOPBACK, address_towards, free_port, machine_name
from gspo_mm.runtime.threads import share_of_cores
from gspo_mm.serving.admin import is_fine
from gspo_mm.serving.guard import guarded
from gspo_mm.serving.launch import (
    check_installed,
    first_gpus,
    server_environment,
    server_options,
    trainer_machines,
)
from gspo_mm.serving.registry import register, servers_folder, write_private
from gspo_mm.serving.served import served
from gspo_mm.serving.server import Server

logger = logging.getLogger(__name__)

_POLL = 0.2  # seconds
_HEALTH_EVERY = 30.0  # seconds
_STEADY = 300.0  # seconds up after which earlier failures are forgotten
_BACKOFF = 1.0  # seconds before the first restart; then twice as long each time
_LOG_LINES = 15  # of a server's log, shown when it fails
# with which Python ends after options that argparse refuses, and after an exception that nobody caught
_REFUSED = (1, 2)
_USAGE = re.compile(r"usage: |\s+\[-")  # argparse lists all options before it says which one it refuses
# in a server's last words: what may be otherwise the next time
_PASSING = re.compile(
    r"in use|not available|out of memory|timed out|temporarily|connection (refused|reset)|no space",
    re.IGNORECASE,
)


class ServerHost:
    """The servers of this machine. `start` returns at once; RUN/servers shows when each is ready."""

    def __init__(
        self, config: Config, folder: Path, *, prefix: str, training: int = 0, address: str = LOOPBACK
    ) -> None:
        """`address` is listened on where rollout.sglang.host names none; `training`: ranks on this machine.

        Raises ServerError when sglang is not installed, or GPUs are too few.
        """
        sglang = config.rollout.sglang
        check_installed(sglang.python)
        gpus: list[int | None] = [None] * sglang.servers
        if torch.cuda.is_available():
            gpus = [*first_gpus(sglang, training=training, present=torch.cuda.device_count())]
        self._stop = threading.Event()
        self._keepers = [
            _Keeper(
                config,
                folder,
                f"{prefix}-{i}",
                sglang.host or address,
                first_gpu=gpu,
                threads=share_of_cores(training + sglang.servers * sglang.tp),
                stop=self._stop,
            )
            for i, gpu in enumerate(gpus)
        ]

    def start(self) -> None:
        for keeper in self._keepers:
            keeper.thread.start()

    def running(self) -> bool:
        """Whether any server is up, starting, or will be started again."""
        return any(keeper.thread.is_alive() for keeper in self._keepers)

    def reasons(self) -> str:
        """Why servers are not up, for people."""
        return "; ".join(keeper.why for keeper in self._keepers)

    def stop(self, reason: str) -> None:
        """End every server with all its processes; returns when they are gone."""
        for keeper in self._keepers:
            keeper.stop_reason = reason
        self._stop.set()
        for keeper in self._keepers:
            keeper.thread.join()


class _Keeper:
    """Keeps one server running."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        name: str,
        address: str,
        *,
        first_gpu: int | None,
        threads: int,
        stop: threading.Event,
    ) -> None:
        self.thread = threading.Thread(target=self._keep, name=f"keeper of {name}", daemon=True)
        self._config = config
        self._sglang = config.rollout.sglang
        self._folder = folder
        self._name = name
        self._address = address
        self._first_gpu = first_gpu
        self._threads = threads  # of each process that computes, without a GPU
        self._ending = stop
        self.stop_reason = "stopped"
        self.why = ""  # it is not up
        self._log_begin = 0  # where the log of the server that runs now begins, in bytes

    def _keep(self) -> None:
        try:
            self._keep_running()
        except Exception as error:  # in a thread nobody would see it, and the run would wait for this server
            logger.exception("the keeper of server %s failed", self._name)
            self._report("stopped", "", f"cannot be kept running: {error!r}")

    def _keep_running(self) -> None:
        failures, ever_up, last_end = 0, False, ""
        while not self._ending.is_set():
            generation = secrets.token_hex(4)
            server = self._server(generation)
            began = time.monotonic()
            with tempfile.TemporaryDirectory(prefix="gspo-mm-") as private:
                process = self._launch(server, Path(private))
                try:
                    reason = self._await_ready(process, server)
                    if not reason:
                        failures, ever_up = 0 if time.monotonic() - began > _STEADY else failures, True
                        logger.info("server %s is ready at %s", self._name, server.url)
                        register(self._folder, server)
                        began = time.monotonic()
                        reason = self._watch(process, server)
                    status = process.poll()
                finally:
                    process.terminate()  # the guard ends the whole tree
                    process.wait()
            if self._ending.is_set():
                break
            failures = 1 if time.monotonic() - began > _STEADY else failures + 1
            # a server that never was up and ends by the same error again has no use for a third try
            end = re.sub(r"\d+", "", reason)  # without times, processes and addresses
            hopeless = status is not None and not ever_up and not _PASSING.search(reason)
            hopeless = hopeless and (status in _REFUSED or end == last_end)
            last_end = end
            again = failures <= self._sglang.max_restarts and not hopeless
            logger.warning("server %s %s%s", self._name, reason, "; starting it again" if again else "")
            self.why = f"{self._name} {reason}"
            self._report("down" if again else "stopped", generation, reason)
            if not again or self._ending.wait(min(_BACKOFF * 2.0 ** (failures - 1), 30.0)):
                break
        if self._ending.is_set():
            self._report("stopped", "", self.stop_reason)

    def _server(self, generation: str) -> Server:
        return Server(
            name=self._name,
            generation=generation,
            state="up",
            url=f"http://{self._address}:{free_port(self._address)}",
            api_key=secrets.token_hex(24),
            admin_key=secrets.token_hex(24),
            workers=self._sglang.tp,
            machine=socket.gethostname(),
            first_gpu=self._first_gpu or 0,
        )

    def _launch(self, server: Server, private: Path) -> subprocess.Popen[bytes]:
        options = server_options(self._config, server, on_gpus=self._first_gpu is not None)
        # in a file: a command line is for everybody to read
        settings = self._folder / f"{self._name}.yaml"
        write_private(settings, OmegaConf.to_yaml(OmegaConf.create(options)))
        log = self._log()
        log.touch(mode=0o600)
        self._log_begin = log.stat().st_size
        python = self._sglang.python or sys.executable
        command = [python, "-m", "sglang.launch_server", "--config", str(settings)]
        logger.info("starting server %s, log in %s", self._name, log)
        with log.open("ab") as output:
            return subprocess.Popen(
                guarded(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=server_environment(
                    self._config,
                    self._folder,
                    private,
                    on_gpus=self._first_gpu is not None,
                    threads=self._threads,
                ),
                start_new_session=True,
            )

    def _await_ready(self, process: subprocess.Popen[bytes], server: Server) -> str:
        """Returns when the server answers, with "", or with why it will not."""
        began = reported = time.monotonic()
        while not self._ending.wait(_POLL):
            if process.poll() is not None:
                return f"ended with status {process.returncode} while starting; {self._last_words()}"
            now = time.monotonic()
            if now - began > self._sglang.start_timeout:
                return f"was not ready within rollout.sglang.start_timeout={self._sglang.start_timeout} s"
            if is_fine(server, "/ready", timeout=2.0):
                return ""
            if now - reported > 15:
                reported = now
                logger.info("server %s has been starting for %.0f s", self._name, now - began)
        return self.stop_reason

    def _watch(self, process: subprocess.Popen[bytes], server: Server) -> str:
        """Returns why the server is to be started again."""
        healthy = asked = time.monotonic()
        while not self._ending.wait(_POLL):
            if process.poll() is not None:
                return f"ended with status {process.returncode}; {self._last_words()}"
            now = time.monotonic()
            if now - asked > _HEALTH_EVERY:
                asked = now
                if is_fine(server, "/health", timeout=25.0):
                    healthy = now
                elif now - healthy > self._config.sync.timeout:
                    return f"has not been healthy for {now - healthy:.0f} s"
        return self.stop_reason

    def _report(self, state: Any, generation: str, reason: str) -> None:
        register(self._folder, Server(name=self._name, generation=generation, state=state, reason=reason))

    def _log(self) -> Path:
        return self._folder / f"{self._name}.log"

    def _last_words(self) -> str:
        written = self._log().read_bytes()[self._log_begin :].decode(errors="replace").splitlines()
        lines = [line for line in written if not _USAGE.match(line)][-_LOG_LINES:]
        return f"the end of {self._log()}:\n" + "\n".join(f"    {line[:300]}" for line in lines)


def host_of_other_machine(config: Config) -> ServerHost | None:
    """With rollout.sglang.start=beside, on the first rank of each machine but rank 0's, whose fleet has its own."""
    sglang = config.rollout.sglang
    if sglang.urls or sglang.start != "beside" or os.environ.get("LOCAL_RANK", "0") != "0":
        return None
    return host_beside_trainer(served(config), servers_folder(config.run.path))


def host_beside_trainer(config: Config, folder: Path) -> ServerHost:
    """The servers of this machine of the trainer, not yet started. Raises ServerError like `ServerHost`."""
    several = trainer_machines(config) > 1
    address = address_towards([os.environ["MASTER_ADDR"]]) if several else LOOPBACK
    return ServerHost(config, folder, prefix=machine_name(), training=ranks_here(), address=address)

"""Starts SGLang servers on this machine and keeps them running, each under a guard so that none outlives us.

A `ServerHost` has one thread per server: start it, wait until it is ready, tell RUN/servers, watch it, and start it
anew when it is gone. rank 0 runs a host where rollout.sglang.start=here, one rank of each machine where it is beside;
`gspo-mm serve` runs one elsewhere. Every server has its own random keys, listens on one address only, and logs into RUN/servers.
"""

from __future__ import annotations

import importlib.metadata
import json
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

import httpx
import torch
from omegaconf import OmegaConf

from gspo_mm.config import Config, SGLangConfig
from gspo_mm.rollout import sglang_cpu
from gspo_mm.rollout.registry import Registration, bearer, register, write_private
from gspo_mm.runtime.dist import ranks_here, world_size
from gspo_mm.runtime.guard import guarded
from gspo_mm.runtime.net import address_towards, free_port, machine_name
from gspo_mm.runtime.seeds import derive_seed
from gspo_mm.runtime.threads import share_of_cores
from gspo_mm.types import GspoError

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"

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

# what torchrun and Slurm tell the trainer's ranks must not reach a server
_RANK_VARIABLES = {
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
}  # fmt: skip


class ServerError(GspoError):
    """A server could not be started or kept running."""


class ServerHost:
    """The servers of this machine. `start` returns at once; RUN/servers tells when each is ready."""

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
            self._tell("stopped", "", f"cannot be kept running: {error!r}")

    def _keep_running(self) -> None:
        failures, ever_up, last_end = 0, False, ""
        while not self._ending.is_set():
            generation = secrets.token_hex(4)
            registration = self._registration(generation)
            began = time.monotonic()
            with tempfile.TemporaryDirectory(prefix="gspo-mm-") as private:
                process = self._launch(registration, Path(private))
                try:
                    reason = self._await_ready(process, registration)
                    if not reason:
                        failures, ever_up = 0 if time.monotonic() - began > _STEADY else failures, True
                        logger.info("server %s is ready at %s", self._name, registration.url)
                        register(self._folder, registration)
                        began = time.monotonic()
                        reason = self._watch(process, registration)
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
            self._tell("down" if again else "stopped", generation, reason)
            if not again or self._ending.wait(min(_BACKOFF * 2.0 ** (failures - 1), 30.0)):
                break
        if self._ending.is_set():
            self._tell("stopped", "", self.stop_reason)

    def _registration(self, generation: str) -> Registration:
        return Registration(
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

    def _launch(self, registration: Registration, private: Path) -> subprocess.Popen[bytes]:
        options = server_options(self._config, registration, on_gpus=self._first_gpu is not None)
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
                env=self._environment(private),
                start_new_session=True,
            )

    def _environment(self, private: Path) -> dict[str, str]:
        env = {
            k: v
            for k, v in os.environ.items()
            if k not in _RANK_VARIABLES and not k.startswith("TORCHELASTIC_")
        }
        if not {"vision", "projector"} <= set(self._config.policy.freeze):
            # SGLang keeps image features by the image's content and forgets them on no weight update: answers would
            # go on seeing with the tower that the server started with
            env["SGLANG_VLM_CACHE_SIZE_MB"] = "0"
        # where the server's own processes meet; a TCPStore, SGLang's default, listens on all interfaces
        env["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] = f"file://{private}/store"
        if self._first_gpu is None:
            env |= sglang_cpu.environment(self._folder)
            env.setdefault("OMP_NUM_THREADS", str(self._threads))
        return env

    def _await_ready(self, process: subprocess.Popen[bytes], registration: Registration) -> str:
        """Returns when the server answers, with "", or with why it will not."""
        began = told = time.monotonic()
        while not self._ending.wait(_POLL):
            if process.poll() is not None:
                return f"ended with status {process.returncode} while starting; {self._last_words()}"
            now = time.monotonic()
            if now - began > self._sglang.start_timeout:
                return f"was not ready within rollout.sglang.start_timeout={self._sglang.start_timeout} s"
            if answers(registration, "/ready", timeout=2.0):
                return ""
            if now - told > 15:
                told = now
                logger.info("server %s has been starting for %.0f s", self._name, now - began)
        return self.stop_reason

    def _watch(self, process: subprocess.Popen[bytes], registration: Registration) -> str:
        """Returns why the server is to be started anew."""
        healthy = asked = time.monotonic()
        while not self._ending.wait(_POLL):
            if process.poll() is not None:
                return f"ended with status {process.returncode}; {self._last_words()}"
            now = time.monotonic()
            if now - asked > _HEALTH_EVERY:
                asked = now
                if answers(registration, "/health", timeout=25.0):
                    healthy = now
                elif now - healthy > self._config.sync.timeout:
                    return f"has not been healthy for {now - healthy:.0f} s"
        return self.stop_reason

    def _tell(self, state: Any, generation: str, reason: str) -> None:
        register(
            self._folder, Registration(name=self._name, generation=generation, state=state, reason=reason)
        )

    def _log(self) -> Path:
        return self._folder / f"{self._name}.log"

    def _last_words(self) -> str:
        written = self._log().read_bytes()[self._log_begin :].decode(errors="replace").splitlines()
        lines = [line for line in written if not _USAGE.match(line)][-_LOG_LINES:]
        return f"the end of {self._log()}:\n" + "\n".join(f"    {line[:300]}" for line in lines)


def host_beside_trainer(config: Config, folder: Path) -> ServerHost:
    """The servers of this machine of the trainer, not yet started. Raises ServerError like `ServerHost`."""
    several = trainer_machines(config) > 1
    address = address_towards([os.environ["MASTER_ADDR"]]) if several else LOOPBACK
    return ServerHost(config, folder, prefix=machine_name(), training=ranks_here(), address=address)


def trainer_machines(config: Config) -> int:
    """On how many machines the trainer starts servers."""
    return world_size() // ranks_here() if config.rollout.sglang.start == "beside" else 1


def workers_beside_trainer(config: Config) -> int:
    """Processes that sample on this machine, of servers that the trainer starts."""
    sglang = config.rollout.sglang
    started = config.rollout.engine == "sglang" and sglang.start != "elsewhere" and not sglang.urls
    return sglang.servers * sglang.tp if started else 0


def first_gpus(sglang: SGLangConfig, *, training: int, present: int) -> range:
    """The first GPU of each server of a machine. Raises ServerError when there are too few."""
    taken = 0 if sglang.colocate else training
    end = taken + sglang.servers * sglang.tp
    if end > present:
        beside = f" beside the {taken} that train" if taken else ""
        raise ServerError(
            f"rollout.sglang.servers={sglang.servers} of tp={sglang.tp} need {end - taken} GPUs{beside}, and this machine has "
            f"{present}; start fewer, run them elsewhere with `gspo-mm serve`, or share GPUs by rollout.sglang.colocate=true"
        )
    return range(taken, end, sglang.tp)


def server_options(config: Config, registration: Registration, *, on_gpus: bool) -> dict[str, Any]:
    """Options of sglang.launch_server, by name."""
    sglang = config.rollout.sglang
    host, _, port = registration.url.removeprefix("http://").rpartition(":")
    options: dict[str, Any] = {
        "model-path": str(Path(config.model.path).absolute()),
        "host": host,
        "port": int(port),
        "api-key": registration.api_key,
        "admin-api-key": registration.admin_key,
        "dtype": config.policy.dtype,
        "mem-fraction-static": sglang.mem_fraction,
        "context-length": sglang.context_length
        or config.data.max_prompt_tokens + config.rollout.sampling.max_new_tokens,
        "tp-size": sglang.tp,
        "ep-size": sglang.ep,
        # servers that drew the same random numbers would give the same answers
        "random-seed": derive_seed(config.run.seed, "server", registration.name, registration.generation)
        % 2**31,
        "skip-server-warmup": True,
        "enable-priority-scheduling": True,  # evaluation goes first
    }
    if sglang.fp8:
        # model.path has no weights then (families/served.py); a push brings them before anything is asked. Scales of the
        # key/value cache are drawn as well, from seed 1234: negative on CPU and CUDA, which SGLang takes for none
        options["load-format"] = "dummy"
    if sglang.dp > 1:
        options |= {"dp-size": sglang.dp, "enable-dp-attention": True}
    if sglang.max_tokens:
        options["max-total-tokens"] = sglang.max_tokens
    if sglang.max_running:
        options["max-running-requests"] = sglang.max_running
    if sglang.max_images:
        options["limit-mm-data-per-request"] = f'{{"image": {sglang.max_images}}}'
    if config.data.min_pixels or config.data.max_pixels:
        image = {"min_pixels": config.data.min_pixels, "max_pixels": config.data.max_pixels}
        options["mm-process-config"] = json.dumps({"image": {k: v for k, v in image.items() if v}})
    if on_gpus:
        options |= {"base-gpu-id": registration.first_gpu, "enable-memory-saver": sglang.colocate}
    else:
        options |= sglang_cpu.ARGUMENTS
    return options | dict(sglang.extra_args)


def answers(registration: Registration, path: str, *, timeout: float) -> bool:
    """Whether a server says 200 at `path`."""
    try:
        headers = bearer(registration.api_key)
        return httpx.get(registration.url + path, headers=headers, timeout=timeout).status_code == 200
    except httpx.HTTPError:
        return False


def is_alive(registration: Registration) -> bool:
    """Whether a server that was ready once still answers. One that pauses for new weights says 503."""
    try:
        return httpx.get(registration.url + "/ready", timeout=10.0).status_code in (200, 503)
    except httpx.HTTPError:
        return False


def check_installed(python: str | None) -> None:
    """Raise ServerError unless the interpreter has sglang."""
    if python is None:
        try:
            importlib.metadata.version("sglang")
        except importlib.metadata.PackageNotFoundError:
            raise ServerError(
                "rollout.engine=sglang needs sglang: pip install 'gspo-mm[sglang]', or name the interpreter of an "
                "environment that has it in rollout.sglang.python"
            ) from None
        return
    probe = [python, "-c", "import importlib.metadata as m; m.version('sglang')"]
    try:
        done = subprocess.run(probe, capture_output=True, text=True)
    except OSError as error:
        raise ServerError(f"rollout.sglang.python={python} cannot be run: {error.strerror}") from None
    if done.returncode:
        raise ServerError(f"rollout.sglang.python={python} has no sglang; pip install sglang there")

"""Weights to SGLang servers. A push is

    pause  ->  send (disk.py, tensor.py or distributed.py)  ->  compare checksums  ->  continue

so that no token is computed with half of the new weights. Servers that hold FP8 get FP8 (quantize.py). Servers on the
trainer's own GPUs (rollout.sglang.colocate) give their memory back while the policy trains, and get it again when
weights come. A server that dies on the way is left out, and the push is done again for the others; when it is back it
gets the weights at the next push, and is asked nothing before.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any, Protocol

import torch

from gspo_mm.config import Config
from gspo_mm.families.folder import read_hf
from gspo_mm.policy.engine import Policy
from gspo_mm.rollout.engine import RolloutEngine
from gspo_mm.rollout.sglang import SGLangEngine
from gspo_mm.serving.admin import call_all
from gspo_mm.serving.served import served_template
from gspo_mm.serving.server import Server, ServerError
from gspo_mm.sync.checksums import Checksums, check_complete, compare
from gspo_mm.sync.disk import DiskSender, exchange_folder, load_folder, write_served
from gspo_mm.sync.distributed import DistributedSender
from gspo_mm.sync.quantize import audit, on_the_way
from gspo_mm.sync.tensor import TensorSender

logger = logging.getLogger(__name__)

_ATTEMPTS = 3
_MEMORY = ("weights", "kv_cache")  # SGLang's names of what a server can give back


class Sender(Protocol):
    """One way for tensors to reach servers. Every method is a collective."""

    def __init__(self, config: Config, policy: Policy) -> None: ...

    def send(self, servers: list[Server], *, version: int, checksums: Checksums) -> None:
        """All weights to all of `servers`, noting checksums of what is sent. Raises ServerError."""
        ...

    def close(self) -> None: ...


SENDERS: dict[str, type[Sender]] = {
    "disk": DiskSender,
    "tensor": TensorSender,
    "distributed": DistributedSender,
}


class SGLangPush:
    """Brings weights to all servers of the fleet, by the Sender of `sync.mode`."""

    def __init__(self, config: Config, policy: Policy, engine: RolloutEngine | None) -> None:
        assert engine is None or isinstance(engine, SGLangEngine)
        self._ranks = policy.ranks
        self._entries = policy.weights.entries
        self._engine = engine
        self._sender = SENDERS[config.sync.mode](config, policy)
        self._sync = config.sync
        # with `finish` none are under way but those of a server that failed meanwhile
        self._mode = "in_place" if config.rollout.keeps_cache else "retract"
        self._family = policy.family
        self._layers = policy.family.linear_layers(policy.hf)
        self._colocated = config.rollout.sglang.colocate

    def push(self, *, version: int) -> None:
        if self._colocated and torch.cuda.is_available():
            torch.cuda.empty_cache()
        for attempt in range(1, _ATTEMPTS + 1):
            servers = self._servers()
            try:
                self._push_to(servers, version)
                return
            except ServerError as fault:
                if attempt == _ATTEMPTS:
                    raise
                if self._engine:
                    logger.warning("weights of version %d did not arrive, trying again: %s", version, fault)
                self._leave_out_the_dead(servers)

    def make_room(self) -> None:
        """Raises ServerError when a server keeps its memory. One that has died has given it back."""
        if not self._colocated:
            return
        with self._ranks.together():
            if self._engine is None:
                return
            for server in self._engine.fleet.up():
                try:
                    self._call([server], "/pause_generation", mode="abort")  # what was given up may still run
                    self._call([server], "/release_memory_occupation", tags=list(_MEMORY))
                    self._engine.fleet.holding(server).asleep = set(_MEMORY)
                except ServerError:
                    self._leave_out_the_dead([server])
                    if server in self._engine.fleet.up():
                        raise

    def close(self) -> None:
        self._sender.close()

    def _servers(self) -> list[Server]:
        servers: list[Server] = []
        with self._ranks.together():
            if self._engine:
                servers = self._engine.run(self._engine.fleet.reachable())
        return self._ranks.from_main(servers)

    def _leave_out_the_dead(self, servers: list[Server]) -> None:
        if self._engine:
            for server in servers:
                self._engine.run(self._engine.fleet.suspect(server.url))

    def _push_to(self, servers: list[Server], version: int) -> None:
        checksums = Checksums(self._family)
        with self._ranks.together():
            self._wake(servers, "weights")
            self._call(servers, "/pause_generation", mode=self._mode)
        self._sender.send(servers, version=version, checksums=checksums)
        of_ranks = self._ranks.gather((checksums.names, checksums.sent))
        names = [name for names, _ in of_ranks for name in names]
        check_complete(self._entries, names)
        with self._ranks.together():
            if self._engine:
                if self._sync.verify:
                    sent = {name: value for _, sums in of_ranks for name, value in sums.items()}
                    compare(servers, sent, timeout=self._sync.timeout)
                    self._audit(servers, names)
                self._wake(servers, "kv_cache")
                self._call(servers, "/continue_generation")
                self._engine.run(self._engine.hold(version, servers))

    def _audit(self, servers: list[Server], sent: list[str]) -> None:
        """Once for each start of a server, which decides what it holds in FP8."""
        assert self._engine
        new = [server for server in servers if not self._engine.fleet.holding(server).audited]
        if new:
            audit(new, self._layers, sent, timeout=self._sync.timeout)
        for server in new:
            self._engine.fleet.holding(server).audited = True

    def _wake(self, servers: list[Server], memory: str) -> None:
        """Give `memory` back to those that sleep."""
        if self._engine is None:
            return
        holding = self._engine.fleet.holding
        asleep = [server for server in servers if memory in holding(server).asleep]
        self._call(asleep, "/resume_memory_occupation", tags=[memory])
        for server in asleep:
            holding(server).asleep.remove(memory)

    def _call(self, servers: list[Server], path: str, **body: Any) -> None:
        if self._engine:
            call_all(servers, path, timeout=self._sync.timeout, **body)

    @staticmethod
    def serve_folder(config: Config, engine: RolloutEngine) -> None:
        assert isinstance(engine, SGLangEngine)
        servers = engine.fleet.up()
        path = Path(config.model.path).absolute()
        if config.rollout.sglang.fp8:
            source = read_hf(path, config.model.experts_layout)
            path = exchange_folder(config) / "v0"
            tensors = on_the_way(config)(source)
            write_served(path, served_template(config), tensors, bucket_mb=config.sync.bucket_mb)
        timeout = config.sync.timeout
        # servers that outlive runs may still answer what the last one gave up
        call_all(servers, "/pause_generation", timeout=timeout, mode="abort")
        load_folder(servers, path, config, version=0)
        call_all(servers, "/continue_generation", timeout=timeout)
        engine.run(engine.hold(0, servers))
        if config.rollout.sglang.fp8:
            shutil.rmtree(path, ignore_errors=True)

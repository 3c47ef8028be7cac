"""Bring the policy's weights to whatever samples with them.

One protocol, `WeightPush`. In one process it is a copy, tensor by tensor, under the Hugging Face names that a server
or a checkpoint gets, so a fault in the weight map shows here first. For SGLang servers a push is

    pause  ->  send (disk.py, tensor.py or distributed.py)  ->  compare checksums  ->  continue

so that no token is computed with half of the new weights. Servers that hold FP8 get FP8 (quantize.py). Servers on the
trainer's own GPUs (rollout.sglang.colocate) give their memory back while the policy trains, and get it again when
weights come. A server that dies on the way is left out, and the push is done again for the others; when it is back it
gets the weights at the next push, and is asked nothing before.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from gspo_mm.config import Config
from gspo_mm.families import family_of, read_hf
from gspo_mm.policy.engine import Policy
from gspo_mm.rollout.embedded import EmbeddedEngine
from gspo_mm.rollout.engine import RolloutEngine
from gspo_mm.rollout.registry import Registration
from gspo_mm.rollout.served import served_template
from gspo_mm.rollout.servers import ServerError
from gspo_mm.rollout.sglang import SGLangEngine
from gspo_mm.sync.checksums import Checksums, check_complete
from gspo_mm.sync.disk import DiskSender, exchange_folder, load_folder, write_served
from gspo_mm.sync.distributed import DistributedSender
from gspo_mm.sync.quantize import audit, on_the_way
from gspo_mm.sync.tensor import TensorSender

logger = logging.getLogger(__name__)

_ATTEMPTS = 3
_MEMORY = ("weights", "kv_cache")  # SGLang's names of what a server can give back


class WeightPush(Protocol):
    """Makes the engine sample with the policy's weights. Every method is a collective."""

    def push(self, *, version: int) -> None:
        """All weights, under `version`. Raises ValueError or a GspoError when one would be left stale."""
        ...

    def make_room(self) -> None:
        """Nothing will be sampled before the next push: the engine may give its memory to training."""
        ...

    def close(self) -> None: ...


class Sender(Protocol):
    """One way for tensors to reach servers. Every method is a collective."""

    def send(self, servers: list[Registration], *, version: int, checksums: Checksums) -> None:
        """All weights to all of `servers`, noting checksums of what is sent. Raises ServerError."""
        ...

    def close(self) -> None: ...


def build_push(config: Config, policy: Policy, engine: RolloutEngine | None) -> WeightPush:
    """The push that fits `rollout.engine` and `sync.mode`. `engine` is None on ranks other than 0, and when replaying."""
    if config.rollout.engine == "embedded" or config.rollout.replay:
        assert engine is None or isinstance(engine, EmbeddedEngine)
        return InProcessPush(policy, engine)
    assert engine is None or isinstance(engine, SGLangEngine)
    return ServerPush(policy, engine, build_sender(config, policy, engine), config)


def build_sender(config: Config, policy: Policy, engine: SGLangEngine | None) -> Sender:
    """The sender of `sync.mode`."""
    if config.sync.mode == "distributed":
        return DistributedSender(config, policy)
    if config.sync.mode == "tensor":
        return TensorSender(config, policy)
    return DiskSender(config, policy, engine)


def serve_folder(engine: RolloutEngine, config: Config) -> None:
    """Let the engine answer with the weights in `model.path`, without any policy."""
    if isinstance(engine, EmbeddedEngine):
        engine.load_weights(read_hf(config.model.path, config.model.experts_layout), version=0)
        return
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
    engine.run(engine.control_all(servers, "/pause_generation", timeout=timeout, mode="abort"))
    engine.run(load_folder(engine, servers, path, config, version=0))
    engine.run(engine.control_all(servers, "/continue_generation", timeout=timeout))
    engine.run(engine.fleet.hold(0, servers))
    if config.rollout.sglang.fp8:
        shutil.rmtree(path, ignore_errors=True)


class InProcessPush:
    """Copies into the embedded engine of rank 0; the other ranks give their parts of the weights."""

    def __init__(self, policy: Policy, engine: EmbeddedEngine | None) -> None:
        self._policy = policy
        self._engine = engine

    def push(self, *, version: int) -> None:
        def load(tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
            if self._engine is not None:
                self._engine.load_weights(tensors, version=version)

        self._policy.ranks.stream_to_main(self._policy.export(), load)

    def make_room(self) -> None:
        pass

    def close(self) -> None:
        pass


class ServerPush:
    """Brings weights to all servers of the fleet, by one Sender."""

    def __init__(self, policy: Policy, engine: SGLangEngine | None, sender: Sender, config: Config) -> None:
        self._ranks = policy.ranks
        self._entries = policy.weights.entries
        self._engine = engine
        self._sender = sender
        self._sync = config.sync
        # with `finish` none are under way but those of a server that failed meanwhile
        self._mode = "in_place" if config.rollout.keeps_cache else "retract"
        family = family_of(config.model.path)
        self._layers = family.linear_layers(family.load_config(config.model.path))
        # generations of servers; what they hold in FP8 is decided at their start
        self._audited: set[str] = set()
        self._colocated = config.rollout.sglang.colocate
        self._asleep: dict[str, set[str]] = {}  # by generation, what servers gave back of their memory

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
            for server in self._engine.fleet.up() if self._engine else []:
                try:
                    self._tell([server], "/pause_generation", mode="abort")  # what was given up may still run
                    self._tell([server], "/release_memory_occupation", tags=list(_MEMORY))
                    self._asleep[server.generation] = set(_MEMORY)
                except ServerError:
                    self._leave_out_the_dead([server])
                    if self._engine and server in self._engine.fleet.up():
                        raise

    def close(self) -> None:
        self._sender.close()

    def _servers(self) -> list[Registration]:
        servers: list[Registration] = []
        with self._ranks.together():
            if self._engine:
                servers = self._engine.run(self._engine.fleet.reachable())
        return self._ranks.from_main(servers)

    def _leave_out_the_dead(self, servers: list[Registration]) -> None:
        if self._engine:
            for server in servers:
                self._engine.run(self._engine.fleet.suspect(server.url))

    def _push_to(self, servers: list[Registration], version: int) -> None:
        checksums = Checksums()
        with self._ranks.together():
            self._wake(servers, "weights")
            self._tell(servers, "/pause_generation", mode=self._mode)
        self._sender.send(servers, version=version, checksums=checksums)
        of_ranks = self._ranks.gather((checksums.names, checksums.sent))
        names = [name for names, _ in of_ranks for name in names]
        check_complete(self._entries, names)
        sent = {name: value for _, sums in of_ranks for name, value in sums.items()}
        with self._ranks.together():
            if self._sync.verify and self._engine:
                self._engine.run(checksums.compare(self._engine, servers, sent, self._sync.timeout))
                self._audit(self._engine, servers, names)
            self._wake(servers, "kv_cache")
            self._tell(servers, "/continue_generation")
            if self._engine:
                self._engine.run(self._engine.fleet.hold(version, servers))

    def _audit(self, engine: SGLangEngine, servers: list[Registration], sent: list[str]) -> None:
        new = [server for server in servers if server.generation not in self._audited]
        if new:
            engine.run(audit(engine, new, self._layers, sent, timeout=self._sync.timeout))
            self._audited |= {server.generation for server in new}

    def _wake(self, servers: list[Registration], memory: str) -> None:
        """Give `memory` back to those that sleep."""
        asleep = [server for server in servers if memory in self._asleep.get(server.generation, ())]
        self._tell(asleep, "/resume_memory_occupation", tags=[memory])
        for server in asleep:
            self._asleep[server.generation].remove(memory)

    def _tell(self, servers: list[Registration], path: str, **body: Any) -> None:
        if self._engine:
            self._engine.run(self._engine.control_all(servers, path, timeout=self._sync.timeout, **body))

"""Weights straight from the ranks that own them to all servers, by broadcast: NCCL on GPUs, else gloo.

Every pipeline stage and expert-parallel rank has one sender (`Weights.senders`), with a process group of its own that
holds all workers of all servers. Nothing is gathered over expert-parallel or pipeline ranks: the servers get every
expert from the rank that trains it. Senders take turns in one fixed order, since two that broadcast at once could
each wait for a server that waits for the other. While a bucket is under way the next is gathered.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gspo_mm.config import Config
from gspo_mm.policy.engine import Policy
from gspo_mm.runtime.dist import device
from gspo_mm.serving.admin import Calls, begin_update, end_update
from gspo_mm.serving.server import Server
from gspo_mm.sync.buckets import MIB, Buffers
from gspo_mm.sync.checksums import Checksums
from gspo_mm.sync.group import UpdateGroup, connect
from gspo_mm.sync.quantize import on_the_way
from gspo_mm.types import GspoError


class DistributedSender:
    """Sender over process groups, which are made at the first push and again when a server was started again."""

    def __init__(self, config: Config, policy: Policy) -> None:
        self._policy = policy
        self._ranks = policy.ranks
        self._sync = config.sync
        self._flush = not config.rollout.keeps_cache
        self._on_the_way = on_the_way(config)
        self._senders = policy.weights.senders(policy.ranks)
        self._group: UpdateGroup | None = None  # of this rank, if it is a sender
        self._members: list[str] = []  # generations of the servers in it

    def send(self, servers: list[Server], *, version: int, checksums: Checksums) -> None:
        members = [server.generation for server in servers]
        if members != self._members:
            self._leave()
        try:
            with Calls(servers, timeout=self._sync.timeout) as calls:
                with self._ranks.together():
                    if self._ranks.main:
                        begin_update(calls)
                for sender in self._senders:
                    with self._ranks.together():
                        self._take_turn(sender, calls, checksums)
                with self._ranks.together():
                    if self._ranks.main:
                        end_update(calls, version=version, flush=self._flush)
        except GspoError:  # on all ranks
            self._leave(broken=True)
            raise
        self._members = members

    def close(self) -> None:
        self._leave()

    def _take_turn(self, sender: int, calls: Calls, checksums: Checksums) -> None:
        tensors = self._policy.weights.export_own(sender)
        try:
            if self._ranks.rank == sender:
                self._group = self._group or connect(calls, device=device())
                self._send(self._group, checksums.noted(self._on_the_way(tensors)), calls)
        finally:
            # ranks that gather with this one are never left alone, even when sending has failed
            for _ in tensors:
                pass

    def _send(self, group: UpdateGroup, tensors: Iterator[tuple[str, torch.Tensor]], calls: Calls) -> None:
        buffers = Buffers(self._sync.bucket_mb * MIB, device())
        under_way = None
        for bucket in buffers.fill(self._policy.family.prefixes.renamed(tensors)):
            if under_way:
                under_way.wait()
            under_way = group.send(bucket, calls)
        if under_way:
            under_way.wait()

    def _leave(self, *, broken: bool = False) -> None:
        if self._group:
            self._group.close(broken=broken)
        self._group, self._members = None, []

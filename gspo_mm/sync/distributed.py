"""Weights straight from the ranks that own them to all servers, by broadcast: NCCL on GPUs, else gloo.

Every pipeline stage and expert-parallel rank has one sender (`Weights.senders`), with a process group of its own for each
part of the servers, which holds all workers of them. Nothing is gathered over expert-parallel or pipeline ranks: the
servers get every expert from the rank that trains it. All senders gather at once and send at once, each to another part
(circle.py). While a bucket is sent and loaded the next is gathered: a sender holds two.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import zip_longest

import torch

from gspo_mm.config import Config
from gspo_mm.policy.engine import Policy
from gspo_mm.policy.weights import meta_of
from gspo_mm.runtime.dist import device
from gspo_mm.runtime.watchdog import beat
from gspo_mm.serving.admin import Calls, begin_update, end_update
from gspo_mm.serving.server import Server
from gspo_mm.sync.buckets import MIB, Bucket, Buffers
from gspo_mm.sync.checksums import Checksums
from gspo_mm.sync.circle import Circle
from gspo_mm.sync.group import UpdateGroup, connect
from gspo_mm.sync.quantize import on_the_way
from gspo_mm.types import GspoError

PARTS = 8  # of the servers at most: a sender's GPU holds the buffers of a group for each
META = torch.device("meta")


class DistributedSender:
    """Sender over process groups, which are made at the first push and again when a server was started again."""

    def __init__(self, config: Config, policy: Policy) -> None:
        self._ranks = policy.ranks
        self._weights = policy.weights
        self._prefixes = policy.family.prefixes
        self._sync = config.sync
        self._flush = not config.rollout.keeps_cache
        self._on_the_way = on_the_way(config)
        self._groups: dict[int, UpdateGroup] = {}  # of this rank, if it is a sender, by part of the servers
        self._members: list[str] = []  # generations of the servers in them
        own = self._weights.export_own(self._ranks.rank, meta_of)
        buckets = self._ranks.gather(sum(1 for _ in self._buckets(self._on_the_way(own), META)))
        self._senders = [rank for rank in self._weights.senders(self._ranks) if buckets[rank]]
        self._rounds = max(buckets)

    def send(self, servers: list[Server], *, version: int, checksums: Checksums) -> None:
        members = [server.generation for server in servers]
        if members != self._members:
            self._leave()
        try:
            with Calls(servers, timeout=self._sync.timeout) as calls:
                with self._ranks.together():
                    if self._ranks.main:
                        begin_update(calls)
                with self._ranks.together():
                    self._send_all(servers, checksums)
                with self._ranks.together():
                    if self._ranks.main:
                        end_update(calls, version=version, flush=self._flush)
        except GspoError:  # on all ranks
            self._leave(broken=True)
            raise
        self._members = members

    def close(self) -> None:
        self._leave()

    def _send_all(self, servers: list[Server], checksums: Checksums) -> None:
        """A collective: also ranks that send nothing gather with those that do, to the end even when sending has failed."""
        streams = [self._stream(sender, checksums) for sender in self._senders]
        if self._ranks.rank not in self._senders:
            for _ in zip_longest(*streams):
                pass
            return
        count = min(len(servers), len(self._senders), PARTS)
        circle = Circle(self._ranks, self._senders, parts=count, rounds=self._rounds)
        own = self._senders.index(self._ranks.rank)
        with ExitStack() as stack:
            parts = [
                stack.enter_context(Calls(servers[part::count], timeout=self._sync.timeout))
                for part in range(count)
            ]
            sending = stack.enter_context(ThreadPoolExecutor(1, initializer=_use_device))
            under_way: Future[None] | None = None
            for number in range(self._rounds):
                buckets = [next(stream, None) for stream in streams]
                if under_way:
                    under_way.result()
                under_way = sending.submit(circle.go_round, number, partial(self._send, buckets[own], parts))
            if under_way:
                under_way.result()
        if circle.fault:
            raise circle.fault

    def _stream(self, sender: int, checksums: Checksums) -> Iterator[Bucket]:
        """A sender's buckets; on ranks that gather with it without data, so that they stop where it does."""
        tensors = self._weights.export_own(sender)
        if sender == self._ranks.rank:
            return self._buckets(checksums.noted(self._on_the_way(tensors)), device())
        return self._buckets(self._on_the_way((name, tensor.to(META)) for name, tensor in tensors), META)

    def _buckets(self, tensors: Iterable[tuple[str, torch.Tensor]], where: torch.device) -> Iterator[Bucket]:
        return Buffers(self._sync.bucket_mb * MIB, where).fill(self._prefixes.renamed(tensors))

    def _send(self, bucket: Bucket | None, parts: Sequence[Calls], part: int) -> None:
        if bucket is None:
            return
        if part not in self._groups:
            self._groups[part] = connect(parts[part], device=device())
        self._groups[part].send(bucket, parts[part]).wait()
        beat()

    def _leave(self, *, broken: bool = False) -> None:
        for group in self._groups.values():
            group.close(broken=broken)
        self._groups, self._members = {}, []


def _use_device() -> None:
    """CUDA's current device is a thread's own."""
    if device().type == "cuda":
        torch.cuda.set_device(device())

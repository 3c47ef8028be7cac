"""What real gloo ranks on this machine do together: open files of each, and weights that all of them push to servers.

Nothing is computed: a rank's part of the weights takes a while to gather (it sleeps), a bucket takes servers a while to load
(weight_server.py), and what is left is how they wait for one another.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from gspo_mm.config import ParallelConfig, parse_config
from gspo_mm.families.names import Prefixes
from gspo_mm.policy import cpu
from gspo_mm.policy.parallel import ParallelPlan
from gspo_mm.runtime.dist import Ranks
from gspo_mm.runtime.net import LOOPBACK, free_port
from gspo_mm.serving.server import Server
from gspo_mm.sync.checksums import Checksums
from gspo_mm.sync.distributed import DistributedSender
from tools.bench.weight_server import servers

SERVERS, BUCKETS = 4, 4  # buckets of each rank
GATHER, LOAD = 0.02, 0.02  # seconds for one bucket
PUSHES = 3  # timed, after one that connects


class Part:
    """As much of `Weights` as a sender needs: every rank has tensors of its own."""

    def senders(self, ranks: Ranks) -> list[int]:
        return list(range(ranks.size))

    def export_own(self, sender: int, take: object = None) -> Iterator[tuple[str, torch.Tensor]]:
        if take or sender == int(os.environ["RANK"]):
            for number in range(BUCKETS):
                time.sleep(0 if take else GATHER)
                yield f"{sender}.{number}", torch.full((2**18,), float(number))


def measured(size: int) -> tuple[int, int, float]:
    """(open files of rank 0, most of another rank, seconds of a push) with so many ranks."""
    context = multiprocessing.get_context("fork")
    with servers(*[("--load", str(LOAD))] * SERVERS) as there:
        told: SimpleQueue[tuple[int, int, float]] = context.SimpleQueue()
        port = free_port(LOOPBACK)
        ranks = [
            context.Process(target=_rank, args=(rank, size, port, there, told), daemon=True)
            for rank in range(size)
        ]
        for rank in ranks:
            rank.start()
        of_ranks = {rank: (files, seconds) for rank, files, seconds in (told.get() for _ in ranks)}
        for rank in ranks:
            rank.join()
    files = [of_ranks[rank][0] for rank in range(size)]
    return files[0], max(files[1:]), of_ranks[0][1]


def _rank(
    rank: int, size: int, port: int, there: list[Server], told: SimpleQueue[tuple[int, int, float]]
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    cpu.install()
    ranks = Ranks()
    ParallelPlan.from_config(ParallelConfig(ep=size), size).initialize(seed=0)
    ranks.barrier()
    files = _open_files()
    family = SimpleNamespace(prefixes=Prefixes(), whole_tensor=lambda _: None)
    policy = cast(Any, SimpleNamespace(ranks=ranks, weights=Part(), family=family))
    config = parse_config(
        {
            "run": {"name": "ranks"}, "model": {"path": "unused"}, "data": {"train": ["unused.tar"]},
            "rollout": {"engine": "sglang", "prompts_per_step": 2 * size}, "sync": {"bucket_mb": 1},
            "reward": {"file": "unused.yaml"},
        }
    )  # fmt: skip
    sender = DistributedSender(config, policy)
    sender.send(there, version=0, checksums=Checksums(policy.family))
    began = time.monotonic()
    for number in range(PUSHES):
        sender.send(there, version=number, checksums=Checksums(policy.family))
    told.put((rank, files, (time.monotonic() - began) / PUSHES))
    ranks.barrier()
    os._exit(0)


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))

"""The ranks of a job, seen as one program: rank 0 decides, every rank takes part, a fault on one stops all.

    with ranks.together():            # a GspoError inside, on rank 0, is raised on every rank
        if ranks.main:
            work = ...                # sampling, scoring, dealing: one place, no collective
    work = ranks.from_main(work)      # on every rank

Objects travel over gloo on the host, whatever the devices use, so that a control message never waits behind a
kernel. torchrun and srun start the same command on every rank; without them the world is one rank.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist

from gspo_mm.runtime.limits import raise_file_limit
from gspo_mm.types import GspoError

logger = logging.getLogger(__name__)

# rank 0 may sample and score for long while the others wait for it
CONTROL_TIMEOUT = timedelta(hours=12)


def device() -> torch.device:
    """This rank's device."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def start_process_group() -> None:
    """Join the ranks that torchrun or srun started; without them be a world of one, which needs no port.

    Raises GspoError where this process may not open as many files as it needs.
    """
    if dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    backend, timeout = ("nccl", None) if torch.cuda.is_available() else ("gloo", CONTROL_TIMEOUT)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        raise_file_limit(world_size(), gpus=torch.cuda.is_available())
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def world_size() -> int:
    """Ranks that were started, known before they have joined."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def ranks_here() -> int:
    """Those of them on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class Ranks:
    """All ranks of the job. A method is a collective, called by all ranks in the same order, where it does not say otherwise."""

    def __init__(self) -> None:
        start_process_group()
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        # a second group over gloo would be as many open files again: one for each other rank
        shared = dist.get_backend() == "gloo"
        group = dist.group.WORLD if shared else dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
        self._group = cast(dist.ProcessGroup, group)
        machines: dict[str, list[int]] = {}
        for rank, host in enumerate(self.gather(socket.gethostname())):
            machines.setdefault(host, []).append(rank)
        self.machines = list(machines.values())  # the ranks of each, in order

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which reads data, drives rollouts and writes the run folder."""
        return self.rank == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Leave the block on all ranks or on none: a GspoError of any rank is raised on every rank.

        Any other exception is a defect of ours and ends its rank with a traceback; the launcher ends the others.
        """
        fault: GspoError | None = None
        try:
            yield
        except GspoError as error:
            fault = error
        first = next((f for f in self.gather(fault) if f is not None), None)
        if first is not None:
            first.told_elsewhere, first.on_all_ranks = fault is None, True
            raise first

    def stream_to_main[T](self, items: Iterator[T], use: Callable[[Iterator[T]], object]) -> None:
        """Rank 0 uses a stream whose every item all ranks must take part in, to its end even when rank 0 fails."""
        with self.together():
            try:
                if self.main:
                    use(items)
            finally:
                for _ in items:
                    pass

    def gather[T](self, value: T) -> list[T]:
        """The value of every rank, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def from_main[T](self, value: T | None) -> T:
        """Rank 0's value, on every rank; what others pass is ignored."""
        box = [value if self.main else None]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return cast(T, box[0])

    def send(self, data: memoryview, to: int) -> None:
        """Bytes to one other rank, which receives them: not a collective."""
        dist.send(torch.tensor(len(data)), to, group=self._group)
        dist.send(torch.frombuffer(data, dtype=torch.uint8), to, group=self._group)

    def receive(self, source: int) -> memoryview:
        """What a rank sends to this one: not a collective."""
        size = torch.tensor(0)
        dist.recv(size, source, group=self._group)
        data = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(data, source, group=self._group)
        return data.numpy().data

    def tell(self, flag: bool, to: int) -> dist.Work:
        """A flag to one other rank, which hears it: not a collective. It is on its way when this returns; wait for it later."""
        work = dist.isend(torch.tensor(int(flag)), to, group=self._group)
        assert work is not None, "this rank is in the group"
        return work

    def hear(self, source: int) -> bool:
        """What a rank tells this one: not a collective."""
        flag = torch.tensor(0)
        dist.recv(flag, source, group=self._group)
        return bool(flag)

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank."""
        value = torch.tensor(int(flag))
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self._group)
        return bool(value)

    def barrier(self) -> None:
        dist.barrier(group=self._group)

"""A process group of one trainer rank and all workers of some servers, through which buckets are broadcast.

It is the group that SGLang's `init_custom_process_group` makes on the other side (compat.py). The trainer's rank is 0 in
it and hosts the store.

The store and gloo's connections are not encrypted and ask for no key, as everywhere in torch.distributed: the machines
of a run share a network of their own. The store listens only on the address that leads to the servers, which is
loopback when they are all here.
"""

from __future__ import annotations

import logging
import secrets
import socket
import threading
import time
from concurrent.futures import Future
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from gspo_mm.runtime.net import address_towards
from gspo_mm.serving.admin import Calls, results
from gspo_mm.serving.server import Server, ServerError
from gspo_mm.sync.buckets import Bucket
from gspo_mm.sync.compat import join_group

logger = logging.getLogger(__name__)

_POLL = 0.001  # seconds
_FAREWELL = 5.0  # seconds that servers have to leave a group


class UpdateGroup:
    """Made by `connect`; `close` it."""

    def __init__(self, name: str, group: dist.ProcessGroup, servers: list[Server]) -> None:
        self._name = name
        self._group: Any = group
        self._servers = servers

    def send(self, bucket: Bucket, calls: Calls) -> Sending:
        """Begin to broadcast a bucket to servers that have an update open. They load it before the call returns."""
        calls_under_way = calls.start(
            "/update_weights_from_distributed",
            names=bucket.names,
            dtypes=[str(dtype).removeprefix("torch.") for dtype in bucket.dtypes],
            shapes=[list(shape) for shape in bucket.shapes],
            group_name=self._name,
            load_format="flattened_bucket",
            flush_cache=False,
        )
        return Sending(self._group.broadcast(bucket.flat, 0), calls_under_way, calls)

    def close(self, *, broken: bool = False) -> None:
        """Leave the group, and let the servers leave it; with `broken`, whatever is under way in it."""
        group, self._group = self._group, None
        if broken:
            # gloo ends a group only when its operations have ended or timed out; that must keep nobody waiting
            threading.Thread(target=_destroy, args=(group,), name=f"end of {self._name}", daemon=True).start()
            return
        with Calls(self._servers, timeout=_FAREWELL) as calls:
            try:
                calls.all("/destroy_weights_update_group", group_name=self._name)
            except ServerError as fault:
                logger.info("a server did not leave its group of weight updates: %s", fault)
        _destroy(group)


class Sending:
    """A bucket under way."""

    def __init__(self, work: Any, loading: list[Future[dict[str, Any]]], calls: Calls) -> None:
        self._work = work
        self._loading = loading
        self._calls = calls

    def wait(self) -> None:
        """Until all servers have loaded it. Raises ServerError as soon as one fails, refuses, or takes too long."""
        while not self._work.is_completed():
            results([call for call in self._loading if call.done()])
            self._calls.left()
            time.sleep(_POLL)
        try:
            self._work.wait()
        except RuntimeError as error:
            raise ServerError(f"the broadcast of weights failed: {str(error).splitlines()[0]}") from None
        results(self._loading)


def connect(calls: Calls, *, device: torch.device) -> UpdateGroup:
    """Make a group with all workers of the servers. Raises ServerError when one does not join."""
    name = f"gspo-mm-{secrets.token_hex(4)}"
    host = address_towards(urlsplit(server.url).hostname or "127.0.0.1" for server in calls.servers)
    backend = "nccl" if device.type == "cuda" else "gloo"
    size = 1 + sum(server.workers for server in calls.servers)
    timeout = timedelta(seconds=calls.left())
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        host, port, None, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    bodies: list[dict[str, Any]] = []
    offset = 1
    for server in calls.servers:
        bodies.append(
            {"master_address": host, "master_port": port, "rank_offset": offset, "world_size": size}
            | {"group_name": name, "backend": backend}
        )
        offset += server.workers
    joined = calls.start("/init_weights_update_group", bodies)
    try:
        group = join_group(name, store, size=size, backend=backend, timeout=timeout)
    except RuntimeError as error:
        results([call for call in joined if call.done()])
        raise ServerError(f"no group of weight updates came about: {str(error).splitlines()[0]}") from None
    made = UpdateGroup(name, group, calls.servers)
    try:
        results(joined)
    except ServerError:
        made.close(broken=True)
        raise
    return made


def _destroy(group: Any) -> None:
    try:
        dist.destroy_process_group(group)
    except (RuntimeError, ValueError) as error:
        logger.info("ending a group of weight updates: %s", error)

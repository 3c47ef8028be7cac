"""Administrative calls to several servers at once, from ranks that have no rollout engine."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import httpx

from gspo_mm.rollout.registry import Registration, bearer
from gspo_mm.rollout.servers import ServerError
from gspo_mm.rollout.sglang import admitted


class Calls:
    """A context manager that ends all calls `timeout` seconds after it was made."""

    def __init__(self, servers: list[Registration], *, timeout: float) -> None:
        self.servers = servers
        self._deadline = time.monotonic() + timeout
        self._client = httpx.Client(limits=httpx.Limits(max_connections=None))
        self._pool = ThreadPoolExecutor(max(len(servers), 1), thread_name_prefix="calls")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    def left(self) -> float:
        """Seconds until the deadline. Raises ServerError past it."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise ServerError("a push of weights took longer than sync.timeout; raise it")
        return left

    def start(
        self, path: str, bodies: list[dict[str, Any]] | None = None, **body: Any
    ) -> list[Future[dict[str, Any]]]:
        """POST to every server; with `bodies`, to each its own. The futures raise ServerError."""
        each = bodies or [body] * len(self.servers)
        return self.start_raw(path, [[json.dumps(of_server).encode()] for of_server in each])

    def start_raw(self, path: str, bodies: Sequence[Iterable[bytes]]) -> list[Future[dict[str, Any]]]:
        """As `start`, with the JSON already written, in pieces."""
        timeout = self.left()
        return [
            self._pool.submit(self._post, server, path, body, timeout)
            for server, body in zip(self.servers, bodies, strict=True)
        ]

    def all(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """POST to every server and wait. Raises the first ServerError when all have answered."""
        return answers(self.start(path, **body))

    def _post(self, server: Registration, path: str, body: Iterable[bytes], timeout: float) -> dict[str, Any]:
        headers = bearer(server.admin_key) | {"Content-Type": "application/json"}
        limits = httpx.Timeout(timeout, connect=min(timeout, 10.0))
        try:
            response = self._client.post(
                server.url + path, content=iter(body), headers=headers, timeout=limits
            )
        except (httpx.HTTPError, RuntimeError) as error:  # RuntimeError: the client was closed meanwhile
            raise ServerError(f"server {server.name} failed at {path}: {error!r}") from None
        return admitted(server, path, response)


def answers(calls: list[Future[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What all calls returned. Raises the first ServerError when all have ended."""
    faults = [call.exception() for call in calls]
    for fault in faults:
        if fault:
            raise fault
    return [call.result() for call in calls]


def begin_update(calls: Calls) -> None:
    """Open an update on every server; tensors go in between this and `end_update`."""
    try:
        calls.all("/begin_weight_update")
    except ServerError:  # an interrupted push may have left one open
        futures.wait(calls.start("/end_weight_update"))
        calls.all("/begin_weight_update")


def end_update(calls: Calls, *, version: int, flush: bool) -> None:
    """Close it: from now on the servers sample with these weights and say so.

    `flush` forgets the prefixes that the old weights computed. Servers that keep answers under way refuse that.
    """
    calls.all("/end_weight_update")
    calls.all("/update_weight_version", new_version=str(version), abort_all_requests=False)
    if flush:
        calls.all("/flush_cache")

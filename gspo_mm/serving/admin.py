"""What servers are asked besides answers: whether they are there, what they say of themselves, to take weights."""

from __future__ import annotations

import json
import logging
import ssl
import time
from collections.abc import Iterable, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any, Self

import httpx

from gspo_mm.serving.server import Server, ServerError, bearer

logger = logging.getLogger(__name__)


class Calls:
    """The same call to several servers at once; a context manager that ends all `timeout` seconds after it was made."""

    def __init__(self, servers: list[Server], *, timeout: float) -> None:
        self.servers = servers
        self._deadline = time.monotonic() + timeout
        self._client = httpx.Client(limits=httpx.Limits(max_connections=None), verify=_certificates())
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
        return self.start_raw(path, [json.dumps(of_server).encode() for of_server in each])

    def start_raw(self, path: str, bodies: Sequence[bytes | Iterable[bytes]]) -> list[Future[dict[str, Any]]]:
        """As `start`, with the JSON already written, at once or in pieces."""
        timeout = self.left()
        return [
            self._pool.submit(self._post, server, path, body, timeout)
            for server, body in zip(self.servers, bodies, strict=True)
        ]

    def all(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """POST to every server and wait. Raises the first ServerError when all have answered."""
        return results(self.start(path, **body))

    def _post(
        self, server: Server, path: str, body: bytes | Iterable[bytes], timeout: float
    ) -> dict[str, Any]:
        headers = bearer(server.admin_key) | {"Content-Type": "application/json"}
        limits = httpx.Timeout(timeout, connect=min(timeout, 10.0))
        try:
            response = self._client.post(
                server.url + path,
                content=body if isinstance(body, bytes) else iter(body),
                headers=headers,
                timeout=limits,
            )
        except (httpx.HTTPError, RuntimeError) as error:  # RuntimeError: the client was closed meanwhile
            raise ServerError(f"server {server.name} failed at {path}: {error!r}") from None
        return admitted(server, path, response)


def call_all(servers: list[Server], path: str, *, timeout: float, **body: Any) -> list[dict[str, Any]]:
    """One call to all servers. Raises the first ServerError when all have answered."""
    with Calls(servers, timeout=timeout) as calls:
        return calls.all(path, **body)


def results(calls: list[Future[dict[str, Any]]]) -> list[dict[str, Any]]:
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


def admitted(server: Server, path: str, response: httpx.Response) -> dict[str, Any]:
    """What a server answered to an administrative call. Raises ServerError when it refused."""
    said = _json(response)
    if response.status_code != 200 or said.get("success") is False:
        raise ServerError(f"server {server.name} refused {path}: {response.status_code} {said}")
    return said


def is_fine(server: Server, path: str, *, timeout: float) -> bool:
    """Whether a server says 200 at `path`."""
    try:
        return _get(server, path, timeout).status_code == 200
    except httpx.HTTPError:
        return False


def is_alive(server: Server) -> bool:
    """Whether a server that was ready once still answers. One that pauses for new weights says 503."""
    try:
        return _get(server, "/ready", 10.0).status_code in (200, 503)
    except httpx.HTTPError:
        return False


def info_of(server: Server, *paths: str) -> dict[str, Any]:
    """What the first of `paths` that the server knows says; nothing when none does."""
    for path in paths:
        try:
            response = _get(server, path, 60.0)
            said = response.json() if response.status_code == 200 else None
        except (httpx.HTTPError, ValueError) as error:
            logger.info("server %s does not answer %s: %r", server.name, path, error)
            continue
        if isinstance(said, dict):
            return said
    return {}


def _get(server: Server, path: str, timeout: float) -> httpx.Response:
    headers = bearer(server.api_key)
    return httpx.get(server.url + path, headers=headers, timeout=timeout, verify=_certificates())


@cache
def _certificates() -> ssl.SSLContext:
    """Read once: it takes longer than a call."""
    return httpx.create_ssl_context()


def _json(response: httpx.Response) -> dict[str, Any]:
    try:
        said = response.json()
    except ValueError:
        return {"message": response.text[:300]}
    return said if isinstance(said, dict) else {"message": said}

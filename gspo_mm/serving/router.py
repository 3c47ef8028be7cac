"""sglang-router in front of several servers: one address, groups of requests spread by load."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_fixed

from gspo_mm.runtime.net import LOOPBACK, free_port
from gspo_mm.serving.admin import is_alive
from gspo_mm.serving.guard import guarded
from gspo_mm.serving.server import Server, ServerError

logger = logging.getLogger(__name__)

GROUP = "X-SMG-Routing-Key"  # the header that names a request's group
_KEY = "GSPO_MM_ROUTER_KEY"
# the key travels in the environment: a command line is for everybody to read
_LAUNCH = (
    f"import os, sys; sys.argv += ['--api-key', os.environ.pop('{_KEY}')]; "
    "from sglang_router.launch_router import main; main()"
)
_PATIENCE = 60.0  # seconds for the router to start, or to take in a server


class _NotYetError(Exception):
    pass


class Router:
    """The router's process and the servers that it knows."""

    def __init__(self, log: Path) -> None:
        self.url = f"http://{LOOPBACK}:{free_port(LOOPBACK)}"
        self.api_key = secrets.token_hex(24)
        self.workers: dict[str, str] = {}  # the router's id of each server, by URL
        self._wanted: dict[str, Server] = {}
        self._one_at_a_time = asyncio.Lock()
        self._client = httpx.AsyncClient(
            base_url=self.url, headers={"Authorization": f"Bearer {self.api_key}"}, timeout=10.0
        )
        port = self.url.rpartition(":")[2]
        # a group's first request goes to the server that has fewest to answer, all others where that went while it lives
        command = [
            sys.executable, "-c", _LAUNCH, "--host", LOOPBACK, "--port", port, "--prometheus-host", LOOPBACK,
            "--prometheus-port", str(free_port(LOOPBACK)), "--policy", "manual", "--assignment-mode", "min_load",
            "--disable-retries", "--request-timeout-secs", "86400", "--log-level", "warn",
        ]  # fmt: skip
        self.log = log
        log.touch(mode=0o600)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                guarded(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, _KEY: self.api_key},
                start_new_session=True,
            )

    async def serve(self, servers: list[Server]) -> None:
        """Make `servers` the ones that prompts are sent to, but for those that do not answer.

        Of several calls at once the latest decides: servers die and come back while others are taken in.
        Raises ServerError when the router itself does not do it.
        """
        self._wanted = {server.url: server for server in servers}
        async with self._one_at_a_time:
            try:
                await self._change()
            except (httpx.HTTPError, _NotYetError) as error:
                if self.ended() is not None:  # the fleet starts another
                    return
                raise ServerError(f"sglang-router failed, see {self.log}: {error!r}") from None

    def ended(self) -> int | None:
        """The status of its process; None while it runs."""
        return self._process.poll()

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()

    async def _change(self) -> None:
        for known in await self._known():  # not only those in `workers`: one may have been taken in late
            if known["url"] not in self._wanted:
                self.workers.pop(known["url"], None)
                await self._delete(known["id"])
        self.workers = {url: worker for url, worker in self.workers.items() if url in self._wanted}
        for url, server in list(self._wanted.items()):
            if url not in self.workers:
                worker = await self._begin_adding(server)
                if await self._is_added(server, worker):
                    self.workers[url] = worker

    async def _known(self) -> list[dict[str, Any]]:
        async for attempt in self._patiently():
            with attempt:
                return (await self._client.get("/workers")).raise_for_status().json()["workers"]
        raise AssertionError

    async def _begin_adding(self, server: Server) -> str:
        """The router's id of it. It has taken it in some time later."""
        body = {"url": server.url, "api_key": server.api_key}
        async for attempt in self._patiently():
            with attempt:
                return (await self._client.post("/workers", json=body)).raise_for_status().json()["worker_id"]
        raise AssertionError

    async def _is_added(self, server: Server, worker: str) -> bool:
        """Wait until prompts may go there; False when it does not answer."""
        async for attempt in self._patiently():
            with attempt:
                if any(known["id"] == worker and known["is_healthy"] for known in await self._known()):
                    return True
                if not await asyncio.to_thread(is_alive, server):
                    return False
                raise _NotYetError(f"it has not taken in {server.url}")
        raise AssertionError

    async def _delete(self, worker: str) -> None:
        async for attempt in self._patiently():
            with attempt:
                response = await self._client.delete(f"/workers/{worker}")
                if response.status_code != 404:
                    response.raise_for_status()

    def _patiently(self) -> AsyncRetrying:
        def is_in_vain(state: RetryCallState) -> bool:
            return (state.seconds_since_start or 0.0) >= _PATIENCE or self.ended() is not None

        return AsyncRetrying(
            retry=retry_if_exception_type((httpx.HTTPError, _NotYetError)),
            wait=wait_fixed(0.2),
            stop=is_in_vain,
            reraise=True,
        )
